"""Collectives of compiled programs against closed forms, compiler by compiler.

The golden texts (`tests/golden/generate.py`) are of programs whose communication is known in
advance: every count and byte must come out exactly. Where a compiler does something else than
the rule, `EMITTED` says what and why.
"""

from __future__ import annotations

import re

import pytest
from compiled_texts import ONE_SLICE, TARGETS, Row, chip_of, golden, mesh_of, read, row, rows

from meshwright.sharding.collectives import CollectiveList, collectives_of
from meshwright.sharding.hlo import parse_module
from meshwright.sharding.mesh import MeshSpec

# One matmul, y[m,n] = x[m,k] w[k,n], each operand and the result split over one dim or whole.

ROWS, DEPTH, COLUMNS = 1024, 512, 256
# What moves, by (x, w, y): AG of an operand or the result, AR or RS of the result's partial
# sums, A2A where the split only changes its dim. Where several would do, as XLA chooses.
MATMUL: dict[str, list[str]] = {
    "-k-": ["AG w"],
    "-km": ["AG w"],
    "-kn": ["A2A w"],
    "-n-": ["AG y"],
    "-nm": ["AG w"],
    "m--": ["AG y"],
    "m-n": ["AG x"],
    "mk-": ["AG w", "AG y"],
    "mkm": ["AG w"],
    "mkn": ["A2A w", "AG x"],
    "mn-": ["AG w", "AG y"],
    "mnm": ["AG w"],
    "mnn": ["AG x"],
    "k--": ["AR y"],
    "k-m": ["A2A x"],
    "k-n": ["AG x"],
    "kk-": ["AR y"],
    "kkm": ["RS y"],
    "kkn": ["RS y"],
    "kn-": ["AG x", "AG y"],
    "knm": ["AG w", "A2A x"],
    "knn": ["AG x"],
}
EMITTED: dict[str, dict[str, list[str]]] = {
    # XLA:CPU has no reduce-scatter pass: the all-reduce that the partitioner makes stays.
    "cpu": {"kkm": ["AR y"], "kkn": ["AR y"]},
    # Eight v5p chips are a 2x2x2 torus, and over three of its dims the TPU compiler keeps the
    # all-reduce where it makes an all-reduce-scatter over one.
    "v5p": {"kkm": ["AR y"], "kkn": ["AR y"]},
    # The tpu7x compiler runs a cost model of its own and prefers partial sums of small results
    # and all-to-all of activations (x and y here) to gathering.
    "tpu7x": {
        "-k-": ["AR y"],
        "m-n": ["A2A y"],
        "mkn": ["AG w", "A2A y"],
        "mnn": ["AG w", "A2A y"],
        "k-m": ["RS y"],
        "k-n": ["RS y"],
        "kn-": ["AR y", "A2A w"],
        "knm": ["RS y", "A2A w"],
        "knn": ["RS y", "A2A w"],
    },
}
KINDS = {
    "AG": "all-gather",
    "AR": "all-reduce",
    "RS": "reduce-scatter",
    "A2A": "all-to-all",
}


@pytest.mark.parametrize("target", ONE_SLICE)
def test_one_matmul_sharded_in_every_way(target: str) -> None:
    chip = chip_of(target)
    # XLA:CPU multiplies in float32, and converts before it communicates.
    itemsize = 4 if chip == "cpu" else 2
    sizes = {"x": ROWS * DEPTH, "w": DEPTH * COLUMNS, "y": ROWS * COLUMNS}
    for x in "-mk":
        for w in "-kn":
            for y in "-mn":
                ways = EMITTED.get(chip, {}).get(x + w + y, MATMUL.get(x + w + y, []))
                expected = []
                for way in ways:
                    verb, which = way.split()
                    size = sizes[which] * itemsize // (8 if verb == "A2A" else 1)
                    expected.append(row(KINDS[verb], ("fsdp",), 8, size))
                found = read(target, f"matmul x={x} w={w} y={y}", mesh_of(fsdp=8))
                assert rows(found) == sorted(expected), f"x={x} w={w} y={y}"
                assert not found.unread
                for collective in found.collectives:
                    assert collective.phase == "update"  # nothing here is differentiated
                    assert collective.source.startswith("golden/generate.py:")
                    assert collective.dtype == ("f32" if itemsize == 4 else "bf16")


