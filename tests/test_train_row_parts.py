"""Rows split along their length, as experts ask for them: sums, places in queues, and what is sent.

The oracle is a queue in plain Python: a row in its order, the first tokens first. Whole steps are
held by `test_train_compositions`.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, get_args

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from meshwright.models.config import ExpertConfig
from meshwright.models.experts import apply_experts
from meshwright.models.hooks import RowParts
from meshwright.models.routing import Routing, report, route
from meshwright.sharding.expert_layout import places_of_part
from meshwright.sharding.token_layout import TokenLayout, token_order
from meshwright.train.expert_exchange import ExpertExchange
from meshwright.train.expert_rows import RowExperts
from meshwright.train.replicas import Replicas
from meshwright.train.row_parts import RowSplit, parts_of

ORDERS = get_args(TokenLayout)
EXPERTS, CHOICES, EMBED, WIDTH = 8, 2, 4, 6
LIMIT = 1e-5


def mesh_of(**sizes: int) -> Mesh:
    devices = jax.devices()[: int(np.prod([*sizes.values()]))]
    auto = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices)


def choices_of(random: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """The experts of each token, all different, the first preferred: int32 [B, T, k]."""
    scores = random.gumbel(size=(rows, length, EXPERTS)) + 2 * np.linspace(1, 0, EXPERTS)
    return np.argsort(-scores, axis=-1)[..., :CHOICES].astype(np.int32)


def queues_of(row: np.ndarray, capacity: int) -> list[list[int]]:
    """What each expert takes of one row [T, k]: the first choices of it, as token · k + choice."""
    queues: list[list[int]] = [[] for _ in range(EXPERTS)]
    for at, expert in enumerate(row.reshape(-1).tolist()):
        if len(queues[expert]) < capacity:
            queues[expert].append(at)
    return queues


@functools.cache
def slots_on(parts: int, order: TokenLayout, capacity: int) -> Any:
    """ids [B, T, k], as they are dealt → every device's places, [parts, …]."""
    split = RowSplit("context", parts, order)

    def local(ids: Array) -> Any:
        return jax.tree.map(lambda x: x[None], split.slots(ids, EXPERTS, capacity))

    spec = {"in_specs": P(None, "context"), "out_specs": P("context"), "check_vma": False}
    return jax.jit(jax.shard_map(local, mesh=mesh_of(context=parts), **spec))


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    seed=st.integers(0, 2**31),
    order=st.sampled_from(ORDERS),
    parts=st.sampled_from([2, 4]),
    capacity=st.sampled_from([1, 3, 4, 7, 16]),
)
def test_places_are_those_of_the_whole_row(
    seed: int, order: TokenLayout, parts: int, capacity: int
) -> None:
    length, rows = 16, 3
    ids = choices_of(np.random.default_rng(seed), rows, length)
    stored = token_order(order, length, parts)
    take, back = map(np.asarray, slots_on(parts, order, capacity)(ids[:, stored]))
    each = places_of_part(capacity, parts)
    assert take.shape == (parts, rows, EXPERTS * each)
    assert back.shape == (parts, rows, length, CHOICES)
    for row in range(rows):
        queues = queues_of(ids[row], capacity)
        held = take[:, row].reshape(parts, EXPERTS, each)
        for expert, queue in enumerate(queues):
            places = held[:, expert].reshape(-1)
            token, choice = np.divmod(places[: len(queue)], CHOICES)
            assert (stored[token] * CHOICES + choice).tolist() == queue
            assert (places[len(queue) :] == length * CHOICES).all()
        for device in range(parts):
            found = np.full(length * CHOICES, EXPERTS * each)
            for place, at in enumerate(take[device, row]):
                if at < length * CHOICES:
                    found[at] = place
            np.testing.assert_array_equal(back[device, row].reshape(-1), found)


