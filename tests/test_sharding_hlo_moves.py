"""Moves in small texts and in damaged ones: what is split, what is said, what must not be lost."""

from __future__ import annotations

import re
from typing import Any

import jax
import pytest
from compiled_texts import golden, mesh_of, read, row, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.sharding.collectives import CollectiveList, collectives_of, phase_of, ring_bytes
from meshwright.sharding.hlo import HloSyntaxError, Instruction, Shape, parse_module
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.planned import Collective

HEADER = "HloModule m, is_scheduled=true, num_partitions=4\n"
SUM = """
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}
"""
FOUR = mesh_of(fsdp=4)


def listed(body: str, mesh: MeshSpec = FOUR, **settings: Any) -> CollectiveList:
    entry = f"\nENTRY %main (p: f32[8], q: f32[4]) -> f32[8] {{\n{PARAMETERS}{body}\n}}\n"
    return collectives_of(parse_module(HEADER + SUM + entry), mesh, **settings)


PARAMETERS = "  %p = f32[8] parameter(0)\n  %q = f32[4] parameter(1)\n"
ONE_GROUP = "channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true"


def test_combined_reductions_are_split_by_phase_and_leaf() -> None:
    body = f"""
  %x = f32[8] sine(%p), metadata={{op_name="jit(f)/transpose(jvp())/sin"}}
  %y = f32[4] sine(%q), metadata={{op_name="jit(f)/cos"}}
  %r = (f32[8], f32[4]) all-reduce(%x, %y), {ONE_GROUP}, to_apply=%sum
  ROOT %o = f32[8] get-tuple-element(%r), index=0"""
    found = listed(body)
    assert {(c.phase, c.bytes, c.operation) for c in found.collectives} == {
        ("backward", 32, "jit(f)/transpose(jvp())/sin"),
        ("update", 16, "jit(f)/cos"),
    }

    def leaf(instruction: Instruction, shape: Shape) -> str:
        assert instruction.opcode == "all-reduce"
        return f"leaf of {shape.elements}"

    found = listed(body.replace("transpose(jvp())/", ""), leaf_of=leaf)
    assert sorted((c.leaf, c.wire_bytes) for c in found.collectives) == [
        ("leaf of 4", 24),
        ("leaf of 8", 48),
    ]
    found = listed(body.replace("transpose(jvp())/", ""))
    assert [(c.bytes, c.wire_bytes, c.dtype) for c in found.collectives] == [(48, 72, "f32")]


def test_flattened_and_concatenated_arrays_are_taken_apart() -> None:
    body = f"""
  %x = f32[8] sine(%p), metadata={{op_name="jit(f)/transpose(jvp())/sin"}}
  %y = f32[2,2] sine(%q), metadata={{op_name="jit(f)/cos"}}
  %z = f32[4] bitcast(%y)
  %c = f32[12] concatenate(%x, %z), dimensions={{0}}
  %r = f32[12] all-reduce(%c), {ONE_GROUP}, to_apply=%sum
  ROOT %o = f32[8] slice(%r), slice={{[0:8]}}"""
    found = listed(body)
    assert sorted((c.phase, c.bytes) for c in found.collectives) == [
        ("backward", 32),
        ("update", 16),
    ]


def test_a_reduction_is_as_wide_as_it_is_summed() -> None:
    """XLA folds a conversion after an all-reduce into it: what is sent is the wider operand."""
    body = f"""
  %r = bf16[8] all-reduce(%p), {ONE_GROUP}, to_apply=%sum
  ROOT %o = f32[8] convert(%r)"""
    (found,) = listed(body).collectives
    assert (found.bytes, found.dtype) == (32, "f32")