@pytest.mark.parametrize("target", ONE_SLICE)
@pytest.mark.parametrize("axes", [("data",), ("fsdp",), ("data", "fsdp")], ids=",".join)
def test_collectives_written_by_hand(target: str, axes: tuple[str, ...]) -> None:
    mesh = mesh_of(data=2, fsdp=4)
    n = 1
    for axis in axes:
        n *= mesh.sizes[axis]
    local = 1024 // 8 * 128 * 4
    scatter = row("reduce-scatter", axes, n, local)
    if chip_of(target) == "v5p" and axes == ("data", "fsdp"):
        scatter = row("all-reduce", axes, n, local)  # as in EMITTED
    expected = {
        "psum": row("all-reduce", axes, n, local),
        "all_gather": row("all-gather", axes, n, local * n),
        "psum_scatter": scatter,
        "all_to_all": row("all-to-all", axes, n, local),
        "ppermute": row("collective-permute", axes, n, local),
    }
    for name, one in expected.items():
        found = read(target, f"{name} over {','.join(axes)}", mesh)
        assert rows(found) == [one], name
        assert not found.unread
        assert found.collectives[0].participants == n


@pytest.mark.parametrize("target", ONE_SLICE)
@pytest.mark.parametrize(
    ("program", "count", "depth"),
    [
        ("scan 4", 4, 1),
        ("scan 3 of scan 5", 15, 2),
        ("while by two below 9", 5, 1),  # the constant in its condition would say 9
        ("while halving from 64", 6, 1),
    ],
)
def test_loops_multiply(target: str, program: str, count: int, depth: int) -> None:
    found = read(target, program, mesh_of(fsdp=8))
    assert rows(found) == [row("all-reduce", ("fsdp",), 8, 65536, count)]
    assert found.collectives[0].loop_depth == depth
    assert not found.unread


@pytest.mark.parametrize("target", ONE_SLICE)
def test_what_depends_on_data_is_counted_once_and_said(target: str) -> None:
    for program, reason in {
        "while on data": "loop whose trip count is unknown; it is counted once",
        "branch": "in a branch of a conditional; it is counted as if always taken",
    }.items():
        found = read(target, program, mesh_of(fsdp=8))
        assert rows(found) == [row("all-reduce", ("fsdp",), 8, 65536)]
        assert len(found.unread) == 1 and found.unread[0].endswith(reason)


LAYERS, BATCH, WIDTH, HIDDEN, MICROBATCHES = 4, 4096, 512, 2048, 3


def totals(found: CollectiveList) -> dict[tuple[str, tuple[str, ...], str], tuple[int, int]]:
    """(S, wire bytes) of all executions by kind, axes and phase."""
    sums: dict[tuple[str, tuple[str, ...], str], tuple[int, int]] = {}
    for c in found.collectives:
        key = (c.kind, c.axes, c.phase)
        size, wire = sums.get(key, (0, 0))
        sums[key] = (size + c.bytes, wire + c.wire_bytes)
    return sums


@pytest.mark.parametrize("target", ONE_SLICE)
@pytest.mark.parametrize("microbatches", [1, MICROBATCHES])
def test_data_and_fsdp_steps(target: str, microbatches: int) -> None:
    """Data: gradients reduced, once a microbatch. FSDP with remat: two gathers and a scatter."""
    chip = chip_of(target)
    itemsize = 4 if chip == "cpu" else 2
    weights = 2 * WIDTH * HIDDEN * itemsize * LAYERS * microbatches
    name = "step" if microbatches == 1 else "microbatches"

    found = read(target, f"{name}, data", mesh_of(data=8))
    ring = weights * 7 // 8
    assert totals(found) == {("all-reduce", ("data",), "backward"): (weights, 2 * ring)}
    assert sum(c.count for c in found.collectives) in (
        LAYERS * microbatches, 2 * LAYERS * microbatches,
    )  # fmt: skip
    assert all(c.loop_depth == (1 if microbatches == 1 else 2) for c in found.collectives)

    found = read(target, f"{name}, fsdp", mesh_of(fsdp=8))
    reduction = ("reduce-scatter", ring)
    if chip in ("cpu", "v5p"):
        reduction = ("all-reduce", 2 * ring)  # as in EMITTED
    assert totals(found) == {
        ("all-gather", ("fsdp",), "forward"): (weights, ring),
        ("all-gather", ("fsdp",), "backward"): (weights, ring),
        (reduction[0], ("fsdp",), "backward"): (weights, reduction[1]),
    }
    gathers = sum(c.count for c in found.collectives if c.kind == "all-gather")
    # The GPU compiler combines a layer's two weights; a TPU repeats one in three fusions or more.
    assert gathers == 2 * LAYERS * microbatches * (1 if chip == "h100" else 2)
    assert not found.unread