def inputs(rows: int = 4, length: int = 16) -> tuple[Any, ...]:
    """x, ids, gates, matrices and a gradient of the output, in the order of the rows."""
    random = np.random.default_rng(3)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    ids = choices_of(random, rows, length)
    gates = random.uniform(0.1, 1, size=ids.shape).astype(np.float32)
    up = (EXPERTS, EMBED, WIDTH)
    params = {"w_up": normal(*up), "w_gate": normal(*up), "w_down": normal(EXPERTS, WIDTH, EMBED)}
    return normal(rows, length, EMBED), ids, gates, params, normal(rows, length, EMBED)


def differences(found: Any, wanted: Any) -> float:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(np.abs(np.asarray(a) - b).max() / np.abs(b).max()) for a, b in pairs)


@functools.cache
def on_one_device(capacity: int | None) -> Any:
    """Output, and gradients of x, gates and the matrices."""
    x, ids, gates, params, grad = inputs()
    apply = functools.partial(apply_experts, capacity=capacity)
    y, pull = jax.vjp(lambda x, gates, params: apply(x, ids, gates, params), x, gates, params)
    return jax.device_get((y, pull(jnp.asarray(grad))))


def replicas_of(mesh: Mesh, order: TokenLayout) -> Replicas:
    return Replicas(mesh, ("data",), ("context",), (), ("data", "context"), order)


