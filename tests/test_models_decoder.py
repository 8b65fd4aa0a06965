"""The three families, whole trees and an independent NumPy model as the oracle."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshwright.models.config import MODELS, ModelConfig, count_parameters, named
from meshwright.models.decoder import Decoder
from meshwright.models.hooks import Hooks
from meshwright.models.pure import functional
from meshwright.sharding.errors import ConfigError

SIZES = {"layers": 2, "embed": 32, "heads": 4, "head_dim": 8, "mlp": 48, "vocab_size": 64}
FAMILIES: dict[str, ModelConfig] = {
    "llama": dataclasses.replace(
        named("llama-1b"), **SIZES, kv_heads=2, rope_original_length=8, tied=False
    ),
    "qwen": dataclasses.replace(named("qwen3-0.6b"), **SIZES, kv_heads=2),
    "gpt2": dataclasses.replace(named("gpt2-124m"), **SIZES, kv_heads=4, max_length=32),
}
FAMILIES["everything"] = dataclasses.replace(
    FAMILIES["llama"], norm="layer", bias=True, qk_norm=True
)
TOKENS: Any = np.random.default_rng(1).integers(0, 64, (2, 16), np.int32)
everywhere = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)


@functools.cache
def _params(config: ModelConfig) -> dict[str, Any]:
    """Parameters larger than initial ones, with no bias 0 and no scale 1."""
    random = np.random.default_rng(7)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return random.normal(mean, 0.1, leaf.shape).astype(np.float32)

    return jax.tree.map_with_path(draw, functional(config).shapes)


@functools.cache
def _apply(config: ModelConfig) -> Any:
    return jax.jit(functional(config).apply)


@pytest.mark.parametrize("name", MODELS)
def test_the_module_has_the_counted_parameters(name: str) -> None:
    config = named(name)
    leaves = jax.tree.leaves(functional(config).shapes)
    assert sum(leaf.size for leaf in leaves) == count_parameters(config)


@everywhere
def test_the_closed_form_counts_every_variant(config: ModelConfig) -> None:
    leaves = jax.tree.leaves(functional(config).shapes)
    assert sum(leaf.size for leaf in leaves) == count_parameters(config)


def test_the_whole_tree_of_a_qwen() -> None:
    layer = {
        "attn": {
            "wq": ("layers", "embed", "heads", "head_dim"),
            "wk": ("layers", "embed", "kv_heads", "head_dim"),
            "wv": ("layers", "embed", "kv_heads", "head_dim"),
            "wo": ("layers", "heads", "head_dim", "embed"),
            "q_norm": {"scale": ("layers", "norm")},
            "k_norm": {"scale": ("layers", "norm")},
        },
        "attn_norm": {"scale": ("layers", "norm")},
        "mlp": {
            "w_gate": ("layers", "embed", "mlp"),
            "w_up": ("layers", "embed", "mlp"),
            "w_down": ("layers", "mlp", "embed"),
        },
        "mlp_norm": {"scale": ("layers", "norm")},
    }
    assert functional(dataclasses.replace(FAMILIES["qwen"], tied=False)).dims == {
        "embedding": ("vocab", "embed"),
        "layers": layer,
        "final_norm": {"scale": ("norm",)},
        "head": ("embed", "vocab"),
    }


def test_the_whole_tree_of_a_gpt2() -> None:
    norm = {"scale": ("layers", "norm"), "bias": ("layers", "norm")}
    assert functional(FAMILIES["gpt2"]).dims == {
        "embedding": ("vocab", "embed"),
        "positions": ("positions", "embed"),
        "layers": {
            "attn": {
                "wq": ("layers", "embed", "heads", "head_dim"),
                "wk": ("layers", "embed", "kv_heads", "head_dim"),
                "wv": ("layers", "embed", "kv_heads", "head_dim"),
                "wo": ("layers", "heads", "head_dim", "embed"),
                "bq": ("layers", "heads", "head_dim"),
                "bk": ("layers", "kv_heads", "head_dim"),
                "bv": ("layers", "kv_heads", "head_dim"),
                "bo": ("layers", "embed"),
            },
            "attn_norm": norm,
            "mlp": {
                "w_up": ("layers", "embed", "mlp"),
                "b_up": ("layers", "mlp"),
                "w_down": ("layers", "mlp", "embed"),
                "b_down": ("layers", "embed"),
            },
            "mlp_norm": norm,
        },
        "final_norm": {"scale": ("norm",), "bias": ("norm",)},
    }


@everywhere
def test_every_dim_has_the_size_it_names(config: ModelConfig) -> None:
    sizes = {
        "vocab": {config.vocab_size},
        "norm": {config.embed, config.head_dim},
        "positions": {config.max_length},
    }
    for field in ("layers", "embed", "heads", "kv_heads", "head_dim", "mlp"):
        sizes[field] = {getattr(config, field)}
    model = functional(config)
    shapes = jax.tree.leaves(model.shapes)
    dims = jax.tree.leaves(model.dims, is_leaf=lambda node: isinstance(node, tuple))
    for shape, names in zip(shapes, dims, strict=True):
        assert len(shape.shape) == len(names) and shape.dtype == jnp.float32
        assert all(size in sizes[name] for size, name in zip(shape.shape, names, strict=True))


# An independent model: NumPy, float64, one sequence, one head at a time, complex rotations.


def _numpy_norm(config: ModelConfig, norm: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    if config.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps)
    return x * norm["scale"] + norm.get("bias", 0.0)


def _numpy_rotate(config: ModelConfig, x: np.ndarray) -> np.ndarray:
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-np.arange(half) / half)
    if config.rope_factor != 1:
        turns = config.rope_original_length * frequencies / (2 * np.pi)
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        between = (turns - low) / (high - low)
        mixed = (1 - between) * frequencies / config.rope_factor + between * frequencies
        frequencies = np.where(
            turns > high,
            frequencies,
            np.where(turns < low, frequencies / config.rope_factor, mixed),
        )
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(
        1j * np.outer(np.arange(len(x)), frequencies)
    )
    return np.concatenate((turned.real, turned.imag), axis=1)


def _numpy_attention(config: ModelConfig, p: dict[str, Any], x: np.ndarray) -> np.ndarray:
    total = np.zeros_like(x)
    for head in range(config.heads):
        shared = head * config.kv_heads // config.heads
        q = x @ p["wq"][:, head] + (p["bq"][head] if config.bias else 0)
        k = x @ p["wk"][:, shared] + (p["bk"][shared] if config.bias else 0)
        v = x @ p["wv"][:, shared] + (p["bv"][shared] if config.bias else 0)
        if config.qk_norm:
            q, k = _numpy_norm(config, p["q_norm"], q), _numpy_norm(config, p["k_norm"], k)
        if config.positions == "rope":
            q, k = _numpy_rotate(config, q), _numpy_rotate(config, k)
        scores = q @ k.T / np.sqrt(config.head_dim)
        scores[np.triu_indices(len(x), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        total += weights / weights.sum(-1, keepdims=True) @ v @ p["wo"][head]
    return total + (p["bo"] if config.bias else 0)


def _numpy_mlp(config: ModelConfig, p: dict[str, Any], x: np.ndarray) -> np.ndarray:
    up = x @ p["w_up"] + (p["b_up"] if config.bias else 0)
    if config.activation == "gelu":
        cubic = np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)
        hidden = 0.5 * up * (1 + np.tanh(cubic))
    else:
        gate = x @ p["w_gate"] + (p["b_gate"] if config.bias else 0)
        hidden = gate / (1 + np.exp(-gate)) * up
    return hidden @ p["w_down"] + (p["b_down"] if config.bias else 0)


def _numpy_logits(config: ModelConfig, params: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = params["embedding"][tokens]
    if config.positions == "learned":
        x = x + params["positions"][: len(tokens)]
    for number in range(config.layers):
        layer = jax.tree.map(lambda leaf, number=number: leaf[number], params["layers"])
        x = x + _numpy_attention(config, layer["attn"], _numpy_norm(config, layer["attn_norm"], x))
        x = x + _numpy_mlp(config, layer["mlp"], _numpy_norm(config, layer["mlp_norm"], x))
    x = _numpy_norm(config, params["final_norm"], x)
    return x @ (params["embedding"].T if config.tied else params["head"])


@everywhere
def test_logits_are_those_of_the_numpy_model(config: ModelConfig) -> None:
    params = _params(config)
    logits = _apply(config)(params, TOKENS)
    expected = np.stack([_numpy_logits(config, params, np.asarray(row)) for row in TOKENS])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())


@everywhere
def test_a_token_changes_nothing_before_it(config: ModelConfig) -> None:
    params = _params(config)
    changed = TOKENS.copy()
    changed[:, 9] = (changed[:, 9] + 1) % 64
    before = _apply(config)(params, TOKENS)
    after = _apply(config)(params, changed)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert np.abs(before[:, 9:] - after[:, 9:]).max(axis=-1).min() > 0


@everywhere
def test_packed_documents_are_as_if_alone(config: ModelConfig) -> None:
    params, lengths = _params(config), (7, 4, 5)
    segments = np.repeat(np.arange(3), lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    packed = _apply(config)(params, TOKENS[:1], positions=positions, segments=segments)[0]
    start = 0
    for length in lengths:
        # Causal, so what follows the document changes nothing in it: one shape to compile.
        alone = _apply(config)(params, np.roll(TOKENS, -start, axis=1))[0, :length]
        np.testing.assert_allclose(packed[start : start + length], alone, atol=1e-4)
        start += length


@everywhere
def test_bfloat16_parameters_compute_in_bfloat16(config: ModelConfig) -> None:
    params = _params(config)
    half = jax.tree.map(jnp.bfloat16, params)
    logits = _apply(config)(half, TOKENS)
    exact = _apply(config)(params, TOKENS)
    assert logits.dtype == jnp.float32
    # bfloat16 has 8 bits of mantissa; the rest of the bound is room for two layers.
    assert np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()


def test_layouts_are_asked_for_in_order() -> None:
    seen: list[tuple[tuple[str | None, ...], tuple[int, ...]]] = []
    dtypes: list[jnp.dtype] = []

    def constrain(x: jax.Array, dims: tuple[str | None, ...]) -> jax.Array:
        seen.append((dims, x.shape))
        dtypes.append(x.dtype)
        return x

    def reshard(
        x: jax.Array, before: tuple[Any, ...], after: tuple[Any, ...], sums: bool = False
    ) -> jax.Array:
        stream, inside = ("batch", "sequence", "embed"), ("batch", "length", "embed")
        assert (before, after) == ((inside, stream) if sums else (stream, inside))
        return constrain(x, after)

    model = functional(FAMILIES["llama"])
    half = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.bfloat16), model.shapes)
    jax.eval_shape(
        lambda p: model.apply(p, TOKENS, hooks=Hooks(constrain=constrain, reshard=reshard)), half
    )
    stream = (("batch", "sequence", "embed"), (2, 16, 32))
    queries = (("batch", "length", "heads", "head_dim"), (2, 16, 4, 8))
    keys = (("batch", "length", "kv_heads", "head_dim"), (2, 16, 2, 8))
    hidden = (("batch", "length", "mlp"), (2, 16, 48))
    logits = (("batch", "length", "vocab"), (2, 16, 64))
    read = (("batch", "length", "embed"), (2, 16, 32))
    # One layer is traced, however many there are.
    attended = [read, queries, keys, keys, queries, stream]
    assert seen == [stream, *attended, read, hidden, stream, read, logits]
    assert dtypes == [jnp.bfloat16] * 11 + [jnp.float32]


def test_documents_reach_attention_as_they_are() -> None:
    """As ids, not as a mask: what splits the length of rows has no use for one."""
    seen: list[dict[str, Any]] = []

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
        seen.append(options)
        return q

    config = FAMILIES["llama"]
    apply = functools.partial(functional(config).apply, hooks=Hooks(attention=attention))
    jax.eval_shape(apply, functional(config).shapes, TOKENS)
    segments = jnp.zeros((2, 16), jnp.int32)
    jax.eval_shape(apply, functional(config).shapes, TOKENS, segments=segments)
    plain, packed = seen
    assert plain["segments"] is None and plain["causal"] and plain["scale"] == 8**-0.5
    assert plain["mask"] is None and packed["mask"] is None and packed["causal"]
    assert packed["segments"].shape == (2, 16) and packed["segments"].dtype == jnp.int32


def test_the_module_and_the_functions_are_one_model() -> None:
    config = FAMILIES["qwen"]
    decoder = nnx.jit(lambda: Decoder(config, nnx.Rngs(5)))()
    params = nnx.to_pure_dict(nnx.state(decoder))
    shapes = jax.tree.map(lambda leaf: leaf.shape, functional(config).shapes)
    assert jax.tree.map(jnp.shape, params) == shapes
    logits = nnx.jit(lambda decoder: decoder(TOKENS))(decoder)
    np.testing.assert_allclose(logits, _apply(config)(params, TOKENS), atol=1e-6)


def test_too_long_a_row_is_refused() -> None:
    config = FAMILIES["gpt2"]
    with pytest.raises(ConfigError, match=r"cannot read 33 tokens[^!]*use at most 32 tokens"):
        functional(config).apply(_params(config), jnp.zeros((1, 33), jnp.int32))
