"""The pages under docs/: their commands parse, their code runs, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from meshwright.scripts.flags import parse
from meshwright.train.run_plan import RunPlan

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
COMMANDS = [
    (page, line)
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    for line in block.splitlines()
]
SNIPPETS = [
    (page, block)
    for page in PAGES
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
]


def name(value: object) -> str:
    return value.stem if isinstance(value, Path) else ""


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=name)
def test_commands_are_resolved(page: Path, line: str) -> None:
    del page
    program, verb, *flags = shlex.split(line)
    assert program == "meshwright" and verb in ("train", "plan")
    config = parse(flags, verb)
    if config.topology == "auto":
        flags += ["--topology", "cpu:8"]
    RunPlan.of(parse(flags, verb))


@pytest.mark.parametrize(("page", "code"), SNIPPETS, ids=name)
def test_code_runs(page: Path, code: str) -> None:
    del page
    exec("from meshwright.sharding import *\n" + code, {})  # pages of one topic import once


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target
