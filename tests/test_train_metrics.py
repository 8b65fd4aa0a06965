"""What a run tells programs and people while it goes on: metrics, progress, and stop signals."""

from __future__ import annotations

import builtins
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from meshwright.sharding.errors import MissingExtraError, RunError
from meshwright.train.metrics import Metrics, read_metrics
from meshwright.train.progress import Progress, format_record
from meshwright.train.stopping import StopSignals


def records(file: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]


# metrics.jsonl


def test_records_are_strict_json_and_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with Metrics(file) as metrics:
        metrics.write(10, {"loss": float("nan"), "grad_norm": float("-inf"), "tokens": 81920})
        assert records(file) == [{"step": 10, "loss": None, "grad_norm": None, "tokens": 81920}]
        metrics.write(20, {"loss": 2.5, "eval_loss": 2.75})
    assert records(file)[1] == {"step": 20, "loss": 2.5, "eval_loss": 2.75}


def test_a_resumed_run_makes_its_steps_again_and_has_none_twice(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with Metrics(file) as metrics:
        for step in (10, 20, 30):
            metrics.write(step, {"loss": step / 10})
    with file.open("a") as torn:
        torn.write('{"step": 40, "lo')
    with Metrics(file, resumed_step=20) as metrics:
        metrics.write(30, {"loss": 7.0})
    assert [(record["step"], record["loss"]) for record in records(file)] == [
        (10, 1.0),
        (20, 2.0),
        (30, 7.0),
    ]
    assert list(read_metrics(file)) == records(file)


def test_a_resumed_run_without_a_file_starts_one(tmp_path: Path) -> None:
    with Metrics(tmp_path / "metrics.jsonl", resumed_step=20) as metrics:
        metrics.write(21, {"loss": 1.0})
    assert len(records(tmp_path / "metrics.jsonl")) == 1


def test_a_step_logged_twice_is_our_bug(tmp_path: Path) -> None:
    with Metrics(tmp_path / "metrics.jsonl") as metrics:
        metrics.write(10, {})
        with pytest.raises(AssertionError, match="step 10 is logged after step 10"):
            metrics.write(10, {})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_a_full_disk_is_an_error_once(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with (
        pytest.raises(RunError, match=r"cannot write .*metrics.jsonl`\n.*\n.*the disk is full"),
        Metrics(tmp_path / "metrics.jsonl") as metrics,
    ):
        metrics.write(10, {"loss": 1.0})


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Is a directory"):
        Metrics(tmp_path)


# TensorBoard


def test_event_files_hold_the_finite_values(tmp_path: Path) -> None:
    with Metrics(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "tensorboard") as metrics:
        metrics.write(10, {"loss": 2.5, "grad_norm": float("nan")})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()
    assert b"grad_norm" not in events.read_bytes()


def test_without_tensorboardx_the_install_command_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importing = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tensorboardX":
            raise ImportError(name)
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtraError, match=r"pip install 'meshwright\[train\]'"):
        Metrics(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "tensorboard")
    Metrics(tmp_path / "metrics.jsonl").close()


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


RECORD = {
    "loss": 3.14159,
    "eval_loss": None,
    "grad_norm": 0.91234,
    "tokens_per_second": 51234.5,
    "step_seconds": 1.5,
    "flop_utilisation": None,
    "learning_rate": 1e-3,
}


def test_a_log_gets_one_plain_line_a_record() -> None:
    stream = io.StringIO()
    with Progress(120, stream=stream) as progress:
        progress.say("mesh data=2,fsdp=4")
        progress.advance(39)
        progress.show(40, RECORD)
    assert stream.getvalue() == (
        "mesh data=2,fsdp=4\n"
        "step  40/120  loss 3.1416  grad norm 0.912  51,234 tokens/s  2 min 0 s left\n"
    )


def test_a_terminal_gets_a_live_line_and_keeps_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress(120, start=20, stream=stream) as progress:
        progress.advance(39)
        progress.show(40, RECORD)
        progress.show(60, {**RECORD, "eval_loss": 3.0})
        progress.say("[saved] checkpoints/60")
    shown = stream.getvalue()
    assert "step  60/120  loss 3.1416  held-out 3.0000" in shown
    assert "[saved] checkpoints/60" in shown, "text in brackets is text, not markup"
    assert "\x1b[" in shown


def test_a_record_shows_what_is_known() -> None:
    assert format_record(1, 9, {}) == "step 1/9"
    assert format_record(9, 9, {"loss": float("nan")}) == "step 9/9  loss nan"
    assert format_record(3, 9, {"flop_utilisation": 0.5}).endswith("50.0% of peak")
    assert format_record(3, 9, {"step_seconds": float("inf")}).endswith("? left")


# Stop signals


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "interrupt"]
)
def test_a_signal_is_a_request_with_its_own_exit_code(number: signal.Signals, code: int) -> None:
    before = [signal.getsignal(watched) for watched in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as stop:
        assert (stop.requested, stop.exit_code) == (False, 0)
        signal.raise_signal(number)
        assert (stop.requested, stop.exit_code) == (True, code)
    assert (stop.requested, stop.exit_code) == (True, code), "readable after the loop"
    after = [signal.getsignal(watched) for watched in (signal.SIGTERM, signal.SIGINT)]
    assert after == before
    assert signal.set_wakeup_fd(-1) == -1


def test_the_first_signal_decides_and_repeated_sigterm_does_no_harm() -> None:
    with StopSignals() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert stop.exit_code == 143


def test_outside_of_the_main_thread_nothing_is_watched() -> None:
    codes: list[int] = []

    def run() -> None:
        with StopSignals() as stop:
            codes.append(stop.exit_code)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [0]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_ends_a_process_that_is_stuck() -> None:
    # Waiting in C for a signal that never comes stands for a collective that never returns.
    program = """
        import signal
        from meshwright.train.stopping import StopSignals
        with StopSignals():
            print("ready", flush=True)
            signal.sigwait([signal.SIGUSR1])
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGINT)
    seen = [process.stderr.readline() for _ in range(2)]
    assert seen[1] == "SIGINT: finishing this step, then saving; Ctrl-C again stops at once\n"
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "\nstopped at once, without saving\n"
