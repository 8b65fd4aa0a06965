"""What a train step puts on the wire, by closed form: its collectives, and the least it could.

Composed leaf group by leaf group from the layouts, as the step does it (`meshwright.train.step`):

**Weights** cross in the compute dtype. Once a step where the working copy differs from the
masters (ZeRO-1 and -2). Then, where tokens split what the working copy splits (FSDP), once for
each use: a layer's in the forward pass and again in the backward pass, under every remat policy,
since gathered weights are never kept; the embedding and the head once a microbatch. An embedding
whose rows are exchanged (`meshwright.train.embedding`) is not gathered: token ids, and a device's
own rows of activations, cross instead, and so do their gradients.

**Gradients** cross where they leave a layer's backward pass, in the compute dtype, into the
layout they are kept in: a reduce-scatter over the axes that split that layout, then an
all-reduce of the rest over the other token axes (FSDP with data parallelism: 2ρ(r)β_gΨ/s). Axes
that no accumulator is split over are put off to the end of a step with several microbatches and
cross once, in float32, the accumulators' dtype.

**Activations** cross the axes that split heads, MLP and vocabulary: see
`meshwright.sharding.bounds.tensor_layer_bytes` and `vocabulary_bytes`; where the stream between
them is split over the same axes, an all-gather and a reduce-scatter stand for each all-reduce.

**Experts** that are dealt to devices, or take tokens of rows in parts:
`meshwright.train.estimate_experts`.

**Keys and values** cross the axes that split the length of rows: `meshwright.train.context`.

**Stages** pass activations on and gradients back; what is outside of the layers is gathered, and
its gradients are summed, over their axis once a step: `meshwright.train.pipeline`.

**Scalars**: loss and token count over the token axes, the gradient norm over those of the masters.

The lower bound is the sum of these same terms: they are what this model, mesh and strategy cannot
do without. What a step is *known* to move besides is in the expected collectives only. Bytes of a
collective over several axes are shared out by `meshwright.sharding.bounds.axis_shares`.
"""

from __future__ import annotations

from meshwright.sharding.bounds import wire_by_axis, wire_bytes
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.planned import Collective, Kind, Phase
from meshwright.sharding.rules import Rules
from meshwright.train.config import TrainConfig
from meshwright.train.estimate_experts import expert_moves
from meshwright.train.estimate_placement import Axes, PlacedGroup, Placement, place

__all__ = ["by_axis", "expected_collectives", "lower_bounds"]

_PHASES: tuple[Phase, ...] = ("forward", "backward")
_DTYPES = {2: "bf16", 4: "f32"}
_IDS = "token ids"
_LOSS_SCALARS = 2  # the summed loss and the counted tokens
_TOKEN_SCALARS = 3  # of the cross-entropy: maximum, sum of exponentials, the target's logit


def lower_bounds(
    config: TrainConfig, mesh: MeshSpec, rules: Rules, compute_itemsize: int
) -> dict[str, float]:
    """The least bytes a device must send over each mesh axis in a step of this plan.

    Args:
        config: the run.
        mesh: filled mesh.
        rules: from `meshwright.train.parallelism.choose_rules`.
        compute_itemsize: bytes of an element of the compute dtype.

    Returns:
        Bytes by axis, every axis of the mesh; 0 for one of size 1.

    Raises:
        PlacementError: the plan cannot be placed.

    >>> from meshwright.models.config import named
    >>> from meshwright.train.parallelism import choose_rules
    >>> config = TrainConfig(named("llama3-8b"), batch_size=64, seq_len=8192)
    >>> mesh = MeshSpec.parse("fsdp=64")
    >>> bound = lower_bounds(config, mesh, choose_rules(config, mesh), 2)
    >>> round(bound["fsdp"] / 1e9, 1)  # 6ρΨ of the layers, 4ρ of the head, rows of the embedding
    43.4
    """
    placement = place(config, mesh, rules)
    return by_axis(placement, expected_collectives(placement, compute_itemsize))


def by_axis(placement: Placement, collectives: tuple[Collective, ...]) -> dict[str, float]:
    """Wire bytes of collectives by mesh axis, those over several axes shared out."""
    return wire_by_axis(collectives, placement.sizes)


