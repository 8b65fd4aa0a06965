"""Windowed einsums are reported as what they implement, with the bytes that their permutes send."""

from __future__ import annotations

import pytest
from compiled_texts import ONE_SLICE, TARGETS, chip_of, mesh_of, read, row, rows


@pytest.mark.parametrize("target", [t for t in ONE_SLICE if chip_of(t) != "cpu"])
def test_windowed_einsums_are_what_they_implement(target: str) -> None:
    """v5e and v5p turn large matmuls into rings of permutes, which send 9 shards in place of 7.

    Both directions at once, two rounds of a loop that is unrolled by two, and one permute beside
    the loop: 2·4+1 shards.
    """
    sizes = {"gather w": 8192 * 8192 * 2, "gather x": 65536 * 8192 * 2}
    sizes["scatter y"] = sizes["gather x"]
    ring = {"v5e": set(sizes), "v5p": set(sizes), "tpu7x": {"gather w"}}.get(chip_of(target), set())
    for name, size in sizes.items():
        kind = "reduce-scatter" if name.startswith("scatter") else "all-gather"
        (found,) = read(target, f"large matmul, {name}", mesh_of(fsdp=8)).collectives
        sent = 9 if name in ring else 7
        assert (found.kind, found.axes, found.count) == (kind, ("fsdp",), 1)
        assert (found.bytes, found.wire_bytes) == (size, size // 8 * sent), name
        assert (found.emitted == "windowed einsum") == (name in ring)
        assert found.overlaps or name not in ring
        assert found.loop_depth == 0
    found = read(target, "large matmul, gather w of 4", mesh_of(data=2, fsdp=4))
    assert rows(found) == [row("all-gather", ("fsdp",), 4, sizes["gather w"])]


@pytest.mark.parametrize("target", [t for t in TARGETS if t.startswith("v5e-four-jax")])
def test_unrolled_windowed_einsums(target: str) -> None:
    """Over four chips the loops are unrolled: a gather sends 3 shards and a scatter 5.

    Both matmuls of a program are named alike, and are told apart by what goes round.
    """
    x, wide, narrow = 65536 * 8192 * 2, 8192 * 16384 * 2, 16384 * 4096 * 2
    gather, scatter = ("all-gather", 3), ("reduce-scatter", 5)
    expected = {
        "gather w": [(*gather, wide)],
        "scatter y": [(*scatter, 2 * x)],
        "gather both weights": [(*gather, wide), (*gather, narrow)],
        "gather x, scatter y": [(*gather, x), (*scatter, 65536 * 4096 * 2)],
    }
    for name, wanted in expected.items():
        found = read(target, f"four, {name}", mesh_of(fsdp=4))
        assert not found.unread
        assert [(c.emitted, c.count) for c in found.collectives] == [("windowed einsum", 1)] * len(
            wanted
        )
        assert sorted((c.kind, c.bytes, c.wire_bytes) for c in found.collectives) == sorted(
            (kind, size, size // 4 * sent) for kind, sent, size in wanted
        )
