"""Compiling for hardware that is not here, in a child process that cannot take the caller along.

A compiler for absent hardware wants environment variables before it loads, takes a lock file,
writes to file descriptors behind Python's back, and on a bad day divides by zero, aborts on a
failed check or eats the machine's memory. All of that stays in a child: `run_child` starts
``python -m meshwright.sharding.aot_child``, hands it a job and devices of the topology, and comes
back with the job's value or with one error that says how it ended. It never hangs (there is a
time limit, and the child's whole process group is killed with it), leaves no zombie and no file.

What crosses is a pickle each way, in a folder that only this user can open. The child's stdout
and stderr are one file, so that a compiler that writes more than a pipe holds cannot block.

A pool of warm children was rejected: a start costs about a second against the tens that a compile
takes, and a compiler that has failed once is not to be trusted with the next program. So was a
thread: it shares the environment and the signals.

This module and its neighbours import jax only inside functions, for the parent is often a command
line that has nothing else to do with jax.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.sharding.aot_errors import CompileError
from meshwright.sharding.errors import MeshwrightError
from meshwright.sharding.topology import Topology

__all__ = ["ANSWER", "JOB", "ChildResult", "Raised", "child_environment", "run_child"]

JOB, ANSWER = "job.pickle", "answer.pickle"
"""Names of the two files by which parent and child talk."""

_CHATTER = "chatter.txt"
_MOST_CHATTER_BYTES = 1 << 20
_CHILD = {
    "JAX_PLATFORMS": "cpu",
    # jax writes cache entries for absent hardware, and can never read one back.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any valid one will do, whatever the topology
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # without it a second plan at the same time aborts
    "CUDA_VISIBLE_DEVICES": "",  # a plan does not depend on the GPU it happens to be made on
}
# Settings that describe this machine, or that would change what a compile means.
_DROPPED = re.compile(
    r"(TPU_(?!LIBRARY_PATH)|MEGASCALE_|CLOUD_TPU_|JAX_COMPILATION_CACHE|JAX_DISABLE_JIT"
    r"|JAX_DISABLE_MOST_OPTIMIZATIONS|JAX_NUM_CPU_DEVICES|JAX_COORDINATOR|PYTHON(WARNINGS|INSPECT|BREAKPOINT))"
)
# jaxlib aborts on flags of libtpu's, which belong in LIBTPU_INIT_ARGS; the number of simulated
# devices is the topology's.
_BAD_XLA_FLAG = re.compile(r"--(xla_tpu_|megascale_|xla_force_host_platform_device_count\b)")


@dataclass(frozen=True)
class ChildResult:
    """What a child came to.

    Attributes:
        value: what the job returned.
        chatter: what it and the compiler wrote to stdout and stderr; the middle of more than a
            megabyte is left out.
        seconds: from before the start of the child to its end.
    """

    value: Any
    chatter: str
    seconds: float


@dataclass(frozen=True)
class Raised:
    """An exception on its way from child to parent, as text but for meshwright's own.

    Attributes:
        error: a `MeshwrightError`, or None for any other.
        kind: class name.
        message: its text.
        traceback: for the chatter, never shown.
    """

    error: MeshwrightError | None
    kind: str
    message: str
    traceback: str


def child_environment(folder: Path) -> dict[str, str]:
    """The child's environment: this one, less what describes this machine, plus what compiling
    for another needs.

    XLA_FLAGS and LIBTPU_INIT_ARGS stay, for they choose how to compile, but for flags in
    XLA_FLAGS on which jaxlib aborts. The child finds modules where this process does.

    Args:
        folder: for temporary files and for libtpu's logs, which it writes on every start.
    """
    kept = {name: value for name, value in os.environ.items() if not _DROPPED.match(name)}
    flags = [word for word in kept.get("XLA_FLAGS", "").split() if not _BAD_XLA_FLAG.match(word)]
    kept.pop("XLA_FLAGS", None)
    if flags:
        kept["XLA_FLAGS"] = " ".join(flags)
    kept["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return {**kept, **_CHILD, "TMPDIR": str(folder), "TPU_LOG_DIR": str(folder)}


def run_child(
    job: str, payload: Any, *, topology: Topology | None, timeout_seconds: float
) -> ChildResult:
    """Call a function in a child process, with devices of hardware that is not here.

    Args:
        job: ``module:function``; called in the child as ``function(payload, devices)``.
        payload: anything that pickles.
        topology: whose devices to make; None for an empty list (and no import of jax).
        timeout_seconds: after which the child is killed.

    Returns:
        What the function returned, with what was written meanwhile.

    Raises:
        CompileError: killed by a signal, out of time, an exception, no answer; ``chatter`` holds
            what was written.
        MeshwrightError: one that the function raised, as it was.
        KeyboardInterrupt: after the child was killed.
    """
    started = time.monotonic()
    work = pickle.dumps((job, payload, topology))
    folder = _folder(work, topology)
    try:
        code = _wait(folder, topology, timeout_seconds)
        chatter = _chatter(folder)
        if code != 0:
            raise _died(code, chatter, topology)
        value = _answer(folder, chatter, topology)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if isinstance(value, Raised):
        raise value.error or _raised(value, chatter, topology)
    return ChildResult(value, chatter, time.monotonic() - started)


def _folder(work: bytes, topology: Topology | None) -> Path:
    """A folder for one child, with its job in it."""
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="meshwright-"))  # mode 700
        (folder / JOB).write_bytes(work)
    except OSError as error:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        why = f"its {len(work):,} bytes of work cannot be written to a temporary folder: {error}"
        raise _failed(topology, "start", why, "free some space, or set TMPDIR") from None
    return folder


def _wait(folder: Path, topology: Topology | None, timeout_seconds: float) -> int:
    """Start the child, wait for it and return its exit code; below 0 for a signal."""
    if not sys.executable:
        raise _failed(topology, "start", "this Python does not know its own executable")
    # -P: the folder a user happens to stand in must not shadow modules the parent has.
    command = [sys.executable, "-P", "-X", "faulthandler"]
    command += ["-m", "meshwright.sharding.aot_child", str(folder)]
    with (folder / _CHATTER).open("wb") as chatter:
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=chatter,
                stderr=chatter,
                env=child_environment(folder),
                start_new_session=True,  # one group to kill; a terminal's Ctrl-C comes here only
            )
        except OSError as error:
            raise _failed(topology, "start", f"starting {sys.executable}: {error}") from None
        try:
            return child.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            _kill(child)
            raise _failed(
                topology,
                "timeout",
                f"it took longer than {timeout_seconds:g} s",
                "allow more time, or look with --quick first",
                _chatter(folder),
            ) from None
        except BaseException:
            _kill(child)
            raise


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End the child and all it started, and take its exit code so that no zombie stays."""
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _answer(folder: Path, chatter: str, topology: Topology | None) -> Any:
    try:
        return pickle.loads((folder / ANSWER).read_bytes())
    except FileNotFoundError:
        raise _failed(
            topology, "silence", "the compiling process ended without an answer", "", chatter
        ) from None
    except Exception as error:
        why = f"its answer cannot be read: {type(error).__name__}: {error}"
        raise _failed(topology, "silence", why, "", chatter) from None


