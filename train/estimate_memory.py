"""What a device holds at the fullest moment of a train step, by closed form.

The state is exact: masters, moments and the placed batch are sums of leaves, equal to what
``explain`` says and to the argument bytes of the compiled step. The rest is a small model of the
step's program, one sum a moment, of which the largest is the peak:

``loss``      the forward pass is over: every layer's kept activations, float32 logits and their
              gradient in the compute dtype, the embedding and head as matmuls read them.
``backward``  a layer's backward pass: all kept activations, the float32 gradients of all layers
              (one array from the first layer on), and a *window* of what one layer needs at
              once: its gathered weights and those of the next, its whole gradients before they
              are reduced, its recomputed activations and, without a fused kernel, its scores.
``update``    nothing but the gradients; new parameters and moments replace the old in place.

On a GPU, reduce-scatters inside the layer loop are pipelined by the compiler, which takes the last
layer's backward pass out of the loop. What it does not have to wait for then comes early, beside
the logits: the gradients' arrays and the weights that are laid out anew for the loop.

Outputs alias the donated state, so they are not counted twice. Which temporaries a compiler
keeps at once is its schedule's business and the part of this model that can be wrong; each count
of copies below says what they are. So `MARGIN` is added to what is predicted, under its own name,
unless a caller wants the bare prediction: a verdict should err towards "does not fit", a ranking
not at all. A GPU program that needs more than three quarters of the device's memory is rewritten
by XLA to need less, which can end with more; so such a prediction gets a larger margin, as do those
of pipelines and of experts whose peaks were found above it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from meshwright.sharding.planned import MemoryEstimate
from meshwright.train.estimate_placement import Placement
from meshwright.train.shapes import LANES, kept_activations

if TYPE_CHECKING:
    from meshwright.sharding.chips import Chip

__all__ = ["COUNTER_BYTES", "MARGIN", "StateBytes", "memory_of", "state_of"]

MARGIN = 0.12
"""Part of the predicted peak that is added to it for a verdict: how far compilers' peaks may lie
above the prediction. `meshwright.train.bench_plan.memory_errors` measures it."""

# XLA rewrites (rematerialises) GPU programs beyond 80% of the memory, less 5% for its schedule; of
# our limit, 90% of the memory, that is this part. Scores kept without a fused kernel, 62 to 69 GiB
# on an H100, came out of it at 0.99 to 1.24 times what they were.
_REWRITTEN_FROM = 0.8 * 0.95 / 0.9
_REWRITTEN_MARGIN = 0.25
# Stages whose layers are split over tensor as well: XLA's GPU programs hold gradients in several
# orders of dims at once, which no term below counts. 1.24 and 1.37 times the prediction were seen.
_STAGES_MARGIN = 0.4
# Experts that are dealt and drop nothing: 1.18 times the prediction was seen, on a GPU.
_DROPLESS_MARGIN = 0.2

COUNTER_BYTES = 4 * 4 + 8
"""Of a train state besides parameters and optimizer: four scalars and the key."""

_IN_ORDER = ("a100",)  # XLA's schedules for Hopper and later run more ahead than those for Ampere
# Between the regions of tensor parallelism: gathered inputs, their gradients and outputs that wait
# for their scatter, in units of a whole activation; as H100's and v5e's compilers have it.
_WHOLE_ROWS = 5
# Whole rows for the places that a device has in experts' buffers, where rows are split along their
# length: gathered and not yet put there, or summed and not yet scattered; as CPUs' compiler has it.
_PLACED_ROWS = 2
# Layers' inputs on their way to the host's memory and back.
_AWAY = 2
_MARGIN = "margin of the closed forms"


class StateBytes(NamedTuple):
    """Bytes on each device between and during steps, exact.

    Attributes:
        parameters: float32 masters.
        working: the compute-dtype copy of those whose working layout differs.
        gradients: float32 accumulators, or gradients as they reach the optimizer.
        optimizer: moments and counters.
        batch: the placed batch.
    """

    parameters: int
    working: int
    gradients: int
    optimizer: int
    batch: int


class _Sizes(NamedTuple):
    """Bytes on a device of what the moments are made of."""

    stream: float  # one activation of the residual stream, A
    inputs: float  # every layer's input
    kept: float  # what layers keep besides
    hidden: float  # one activation of the MLP's width
    scores: float  # elements of one layer's scores
    logits: float  # elements
    layer: float  # one layer's weights as matmuls read them
    mlp_weight: float  # one of its MLP matrices
    table: float  # embedding, or head, as matmuls read them
    layers_gradients: float  # of all layers, as the backward pass collects them
    head_gradient: float  # reduced; of a head of its own
    gathers: bool
    peels: bool  # gradients are scattered inside the layer loop
    casts: float  # all layers' weights in the compute dtype, still split as the masters
    copies: float  # the working copy of all layers
    sliced: float  # weights of the chunks that a stage is at, cut out of all it holds
    ahead: bool  # what waits for nothing is made early
    whole_rows: float = 0.0  # what is gathered of tokens that are split, and not yet scattered


def state_of(placement: Placement, itemsize: int) -> StateBytes:
    """The exact part: equal to `meshwright.train.explain.totals_of`, and the batch.

    Args:
        placement: from `meshwright.train.estimate_placement.place`.
        itemsize: of the compute dtype.
    """
    config, parts = placement.config, placement.parts
    many = config.grad_accum > 1
    parameters = working = gradients = 0
    for group, masters, held, _, reduced, _, copied, _ in placement.groups:
        parameters += 4 * group.elements // parts(masters)
        gradients += 4 * group.elements // parts(reduced if many else masters)
        if copied:
            working += itemsize * group.elements // parts(held)
    optimizer = sum([4 * group.elements // parts(axes) for group, axes in placement.moments])
    arrays = 5 if config.data.mask_documents else 3
    # Rows are placed whole; a context axis splits them in the step.
    batch = arrays * 4 * placement.rows * config.seq_len * config.grad_accum
    return StateBytes(parameters, working, gradients, optimizer, batch)


def memory_of(
    placement: Placement,
    *,
    itemsize: int,
    fused_attention: bool,
    chip: Chip | None = None,
    margin: float = MARGIN,
) -> MemoryEstimate:
    """Bytes one device holds, and at its peak.

    Args:
        placement: from `meshwright.train.estimate_placement.place`.
        itemsize: of the compute dtype.
        fused_attention: see `meshwright.train.estimate.estimate`.
        chip: whose compiler, they keep different copies, and whose limit; None is a TPU's.
        margin: part of the peak that is added to it, as a temporary, more for some programs on
            GPUs; 0 for the bare prediction.

    Returns:
        The estimate; its ``fits`` is a verdict only with a margin.
    """
    state = state_of(placement, itemsize)
    kind, limit_bytes = (chip.kind, chip.limit_bytes) if chip else ("tpu", None)
    ahead = chip is None or chip.name not in _IN_ORDER
    sizes = _sizes(placement, itemsize, fused_attention, kind, ahead)
    moments = {
        "loss": _loss(placement, sizes, itemsize, fused_attention, kind),
        "backward": _backward(placement, sizes, itemsize, fused_attention, kind),
        "update": {"gradients": float(state.gradients)},
    }
    if placement.config.grad_accum > 1:
        for moment in ("loss", "backward"):
            moments[moment]["accumulators"] = float(state.gradients)
    largest = max(moments.values(), key=lambda parts: sum(parts.values()))
    held = state.parameters + state.optimizer + state.batch + COUNTER_BYTES
    peak = held + state.working + sum(largest.values())
    if margin and kind == "gpu":
        margin = max(margin, _gpu_margin(placement, peak, limit_bytes))
    largest[_MARGIN] = margin * peak
    activations = sum(largest.get(name, 0.0) for name in ("layer inputs", "kept activations"))
    gradients = sum(largest.get(name, 0.0) for name in ("gradients", "accumulators"))
    named = {
        "float32 parameters": state.parameters,
        "optimizer state": state.optimizer,
        "batch": state.batch,
        "working copy": state.working,
        **largest,
    }
    ranked = sorted(((name, round(size)) for name, size in named.items() if size >= 1))
    return MemoryEstimate(
        parameters_bytes=state.parameters + state.working,
        gradients_bytes=round(gradients),
        optimizer_bytes=state.optimizer + COUNTER_BYTES,
        batch_bytes=state.batch,
        activations_bytes=round(activations),
        temporaries_bytes=round(sum(largest.values()) - activations - gradients),
        peak_bytes=round(peak + largest[_MARGIN]),
        limit_bytes=limit_bytes,
        contributors=tuple(sorted(ranked, key=lambda item: -item[1])),
    )


def _gpu_margin(placement: Placement, peak: float, limit_bytes: int | None) -> float:
    """What to add for programs of which these closed forms are known to say too little."""
    config, found = placement.config, 0.0
    if limit_bytes and peak > _REWRITTEN_FROM * limit_bytes:
        found = _REWRITTEN_MARGIN
    if placement.schedule and placement.split("mlp") > 1:
        found = max(found, _STAGES_MARGIN)
    if placement.experts and config.model.experts.capacity_factor is None:
        found = max(found, _DROPLESS_MARGIN)
    return found


def _sizes(placement: Placement, itemsize: int, fused: bool, kind: str, ahead: bool) -> _Sizes:
    model = placement.config.model
    tokens, split, parts = placement.tokens, placement.split, placement.parts
    kept, lanes = 0.0, LANES[kind]
    length = placement.config.seq_len
    summed = kind == "gpu" and split("mlp") > 1 and split("sequence") == 1
    for found in kept_activations(
        model, itemsize=itemsize, fused_attention=fused, length=length, lanes=lanes, summed=summed
    ):
        share = 1
        for dim in found.dims:
            share *= split(dim)
        kept += found.elements * found.itemsize / share
    layer = layers_gradients = head_gradient = casts = copies = 0.0
    gathers = peels = False
    for group, _, working, compute, reduced, _, copied, gathered in placement.groups:
        # Gradients have the dtype of what was differentiated: masters, or the working copy.
        width = itemsize if copied else 4
        gradient = group.elements / parts(reduced) * width
        if group.layered:
            layer += group.elements / parts(compute) * itemsize / placement.layers
            layers_gradients += gradient
            casts += group.elements / parts(working) * itemsize * (not copied)
            copies += group.elements / parts(working) * itemsize * copied
            gathers |= gathered
            peels |= any(axis in placement.token_axes and axis not in compute for axis in reduced)
        elif not model.tied and dict(group.dims).get("vocab"):
            head_gradient += gradient / group.leaves
    if model.remat == "none" and not gathers:
        # Nothing makes the loop compute the casts again, so the cast weights are kept too.
        kept += layer / tokens
    embed = tokens * model.embed * itemsize
    return _Sizes(
        stream=embed,
        inputs=(_AWAY if model.remat == "offload" else placement.layers_kept)
        * embed
        / split("sequence"),
        kept=placement.layers_kept * tokens * kept,
        hidden=tokens * model.active_mlp / split("mlp") * itemsize,
        scores=tokens * length * model.heads / split("heads"),
        logits=placement.head_tokens * model.vocab_size / split("vocab"),
        layer=layer,
        mlp_weight=model.embed
        * max(1, model.experts.count)
        * model.expert_mlp
        / split("mlp")
        / parts(placement.experts)
        * itemsize,
        table=model.embed * model.vocab_size / split("vocab") * itemsize,
        layers_gradients=layers_gradients / _chunks(placement),  # a unit's, not added up yet
        head_gradient=head_gradient,
        gathers=gathers,
        peels=peels,
        casts=casts if itemsize < 4 else 0.0,
        copies=copies,
        sliced=_sliced(placement, itemsize),
        ahead=ahead,
        whole_rows=_whole_rows(placement) * embed,
    )


def _whole_rows(placement: Placement) -> float:
    """What is gathered of tokens and not yet scattered, in units of a device's stream."""
    found, parts = 0.0, placement.split("length")
    if placement.split("sequence") > 1:
        found += _WHOLE_ROWS
    if parts > 1 and placement.config.model.experts.capacity_factor is not None:
        found += _PLACED_ROWS * parts
    return found


