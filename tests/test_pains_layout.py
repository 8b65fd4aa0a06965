"""Pains of layout (docs/pains): what is whole, what does not divide, where things are born."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import meshwright
from meshwright.sharding.errors import DimsError, PlacementError
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.placement import Constrain
from meshwright.sharding.strategies import fold, fsdp
from meshwright.train.model_plan import Plan

pytestmark = pytest.mark.usefixtures("devices")
P = PartitionSpec
ROWS = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)


def auto(**axes: int) -> Mesh:
    count = int(np.prod(list(axes.values())))
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), devices=jax.devices()[:count], axis_types=types
    )


def planned(model: Any, loss: Any, mesh: Any = "data=2,fsdp=4", **changes: Any) -> Plan:
    given: dict[str, Any] = {"optimizer": optax.adam(1e-3), "batch": ROWS}
    return meshwright.plan(model, loss=loss, mesh=mesh, **given | changes)


# Silent replication


def test_jit_drops_a_constraint_that_does_not_divide() -> None:
    split = NamedSharding(auto(fsdp=8), P("fsdp"))
    dropped = jax.jit(lambda: jax.lax.with_sharding_constraint(jnp.ones((17, 4)), split))()
    assert dropped.sharding.spec == P()  # where this fails, jax has mended issue 26946
    constrain = Constrain(fold(fsdp()), auto(fsdp=8))
    with pytest.raises(PlacementError, match="17 is not divisible by 8"):
        jax.jit(lambda: constrain(jnp.ones((17, 4)), ("batch", None)))()


def test_a_step_refuses_it_with_the_users_line() -> None:
    mesh = auto(data=2, fsdp=4)

    def loss(params: Any, batch: Any) -> Any:
        split = NamedSharding(mesh, P(None, "fsdp"))
        hidden = jax.lax.with_sharding_constraint(batch @ params["w"], split)
        return jnp.mean(hidden**2)

    line = inspect.getsourcelines(loss)[1] + 2
    plan = planned({"w": jnp.ones((64, 6))}, loss, mesh)
    state, rows = plan.init(), plan.place(ROWS)
    text = (
        "cannot split dim 1 of an activation over axis `fsdp`\n"
        f"  where: shape 16×6, constraint {P(None, 'fsdp')}, {__file__}:{line}\n"
        "  why:   6 is not divisible by 4; jit would drop the constraint without a word\n"
        "  fix:   make the dim 8, make `fsdp` divide 6, or leave the dim out of the constraint"
    )
    for run in (plan.step, plan.eval_step, plan.gradients):
        with pytest.raises(PlacementError) as refused:
            run(state, rows)
        assert str(refused.value) == text
    with pytest.raises(PlacementError, match="jit would drop"):
        plan.lower()


class Hidden(nn.Module):
    """Constrains its hidden activation by a logical name."""

    name_of_hidden: str = "mlp"
    size: int = 128

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.size)(x)
        x = nn.with_logical_constraint(x, ("batch", self.name_of_hidden))  # type: ignore[attr-defined]
        return nn.Dense(64)(x)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Hidden(name_of_hidden="hiden"), "no rule knows the dim `hiden`"),
        (Hidden(size=7), "7 is not divisible by 2"),
        (Hidden(name_of_hidden="batch"), "over the same axis `data`"),
    ],
    ids=["unknown", "indivisible", "twice"],
)
def test_flax_constraints_that_would_do_nothing_are_refused(model: Hidden, says: str) -> None:
    def loss(variables: Any, batch: Any) -> Any:
        return jnp.mean((model.apply(variables, batch) - batch) ** 2)

    mesh = "data=2,fsdp=2,tensor=2"
    # Parameters have names of their own, so that only the activation is in question.
    dims = {"*_0/kernel": ("embed", None), "*_1/kernel": (None, "vocab"), "*": None}
    plan = planned(model, loss, mesh, dims=dims)
    with pytest.raises(PlacementError, match=says):
        plan.step(plan.init(jax.random.key(0)), plan.place(ROWS))


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(1e-3),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
        optax.adafactor(1e-3, min_dim_size_to_factor=32),
        optax.contrib.muon(1e-3),
        optax.lion(1e-3),
    ],
    ids=["adam", "chain", "adafactor", "muon", "lion"],
)
@pytest.mark.parametrize("dims", [None, {"*": ("embed", "mlp")}], ids=["by shape", "named"])
def test_moments_are_split_as_their_parameters(optimizer: Any, dims: Any) -> None:
    params = {"one": jnp.ones((256, 512)), "two": {"kernel": jnp.ones((512, 256))}}
    plan = planned(params, lambda p, b: 0.0, optimizer=optimizer, dims=dims)
    of = {decision.leaf.path: decision.spec for decision in plan.decisions}
    assert P() not in of.values()
    for moment in plan.moments:
        name = next((path for path in of if moment.leaf.path.endswith(f"/{path}")), None)
        if name and moment.leaf.shape == plan.decisions[name].leaf.shape:
            assert moment.spec == of[name], moment
        # Rows and columns of a factored moment keep the names of their dims.
        if dims and moment.leaf.shape == (256,):
            kept = ("embed",) if name == "one" else ("mlp",)
            assert moment.leaf.dims == kept, moment


# nnx state and optimizers


class Named(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        named = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
        self.named = nnx.Linear(64, 128, rngs=rngs, kernel_init=named, use_bias=False)
        self.plain = nnx.Linear(128, 64, rngs=rngs, use_bias=False)


def test_an_nnx_optimizer_is_split_as_its_model() -> None:
    placer = meshwright.Placer.on("data=2,fsdp=4")

    def build(key: Any) -> Any:
        model = Named(rngs=nnx.Rngs(key))
        return model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    _, optimizer = made = placer.init(build, jax.random.key(0))
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(nnx.state(made)) if leaf.ndim]
    assert sorted(map(str, specs)) == sorted(map(str, [P("fsdp")] * 6))
    assert jax.tree.leaves(nnx.state(optimizer))


def test_plain_nnx_leaves_moments_of_a_constrained_kernel_whole() -> None:
    split = NamedSharding(auto(fsdp=8), P("fsdp"))

    @jax.jit
    def make(key: Any) -> Any:
        model = nnx.Linear(64, 128, rngs=nnx.Rngs(key), use_bias=False)
        optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
        model.kernel[...] = jax.lax.with_sharding_constraint(model.kernel[...], split)
        return nnx.state((model, optimizer))

    leaves = [leaf for leaf in jax.tree.leaves(make(jax.random.key(0))) if leaf.ndim]
    assert [leaf.sharding.spec for leaf in leaves] == [P("fsdp"), P(), P()]


def test_a_train_state_is_split_as_its_params() -> None:
    net = nn.Dense(128, use_bias=False)

    def create(key: Any) -> TrainState:
        params = net.init(key, jnp.ones((1, 64)))["params"]
        return TrainState.create(apply_fn=net.apply, params=params, tx=optax.adam(1e-3))

    state = meshwright.Placer.on("fsdp=8").init(create, jax.random.key(0))
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert specs == [P(None, "fsdp")] * 3


def test_names_that_a_transform_left_short_are_refused() -> None:
    def stacked(key: Any) -> Any:
        named = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "embed"))
        keys = jax.random.split(key, 3)
        return nnx.vmap(lambda k: nnx.Linear(64, 128, rngs=nnx.Rngs(k), kernel_init=named))(keys)

    with pytest.raises(DimsError, match="2 names for 3 dimensions"):
        meshwright.Placer.on("fsdp=8").init(stacked, jax.random.key(0))


# Indivisible


def test_plain_jax_says_the_size_and_not_what_would_do() -> None:
    with pytest.raises(ValueError, match="12") as refused:
        jax.device_put(np.ones((12, 4)), NamedSharding(auto(data=8), P("data")))
    assert "16" not in str(refused.value)


def test_an_indivisible_batch_says_what_would_do() -> None:
    text = (
        "cannot split dim 0 of `activations (batch, None)` over axis `data`\n"
        "  where: shape 12×64, dims (batch, None), rule `activations.batch → data` of data(), "
        "mesh data=8\n"
        "  why:   batch is 12 and the mesh asks for 8 parts: 12 is not divisible by 8\n"
        "  fix:   make `data` one of 1, 2, 3, 4, 6, 12, make batch 16 (the next multiple of 8), "
        "or keep it whole: `batch=none`"
    )
    twelve, model = np.ones((12, 64), np.float32), {"w": jnp.ones((64, 64))}
    for make in (
        lambda: planned(model, lambda p, b: 0.0, "data=8", batch=twelve),
        lambda: planned(model, lambda p, b: 0.0, "data=8", batch=np.ones((24, 64)), microbatches=2),
        lambda: meshwright.Placer.on("data=8").place(twelve),
    ):
        with pytest.raises(PlacementError) as refused:
            make()
        assert str(refused.value) == text


# Restore on another mesh


def test_plain_orbax_wants_the_devices_it_was_saved_on(tmp_path: Path) -> None:
    saved = jax.device_put(jnp.arange(16.0), NamedSharding(auto(fsdp=8), P("fsdp")))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"w": saved})
    code = (
        "import jax, orbax.checkpoint as ocp\n"
        "jax.config.update('jax_num_cpu_devices', 2)\n"
        f"ocp.StandardCheckpointer().restore({str(tmp_path / 'state')!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode and "different topology" in done.stderr


class Statistics(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.norm = nnx.BatchNorm(128, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(128, 64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.dropout(self.norm(self.up(x))))


def statistics_loss(net: Statistics, batch: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    mask = net.dropout(jnp.ones((16, 64)))
    return jnp.mean((net(batch) - batch) ** 2), {"mask": mask}


DIMS = {"up/kernel": ("embed", "mlp"), "down/kernel": ("mlp", "embed"), "*": None}


def numbers(state: Any) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(meshwright.sharding.fetch(state))]


def test_a_state_comes_back_bitwise_on_any_mesh_and_goes_on(tmp_path: Path) -> None:
    plan = planned(Statistics, statistics_loss, dims=DIMS)
    rows = plan.place(ROWS)
    state, first = plan.step(plan.init(jax.random.key(0)), rows)
    first = np.array(first["mask"])
    plan.save(tmp_path, state)
    saved = numbers(state)
    _, straight = plan.step(state, rows)
    for mesh, count in (("fsdp=2", 2), ("tensor=4", 4), ("data=1", 1), ("data=8", 8)):
        built = MeshSpec.parse(mesh).build(jax.devices()[:count])
        other = planned(Statistics, statistics_loss, built, dims=DIMS)
        restored = other.restore(tmp_path)
        for before, after in zip(saved, numbers(restored), strict=True):
            np.testing.assert_array_equal(before, after)
        _, resumed = other.step(restored, other.place(ROWS))
        np.testing.assert_array_equal(resumed["mask"], straight["mask"])
        np.testing.assert_allclose(resumed["loss"], straight["loss"], rtol=1e-5)
    assert not np.array_equal(straight["mask"], first)


# Out of memory at init


def test_nothing_is_whole_on_a_device_at_init() -> None:
    def make(key: Any) -> Any:
        one, two = jax.random.split(key)
        return {
            "one": jax.random.normal(one, (512, 1024)),
            "two": jax.random.normal(two, (1024, 512)),
        }

    whole = 3 * 2 * 512 * 1024 * 4
    plan = planned(make, lambda p, b: jnp.mean(b[:, :1] * p["one"][:1, :1]), "fsdp=8")
    state = plan.init(jax.random.key(0))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert whole / 8 <= held < whole / 8 + 1024
    for shardings, at_most in ((plan.shardings, whole / 3), (None, np.inf)):
        program = jax.jit(plan._build, out_shardings=shardings).lower(jax.random.key(0)).compile()
        memory = program.memory_analysis()
        assert memory is not None
        needed = memory.output_size_in_bytes + memory.temp_size_in_bytes
        assert needed < at_most if shardings else needed > whole


def test_plain_jit_makes_the_moments_of_split_parameters_whole() -> None:
    split = NamedSharding(auto(fsdp=8), P("fsdp"))
    params = {"w": jax.device_put(jnp.ones((64, 64)), split)}
    moments: Any = jax.jit(optax.adam(1e-3).init)(params)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(moments))
