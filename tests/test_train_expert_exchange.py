"""Experts over a mesh axis against experts on one device: numbers, what is kept, bytes sent."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from meshwright.models.experts import apply_experts
from meshwright.sharding.bounds import expert_layer_bytes
from meshwright.sharding.collectives import collectives_of
from meshwright.sharding.errors import PlacementError
from meshwright.sharding.hlo import parse_module
from meshwright.sharding.mesh import MeshSpec
from meshwright.train.expert_exchange import (
    EXPERTS,
    DroplessWay,
    ExpertExchange,
    check_experts,
    dropless_way,
)

LIMIT = 1e-5
F32 = 4


@dataclass(frozen=True)
class Case:
    """One exchange, and how its inputs are made.

    Attributes:
        parts, capacity, way: as `ExpertExchange`.
        tensor: devices that split M.
        gated: whether there is a ``w_gate``.
        count, choices: E and k.
        rows, length, embed, width: B, T, D and the M of all ``tensor`` devices.
        skewed: whether the first experts are chosen most, one device's alone by some rows.
    """

    parts: int
    capacity: int | None = None
    way: DroplessWay = "gather"
    tensor: int = 1
    gated: bool = True
    count: int = 8
    choices: int = 2
    rows: int = 2
    length: int = 6
    embed: int = 8
    width: int = 4
    skewed: bool = True

    def __str__(self) -> str:
        form = self.way if self.capacity is None else f"capacity{self.capacity}"
        flags = ["tensor"] * (self.tensor > 1) + ["gated"] * self.gated
        return "-".join([form, str(self.parts), *flags, f"{self.choices}of{self.count}"])

    @property
    def exchange(self) -> ExpertExchange:
        tensor = ("tensor",) if self.tensor > 1 else ()
        return ExpertExchange("expert", self.parts, self.capacity, tensor, self.way)

    @property
    def mesh(self) -> Mesh:
        sizes = (self.parts, self.tensor)
        used = jax.devices()[: self.parts * self.tensor]
        auto = (AxisType.Auto,) * 2
        return jax.make_mesh(sizes, ("expert", "tensor"), axis_types=auto, devices=used)

    @property
    def specs(self) -> dict[str, P]:
        """Layouts of the matrices."""
        up = P("expert", None, "tensor")
        gate = {"w_gate": up} if self.gated else {}
        return {"w_up": up, "w_down": P("expert", "tensor"), **gate}

    @property
    def kept(self) -> tuple[P, ...]:
        """Layouts of what is kept: on each device its own, M split."""
        if self.capacity is None:
            return (P("expert"),) * 3
        hidden = P("expert", None, None, "tensor")
        return (P("expert"),) * 2 + (hidden,) * (1 + self.gated)


def inputs(case: Case, dtype: Any = jnp.float32) -> tuple[Any, ...]:
    """x, ids, gates, params, and the output's gradient, of all devices."""
    random = np.random.default_rng(0)
    rows, length = case.rows * case.parts, case.length

    def normal(*shape: int) -> Array:
        return jnp.asarray(random.normal(size=shape), dtype)

    lean = 3 * np.linspace(1, 0, case.count) * case.skewed
    scores = random.gumbel(size=(rows, length, case.count)) + lean
    scores[0] += 20 * (np.arange(case.count) < case.choices)
    ids = np.argsort(-scores, axis=-1)[..., : case.choices]
    gates = random.uniform(0.1, 1, size=ids.shape)
    up, down = (case.count, case.embed, case.width), (case.count, case.width, case.embed)
    params = {"w_up": normal(*up), "w_down": normal(*down)}
    if case.gated:
        params["w_gate"] = normal(*up)
    x, y_grad = (normal(rows, length, case.embed) for _ in range(2))
    return x, jnp.asarray(ids, jnp.int32), jnp.asarray(gates, jnp.float32), params, y_grad


def halves(case: Case) -> tuple[Any, Any]:
    """`forward` and `backward` of arrays of all devices."""
    devices = P("expert")
    whole = functools.partial(jax.shard_map, mesh=case.mesh, check_vma=False)
    forward = whole(
        case.exchange.forward,
        in_specs=(devices, devices, devices, case.specs),
        out_specs=(devices, case.kept),
    )
    backward = whole(
        case.exchange.backward,
        in_specs=(devices, case.specs, case.kept, devices),
        out_specs=(devices, devices, case.specs),
    )
    return forward, backward


def exchanged(case: Case) -> Any:
    """As `apply_experts`, differentiable, over the devices of a mesh."""
    forward, backward = halves(case)

    @jax.custom_vjp
    def apply(x: Array, ids: Array, gates: Array, params: Any) -> Array:
        return forward(x, ids, gates, params)[0]

    def keep(x: Array, ids: Array, gates: Array, params: Any) -> Any:
        y, kept = forward(x, ids, gates, params)
        kept = tuple(jax.ad_checkpoint.checkpoint_name(leaf, EXPERTS) for leaf in kept)
        return y, (ids, params, kept)

    def back(saved: Any, y_grad: Array) -> Any:
        x, gates, params = backward(*saved, y_grad)
        return x, None, gates, params

    apply.defvjp(keep, back)
    return apply


def graded(apply: Any) -> Any:
    """(x, ids, gates, params, y_grad) → y, and gradients of x, gates and every matrix."""

    def run(x: Array, ids: Array, gates: Array, params: Any, y_grad: Array) -> Any:
        y, pull = jax.vjp(lambda x, gates, params: apply(x, ids, gates, params), x, gates, params)
        return y, *pull(y_grad)

    return jax.jit(run)


def difference(case: Case, dtype: Any = jnp.float32) -> float:
    """The largest error of output and gradients, each relative to its largest entry."""
    given = inputs(case, dtype)
    found = graded(exchanged(case))(*given)
    wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.int32)), given)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == dtype else x, given)
    expected = graded(functools.partial(apply_experts, capacity=case.capacity))(*wide)
    errors = []
    for one, narrow, other in zip(*map(jax.tree.leaves, (found, (given[0], given[0], given[2], given[3]), expected)), strict=True):
        assert (one.dtype, one.shape) == (narrow.dtype, narrow.shape)
        other = np.asarray(other)
        errors.append(np.abs(np.asarray(one, np.float32) - other).max() / np.abs(other).max())
    return float(max(errors))


SIZES = [1, 2, 4, 8]
CAPACITY = [
    *[Case(parts, capacity=2, gated=parts != 4) for parts in SIZES],
    Case(2, capacity=6, choices=3),
    Case(2, capacity=2, tensor=2),
    Case(4, capacity=2, tensor=2, gated=False),
]
DROPLESS = [
    *[Case(parts, gated=parts != 4) for parts in SIZES],
    Case(2, tensor=2),
    Case(4, choices=3, tensor=2, gated=False),
    *[Case(parts, way="ragged", gated=parts != 2) for parts in SIZES],
    Case(2, way="ragged", choices=5),
    Case(4, way="ragged", choices=3, tensor=2),
]


@pytest.mark.parametrize("case", CAPACITY, ids=str)
def test_buffers_drop_and_compute_what_one_device_would(case: Case) -> None:
    assert difference(case) < LIMIT


@pytest.mark.parametrize("case", DROPLESS, ids=str)
def test_nothing_is_dropped(case: Case) -> None:
    assert difference(case) < LIMIT
