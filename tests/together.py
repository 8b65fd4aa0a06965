"""Runs a program as several processes of one run, each with its own simulated devices.

Whatever happens, no process outlives its test: what hangs is killed, and the test says so.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Ended", "free_port", "run_together", "run_variables"]

_START = """\
import os, sys
from meshwright.sharding import start
from meshwright.sharding.errors import MeshwrightError

def begin(**settings):
    try:
        return start(**settings)
    except MeshwrightError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
"""


_DEVICES = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}


@dataclass(frozen=True)
class Ended:
    """What a process came to.

    Attributes:
        code: exit code; negative for a signal.
        out, err: what it wrote.
        seconds: from the start of all until this one was seen to have ended.
    """

    code: int
    out: str
    err: str
    seconds: float

    @property
    def document(self) -> Any:
        """The JSON value on the last line of stdout."""
        return json.loads(self.out.splitlines()[-1])


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def run_together(
    commands: Sequence[str | Sequence[str]],
    *,
    environments: Sequence[Mapping[str, str]] | None = None,
    within_seconds: float = 40,
    meanwhile: Callable[[list[subprocess.Popen[str]]], None] | None = None,
) -> list[Ended]:
    """Start one process a command, all at once, and wait for all of them.

    Args:
        commands: Python programs, which find ``begin`` (`start`, with an exit code for its
            errors) defined; or words of a `meshwright` command.
        environments: variables of each; by default those of one run on this machine.
        within_seconds: when to kill what has not ended, which fails the test.
        meanwhile: called with the processes once they have been started.
    """
    if environments is None:
        count, port = len(commands), free_port()
        environments = [run_variables(port, count, index) for index in range(count)]
    began = time.monotonic()
    started = [
        subprocess.Popen(
            [
                sys.executable,
                *(["-c", _START + c] if isinstance(c, str) else ["-m", "meshwright", *c]),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **_DEVICES, **extra},
        )
        for c, extra in zip(commands, environments, strict=True)
    ]
    ended: list[Ended] = []
    try:
        if meanwhile is not None:
            meanwhile(started)
        for process in started:
            left = max(within_seconds - (time.monotonic() - began), 0.1)
            out, err = process.communicate(timeout=left)
            ended.append(Ended(process.returncode, out, err, time.monotonic() - began))
    except subprocess.TimeoutExpired:
        for process in started:
            process.kill()
        said = "\n".join("\n".join(p.communicate()) for p in started if p.stdout)
        raise AssertionError(f"still running after {within_seconds} s:\n{said}") from None
    finally:
        for process in started:
            process.kill()
            process.wait()
    return ended


def run_variables(port: int, count: int, index: int, **more: str) -> dict[str, str]:
    """The environment of one process of a run on this machine."""
    return {
        "MESHWRIGHT_COORDINATOR": f"localhost:{port}",
        "MESHWRIGHT_PROCESSES": str(count),
        "MESHWRIGHT_PROCESS": str(index),
        "MESHWRIGHT_START_TIMEOUT_SECONDS": "20",
        **more,
    }
