"""Estimates: leaves and state equal the real module's and layout's; traffic by hand; laws."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshwright.sharding.step_time as shared_rule
import meshwright.train.estimate_time as estimate_time
from meshwright.models.config import ModelConfig, count_parameters, named
from meshwright.models.pure import functional
from meshwright.models.sizes import MODELS
from meshwright.sharding.bounds import fsdp_bytes, tensor_layer_bytes, vocabulary_bytes
from meshwright.sharding.chips import CHIPS
from meshwright.sharding.dims import describe, describe_optimizer
from meshwright.sharding.errors import PlacementError
from meshwright.sharding.links import axis_links
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.step_time import MeasuredRates
from meshwright.sharding.topology import Topology
from meshwright.train.bench_estimate import estimates_per_second
from meshwright.train.config import OptimizerConfig, TrainConfig
from meshwright.train.estimate import Estimate, estimate
from meshwright.train.estimate_memory import state_of
from meshwright.train.estimate_placement import place
from meshwright.train.estimate_traffic import expected_collectives, lower_bounds
from meshwright.train.explain import layout_of, totals_of
from meshwright.train.optimizer import make_optimizer
from meshwright.train.parallelism import choose_rules
from meshwright.train.shapes import groups_of, kept_activations, moment_leaves, parameter_leaves
from meshwright.train.weights import Reductions, Weights

SMALL = ModelConfig(
    "small", vocab_size=256, layers=4, embed=64, heads=8, kv_heads=8, head_dim=16, mlp=192,
    max_length=256,
)  # fmt: skip
VARIANTS = [
    SMALL,
    replace(SMALL, name="gpt", norm="layer", positions="learned", activation="gelu", bias=True),
    replace(SMALL, name="qwen", qk_norm=True, kv_heads=4, tied=True),
    replace(SMALL, name="biased", bias=True, qk_norm=True, norm="layer"),
]


@pytest.mark.parametrize("config", [*VARIANTS, *(make() for make in MODELS.values())], ids=str)
def test_leaves_are_those_of_the_module(config: ModelConfig) -> None:
    model = functional(config)
    real = [(leaf.path, leaf.shape, leaf.dims) for leaf in describe(model.shapes, model.dims)]
    assert [(leaf.path, leaf.shape, leaf.dims) for leaf in parameter_leaves(config)] == real
    assert sum(group.elements for group in groups_of(config)) == count_parameters(config)


OPTIMIZERS = [
    OptimizerConfig(name="adamw"),
    OptimizerConfig(name="lion"),
    OptimizerConfig(name="sgd"),
    OptimizerConfig(name="sgd", momentum=0.0),
    OptimizerConfig(name="adafactor"),
    OptimizerConfig(name="adafactor", momentum=0.9),
    OptimizerConfig(name="muon"),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: f"{o.name}-{o.momentum}")
@pytest.mark.parametrize("config", [VARIANTS[1], named("qwen3-0.6b")], ids=lambda c: c.name)
def test_moments_are_those_of_the_optimizer(config: ModelConfig, optimizer: Any) -> None:
    model = functional(config)
    made = make_optimizer(optimizer, 100, model.dims)
    state = jax.eval_shape(made.init, model.shapes)
    leaves = describe_optimizer(state, describe(model.shapes, model.dims))
    real = Counter((leaf.shape, leaf.dims) for leaf in leaves)
    default = {"sgd": 0.9}.get(optimizer.name, 0.0)
    momentum = default if optimizer.momentum is None else optimizer.momentum
    ours = moment_leaves(optimizer.name, bool(momentum), config)
    assert Counter((leaf.shape, leaf.dims) for leaf in ours) == real


meshes = st.builds(
    lambda data, fsdp, tensor: f"data={data},fsdp={fsdp},tensor={tensor}",
    *[st.sampled_from((1, 2, 4, 8))] * 3,
)


@given(
    mesh=meshes,
    zero=st.sampled_from((0, 1, 2)),
    accumulate=st.sampled_from(("whole", "sharded")),
    grad_accum=st.sampled_from((1, 2)),
    optimizer=st.sampled_from(OPTIMIZERS[:-1]),
    itemsize=st.sampled_from((2, 4)),
    rules=st.sampled_from(((), ("vocab=none",), ("params.vocab=none", "gradients.mlp=none"))),
)
@settings(max_examples=15)
def test_state_equals_explain(
    mesh: str,
    zero: Any,
    accumulate: Any,
    grad_accum: int,
    optimizer: Any,
    itemsize: int,
    rules: Any,
) -> None:
    spec = MeshSpec.parse(mesh)
    if any(rules) and spec.sizes["tensor"] == 1:
        rules = ()
    config = TrainConfig(
        VARIANTS[0],
        mesh=mesh,
        zero=zero,
        accumulate=accumulate,
        rules=rules,
        grad_accum=grad_accum,
        optimizer=optimizer,
        batch_size=128,
        seq_len=32,
    )
    layout = layout_of(config, functional(config.model), spec)
    totals = totals_of(layout, grad_accum=grad_accum, compute_itemsize=itemsize)
    ours = state_of(place(config, spec, choose_rules(config, spec)), itemsize)
    assert ours.parameters == totals.parameters_bytes
    assert ours.working == totals.working_bytes
    assert ours.gradients == totals.gradients_bytes
    assert ours.optimizer == totals.optimizer_bytes
    rows = 128 // (spec.sizes["data"] * spec.sizes["fsdp"])
    assert ours.batch == 3 * 4 * rows * 32


def bounds_of(model: ModelConfig, mesh: str, **settings: Any) -> dict[str, float]:
    settings = {"batch_size": 64, "seq_len": 8192, **settings}
    config, spec = TrainConfig(model, mesh=mesh, **settings), MeshSpec.parse(mesh)
    return lower_bounds(config, spec, choose_rules(config, spec), 2)


def test_fsdp_bound_of_8b_by_hand() -> None:
    """6ρΨ for the layers; embedding and head are gathered once, so 4ρ of them."""
    model = named("llama3-8b")
    tables = 2 * 128_256 * 4096
    layers = count_parameters(model) - tables - 4096
    norms = (2 * 32 + 1) * 4096  # whole on every device: an all-reduce, and no gather
    items: dict[str, Any] = {"gradient_itemsize": 2, "parameter_itemsize": 2}
    expected = fsdp_bytes(layers - norms + 4096, 64, **items)
    expected += fsdp_bytes(tables, 64, **items, gathers=1)
    expected += 2 * 63 / 64 * (2 * norms + 8 + 4)
    # With as many tokens a device as the table has rows, gathering it is as good as an exchange.
    found = bounds_of(model, "fsdp=64", batch_size=1024)["fsdp"]
    assert found == pytest.approx(expected, rel=1e-7)


def test_an_exchange_moves_rows_instead_of_a_table() -> None:
    model = named("llama3-8b")
    gathered = bounds_of(model, "fsdp=64", batch_size=1024)["fsdp"]
    exchanged = bounds_of(model, "fsdp=64", batch_size=64)["fsdp"]
    table, rows, ids = 2 * 128_256 * 4096, 2 * 8192 * 4096, 64 * 4 * 8192
    assert gathered - exchanged == pytest.approx(63 / 64 * (2 * table - 2 * rows - ids), rel=1e-7)


@pytest.mark.parametrize("mesh", ["fsdp=4", "data=2,fsdp=2", "fsdp=2,tensor=2", "data=4"])
@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("grad_accum", [1, 2])
@pytest.mark.parametrize("rules", [(), ("vocab=fsdp", "embed=none"), ("params.vocab=none",)])
@pytest.mark.parametrize("accumulate", ["whole", "sharded"])
def test_lookups_are_exchanged_where_the_step_does(
    mesh: str, rows: int, grad_accum: int, rules: Any, accumulate: Any
) -> None:
    spec = MeshSpec.parse(mesh)
    if rules and "fsdp" not in spec.sizes:
        return
    config = TrainConfig(
        SMALL, mesh=mesh, batch_size=rows, seq_len=32, grad_accum=grad_accum, rules=rules,
        accumulate=accumulate,
    )  # fmt: skip
    rules = choose_rules(config, spec)
    layout = layout_of(config, functional(SMALL), spec)
    batch = rules.lookup("activations", "batch")
    split = [axis for axis in (batch.axes if batch else ()) if spec.sizes[axis] > 1]
    apart = layout.unreduced_axes(layout.reduced) if grad_accum > 1 else ()
    now = tuple(axis for axis in split if axis not in apart)
    devices = jax.sharding.AbstractMesh(tuple(spec.sizes.values()), tuple(spec.sizes))
    weights = Weights(
        layout, functional(SMALL).shapes, devices, "bfloat16",  # type: ignore[arg-type]
        Reductions(now=now), final=grad_accum == 1,
    )  # fmt: skip
    placement = place(config, spec, rules)
    exchange = weights.exchange_for("embedding", placement.tokens)
    assert placement.exchanged == (exchange.columns if exchange else ())


def test_data_bound_is_all_gradients_once() -> None:
    model = named("llama3-8b")
    found = bounds_of(model, "data=64")["data"]
    assert found == pytest.approx(2 * 63 / 64 * 2 * count_parameters(model), rel=1e-7)
    # Accumulators are float32 and cross once, whatever the microbatches.
    twice = bounds_of(model, "data=32", grad_accum=2)["data"]
    assert twice == pytest.approx(2 * 31 / 32 * 4 * count_parameters(model), rel=1e-7)
    assert bounds_of(model, "data=16", grad_accum=4)["data"] < twice


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_tensor_bound_by_hand(remat: Any) -> None:
    model = replace(named("llama3-8b"), remat=remat)
    tokens, stream = 8 * 8192, 8 * 8192 * 4096 * 2
    found = bounds_of(model, "fsdp=8,tensor=8")["tensor"]
    expected = 32 * tensor_layer_bytes(stream, 8, recompute=remat == "full")
    expected += vocabulary_bytes(stream, 8, tokens=tokens)
    assert found == pytest.approx(expected, rel=1e-6)


def test_zero_moves_gathers_to_the_data_axis() -> None:
    model = named("llama3-8b")
    plain = bounds_of(model, "data=8,tensor=8")["data"]
    first = bounds_of(model, "data=8,tensor=8", zero=1)["data"]
    second = bounds_of(model, "data=8,tensor=8", zero=2, grad_accum=4)["data"]
    parameters = count_parameters(model) / 8
    assert first == pytest.approx(plain, rel=1e-3)
    assert second == pytest.approx(7 / 8 * parameters * (4 * 2 + 2), rel=1e-3)


def test_hybrid_reduces_shards_over_data() -> None:
    model = named("llama3-8b")
    # As many tokens a device as the table has rows: no exchange.
    found = bounds_of(model, "data=8,fsdp=8", batch_size=1024)
    assert found["data"] == pytest.approx(2 * 7 / 8 * 2 * count_parameters(model) / 8, rel=2e-3)
    assert found["fsdp"] == pytest.approx(
        bounds_of(model, "fsdp=8", batch_size=128)["fsdp"], rel=2e-3
    )


def estimated(mesh: str, model: ModelConfig | None = None, **changes: Any) -> Estimate:
    values: dict[str, Any] = {"batch_size": 256, "seq_len": 2048, **changes}
    config, spec = (
        TrainConfig(model or named("llama-1b"), mesh=mesh, **values),
        MeshSpec.parse(mesh),
    )
    return estimate(
        config,
        spec,
        choose_rules(config, spec),
        None,
        None,
        compute_itemsize=2,
        fused_attention=True,
    )


def numbers(value: Any) -> list[float]:
    if isinstance(value, bool | str) or value is None:
        return []
    if isinstance(value, int | float):
        return [value]
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, tuple):
        return [number for item in value for number in numbers(item)]
    return [number for item in vars(value).values() for number in numbers(item)]


@given(
    mesh=meshes,
    grad_accum=st.sampled_from((1, 2, 4)),
    remat=st.sampled_from(("none", "dots", "full")),
    zero=st.sampled_from((0, 1, 2)),
)
@settings(max_examples=40)
def test_nothing_is_negative_and_parts_make_the_peak(
    mesh: str, grad_accum: int, remat: Any, zero: Any
) -> None:
    model = replace(named("llama-1b"), remat=remat)
    found = estimated(mesh, model, grad_accum=grad_accum, zero=zero)
    assert all(number >= 0 for number in numbers(found))
    memory = found.memory
    parts = (
        memory.parameters_bytes
        + memory.gradients_bytes
        + memory.optimizer_bytes
        + memory.batch_bytes
        + memory.activations_bytes
        + memory.temporaries_bytes
    )
    assert memory.peak_bytes == pytest.approx(parts, abs=8)
    assert sum(size for _, size in memory.contributors) == pytest.approx(parts, abs=64)
    assert set(found.traffic) == {"data", "fsdp", "tensor"}
    for axis, size in MeshSpec.parse(mesh).axes:
        assert (found.traffic[axis].wire_bytes > 0) == (size > 1)


@given(rows=st.sampled_from((64, 128, 256)), length=st.sampled_from((1024, 2048, 4096)))
def test_more_tokens_never_cost_less(rows: int, length: int) -> None:
    small = estimated("fsdp=8,tensor=2", batch_size=rows, seq_len=length)
    for bigger in (
        estimated("fsdp=8,tensor=2", batch_size=2 * rows, seq_len=length),
        estimated("fsdp=8,tensor=2", batch_size=rows, seq_len=2 * length),
    ):
        assert (bigger.memory.peak_bytes or 0) > (small.memory.peak_bytes or 0)
        assert (bigger.flops.device_flops or 0) > (small.flops.device_flops or 0)
        assert bigger.traffic["tensor"].wire_bytes > small.traffic["tensor"].wire_bytes
        assert bigger.traffic["fsdp"].wire_bytes == small.traffic["fsdp"].wire_bytes


@pytest.mark.parametrize("fused", [True, False])
def test_remat_trades_memory_for_work(fused: bool) -> None:
    kept, flops = [], []
    for remat in ("none", "dots", "full"):
        model: ModelConfig = replace(named("llama-1b"), remat=remat)  # type: ignore[arg-type]
        layers = kept_activations(model, itemsize=2, fused_attention=fused, length=2048)
        kept.append(sum(found.elements * found.itemsize for found in layers))
        flops.append(estimated("fsdp=8", model).flops.device_flops or 0)
    assert kept[0] > kept[1] > kept[2] == 0
    assert flops[0] < flops[1] < flops[2]


def test_flops_of_a_plain_step_are_the_models() -> None:
    """Without recomputation, fused kernels or splitting, 3 × forward: PaLM's count."""
    config = TrainConfig(replace(SMALL, remat="none"), batch_size=8, seq_len=64)
    spec = MeshSpec.parse("data=1")
    found = estimate(
        config,
        spec,
        choose_rules(config, spec),
        None,
        None,
        compute_itemsize=4,
        fused_attention=False,
    )
    norms = 6 * 8 * 64 * (2 * 4 + 1) * 64  # Ψ counts norm scales, which are no matmul
    assert found.flops.model_flops is not None and found.flops.device_flops is not None
    assert found.flops.device_flops + norms == pytest.approx(found.flops.model_flops, rel=1e-9)


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(PlacementError, match=r"kv_heads is 8 and the mesh asks for 16 parts"):
        estimated("tensor=16")
    with pytest.raises(PlacementError, match="cannot deal 12 rows"):
        estimated("fsdp=8", batch_size=12)


