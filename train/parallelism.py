"""From the few words of a config to a mesh, rules and dtype: what is derived, and why.

A run says ``--mesh data=2,fsdp=2,tensor=2`` and nothing more: each axis name brings its strategy,
in canonical order, and the ZeRO stage joins the data axis. Everything that is derived is a
pure function here, so that ``train`` and ``explain`` derive the same and both can print it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from meshwright.sharding.errors import MeshError, PlacementError, RulesError
from meshwright.sharding.expert_layout import check_experts
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.rules import Rules
from meshwright.sharding.schedule import Schedule, layer_slots
from meshwright.sharding.strategies import (
    context,
    data,
    expert,
    fold,
    fsdp,
    pipeline,
    sequence,
    tensor,
    zero1,
    zero2,
)
from meshwright.sharding.token_layout import check_heads, check_length
from meshwright.train.config import ContextConfig, PipelineConfig, TrainConfig

__all__ = [
    "check_batch",
    "choose_dtype",
    "choose_mesh",
    "choose_places",
    "choose_rules",
    "choose_schedule",
    "describe_devices",
    "without_absent_axes",
]

_DEMO_MESH = "data=2,fsdp=2,tensor=2"
_DEMO_DEVICES = 8
_OF_AXIS = {
    "zero": ("data", 0),
    "pipeline": ("stage", PipelineConfig()),
    "context": ("context", ContextConfig()),
    "sequence": ("tensor", False),
}
"""Settings → the axis they say something of, and what they are without it."""
_SUPPORTED = ("stage", "data", "fsdp", "expert", "context", "tensor")


def choose_mesh(config: TrainConfig, device_count: int, *, simulated: bool) -> MeshSpec:
    """The filled mesh of a run.

    ``auto`` is data=2,fsdp=2,tensor=2 on eight simulated devices, so that a first run shows all
    three, and fsdp=-1 elsewhere: on real devices the safest use of all of them.

    Raises:
        MeshError: sizes that do not multiply to the devices, or an axis without a strategy.
    """
    text = config.mesh
    if text == "auto":
        demo = simulated and device_count == _DEMO_DEVICES
        text = _DEMO_MESH if demo else "fsdp=-1"
    spec = MeshSpec.parse(text)
    for axis, size in spec.axes:
        if axis not in _SUPPORTED and size != 1:
            raise MeshError(
                f"cannot train with the mesh axis `{axis}`",
                where=f"mesh {spec}",
                why=f"`{axis}` has no strategy in this version",
                fix=f"use {', '.join(_SUPPORTED)}",
            )
    kept = tuple((axis, size) for axis, size in spec.axes if axis in _SUPPORTED)
    kept = kept or (("data", 1),)
    named = f"cpu:{device_count}" if simulated else str(config.topology)
    across = tuple((axis, parts) for axis, parts in spec.across if axis in _SUPPORTED)
    return MeshSpec(kept, across).fill(device_count, named)


def choose_rules(config: TrainConfig, mesh: MeshSpec) -> Rules:
    """Fold the strategy of each mesh axis, the ZeRO stage, then the config's own rules.

    ZeRO-2 keeps gradients in shards between microbatches, so with it `fsdp` does too, whatever
    ``accumulate`` says: half a gradient in each layout would be resharded every step.

    Raises:
        RulesError: ``zero`` without a data axis, or a rule that cannot be read.
    """
    accumulate = "sharded" if config.zero == 2 else config.accumulate
    by_axis = {
        "data": data(),
        "fsdp": fsdp(accumulate=accumulate),
        "expert": expert(),
        "context": context(),
        "tensor": tensor(),
    }
    strategies = [by_axis[axis] for axis in mesh.names if axis in by_axis]
    _check_settings(config, mesh)
    if config.sequence:
        strategies.append(sequence())
    if config.zero:
        if "data" not in mesh.names:
            raise RulesError(
                f"cannot use zero={config.zero}",
                where=f"mesh {mesh}",
                why="ZeRO splits optimizer state over the data axis, and there is none",
                fix="add data=2 (or more) to the mesh; fsdp splits everything already",
            )
        strategies.append(zero1() if config.zero == 1 else zero2())
    if "stage" in mesh.names:
        # Last: the vocabulary is split over its axis within what other axes split it into.
        strategies.append(pipeline())
    rules = fold(*strategies)
    for text in config.rules:
        rules = rules.with_text(text)
    for table in ("params", "gradients", "optimizer"):
        stage, layers = rules.stage_axes(), rules.axes_for(table, "layers")
        if stage and layers != stage:
            raise RulesError(
                f"cannot lay out layers as `{table}.layers → {'+'.join(layers) or 'none'}`",
                where=f"mesh {mesh}",
                why="each stage of the pipeline works on layers of its own, and holds them",
                fix=f"leave the rule out, or `{stage[0]}` out of the mesh",
            )
    return rules


def without_absent_axes(config: TrainConfig, mesh: MeshSpec) -> tuple[TrainConfig, list[str]]:
    """A run that goes on on another mesh, without what it said of axes that are not there.

    Nobody gave those settings with the new mesh: they were saved with the run, which would be
    refused for them. A new run is refused, as `choose_rules` does.

    Returns:
        The config, and the names of the settings that are as by default now.

    >>> from meshwright.train.config import default_config
    >>> context = ContextConfig(order="striped")
    >>> saved = replace(default_config(), zero=1, sequence=True, context=context)
    >>> found, left_out = without_absent_axes(saved, MeshSpec.parse("fsdp=4,tensor=2"))
    >>> left_out, found.zero, found.sequence
    (['zero', 'context'], 0, True)
    """
    absent: dict[str, Any] = {
        name: default
        for name, (axis, default) in _OF_AXIS.items()
        if axis not in mesh.names and getattr(config, name) != default
    }
    return replace(config, **absent), list(absent)


def _check_settings(config: TrainConfig, mesh: MeshSpec) -> None:
    """Refuse settings of an axis that the mesh does not have: they would have no effect."""
    if config.sequence and "tensor" not in mesh.names:
        raise RulesError(
            "cannot use sequence=True",
            where=f"mesh {mesh}",
            why="it splits tokens between the regions of the tensor axis, and there is none",
            fix="add tensor=2 (or more) to the mesh, or leave --sequence out",
        )
    if "expert" in mesh.names:
        if not config.model.experts.count:
            raise RulesError(
                f"cannot deal the experts of `{config.model.name}` to devices",
                where=f"mesh {mesh}, model.experts.count=0",
                why="its layers have one MLP each, and no experts",
                fix="give the devices of the expert axis to data, fsdp or tensor, or use a model "
                "with experts such as tiny-moe",
            )
        check_experts(config.model.experts.count, mesh.sizes["expert"])
    if config.model.remat == "offload" and "stage" in mesh.names:
        raise RulesError(
            "cannot use model.remat=offload in a pipeline",
            where=f"mesh {mesh}",
            why="stages keep what microbatches leave for their way back in buffers on the device",
            fix="use --model.remat full, or leave `stage` out of the mesh",
        )
    staged, interleaved = "stage" in mesh.names, config.pipeline.schedule == "interleaved"
    for name, used in (("schedule", staged), ("chunks", staged and interleaved)):
        value = getattr(config.pipeline, name)
        if used or value == getattr(PipelineConfig(), name):
            continue
        raise RulesError(
            f"cannot use pipeline.{name}={value}",
            where=f"mesh {mesh}, pipeline.schedule={config.pipeline.schedule}",
            why="the groups of layers on a stage are a choice only where they are interleaved"
            if staged
            else "it says how microbatches cross the stage axis, and there is none",
            fix=f"add --pipeline.schedule interleaved, or leave --pipeline.{name} out"
            if staged
            else f"add stage=2 (or more) to the mesh, or leave --pipeline.{name} out",
        )
    default = ContextConfig()
    for name in ("kind", "order"):
        value = getattr(config.context, name)
        if value != getattr(default, name) and "context" not in mesh.names:
            raise RulesError(
                f"cannot use context.{name}={value}",
                where=f"mesh {mesh}",
                why="it says how attention crosses the context axis, and there is none",
                fix=f"add context=2 (or more) to the mesh, or leave --context.{name} out",
            )


def choose_schedule(how: PipelineConfig, stages: int, microbatches: int) -> Schedule:
    """The schedule of a run over so many stages.

    Raises:
        PlacementError: microbatches that the stages cannot be filled with.
    """
    chunks = {"interleaved": how.chunks, "v-shape": 2}.get(how.schedule, 1)
    return Schedule(how.schedule, stages, microbatches, chunks)


def choose_places(config: TrainConfig, mesh: MeshSpec) -> tuple[int | None, ...]:
    """Where the layers are stored, for `meshwright.models.pure.Functional`; empty: in order.

    Raises:
        PlacementError: more groups of layers than layers, or too few microbatches.
    """
    stages = mesh.sizes.get("stage", 1)
    if stages == 1:
        return ()
    schedule = choose_schedule(config.pipeline, stages, config.grad_accum)
    layers = config.model.layers - config.model.experts.first_dense
    places = layer_slots(layers, stages, schedule.chunks, folded=schedule.folded)
    return () if places == tuple(range(layers)) else places


def choose_dtype(config: TrainConfig, *, on_cpu: bool) -> Any:
    """The compute dtype: as set, else bfloat16 on accelerators and float32 on CPU.

    CPUs widen bfloat16 before every operation: it costs time there and saves nothing.
    """
    import jax.numpy as jnp

    if config.dtype is None:
        return jnp.float32 if on_cpu else jnp.bfloat16
    return jnp.dtype(config.dtype).type


def check_batch(config: TrainConfig, rules: Rules, mesh: MeshSpec) -> None:
    """Check that a microbatch's rows and tokens divide over the axes that split them.

    Raises:
        PlacementError: with the batch sizes or lengths that work.
    """
    rows = config.batch_size // config.grad_accum
    axes, parts = _splitting(rules, mesh, "batch")
    if rows % parts or not rows:
        unit = parts * config.grad_accum
        below = config.batch_size // unit * unit
        choices = [str(size) for size in (below, below + unit) if size]
        accumulated = f" in {config.grad_accum} microbatches" if config.grad_accum > 1 else ""
        raise PlacementError(
            f"cannot deal {config.batch_size} rows over {parts} devices{accumulated}",
            where=f"batch_size={config.batch_size}, grad_accum={config.grad_accum}, mesh {mesh}",
            why=f"each microbatch has {rows} rows for {axes} = {parts} parts",
            fix=f"use --batch-size {' or '.join(choices)}",
        )
    _check_token_axes(rules)
    axes, parts = _splitting(rules, mesh, "length")
    if parts > 1:
        check_length(config.context.order, config.seq_len, parts)
        split = [_splitting(rules, mesh, dim)[1] for dim in ("heads", "kv_heads")]
        heads = config.model.heads // split[0], max(1, config.model.kv_heads // split[1])
        check_heads(config.context.kind, *heads, parts)
    _check_sequence(config, rules, mesh)


def _check_token_axes(rules: Rules) -> None:
    """Check that no axis splits the length of rows and another dim of an activation as well."""
    others = [d for d in rules.known_dims("activations") if d not in ("length", "sequence")]
    for axis in rules.axes_for("activations", "length"):
        for dim in others:
            if axis not in rules.axes_for("activations", dim):
                continue
            raise PlacementError(
                f"cannot split two dims of `activations length and {dim}` over the same axis "
                f"`{axis}`",
                why="each device along an axis holds one part, so an axis splits one dim",
                fix=f"keep one of them whole: --rules activations.{dim}=none",
            )


def _check_sequence(config: TrainConfig, rules: Rules, mesh: MeshSpec) -> None:
    """Check that what `sequence` splits divides: the tokens of a row on one device."""
    axes, parts = _splitting(rules, mesh, "sequence")
    if config.seq_len % parts:
        below = config.seq_len // parts * parts
        choices = [str(size) for size in (below, below + parts) if size]
        raise PlacementError(
            f"cannot split rows of {config.seq_len} tokens over {parts} devices",
            where=f"seq_len={config.seq_len}, mesh {mesh}",
            why=f"{config.seq_len} is not divisible by {parts} ({axes})",
            fix=f"use --seq-len {' or '.join(choices)}",
        )


def _splitting(rules: Rules, mesh: MeshSpec, dim: str) -> tuple[str, int]:
    """The axes that split an activation dim, in words, and into how many parts."""
    axes = rules.axes_for("activations", dim)
    return (
        " × ".join(f"{axis}={mesh.sizes[axis]}" for axis in axes),
        math.prod(mesh.sizes[axis] for axis in axes),
    )


def describe_devices(devices: list[Any]) -> str:
    """Devices in words, for the summary of a run.

    >>> import jax
    >>> describe_devices(jax.devices("cpu")[:2])
    '2 simulated CPU devices'
    """
    first = devices[0]
    processes = len({device.process_index for device in devices})
    shared = f" in {processes} processes" if processes > 1 else ""
    if first.platform == "cpu":
        many = f"{len(devices)} simulated CPU devices{shared}"
        return many if len(devices) > 1 else "1 CPU device"
    return f"{len(devices)} × {first.device_kind}{shared}"
