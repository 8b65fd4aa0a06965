"""What a whole program computes and moves: FLOPs of a step, bytes that are touched, cycles.

Small programs with known answers, written here in XLA's form or compiled on the spot for CPU,
and the golden texts of three compilers. Single instructions are in test_sharding_hlo_flops.
"""

from __future__ import annotations

import functools
import json
import lzma
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from meshwright.sharding.chips import CHIPS
from meshwright.sharding.hlo import Module, parse_module
from meshwright.sharding.hlo_cost import ProgramCost, cost_of
from meshwright.sharding.hlo_cycles import cycles_of
from meshwright.sharding.hlo_traffic import scheduled_computations

GOLDEN = Path(__file__).resolve().parent / "golden"
COMPILERS = [
    f"{target}-jax{version}"
    for target in ("cpu", "h100", "v5e", "v5p", "tpu7x")
    for version in ("0.10", "0.12")
    if GOLDEN.joinpath(f"{target}-jax{version}.json.xz").exists()
]
TPUS = [name for name in COMPILERS if name.startswith(("v5e", "v5p", "tpu7x"))]


@functools.cache
def golden(target: str) -> dict[str, str]:
    return json.loads(lzma.decompress(GOLDEN.joinpath(f"{target}.json.xz").read_bytes()))


@functools.cache
def golden_module(target: str, name: str) -> Module:
    return parse_module(golden(target)[name])


def compiled(function: Any, *shapes: tuple[int, ...], dtype: str = "float32") -> tuple[Any, Any]:
    """The cost of a function compiled for this machine's CPU, and the executable."""
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    program = jax.jit(function).lower(*arguments).compile()
    return cost_of(parse_module(program.as_text() or "")), program


def cost(body: str, header: str = "", before: str = "") -> ProgramCost:
    """The cost of an entry computation written by hand."""
    return cost_of(
        parse_module(f"HloModule t{header}\n\n{before}\nENTRY %main () -> f32[] {{\n{body}\n}}\n")
    )


TPU = ", entry_computation_layout={(f32[8]{0:T(256)})->f32[8]{0:T(256)}}"


def scanned(weights: Any, x: Any) -> Any:
    return jnp.sum(jax.lax.scan(lambda c, w: (jnp.sin(c @ w), None), x, weights)[0])


# The golden programs: all compilers agree with the closed form


@pytest.mark.parametrize("target", COMPILERS)
def test_every_compiler_computes_a_sharded_step_exactly(target: str) -> None:
    layers, width, hidden, batch, micro = 4, 512, 2048, 4096, 3
    # Two matmuls forward, the first again, two each for inputs and weights backward.
    expected = 7 * layers * 2 * batch * width * hidden / 8
    for name in golden(target):
        if name.startswith("step, "):
            assert cost_of(golden_module(target, name)).device_flops == expected, name
        elif name.startswith("microbatches, "):
            found = cost_of(golden_module(target, name)).device_flops
            assert found == micro * expected, name


@pytest.mark.parametrize("target", COMPILERS)
def test_every_compiler_splits_a_matmul_in_eight(target: str) -> None:
    for name in golden(target):
        if name.startswith("large matmul"):  # as windowed einsums where the compiler likes
            assert cost_of(golden_module(target, name)).device_flops == 2 * 65536 * 8192 * 8192 / 8
        elif name.startswith("matmul x=m") or name.startswith("matmul x=k"):
            assert cost_of(golden_module(target, name)).device_flops == 2 * 1024 * 512 * 256 / 8


# Memory traffic


def test_an_elementwise_program_reads_and_writes_once() -> None:
    found, _ = compiled(lambda a, b: jnp.sin(a) * b + 1, (256, 128), (256, 128))
    assert found.memory_traffic_bytes == 3 * 4 * 256 * 128


def test_a_scan_reads_each_layers_slice_once() -> None:
    layers, rows, width = 16, 8, 64
    found, _ = compiled(scanned, (layers, width, width), (rows, width))
    weights = 4 * layers * width * width
    activations = 4 * layers * rows * width
    # Read, at most copied on the way into the matmul; the whole stack a layer would be 16 times.
    assert weights <= found.memory_traffic_bytes <= 3 * weights + 8 * activations + 1000


