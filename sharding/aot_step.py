"""Any user's jitted step, lowered here and compiled in a child for hardware that is not here.

The step's Python is in this process and the compiler has to be in another, so what crosses is the
program jax lowered: StableHLO as bytecode, with its source locations. Lowering for another
platform than this machine's is jax's own ahead-of-time interface; the mesh the step was written
on may be simulated CPU devices, an abstract mesh or the devices of a topology, for the program
names axes and sizes only. In the child the same module is compiled with the target mesh's
devices, by the call jax itself makes: with the same memory figures, and the same text but for the
frames of the caller (tested).

What survives: shardings of arguments, results and constraints with their axis names; donation
(it is written on the arguments, as a promise or as an alias to a result); op names, scopes and
source lines; kernels (Pallas, cuDNN); constants. What does not: callbacks (`jax.debug.print`,
`io_callback`), which jax refuses to lower for a platform that is not here; ``compiler_options``
given to ``jax.jit``; and Python that asks ``jax.default_backend()`` is told of this machine's.
`jax.lax.platform_dependent` takes the target's branch.

`jax.export` was rejected: it needs the flatbuffers package to write a program down, puts every
operation below one more call, which changes its op names, and leaves out donation, which decides
what fits.

The cost is one private corner: jaxlib's ``CompileOptions``, filled as jax fills them.
"""

from __future__ import annotations

import hashlib
import io
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meshwright.sharding.aot import run_child
from meshwright.sharding.aot_program import CompiledProgram, compiled_program
from meshwright.sharding.errors import ConfigError, MeshError, MissingExtraError
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.topology import Topology

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh, Mesh

__all__ = [
    "LoweredStep",
    "compile_in_child",
    "compile_lowered_step",
    "compile_step",
    "lower_step",
    "step_fingerprint",
]

_PLATFORM = {"tpu": "tpu", "gpu": "cuda", "cpu": "cpu"}
_LOW_EFFORT = 9  # XLA's EffortLevel O0


@dataclass(frozen=True)
class LoweredStep:
    """A step as jax lowered it, ready to travel.

    Attributes:
        module: StableHLO bytecode with source locations.
        devices: how many it is partitioned over.
        meshes: axis sizes of each mesh the program names.
        lower_seconds: tracing and lowering.
    """

    module: bytes
    devices: int
    meshes: tuple[tuple[tuple[str, int], ...], ...]
    lower_seconds: float

    @property
    def fingerprint(self) -> str:
        """A digest of the program, source lines included; equal programs give equal ones."""
        return hashlib.sha256(self.module).hexdigest()


def lower_step(jitted: Any, *abstract_args: Any, topology: Topology) -> LoweredStep:
    """Trace a step and lower it for a topology's platform.

    Args:
        jitted: what ``jax.jit`` returned; its shardings on any mesh of the right axes.
        abstract_args: arrays or ShapeDtypeStructs, with shardings or without.
        topology: TPU, GPU or ``cpu:N``.

    Raises:
        ConfigError: ``jitted`` is no jitted function, or has a callback.
        MissingExtraError: it uses cuDNN, which is not installed.
    """
    if not hasattr(jitted, "trace"):
        raise ConfigError(
            "cannot analyze the step",
            why=f"{type(jitted).__name__} is not what jax.jit returns",
            fix="pass jax.jit(step, donate_argnums=...)",
        )
    started = time.monotonic()
    platform = _PLATFORM[topology.kind]
    try:
        lowered = jitted.trace(*abstract_args).lower(lowering_platforms=(platform,))
    except (ValueError, RuntimeError) as error:
        if "is different from the lowering platform" in str(error):
            raise ConfigError(
                f"cannot lower the step for `{topology}`",
                why="it calls back into Python (jax.debug.print, io_callback), which jax lowers "
                "only for hardware that is here",
                fix="leave the callbacks out of the step that is analyzed",
            ) from error
        if "cuDNN not found" in str(error):
            raise MissingExtraError(
                f"cannot lower the step for `{topology}`",
                why="it uses cuDNN attention, and cuDNN is not installed",
                fix="pip install 'meshwright[cuda]', or use another attention",
            ) from error
        raise
    operation = lowered.compiler_ir("stablehlo").operation
    written = io.BytesIO()
    operation.write_bytecode(written)
    devices = operation.attributes["mhlo.num_partitions"].value
    meshes = {_axes(str(op)) for op in operation.regions[0].blocks[0] if op.name == "sdy.mesh"}
    seconds = time.monotonic() - started
    return LoweredStep(written.getvalue(), devices, tuple(sorted(meshes)), seconds)


def _axes(text: str) -> tuple[tuple[str, int], ...]:
    """Axes of a mesh as it is printed: ``<["x"=4, "y"=4]>``, also with device_ids behind."""
    inner = text.partition("<[")[2].partition("]")[0]
    return tuple((name, int(size)) for name, size in re.findall(r'"([^"]+)"=(\d+)', inner))


def step_fingerprint(jitted: Any, *abstract_args: Any, topology: Topology) -> str:
    """Digest of the step's program, for a key; see `lower_step`, which it costs."""
    return lower_step(jitted, *abstract_args, topology=topology).fingerprint


