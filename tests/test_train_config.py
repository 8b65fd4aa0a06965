"""What a configuration refuses when it is built, and that each repair it names does work."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.models.config import named
from meshwright.sharding.errors import (
    ConfigError,
    MeshError,
    MeshwrightError,
    RulesError,
    TopologyError,
)
from meshwright.train.config import (
    HYPERPARAMETERS,
    DataConfig,
    GuardConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
    default_config,
)


def changed(**fields: Any) -> TrainConfig:
    return dataclasses.replace(default_config(), **fields)


def test_default_is_the_tiny_model_and_is_frozen() -> None:
    config = default_config()
    assert config == default_config() == TrainConfig(model=named("tiny"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("steps", 0, ConfigError, r"steps=0\n  why:   0 is below 1"),
        ("steps", 2.0, ConfigError, "steps=2.0\n.*whole number"),
        ("steps", True, ConfigError, "whole number"),
        ("batch_size", -8, ConfigError, "batch_size=-8"),
        ("seq_len", 0, ConfigError, "seq_len=0"),
        ("grad_accum", 0, ConfigError, "grad_accum=0"),
        ("log_every", 0, ConfigError, "log_every=0"),
        ("eval_every", -1, ConfigError, "eval_every=-1\n.*below 0"),
        ("keep_last", 0, ConfigError, "keep_last=0"),
        ("seed", -1, ConfigError, "seed=-1"),
        ("seed", 2**32 + 7, ConfigError, "32 bits\n  fix:   use 7,"),
        ("zero", 3, ConfigError, "zero=3\n(.*\n)+.*known: 0, 1, 2"),
        ("zero", True, ConfigError, "zero=True"),
        ("dtype", "bfloat61", ConfigError, "did you mean `bfloat16`"),
        ("accumulate", "shard", ConfigError, "did you mean `sharded`"),
        ("out", "", ConfigError, "out=''\n  why:   it is empty"),
        ("mesh", "fspd=2", MeshError, "did you mean `fsdp`"),
        ("mesh", "data=-1,fsdp=-1", MeshError, "both -1"),
        ("topology", "cpi:8", TopologyError, "cpi"),
        ("rules", ("mlp:tensor",), RulesError, "write it like params.mlp=tensor"),
        ("rules", ("parms.mlp=tensor",), RulesError, "did you mean `params`"),
        ("rules", ("params.mpl=tensor",), RulesError, "no dim `mpl`.*\n.*did you mean `mlp`"),
        ("rules", ("params.mlp=tenser",), RulesError, "not a mesh axis\n.*`tensor`"),
        ("rules", ("params.mlp=data", "params.mlp=fsdp"), RulesError, "shadowed"),
        ("profile_steps", "10-13", ConfigError, "write it like 10:13"),
        ("profile_steps", "13:13", ConfigError, "holds no step\n.*13:16"),
        ("profile_steps", "100:152", ConfigError, "150 steps\n.*end it at 151"),
    ],
)
def test_refuses(field: str, value: Any, error: type[MeshwrightError], message: str) -> None:
    with pytest.raises(error, match=message):
        changed(**{field: value})


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        (DataConfig, "heldout_fraction", 0.0, "above 0 and below 1"),
        (DataConfig, "heldout_fraction", 1.0, "above 0 and below 1"),
        (DataConfig, "path", "", "data.path=''"),
        (OptimizerConfig, "name", "adam", "did you mean `adamw`"),
        (OptimizerConfig, "schedule", "cosin", "did you mean `cosine`"),
        (OptimizerConfig, "learning_rate", 0.0, "above 0"),
        (OptimizerConfig, "learning_rate", math.nan, "finite"),
        (OptimizerConfig, "learning_rate", "1e-3", "finite number"),
        (OptimizerConfig, "clip_norm", -1.0, "0 or more"),
        (OptimizerConfig, "weight_decay", math.inf, "finite"),
        (OptimizerConfig, "warmup_steps", -1, "below 0"),
        (OptimizerConfig, "decay_fraction", 1.5, "0 or more and 1 or less"),
        (OptimizerConfig, "b1", 1.0, "0 or more and below 1"),
        (OptimizerConfig, "eps", 0.0, "above 0"),
        (LossConfig, "z_loss", -0.1, "loss.z_loss=-0.1"),
        (LossConfig, "label_smoothing", 1.0, "below 1"),
        (GuardConfig, "max_bad_steps", 0, "guard.max_bad_steps=0"),
        (GuardConfig, "spike_factor", 0.5, "count as a spike"),
    ],
)
def test_sections_refuse(section: Any, field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        section(**{field: value})


@pytest.mark.parametrize("optimizer", HYPERPARAMETERS)
@pytest.mark.parametrize("field", ["b1", "b2", "eps", "momentum"])
def test_an_optimizer_takes_its_own_settings_only(optimizer: Any, field: Any) -> None:
    setting: dict[str, Any] = {field: 0.5}
    if field in HYPERPARAMETERS[optimizer]:
        assert getattr(OptimizerConfig(name=optimizer, **setting), field) == 0.5
    else:
        listed = " and ".join(f"optimizer.{name}" for name in HYPERPARAMETERS[optimizer])
        with pytest.raises(ConfigError, match=f"{optimizer} has {listed}$"):
            OptimizerConfig(name=optimizer, **setting)


@settings(deadline=None)
@given(rows=st.integers(1, 300), parts=st.integers(1, 300))
def test_microbatches_divide_the_batch_or_the_error_names_what_does(rows: int, parts: int) -> None:
    try:
        changed(batch_size=rows, grad_accum=parts)
    except ConfigError as error:
        assert rows % parts
        batches, accums = re.findall(r"\d+(?: or \d+)?", error.fix)
        for batch in map(int, batches.split(" or ")):
            changed(batch_size=batch, grad_accum=parts)
        for accum in map(int, accums.split(" or ")):
            changed(batch_size=rows, grad_accum=accum)
    else:
        assert rows % parts == 0


@settings(deadline=None)
@given(steps=st.integers(1, 100_000))
def test_derived_warmup_fits_every_run(steps: int) -> None:
    config = changed(steps=steps, optimizer=OptimizerConfig(schedule="wsd"))
    assert 0 <= config.optimizer.warmup_for(steps) <= steps


def test_warmup_and_decay_must_fit() -> None:
    changed(steps=10, optimizer=OptimizerConfig(warmup_steps=10))
    with pytest.raises(ConfigError, match=r"11 steps of warm-up are more than 10\n.*10 or less"):
        changed(steps=10, optimizer=OptimizerConfig(warmup_steps=11))
    wsd = OptimizerConfig(schedule="wsd", warmup_steps=9, decay_fraction=0.2)
    with pytest.raises(ConfigError, match="9 steps of warm-up and 2 of decay"):
        changed(steps=10, optimizer=wsd)


def test_rows_end_where_learned_positions_end() -> None:
    learned = dataclasses.replace(named("tiny"), positions="learned", max_length=64)
    with pytest.raises(ConfigError, match="use seq_len 64 or less, or model.max_length 65"):
        changed(model=learned, seq_len=65)
    changed(model=learned, seq_len=64)
    changed(seq_len=4096)  # rotary positions do not end


def test_profile_range() -> None:
    assert list(changed(profile_steps="10:13").profile_range) == [10, 11, 12]
    assert not changed().profile_range


def test_good_rules_and_meshes_are_kept_as_written() -> None:
    rules = ("params.embed=data+fsdp", "activations.length=none", "optimizer.*=tensor")
    config = changed(rules=rules, mesh="tensor=2,data=-1", topology="v5p:4x4x8*2")
    assert (config.rules, config.mesh) == (rules, "tensor=2,data=-1")