def test_asynchronous_pairs() -> None:
    start = (
        f"  %s = (f32[8], f32[32]) all-gather-start(%p), {ONE_GROUP}, dimensions={{0}}\n"
        "{between}  %d = f32[32] all-gather-done(%s)\n  ROOT %o = f32[8] slice(%d), slice={{[0:8]}}"
    )
    work = "  %w = f32[4] sine(%q)\n"
    for between, overlaps in {"": False, work: True}.items():
        (found,) = listed(start.replace("{between}", between).replace("{{", "{{")).collectives
        assert (found.bytes, found.wire_bytes, found.overlaps) == (128, 96, overlaps)
        assert found.emitted == "all-gather-start"
    bare = start.replace("(f32[8], f32[32]) all", "f32[32] all").replace("{between}", work)
    (found,) = listed(bare).collectives
    assert found.bytes == 128
    synchronous = bare.replace("dimensions={0}\n", 'dimensions={0}, backend_config='
                               '{"collective_backend_config":{"is_sync":true}}\n')  # fmt: skip
    assert synchronous != bare
    assert listed(synchronous).collectives[0].overlaps is False


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("f32[8] ragged-all-to-all(%p)", "moves an amount that the text does not tell"),
        ("f32[8] collective-wave(%p)", "moves an amount that the text does not tell"),
        ("f32[8] teleport(%p)", "is an unknown instruction"),
        ('f32[8] custom-call(%p), custom_call_target="nccl_thing"', "may communicate"),
        (
            'f32[8] custom-call(%p), custom_call_target="tpu_custom_call", '
            'backend_config={"custom_call_config":{"has_communication":true}}',
            "may communicate",
        ),
        ("f32[8] send(%p)", "no source and target pairs"),
        (
            'f32[8] send(%p), frontend_attributes={_xla_megascale_transfer_type="BROADCAST"}',
            "crosses slices as BROADCAST",
        ),
        ("f32[8] all-reduce-done(%p)", "ends what nothing starts"),
    ],
)
def test_what_cannot_be_counted_is_said(line: str, reason: str) -> None:
    found = listed(f"  %r = {line}\n  ROOT %o = f32[8] sine(%r)")
    assert not found.collectives
    assert len(found.unread) == 1 and reason in found.unread[0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("f32[8] all-reduce(%p), channel_id=1, to_apply=%sum", "it has no replica groups"),
        (f"f32[8] all-reduce(%p), {ONE_GROUP}, to_apply=%sum".replace("3}", "9}"), "ids repeat"),
        (f"f32[16] all-gather(%p), {ONE_GROUP}", "which does not fit"),
        (f"bf16[32] all-gather(%p), {ONE_GROUP}", "which does not fit"),
        (f"f32[8] all-reduce(%p), {ONE_GROUP}".replace("},", "},{4}},", 0).replace(
            "{{0,1,2,3}}", "{{0,1,2},{3}}"), "groups of different sizes"),
    ],
)  # fmt: skip
def test_damaged_collectives_are_counted_and_said(line: str, reason: str) -> None:
    found = listed(f"  %r = {line}\n  ROOT %o = f32[8] sine(%p)")
    assert len(found.collectives) == 1
    assert found.collectives[0].axes == ("fsdp",)
    assert any(reason in sentence for sentence in found.unread)


def test_a_mesh_of_another_size_is_said() -> None:
    line = f"  ROOT %r = f32[8] all-reduce(%p), {ONE_GROUP}, to_apply=%sum"
    found = listed(line, mesh_of(fsdp=8))
    assert [c.axes for c in found.collectives] == [()]
    assert "for 4 partitions" in found.unread[0]


def test_a_computation_that_nothing_calls_is_said() -> None:
    lost = f"""
%lost (z: f32[8]) -> f32[8] {{
  %z = f32[8] parameter(0)
  ROOT %r = f32[8] all-reduce(%z), {ONE_GROUP}, to_apply=%sum
}}
"""
    entry = f"\nENTRY %main (p: f32[8], q: f32[4]) -> f32[8] {{\n{PARAMETERS}"
    text = HEADER + SUM + lost + entry + "  ROOT %o = f32[8] sine(%p)\n}\n"
    found = collectives_of(parse_module(text), FOUR)
    assert not found.collectives and "nothing calls" in found.unread[0]


def test_phases() -> None:
    assert phase_of("jit(f)/transpose(jvp())/while/body/rematted_computation/dot") == "backward"
    assert phase_of("jit(f)/jvp()/checkpoint/rematted_computation/dot_general") == "backward"
    assert phase_of("jit(f)/jvp(jit(_take))/gather") == "forward"
    assert phase_of("jit(f)/mul") == phase_of("") == "update"


@given(st.integers(1, 10**9), st.integers(2, 4096))
def test_ring_bytes(size: int, n: int) -> None:
    gather = ring_bytes("all-gather", size * n, n)
    assert gather == ring_bytes("reduce-scatter", size * n, n) == size * (n - 1)
    assert ring_bytes("all-reduce", size * n, n) == 2 * gather
    assert ring_bytes("collective-permute", size, n) == size
    assert ring_bytes("all-reduce", size, 1) == ring_bytes("collective-permute", size, 1) == 0


