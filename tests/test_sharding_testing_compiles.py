"""One compilation for all batches: what makes a step compile again is named, and only that."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from meshwright.sharding.errors import ConfigError
from meshwright.testing import assert_no_recompile
from meshwright.train.model_plan import plan

pytestmark = pytest.mark.usefixtures("devices")

HEAD = "the step compiled again at batch 1; only batch 0 may compile\n"


def rows(count: int = 8, dtype: str = "float32") -> np.ndarray:
    return np.ones((count, 4), dtype)


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    return str(error.value)


def test_one_compilation() -> None:
    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, batch: Any) -> Any:
        return {"w": state["w"] - batch.mean(0)}, {"loss": batch.sum()}

    batches = [rows() * n for n in range(3)]
    assert_no_recompile(step, batches, state={"w": jnp.zeros(4)})
    assert_no_recompile(jax.jit(lambda batch: batch * 2), batches)
    # Python numbers are one type, whatever they are.
    assert_no_recompile(jax.jit(lambda batch: batch * 2), [1, 2, 3])


def test_states_in_every_form() -> None:
    def pair(state: Any, batch: Any) -> Any:
        return state[0] + batch.sum(), state[1] + 1

    state = (jnp.zeros(()), jnp.zeros((), jnp.int32))
    assert_no_recompile(jax.jit(pair), [rows()] * 3, state=state)
    assert_no_recompile(
        jax.jit(lambda state, batch: (pair(state, batch), 1)), [rows()] * 3, state=state
    )
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def in_place(state: Any, batch: Any) -> Any:
        model, optimizer = state
        loss, grads = nnx.value_and_grad(lambda model: model(batch).mean())(model)
        optimizer.update(model, grads)
        return loss

    before = model.kernel[...]
    assert_no_recompile(in_place, [rows()] * 2, state=(model, optimizer))
    assert not np.array_equal(before, model.kernel[...])


def test_the_last_batch_is_smaller() -> None:
    step = jax.jit(lambda batch: batch["x"].sum() + batch["n"])
    full, last = {"x": rows(8), "n": np.int32(1)}, {"x": rows(6), "n": np.int32(1)}
    with pytest.raises(AssertionError) as error:
        assert_no_recompile(step, [full, full, full, last])
    assert message(error) == (
        "the step compiled again at batch 3; only batch 0 may compile\n"
        "argument  what   batch 2  batch 3\n"
        "batch/x   shape  8×4      6×4"
    )


def test_a_batch_that_is_seen_again_is_no_compilation() -> None:
    step = jax.jit(lambda batch: batch.sum())
    step(rows(6))
    assert_no_recompile(step, [rows(8), rows(6), rows(8)])


@pytest.mark.parametrize(
    ("first", "second", "table"),
    [
        (
            rows(),
            rows(dtype="int32"),
            "argument  what   batch 0  batch 1\nbatch     dtype  float32  int32",
        ),
        (
            np.float32(1),
            1.0,
            "argument  what       batch 0      batch 1\n"
            "batch     dtype      float32      Python float\n"
            "batch     weak type  no           yes\n"
            "batch     sharding   on the host  none",
        ),
        (
            {"x": rows()},
            {"x": rows(), "mask": rows()},
            "argument    what       batch 0  batch 1\nbatch/mask  structure  absent   there",
        ),
    ],
    ids=["dtype", "weak type", "structure"],
)
def test_what_differs(first: Any, second: Any, table: str) -> None:
    step = jax.jit(lambda batch: jax.tree.map(lambda x: x * 3, batch))
    with pytest.raises(AssertionError) as error:
        assert_no_recompile(step, [first, second])
    assert message(error) == HEAD + table


def test_a_state_that_comes_back_laid_out_otherwise(make_mesh: Any) -> None:
    """The common one: nothing says where the step's results live, and the second call pays."""
    mesh = make_mesh("data=4")

    def at(*spec: Any) -> NamedSharding:
        return NamedSharding(mesh, P(*spec))

    def step(state: Any, batch: Any) -> Any:
        return {"w": state["w"] + batch.sum(0), "n": state["n"] + 1}

    state = {"w": jax.device_put(jnp.zeros(8), at()), "n": jax.device_put(0, at())}
    batches = [jax.device_put(np.ones((4, 8), np.float32), at(None, "data"))] * 2
    with pytest.raises(AssertionError) as error:
        assert_no_recompile(jax.jit(step), batches, state=state)
    assert message(error) == (
        HEAD + "argument  what      batch 0        batch 1\n"
        "state/w   sharding  P() on data=4  P('data') on data=4"
    )


def test_static_parts_of_a_tree() -> None:
    class Batch:
        def __init__(self, x: Any, name: str) -> None:
            self.x, self.name = x, name

    jax.tree_util.register_pytree_node(
        Batch, lambda b: ((b.x,), b.name), lambda name, xs: Batch(*xs, name)
    )
    with pytest.raises(AssertionError) as error:
        assert_no_recompile(
            jax.jit(lambda batch: batch.x.sum()), [Batch(rows(), "train"), Batch(rows(), "eval")]
        )
    said = message(error)
    assert said.startswith(HEAD) and "the trees  static parts" in said
    assert "train" in said and "eval" in said


def test_a_function_made_at_each_call() -> None:
    with pytest.raises(AssertionError) as error:
        assert_no_recompile(lambda batch: jax.jit(lambda x: x * 2)(batch), [rows()] * 2)
    assert message(error) == (
        HEAD + "no argument differs from those of batch 0 in shape, dtype, sharding or structure:\n"
        "the step makes a new function at each call (jax.jit, a lambda or a partial inside of "
        "it),\nor depends on something that is not an argument"
    )


@pytest.mark.parametrize(
    ("count", "said"), [(0, "there are no batches"), (1, "there is one batch")]
)
def test_too_few_batches(count: int, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        assert_no_recompile(jax.jit(jnp.sum), [rows()] * count)
    assert message(error) == (
        "cannot tell whether the step compiles again\n"
        f"  why:   {said}, and the first call always compiles\n"
        "  fix:   pass two batches or more"
    )


def test_a_plan_compiles_once() -> None:
    made = plan(
        lambda key: {"w": jax.random.normal(key, (64, 128))},
        optimizer=optax.adam(1e-3),
        loss=lambda params, batch: jnp.mean((batch @ params["w"]) ** 2),
        batch=np.ones((16, 64), np.float32),
        mesh="data=2,fsdp=4",
    )
    batches = [np.ones((16, 64), np.float32) * n for n in range(3)]
    assert_no_recompile(made, batches)
    with pytest.raises(AssertionError) as error:
        assert_no_recompile(made, [*batches, batches[0][:8]])
    assert message(error).splitlines()[-1].split() == ["batch", "shape", "16×64", "8×64"]