def _chunks(placement: Placement) -> int:
    """Groups of layers that a stage works on one at a time; 1 without stages."""
    return placement.schedule.chunks if placement.schedule else 1


def _sliced(placement: Placement, itemsize: int) -> float:
    """Weights of the chunks that a stage is at, one forwards and another backwards, cut out of all
    that it holds; nothing where that is one chunk."""
    chunks = _chunks(placement)
    held = sum(
        placed.group.elements / placement.parts(placed.working) * (itemsize if placed.copied else 4)
        for placed in placement.groups
        if placed.group.layered
    )
    return 2 * held / chunks if chunks > 1 else 0.0


def _loss(
    placement: Placement, sizes: _Sizes, itemsize: int, fused: bool, kind: str
) -> dict[str, float]:
    """Where the logits are: their gradient's matmuls, the first of the backward pass."""
    found = {"layer inputs": sizes.inputs, "kept activations": sizes.kept}
    if kind == "tpu":
        # The gradient of the logits is made from them inside both matmuls that read it; the
        # head's gradient is written while its weights still wait for the other one. Casts of
        # the layers' weights leave the loop.
        found["logits"] = 4 * sizes.logits
        found["head and its gradient"] = 2 * sizes.table
        found["cast weights"] = sizes.casts
        found["window"] = 3 * sizes.stream + sizes.whole_rows
        return found
    found["logits"] = (4 + itemsize) * sizes.logits
    if sizes.ahead:
        found["gradients"] = sizes.layers_gradients  # zeros
    found["chunks' weights"] = sizes.sliced
    if not sizes.peels:
        found["embedding and head"] = sizes.table * (1 if placement.config.model.tied else 2)
        found["window"] = 4 * sizes.stream + sizes.whole_rows
        return found
    # A working copy holds the head already, and is laid out anew for the loop as a whole.
    found["head"] = 0.0 if sizes.copies else sizes.table
    found["transposed weights"] = sizes.copies or _last_dim_masters(placement)
    found["window"] = sizes.layer + 4 * sizes.stream + sizes.whole_rows
    if not fused and placement.config.model.remat == "none":
        found["scores"] = _hole(placement, sizes)
    return found