SLICED = """
%fused (p: f32[16,1024], i: s32[]) -> f32[1024] {
  %p = f32[16,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %double = f32[16,1024]{1,0} add(%p, %p)
  %slice = f32[1,1024]{1,0} dynamic-slice(%double, %i, %zero), dynamic_slice_sizes={1,1024}
  ROOT %flat = f32[1024]{0} bitcast(%slice)
}
"""
UPDATED = """
%fused (p: f32[16,1024], i: s32[], u: f32[1024]) -> f32[16,1024] {
  %p = f32[16,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %u = f32[1024]{0} parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,1024]{1,0} bitcast(%u)
  ROOT %put = f32[16,1024]{1,0} dynamic-update-slice(%p, %row, %i, %zero)
}
"""


def fused(before: str, result: str, *operands: str, header: str = "") -> float:
    lines = [f"  %o{n} = {shape} parameter({n})" for n, shape in enumerate(operands)]
    names = ", ".join(f"%o{n}" for n in range(len(operands)))
    lines.append(f"  ROOT %f = {result} fusion({names}), kind=kLoop, calls=%fused")
    return cost("\n".join(lines), header, before).memory_traffic_bytes


def test_a_fusion_that_takes_a_slice_reads_only_that() -> None:
    # Elementwise work before the slice is asked for the slice only; 4 bytes are the index.
    found = fused(SLICED, "f32[1024]{0}", "f32[16,1024]{1,0}", "s32[]")
    assert found == 2 * 4096 + 4


def test_an_update_in_place_writes_only_the_update() -> None:
    stack, row = "f32[16,1024]{1,0}", "f32[1024]{0}"
    assert fused(UPDATED, stack, stack, "s32[]", row) == 2 * 4096 + 4
    # Into a buffer that the fusion makes itself, all of it is written.
    fresh = UPDATED.replace(
        "%put = ", "%new = f32[16,1024]{1,0} broadcast(%zero), dimensions={}\n  ROOT %put = "
    ).replace("ROOT %new", "%new").replace("slice(%p,", "slice(%new,")  # fmt: skip
    assert fused(fresh, stack, stack, "s32[]", row) == 16 * 4096 + 4096 + 4


def test_a_fusion_with_several_results_passes_some_on() -> None:
    before = """
%fused (a: f32[1024], b: f32[1024]) -> (f32[1024], f32[1024], f32[1]) {
  %a = f32[1024]{0} parameter(0)
  %b = f32[1024]{0} parameter(1)
  %c = f32[1024]{0} negate(%a)
  %d = f32[1]{0} slice(%a), slice={[0:1]}
  ROOT %t = (f32[1024]{0}, f32[1024]{0}, f32[1]{0}) tuple(%c, %b, %d)
}
"""
    shape = "(f32[1024]{0}, f32[1024]{0}, f32[1]{0})"
    # a is read once though two read it, b is not touched.
    assert fused(before, shape, "f32[1024]{0}", "f32[1024]{0}") == 2 * 4096 + 4


def test_on_chip_memory_is_free_on_tpu_only() -> None:
    before = """
%fused (a: f32[1024]) -> f32[1024] {
  %a = f32[1024]{0} parameter(0)
  ROOT %c = f32[1024]{0} negate(%a)
}
"""
    chip = "f32[1024]{0:T(1024)S(1)}"
    assert fused(before, chip, "f32[1024]{0:T(1024)}", header=TPU) == 4096
    assert fused(before, chip, chip, header=TPU) == 0
    assert fused(before, "f32[1024]{0:S(1)}", "f32[1024]{0}") == 2 * 4096


