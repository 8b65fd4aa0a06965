"""Experts over a mesh axis against experts on one device: numbers, what is kept, bytes sent."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from meshwright.models.experts import apply_experts
from meshwright.sharding.bounds import expert_layer_bytes
from meshwright.sharding.collectives import collectives_of
from meshwright.sharding.errors import PlacementError
from meshwright.sharding.expert_layout import DroplessWay, check_experts, dropless_way
from meshwright.sharding.hlo import parse_module
from meshwright.sharding.mesh import MeshSpec
from meshwright.train.expert_carriers import Ragged
from meshwright.train.expert_exchange import EXPERTS, ExpertExchange

Traffic = dict[tuple[str, ...], tuple[int, float]]
"""(phase, kind, axis) → executions and wire bytes."""
LAYERS = 3
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
        rows: of all devices.
        length, embed, width: T, D and the M of all ``tensor`` devices.
        lean: how much the first experts are preferred; at 100 no other is chosen.
        pair: whether experts are dealt to two axes.
    """

    parts: int
    capacity: int | None = None
    way: DroplessWay = "gather"
    tensor: int = 1
    gated: bool = True
    count: int = 8
    choices: int = 2
    rows: int = 8
    length: int = 6
    embed: int = 8
    width: int = 4
    lean: float = 2.0
    pair: bool = False

    def __str__(self) -> str:
        form = self.way if self.capacity is None else f"capacity{self.capacity}"
        flags = ["pair"] * self.pair + ["tensor"] * (self.tensor > 1) + ["gated"] * self.gated
        flags += [f"{self.choices}of{self.count}", *["leaning"] * (self.lean > 99)]
        return "-".join([form, str(self.parts), *flags])

    @property
    def axis(self) -> str | tuple[str, ...]:
        return ("outer", "expert") if self.pair else "expert"

    @property
    def exchange(self) -> ExpertExchange:
        tensor = ("tensor",) if self.tensor > 1 else ()
        return ExpertExchange(self.axis, self.parts, self.capacity, tensor, self.way)

    @property
    def mesh(self) -> Mesh:
        outer = 2 if self.pair else 1
        sizes = (outer, self.parts // outer, self.tensor)
        used = jax.devices()[: self.parts * self.tensor]
        auto = (AxisType.Auto,) * 3
        return jax.make_mesh(sizes, ("outer", "expert", "tensor"), axis_types=auto, devices=used)

    @property
    def specs(self) -> dict[str, P]:
        """Layouts of the matrices."""
        up = P(self.axis, None, "tensor")
        gate = {"w_gate": up} if self.gated else {}
        return {"w_up": up, "w_down": P(self.axis, "tensor"), **gate}

    @property
    def kept(self) -> tuple[P, ...]:
        """Layouts of what is kept: on each device its own, M split."""
        if self.capacity is None:
            return (P(self.axis),) * 3
        hidden = P(self.axis, None, None, "tensor")
        return (P(self.axis),) * 2 + (hidden,) * (1 + self.gated)


@functools.cache
def inputs(case: Case) -> tuple[Any, ...]:
    """x, ids, gates, params, and the output's gradient, of all devices; float32."""
    random = np.random.default_rng(0)
    shape = (case.rows, case.length)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    lean = case.lean * np.linspace(1, 0, case.count)
    scores = random.gumbel(size=(*shape, case.count)) + lean
    ids = np.argsort(-scores, axis=-1)[..., : case.choices].astype(np.int32)
    gates = random.uniform(0.1, 1, size=ids.shape).astype(np.float32)
    up, down = (case.count, case.embed, case.width), (case.count, case.width, case.embed)
    params = {"w_up": normal(*up), "w_down": normal(*down)}
    if case.gated:
        params["w_gate"] = normal(*up)
    return normal(*shape, case.embed), ids, gates, params, normal(*shape, case.embed)


def halves(case: Case) -> tuple[Any, Any]:
    """`forward` and `backward` of arrays of all devices."""
    devices = P(case.axis)
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
        kept = tuple(checkpoint_name(leaf, EXPERTS) for leaf in kept)
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


@functools.cache
def expected(case: Case) -> list[np.ndarray]:
    """Output and gradients on one device, in float32."""
    found = graded(functools.partial(apply_experts, capacity=case.capacity))(*inputs(case))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found)]


def difference(case: Case, dtype: Any = jnp.float32) -> float:
    """The largest error of output and gradients, each relative to its largest entry."""
    x, ids, gates, params, y_grad = inputs(case)
    x, params, y_grad = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (x, params, y_grad))
    found = graded(exchanged(case))(x, ids, gates, params, y_grad)
    alike = jax.tree.leaves((x, x, gates, params))
    one_device = expected(replace(case, parts=1, tensor=1, way="gather", pair=False))
    errors = []
    for one, like, other in zip(jax.tree.leaves(found), alike, one_device, strict=True):
        assert (one.dtype, one.shape) == (like.dtype, like.shape)
        errors.append(np.abs(np.asarray(one, np.float32) - other).max() / np.abs(other).max())
    return float(max(errors))