def _chatter(folder: Path) -> str:
    raw = (folder / _CHATTER).read_bytes()
    if len(raw) > _MOST_CHATTER_BYTES:
        quarter = _MOST_CHATTER_BYTES // 4
        note = f"\n[{len(raw) - 4 * quarter:,} bytes left out]\n".encode()
        raw = raw[:quarter] + note + raw[-3 * quarter :]
    return raw.decode("utf-8", errors="replace")


def _failed(
    topology: Topology | None, failure: Any, why: str, fix: str = "", chatter: str = ""
) -> CompileError:
    target = f"`{topology}`" if topology else "in a child process"
    what = f"cannot compile for {target}" if topology else f"cannot compile {target}"
    return CompileError(what, failure=failure, why=why, fix=fix, chatter=chatter)


def _raised(raised: Raised, chatter: str, topology: Topology | None) -> CompileError:
    first = raised.message.strip().split("\n")[0][:400]
    why = f"{raised.kind}: {first}" if first else raised.kind
    return _failed(topology, "exception", why, "", f"{chatter}\n{raised.traceback}")


def _died(code: int, chatter: str, topology: Topology | None) -> CompileError:
    """The error for a child that ended by a signal or with an exit code of its own."""
    said = _last_words(chatter)
    fix = ""
    if "nknown flag in XLA_FLAGS" in said:
        fix = "take that flag out of XLA_FLAGS"
    elif "nknown command line flag" in said:
        fix = "take that flag out of LIBTPU_INIT_ARGS"
    if code > 0:
        why = f"the compiling process ended with exit code {code} and no answer"
        return _failed(topology, "silence", f"{why}{said}", fix, chatter)
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    why = f"the compiler was killed by {name}{said}"
    if name == "SIGKILL":
        why = f"the compiler was killed by {name}: most likely this machine ran out of memory"
        why += _ram()
        fix = "close other programs, or compile on a machine with more memory"
    elif name == "SIGFPE":
        why += "; it divides by zero where the description of the hardware lacks a field"
    return _failed(topology, "signal", why, fix, chatter)


def _ram() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return ""
    return f" ({total / 2**30:.0f} GiB)"


def _last_words(chatter: str) -> str:
    """What a dying process said: a failed check, else an ``ERROR`` line, else nothing."""
    lines = [line.strip() for line in chatter.splitlines()]
    # Such as: F1121 12:08:03.479839   12574 parse_flags_from_env.cc:234] Unknown flag in ...
    for pattern in (r"F\d{4} [\d:.]+ +\d+ \S+\] (.+)", r"(?:ERROR|FATAL):? (.+)"):
        found = [match.group(1) for line in lines if (match := re.match(pattern, line))]
        if found:
            return f": {found[-1][:300]}"
    return ""