def dealt(x: Any, replicas: Replicas) -> Any:
    """[B, T, …] → [replicas, b, t, …]."""
    rows, parts = (replicas.mesh.shape[axis] for axis in ("data", "context"))
    stored = token_order(replicas.order, x.shape[1], parts)
    cut = x[:, stored].reshape(rows, -1, parts, x.shape[1] // parts, *x.shape[2:])
    return jnp.moveaxis(cut, 2, 1).reshape(rows * parts, -1, *cut.shape[3:])


def undealt(x: Any, replicas: Replicas) -> np.ndarray:
    rows, parts = (replicas.mesh.shape[axis] for axis in ("data", "context"))
    cut = np.moveaxis(np.asarray(x).reshape(rows, parts, *x.shape[1:]), 1, 2)
    whole = cut.reshape(-1, parts * x.shape[2], *x.shape[3:])
    return whole[:, token_order(replicas.order, whole.shape[1], parts).argsort()]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("capacity", [3, 5, None])
def test_undealt_experts_are_those_of_one_device(capacity: int | None, order: TokenLayout) -> None:
    """Output and gradients, under the maps of a step; 3 and 5 places do not divide by 4 devices."""
    replicas = replicas_of(mesh_of(data=2, context=4), order)
    hook = RowExperts(replicas)
    x, ids, gates, params, grad = inputs()

    @jax.jit
    def run(params: Any, *rows: Array) -> Any:
        def one(x: Array, ids: Array, gates: Array, grad: Array) -> Any:
            def apply(x: Array, gates: Array, params: Any) -> Array:
                return hook(x, ids, gates, params, capacity=capacity)

            y, pull = jax.vjp(apply, x, gates, params)
            return y, pull(grad)

        return replicas.mapped(one)(*rows)

    y, (x_grad, gates_grad, grads) = run(
        params, *(dealt(v, replicas) for v in (x, ids, gates, grad))
    )
    summed = {name: np.asarray(leaf).sum(0) for name, leaf in grads.items()}
    back = [undealt(v, replicas) for v in (y, x_grad, gates_grad)]
    assert differences((back[0], (back[1], back[2], summed)), on_one_device(capacity)) < LIMIT


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("capacity", [3, None])
def test_dealt_experts_are_those_of_one_device(capacity: int | None, order: TokenLayout) -> None:
    """The same over devices that have the experts, beside those that have the length."""
    mesh = mesh_of(expert=2, context=4)
    split = RowSplit("context", 4, order) if capacity else None
    exchange = ExpertExchange("expert", 2, capacity, rows=split)
    x, ids, gates, params, grad = inputs()
    stored = token_order(order, x.shape[1], 4)

    def local(x: Array, ids: Array, gates: Array, params: Any, grad: Array) -> Any:
        y, kept = exchange.forward(x, ids, gates, params)
        said = exchange.kept_like(x, ids, params)
        assert [(leaf.shape, leaf.dtype) for leaf in kept] == [(s.shape, s.dtype) for s in said]
        x_grad, gates_grad, grads = exchange.backward(ids, params, kept, grad)
        return y, (x_grad, gates_grad, jax.tree.map(lambda g: jax.lax.psum(g, "context"), grads))

    rows, own = P("expert", "context"), P("expert")
    in_specs, out_specs = (rows, rows, rows, own, rows), (rows, (rows, rows, own))
    run = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    args = x[:, stored], ids[:, stored], gates[:, stored], params, grad[:, stored]
    y, (x_grad, gates_grad, grads) = jax.jit(run)(*args)
    back = [np.asarray(v)[:, stored.argsort()] for v in (y, x_grad, gates_grad)]
    assert differences((back[0], (back[1], back[2], grads)), on_one_device(capacity)) < LIMIT


MIXTURE = ExpertConfig(EXPERTS, CHOICES, balance_weight=0.5, z_weight=0.1, capacity_factor=1.0)
LOSSES = {
    "loss": MIXTURE,
    "bias": replace(MIXTURE, balance="bias"),
    "dropless": replace(MIXTURE, capacity_factor=None),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("settings", LOSSES.values(), ids=LOSSES)
def test_reports_are_of_whole_rows(settings: ExpertConfig, order: TokenLayout) -> None:
    """Losses on each part, with their gradients; loads and drops add up over the parts."""
    replicas = replicas_of(mesh_of(data=2, context=4), order)
    random = np.random.default_rng(5)
    logits = (2 * random.normal(size=(4, 16, EXPERTS))).astype(np.float32)
    bias = np.zeros(EXPERTS, np.float32) if settings.balance == "bias" else None
    # What a part adds to the loss depends on its own tokens: so do the gradients that it sends.
    weights = random.uniform(size=(4, 16)).astype(np.float32)

    def found(logits: Array, bias: Any, weights: Array, rows: Any) -> Any:
        def total(logits: Array, bias: Any) -> Any:
            routing: Routing = route(settings, logits, bias)
            loss, *rest = report(settings, logits, routing, bias, rows)
            return jnp.sum(loss * weights.sum(1)), (loss, *rest)

        return jax.value_and_grad(total, (0, 1) if settings.balance == "bias" else 0, has_aux=True)(
            logits, bias
        )

    def one(logits: Array, weights: Array) -> Any:
        return found(logits, bias, weights, parts_of(replicas))

    whole = jax.jit(functools.partial(found, bias=bias, rows=RowParts()))(logits, weights=weights)
    (loss, wanted), wanted_grads = jax.device_get(whole)
    run = jax.jit(replicas.mapped(one))
    (part, had), grads = jax.device_get(run(dealt(logits, replicas), dealt(weights, replicas)))
    assert part.sum() == pytest.approx(loss, rel=LIMIT)
    for mine, all_of_it in zip(had[:3], wanted[:3], strict=True):
        spread = np.broadcast_to(all_of_it.reshape(2, 1, 2), (2, 4, 2)).reshape(8, 2)
        np.testing.assert_allclose(mine, spread, rtol=LIMIT)
    np.testing.assert_array_equal(had[3].sum(0), wanted[3])
    assert had[4].sum() == wanted[4] and (wanted[4] > 0) == (settings.capacity_factor is not None)
    if settings.balance == "bias":
        np.testing.assert_allclose(grads[1].sum(0), wanted_grads[1], rtol=1e-4, atol=LIMIT)
        grads, wanted_grads = grads[0], wanted_grads[0]
    assert (
        np.abs(undealt(grads, replicas) - wanted_grads).max() < LIMIT * np.abs(wanted_grads).max()
    )
