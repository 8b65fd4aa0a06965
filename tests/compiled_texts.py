"""Compiled texts that tests read, and collectives in the form that tests compare them.

The texts are those of `tests/golden/generate.py`: one file for a target and a line of jax.
"""

from __future__ import annotations

import functools
import json
import lzma
from pathlib import Path

from meshwright.sharding.collectives import CollectiveList, collectives_of
from meshwright.sharding.hlo import parse_module
from meshwright.sharding.mesh import MeshSpec

GOLDEN = Path(__file__).resolve().parent / "golden"
TARGETS = sorted(path.name.removesuffix(".json.xz") for path in GOLDEN.glob("*.json.xz"))
# Eight devices: the targets that all programs but those over slices were compiled for.
ONE_SLICE = [target for target in TARGETS if "slices" not in target and "four" not in target]

# One collective as the tests compare it: kind, axes, partial, count, S, wire bytes in all.
Row = tuple[str, tuple[str, ...], bool, int, int, int]


@functools.cache
def golden(target: str) -> dict[str, str]:
    """Program texts of one compiler, by name."""
    return json.loads(lzma.decompress(GOLDEN.joinpath(f"{target}.json.xz").read_bytes()))


def chip_of(target: str) -> str:
    return target.split("-")[0]


def mesh_of(**sizes: int) -> MeshSpec:
    return MeshSpec(tuple(sizes.items()))


@functools.cache
def read(target: str, program: str, mesh: MeshSpec, slices: int = 1) -> CollectiveList:
    return collectives_of(parse_module(golden(target)[program]), mesh, slices=slices)


def rows(found: CollectiveList) -> list[Row]:
    return sorted(
        (c.kind, c.axes, c.partial, c.count, c.bytes // c.count, c.wire_bytes)
        for c in found.collectives
    )


def row(
    kind: str, axes: tuple[str, ...], n: int, size: int, count: int = 1, partial: bool = False
) -> Row:
    """A collective by its closed form: ρS, 2ρS for an all-reduce, S for a permute."""
    wire = {"all-reduce": 2 * size * (n - 1) // n, "collective-permute": size}.get(
        kind, size * (n - 1) // n
    )
    return kind, axes, partial, count, size, wire * count
