"""The table of every composition against one device, written by the tests that hold them.

A test that held compositions leaves their rows in its report, which other processes send too.
``pytest --parity-table FILE`` puts the rows of all tests that passed into a Markdown page, in the
place of those rows that it has of the same compositions; the others stay, so that a page can come
from several runs. The page in the documentation is one of these, and a test reads it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROPERTY = "parity"

HEAD = """# Parity with one device

Compositions of parallelisms on simulated devices, of a small model in float32: the largest
difference of the first step's gradients from one device's, over the leaf's largest entry, and the
largest relative difference of ten losses. Both must be below 1e-05. Gradients are clipped, rows
have very different weights, initial values are equal bit by bit. No composition is refused; of
settings, `--model.remat offload` is in a pipeline.

The tests that hold them write this page, and one checks that it lists them all: `pytest
tests/test_train_compositions.py --all-compositions --parity-table docs/strategies/parity.md`.

| model | composition | mesh and settings | gradients | losses |
| --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True, order=True)
class Row:
    """One composition.

    Attributes:
        model: ``dense``, ``mixture`` or ``dropless mixture``.
        composition: the names of its ways.
        case: mesh and settings.
        gradient, loss: differences from one device.
    """

    model: str
    composition: str
    case: str
    gradient: float
    loss: float

    @property
    def key(self) -> tuple[str, str, str]:
        return self.model, self.composition, self.case

    def __str__(self) -> str:
        numbers = f"{self.gradient:.1e} | {self.loss:.1e}"
        return f"| {self.model} | {self.composition} | `{self.case}` | {numbers} |"


def rows_of(reports: Iterable[Any]) -> list[Row]:
    """What tests left in their reports."""
    left = (pair for report in reports for pair in report.user_properties)
    return [Row(*row) for name, rows in left if name == PROPERTY for row in rows]


def read(page: Path) -> list[Row]:
    """The rows of a page; none where there is no page."""
    lines = page.read_text().splitlines() if page.exists() else []
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [
        Row(model, composition, case.strip("`"), float(gradient), float(loss))
        for model, composition, case, gradient, loss in (row for row in cells if len(row) == 5)
        if case.startswith("`")
    ]


def write(page: Path, rows: Sequence[Row]) -> None:
    """Put rows into a page, in the place of older ones."""
    found = {row.key: row for row in [*read(page), *rows]}
    ordered = sorted(found.values(), key=lambda row: (row.model, len(row.composition.split()), row))
    page.write_text(HEAD + "".join(f"{row}\n" for row in ordered))
