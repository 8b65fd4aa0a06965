"""The guides under docs/adopt/: programs before and after run, and the lines added are counted."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

GUIDES = Path(__file__).resolve().parent.parent / "docs" / "adopt"
MOST_LINES = 10


def diff_of(page: Path) -> list[str]:
    (found,) = re.findall(r"^```diff\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return found.splitlines()


def program(diff: list[str], signs: str) -> str:
    return "".join(f"{line[1:]}\n" for line in diff if not line or line[0] in signs)


def added(diff: list[str]) -> int:
    return sum(line[0] == "+" and bool(line[1:].strip()) for line in diff if line)


def run(code: str, name: str) -> tuple[dict[str, object], list[float]]:
    said = io.StringIO()
    names: dict[str, object] = {"__name__": "guide"}
    with contextlib.redirect_stdout(said):
        exec(compile(code, name, "exec", dont_inherit=True), names)
    return names, [float(line) for line in said.getvalue().split()]


each_guide = pytest.mark.parametrize("name", ["nnx", "linen", "equinox", "plain"])


@pytest.mark.usefixtures("devices")
@each_guide
def test_both_programs_train(name: str) -> None:
    if name == "equinox":
        pytest.importorskip("equinox", reason="pip install 'meshwright[adoption]'")
    diff = diff_of(GUIDES / f"{name}.md")
    for signs in (" -", " +"):
        _, losses = run(program(diff, signs), f"{name}{signs}")
        assert len(losses) == 3 and losses[-1] < losses[0], (signs, losses)


@each_guide
def test_at_most_ten_lines_are_added_and_counted_rightly(name: str) -> None:
    count = added(diff_of(GUIDES / f"{name}.md"))
    assert count <= MOST_LINES
    row = re.search(rf"\]\({name}\.md\)[^\n]*\| (\d+) \|\n", (GUIDES / "index.md").read_text())
    assert row and int(row[1]) == count
