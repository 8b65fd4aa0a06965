"""Compiled texts that tests read, and collectives in the form that tests compare them.

The texts are those of `tests/golden/generate.py`: one file for a target and a line of jax.
"""

from __future__ import annotations

import functools
import json
import lzma
from pathlib import Path
from typing import Any

from meshwright.sharding.aot_program import CompiledProgram
from meshwright.sharding.collectives import CollectiveList, collectives_of
from meshwright.sharding.hlo import parse_module
from meshwright.sharding.mesh import MeshSpec

GOLDEN = Path(__file__).resolve().parent / "golden"
TARGETS = sorted(path.name.removesuffix(".json.xz") for path in GOLDEN.glob("*.json.xz"))
# Eight devices: the targets that all programs but those over slices were compiled for.
ONE_SLICE = [target for target in TARGETS if "slices" not in target and "four" not in target]

_GIB = 2**30
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


def program(text: str | None, **changes: Any) -> CompiledProgram:
    """A program with this text that takes 3 GiB, an input of 1 GiB among them, unless changed."""
    fields: dict[str, Any] = {
        "argument_bytes": _GIB,
        "output_bytes": _GIB,
        "alias_bytes": _GIB,
        "temp_bytes": 3 * _GIB,
        "peak_bytes": 3 * _GIB,
        "generated_code_bytes": 0,
        "compile_seconds": 1.0,
        "lower_seconds": 0.5,
        "versions": {"jax": "0.10.2", "libtpu": "0.0.42"},
    }
    return CompiledProgram(text, **{**fields, **changes})