def _backward(
    placement: Placement, sizes: _Sizes, itemsize: int, fused: bool, kind: str
) -> dict[str, float]:
    """A layer's backward pass, the gradients of all layers beside it."""
    model = placement.config.model
    found = {
        "layer inputs": sizes.inputs,
        "kept activations": sizes.kept,
        "gradients": sizes.layers_gradients,
        # The embedding's gradient, whole: a scatter into zeros before it is reduced.
        "embedding's gradient": 0.0 if placement.exchanged else sizes.table,
        "chunks' weights": sizes.sliced,
    }
    if kind == "tpu":
        found["head's gradient"] = sizes.head_gradient
        found["cast weights"] = sizes.casts
    else:
        # Made before the layers' backward pass, and reduced after it.
        found["head's gradient"] = sizes.table
        if sizes.gathers:
            # Arrays have places for the whole program: the one that a head of its own was gathered
            # into is too large for most of what comes later.
            found["head's place"] = 0.0 if model.tied else sizes.table
            # Masters whose split dim is their last are laid out anew before the gathers.
            found["transposed weights"] = _last_dim_masters(placement)
    if not fused:
        # Scores and their gradient in float32, and both again in the compute dtype.
        found["scores"] = sizes.scores * 2 * (4 + itemsize)
        if model.remat == "none":
            found["scores"] += _hole(placement, sizes)
    elif placement.schedule and kind == "gpu":
        found |= _of_two_units(placement, sizes)
    recomputed = 0 if model.remat == "none" else 2
    if recomputed and fused and model.experts.capacity_factor is not None:
        # A third of their width, of gradients, and as many rows as their buffers have places.
        found["experts' buffers"] = (3 * model.experts.capacity_factor - recomputed) * sizes.hidden
    matrices = 3 if model.activation == "swiglu" else 2
    attention = sizes.layer - matrices * sizes.mlp_weight
    # An all-reduce between MLP and attention keeps a scheduler from mixing the two.
    streams = 4 if placement.split("mlp") > 1 else 8
    found["window"] = (
        attention
        + 2 * sizes.mlp_weight  # gradients of gate and up, not reduced yet
        + recomputed * sizes.hidden
        + sizes.whole_rows
        + streams * sizes.stream  # float32 norms and their gradients, and the compute dtype's
    )
    return found