SIZES = [1, 2, 4, 8]
CAPACITY = [
    *[Case(parts, capacity=2, gated=parts != 4) for parts in SIZES],
    Case(4, capacity=2, tensor=2, pair=True),
]
DROPLESS = [
    *[Case(parts) for parts in SIZES],
    *[Case(parts, way="ragged") for parts in (2, 8)],
    *[Case(4, way=way, tensor=2, gated=False, choices=5) for way in get_args(DroplessWay)],
    *[Case(4, way=way, lean=100, pair=True) for way in get_args(DroplessWay)],
]
FORMS = [Case(4, capacity=2), Case(4), Case(4, way="ragged")]


@pytest.mark.parametrize("case", CAPACITY, ids=str)
def test_buffers_take_and_drop_what_they_would_on_one_device(case: Case) -> None:
    assert difference(case) < LIMIT


@pytest.mark.parametrize("case", DROPLESS, ids=str)
def test_nothing_is_dropped(case: Case) -> None:
    assert difference(case) < LIMIT


@pytest.mark.parametrize("case", FORMS[:2], ids=str)
def test_bfloat16_is_as_good_as_its_inputs(case: Case) -> None:
    assert difference(case, jnp.bfloat16) < 3e-2


def test_cases_drop_and_lean() -> None:
    """Or they would not show what they are for."""
    ids = inputs(Case(1))[1]
    loads = (ids[..., None] == np.arange(8)).sum(axis=(1, 2))
    assert loads.max() > 2 and loads.sum(axis=0).min() > 0
    assert set(inputs(Case(1, lean=100))[1].flat) == {0, 1}


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_what_is_kept_has_the_shapes_that_were_said(case: Case) -> None:
    x, ids, gates, params, _ = inputs(case)
    _, kept = jax.eval_shape(halves(case)[0], x, ids, gates, params)

    def own(leaf: Any, *lead: int) -> jax.ShapeDtypeStruct:
        shape = (leaf.shape[0] // case.parts, *leaf.shape[1:])
        return jax.ShapeDtypeStruct((*lead, *shape), leaf.dtype)

    said = case.exchange.kept_like(own(x, 7), own(ids, 7), jax.tree.map(own, params))
    assert said == tuple(own(leaf, 7) for leaf in kept)


@functools.cache
def moves(case: Case, **checkpoint: Any) -> Traffic:
    """What `LAYERS` layers send, forward and backward, in a loop as models have them.

    Args:
        case: its sizes; nothing runs.
        checkpoint: arguments of `jax.checkpoint` around a layer; none for no checkpoint.
    """
    apply = exchanged(case)

    def layer(x: Array, how: Any) -> tuple[Array, None]:
        return x + apply(x, *how), None

    body = jax.checkpoint(layer, **checkpoint) if checkpoint else layer

    def loss(x: Array, gates: Array, params: Any, ids: Array) -> Array:
        return jax.lax.scan(body, x, (ids, gates, params))[0].sum()

    x, ids, gates, params, _ = inputs(case)
    stacked = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((LAYERS, *leaf.shape), leaf.dtype), (gates, params, ids)
    )
    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, *stacked)
    text: Any = lowered.compile().as_text()
    found = collectives_of(parse_module(text), MeshSpec.of(case.mesh))
    assert not found.unread
    total: Traffic = {}
    for one in found.collectives:
        key = (one.phase, one.kind, *one.axes)
        count, sent = total.get(key, (0, 0))
        total[key] = count + one.count, sent + one.wire_bytes
    return total


def bound(case: Case, *, recompute: bool = False) -> float:
    """Of `LAYERS` layers."""
    tokens = case.rows * case.length / case.parts
    room = 1.0
    if case.capacity is not None:
        room = case.capacity * case.count / (case.length * case.choices)
    return LAYERS * expert_layer_bytes(
        tokens,
        case.parts,
        experts_per_token=case.choices,
        width=case.embed,
        itemsize=F32,
        capacity_factor=room,
        recompute=recompute,
    )


def over_experts(found: Traffic) -> float:
    return sum(sent for (*_, axis), (_, sent) in found.items() if axis == "expert")


WIDE = {"embed": 4096, "width": 2, "gated": False, "length": 8}


def test_buffers_send_what_the_bound_allows() -> None:
    """Two all-to-alls of tokens each way, and of gates one; gates are few."""
    found = moves(case := Case(8, capacity=3, **WIDE))
    assert {key: count for key, (count, _) in found.items()} == {
        ("forward", "all-to-all", "expert"): 3 * LAYERS,
        ("backward", "all-to-all", "expert"): 3 * LAYERS,
    }
    assert bound(case) < over_experts(found) < 1.001 * bound(case)