def test_no_chip_no_seconds() -> None:
    time = estimated("fsdp=8").time
    assert time.compute_seconds is None and time.step_seconds_low is None and time.mfu is None


def test_the_bench_runs() -> None:
    assert estimates_per_second(0.05) > 0


def test_estimates_need_no_jax() -> None:
    program = (
        "import sys, meshwright.train.bench_estimate as b; b.estimates_per_second(0.01)\n"
        "print([m for m in ('jax', 'numpy', 'flax') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def timed(mesh: str, topology: str, model: ModelConfig, **changes: Any) -> Estimate:
    how: dict[str, Any] = {
        name: changes.pop(name) for name in ("rates", "margin") if name in changes
    }
    place_on = Topology.parse(topology)
    values: dict[str, Any] = {"batch_size": 256, "seq_len": 4096, **changes}
    config, spec = TrainConfig(model, mesh=mesh, **values), MeshSpec.parse(mesh)
    chip = CHIPS[place_on.chip or ""]
    return estimate(
        config,
        spec,
        choose_rules(config, spec),
        chip,
        axis_links(place_on, spec),
        compute_itemsize=2,
        fused_attention=True,
        **how,
    )


@pytest.mark.parametrize("mesh", ["fsdp=64", "data=8,fsdp=8", "fsdp=8,tensor=8"])
@pytest.mark.parametrize("topology", ["v5p:4x4x4", "h100:8x8"])
def test_times_bracket_the_step(mesh: str, topology: str) -> None:
    found = timed(mesh, topology, named("llama3-8b"))
    time = found.time
    low, high = time.step_seconds_low, time.step_seconds_high
    assert low and high and time.compute_seconds and time.memory_seconds
    named_parts = {
        "compute": time.compute_seconds,
        "memory": time.memory_seconds,
        **time.communication_seconds,
    }
    assert max(named_parts.values()) <= low <= high <= sum(named_parts.values()) * (1 + 1e-9)
    assert named_parts[time.bound_by] == max(named_parts.values())
    if topology.startswith("h100"):
        # All may overlap, and nothing does; a TPU's compute contains its memory's time.
        assert low == max(named_parts.values())
        assert high == pytest.approx(sum(named_parts.values()))
    else:
        assert high == pytest.approx(sum(named_parts.values()) - time.memory_seconds)
    assert time.mfu and 1.1 > time.mfu[0] >= time.mfu[1] > 0
    tokens = time.tokens_per_second_per_chip
    assert tokens and tokens[0] == pytest.approx(256 * 4096 / 64 / low)
    for axis, moved in found.traffic.items():
        # Latency comes on top of what the bytes take.
        assert moved.seconds is not None
        assert time.communication_seconds[axis] > moved.seconds > 0


def test_measured_rates_replace_the_data_sheets() -> None:
    model, chip = named("llama3-8b"), CHIPS["h100"]
    plain = timed("fsdp=64", "h100:8x8", model)
    rates = MeasuredRates(
        {"bf16": chip.peak_flops["bf16"] / 2},
        attention_flops=chip.peak_flops["bf16"] / 4,
        memory_bandwidth=chip.memory_bandwidth / 2,
        links=0.5,
    )
    slower = timed("fsdp=64", "h100:8x8", model, rates=rates)
    assert slower.time.compute_seconds == pytest.approx(2 * (plain.time.compute_seconds or 0))
    assert slower.time.memory_seconds == pytest.approx(2 * (plain.time.memory_seconds or 0))
    assert slower.time.roofline_seconds == plain.time.roofline_seconds
    assert slower.traffic["fsdp"].seconds == pytest.approx(2 * (plain.traffic["fsdp"].seconds or 0))


def test_fused_attention_is_counted_as_in_compiled_programs() -> None:
    kernels = {"gpu": "cudnn", "tpu": "splash"}
    for kind, kernel in kernels.items():
        assert estimate_time._BLOCK[kind] == shared_rule.KERNEL_BLOCK[kernel]
        assert estimate_time._FUSED_BACKWARD[kind] == shared_rule.KERNEL_BACKWARD[kernel]


@pytest.mark.parametrize(("kind", "overlapped"), [("gpu", "all"), ("tpu", "gathers"), (None, "")])
def test_what_overlaps_depends_on_the_compiler(kind: str | None, overlapped: str) -> None:
    config, spec = TrainConfig(SMALL, batch_size=8, seq_len=64), MeshSpec.parse("fsdp=2,tensor=2")
    placement = place(config, spec, choose_rules(config, spec))
    for found in expected_collectives(placement, 2, kind):
        layers = found.kind == "all-gather" and found.leaf == "layers"
        assert found.overlaps == {"all": True, "gathers": layers, "": None}[overlapped]
