"""Config files: exact round trips, and every mistake named with its file and key."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.models.config import MODELS, named
from meshwright.sharding.errors import ConfigError
from meshwright.train.config import (
    HYPERPARAMETERS,
    DataConfig,
    GuardConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
    default_config,
)
from meshwright.train.configfile import apply, build, dump, load, merge, near_fields, tree

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.sampled_from(
    [
        "no",
        "null",
        "~",
        "1e-3",
        "010",
        "10:13",
        "2024-01-01",
        "<<",
        "=",
        "- a",
        "\x85",
        "a\u2028b\n",
        "a: b",
        "#",
        " x ",
    ]
)
numbers = st.floats(0, allow_nan=False, allow_infinity=False)


@st.composite
def optimizers(draw: st.DrawFn) -> OptimizerConfig:
    name: Any = draw(st.sampled_from(sorted(HYPERPARAMETERS)))
    fractions = st.none() | st.floats(1e-30, 1, exclude_max=True)
    own: dict[str, Any] = {field: draw(fractions) for field in HYPERPARAMETERS[name]}
    return OptimizerConfig(
        name=name,
        learning_rate=draw(st.floats(1e-30, 1e30)),
        schedule=draw(st.sampled_from(["cosine", "constant"])),
        weight_decay=draw(numbers),
        **own,
    )


@st.composite
def configs(draw: st.DrawFn) -> TrainConfig:
    model = named(draw(st.sampled_from(sorted(MODELS))))
    microbatches = draw(st.integers(1, 8))
    return TrainConfig(
        model=dataclasses.replace(model, name=draw(texts), init_std=draw(st.floats(1e-9, 1))),
        mesh=draw(st.sampled_from(["auto", "data=2,fsdp=-1", "fsdp=2*4"])),
        zero=draw(st.sampled_from([0, 1, 2])),
        rules=draw(st.sampled_from([(), ("params.mlp=data+fsdp", "activations.length=none")])),
        batch_size=microbatches * draw(st.integers(1, 10**6)),
        grad_accum=microbatches,
        dtype=draw(st.sampled_from([None, "bfloat16", "float32"])),
        out=draw(st.none() | texts),
        resume=draw(st.booleans()),
        data=DataConfig(path=draw(st.none() | texts), tokenizer=draw(texts)),
        optimizer=draw(optimizers()),
        loss=LossConfig(z_loss=draw(numbers)),
        guard=GuardConfig(spike_factor=draw(st.just(0.0) | st.floats(1.001, 1e9))),
        profile_steps=draw(st.sampled_from([None, "10:13"])),
        sample_prompt=draw(texts | st.just("")),
    )


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read(folder: Path, text: str | bytes) -> TrainConfig:
    path = write(folder, text)
    return apply(default_config(), load(path), "run.yaml")


@settings(deadline=None)
@given(config=configs())
def test_round_trip_is_exact(tmp_path_factory: pytest.TempPathFactory, config: TrainConfig) -> None:
    path = write(tmp_path_factory.getbasetemp(), dump(config))
    assert apply(default_config(), load(path), "run.yaml") == config


@settings(deadline=None)
@given(config=configs())
def test_other_yaml_readers_see_the_same_values(config: TrainConfig) -> None:
    assert yaml.safe_load(dump(config)) == tree(config)
    assert build(tree(config)) == config


def test_fields_left_out_keep_their_value(tmp_path: Path) -> None:
    config = read(tmp_path, "steps: 7\noptimizer:\n  learning_rate: 1e-3\n  clip_norm: 2\n")
    optimizer = dataclasses.replace(OptimizerConfig(), learning_rate=1e-3, clip_norm=2.0)
    assert config == dataclasses.replace(default_config(), steps=7, optimizer=optimizer)
    assert isinstance(config.optimizer.clip_norm, float)


def test_scalars_are_read_as_yaml_1_2(tmp_path: Path) -> None:
    config = read(tmp_path, "profile_steps: 10:13\nsample_prompt: no\nseed: 010\nout: ~\n")
    assert (config.profile_steps, config.sample_prompt) == ("10:13", "no")
    assert (config.seed, config.out) == (10, None)


def test_model_is_a_name_or_a_mapping(tmp_path: Path) -> None:
    assert read(tmp_path, "model: llama-1b").model == named("llama-1b")
    shallow = dataclasses.replace(named("llama-1b"), layers=4)
    assert read(tmp_path, "model: {layers: 4, name: llama-1b}").model == shallow
    assert read(tmp_path, "model: {layers: 2}").model == dataclasses.replace(
        named("tiny"), layers=2
    )


def test_model_of_ones_own_needs_every_size(tmp_path: Path) -> None:
    sizes = "vocab_size: 64, layers: 2, embed: 8, heads: 2, kv_heads: 1, head_dim: 4, mlp: 16"
    model = read(tmp_path, f"model: {{name: mine, {sizes}, max_length: 32}}").model
    assert (model.name, model.embed, model.norm) == ("mine", 8, "rms")
    with pytest.raises(ConfigError, match="no model `mine`\n.*\n.*gives max_length as well"):
        read(tmp_path, f"model: {{name: mine, {sizes}}}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stesp: 3", "no field `stesp`\n  where: run.yaml\n  fix:   did you mean `steps`"),
        ("learning_rate: 3", "did you mean `optimizer.learning_rate`"),
        ("optimizer: {learnin_rate: 3}", "did you mean `optimizer.learning_rate`"),
        ("optimizer: {qqq: 3}", "known: b1, b2, clip_norm"),
        ("model.layers: 3", "nest it: model: and under it, indented, layers:"),
        ("1: 2", "no field `1`"),
        ("<<: {steps: 3}", "no field `<<`"),
        ("steps: 3.7", "`steps` to 3.7\n  where: run.yaml\n.*whole number\n.*use 3 or 4"),
        ("steps: 3.0", "use 3$"),
        ("steps: '3'", "write 3, without quotes"),
        ("steps: true", "`steps` to true"),
        ("steps:", "`steps` to nothing"),
        ("steps: [3]", "whole number"),
        ("steps: &a [*a]", "whole number"),
        ("steps: 2024-01-01", "whole number"),
        ("optimizer: {learning_rate: '1e-3'}", "write 1e-3, without quotes"),
        ("optimizer: {learning_rate: .nan}", "takes a number"),
        pytest.param(f"loss: {{z_loss: {10**400}}}", "takes a number", id="huge"),
        ("resume: 'no'", "true or false\n.*write false"),
        ("resume: yes", "write true"),
        ("resume: 1", "true or false"),
        ("out: 123", "put it in quotes: '123'"),
        ("data: {path: true}", "put it in quotes: 'true'"),
        ("zero: '1'", "write 1, without quotes"),
        ("zero: true", "one of 0, 1, 2"),
        ("dtype: bfloat", "one of bfloat16, float32 or none\n.*did you mean `bfloat16`"),
        ("rules: params.mlp=tensor", r"write \[params.mlp=tensor\]"),
        ("rules: [3]", "a list of texts"),
        ("model: tinny", "no model `tinny`\n(.*\n)+.*did you mean `tiny`"),
        ("model: 3", "group of fields, or a model's name"),
        ("data: corpus.txt", "group of fields\n.*such as path:"),
        ("batch_size: 30\ngrad_accum: 4", "30 rows are not divisible by 4"),
    ],
)
def test_refuses_fields(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("# nothing yet\n", "it is empty"),
        ("- steps", r"it holds \['steps'\], not fields"),
        ("steps", "it holds 'steps', not fields"),
        ("steps: [", "line 1, column 9"),
        ("steps: 1\nseed: 2\nsteps: 3", "line 3, column 1: the key `steps` is given twice"),
        ("data:\n  path: a\n  path: b", "the key `path` is given twice"),
        ("? [a]\n: 3", "unhashable key"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        pytest.param("steps: " + "9" * 5000, "4300 digits", id="digits"),
        pytest.param("[" * 20_000, "nested too deeply", id="deep"),
        pytest.param("#" * (1 << 20) + "\n", "over 1 MiB", id="large"),
        (b"\x00\x01\x02", "control characters"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"\x93NUMPY\x01\x00", "not UTF-8 text"),
    ],
)
def test_refuses_files(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(write(tmp_path, text))
    assert str(tmp_path / "run.yaml") in str(caught.value)


def test_refuses_paths(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="it is a folder\n.*such as config.yaml"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="may read"):
        load(tmp_path / ("a" * 300))
    with pytest.raises(ConfigError, match="null"):
        load("a\0b")


def test_merge_leaves_meaning_to_build() -> None:
    """A file may be right only with the flags that come with it."""
    values = merge(tree(default_config()), {"grad_accum": 5}, "run.yaml")
    assert build(values | {"batch_size": 10}).grad_accum == 5
    with pytest.raises(ConfigError, match="not divisible"):
        build(values)


def test_near_fields_prefer_the_same_group() -> None:
    assert near_fields(TrainConfig, "data.pth") == ["data.path"]
    assert near_fields(TrainConfig, "optimiser.b1") == ["optimizer.b1"]
    assert near_fields(TrainConfig, "xyzzy") == []