@pytest.mark.parametrize("parts", [2, 8])
def test_gathered_tokens_send_what_was_said(parts: int) -> None:
    """As little as the bound where a token has as many experts as there are devices."""
    found = moves(case := Case(parts, **WIDE))
    tokens, choices = (parts - 1) * case.rows * case.length // parts, case.choices
    x, ids, gates = (LAYERS * tokens * n * F32 for n in (case.embed, choices, choices))
    assert found == {
        ("forward", "all-gather", "expert"): (3 * LAYERS, x + ids + gates),
        ("forward", "reduce-scatter", "expert"): (LAYERS, x),
        ("backward", "all-gather", "expert"): (LAYERS, x),
        ("backward", "reduce-scatter", "expert"): (2 * LAYERS, x + gates),
    }
    ratio = parts / choices
    assert ratio * bound(case) < over_experts(found) < 1.001 * ratio * bound(case)


def test_partial_sums_over_tensor_are_summed_at_home() -> None:
    """Per token, not per slot: the output, its gradient, and k floats."""
    case = Case(2, capacity=3, tensor=2, **WIDE)
    found = moves(case)
    tokens = LAYERS * case.rows * case.length // case.parts * F32
    assert found["forward", "all-reduce", "tensor"] == (LAYERS, tokens * case.embed)
    _, sent = found["backward", "all-reduce", "tensor"]
    assert sent == tokens * (case.embed + case.choices)
    assert over_experts(found) < 1.001 * bound(case)


def test_a_checkpoint_sends_again_only_what_it_does_not_keep() -> None:
    case = Case(8, capacity=3, **WIDE)
    named = jax.checkpoint_policies.save_only_these_names(EXPERTS)
    assert moves(case, policy=named, prevent_cse=False) == moves(case)
    again = over_experts(moves(case, prevent_cse=False))
    assert 1.2 * bound(case) < again < 1.001 * bound(case, recompute=True)


def test_ragged_sends_a_token_once_to_each_device_it_visits() -> None:
    """So less than the bound, which counts a token for each of its experts."""
    case = Case(4, way="ragged", choices=3, length=48, lean=0.0)
    ids = inputs(case)[1]
    experts, away = case.count // case.parts, ~np.eye(case.parts, dtype=bool)

    def local(ids: Array) -> Array:
        dealt = jax.lax.all_gather(ids.reshape(-1, case.choices), "expert", tiled=True)
        return Ragged.of("expert", case.parts, dealt, experts).sizes

    split = {"in_specs": P("expert"), "out_specs": P(), "check_vma": False}
    found = jax.jit(jax.shard_map(local, mesh=case.mesh, **split))(ids)
    wanted = np.zeros((case.parts, case.parts), int)
    for device, tokens in enumerate(ids.reshape(case.parts, -1, case.choices)):
        for token in tokens:
            wanted[device, sorted(set(token // experts))] += 1
    np.testing.assert_array_equal(found, wanted)

    sent = LAYERS * 4 * case.embed * F32 * wanted[away].sum() / case.parts
    visits = case.parts * (1 - math.comb(6, 3) / math.comb(8, 3))
    assert sent == pytest.approx(bound(case) * visits / case.choices, rel=0.05)
    assert sent < 0.9 * bound(case)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_ragged_is_simulated_on_cpus_alone(platform: str) -> None:
    case = Case(2, way="ragged")
    x, ids, gates, params, _ = inputs(case)
    traced = jax.jit(halves(case)[0]).trace(x, ids, gates, params)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("custom_call @ragged_all_to_all") == (0 if platform == "cpu" else 2)


def test_the_way_that_sends_less_is_known_beforehand() -> None:
    assert dropless_way(8, 2, 1) == dropless_way(8, 2, 2) == "gather"
    assert dropless_way(8, 2, 4) == dropless_way(128, 8, 16) == "ragged"
    assert dropless_way(8, 8, 8) == dropless_way(8, 7, 8) == "gather"


def test_experts_that_devices_cannot_share_name_the_sizes_that_work() -> None:
    for parts in (1, 2, 4, 8):
        check_experts(8, parts)
    with pytest.raises(PlacementError) as caught:
        check_experts(6, 4)
    assert str(caught.value).splitlines() == [
        "cannot deal 6 experts to 4 devices",
        "  where: expert=4, 6 experts in a layer",
        "  why:   6 is not divisible by 4",
        "  fix:   use expert of 1, 2, 3, 6, or 4 or 8 experts",
    ]
    with pytest.raises(PlacementError, match="expert of 1, 2, 4, or 8 experts"):
        check_experts(4, 8)
