"""Strategies: functions from Rules to Rules. A hybrid is their fold.

=============  =========  ===============================================================
strategy       axis       what it writes
=============  =========  ===============================================================
`data`         data       activations: batch
`fsdp`         fsdp       params, gradients, optimizer: embed; activations: batch  (ZeRO-3)
`tensor`       tensor     params, gradients, optimizer, activations: vocab heads kv_heads mlp
`sequence`     tensor     activations: sequence
`expert`       expert     params, gradients, optimizer: experts; activations: batch
`context`      context    activations: length, sequence
`pipeline`     stage      params, gradients, optimizer: layers; optimizer: vocab
`zero1`        data       optimizer: embed
`zero2`        data       optimizer, gradients: embed
=============  =========  ===============================================================

Each says in its docstring who holds what and what a step moves, with Ψ parameters a
model-parallel shard, n devices on the axis, ρ = (n-1)/n, β_p and β_g wire bytes of a parameter and
a gradient, m microbatches (Rajbhandari et al., ZeRO, 2020; bytes sent per device, a ring).

>>> from meshwright.sharding.strategies import data, fsdp, tensor, fold
>>> rules = fold(data(), fsdp(), tensor())
>>> rules.lookup("activations", "batch").axes
('data', 'fsdp')
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Literal

from meshwright.sharding.errors import RulesError
from meshwright.sharding.rules import Rules, ShapeRule, Table

__all__ = [
    "SMALL_LEAF_BYTES",
    "Strategy",
    "context",
    "data",
    "expert",
    "fold",
    "fsdp",
    "pipeline",
    "rules_for",
    "sequence",
    "tensor",
    "zero1",
    "zero2",
]

Strategy = Callable[[Rules], Rules]

SMALL_LEAF_BYTES = 16 * 1024
"""Undeclared leaves smaller than this stay whole: a collective's latency costs more than the
memory is worth. Stated in every report that uses it."""


def fold(*strategies: Strategy, start: Rules | None = None) -> Rules:
    """Apply strategies from left to right to empty Rules.

    Raises:
        RulesError: the same strategy twice on one axis, or two that exclude each other.
    """
    return reduce(lambda rules, strategy: strategy(rules), strategies, start or Rules())


def rules_for(axes: Sequence[str], asked: Sequence[Strategy | str] | None = None) -> Rules:
    """Rules from a list of strategies and of rules in their written form.

    Args:
        axes: the mesh's axis names.
        asked: None, or a list without strategies, for the strategy that each axis is named after.

    Raises:
        RulesError: an axis that no strategy is named after, or as `fold` and `Rules.with_text`.

    >>> rules_for(("data", "fsdp"), ["params.norm=none"]).strategies
    (('data', 'data'), ('fsdp', 'fsdp'))
    """
    chosen = [one for one in asked or () if not isinstance(one, str)]
    by_axis = {"data": data, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
    if not chosen:
        strange = [axis for axis in axes if axis not in by_axis]
        if strange:
            raise RulesError(
                f"no strategy is named after the mesh axis `{strange[0]}`",
                where=f"mesh axes {', '.join(axes)}, no strategies given",
                why="without strategies each axis gets the one of its name",
                fix=f'name the strategy and its axis, such as rules=[data("{strange[0]}")]',
            )
        chosen = [by_axis[axis]() for axis in axes]
    rules = fold(*chosen)
    for text in asked or ():
        if isinstance(text, str):
            rules = rules.with_text(text)
    return rules


def data(axis: str = "data") -> Strategy:
    """Data parallelism: rows of the batch split over ``axis``, parameters whole.

    Each step all-reduces the gradients: 2ρβ_gΨ bytes, whatever m is.
    """

    def apply(rules: Rules) -> Rules:
        rules = _enter(rules, "data", axis)
        rules = rules.split("activations", "batch", axis, "data()")
        return _undeclared(rules, (), "data()", ("params", "gradients", "optimizer"))

    return apply


def fsdp(
    axis: str = "fsdp",
    *,
    dims: Sequence[str] = ("embed",),
    accumulate: Literal["whole", "sharded"] = "sharded",
    min_bytes: int = SMALL_LEAF_BYTES,
    whole: Sequence[str] = (),
) -> Strategy:
    """Fully sharded data parallelism (ZeRO-3): rows and every parameter split over ``axis``.

    A layer's weights are gathered when it is applied and dropped after. A step moves
    ρΨ(2mβ_p + mβ_g) with recomputation of the gather in the backward pass.

    Args:
        axis: mesh axis.
        dims: the dims to split; each parameter should have one of them.
        accumulate: with several microbatches, ``sharded`` reduces gradients into shards after
            each (memory Ψ/n, traffic mβ_g); ``whole`` keeps each device's partial sums and
            reduces once a step (memory Ψ, traffic β_g).
        min_bytes: undeclared leaves under this size stay whole.
        whole: path patterns of undeclared leaves that stay whole although no dim can be split.

    Leaves without dim names are split on their largest dim that the axis divides.
    """

    def apply(rules: Rules) -> Rules:
        rules = _enter(rules, "fsdp", axis)
        tables: list[Table] = ["params", "optimizer"]
        if accumulate == "sharded":
            tables.append("gradients")
        for table in tables:
            for dim in dims:
                rules = rules.split(table, dim, axis, "fsdp()")
        rules = rules.split("activations", "batch", axis, "fsdp()")
        rules = _undeclared(rules, (axis,), "fsdp()", tables, min_bytes, tuple(whole))
        return replace(rules, splits_parameters=True)

    return apply


def tensor(
    axis: str = "tensor", *, dims: Sequence[str] = ("vocab", "heads", "kv_heads", "mlp")
) -> Strategy:
    """Tensor parallelism: the inner dims of each layer split, activations reduced.

    Attention heads, the feed-forward width and the vocabulary are split over ``axis``; each
    layer all-reduces its activations A four times a microbatch, 8ρA (Shoeybi et al.,
    Megatron-LM, 2019). Parameters need their dims named: a shape alone does not say which
    dims are inner.
    """

    def apply(rules: Rules) -> Rules:
        rules = _enter(rules, "tensor", axis)
        for table in ("params", "gradients", "optimizer", "activations"):
            for dim in dims:
                rules = rules.split(table, dim, axis, "tensor()")
        return replace(rules, splits_parameters=True)

    return apply


def sequence(axis: str = "tensor") -> Strategy:
    """Sequence parallelism: between the regions that `tensor` splits, tokens split over its axis.

    The residual stream and its norms hold 1/t of the tokens of a row. Each of `tensor`'s
    all-reduces becomes an all-gather where a region begins and a reduce-scatter where it ends, the
    same 8ρA a layer and microbatch, and activations kept for the backward pass are a t-th
    (Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, 2022).
    Gathered inputs are gathered again there and not kept, 10ρA; with full recomputation 11ρA. Fold
    it after `tensor`.

    Raises:
        RulesError: on folding, where ``axis`` has no `tensor`.
    """

    def apply(rules: Rules) -> Rules:
        if ("tensor", axis) not in rules.strategies:
            raise RulesError(
                f"cannot fold sequence() over axis `{axis}`",
                where="folded so far: "
                + (", ".join(f"{n}({a})" for n, a in rules.strategies) or "nothing"),
                why="it splits tokens between the regions of tensor(), over the same axis",
                fix=f"fold tensor('{axis}') before it, or leave sequence() out",
            )
        rules = _enter(rules, "sequence", axis)
        return rules.split("activations", "sequence", axis, "sequence()")

    return apply


def expert(axis: str = "expert") -> Strategy:
    """Expert parallelism: rows and the experts of each layer split over ``axis``, the rest whole.

    To all that is not an expert it is one more `data` axis: 2ρβ_gΨ of those parameters, of every
    microbatch's gradients. Experts stay where they are, and so do their gradients. Tokens go to
    them and come home, forward and backward: 4ρφkA a layer and microbatch for k experts a token
    and capacity factor φ, five where the layer is recomputed (Lepikhin et al., GShard, 2020;
    `meshwright.train.expert_exchange`).
    """

    def apply(rules: Rules) -> Rules:
        rules = _enter(rules, "expert", axis)
        for table in ("params", "gradients", "optimizer"):
            rules = rules.split(table, "experts", axis, "expert()")
        rules = rules.split("activations", "batch", axis, "expert()")
        rules = _undeclared(rules, (), "expert()", ("params", "gradients", "optimizer"))
        return replace(rules, splits_parameters=True)

    return apply


def context(axis: str = "context") -> Strategy:
    """Context parallelism: the length of each row split over ``axis``, parameters whole.

    Everything but attention treats tokens alone, so a device works on its own tokens, as under
    `data`, and gradients are summed over the axis: 2ρβ_gΨ a step. Attention mixes them, in one of
    three ways (`meshwright.train.context`): keys and values go round a ring, are gathered, or
    heads are exchanged for tokens.
    """

    def apply(rules: Rules) -> Rules:
        rules = _enter(rules, "context", axis)
        for dim in ("length", "sequence"):
            rules = rules.split("activations", dim, axis, "context()")
        return _undeclared(rules, (), "context()", ("params", "gradients", "optimizer"))

    return apply


def pipeline(axis: str = "stage", *, dims: Sequence[str] = ("vocab",)) -> Strategy:
    """Pipeline parallelism: layers split over ``axis``, microbatches passed from stage to stage.

    An interior stage sends each microbatch's activation A on and its gradient back, 2mA a step
    (v times that where a stage holds v chunks of layers); schedules and their idle time are in
    `meshwright.sharding.schedule`. What is outside of the layers is worked on by all stages, each
    a part of the tokens of the head; between steps its masters are split too, over ``dims``, and
    gathered once a step: ρ(β_g + β_p) of its parameters. Fold it last, after `tensor`.
    """

    def apply(rules: Rules) -> Rules:
        rules = _enter(rules, "pipeline", axis)
        for table in ("params", "gradients", "optimizer"):
            rules = rules.split(table, "layers", axis, "pipeline()")
        for dim in dims:
            rules = rules.split("optimizer", dim, axis, "pipeline()")
        rules = _undeclared(rules, (), "pipeline()", ("params", "gradients", "optimizer"))
        return replace(rules, splits_parameters=True)

    return apply


def zero1(
    axis: str = "data", *, dims: Sequence[str] = ("embed",), min_bytes: int = SMALL_LEAF_BYTES
) -> Strategy:
    """Optimizer state and master parameters split over a data axis.

    Gradients are reduce-scattered instead of all-reduced and the updated parameters gathered
    once a step, in the compute dtype: ρ(β_g + β_p)Ψ.
    """

    def apply(rules: Rules) -> Rules:
        return _zero(rules, "zero1", axis, dims, ("optimizer",), min_bytes)

    return apply


def zero2(
    axis: str = "data", *, dims: Sequence[str] = ("embed",), min_bytes: int = SMALL_LEAF_BYTES
) -> Strategy:
    """As `zero1`, and the gradient accumulator split too: ρ(mβ_g + β_p)Ψ, memory Ψ/n."""

    def apply(rules: Rules) -> Rules:
        return _zero(rules, "zero2", axis, dims, ("optimizer", "gradients"), min_bytes)

    return apply


def _zero(
    rules: Rules, name: str, axis: str, dims: Sequence[str], tables: Sequence[Table], small: int
) -> Rules:
    rules = _enter(rules, name, axis)
    for table in tables:
        for dim in dims:
            rules = rules.split(table, dim, axis, f"{name}()")
    rules = _undeclared(rules, (axis,), f"{name}()", tables, small)
    return replace(rules, splits_parameters=True)


def _enter(rules: Rules, name: str, axis: str) -> Rules:
    """Record a strategy, refusing one whose axis is taken.

    An axis has one main strategy; a ZeRO stage may join `data` or `context` on it and `sequence`
    joins `tensor`, nothing else.
    """
    for other, taken in rules.strategies:
        joins = _is_zero(name) != _is_zero(other) or (other, name) == ("tensor", "sequence")
        already_split = "fsdp" in (name, other)
        if taken == axis and (already_split or not joins):
            folded = ", ".join(f"{n}({a})" for n, a in rules.strategies)
            raise RulesError(
                f"cannot fold {name}() over axis `{axis}` into these rules",
                where=f"folded so far: {folded}",
                why=f"{other}() has that axis already and leaves nothing for {name}() to split",
                fix=f"leave one of the two out, or give {name}() an axis of its own",
            )
    return replace(rules, strategies=(*rules.strategies, (name, axis)))


def _is_zero(name: str) -> bool:
    return name in ("zero1", "zero2")


def _undeclared(
    rules: Rules,
    axes: tuple[str, ...],
    source: str,
    tables: Sequence[Table],
    min_bytes: int = 0,
    whole: tuple[str, ...] = (),
) -> Rules:
    shape_rule = ShapeRule(axes, min_bytes, whole, source)
    return replace(rules, undeclared=rules.undeclared + tuple((t, shape_rule) for t in tables))
