"""The README is true: its Python runs, its commands parse, its file tree is the checkout's."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from meshwright.scripts import explain, plan
from meshwright.scripts.flags import read
from meshwright.scripts.main import VERBS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = "".join(blocks("bash")).splitlines()
    return [line for line in lines if line.startswith("meshwright ")]


@pytest.mark.usefixtures("devices")
def test_python_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("python")
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 5 and losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, verb, *words = shlex.split(command)
    assert verb in VERBS
    if verb in ("train", "explain", "plan"):
        options = {"plan": plan.OPTIONS, "explain": explain.OPTIONS}.get(verb, ())
        read(words, verb, options=options)


def test_the_two_commands_come_first() -> None:
    first, second, *_ = blocks("bash")
    assert first.strip() == "pip install -e '.[train]' && meshwright train"
    assert second.strip() == "pip install -e '.[test]' && pytest -n auto --dist worksteal"


@pytest.mark.parametrize("room", ["sharding", "models", "train", "scripts"])
def test_file_tree_has_each_file_with_its_first_line(room: str) -> None:
    tree = next(block for block in blocks("text") if "sharding/_root/" in block)
    shown = dict(re.findall(r"^  (\S+\.py) +(.*)$", _part(tree, room), flags=re.MULTILINE))
    expected = {}
    for path in sorted(ROOT.joinpath(room).glob("*.py")):
        if path.stem != "__init__":
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            expected[path.name] = docstring.splitlines()[0].rstrip(".")
    assert shown == expected


def _part(tree: str, room: str) -> str:
    start = tree.index(f"{room}/")
    found = re.search(r"\n\S", tree[start:])
    return tree[start : start + found.start()] if found else tree[start:]
