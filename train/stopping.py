"""SIGTERM and Ctrl-C as a request: the step finishes, the run saves and exits with its own code.

A handler that raised would tear a step, or a save, in the middle, so the first signal only sets
a flag that the loop reads between steps. A second Ctrl-C means now: the process ends at once,
without saving (checkpoints already saved stay whole, see `meshwright.train.checkpoint`).

Python runs handlers between two bytecodes of the main thread, which may be waiting for minutes
in a compilation or a collective. So a thread of our own answers: the interpreter's C handler
writes each signal's number to a pipe (`signal.set_wakeup_fd`) wherever the main thread is, and
the thread reads them. The alternative, letting the second Ctrl-C have its default effect, would
do nothing in just the cases where a run hangs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

__all__ = ["AskAll", "StopSignals"]

_WATCHED = (signal.SIGTERM, signal.SIGINT)
_STDERR = 2
_SHOW_CURSOR = "\x1b[?25h"


class StopSignals:
    """Context manager that turns SIGTERM and Ctrl-C into a flag to read between steps.

    Outside of the main thread, where Python allows no signal handlers, it does nothing.

    >>> with StopSignals() as stop:
    ...     stop.requested, stop.exit_code
    (False, 0)
    """

    def __init__(self) -> None:
        self._signal = 0
        self._handlers: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether to stop after the step that is running."""
        return self._signal != 0

    @property
    def exit_code(self) -> int:
        """0, or by the shells' convention 128 and the signal: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self._signal if self._signal else 0

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._former_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._watcher = threading.Thread(
            target=self._watch, args=(reader,), name="stop-signals", daemon=True
        )
        self._watcher.start()
        self._handlers = {number: signal.signal(number, self._note) for number in _WATCHED}
        return self

    def __exit__(self, *_: object) -> None:
        if not self._handlers:
            return
        for number, former in self._handlers.items():
            signal.signal(number, former)
        self._handlers = {}
        signal.set_wakeup_fd(self._former_fd)
        os.close(self._writer)
        self._watcher.join()

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = self._signal or number

    def _watch(self, reader: int) -> None:
        """Answer signals as they come, until the pipe's other end is closed."""
        interrupts = 0
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            while received := pipe.read(1):
                number = received[0]
                if number not in _WATCHED:
                    continue
                interrupts += number == signal.SIGINT
                if interrupts > 1:
                    _stop_at_once()
                name = signal.Signals(number).name
                again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
                # Through sys.stderr, where a live progress line makes room for it.
                said = f"\n{name}: finishing this step, then saving{again}"
                print(said, file=sys.stderr, flush=True)


class AskAll:
    """Whether any process says yes, as all of them come to know it at the same step.

    A signal reaches the processes of a run at different times, or only one of them. One that
    stopped a step before the others would leave them in a collective for ever. The answer is a
    scalar on the devices, to be fetched with those of the step, so nobody waits for it.
    """

    def __init__(self) -> None:
        import jax
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        mesh = Mesh(np.array(jax.devices()), ("all",))
        self._count = jax.device_count()
        self._each = NamedSharding(mesh, PartitionSpec("all"))
        self._any = jax.jit(jax.numpy.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    @classmethod
    def of_processes(cls) -> AskAll | None:
        """None with one process, which need not ask."""
        import jax

        return cls() if jax.process_count() > 1 else None

    def __call__(self, mine: bool) -> Any:
        """Ask; every process must.

        Args:
            mine: this process's answer.

        Returns:
            A scalar array, 1 if any said yes.
        """
        import jax
        import numpy as np

        answer = np.full((1,), float(mine), np.float32)
        asked = jax.make_array_from_callback((self._count,), self._each, lambda _: answer)
        return self._any(asked)


def _stop_at_once() -> NoReturn:
    # Past sys.stderr, whose locks may be held. A live line hides the cursor; it is shown again.
    cursor = _SHOW_CURSOR if os.isatty(_STDERR) else ""
    os.write(_STDERR, f"{cursor}\nstopped at once, without saving\n".encode())
    # Not sys.exit: that waits for the main thread, which may never return.
    os._exit(128 + signal.SIGINT)