def test_asynchronous_copies_count_once_where_they_touch_memory() -> None:
    body = (
        "  %a = f32[4,1024]{1,0:T(4,128)} parameter(0)\n"
        "  %s = (f32[4,1024]{1,0:T(4,128)}, f32[1,1024]{1,0:T(1,128)S(1)}, s32[]{:S(2)}) "
        "slice-start(%a), slice={[0:1], [0:1024]}\n"
        "  %d = f32[1,1024]{1,0:T(1,128)S(1)} slice-done(%s)\n"
        "  %c = (f32[1,1024]{1,0:T(1,128)}, f32[1,1024]{1,0:T(1,128)S(1)}, u32[]{:S(2)}) "
        "copy-start(%d)\n"
        "  ROOT %e = f32[1,1024]{1,0:T(1,128)} copy-done(%c)"
    )
    assert cost(body, TPU).memory_traffic_bytes == 2 * 4096
    gather = (
        "  %a = f32[1024]{0} parameter(0)\n"
        "  %s = (f32[1024]{0}, f32[4096]{0}) all-gather-start(%a), dimensions={0}\n"
        "  ROOT %d = f32[4096]{0} all-gather-done(%s)"
    )
    assert cost(gather).memory_traffic_bytes == 4096 + 4 * 4096


def test_what_is_inside_a_fusion_is_not_scheduled() -> None:
    module = golden_module("v5e-jax0.10", "step, fsdp")
    found = scheduled_computations(module)
    called = {
        name
        for computation in module.computations.values()
        for i in computation.instructions.values()
        if i.opcode in ("fusion", "reduce", "all-reduce")
        for name in i.called
    }
    assert module.entry in found
    assert not found & called


@pytest.mark.parametrize("target", COMPILERS)
def test_traffic_of_a_step_holds_what_must_move_and_not_much_more(target: str) -> None:
    module = golden_module(target, "step, fsdp")
    # float32 or bfloat16 weights in, gradients out; below the stack for each layer.
    least = 2 * 2 * 4 * 2 * 512 * 2048 / 8
    tpu = target in TPUS  # may keep weights and activations on the chip
    found = cost_of(module).memory_traffic_bytes
    assert (least / 2 if tpu else least) <= found < 1e9


# Cycles


def test_cycles_follow_the_loops_and_drop_sentinels() -> None:
    estimate = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
    module = parse_module(
        f"""HloModule t
%cond (p: (s32[], f32[1024])) -> pred[] {{
  %p = (s32[], f32[1024]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

%body (p.1: (s32[], f32[1024])) -> (s32[], f32[1024]) {{
  %p.1 = (s32[], f32[1024]{{0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i.1, %one)
  %x = f32[1024]{{0}} get-tuple-element(%p.1), index=1
  %y = f32[1024]{{0}} negate(%x), {estimate % 100}
  %z = f32[1024]{{0}} copy(%y), {estimate % (2**63 - 1)}
  %kernel.3 = f32[1024]{{0}} custom-call(%z), custom_call_target="tpu_custom_call"
  ROOT %t = (s32[], f32[1024]{{0}}) tuple(%next, %kernel.3)
}}

ENTRY %main (a: f32[1024]) -> f32[1024] {{
  %a = f32[1024]{{0}} parameter(0)
  %b = f32[1024]{{0}} negate(%a), {estimate % 5}
  %zero = s32[] constant(0)
  %init = (s32[], f32[1024]{{0}}) tuple(%zero, %b)
  %loop = (s32[], f32[1024]{{0}}) while(%init), condition=%cond, body=%body
  ROOT %out = f32[1024]{{0}} get-tuple-element(%loop), index=1
}}
"""
    )
    found = cycles_of(module)
    assert found.cycles == 7 * 100 + 5
    assert (found.estimated, found.sentinels) == (8, 7)
    assert found.without == {"kernel": 7}
    assert found.unread == ()
    assert found.seconds(705.0) == 1.0


@pytest.mark.parametrize("target", TPUS)
def test_a_large_matmul_takes_what_the_chips_peak_allows(target: str) -> None:
    """The compiler's cycles at the chip's clock: 65 to 100% of peak, whole chips (v5p too)."""
    chip = CHIPS[target.split("-")[0]]
    assert chip.clock_hz is not None
    module = golden_module(target, "large matmul, gather x")
    seconds = cycles_of(module).seconds(chip.clock_hz)
    fraction = cost_of(module).device_flops / seconds / chip.peak_flops["bf16"]
    assert 0.65 < fraction < 1.0


@pytest.mark.parametrize("target", [name for name in COMPILERS if name not in TPUS])
def test_other_compilers_give_no_cycles(target: str) -> None:
    assert not cycles_of(golden_module(target, "step, fsdp")).known