@pytest.mark.parametrize("target", ONE_SLICE)
def test_tensor_steps(target: str) -> None:
    """One all-reduce of the activations a layer and direction, over the tensor axis."""
    chip = chip_of(target)
    itemsize = 4 if chip == "cpu" else 2
    found = read(target, "step, tensor", mesh_of(tensor=8))
    size = BATCH * WIDTH * itemsize * LAYERS
    once = (size, 2 * size * 7 // 8)
    assert totals(found) == {
        ("all-reduce", ("tensor",), "forward"): once,
        ("all-reduce", ("tensor",), "backward"): once,
    }
    found = read(target, "step, fsdp and tensor", mesh_of(fsdp=2, tensor=4))
    size //= 2
    weights = 2 * WIDTH * HIDDEN * itemsize * LAYERS // 4
    ring = weights // 2
    reduction = ("all-reduce", 2 * ring) if chip == "cpu" else ("reduce-scatter", ring)
    assert totals(found) == {
        ("all-reduce", ("tensor",), "forward"): (size, 2 * size * 3 // 4),
        ("all-reduce", ("tensor",), "backward"): (size, 2 * size * 3 // 4),
        ("all-gather", ("fsdp",), "forward"): (weights, ring),
        ("all-gather", ("fsdp",), "backward"): (weights, ring),
        (reduction[0], ("fsdp",), "backward"): (weights, reduction[1]),
    }
    assert not found.unread


@pytest.mark.parametrize("target", [t for t in TARGETS if t.startswith("v5e-four-slices")])
def test_between_four_slices_of_two_axes(target: str) -> None:
    """Two axes cross slices, one of them in part: the target of a send tells which."""
    mesh = MeshSpec((("data", 2), ("fsdp", 4), ("tensor", 2)), (("data", 2), ("fsdp", 2)))
    local = 2048 // 16 * 128 * 4
    data, fsdp, tensor = ("data",), ("fsdp",), ("tensor",)
    both, inner = ("data", "fsdp"), ("fsdp", "tensor")
    expected = {
        "psum over data": [row("all-reduce", data, 2, local)],
        "all_gather over data": [row("all-gather", data, 2, 2 * local)],
        "psum_scatter over data": [row("reduce-scatter", data, 2, local)],
        "psum over fsdp": [
            row("reduce-scatter", fsdp, 2, local, partial=True),
            row("all-reduce", fsdp, 2, local // 2, partial=True),
            row("all-gather", fsdp, 2, local, partial=True),
        ],
        "all_gather over fsdp": [
            row("all-gather", fsdp, 2, 2 * local, partial=True),
            row("all-gather", fsdp, 2, 4 * local, partial=True),
        ],
        "psum_scatter over fsdp": [
            row("all-reduce", fsdp, 2, local, partial=True),
            row("reduce-scatter", fsdp, 2, local // 2, partial=True),
        ],
        "psum over tensor": [row("all-reduce", tensor, 2, local)],
        "all_gather over tensor": [row("all-gather", tensor, 2, 2 * local)],
        "psum_scatter over tensor": [row("reduce-scatter", tensor, 2, local)],
        "psum over data,fsdp,tensor": [
            row("reduce-scatter", inner, 4, local, partial=True),
            row("all-reduce", both, 4, local // 4, partial=True),
            row("all-gather", inner, 4, local, partial=True),
        ],
        "all_gather over data,fsdp,tensor": [
            row("all-gather", both, 4, 4 * local, partial=True),
            row("all-gather", inner, 4, 16 * local, partial=True),
        ],
        "psum_scatter over data,fsdp,tensor": [
            row("all-reduce", inner, 4, local, partial=True),
            row("reduce-scatter", both, 4, local // 4, partial=True),
        ],
    }
    assert len(expected) == len(golden(target))
    for name, wanted in expected.items():
        found = read(target, f"{name} of data=2,fsdp=4,tensor=2", mesh, 4)
        assert rows(found) == sorted(wanted), name
        assert not found.unread


@pytest.mark.parametrize("target", [t for t in ONE_SLICE if t.startswith(("v5", "tpu"))])
def test_beside_a_pallas_kernel(target: str) -> None:
    """Its metadata holds line breaks and a closing brace; what follows it is not lost."""
    assert "\n}}" in golden(target)["kernel in scan 7"]
    found = read(target, "kernel in scan 7", mesh_of(fsdp=8))
    assert rows(found) == [row("all-reduce", ("fsdp",), 8, 65536, 7)]
    assert not found.unread


def test_asynchronous_fusions_are_counted_once() -> None:
    text = golden("v5e-jax0.10")["step, fsdp"]
    clones = re.findall(r" all-gather\([^\n]*async_collective_fusion_config", text)
    found = read("v5e-jax0.10", "step, fsdp", mesh_of(fsdp=8)).collectives
    fused = [c for c in found if "async collective fusion" in c.emitted]
    assert len(clones) >= 3 and len(fused) == 1
    assert fused[0].overlaps and fused[0].count == LAYERS


def test_two_fusions_with_one_channel_are_two() -> None:
    """Unrolling copies a chain with its channel and chain ids: what starts it is what counts."""
    text = golden("v5e-jax0.10")["step, fsdp"]
    start = re.search(r"\n  %\S+ = [^\n]* fusion\(%\S+\), kind=kCustom,[^\n]*calls=%(\S+),", text)
    names = re.findall(r"\n%(\S+) \([^\n]*\{\n(?:[^\n]+\n)*?[^\n]*AsyncCollectiveStart", text)
    assert start and names
    body = re.search(rf"\n(  %(\S+) = [^\n]*calls=%{re.escape(names[0])},[^\n]*)", text)
    computation = re.search(rf"\n%{re.escape(names[0])} \([^\n]*\{{\n(?:[^\n]+\n)*?\}}\n", text)
    assert body and computation
    copied = computation.group().replace(names[0], "copied_computation")
    again = body.group(1).replace(f"%{body.group(2)} ", "%copied ", 1)
    again = again.replace(names[0], "copied_computation")
    text = text.replace(computation.group(), computation.group() + copied, 1)
    text = text.replace(body.group(1), f"{body.group(1)}\n{again}", 1)
    found = collectives_of(parse_module(text), mesh_of(fsdp=8))
    fused = [c for c in found.collectives if "async collective fusion" in c.emitted]
    assert len(fused) == 2
    assert any("starts 8 and ends 4 times" in reason for reason in found.unread)


@pytest.mark.parametrize("target", [t for t in ONE_SLICE if chip_of(t) == "tpu7x"])
def test_sparse_core_calls_are_followed(target: str) -> None:
    (found,) = read(target, "scan 4", mesh_of(fsdp=8)).collectives
    assert found.emitted == "all-reduce in call-start (sparsecore)"
    assert found.overlaps is False  # only the loop's counter is added meanwhile
    found = read(target, "step, data", mesh_of(data=8)).collectives
    assert all(c.overlaps for c in found)


@pytest.mark.parametrize("target", [t for t in TARGETS if t.startswith("v5e-slices")])
def test_between_slices(target: str) -> None:
    """What crosses slices goes by send and recv; over both networks XLA uses each in turn."""
    data_fsdp, fsdp = mesh_of(data=2, fsdp=8), mesh_of(fsdp=16)
    local = 2048 // 16 * 128 * 4
    within, across = ("fsdp",), ("data",)
    shard = local // 8
    expected: dict[tuple[str, MeshSpec], list[Row]] = {
        ("psum over data", data_fsdp): [row("all-reduce", across, 2, local)],
        ("all_gather over data", data_fsdp): [row("all-gather", across, 2, 2 * local)],
        ("psum_scatter over data", data_fsdp): [row("reduce-scatter", across, 2, local)],
        ("psum over fsdp", data_fsdp): [row("all-reduce", within, 8, local)],
        ("all_gather over fsdp", data_fsdp): [row("all-gather", within, 8, 8 * local)],
        ("psum_scatter over fsdp", data_fsdp): [row("reduce-scatter", within, 8, local)],
        ("psum over data,fsdp", data_fsdp): [
            row("reduce-scatter", within, 8, local),
            row("all-reduce", across, 2, shard),
            row("all-gather", within, 8, local),
        ],
        ("all_gather over data,fsdp", data_fsdp): [
            row("all-gather", across, 2, 2 * local),
            row("all-gather", within, 8, 16 * local),
        ],
        # The slice's part is an all-reduce, not a reduce-scatter: twice the bytes.
        ("psum_scatter over data,fsdp", data_fsdp): [
            row("all-reduce", within, 8, local),
            row("reduce-scatter", across, 2, shard),
        ],
        ("psum over fsdp", fsdp): [
            row("reduce-scatter", within, 8, local, partial=True),
            row("all-reduce", within, 2, shard, partial=True),
            row("all-gather", within, 8, local, partial=True),
        ],
        ("all_gather over fsdp", fsdp): [
            row("all-gather", within, 2, 2 * local, partial=True),
            row("all-gather", within, 8, 16 * local, partial=True),
        ],
        ("psum_scatter over fsdp", fsdp): [
            row("all-reduce", within, 8, local, partial=True),
            row("reduce-scatter", within, 2, shard, partial=True),
        ],
    }
    assert len(expected) == len(golden(target))
    for (name, mesh), wanted in expected.items():
        found = read(target, f"{name} of {mesh}", mesh, 2)
        assert rows(found) == sorted(wanted), name
        assert not found.unread
        for collective in found.collectives:
            crosses = "megascale" in collective.emitted
            assert collective.participants == (2 if crosses else 8)
