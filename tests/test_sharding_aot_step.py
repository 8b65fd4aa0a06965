"""A user's step, lowered here and compiled in a child: equal to what jax compiles, or refused.

`job_both` runs in the child, which imports this file: its top must stay cheap.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from meshwright.sharding.aot import run_child
from meshwright.sharding.aot_program import CompiledProgram, OutOfMemory
from meshwright.sharding.aot_step import (
    LoweredStep,
    compile_step,
    lower_step,
    step_fingerprint,
)
from meshwright.sharding.aot_wheels import versions, wheels
from meshwright.sharding.errors import ConfigError, MeshError
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.topology import Topology

CPU8 = Topology.parse("cpu:8")


def sharded_step(mesh: Any, *, callback: bool = False) -> tuple[Any, list[Any]]:
    """A jitted step with a donated parameter, on two mesh axes, and its arguments."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    def placed(*spec: str | None) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*spec))

    def step(w: Any, x: Any) -> Any:
        if callback:
            jax.debug.print("{}", x.sum())
        loss, grad = jax.value_and_grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w)
        return w - 0.1 * grad, loss

    w = jax.ShapeDtypeStruct((256, 512), jnp.float32, sharding=placed(None, "tensor"))
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=placed("data"))
    return jax.jit(step, donate_argnums=0, out_shardings=(placed(None, "tensor"), None)), [w, x]


SPEC = MeshSpec.parse("data=2,tensor=4")


def job_both(payload: LoweredStep, devices: list[Any]) -> tuple[CompiledProgram, CompiledProgram]:
    """The step that was lowered in the parent, and the same as a program of the child's own."""
    from meshwright.sharding.aot_program import compile_lowered
    from meshwright.sharding.aot_step import compile_in_child

    jitted, arguments = sharded_step(SPEC.build(devices))
    own = compile_lowered(jitted.lower(*arguments))
    return compile_in_child((payload, SPEC, False), devices), own


def comparable(text: str) -> str:
    """A program less its table of source frames, which says who called, and less the backend's
    settings, whose order varies on CPU."""
    body = text.partition("\n%")[2]
    return re.sub(r" ?stack_frame_id=\d+|, backend_config=.*", "", body)


def check_step(topology: Topology) -> CompiledProgram:
    """Compile the step that was lowered here, and the child's own; they must be the same."""
    jitted, arguments = sharded_step(SPEC.abstract())
    step = lower_step(jitted, *arguments, topology=topology)
    done = run_child(f"{__name__}:job_both", step, topology=topology, timeout_seconds=120)
    program, oracle = done.value
    assert program.text is not None and oracle.text is not None
    assert comparable(program.text) == comparable(oracle.text)
    assert program.peak_bytes == oracle.peak_bytes
    assert program.temp_bytes == oracle.temp_bytes
    assert program.alias_bytes == 256 * 512 * 4 // 4  # the donated parameter, a fourth a device
    assert program.argument_bytes == oracle.argument_bytes
    assert "test_sharding_aot_step.py" in program.text
    assert program.compile_seconds > 0 and program.lower_seconds > 0
    assert program.versions["jax"] == versions()["jax"]
    return program


def test_a_step_compiles_in_the_child_as_jax_would() -> None:
    program = check_step(CPU8)
    assert program.text is not None and "all-reduce" in program.text
    jitted, arguments = sharded_step(SPEC.abstract())
    again = compile_step(jitted, *arguments, mesh=SPEC.abstract(), topology=CPU8)
    assert again.text is not None and comparable(again.text) == comparable(program.text)


def test_meshes_and_fingerprints_do_not_depend_on_devices(devices: list[Any]) -> None:
    tpu = Topology.parse("v5e:2x4")
    prints = []
    for mesh, rows in [(SPEC.abstract(), 64), (SPEC.build(devices), 64), (SPEC.abstract(), 128)]:
        jitted, (w, x) = sharded_step(mesh)
        # On one line: who called is part of a program's source locations.
        prints.append(step_fingerprint(jitted, w, x.update(shape=(rows, 256)), topology=tpu))
    assert prints[0] == prints[1] != prints[2]
    jitted, arguments = sharded_step(SPEC.abstract())
    step = lower_step(jitted, *arguments, topology=tpu)
    assert step.meshes == ((("data", 2), ("tensor", 4)),)
    assert step.devices == 8


def test_a_step_for_another_mesh_is_refused() -> None:
    jitted, arguments = sharded_step(SPEC.abstract())
    with pytest.raises(MeshError, match="on the mesh data=2,tensor=4"):
        compile_step(jitted, *arguments, mesh=MeshSpec.parse("data=4,tensor=2"), topology=CPU8)
    with pytest.raises(MeshError, match=r"lowered for 8 device\(s\), the mesh has 4"):
        compile_step(jitted, *arguments, mesh=MeshSpec.parse("data=4"), topology=CPU8)
    plain = [argument.update(sharding=None) for argument in arguments]
    import jax

    with pytest.raises(MeshError, match="none of its arguments has a sharding"):
        compile_step(jax.jit(lambda w, x: x @ w), *plain, mesh=SPEC, topology=CPU8)


def test_what_cannot_be_lowered_says_why() -> None:
    tpu = Topology.parse("v5e:2x4")
    with pytest.raises(ConfigError, match="not what jax.jit returns"):
        lower_step(lambda x: x, 1.0, topology=tpu)
    jitted, arguments = sharded_step(SPEC.abstract(), callback=True)
    with pytest.raises(ConfigError, match="jax.debug.print"):
        lower_step(jitted, *arguments, topology=tpu)


@pytest.mark.skipif(wheels("tpu").installed is None, reason="the libtpu wheel is not installed")
def test_tpu_compiles_and_refuses() -> None:
    program = check_step(Topology.parse("v5e:2x4"))
    assert program.text is not None and "is_scheduled=true" in program.text
    assert program.out_of_memory is None
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = MeshSpec.parse("data=4")
    placed = NamedSharding(mesh.abstract(), PartitionSpec())
    big = jax.ShapeDtypeStruct((2**17, 2**16), jnp.bfloat16, sharding=placed)
    refused = compile_step(
        jax.jit(lambda x: x.sum()), big, mesh=mesh, topology=Topology.parse("v5e:2x2")
    )
    assert refused.text is None
    assert refused.out_of_memory == OutOfMemory(16 * 2**30, int(15.75 * 2**30))


@pytest.mark.skipif(wheels("gpu").installed is None, reason="jax's CUDA plugin is not installed")
def test_gpu_compiles() -> None:
    program = check_step(Topology.parse("h100:2x4"))
    assert program.text is not None and "all-reduce" in program.text
