"""Pains of the step (docs/pains): compilers, compilations, collectives, random numbers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import meshwright
from meshwright.sharding.errors import ConfigError, MissingExtraError
from meshwright.sharding.hlo_source import located
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.planned import PlanReport
from meshwright.train.model_plan import Plan

pytestmark = pytest.mark.usefixtures("devices")
P = PartitionSpec
ROWS = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
MESHES = (
    "data=8",
    "fsdp=8",
    "tensor=8",
    "data=2,fsdp=4",
    "data=4,tensor=2",
    "fsdp=2,tensor=4",
    "data=2,fsdp=2,tensor=2",
)


def auto(**axes: int) -> Mesh:
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)


def planned(model: Any, loss: Any, mesh: Any = "data=2,fsdp=4", **changes: Any) -> Plan:
    given: dict[str, Any] = {"optimizer": optax.adam(1e-3), "batch": ROWS}
    return meshwright.plan(model, loss=loss, mesh=mesh, **given | changes)


# Involuntary full rematerialization


def report_of_rematerialized(topology: str | None) -> tuple[PlanReport, int]:
    mesh = auto(x=4, y=2)
    rows, blocks = (NamedSharding(mesh, spec) for spec in (P(None, ("x", "y")), P("y", None, "x")))

    def add(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        total = a + b
        return jax.lax.with_sharding_constraint(total, rows) + c

    step = jax.jit(add, in_shardings=(blocks, blocks, rows), out_shardings=rows)
    array = jax.ShapeDtypeStruct((16, 16, 16), jnp.float32)
    try:
        report = meshwright.analyze(step, array, array, array, mesh=mesh, topology=topology)
    except MissingExtraError as missing:
        pytest.skip(str(missing))
    return report, inspect.getsourcelines(add)[1] + 1


@pytest.mark.parametrize("topology", [None, "h100:1x8"], ids=["simulated", "gpu"])
def test_rematerialization_is_told_with_the_users_line(topology: str | None) -> None:
    report, line = report_of_rematerialized(topology)
    (warning,) = [w for w in report.warnings if w.code == "involuntary-rematerialization"]
    assert warning.source == f"{__file__}:{line}"
    assert "could not reshard an array from" in warning.what  # into words of jax's release
    assert warning.what.endswith("and makes it whole on each device")


def test_the_tpu_compiler_does_not_tell_but_the_gather_has_its_line() -> None:
    report, _ = report_of_rematerialized("v5e:2x4")
    assert not report.warnings  # where this fails, libtpu prints it now: say so in the page
    gathered = [found for found in report.collectives if found.kind == "all-gather"]
    assert gathered and all(found.source.startswith(__file__) for found in gathered)


def test_frames_of_other_programs_stay_as_they_are() -> None:
    said = 'metadata={op_name="jit(f)/add" stack_frame_id=4}'
    assert located(said, None) == located(said, "HloModule f\n\nENTRY %f () -> f32[] {}\n") == said


# Explicit axes and meshes in force


class Net(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(128, 64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.dropout(nnx.relu(self.up(x))))


def net_loss(net: Net, batch: jax.Array) -> jax.Array:
    return jnp.mean((net(batch) - batch) ** 2)


def trained(mesh: Any) -> float:
    plan = planned(Net, net_loss, mesh)
    state, _ = plan.step(plan.init(jax.random.key(0)), plan.place(ROWS))
    state, metrics = plan.step(state, plan.place(ROWS))
    plan.eval_step(state, plan.place(ROWS))
    plan.gradients(state, plan.place(ROWS))
    plan.lower()
    return float(metrics["loss"])


def explicit(**axes: int) -> Mesh:
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes))
    assert set(mesh.axis_types) == {AxisType.Explicit}  # jax's default; see the page
    return mesh


def test_plain_jax_refuses_a_matmul_on_the_default_mesh() -> None:
    mesh = explicit(data=2, fsdp=4)
    rows = jax.device_put(jnp.ones((16, 64)), NamedSharding(mesh, P(("data", "fsdp"))))
    kernel = jax.device_put(jnp.ones((64, 128)), NamedSharding(mesh, P(None, "fsdp")))
    with pytest.raises(Exception, match="illegally sharded result"):
        jax.jit(jnp.matmul)(rows, kernel)


@pytest.mark.parametrize("said", ["nothing", "auto", "explicit", "another"])
@pytest.mark.parametrize("given", ["written", "auto", "explicit"])
def test_what_kind_of_mesh_and_which_is_in_force_does_not_matter(given: str, said: str) -> None:
    mesh = {"written": "data=2,fsdp=4", "auto": auto(data=2, fsdp=4)}.get(
        given, explicit(data=2, fsdp=4)
    )
    context = {
        "nothing": contextlib.nullcontext(),
        "auto": jax.set_mesh(auto(data=2, fsdp=4)) if said == "auto" else None,
        "explicit": jax.set_mesh(explicit(data=2, fsdp=4)) if said == "explicit" else None,
        "another": jax.set_mesh(explicit(x=8)) if said == "another" else None,
    }[said]
    assert context is not None
    with context:
        found = trained(mesh)
        placer = meshwright.Placer.on(mesh)
        assert set(placer.mesh.axis_types) == {AxisType.Auto}
        model = placer.init(lambda key: Net(rngs=nnx.Rngs(key)), jax.random.key(0))
        assert model.up.kernel[...].sharding.spec == P(None, "fsdp")
    assert found == trained("data=2,fsdp=4")


# Collectives nobody asked for


def test_a_collective_is_told_with_its_line() -> None:
    rows = NamedSharding(auto(data=8), P("data"))

    def clipped(x: jax.Array) -> jax.Array:
        ordered = jnp.sort(x, axis=0)
        return jnp.maximum(x - ordered[:1], 0)

    step = jax.jit(clipped, in_shardings=rows, out_shardings=rows)
    array = jax.ShapeDtypeStruct((64, 4), jnp.float32)
    found = meshwright.analyze(step, array, mesh=rows.mesh).collectives[0]
    line = inspect.getsourcelines(clipped)[1] + 1
    assert (found.kind, found.axes, found.count) == ("all-gather", ("data",), 1)
    assert found.source == f"{__file__}:{line}"


def widened(up: jax.Array, down: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.repeat((x @ up) @ down, 4, -1) @ down


def test_xla_exchanges_rows_of_a_plain_program_and_a_plan_does_not() -> None:
    mesh = auto(data=2, fsdp=2, tensor=2)
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s).astype(np.float32) for s in ((16, 64), (64, 16), (16, 16))]
    specs = (P("fsdp", "tensor"), P("tensor", "fsdp"), P(("data", "fsdp")))
    put = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)]
    one, many = np.array(jax.jit(widened)(*arrays)), np.array(jax.jit(widened)(*put))
    # Where this fails, XLA has mended it: say so in docs/pains/wrong-on-one-mesh.md.
    assert np.abs(one - many).max() > 0.5 * np.abs(one).max()

    def loss(params: Any, batch: Any) -> Any:
        found = widened(params["up"], params["down"], batch)
        return jnp.mean(found**2), {"found": found}

    params = {"up": jnp.asarray(arrays[0]), "down": jnp.asarray(arrays[1])}
    dims = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}
    plan = planned(params, loss, mesh, batch=arrays[2], dims=dims)
    metrics = plan.eval_step(plan.init(), plan.place(arrays[2]))
    np.testing.assert_allclose(metrics["found"], one, atol=1e-5 * np.abs(one).max())


# Compilations


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    found: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


NET = nn.Dense(64)


def tree_loss(params: Any, batch: Any) -> Any:
    return jnp.mean((batch @ params["w"]) ** 2 * params.get("scale", 1.0))


def linen_loss(variables: Any, batch: Any) -> Any:
    found: Any = NET.apply(variables, batch)
    return jnp.mean(found**2)


def counted_loss(params: Any, batch: Any) -> Any:
    return tree_loss(params, batch), {}, {"seen": params["seen"] + 1}


WEIGHTS = {"w": np.ones((64, 64), np.float32)}
STEPS = {
    "nnx with streams": lambda: planned(Net, net_loss),
    "linen": lambda: planned(NET, linen_loss),
    "python scalars": lambda: planned({**WEIGHTS, "scale": 2.0, "name": "w"}, tree_loss),
    "weak type": lambda: planned({**WEIGHTS, "scale": jnp.asarray(2.0)}, tree_loss),
    "weak type, made": lambda: planned(
        lambda key: {"w": jax.random.normal(key, (64, 64)), "scale": jnp.asarray(2.0)}, tree_loss
    ),
    "counter": lambda: planned({**WEIGHTS, "seen": jnp.asarray(0)}, counted_loss),
    "weak optimizer": lambda: planned(
        WEIGHTS, tree_loss, optimizer=optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
    ),
    "microbatches": lambda: planned(WEIGHTS, tree_loss, microbatches=2),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_compiled_once(name: str) -> None:
    plan = STEPS[name]()
    state = plan.init(jax.random.key(0))
    rows = [plan.place(ROWS) for _ in range(4)]
    with compilations() as found:
        for batch in rows:
            state, _ = plan.step(state, batch)
    assert len(found) == 1


def create(key: Any) -> TrainState:
    params = NET.init(key, jnp.asarray(ROWS))["params"]
    return TrainState.create(apply_fn=NET.apply, params=params, tx=optax.adam(1e-3))


def update(state: TrainState, batch: Any) -> TrainState:
    def loss(params: Any) -> Any:
        return jnp.mean(state.apply_fn({"params": params}, batch) ** 2)

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def test_a_step_of_placed_params_and_other_moments_is_compiled_twice_in_plain_jax() -> None:
    step, state = jax.jit(update), create(jax.random.key(0))
    split = NamedSharding(auto(fsdp=8), P("fsdp"))
    state = state.replace(params=jax.device_put(state.params, split))
    state = step(state, ROWS)
    with compilations() as found:
        step(step(state, ROWS), ROWS)
    assert len(found) == 1

    placer = meshwright.Placer.on("data=2,fsdp=4")
    held = jax.jit(lambda state, batch: placer.hold(update(state, batch)))
    state, rows = placer.init(create, jax.random.key(0)), placer.place(ROWS)
    with compilations() as found:
        for _ in range(3):
            state = held(state, rows)
    assert len(found) == 1


@pytest.mark.parametrize(("devices", "again"), [(1, 0), (8, 1)])
def test_a_python_counter_is_compiled_twice_on_a_mesh_in_plain_jax(
    devices: int, again: int
) -> None:
    state = create(jax.random.key(0))
    assert state.step == 0 and isinstance(state.step, int)
    if devices > 1:
        whole = NamedSharding(auto(data=devices), P())
        params, opt_state = jax.device_put((state.params, state.opt_state), whole)
        state = state.replace(params=params, opt_state=opt_state)
    step = jax.jit(lambda state, batch: update(state, batch))
    state = step(state, ROWS)
    with compilations() as found:
        step(step(state, ROWS), ROWS)
    assert len(found) == again


def test_a_weak_type_is_compiled_twice_in_plain_jax() -> None:
    step = jax.jit(lambda rate: rate * jnp.float32(0.5))
    rate = step(1.0)
    with compilations() as found:
        step(step(rate))
    assert len(found) == 1


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_state_that_would_change_its_type_is_refused(microbatches: int) -> None:
    def loss(params: Any, batch: Any) -> Any:
        return tree_loss(params, batch), {}, {"seen": params["seen"] + 1.0}

    model = {**WEIGHTS, "seen": jnp.zeros((), jnp.int32)}
    plan = planned(model, loss, microbatches=microbatches)
    with pytest.raises(ConfigError) as refused:
        plan.step(plan.init(), plan.place(ROWS))
    assert str(refused.value) == (
        "cannot keep `seen` from step to step\n"
        "  where: what the loss changes\n"
        "  why:   it was int32 and a step makes it float32: the next would be another program\n"
        "  fix:   give it the type it has after a step, or .astype(int32) there"
    )


def test_another_precision_of_a_state_is_taken_back() -> None:
    def loss(params: Any, batch: Any) -> Any:
        return tree_loss(params, batch), {}, {"mean": params["mean"] + jnp.float32(0.5)}

    model = {**WEIGHTS, "mean": jnp.zeros((), jnp.bfloat16)}
    plan = planned(model, loss, trainable="w")
    state, _ = plan.step(plan.init(), plan.place(ROWS))
    assert state.rest["mean"].dtype == jnp.bfloat16 and state.rest["mean"] == 0.5


# Accumulation


def mlp_loss(params: Any, batch: Any) -> Any:
    return jnp.mean((jax.nn.relu(batch @ params["up"]) @ params["down"] - batch) ** 2)


def mlp_plan(mesh: str, **changes: Any) -> Plan:
    params = {"up": jnp.ones((64, 256)), "down": jnp.ones((256, 64))}
    rows = np.ones((64, 64), np.float32)
    return planned(params, mlp_loss, mesh, batch=rows, microbatches=4, **changes)


@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=4"])
def test_gradients_cross_data_once_a_step_where_rows_are_independent(mesh: str) -> None:
    def over_data(plan: Plan) -> set[bool]:
        return {c.loop_depth > 0 for c in plan.report().collectives if "data" in c.axes}

    assert True in over_data(mlp_plan(mesh))
    assert over_data(mlp_plan(mesh, independent_rows=True)) == {False}


@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=4"])
def test_a_report_says_that_each_microbatch_communicates(mesh: str) -> None:
    (warning,) = mlp_plan(mesh).report().warnings
    assert warning.code == "reduced-every-microbatch"
    assert warning.what == "gradients cross `data` in every microbatch"
    assert warning.fix.startswith("independent_rows=True")
    assert "up" in warning.leaf and warning.source.startswith(__file__)
    assert not mlp_plan(mesh, independent_rows=True).report().warnings


def test_what_no_setting_would_save_is_not_warned_of() -> None:
    assert not mlp_plan("fsdp=8").report().warnings
    assert not planned({"w": jnp.ones((64, 64))}, tree_loss, "data=8").report().warnings


# Random numbers


def masked_loss(net: Net, batch: jax.Array, key: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    noise = jax.random.normal(key, batch.shape)
    mask = net.dropout(jnp.ones((16, 128)))
    return jnp.mean(net(batch + noise) ** 2), {"noise": noise, "mask": mask}


def drawn(mesh: Any) -> list[np.ndarray]:
    dims = {"up/kernel": ("embed", "mlp"), "down/kernel": ("mlp", "embed"), "*": None}
    plan = planned(Net, masked_loss, mesh, dims=dims)
    state = plan.init(jax.random.key(0))
    found = [np.array(leaf) for leaf in jax.tree.leaves(state.params)]
    for _ in range(2):
        state, metrics = plan.step(state, plan.place(ROWS))
        found += [np.array(metrics["mask"]), np.array(metrics["noise"])]
    return found


def test_values_and_masks_are_the_same_on_every_mesh() -> None:
    one = drawn(MeshSpec.parse("data=1").build(jax.devices()[:1]))
    assert not np.array_equal(one[-2], one[-4])  # each step has its own
    for mesh in MESHES:
        for ours, theirs in zip(drawn(mesh), one, strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=mesh)


def test_old_random_bits_are_refused_on_several_devices() -> None:
    text = (
        "cannot draw random numbers on several devices\n"
        "  where: mesh data=2,fsdp=4, jax_threefry_partitionable is False\n"
        "  why:   each device would draw every array whole, and users have had values that differ "
        "by mesh (jax issue 21232)\n"
        '  fix:   jax.config.update("jax_threefry_partitionable", True), which is the default'
    )
    plan, placer = planned(Net, net_loss), meshwright.Placer.on("data=2,fsdp=4")
    with jax.threefry_partitionable(False):
        for make in (
            lambda: plan.init(jax.random.key(0)),
            lambda: placer.init(lambda key: Net(rngs=nnx.Rngs(key)), jax.random.key(0)),
        ):
            with pytest.raises(ConfigError) as refused:
                make()
            assert str(refused.value) == text
        plan.one_device().init(jax.random.key(0))