def expected_collectives(
    placement: Placement, compute_itemsize: int, kind: str | None = None
) -> tuple[Collective, ...]:
    """The collectives of one step, alike ones together.

    Args:
        placement: from `meshwright.train.estimate_placement.place`.
        compute_itemsize: bytes of an element of the compute dtype.
        kind: ``tpu`` or ``gpu``: what their compilers overlap with computation. GPU programs start
            every collective before it is needed; of TPU programs only the gathers of the layers'
            weights run beside matmuls. None leaves it unknown.
    """
    moves = _Moves(placement, kind)
    for placed in placement.groups:
        _weights(moves, placed, compute_itemsize)
        _gradients(moves, placed, compute_itemsize)
    _exchange(moves, compute_itemsize)
    _activations(moves, compute_itemsize)
    _context(moves, compute_itemsize)
    _stages(moves, compute_itemsize)
    _experts(moves, compute_itemsize, kind)
    _scalars(moves)
    return moves.collectives()


class _Moves:
    """Collects collectives, joining those of one kind, phase, place and dtype over equal axes."""

    def __init__(self, placement: Placement, kind: str | None) -> None:
        self.placement, self.kind = placement, kind
        self._found: dict[tuple[Kind, Axes, Phase, bool, int, str], tuple[float, int]] = {}
        self.microbatches = placement.config.grad_accum

    def add(
        self,
        kind: Kind,
        axes: Axes,
        size_bytes: float,
        phase: Phase,
        leaf: str,
        *,
        itemsize: int,
        layered: bool = False,
        leaves: int = 0,
    ) -> None:
        """Add a buffer of ``size_bytes``, all of the step's executions together.

        Args:
            kind, axes, phase, leaf, itemsize, layered: what it is; alike ones are joined.
            size_bytes: of all.
            leaves: collectives of their own that move it; 0 where it joins others.
        """
        if axes:
            key = (kind, axes, phase, layered, itemsize, leaf)
            size, count = self._found.get(key, (0.0, 0))
            self._found[key] = (size + size_bytes, count + leaves)

    def collectives(self) -> tuple[Collective, ...]:
        placement = self.placement
        layers, found = placement.layers, []
        inside = self.microbatches > 1
        for (kind, axes, phase, layered, itemsize, leaf), (size, leaves) in self._found.items():
            parts = placement.parts(axes)
            once = phase == "update"
            found.append(
                Collective(
                    kind=kind,
                    axes=axes,
                    count=(1 if once else self.microbatches)
                    * (layers if layered else 1)
                    * self._separate(kind, leaves),
                    bytes=round(size),
                    wire_bytes=round(wire_bytes(kind, size, parts)),
                    phase=phase,
                    overlaps=self._overlaps(kind, layered),
                    leaf=leaf,
                    participants=parts,
                    dtype="s32" if leaf == _IDS else _DTYPES.get(itemsize, f"{itemsize} bytes"),
                    loop_depth=0 if once else inside + layered,
                )
            )
        return tuple(found)

    def _separate(self, kind: Kind, leaves: int) -> int:
        """Collectives of one layer: GPU compilers join a layer's scatters, but not its gathers."""
        return 1 if self.kind == "gpu" and kind == "reduce-scatter" else max(1, leaves)

    def _overlaps(self, kind: Kind, layered: bool) -> bool | None:
        if self.kind is None:
            return None
        return self.kind == "gpu" or (kind == "all-gather" and layered)


def _weights(moves: _Moves, placed: PlacedGroup, itemsize: int) -> None:
    """Gathers of one group: into the working copy, and for every use of it."""
    group, placement = placed.group, moves.placement
    elements = group.elements
    if placed.working != placed.masters:
        held = elements / placement.parts(placed.working) * itemsize
        axes = _less(placed.masters, placed.working)
        moves.add("all-gather", axes, held, "update", "working copy", itemsize=itemsize)
    axes = _less(placed.working, placed.compute)
    if not axes:
        return
    used = elements / placement.parts(placed.compute) * itemsize * moves.microbatches
    used *= _moved_whole(placed, placement)
    layered = group.layered
    leaf = "layers" if layered else "embedding and head"
    for phase in ("forward", "backward") if layered else ("forward",):
        moves.add(
            "all-gather", axes, used, phase, leaf,
            itemsize=itemsize, layered=layered, leaves=group.leaves,
        )  # fmt: skip


