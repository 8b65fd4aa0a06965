"""`meshwright train` as two processes: losses and checkpoints as with one, and no hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import Runs
from test_train_batches import numbered
from together import Ended, run_together

from meshwright.train.batches import Batches, heldout_batches

STEPS, MORE = 4, 6
# Sixteen rows in two microbatches: each process has four of the eight rows of each.
SETTINGS: dict[str, Any] = {
    "topology": "cpu:8",
    "mesh": "fsdp=8",
    "model__layers": 1,
    "batch_size": 16,
    "grad_accum": 2,
    "steps": STEPS,
    "eval_every": 2,
    "checkpoint_every": 2,
    "tensorboard": None,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("processes"))


def by_two(*words: list[str], **options: Any) -> list[Ended]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
        both = words if len(words) == 2 else [words[0], words[0]]
        return run_together(both, within_seconds=90, **options)


@pytest.fixture(scope="module")
def two(runs: Runs) -> list[Ended]:
    return by_two(runs.words("two", **SETTINGS))


@pytest.fixture(scope="module")
def one(runs: Runs) -> Path:
    ran = runs("one", **SETTINGS)
    assert ran.code == 0, ran.err
    return ran.folder


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path, name: str = "loss") -> list[float]:
    return [record[name] for record in records(folder) if name in record]


def test_two_processes_train_as_one(runs: Runs, two: list[Ended], one: Path) -> None:
    assert [process.code for process in two] == [0, 0], two[0].err + two[1].err
    folder = runs.root / "two"
    assert len(losses(folder)) == STEPS
    np.testing.assert_allclose(losses(folder), losses(one), rtol=1e-6)
    np.testing.assert_allclose(losses(folder, "eval_loss"), losses(one, "eval_loss"), rtol=1e-6)


def test_only_process_0_speaks(two: list[Ended]) -> None:
    zero, other = two
    assert zero.document["steps"] == STEPS
    assert "8 simulated CPU devices in 2 processes" in zero.err
    said = [line for line in other.out.splitlines() if not line.startswith("[Gloo]")]
    assert not said and not other.err.strip()


def test_one_process_goes_on_from_two(runs: Runs, two: list[Ended], one: Path) -> None:
    del two
    for name in ("two", one.name):
        ran = runs.resume(name, steps=MORE)
        assert ran.code == 0, ran.err
    assert len(losses(one)) == MORE
    np.testing.assert_allclose(losses(runs.root / "two"), losses(one), rtol=1e-6)


def test_two_processes_go_on_from_one_until_one_gets_a_signal(
    runs: Runs, two: list[Ended], one: Path
) -> None:
    del two
    ran = runs("shorter", **{**SETTINGS, "steps": 2})
    assert ran.code == 0, ran.err

    def stop_one(processes: list[subprocess.Popen[str]]) -> None:
        while len(losses(ran.folder)) < STEPS and processes[0].poll() is None:
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGTERM)

    words = ["train", "--resume", "--out", str(ran.folder), "--steps", "10000"]
    ended = by_two(words, meanwhile=stop_one)
    assert [process.code for process in ended] == [143, 143], ended[0].err + ended[1].err
    assert "resumed at step 2" in ended[0].err
    np.testing.assert_allclose(losses(ran.folder)[:STEPS], losses(one)[:STEPS], rtol=1e-6)
    assert ended[0].document["checkpoint"].endswith(f"/{len(losses(ran.folder))}")


def test_an_error_of_one_process_ends_both(runs: Runs) -> None:
    absent = str(runs.root / "absent.txt")
    good, bad = (
        runs.words("bad", **SETTINGS),
        runs.words("bad", **{**SETTINGS, "data__path": absent}),
    )
    zero, one = by_two(good, bad)
    assert (zero.code, one.code) == (2, 2)
    assert "process 0 of 2: stopping, because process 1 failed: DataError" in zero.err
    assert "absent.txt" in one.err and "Traceback" not in one.err


def test_processes_of_different_runs_are_refused(runs: Runs) -> None:
    zero, one = by_two(
        runs.words("mixed", **SETTINGS), runs.words("mixed", **{**SETTINGS, "steps": 9})
    )
    assert (zero.code, one.code) == (2, 2)
    assert "process 1 was not started for the same run as process 0" in one.err
    assert "steps is 9 here" in one.err


# The order of the data, which is where processes usually lose rows


def whole(parts: list[dict[str, np.ndarray]], microbatches: int) -> list[list[int]]:
    """First tokens of the rows of each microbatch of the batch that these parts make."""
    cut = [np.split(part["tokens"][:, 0], microbatches) for part in parts]
    return [np.concatenate([part[m] for part in cut]).tolist() for m in range(microbatches)]


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_the_same_batches_on_two_then_one_then_two_processes(microbatches: int) -> None:
    source = numbered(37)
    expected = Batches(source, 8, seed=5)
    state: dict[str, Any] | None = None
    for processes in (2, 1, 2, 4 if microbatches < 4 else 1):
        readers = [
            Batches(
                source, 8, seed=5, process_index=index, process_count=processes,
                microbatches=min(microbatches, 8 // processes),
            )
            for index in range(processes)
        ]  # fmt: skip
        for reader in readers:
            if state is not None:
                reader.restore(state)
        for _ in range(3):  # crosses the end of an epoch of 37 rows
            parts = whole([next(reader) for reader in readers], microbatches)
            rows = next(expected)["tokens"][:, 0].tolist()
            assert sum(parts, []) == rows
        states = [reader.state() for reader in readers]
        assert all(each == expected.state() for each in states)
        state = states[0]
        for reader in readers:
            reader.close()
    expected.close()


def test_heldout_rows_of_two_processes_are_those_of_one() -> None:
    source = numbered(21)
    alone = [whole([batch], 2) for batch in heldout_batches(source, 8, microbatches=2)]
    readers = [
        heldout_batches(source, 8, process_index=p, process_count=2, microbatches=2)
        for p in range(2)
    ]
    assert [whole(list(parts), 2) for parts in zip(*readers, strict=True)] == alone