def test_the_installed_jax_is_read(devices: list[Any]) -> None:
    """No golden text, so it follows the installed jax: three collectives on two axes."""
    mesh = mesh_of(data=2, fsdp=4).build(devices)
    spec = jax.sharding.PartitionSpec(("data", "fsdp"))

    def function(x: Any) -> Any:
        x = jax.lax.psum(x, "data")
        x = jax.lax.psum_scatter(x, "fsdp", tiled=True)
        return jax.lax.all_gather(x, ("data", "fsdp"), tiled=True)

    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(mapped).lower(jax.ShapeDtypeStruct((64, 4), "float32")).compile().as_text()
    found = collectives_of(parse_module(text or ""), MeshSpec.of(mesh))
    assert rows(found) == sorted(
        [
            row("all-reduce", ("data",), 2, 128),
            row("reduce-scatter", ("fsdp",), 4, 128),
            row("all-gather", ("data", "fsdp"), 8, 256),
        ]
    )
    assert not found.unread


# Damage: a text is read, refused, or the loss is said; never less in silence.

FUZZED = [
    (target, program, mesh, slices)
    for target, program, mesh, slices in (
        ("v5e-jax0.10", "matmul x=k w=k y=m", mesh_of(fsdp=8), 1),
        ("v5e-jax0.12", "scan 3 of scan 5", mesh_of(fsdp=8), 1),
        ("h100-jax0.12", "step, fsdp and tensor", mesh_of(fsdp=2, tensor=4), 1),
        ("h100-jax0.10", "matmul x=m w=k y=-", mesh_of(fsdp=8), 1),
        ("tpu7x-jax0.12", "scan 4", mesh_of(fsdp=8), 1),
        ("cpu-jax0.10", "all_to_all over fsdp", mesh_of(data=2, fsdp=4), 1),
        ("v5e-slices-jax0.10", "psum over data,fsdp of data=2,fsdp=8",
         mesh_of(data=2, fsdp=8), 2),
        ("v5e-jax0.10", "large matmul, gather w", mesh_of(fsdp=8), 1),
        ("v5e-four-jax0.12", "four, gather x, scatter y", mesh_of(fsdp=4), 1),
    )
]  # fmt: skip
COLLECTIVE_LINE = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|send|recv)(-start)?\("
)
damages = st.sampled_from(["delete", "truncate", "swap", "replace", "duplicate"])


def damaged(draw: Any, line: str, start: int) -> str:
    """The line with one thing wrong at or after a position."""
    kind = draw(damages)
    at = draw(st.integers(start, max(start, len(line) - 1)))
    if kind == "truncate":
        return line[:at]
    if kind == "delete":
        return line[:at] + line[at + draw(st.integers(1, 6)) :]
    if kind == "swap":
        return line[:at] + line[at + 1 : at + 2] + line[at : at + 1] + line[at + 2 :]
    if kind == "duplicate":
        return line[:at] + line[at : at + 4] + line[at:]
    return line[:at] + draw(st.sampled_from("{}[](),=%\"' 0x\\")) + line[at + 1 :]


@given(st.data())
@settings(max_examples=250)
def test_any_damage_is_read_or_refused(data: Any) -> None:
    target, program, mesh, slices = data.draw(st.sampled_from(FUZZED))
    lines = golden(target)[program].split("\n")
    number = data.draw(st.integers(0, len(lines) - 1))
    lines[number] = damaged(data.draw, lines[number], 0)
    try:
        found = collectives_of(parse_module("\n".join(lines)), mesh, slices=slices)
    except HloSyntaxError:
        return
    assert all(isinstance(collective, Collective) for collective in found.collectives)


@given(st.data())
@settings(max_examples=250)
def test_a_damaged_collective_is_never_lost_in_silence(data: Any) -> None:
    target, program, mesh, slices = data.draw(st.sampled_from(FUZZED))
    lines = golden(target)[program].split("\n")
    chosen = [n for n, line in enumerate(lines) if COLLECTIVE_LINE.search(line)]
    number = data.draw(st.sampled_from(chosen))
    match = COLLECTIVE_LINE.search(lines[number])
    assert match
    # Metadata and backend settings do not say what moves; half of a line is made of them.
    end = lines[number].find("metadata=")
    tail = lines[number][end:] if end > 0 else ""
    line = lines[number][:end] if end > 0 else lines[number]
    lines[number] = damaged(data.draw, line, match.start() + 1) + tail
    try:
        found = collectives_of(parse_module("\n".join(lines)), mesh, slices=slices)
    except HloSyntaxError:
        return
    before = read(target, program, mesh, slices)
    wire = sum(c.wire_bytes for c in found.collectives)
    # A permute that lost its name is no part of its windowed einsum any more, but sends the same.
    fewer = len(found.collectives) < len(before.collectives)
    if fewer or wire < sum(c.wire_bytes for c in before.collectives):
        assert set(found.unread) - set(before.unread), lines[number]