def _gradients(moves: _Moves, placed: PlacedGroup, itemsize: int) -> None:
    """Reductions of one group's gradient, from partial sums to the masters' layout."""
    group, placement = placed.group, moves.placement
    deferred = placement.deferred
    if placement.stage and not group.layered:
        # Every stage works on embedding and head, and sums for itself.
        deferred = (*deferred, *placement.stage)
    # Of experts that are dealt to devices each device has all gradients: tokens came from others.
    unsummed = (*_less(placement.token_axes, (*deferred, *placed.compute)), *placed.partial)
    now = tuple([axis for axis in placement.sizes if axis in unsummed])
    size = group.elements / placement.parts(placed.compute) * itemsize * moves.microbatches
    leaf = "layers" if group.layered else "embedding and head"
    scattered = tuple(
        axis for axis in _less(placed.reduced, placed.compute) if axis in placement.token_axes
    )
    whole = _less(now, scattered)
    layered = group.layered
    moved = size * _moved_whole(placed, placement)
    moves.add(
        "reduce-scatter", scattered, moved, "backward", leaf,
        itemsize=itemsize, layered=layered, leaves=group.leaves,
    )  # fmt: skip
    size /= placement.parts(scattered)
    moves.add("all-reduce", whole, size, "backward", leaf, itemsize=itemsize, layered=layered)
    if deferred:
        held = group.elements / placement.parts(placed.reduced) * 4
        scattered = tuple(axis for axis in placed.masters if axis in deferred)
        moves.add("reduce-scatter", scattered, held, "update", "accumulators", itemsize=4)
        held /= placement.parts(scattered)
        whole = _less(deferred, scattered)
        moves.add("all-reduce", whole, held, "update", "accumulators", itemsize=4)


def _moved_whole(placed: PlacedGroup, placement: Placement) -> float:
    """Part of a group that is gathered and reduced: all, less an embedding that is exchanged."""
    group = placed.group
    if not placement.exchanged or group.layered or "vocab" not in dict(group.dims):
        return 1.0
    return 1 - 1 / group.leaves


def _exchange(moves: _Moves, itemsize: int) -> None:
    """A lookup by exchange: ids to all columns, rows back; gradients of rows the other way."""
    placement, axes = moves.placement, moves.placement.exchanged
    if not axes:
        return
    tokens = placement.tokens * moves.microbatches
    ids, rows = tokens * placement.parts(axes) * 4, tokens * placement.config.model.embed * itemsize
    moves.add("all-gather", axes, ids, "forward", _IDS, itemsize=4)
    for phase in ("forward", "backward"):
        moves.add("all-to-all", axes, rows, phase, "embedding's rows", itemsize=itemsize)


def _activations(moves: _Moves, itemsize: int) -> None:
    """What heads, MLP and vocabulary split over an axis cost in every layer and microbatch."""
    placement, model = moves.placement, moves.placement.config.model
    tokens = placement.tokens * moves.microbatches
    stream = tokens * model.embed * itemsize  # one activation A, all microbatches
    heads, mlp, vocab = (placement.activations[dim] for dim in ("heads", "mlp", "vocab"))
    sequence = placement.activations["sequence"]
    layers, again = placement.layers, model.remat in ("full", "save-attention", "offload")

    def enter(axes: Axes, phase: Phase, leaf: str, size: float, layered: bool = True) -> None:
        """Where a region begins: nothing to do but in a stream that is split."""
        if axes and axes == sequence:
            moves.add(
                "all-gather", axes, size, phase, leaf, itemsize=itemsize, layered=layered, leaves=1
            )

    def leave(axes: Axes, phase: Phase, leaf: str, size: float, layered: bool = True) -> None:
        """Where one ends with partial sums, forward at its output and backward at its input."""
        scatters = bool(axes) and axes == sequence
        kind: Kind = "reduce-scatter" if scatters else "all-reduce"
        moves.add(
            kind, axes, size, phase, leaf, itemsize=itemsize, layered=layered, leaves=scatters
        )

    for axes, name in ((heads, "attention"), (mlp, "MLP")):
        enter(axes, "forward", f"{name}'s input", layers * stream)
        leave(axes, "forward", f"{name}'s output", layers * stream)
        enter(axes, "backward", f"{name}'s output", layers * stream)
        leave(axes, "backward", f"{name}'s input", layers * stream)
        # Gathered inputs are never kept: they are an axis' size larger than what they came from.
        enter(axes, "backward", f"{name}'s input again", layers * stream)
    if again:
        # The MLP's output is the next layer's input, which was kept; the sum of attention's is not.
        leave(heads, "backward", "attention's output again", layers * stream)
    scored = placement.head_tokens * moves.microbatches
    part = stream * scored / tokens
    leave(vocab, "forward", "embedding", stream, layered=False)
    enter(vocab, "forward", "head", part, layered=False)
    leave(vocab, "backward", "head", part, layered=False)
    enter(vocab, "backward", "embedding", stream, layered=False)
    scalars = _TOKEN_SCALARS * 4 * scored
    moves.add("all-reduce", vocab, scalars, "forward", "cross-entropy", itemsize=4)
    shared = _less(heads, placement.activations["kv_heads"])
    if shared:
        # Keys and values whole beside split queries: each device has a part of their gradient.
        # Summed as activations or, where those are larger, as the weights' gradients.
        width = 2 * model.kv_heads * model.head_dim / placement.split("kv_heads")
        rows = min(tokens * width, model.embed * width * moves.microbatches)
        size = layers * rows * itemsize
        moves.add(
            "all-reduce", shared, size, "backward", "keys and values",
            itemsize=itemsize, layered=True,
        )  # fmt: skip


