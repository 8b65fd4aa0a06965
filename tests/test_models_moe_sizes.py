"""The sizes with experts have the published parameters, in all and a token; whole trees."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from meshwright.models import moe_sizes
from meshwright.models.config import (
    MODELS,
    ExpertConfig,
    ModelConfig,
    active_parameters,
    count_parameters,
    named,
)
from meshwright.models.pure import functional

# In billions, as their makers give them: in all, and a token.
PUBLISHED = {
    "mixtral-8x7b": (46.7, 12.9),
    "qwen3-30b-a3b": (30.5, 3.3),
    "deepseek-moe-16b": (16.4, 2.8),
}
SMALL = dataclasses.replace(
    named("tiny-moe"), layers=2, embed=8, mlp=6, heads=2, kv_heads=2, head_dim=4
)
NAMES = [name for name in MODELS if named(name).experts.count]


def test_every_size_is_registered() -> None:
    assert {make.__name__ for make in MODELS.values()} >= set(moe_sizes.__all__)
    assert {*PUBLISHED, "tiny-moe"} == set(NAMES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str) -> None:
    total, active = PUBLISHED[name]
    config = named(name)
    assert count_parameters(config) / 1e9 == pytest.approx(total, abs=0.05)
    assert active_parameters(config) / 1e9 == pytest.approx(active, abs=0.06)
    assert f"({total}B)" in (MODELS[name].__doc__ or "")
    assert f"({active}B)" in (MODELS[name].__doc__ or "")


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_have_the_exact_counts(name: str) -> None:
    for count in (count_parameters, active_parameters):
        assert f"{count(named(name)):,}" in (MODELS[name].__doc__ or "")


def test_tiny_divides_by_eight_and_works_as_hard_as_its_dense_sister() -> None:
    config = named("tiny-moe")
    sizes = (config.vocab_size, config.embed, config.heads, config.kv_heads, config.head_dim)
    assert all(size % 8 == 0 for size in (*sizes, config.expert_mlp, config.experts.count))
    assert active_parameters(config) == pytest.approx(count_parameters(named("tiny")), rel=0.01)


def test_what_a_token_meets() -> None:
    tiny = named("tiny")
    assert active_parameters(tiny) == count_parameters(tiny)
    settings = ExpertConfig(count=8, top_k=8, first_dense=1)
    everything = dataclasses.replace(tiny, experts=settings)
    assert active_parameters(everything) == count_parameters(everything)
    two = dataclasses.replace(everything, experts=dataclasses.replace(settings, top_k=2))
    idle = 3 * 6 * 3 * tiny.embed * tiny.mlp  # layers × experts × matrices
    assert count_parameters(two) - active_parameters(two) == idle


def test_the_whole_tree() -> None:
    norm = {"scale": ("layers", "norm")}
    attention = {
        "wq": ("layers", "embed", "heads", "head_dim"),
        "wk": ("layers", "embed", "kv_heads", "head_dim"),
        "wv": ("layers", "embed", "kv_heads", "head_dim"),
        "wo": ("layers", "heads", "head_dim", "embed"),
    }
    mlp = {
        "w_gate": ("layers", "embed", "mlp"),
        "w_up": ("layers", "embed", "mlp"),
        "w_down": ("layers", "mlp", "embed"),
    }
    experts = {
        "router": ("layers", "embed", "routes"),
        "bias": ("layers", "routes"),
        "w_gate": ("layers", "experts", "embed", "mlp"),
        "w_up": ("layers", "experts", "embed", "mlp"),
        "w_down": ("layers", "experts", "mlp", "embed"),
        "shared": mlp,
    }
    both = {"attn": attention, "attn_norm": norm, "mlp_norm": norm}
    settings = ExpertConfig(count=4, mlp=4, balance="bias", shared=3, first_dense=1)
    config = dataclasses.replace(SMALL, layers=3, experts=settings)
    model = functional(config)
    assert model.dims == {
        "embedding": ("vocab", "embed"),
        "dense_layers": jax.tree.map(
            lambda dims: ("dense_layers", *dims[1:]),
            {**both, "mlp": mlp},
            is_leaf=lambda node: isinstance(node, tuple),
        ),
        "layers": {**both, "experts": experts},
        "final_norm": {"scale": ("norm",)},
    }
    layers = model.shapes["layers"]["experts"]
    assert model.shapes["dense_layers"]["mlp"]["w_up"].shape == (1, 8, 6)
    assert layers["w_up"].shape == (2, 4, 8, 4)
    assert layers["shared"]["w_down"].shape == (2, 12, 8)


VARIANTS = [
    SMALL,
    dataclasses.replace(SMALL, activation="gelu", tied=False, qk_norm=True),
    dataclasses.replace(SMALL, experts=ExpertConfig(count=6, top_k=3, shared=2, balance="bias")),
    dataclasses.replace(SMALL, norm="layer", experts=ExpertConfig(count=5, mlp=3, first_dense=1)),
]


@pytest.mark.parametrize("config", VARIANTS, ids=range(len(VARIANTS)))
def test_the_closed_form_counts_every_variant(config: ModelConfig) -> None:
    leaves = jax.tree.leaves(functional(config).shapes)
    assert sum(leaf.size for leaf in leaves) == count_parameters(config)
