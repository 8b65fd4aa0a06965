"""Sizes match the published counts; a configuration that cannot be a model is refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import hypothesis.strategies as st
import pytest
from hypothesis import given

from meshwright.models.config import (
    MODELS,
    ExpertConfig,
    ModelConfig,
    count_parameters,
    named,
)
from meshwright.sharding.errors import ConfigError

PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-1.5b": 1_557_611_200,
    "llama-1b": 1_235_814_400,
    "llama-3b": 3_212_749_824,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "deepseek-moe-16b": 16_375_728_128,
}


def test_every_published_size_is_tested() -> None:
    assert {*PUBLISHED, "tiny", "tiny-moe"} == set(MODELS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_count_is_the_published_one(name: str) -> None:
    assert count_parameters(named(name)) == PUBLISHED[name]
    assert f"{PUBLISHED[name]:,}" in (MODELS[name].__doc__ or "")


@pytest.mark.parametrize("name", MODELS)
def test_a_size_carries_its_own_name(name: str) -> None:
    assert named(name).name == name
    assert named(name) == named(name)


def test_tiny_divides_by_eight() -> None:
    tiny = named("tiny")
    sizes = (tiny.vocab_size, tiny.embed, tiny.heads, tiny.kv_heads, tiny.head_dim, tiny.mlp)
    assert all(size % 8 == 0 for size in sizes)
    assert f"{count_parameters(tiny):,}" in (MODELS["tiny"].__doc__ or "")


def test_unknown_name_suggests_near_ones() -> None:
    with pytest.raises(ConfigError, match="unknown model `llama3-8`[^!]*did you mean `llama3-8b`"):
        named("llama3-8")


REFUSED = [
    ({"heads": 8, "kv_heads": 3}, "fix:   use kv_heads=2 or 4, or heads=6 or 9"),
    ({"heads": 8, "kv_heads": 16}, "fix:   use kv_heads=8, or heads=16"),
    ({"head_dim": 15}, "fix:   use head_dim=14 or 16"),
    ({"head_dim": 1}, "fix:   use head_dim=2 or 2"),
    ({"layers": 0}, "fix:   use layers=1 or more"),
    ({"vocab_size": -1}, "fix:   use vocab_size=1 or more"),
    ({"embed": 2.5}, "embed must be a whole number"),
    ({"mlp": True}, "mlp must be a whole number"),
    ({"norm_eps": 0.0}, "fix:   use norm_eps=1e-05"),
    ({"init_std": float("nan")}, "fix:   use init_std=0.02"),
    ({"rope_theta": float("inf")}, "rope_theta must be a number above 0"),
    ({"remat": "dot"}, "did you mean `dots`"),
    ({"norm": "batch"}, "norm is one of rms, layer"),
    ({"activation": "swigl"}, "did you mean `swiglu`"),
    ({"positions": "rotary"}, "known: learned, rope"),
    ({"positions": "learned", "rope_theta": 5e5}, "fix:   use rope_theta=10000.0"),
    ({"positions": "learned", "rope_factor": 8.0}, "fix:   use rope_factor=1.0"),
    ({"rope_high_freq_factor": 8.0}, "rope_factor=1 means no scaling"),
    ({"rope_factor": 0.5}, "the scaling can only stretch"),
    ({"rope_factor": 8.0, "rope_low_freq_factor": 4.0}, "below the high one"),
    ({"rope_factor": 8.0, "rope_original_length": 0}, "rope_original_length=1 or more"),
    ({"experts": ExpertConfig(4, first_dense=4)}, "use experts.first_dense=3 or less, or layers=5"),
    ({"experts": ExpertConfig(4), "bias": True}, "fix:   use bias=False, or experts.count=0"),
]


@pytest.mark.parametrize(("change", "text"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_a_model_is_refused(change: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        dataclasses.replace(named("tiny"), **change)  # type: ignore[arg-type]
    message = str(refused.value)
    assert text in message
    assert message.startswith("cannot build the model `tiny`\n  where: ")
    assert "\n  fix:   " in message


NO_EXPERTS = [
    ({"count": 4, "top_k": 5}, "use top_k=4 or less, or count=5 or more"),
    ({"count": -1}, "use count=0 or more"),
    ({"count": 8.0}, "count must be a whole number"),
    ({"count": 8, "top_k": 0}, "use top_k=1 or more"),
    ({"count": 8, "mlp": 0}, "use mlp=1 or more"),
    ({"count": 8, "shared": True}, "shared must be a whole number"),
    ({"count": 8, "first_dense": -2}, "use first_dense=0 or more"),
    ({"count": 8, "capacity_factor": 0.5}, "use capacity_factor=1.0 or more, or none"),
    ({"count": 8, "capacity_factor": float("nan")}, "use capacity_factor=1.0 or more, or none"),
    ({"count": 8, "balance": "bais"}, "did you mean `bias`"),
    ({"count": 8, "scoring": "relu"}, "scoring is one of softmax, sigmoid"),
    ({"count": 8, "balance": "none", "balance_weight": 0.1}, "use balance_weight=0.001"),
    ({"count": 8, "balance_weight": 0.0}, "use balance=none, or balance_weight=0.001"),
    ({"count": 8, "z_weight": -1.0}, "use z_weight=0.0, the default"),
    ({"count": 8, "top_k": 1}, "use normalise=False, or top_k=2"),
    ({"top_k": 4}, "use top_k=2, or count=8 for eight experts"),
    ({"shared": 2, "capacity_factor": 1.5}, "use shared=0, capacity_factor=None, or count=8"),
]


@pytest.mark.parametrize(("fields", "text"), NO_EXPERTS, ids=lambda value: str(value)[:40])
def test_experts_that_cannot_be_are_refused(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ExpertConfig(**fields)  # type: ignore[arg-type]
    message = str(refused.value)
    assert text in message
    assert message.startswith("cannot build a layer of experts\n  where: ")
    assert "\n  fix:   " in message


@given(
    factor=st.floats(1, 4),
    length=st.integers(1, 5000),
    count=st.integers(2, 64),
    top_k=st.integers(2, 8),
)
def test_capacities_hold_an_even_load(factor: float, length: int, count: int, top_k: int) -> None:
    experts = ExpertConfig(count, min(top_k, count), capacity_factor=factor)
    capacity = experts.capacity(length)
    assert capacity is not None
    assert length * experts.top_k <= capacity * count and 1 <= capacity <= length


def test_capacity_is_the_factor_over_the_mean() -> None:
    experts = ExpertConfig(8, capacity_factor=1.1)
    assert [experts.capacity(length) for length in (1, 4, 40, 4000)] == [1, 2, 11, 1100]
    assert ExpertConfig(8).capacity(4000) is None


def test_learned_positions_take_odd_heads() -> None:
    assert dataclasses.replace(named("gpt2-124m"), head_dim=63).head_dim == 63


@given(heads=st.integers(1, 64), kv_heads=st.integers(1, 64))
def test_a_refused_head_count_names_ones_that_work(heads: int, kv_heads: int) -> None:
    tiny = named("tiny")
    try:
        config = dataclasses.replace(tiny, heads=heads, kv_heads=kv_heads)
    except ConfigError as refused:
        shared, multiples = refused.fix.removeprefix("use kv_heads=").split(", or heads=")
        for fewer in shared.split(" or "):
            dataclasses.replace(tiny, heads=heads, kv_heads=int(fewer))
        for other in multiples.split(" or "):
            dataclasses.replace(tiny, heads=int(other), kv_heads=kv_heads)
    else:
        assert config.group_size * kv_heads == heads


@pytest.mark.parametrize("config", [ModelConfig, ExpertConfig])
def test_every_field_says_what_it_is(config: type) -> None:
    """The command line's help is made of the strings under the fields."""
    import ast
    import inspect
    import textwrap

    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(after, ast.Expr), ast.unparse(field)


def test_importing_the_configuration_needs_no_jax() -> None:
    code = (
        "import sys, meshwright.models.config as c; c.named('tiny'); "
        "print([m for m in ('jax', 'flax', 'numpy', 'optax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
