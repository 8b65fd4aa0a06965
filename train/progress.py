"""How far a run is, for people, on stderr: a live line on a terminal, plain lines in a log.

Both show the same record that `meshwright.train.metrics` writes, in the same words. On a
terminal the line is redrawn in place by rich, and only evaluations stay on the screen; anywhere
else each logged step is a line of its own, since a log of escape codes helps nobody.

Rich is imported when a terminal is there to draw on.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, TextIO

__all__ = ["Progress", "format_record", "format_seconds"]


class Progress:
    """Shows records of steps as they are logged; use it as a context manager.

    Args:
        steps: optimizer steps of the whole run.
        start: steps already made, when a run is resumed.
        stream: where to write; None for stderr.

    >>> with Progress(100, stream=sys.stdout) as progress:
    ...     progress.show(40, {"loss": 3.21987, "tokens_per_second": 51234.5, "step_seconds": 0.5})
    step  40/100  loss 3.2199  51,234 tokens/s  30 s left
    """

    def __init__(self, steps: int, *, start: int = 0, stream: TextIO | None = None) -> None:
        self._steps, self._start = steps, start
        self._stream = sys.stderr if stream is None else stream
        self._live: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._stream.isatty():
            self._live = _live_line(self._stream)
            self._task = self._live.add_task("", total=self._steps, completed=self._start)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def advance(self, step: int) -> None:
        """Move the live line's bar to ``step``; costs no line in a log."""
        if self._live is not None:
            self._live.update(self._task, completed=step)

    def show(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Show the record of a step; see `format_record` for the values it knows."""
        line = format_record(step, self._steps, values)
        if self._live is None:
            self.say(line)
            return
        self._live.update(self._task, completed=step, description=line)
        if values.get("eval_loss") is not None:
            self.say(line)

    def say(self, text: str) -> None:
        """Write a line that stays, above the live line where there is one."""
        if self._live is None:
            print(text, file=self._stream, flush=True)
        else:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)


def format_record(step: int, steps: int, values: Mapping[str, float | int | None]) -> str:
    """Write the record of a step as one line; a value that is None or absent is left out.

    Args:
        step: optimizer steps finished.
        steps: of the whole run.
        values: ``loss``, ``eval_loss`` and ``grad_norm``; ``tokens_per_second``;
            ``step_seconds``, shown as the time that the remaining steps will take;
            ``flop_utilisation``, the fraction of the chips' peak, None where that is unknown.

    >>> format_record(9, 10, {"loss": 2.0, "grad_norm": 0.5, "flop_utilisation": 0.417})
    'step  9/10  loss 2.0000  grad norm 0.5  41.7% of peak'
    """
    known = {name: value for name, value in values.items() if value is not None}
    parts = [f"step {step:>{len(str(steps))}}/{steps}"]
    if "loss" in known:
        parts.append(f"loss {known['loss']:.4f}")
    if "eval_loss" in known:
        parts.append(f"held-out {known['eval_loss']:.4f}")
    if "grad_norm" in known:
        parts.append(f"grad norm {known['grad_norm']:.3g}")
    if "tokens_per_second" in known:
        parts.append(f"{known['tokens_per_second']:,.0f} tokens/s")
    if "step_seconds" in known:
        parts.append(f"{format_seconds(known['step_seconds'] * (steps - step))} left")
    if "flop_utilisation" in known:
        parts.append(f"{known['flop_utilisation']:.1%} of peak")
    return "  ".join(parts)


def format_seconds(seconds: float) -> str:
    """Write a duration in its two largest units.

    >>> [format_seconds(value) for value in (8.4, 96, 5400, 200_000, float("nan"))]
    ['8 s', '1 min 36 s', '1 h 30 min', '2 d 7 h', '?']
    """
    if not math.isfinite(seconds):
        return "?"
    whole = max(round(seconds), 0)
    for large, small, unit, below in (
        (86400, 3600, "d", "h"),
        (3600, 60, "h", "min"),
        (60, 1, "min", "s"),
    ):
        if whole >= large:
            return f"{whole // large} {unit} {whole % large // small} {below}"
    return f"{whole} s"


def _live_line(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress

    # Text first and the bar in what is left: a narrow terminal cuts the bar, not the loss.
    columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=None)
    # stdout stays what it is: a program may read it, and the live line is on stderr.
    return RichProgress(*columns, console=Console(file=stream), redirect_stdout=False)
