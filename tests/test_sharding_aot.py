"""Children that compile: every way one can end, what crosses, what is left behind.

The functions called ``job_...`` run in the child, which imports this file: it must stay cheap.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from meshwright.sharding.aot import ChildResult, child_environment, run_child
from meshwright.sharding.aot_child import _tpu_options
from meshwright.sharding.aot_errors import CompileError
from meshwright.sharding.errors import MeshError
from meshwright.sharding.topology import Topology


def job_echo(payload: Any, devices: list[Any]) -> Any:
    return payload, len(devices)


def job_signal(payload: int, devices: list[Any]) -> None:
    os.kill(os.getpid(), payload)


def job_exit(payload: int, devices: list[Any]) -> None:
    os._exit(payload)


def job_last_words(payload: str, devices: list[Any]) -> None:
    os.write(2, payload.encode())
    os.abort()


def job_raise(payload: Exception, devices: list[Any]) -> None:
    raise payload


class _Unpicklable(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__("cannot cross")


def job_raise_unpicklable(payload: None, devices: list[Any]) -> None:
    raise _Unpicklable(1, 2)


def job_loud(payload: int, devices: list[Any]) -> str:
    print("first line")
    sys.stdout.flush()
    for _ in range(payload // 1000):
        os.write(2, b"x" * 999 + b"\n")  # as C++ writes
    os.write(1, b"last line\n")
    return "done"


def job_sleep(payload: str, devices: list[Any]) -> None:
    helper = subprocess.Popen(["sleep", "100"])
    partial = Path(payload + ".partial")
    partial.write_text(f"{os.getpid()} {helper.pid}")
    partial.rename(payload)
    time.sleep(100)


def job_environment(payload: None, devices: list[Any]) -> dict[str, str]:
    return dict(os.environ)


@pytest.fixture(autouse=True)
def leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Temporary files of every test go to one folder, which is empty in the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


def call(job: str, payload: Any = None, timeout: float = 60.0) -> ChildResult:
    name = f"{__name__}:job_{job}"
    return run_child(name, payload, topology=None, timeout_seconds=timeout)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def gone(pids: list[int]) -> bool:
    for _ in range(100):
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def pids_in(path: Path) -> list[int]:
    for _ in range(400):
        if path.exists():
            return [int(word) for word in path.read_text().split()]
        time.sleep(0.05)
    raise AssertionError("the child never started")


def test_value_comes_back() -> None:
    done = call("echo", {"a": (1, b"\0")})
    assert done.value == ({"a": (1, b"\0")}, 0)
    assert done.chatter == ""
    assert 0 < done.seconds < 60


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (signal.SIGFPE, "SIGFPE; it divides by zero"),
        (signal.SIGSEGV, "SIGSEGV"),
        (signal.SIGKILL, "SIGKILL: most likely this machine ran out of memory"),
    ],
)
def test_killed_by_a_signal(number: int, says: str) -> None:
    with pytest.raises(CompileError, match=says) as caught:
        call("signal", int(number))
    assert caught.value.failure == "signal"
    assert caught.value.exit_code == 2


def test_an_abort_is_reported_with_its_last_words() -> None:
    said = "I1121 1:2:3.4 5 a.cc:1] fine\nF1121 12:08:03.479839   12574 f.cc:234] Check failed: x\n"
    with pytest.raises(CompileError, match=r"SIGABRT: Check failed: x$") as caught:
        call("last_words", said)
    assert said in caught.value.chatter


def test_a_flag_that_is_not_known_is_named() -> None:
    said = "F1121 12:08:03.479839   12574 f.cc:234] Unknown flag in XLA_FLAGS: --xla_nonsense=1\n"
    with pytest.raises(CompileError, match=r"--xla_nonsense=1\n  fix:   take that flag out of XLA"):
        call("last_words", said)


@pytest.mark.parametrize("code", [0, 3])
def test_an_exit_without_an_answer(code: int) -> None:
    with pytest.raises(CompileError) as caught:
        call("exit", code)
    assert caught.value.failure == "silence"
    assert ("exit code 3" if code else "without an answer") in str(caught.value)


def test_an_exception_is_named_without_its_traceback() -> None:
    with pytest.raises(CompileError, match="why:   ZeroDivisionError: no way$") as caught:
        call("raise", ZeroDivisionError("no way\nand more"))
    assert "Traceback" not in str(caught.value)
    assert "in job_raise" in caught.value.chatter
    with pytest.raises(CompileError, match="_Unpicklable: cannot cross"):
        call("raise_unpicklable")


def test_our_own_errors_cross_as_they_are() -> None:
    sent = MeshError("what", where="here", why="because", fix="do")
    with pytest.raises(MeshError) as caught:
        call("raise", sent)
    assert str(caught.value) == str(sent)
    assert (caught.value.what, caught.value.fix) == ("what", "do")
    refusal = CompileError("what", failure="refused", why="because", chatter="long")
    with pytest.raises(CompileError) as again:
        call("raise", refusal)
    assert (again.value.failure, again.value.chatter) == ("refused", "long")
    assert str(again.value) == str(refusal)


def test_output_beyond_a_pipe_does_not_block() -> None:
    done = call("loud", 3_000_000)
    assert done.value == "done"
    assert done.chatter.startswith("first line\n")
    assert done.chatter.endswith("last line\n")
    assert "bytes left out" in done.chatter
    assert len(done.chatter) < 1_100_000


def test_timeout_kills_the_whole_group(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="longer than 2 s") as caught:
        call("sleep", str(tmp_path / "pids"), timeout=2.0)
    assert caught.value.failure == "timeout"
    assert gone(pids_in(tmp_path / "pids"))


def test_interrupt_kills_the_child_and_goes_on(tmp_path: Path) -> None:
    def interrupt() -> None:
        pids_in(tmp_path / "pids")
        os.kill(os.getpid(), signal.SIGINT)

    waiter = threading.Thread(target=interrupt)
    waiter.start()
    with pytest.raises(KeyboardInterrupt):
        call("sleep", str(tmp_path / "pids"))
    waiter.join()
    assert gone(pids_in(tmp_path / "pids"))


@pytest.mark.skipif(sys.platform != "linux", reason="dying with the parent is Linux's")
def test_child_dies_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    program = (
        "from meshwright.sharding.aot import run_child\n"
        f"run_child('{__name__}:job_sleep', {str(tmp_path / 'pids')!r}, topology=None,"
        " timeout_seconds=60)"
    )
    environment = child_environment(tmp_path)
    parent = subprocess.Popen([sys.executable, "-c", program], env=environment)
    pids = pids_in(tmp_path / "pids")
    parent.kill()
    parent.wait()
    assert gone(pids[:1])
    os.kill(pids[1], signal.SIGKILL)  # the child's own child is nobody's now


def test_environment_is_the_childs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/x --xla_tpu_y=1 --xla_gpu_autotune_level=0")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("TPU_WORKER_ID", "7")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "4")
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/my/libtpu.so")
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    seen = call("environment").value
    assert seen["XLA_FLAGS"] == "--xla_dump_to=/x --xla_gpu_autotune_level=0"
    assert (seen["JAX_PLATFORMS"], seen["TPU_WORKER_ID"]) == ("cpu", "0")
    assert (seen["TPU_LIBRARY_PATH"], seen["JAX_ENABLE_X64"]) == ("/my/libtpu.so", "1")
    assert seen["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    assert seen["JAX_ENABLE_COMPILATION_CACHE"] == "false"
    assert "MEGASCALE_NUM_SLICES" not in seen
    assert seen["TMPDIR"] == seen["TPU_LOG_DIR"]  # libtpu's logs go with the rest
    assert Path(seen["TMPDIR"]).parent == Path(tempfile.gettempdir())
    assert os.environ["JAX_PLATFORMS"] == "cuda"


def test_a_child_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(CompileError, match="/no/such/python") as caught:
        call("echo")
    assert caught.value.failure == "start"


@pytest.mark.parametrize(
    ("topology", "options"),
    [
        ("v5e:4x4", {}),
        ("v5e:1x1", {"chips_per_host_bounds": (1, 1, 1)}),
        ("v4:2x2x1", {"chip_config_name": "megacore"}),
        ("v5p:1x1x1", {"chips_per_host_bounds": (1, 1, 1)}),
        ("v6e:1x2", {"chips_per_host_bounds": (1, 2, 1)}),
    ],
)
def test_parts_of_a_host_have_their_own_bounds(topology: str, options: dict[str, Any]) -> None:
    assert _tpu_options(Topology.parse(topology)) == options
