"""Sizes match the published counts; a configuration that cannot be a model is refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import hypothesis.strategies as st
import pytest
from hypothesis import given

from meshwright.models.config import MODELS, ModelConfig, count_parameters, named
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
}


def test_every_published_size_is_tested() -> None:
    assert {*PUBLISHED, "tiny"} == set(MODELS)


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
]


@pytest.mark.parametrize(("change", "text"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_a_model_is_refused(change: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        dataclasses.replace(named("tiny"), **change)  # type: ignore[arg-type]
    message = str(refused.value)
    assert text in message
    assert message.startswith("cannot build the model `tiny`\n  where: ")
    assert "\n  fix:   " in message


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


def test_every_field_says_what_it_is() -> None:
    """The command line's help is made of the strings under the fields."""
    import ast
    import inspect
    import textwrap

    body = ast.parse(textwrap.dedent(inspect.getsource(ModelConfig))).body[0]
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
