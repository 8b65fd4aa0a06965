"""A decoder's leaves and activations by closed form: paths, shapes and dims from its config.

What `meshwright.models.pure.functional` finds by tracing the module, and what the optimizer's
``init`` would build, written down as arithmetic: a `ModelConfig` goes in, and nothing is traced,
allocated or imported (neither jax nor numpy, but for adafactor). It is what lets thousands of
plans be weighed in a second. The price is that a model's structure is stated twice; the tests
hold the two equal, leaf by leaf.

Leaves that have the same dims are laid out alike whatever the rules, so sums are kept by *group*:
a Llama of a dozen leaves has six. Everything is cached by configuration; use `groups_of` and
`moment_groups` in loops, and `parameter_leaves` where paths matter.

`kept_activations` says what one layer leaves behind for the backward pass, by remat policy. The
residuals are jax's: what its rules of differentiation read, so a float32 norm keeps float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from meshwright.models.config import ExpertConfig, ModelConfig
from meshwright.train.config import OptimizerConfig, OptimizerName

__all__ = [
    "LANES",
    "Kept",
    "LeafShape",
    "WeightGroup",
    "groups_of",
    "kept_activations",
    "moment_groups",
    "moment_leaves",
    "parameter_leaves",
]

LANES = {"tpu": 128, "gpu": 1}
"""What a compiler pads the last dim of an array to a multiple of: a TPU register's lanes."""

_COUNTERS = {"adamw": 2, "lion": 2, "adafactor": 3, "muon": 4, "sgd": 1}
_LEAST_FACTORED = 128  # optax's min_dim_size_to_factor


@dataclass(frozen=True)
class LeafShape:
    """One array.

    Attributes:
        path: keys joined by ``/``.
        shape: global shape.
        dims: names of its dimensions; None for one that belongs to no parameter, never split.
    """

    path: str
    shape: tuple[int, ...]
    dims: tuple[str, ...] | None

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightGroup:
    """Leaves whose dims have the same names and sizes, in any order.

    Attributes:
        name: paths of the leaves, shortened.
        dims: (name, size) of each dim, sorted; empty for scalars.
        elements: of all leaves together.
        layered: whether the leaves are a stack of layers.
        leaves: how many.
    """

    name: str
    dims: tuple[tuple[str, int], ...]
    elements: int
    layered: bool
    leaves: int


@dataclass(frozen=True)
class Kept:
    """An activation that a layer keeps for its backward pass.

    Attributes:
        name: what it is.
        dims: activation dims without ``batch`` and ``length``, which all have.
        elements: of one token.
        itemsize: bytes of an element.
    """

    name: str
    dims: tuple[str, ...]
    elements: int
    itemsize: int


@lru_cache(maxsize=256)
def parameter_leaves(config: ModelConfig) -> tuple[LeafShape, ...]:
    """Every parameter of a decoder, in the order jax flattens the nested dicts.

    >>> from meshwright.models.config import named
    >>> [leaf.path for leaf in parameter_leaves(named("llama3-8b"))][:3]
    ['embedding', 'final_norm/scale', 'head']
    """
    embed, vocab = config.embed, config.vocab_size
    leaves = {"embedding": {"vocab": vocab, "embed": embed}}
    if config.positions == "learned":
        leaves["positions"] = {"positions": config.max_length, "embed": embed}
    if not config.tied:
        leaves["head"] = {"embed": embed, "vocab": vocab}
    leaves |= _norm(config, "final_norm", embed)
    dense = replace(config, experts=ExpertConfig())
    stacks = {"layers": (config, config.layers - config.experts.first_dense)}
    if config.experts.first_dense:
        stacks["dense_layers"] = (dense, config.experts.first_dense)
    for stack, (block, layers) in stacks.items():
        for path, sizes in _block(block).items():
            leaves[f"{stack}/{path}"] = {stack: layers, **sizes}
    ordered = sorted(leaves.items(), key=lambda item: item[0].split("/"))
    return tuple(LeafShape(path, tuple(s.values()), tuple(s)) for path, s in ordered)


def _norm(config: ModelConfig, path: str, size: int) -> dict[str, dict[str, int]]:
    names = ("scale", "bias") if config.norm == "layer" and config.bias else ("scale",)
    return {f"{path}/{name}": {"norm": size} for name in names}