def compile_step(
    jitted: Any,
    *abstract_args: Any,
    mesh: Mesh | AbstractMesh | MeshSpec,
    topology: Topology,
    quick: bool = False,
    timeout_seconds: float = 900.0,
) -> CompiledProgram:
    """Compile any jitted step for hardware that is not here.

    Args:
        jitted, abstract_args: as `lower_step`.
        mesh: axes and sizes, as the step names them; only these are used of a built mesh.
        topology: the hardware.
        quick: low effort, no verdict.
        timeout_seconds: for the compile.

    Raises:
        MeshError: the step was written for another mesh, or the mesh does not suit the topology.
        CompileError: the compiler gave no program.
        ConfigError, MissingExtraError: as `lower_step`.
    """
    step = lower_step(jitted, *abstract_args, topology=topology)
    return compile_lowered_step(
        step, mesh=mesh, topology=topology, quick=quick, timeout_seconds=timeout_seconds
    )


def compile_lowered_step(
    step: LoweredStep,
    *,
    mesh: Mesh | AbstractMesh | MeshSpec,
    topology: Topology,
    quick: bool = False,
    timeout_seconds: float = 900.0,
) -> CompiledProgram:
    """The second half of `compile_step`, for a caller that looked the fingerprint up between."""
    spec = mesh if isinstance(mesh, MeshSpec) else MeshSpec.of(mesh)
    _check(step, spec)
    done = run_child(
        f"{__name__}:compile_in_child",
        (step, spec, quick),
        topology=topology,
        timeout_seconds=timeout_seconds,
    )
    return done.value.saying(done.chatter)


def _check(step: LoweredStep, spec: MeshSpec) -> None:
    """Refuse a mesh on which the lowered program would mean something else."""
    if step.devices != spec.device_count:
        one = "; none of its arguments has a sharding" if step.devices == 1 else ""
        raise MeshError(
            f"cannot compile the step on the mesh `{spec}`",
            why=f"it was lowered for {step.devices} device(s), the mesh has {spec.device_count}"
            f"{one}",
            fix="give the arguments (or jit's in_shardings) NamedShardings on a mesh of these axes",
        )
    large = {tuple(axis for axis in mesh if axis[1] > 1) for mesh in step.meshes}
    if large and tuple(axis for axis in spec.axes if axis[1] > 1) not in large:
        written = " and ".join(",".join(f"{n}={size}" for n, size in mesh) for mesh in step.meshes)
        raise MeshError(
            f"cannot compile the step on the mesh `{spec}`",
            why=f"its shardings are on the mesh {written}",
            fix="pass that mesh, or write the step's shardings on this one",
        )


def compile_in_child(payload: tuple[LoweredStep, MeshSpec, bool], devices: list) -> CompiledProgram:
    """The child's half: compile a travelled program for a mesh over ``devices``.

    Args:
        payload: program, mesh, whether at low effort.
        devices: of the topology.

    Raises:
        MeshError: the mesh cannot be laid on the devices.
        CompileError: the compiler refuses.
    """
    from jax.interpreters import mlir
    from jaxlib import xla_client
    from jaxlib.mlir import ir

    step, spec, quick = payload
    flat = list(spec.build(devices).devices.flat)
    client = flat[0].client
    with mlir.make_ir_context():
        module = ir.Module.parse(step.module)
        options = _options(module, flat, quick)

        def compile_it() -> Any:
            # Simulated devices are here, and compiling for them comes with loading.
            here = flat[0].platform == "cpu"
            start = client.compile_and_load if here else client.compile
            return start(module, xla_client.DeviceList(tuple(flat)), options)

        return compiled_program(
            compile_it,
            text=lambda done: "\n\n".join(part.to_string() for part in done.hlo_modules()),
            memory=lambda done: done.get_compiled_memory_stats(),
            lower_seconds=step.lower_seconds,
            quick=quick,
        )


def _options(module: Any, flat: list[Any], quick: bool) -> Any:
    """jaxlib's options as ``jax.jit`` would set them for these devices."""
    import jax
    import numpy as np
    from jaxlib import xla_client

    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = 1, len(flat)
    ids = np.array([[device.id for device in flat]])
    options.device_assignment = xla_client.DeviceAssignment.create(ids)
    build = options.executable_build_options
    build.use_spmd_partitioning = True
    build.use_shardy_partitioner = jax.config.values["jax_use_shardy_partitioner"]
    if quick:
        build.optimization_level = _LOW_EFFORT
    # An argument or result that the step says nothing of is the compiler's to place.
    main = next(op for op in module.body.operations if '"main"' in str(op.attributes["sym_name"]))
    for name, known in (
        ("allow_spmd_sharding_propagation_to_parameters", "arg_attrs"),
        ("allow_spmd_sharding_propagation_to_output", "res_attrs"),
    ):
        attributes = main.attributes.get(known, [])
        setattr(build, name, [not _placed(one) for one in attributes])
    return options


def _placed(attributes: Any) -> bool:
    return "sdy.sharding" in attributes or "mhlo.sharding" in attributes
