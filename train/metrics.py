"""The numbers of a run, written as they come: ``metrics.jsonl`` and TensorBoard event files.

The file holds one JSON object a line, one line a logged step, in order of steps, and is written
line by line, so that it can be followed while the run goes on and loses at most an unfinished
line when the run is killed. A resumed run first cuts the records after the step it resumes from:
those steps are about to be made again, and no step is to be in the file twice.

JSON has no infinities and no NaN, and most readers refuse Python's. A number that is not finite
is written as null, and left out of TensorBoard.

tensorboardX writes TensorBoard's files without TensorFlow. The alternative, leaving the metrics
to a tracking service, needs an account and a network; services read these files.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from meshwright.sharding.errors import MissingExtraError
from meshwright.train.runfolder import refuse, write_whole

__all__ = ["Metrics", "read_metrics"]


class Metrics:
    """Writes records of steps; use it as a context manager.

    Args:
        file: the ``metrics.jsonl`` to write.
        tensorboard: folder of TensorBoard event files; None for none.
        resumed_step: the step a resumed run goes on from; None for a new run.

    Raises:
        MissingExtraError: TensorBoard is asked for and tensorboardX is not installed.
        RunError: the file cannot be written.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> with Metrics(file) as metrics:
    ...     metrics.write(10, {"loss": 2.5, "grad_norm": float("inf")})
    >>> file.read_text()
    '{"step": 10, "loss": 2.5, "grad_norm": null}\\n'
    """

    def __init__(
        self, file: Path, *, tensorboard: Path | None = None, resumed_step: int | None = None
    ) -> None:
        self._path = file
        self._last = -1 if resumed_step is None else resumed_step
        self._events = _open_events(tensorboard, resumed_step) if tensorboard else None
        if resumed_step is not None and file.exists():
            kept = [record for record in read_metrics(file) if record["step"] <= resumed_step]
            write_whole(file, "".join(_line(record) for record in kept))
        try:
            # Unbuffered: what failed to be written must not come back when the file is closed.
            self._file = file.open("ab", buffering=0)
        except OSError as error:
            raise refuse(f"cannot write `{file}`", file, error) from error

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Write the record of a step, to be called once a logged step.

        Args:
            step: optimizer steps finished; grows from call to call.
            values: Python numbers, such as ``loss`` and ``tokens_per_second``.

        Raises:
            RunError: the disk is full.
        """
        assert step > self._last, f"step {step} is logged after step {self._last}"
        self._last = step
        line = _line({"step": step, **values}).encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._events is not None:
                self._events.add(step, values)
        except OSError as error:
            raise refuse(f"cannot write `{self._path}`", self._path, error) from error

    def close(self) -> None:
        """Close the files; all of it is written already, but for what a full disk refused."""
        with suppress(OSError):
            self._file.close()
        if self._events is not None:
            with suppress(OSError):
                self._events.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(file: Path) -> Iterator[dict[str, Any]]:
    """Read the records of a ``metrics.jsonl``, without an unfinished last line.

    >>> list(read_metrics(Path("no/such/metrics.jsonl")))
    []
    """
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line) if line.endswith("\n") else None
        except ValueError:
            record = None  # torn by a kill or a full disk
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


def _line(record: Mapping[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def _open_events(folder: Path, resumed_step: int | None) -> _Events:
    try:
        return _Events(folder, resumed_step)
    except OSError as error:
        raise refuse(f"cannot write to `{folder}`", folder, error) from error


class _Events:
    """Scalars in TensorBoard's file format, written as they come.

    tensorboardX's own writer does this in a thread, which on a full disk ends with a traceback
    that nobody can catch; its records and messages are used directly instead.
    """

    def __init__(self, folder: Path, resumed_step: int | None) -> None:
        try:
            import tensorboardX
        except ImportError:
            raise MissingExtraError(
                "cannot write TensorBoard files",
                why="tensorboardX is not installed",
                fix="pip install 'meshwright[train]', or --no-tensorboard",
            ) from None
        proto = f"{tensorboardX.__name__}.proto"
        self._event: Any = import_module(f"{proto}.event_pb2")
        self._summary: Any = import_module(f"{proto}.summary_pb2").Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 1000}.{os.getpid()}"
        self._records = tensorboardX.RecordWriter(str(folder / name))
        self._write(file_version="brain.Event:2")
        if resumed_step is not None:
            # Tells TensorBoard to drop what an earlier file says of later steps.
            start = self._event.SessionLog(status=self._event.SessionLog.START)
            self._write(step=resumed_step + 1, session_log=start)

    def add(self, step: int, values: Mapping[str, float | int]) -> None:
        shown = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
            if math.isfinite(value)
        ]
        self._write(step=step, summary=self._summary(value=shown))

    def _write(self, **fields: Any) -> None:
        event = self._event.Event(wall_time=time.time(), **fields)
        try:
            self._records.write(event.SerializeToString())
            self._records.flush()
        except OSError:
            # What is left in its buffer would be tried again, loudly, when it is collected.
            with suppress(OSError):
                self._records.close()
            raise

    def close(self) -> None:
        self._records.close()