def _block(config: ModelConfig) -> dict[str, dict[str, int]]:
    """The parameters of one block by path, sizes by dim."""
    embed = {"embed": config.embed}
    queries = {"heads": config.heads, "head_dim": config.head_dim}
    keys = {"kv_heads": config.kv_heads, "head_dim": config.head_dim}
    found = {
        **_norm(config, "attn_norm", config.embed),
        **_norm(config, "mlp_norm", config.embed),
        "attn/wq": embed | queries,
        "attn/wk": embed | keys,
        "attn/wv": embed | keys,
        "attn/wo": queries | embed,
    }
    experts = config.experts
    if experts.count:
        routes, width = {"routes": experts.count}, config.expert_mlp
        found["experts/router"] = embed | routes
        found |= _matrices(config, "experts", width, {"experts": experts.count})
        if experts.balance == "bias":
            found["experts/bias"] = routes
        if experts.shared:
            found |= _matrices(config, "experts/shared", experts.shared * width, {})
    else:
        found |= _matrices(config, "mlp", config.mlp, {})
    if config.qk_norm:
        found |= _norm(config, "attn/q_norm", config.head_dim)
        found |= _norm(config, "attn/k_norm", config.head_dim)
    if config.bias:
        mlp = {"mlp": config.mlp}
        found |= {"attn/bq": queries, "attn/bk": keys, "attn/bv": keys, "attn/bo": embed}
        found |= {"mlp/b_up": mlp, "mlp/b_down": embed}
        found |= {"mlp/b_gate": mlp} if config.activation == "swiglu" else {}
    return found


def _matrices(
    config: ModelConfig, path: str, width: int, stack: dict[str, int]
) -> dict[str, dict[str, int]]:
    """The matrices of an MLP, or of a stack of them."""
    embed, mlp = {"embed": config.embed}, {"mlp": width}
    found = {f"{path}/w_up": stack | embed | mlp, f"{path}/w_down": stack | mlp | embed}
    if config.activation == "swiglu":
        found[f"{path}/w_gate"] = stack | embed | mlp
    return found


@lru_cache(maxsize=256)
def groups_of(config: ModelConfig) -> tuple[WeightGroup, ...]:
    """The parameters of a decoder by group, layers and others apart."""
    return _grouped(parameter_leaves(config))


def _grouped(leaves: Iterable[LeafShape]) -> tuple[WeightGroup, ...]:
    found: dict[tuple[tuple[str, int], ...], list[LeafShape]] = {}
    for leaf in leaves:
        key = tuple(sorted(zip(leaf.dims or (), leaf.shape, strict=leaf.dims is not None)))
        found.setdefault(key, []).append(leaf)
    return tuple(
        WeightGroup(
            name=_common_name([leaf.path for leaf in members]),
            dims=key,
            elements=sum(leaf.elements for leaf in members),
            layered=any(dim in ("layers", "dense_layers") for dim, _ in key),
            leaves=len(members),
        )
        for key, members in found.items()
    )


