"""Communication as a tested property: what a compiled program moves, held against what it may.

The compiled program is read (`meshwright.sharding.collectives`), so it does not matter who asked
for a collective: the partitioner's inventions count like a ``psum`` in the model, each with the
line of the user's code it comes from.

**Simulated devices** prove which collectives there are. Sums that are kept in slices alone count
as reduce-scatters, as XLA for CPUs lacks the pass that makes them. Bytes they prove only of
programs without floating point under 32 bits, which CPU compilers widen before they send it; of
others a limit of bytes is refused and not judged by twice its size.

**Small ones** are left out: every step sums its loss and its counters over all axes, and a table of
these would hide what costs. What is small is the caller's to say.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from meshwright.sharding.analysis import analyze, has_narrow_floats
from meshwright.sharding.bounds import wire_by_axis
from meshwright.sharding.collectives import LeafOf, collectives_of
from meshwright.sharding.dims import format_path
from meshwright.sharding.errors import ConfigError, did_you_mean
from meshwright.sharding.hlo import Instruction, Shape, parse_module
from meshwright.sharding.leaf_names import either, sizes_of
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.planned import Collective, Kind, PlanReport
from meshwright.sharding.testing_plan import PlanLike, is_plan
from meshwright.sharding.testing_table import counted, format_table, shown_source
from meshwright.sharding.units import format_bytes

__all__ = ["assert_collectives"]

_KINDS: tuple[str, ...] = get_args(Kind)
# Differs from the default of no option in nothing but that jax keeps the result apart.
_APART = {"xla_embed_ir_in_executable": False}


def assert_collectives(
    plan_or_jitted: PlanLike | Any,
    *args: Any,
    allow: Mapping[str, Sequence[str] | str],
    max_bytes: Mapping[str, float] | None = None,
    mesh: Mesh | AbstractMesh | MeshSpec | None = None,
    topology: str | None = None,
    over_bytes: int = 1024,
) -> None:
    """Hold the collectives of a compiled step against those that are allowed.

    Args:
        plan_or_jitted: a plan; or what ``jax.jit`` returned, followed by its arguments (arrays or
            ``jax.ShapeDtypeStruct`` with shardings).
        args: of a jitted function.
        allow: by mesh axis the kinds of collectives that may cross it: ``all-gather``,
            ``all-reduce``, ``reduce-scatter``, ``all-to-all``, ``collective-permute``,
            ``collective-broadcast``. An axis that is not named may be crossed by none. One over
            several axes must be allowed on each.
        max_bytes: by mesh axis the most that a device may send over it in a step, each collective
            over a ring, small ones included.
        mesh: of a jitted function, where its arguments' shardings do not tell.
        topology: hardware to compile for, such as ``v5p:2x2x2``; None for the devices of the mesh.
        over_bytes: collectives of at most this many bytes each may be anything: losses, norms.

    Raises:
        AssertionError: lists what is not allowed with the source line and leaf of each, and by
            axis what sends too much.
        ConfigError: an axis that the mesh has not, a misspelt kind, bytes that cannot be known,
            a program that cannot be read.
        TopologyError, MeshError, MissingExtraError, CompileError: as `meshwright.analyze`.
    """
    found = _program(plan_or_jitted, args, mesh, topology)
    allowed = _checked(allow, found.sizes)
    limits = dict(max_bytes or {})
    for axis in limits:
        _check_axis(axis, found.sizes, "max_bytes")
    if limits and not found.bytes_known:
        raise ConfigError(
            "cannot hold bytes on simulated devices against a limit",
            where=f"max_bytes of {', '.join(limits)}",
            why="the program has bfloat16 or other floating point under 32 bits, and CPU compilers "
            "widen it before they send it",
            fix='name the hardware, such as topology="v5p:2x2x2", or test a float32 model',
        )
    parts = [_not_allowed(found, allowed, over_bytes), _too_much(found, limits), _unread(found)]
    if any(parts):
        raise AssertionError("\n\n".join(part for part in parts if part))


@dataclass(frozen=True)
class _Program:
    """What a compiled program moves.

    Attributes:
        collectives: all of them.
        sizes: of the mesh's axes.
        on: what it was compiled for, in words.
        bytes_known: whether they are what hardware would move.
        unread: sentences on what could not be read.
    """

    collectives: tuple[Collective, ...]
    sizes: Mapping[str, int]
    on: str
    bytes_known: bool
    unread: tuple[str, ...]

    @classmethod
    def reported(cls, report: PlanReport) -> _Program:
        origin, _ = report.provenance.get("collectives.bytes", ("compiler", ""))
        return cls(
            report.collectives,
            report.mesh,
            report.topology,
            origin == "compiler",
            report.unread,
        )


def _program(
    plan_or_jitted: Any,
    args: Sequence[Any],
    mesh: Mesh | AbstractMesh | MeshSpec | None,
    topology: str | None,
) -> _Program:
    if is_plan(plan_or_jitted):
        if args or mesh is not None:
            raise ConfigError(
                "a plan has its arguments and its mesh already",
                why="args and mesh are for jitted functions",
                fix="leave them out, or pass plan.jitted with a state and a batch",
            )
        return _Program.reported(plan_or_jitted.report(topology))
    if not hasattr(plan_or_jitted, "lower"):
        raise ConfigError(
            f"cannot compile a {type(plan_or_jitted).__name__}",
            why="it is neither a plan nor what jax.jit returns",
            fix="pass jax.jit(step), then its arguments",
        )
    over = mesh if mesh is not None else _mesh_of(args)
    if topology is not None or not isinstance(over, Mesh):
        return _Program.reported(analyze(plan_or_jitted, *args, mesh=over, topology=topology))
    return _compiled_here(plan_or_jitted, args, over)


def _compiled_here(jitted: Any, args: Sequence[Any], mesh: Mesh) -> _Program:
    """Compile for the mesh's own devices, with the source lines of now.

    Programs from jax's compilation caches carry the lines of whoever compiled them first: they are
    looked up by what they compute.
    """
    option = "jax_compilation_cache_include_metadata_in_key"
    before = jax.config.values[option]
    jax.config.update(option, True)
    try:
        text = jitted.lower(*args).compile(compiler_options=_APART).as_text()
    finally:
        jax.config.update(option, before)
    spec, platform = MeshSpec.of(mesh), mesh.devices.flat[0].platform
    simulated = platform == "cpu"
    leaf_of = _namer(jitted, args)
    found = collectives_of(parse_module(text), spec, simulated=simulated, leaf_of=leaf_of)
    return _Program(
        found.collectives,
        spec.sizes,
        f"{platform}:{spec.device_count}",
        not (simulated and has_narrow_floats(text)),
        found.unread,
    )


def _namer(jitted: Any, args: Sequence[Any]) -> LeafOf:
    """Names an array by the arguments of its shape, whole or on a device."""
    whole: dict[tuple[int, ...], list[str]] = {}
    parts: dict[tuple[int, ...], list[str]] = {}
    names = _argument_names(jitted, len(args))
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(zip(names, args, strict=True))):
        shape, sharding = np.shape(leaf), getattr(leaf, "sharding", None)
        whole.setdefault(sizes_of(shape), []).append(format_path(path))
        if sharding is not None:
            local = sharding.shard_shape(shape)
            parts.setdefault(sizes_of(local), []).append(format_path(path))

    def name(_: Instruction, shape: Shape) -> str:
        sizes = sizes_of(shape.dims)
        return either(whole.get(sizes) or parts.get(sizes) or []) if sizes else ""

    return name


def _argument_names(jitted: Any, count: int) -> list[str]:
    try:
        names = list(inspect.signature(jitted).parameters)
    except (TypeError, ValueError):
        names = []
    return [names[n] if n < len(names) else str(n) for n in range(count)]


def _mesh_of(args: Sequence[Any]) -> Any:
    for leaf in jax.tree.leaves(args):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            return sharding.mesh
    raise ConfigError(
        "cannot tell which mesh the function runs on",
        why="no argument has a NamedSharding",
        fix="pass mesh=..., or arguments that are placed on it",
    )


def _checked(
    allow: Mapping[str, Sequence[str] | str], sizes: Mapping[str, int]
) -> dict[str, tuple[str, ...]]:
    allowed = {}
    for axis, kinds in allow.items():
        _check_axis(axis, sizes, "allow")
        allowed[axis] = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        for kind in allowed[axis]:
            if kind not in _KINDS:
                raise ConfigError(
                    f"there is no collective `{kind}`",
                    where=f"allow, axis {axis}",
                    fix=did_you_mean(kind, _KINDS),
                )
    return allowed


def _check_axis(axis: str, sizes: Mapping[str, int], where: str) -> None:
    if axis not in sizes:
        raise ConfigError(
            f"the mesh has no axis `{axis}`",
            where=f"{where}; mesh {_written(sizes)}",
            why=f"its axes are {', '.join(sizes)}",
            fix=did_you_mean(axis, sizes),
        )


def _written(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def _not_allowed(found: _Program, allowed: Mapping[str, Sequence[str]], over_bytes: int) -> str:
    strange = [
        one
        for one in found.collectives
        if one.bytes > over_bytes * one.count
        and (not one.axes or any(one.kind not in allowed.get(axis, ()) for axis in one.axes))
    ]
    if not strange:
        return ""
    rows = [
        [
            "+".join(one.axes) or "?",
            one.kind,
            str(one.count),
            format_bytes(one.bytes / one.count),
            one.phase,
            shown_source(one.source) or one.operation,
            one.leaf,
        ]
        for one in sorted(strange, key=lambda one: -one.wire_bytes)
    ]
    told = "; ".join(f"{axis}: {', '.join(kinds) or 'none'}" for axis, kinds in allowed.items())
    headings = ["axes", "kind", "times", "bytes each", "phase", "source", "leaf"]
    return (
        f"{counted(len(rows), 'collective')} of the compiled step "
        f"{'is' if len(rows) == 1 else 'are'} not allowed "
        f"(mesh {_written(found.sizes)}, compiled for {found.on})\n"
        + format_table(headings, rows, right=["times", "bytes each"])
        + f"\nallowed: {told or 'none'}; and whatever moves {format_bytes(over_bytes)} or less"
    )


def _too_much(found: _Program, limits: Mapping[str, float]) -> str:
    sent = wire_by_axis(found.collectives, found.sizes)
    parts = []
    for axis, limit in limits.items():
        if sent[axis] <= limit:
            continue
        on = [one for one in found.collectives if axis in one.axes]
        rows = [
            [
                one.kind,
                str(one.count),
                format_bytes(wire_by_axis([one], found.sizes)[axis]),
                one.phase,
                shown_source(one.source) or one.operation,
                one.leaf,
            ]
            for one in sorted(on, key=lambda one: -one.wire_bytes)
        ]
        parts.append(
            f"a device sends {format_bytes(sent[axis])} over axis `{axis}` in a step, at most "
            f"{format_bytes(limit)} are allowed (mesh {_written(found.sizes)}, compiled for "
            f"{found.on})\n"
            + format_table(
                ["kind", "times", "sends", "phase", "source", "leaf"],
                rows,
                right=["times", "sends"],
            )
        )
    return "\n\n".join(parts)


def _unread(found: _Program) -> str:
    """What may be communication and could not be read: passing over it would be a guess."""
    doubts = [text for text in found.unread if "not counted" in text or "collectives" in text]
    if not doubts:
        return ""
    return "the compiled program could not be read whole:\n" + "\n".join(doubts)