def _context(moves: _Moves, itemsize: int) -> None:
    """What attention sends over the axes that split the length of rows.

    Gradients of keys collect round a ring in float32, and are scattered in the compute dtype.
    """
    placement, config = moves.placement, moves.placement.config
    axes, model = placement.activations["length"], config.model
    parts = placement.parts(axes)
    if parts == 1:
        return
    tokens = placement.tokens * moves.microbatches
    width = 2 * model.head_dim * max(model.kv_heads / placement.split("kv_heads"), 1)
    keys = placement.layers * tokens * width * itemsize  # K of all layers and microbatches
    again = model.remat in ("full", "dots", "offload")  # attention's output is not kept

    def add(kind: Kind, phase: Phase, size: float, leaf: str, *, f32: bool = False) -> None:
        count = parts - 1 if kind == "collective-permute" else 1
        moves.add(
            kind, axes, size, phase, leaf,
            itemsize=4 if f32 else itemsize, layered=True, leaves=count,
        )  # fmt: skip

    if config.context.kind == "ulysses":
        heads = model.heads / placement.split("heads")
        rows = tokens * model.head_dim * placement.layers * itemsize
        shared = max(model.kv_heads / placement.split("kv_heads"), parts)
        phases: tuple[Phase, ...] = ("forward", "backward")
        for phase in phases + phases[1:] * again:
            add("all-to-all", phase, rows * 2 * (heads + shared), "queries, keys and output")
        return
    if config.context.kind == "ring":
        kind: Kind = "collective-permute"
        hops = parts - 1
        add(kind, "forward", hops * keys, "keys and values")
        add(kind, "backward", hops * keys * (1 + again), "keys and values again")
        add(kind, "backward", hops * keys * 4 / itemsize, "gradients of keys", f32=True)
        return
    add("all-gather", "forward", parts * keys, "keys and values")
    add("all-gather", "backward", parts * keys * (1 + again), "keys and values again")
    add("reduce-scatter", "backward", parts * keys, "gradients of keys")


def _stages(moves: _Moves, itemsize: int) -> None:
    """What stages pass on, the mean over them: the last sends nothing on, the first nothing back;
    where chunks go down and up, the last keeps what it has made at the turn.

    Besides, the stage with the last chunk deals its tokens to all, for the head, and gets their
    gradients back.
    """
    placement, schedule = moves.placement, moves.placement.schedule
    if schedule is None:
        return
    stream = placement.tokens * moves.microbatches * placement.config.model.embed * itemsize
    stream /= placement.split("sequence")
    dealt = (schedule.stages - 1) / schedule.stages**2 * stream
    phases: tuple[Phase, ...] = ("forward", "backward")
    for phase in phases:
        hop = (schedule.chunks - (1 + schedule.folded) / schedule.stages) * stream
        moves.add("collective-permute", placement.stage, hop, phase, "stages", itemsize=itemsize)
        moves.add(
            "collective-permute", placement.stage, dealt, phase, "head's tokens",
            itemsize=itemsize, leaves=schedule.stages - 1,
        )  # fmt: skip


def _experts(moves: _Moves, itemsize: int, hardware: str | None) -> None:
    """What experts on other devices, or of rows in parts, cost in every layer and microbatch."""
    placement = moves.placement
    rows = placement.config.model.expert_layers * placement.rows * moves.microbatches
    for kind, axes, phase, elements, leaf, width in expert_moves(placement, itemsize, hardware):
        moves.add(
            kind, axes, rows * elements * width, phase, leaf,
            itemsize=width, layered=True, leaves=1,
        )  # fmt: skip


def _scalars(moves: _Moves) -> None:
    placement = moves.placement
    tokens = placement.token_axes
    moves.add("all-reduce", tokens, 4 * _LOSS_SCALARS, "update", "loss", itemsize=4)
    split = {axis for placed in placement.groups for axis in placed.masters}
    axes = tuple(axis for axis in placement.sizes if axis in split)
    moves.add("all-reduce", axes, 4, "update", "gradient norm", itemsize=4)


def _less(axes: Axes, others: Axes) -> Axes:
    return tuple([axis for axis in axes if axis not in others])
