"""`meshwright explain` on files: the page agrees with the document, and bad names are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pages import Outline

from meshwright.scripts.main import main

WORDS = ["explain", "--topology", "cpu:8", "--mesh", "data=2,fsdp=2,tensor=2", "--zero", "1"]


def test_the_page_agrees_with_the_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    html, other = tmp_path / "d.html", tmp_path / "d.json"
    assert main([*WORDS, "--html", str(html), "--json", str(other)]) == 0
    told = json.loads(other.read_text(encoding="utf-8"))
    read = json.loads(Outline(html.read_text(encoding="utf-8")).texts["decisions-data"])
    assert (read["title"], read["topology"], read["mesh"]) == ("tiny", "cpu:8", told["mesh"])
    assert [table["name"] for table in read["tables"]] == [
        "params", "gradients", "optimizer", "optimizer state",
    ]  # fmt: skip
    parameters, state = read["groups"]
    for leaf, decision in zip(parameters["leaves"], told["decisions"], strict=True):
        assert leaf["path"] == decision["path"]
        specs = [read["layouts"][index]["spec"] for index in leaf["layouts"]]
        assert specs == list(decision["specs"].values())
    assert [leaf["path"] for leaf in state["leaves"]] == [
        d["path"] for d in told["optimizer_state"]
    ]
    held = {part["name"]: part["bytes"] for part in read["holds"]}
    assert held["together"] == told["per_device"]["state_bytes"]
    assert held["optimizer"] == read["tables"][3]["bytes_per_device"]
    assert "a device holds:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--html", "nowhere/d.html"], "there is no folder `nowhere`"),
        (["--json", "nowhere/d.json"], "there is no folder `nowhere`"),
        (["--html", "."], "it is a folder"),
        (["--html", "d", "--json", "d"], "cannot write --html and --json to the same file"),
    ],
)
def test_files_that_cannot_be_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*WORDS, *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: cannot write") and said in err and "fix:" in err
    assert err.count("\n") <= 4 and os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_an_error_of_four_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--html", "/dev/full"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: cannot write `/dev/full`") and "No space left" in err
