"""The run folder: new names, refusals that overwrite nothing, resuming, and a disk that fails."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meshwright.models.config import named
from meshwright.sharding.errors import CheckpointError, RunError
from meshwright.train import runfolder
from meshwright.train.config import default_config
from meshwright.train.configfile import dump
from meshwright.train.runfolder import RunFolder, refuse, saved_steps

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """The folder of a run of `tiny` that has saved steps 60 and 120."""
    folder = RunFolder.open(str(tmp_path / "run"), "tiny", resume=False)
    folder.write_config(dump(default_config()))
    for name in ("60", "120", "180.orbax-checkpoint-tmp", "unusable-40"):
        (folder.checkpoints / name).mkdir(parents=True)
    return folder


# New folders


def test_new_runs_take_the_next_free_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for other in ("tiny-007", "tiny-large-050", "tiny-x", "gpt2-124m-099"):
        (tmp_path / "runs" / other).mkdir(parents=True)
    folders = [RunFolder.open(None, "tiny", resume=False) for _ in range(2)]
    assert [str(folder.path) for folder in folders] == ["runs/tiny-008", "runs/tiny-009"]
    assert str(RunFolder.open(None, "llama-1b", resume=False).path) == "runs/llama-1b-001"


def test_two_runs_started_at_once_get_two_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    RunFolder.open(None, "tiny", resume=False)
    monkeypatch.setattr(runfolder, "_numbers", lambda model_name: {})  # looked before it was made
    assert str(RunFolder.open(None, "tiny", resume=False).path) == "runs/tiny-002"


def test_a_given_folder_is_made_with_its_parents_and_may_be_empty(tmp_path: Path) -> None:
    first, folder = (
        RunFolder.open(str(tmp_path / "a" / "b"), "tiny", resume=False) for _ in range(2)
    )
    assert first == folder and folder.path.is_dir()
    assert folder.metrics == tmp_path / "a" / "b" / "metrics.jsonl"


def test_a_folder_with_another_run_is_refused_and_left_as_it_is(run: RunFolder) -> None:
    before = sorted(run.path.rglob("*"))
    with pytest.raises(RunError, match="it holds another run: checkpoints, config.yaml") as caught:
        RunFolder.open(str(run.path), "tiny", resume=False)
    assert "add --resume to go on with it, or use another --out" in str(caught.value)
    assert sorted(run.path.rglob("*")) == before


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / name).touch()
    with pytest.raises(RunError, match="it holds other files: a, b, c, d, …") as caught:
        RunFolder.open(str(tmp_path), "tiny", resume=False)
    assert caught.value.fix == "use another --out"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="there is a file of that name"):
        RunFolder.open(str(tmp_path / "file"), "tiny", resume=False)
    with pytest.raises(RunError, match="Not a directory"):
        RunFolder.open(str(tmp_path / "file" / "run"), "tiny", resume=False)


def test_a_parent_that_is_not_writable_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "mkdir", raising(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(RunError, match="Permission denied") as caught:
        RunFolder.open(str(tmp_path / "run"), "tiny", resume=False)
    assert "check that the folder is writable, or use another --out" in str(caught.value)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="cannot create the folder `runs`"):
        RunFolder.open(None, "tiny", resume=False)


def test_a_full_disk_is_said_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", raising(FULL))
    with pytest.raises(RunError, match=r"the disk is full: [\d.]+ \w+ are free"):
        RunFolder.open(str(tmp_path / "run"), "tiny", resume=False)


# The configuration


def test_a_configuration_is_written_whole_or_not_at_all(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run.config.read_text()
    monkeypatch.setattr(os, "fsync", raising(FULL))
    with pytest.raises(RunError, match="cannot write .*config.yaml`\n.*\n.*the disk is full"):
        run.write_config("steps: 1\n")
    assert run.config.read_text() == before
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "config.yaml"]


# Resuming


def test_a_run_with_checkpoints_is_resumed_in_place(run: RunFolder) -> None:
    resumed = RunFolder.open(str(run.path), "tiny", resume=True)
    assert resumed == run
    assert saved_steps(resumed.checkpoints) == [60, 120]


@pytest.mark.parametrize(("make", "why"), [(False, "there is no such folder"), (True, "no config")])
def test_resuming_needs_a_run(tmp_path: Path, make: bool, why: str) -> None:
    folder = tmp_path / "run"
    if make:
        folder.mkdir()
    with pytest.raises(RunError, match=rf"`{folder}` holds no run\n.*{why}"):
        RunFolder.open(str(folder), "tiny", resume=True)


def test_resuming_needs_a_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder.open(str(tmp_path / "run"), "tiny", resume=False)
    folder.write_config("steps: 1\n")
    with pytest.raises(CheckpointError, match="it has saved no checkpoint"):
        RunFolder.open(str(folder.path), "tiny", resume=True)


def test_resuming_without_a_name_suggests_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="add --out and the folder of the run"):
        RunFolder.open(None, "tiny", resume=True)
    for number in (2, 10):
        (tmp_path / "runs" / f"tiny-{number:03d}").mkdir(parents=True)
    with pytest.raises(RunError, match="add --out runs/tiny-010"):
        RunFolder.open(None, "tiny", resume=True)


def test_another_model_is_refused_with_the_fields_that_differ(run: RunFolder) -> None:
    tiny = named("tiny")
    run.check_model(tiny)
    run.check_model(dataclasses.replace(tiny, name="mine", remat="full"))
    other = dataclasses.replace(tiny, layers=tiny.layers + 1, tied=not tiny.tied)
    with pytest.raises(CheckpointError, match="with another model") as caught:
        run.check_model(other)
    assert caught.value.why == (
        f"layers {tiny.layers} there, {other.layers} here; tied {tiny.tied} there, "
        f"{other.tied} here"
    )
    with pytest.raises(CheckpointError, match="model tiny, and now model llama3-8b\n.* more"):
        run.check_model(named("llama3-8b"))


def test_a_configuration_that_was_damaged_is_no_traceback(run: RunFolder) -> None:
    run.config.write_text("model: [")
    with pytest.raises(RunError, match="cannot resume the run"):
        run.check_model(named("tiny"))
    run.config.write_text("modle: tiny\n")
    with pytest.raises(RunError, match="modle"):
        run.check_model(named("tiny"))


# Errors of other libraries


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        ValueError("RESOURCE_EXHAUSTED: Failed to write 821917 bytes: No space left on device"),
        RuntimeError("RESOURCE_EXHAUSTED: Failed to write [os_error_code='122']"),
    ],
)
def test_full_disks_are_known_in_any_wording(tmp_path: Path, error: Exception) -> None:
    refused = refuse("cannot write", tmp_path / "not" / "yet" / "there", error, needed=3 << 20)
    assert refused.why.startswith("the disk is full: it takes up to 3.0 MiB, ")
    assert refused.fix == "free some space and go on with --resume, or use another --out"


def test_other_failures_keep_their_first_line(tmp_path: Path) -> None:
    refused = refuse("cannot write", tmp_path, ValueError("checksum mismatch\nat 0x12"))
    assert refused.why == "checksum mismatch"