def _of_two_units(placement: Placement, sizes: _Sizes) -> dict[str, float]:
    """What a tick of a pipeline holds besides: gradients of a unit's layers, made and copied out of
    their loop, and where there are both directions, what the other one's unit leaves."""
    schedule = placement.schedule
    assert schedule is not None
    found = {"gradients of a unit": sizes.layers_gradients}
    if schedule.folded:  # its loop has two ticks
        found["embedding's gradient again"] = sizes.table
    if schedule.returns_at_once and placement.config.model.remat != "none":
        found["activations of a unit"] = (sizes.inputs + sizes.kept) / (schedule.slots + 1)
    return found


def _hole(placement: Placement, sizes: _Sizes) -> float:
    """The kept scores of all layers are two arrays. The last layer's backward pass, outside of the
    loop, reads those of grouped heads in another order than the loop, where weights are gathered in
    it: one is copied into it."""
    model = placement.config.model
    grouped = model.heads != model.kv_heads
    apart = sizes.peels and sizes.gathers
    return 4 * sizes.scores * placement.layers if apart and grouped else 0.0


def _last_dim_masters(placement: Placement) -> float:
    """Float32 masters of attention's output and the MLP's last matmul, all layers."""
    model = placement.config.model
    queries = model.heads * model.head_dim
    total = 0.0
    for group, masters, *_ in placement.groups:
        names = {name for name, _ in group.dims}
        if group.layered and {"embed", "mlp"} <= names or {"embed", "heads"} <= names:
            own = dict(group.dims)["mlp"] if "mlp" in names else queries
            one = (
                dict(group.dims).get("layers", 1)
                * model.embed
                * own
                * dict(group.dims).get("experts", 1)
            )
            total += 4 * one / placement.parts(masters)
    return total