def _common_name(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


@lru_cache(maxsize=256)
def moment_leaves(
    name: OptimizerName, momentum: bool, config: ModelConfig
) -> tuple[LeafShape, ...]:
    """What an optimizer keeps for a decoder, 4 bytes an element; counters are scalars without dims.

    Args:
        name: the optimizer.
        momentum: whether sgd or adafactor has any; the others' is not optional.
        config: the model.

    The structure is that of `meshwright.train.optimizer`; paths are the parameters', shortened.
    """
    leaves = parameter_leaves(config)
    if name == "adamw":
        kept = [*leaves, *leaves]
    elif name == "lion":
        kept = list(leaves)
    elif name == "sgd":
        kept = list(leaves) if momentum else []
    elif name == "muon":
        kept = [*leaves, *(leaf for leaf in leaves if not _is_muon(leaf))]
    else:
        kept = [part for leaf in leaves for part in _factored(leaf)]
        kept += list(leaves) if momentum else []
    counters = _COUNTERS[name] + (momentum and name == "adafactor")
    return (*kept, *(LeafShape("count", (), None) for _ in range(counters)))


def moment_groups(optimizer: OptimizerConfig, config: ModelConfig) -> tuple[WeightGroup, ...]:
    """As `moment_leaves`, by group, from an optimizer's settings."""
    default = {"sgd": 0.9}.get(optimizer.name, 0.0)
    momentum = default if optimizer.momentum is None else optimizer.momentum
    return _moment_groups(optimizer.name, bool(momentum), config)


@lru_cache(maxsize=256)
def _moment_groups(
    name: OptimizerName, momentum: bool, config: ModelConfig
) -> tuple[WeightGroup, ...]:
    return _grouped(moment_leaves(name, momentum, config))


def _is_muon(leaf: LeafShape) -> bool:
    """Whether muon orthogonalises a leaf: a matrix of a block, no table, norm, bias or router."""
    return leaf.path.rpartition("/")[2].startswith("w")


def _factored(leaf: LeafShape) -> list[LeafShape]:
    """Adafactor's second moments of a leaf (Shazeer and Stern 2018), as optax factors them."""
    import numpy as np  # which of two equal dims is "larger" is numpy's choice

    one = LeafShape(leaf.path, (1,), None)
    order = [int(axis) for axis in np.argsort(leaf.shape)]
    if len(order) < 2 or leaf.shape[order[-2]] < _LEAST_FACTORED:
        return [one, one, leaf]
    return [_without(leaf, order[-1]), _without(leaf, order[-2]), one]


def _without(leaf: LeafShape, axis: int) -> LeafShape:
    assert leaf.dims is not None
    shape, dims = leaf.shape, leaf.dims
    return LeafShape(leaf.path, shape[:axis] + shape[axis + 1 :], dims[:axis] + dims[axis + 1 :])


@lru_cache(maxsize=1024)
def kept_activations(
    config: ModelConfig,
    *,
    itemsize: int,
    fused_attention: bool,
    length: int,
    lanes: int = 1,
    summed: bool = False,
) -> tuple[Kept, ...]:
    """What one layer keeps of a token for the backward pass, besides the layer's own input.

    Args:
        config: the model; its ``remat`` decides.
        itemsize: of the compute dtype.
        fused_attention: one kernel, which keeps a float32 a head and token (the log of the
            softmax's denominator) and never the scores.
        length: tokens a row, which materialised scores grow with.
        lanes: what a head is padded to a multiple of where it is the last dim, 128 on TPU.
        summed: whether attention and MLP end in a sum over devices, behind which GPUs' compiler
            keeps both float32 arrays of a norm, and the layer's own input as one of them.

    ``full`` keeps the input alone, which is what flows through the layer loop, and ``offload``
    does not keep that on the device; ``save-attention`` besides the output of attention and, of a
    fused kernel, its softmax. ``dots`` keeps the outputs of the projections; that of the last one
    is read by nobody, and those of a stack of experts are computed again. Of ``none`` see
    `_all_kept`.
    """
    if config.remat in ("full", "offload"):
        return ()
    head = -(-config.head_dim // lanes) * lanes
    queries, keys = config.heads * head, 2 * config.kv_heads * head
    heads, kv_heads = ("heads", "head_dim"), ("kv_heads", "head_dim")
    hidden = 2 if config.activation == "swiglu" else 1
    stream = ("sequence", "embed")
    if config.remat == "save-attention":
        softmax = Kept("softmax", ("heads",), config.heads, 4)
        return (Kept("attention's output", heads, queries, itemsize), *[softmax] * fused_attention)
    if config.remat == "dots":
        experts = config.experts
        dense = experts.shared * config.expert_mlp if experts.count else config.mlp
        return (
            Kept("queries", heads, queries, itemsize),
            Kept("keys and values", kv_heads, keys, itemsize),
            Kept("attention's output", stream, config.embed, itemsize),
            Kept("MLP", ("mlp",), hidden * dense, itemsize),
        )
    scores = None if fused_attention else length
    return _all_kept(config, itemsize, queries, keys, scores, summed=summed)


def _all_kept(
    config: ModelConfig, itemsize: int, queries: int, keys: int, scores: int | None, *, summed: bool
) -> tuple[Kept, ...]:
    """What jax's derivatives read: of a norm its input widened to float32 and the normed values
    before the scale (which the TPU's compiler keeps in the compute dtype), of a gated MLP six
    arrays of its width, of queries what they were before and after the rotation; and the scores
    with so many keys, None of a kernel that keeps none."""
    heads, kv_heads, stream = ("heads", "head_dim"), ("kv_heads", "head_dim"), ("sequence", "embed")
    centred, wide = config.norm == "layer", 1 if scores is None and not summed else 2
    narrow = 3 if wide == 1 else 1 if summed and scores is None else 2
    kept = [
        Kept("norms", stream, 2 * (wide + centred) * config.embed, 4),
        Kept("norms' output", stream, narrow * config.embed, itemsize),
        Kept("queries and attention's output", heads, 2 * queries, itemsize),
        Kept("keys and values", kv_heads, keys, itemsize),
        Kept("MLP", ("mlp",), 6 * config.active_mlp, itemsize),
    ]
    if config.qk_norm:
        kept.append(Kept("norms of queries", heads, config.heads * config.head_dim, 4))
        kept.append(Kept("norms of keys", kv_heads, config.kv_heads * config.head_dim, 4))
    if scores is None:
        kept.append(Kept("softmax", ("heads",), config.heads, 4))
        kept.append(Kept("rotated queries", heads, config.heads * config.head_dim, itemsize))
    else:
        kept.append(Kept("scores", ("heads",), 2 * config.heads * scores, 4))
    return tuple(kept)
