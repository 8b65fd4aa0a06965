"""The training loop: everything with a side effect, around a step that has none.

The loop stays one step ahead of what it reads: step n+1 is dispatched before the scalars of step
n are fetched, so the devices never wait for Python. It reads nothing but scalars from them.
At an evaluation, a checkpoint or the end it first lets the step in flight finish, so what is
measured, saved and reported always belongs to one and the same step.

A run ends in one of four ways: all steps done; a stop signal, after the step in flight and a
checkpoint; too many refused updates in a row, after a checkpoint of the last good parameters; or
an error, which passes through.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from meshwright.sharding.errors import NonFiniteError
from meshwright.train.checkpoint import Checkpoints
from meshwright.train.config import TrainConfig
from meshwright.train.metrics import Metrics
from meshwright.train.program import Program
from meshwright.train.progress import Progress
from meshwright.train.state import TrainState
from meshwright.train.stopping import AskAll, StopSignals

__all__ = ["Loop", "Outcome"]


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        step: optimizer steps done in all.
        loss: training loss of the last finished step; None if none was run.
        eval_loss: last held-out loss; None if none was measured.
        tokens_per_second: over the steps of this process after its first (unless that was all),
            evaluations and checkpoints left out; None if no step was run.
        first_step_seconds: from the start of the process until its first step finished.
        data_wait_seconds: time the loop waited for batches, after the first.
        save_block_seconds: longest time a checkpoint held the loop up.
        step_seconds: mean of the steps after the first.
        exit_code: 0, or 143 or 130 after a signal.
    """

    step: int
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_second: float | None = None
    first_step_seconds: float | None = None
    data_wait_seconds: float = 0.0
    save_block_seconds: float = 0.0
    step_seconds: float | None = None
    exit_code: int = 0


@dataclass
class _Stopwatch:
    """Time spent in steps, with evaluations and checkpoints left out."""

    seconds: float = 0.0
    steps: int = 0
    tokens: float = 0.0
    _since: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """0 before the first lap."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def start(self) -> None:
        """Begin, or leave out the time since the last lap."""
        self._since = time.perf_counter()

    def lap(self, tokens: float) -> None:
        """Count a finished step."""
        now = time.perf_counter()
        spent = now - (now if self._since is None else self._since)
        self._since = now
        self.seconds += spent
        self.steps += 1
        self.tokens += tokens


@dataclass
class Loop:
    """One run's loop and everything it talks to.

    Attributes:
        config: the run.
        program: compiled programs.
        batches: training batches; iterator with ``state()``.
        heldout: makes a fresh pass over the held-out batches.
        checkpoints, metrics, progress, stop: where results go and what may end the run.
        process_start: `time.perf_counter()` of the start of the process.
        extra: written into each checkpoint beside the data position.
        profile_folder: where traces of the chosen steps go.
        peak_tokens_per_second: tokens/s at which the chips would be at their peak, where known.
    """

    config: TrainConfig
    program: Program
    batches: Any
    heldout: Callable[[], Iterable[dict[str, np.ndarray]]]
    checkpoints: Checkpoints
    metrics: Metrics
    progress: Progress
    stop: StopSignals
    process_start: float
    extra: dict[str, Any]
    profile_folder: Path
    peak_tokens_per_second: float | None = None
    _watch: _Stopwatch = field(default_factory=_Stopwatch)
    _log_watch: _Stopwatch = field(default_factory=_Stopwatch)
    _in_flight: tuple[int, dict[str, jax.Array]] | None = None
    _tokens_seen: float = 0.0
    _record: dict[str, float] | None = None
    _record_step: int = 0
    _evaluated_step: int = -1
    _skipped: float = 0.0
    _asked: AskAll | None = field(default_factory=AskAll.of_processes)
    _all_stop: bool = False

    def run(self, state: TrainState) -> tuple[TrainState, Outcome]:
        """Train from the state's step to the last.

        Raises:
            NonFiniteError: too many refused updates in a row; the last good parameters were
                saved.
        """
        outcome = Outcome(step=int(state.step))
        self._tokens_seen = float(self.extra.get("tokens", 0.0))
        with _Profile(self.config.profile_range, self.profile_folder) as profile:
            state = self._train(state, outcome, profile)
        self.checkpoints.wait()
        outcome.exit_code = self.stop.exit_code or (143 if self._all_stop else 0)
        return state, outcome

    def _train(self, state: TrainState, outcome: Outcome, profile: _Profile) -> TrainState:
        saved_at = outcome.step if outcome.step else -1
        for number in range(outcome.step + 1, self.config.steps + 1):
            profile.before(number)
            state = self._dispatch(number, state, outcome)
            profile.after(number, state)
            last = number == self.config.steps or self._stopping
            evaluate = _due(number, self.config.eval_every) or last
            save = _due(number, self.config.checkpoint_every) or last
            if number == 1 or outcome.first_step_seconds is None or evaluate or save:
                self._settle(state, outcome)
            if evaluate and self.config.eval_every and not self._stopping:
                self._evaluate(state, outcome)
            if save:
                self._save(number, state, outcome)
                saved_at = number
            if last:
                break
        self._settle(state, outcome)
        self._write_record()
        if saved_at != outcome.step:
            self._save(outcome.step, state, outcome)
        return state

    @property
    def _stopping(self) -> bool:
        """Whether to stop after this step; of several processes all know a step later."""
        return self._all_stop if self._asked is not None else self.stop.requested

    def _dispatch(self, number: int, state: TrainState, outcome: Outcome) -> TrainState:
        """Start a step, then read the scalars of the one before it."""
        asked = time.perf_counter()
        host = next(self.batches)
        waited = time.perf_counter() - asked
        if outcome.first_step_seconds is not None:
            outcome.data_wait_seconds += waited
        batch = self.program.place(host)
        compiled = self.program.step
        if outcome.first_step_seconds is None:
            self._log_watch.start()
        state, scalars = compiled(state, batch)
        if self._asked is not None:
            scalars = {**scalars, "stop": self._asked(self.stop.requested)}
        before, self._in_flight = self._in_flight, (number, scalars)
        if before:
            self._finish(*before, state, outcome)
        return state

    def _settle(self, state: TrainState, outcome: Outcome) -> None:
        """Let the step in flight finish and book it."""
        if self._in_flight:
            before, self._in_flight = self._in_flight, None
            self._finish(*before, state, outcome)

    def _finish(
        self, number: int, scalars: dict[str, jax.Array], state: TrainState, outcome: Outcome
    ) -> None:
        """Fetch a step's scalars, which waits for it, and book it."""
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        self._all_stop = self._all_stop or bool(values.pop("stop", 0.0))
        self._tokens_seen += values["tokens"]
        self._skipped += values["skipped"]
        if outcome.first_step_seconds is None:
            # Its time is the launch's, not a step's: it waited for compilers and caches.
            outcome.first_step_seconds = time.perf_counter() - self.process_start
            self._watch.start()
        else:
            self._watch.lap(values["tokens"])
        self._log_watch.lap(values["tokens"])
        outcome.step, outcome.loss = number, values["loss"]
        # The first step is as good as none, but better than no number for a run of one step.
        watch = self._watch if self._watch.steps else self._log_watch
        outcome.tokens_per_second = watch.tokens_per_second
        outcome.step_seconds = watch.seconds / watch.steps
        self._write_record()
        self.progress.advance(number)
        config = self.config
        ends = number in (1, config.steps) or self._stopping
        if ends or _due(number, config.log_every) or _due(number, config.eval_every):
            self._make_record(number, values)
        if values["bad_in_row"] >= config.guard.max_bad_steps:
            self._give_up(number, values, state, outcome)

    def _make_record(self, number: int, values: dict[str, float]) -> None:
        """Keep a step's record until the next: an evaluation may still add to it."""
        watch, self._log_watch = self._log_watch, _Stopwatch()
        self._log_watch.start()
        self._record = {
            "loss": values["loss"],
            "grad_norm": values["grad_norm"],
            "learning_rate": values["learning_rate"],
            "tokens": self._tokens_seen,
            "tokens_per_second": watch.tokens_per_second,
            "step_seconds": watch.seconds / watch.steps if watch.steps else 0.0,
            "skipped": self._skipped,
        }
        # Of models with experts only.
        self._record |= {name: values[name] for name in ("dropped", "imbalance") if name in values}
        self._skipped = 0.0
        self._record_step = number
        if self.peak_tokens_per_second:
            speed = watch.tokens_per_second
            self._record["flop_utilisation"] = speed / self.peak_tokens_per_second

    def _write_record(self) -> None:
        record, self._record = self._record, None
        if record is not None:
            self.metrics.write(self._record_step, record)
            self.progress.show(self._record_step, record)

    def _evaluate(self, state: TrainState, outcome: Outcome) -> None:
        total = weight = 0.0
        for batch in self.heldout():
            loss, counted = self.program.eval(state.params, self.program.place(batch))
            total, weight = total + float(loss), weight + float(counted)
        outcome.eval_loss = total / max(weight, 1.0)
        self._evaluated_step = outcome.step
        if self._record is not None:
            self._record["eval_loss"] = outcome.eval_loss
        self._restart_watches()

    def _save(self, number: int, state: TrainState, outcome: Outcome) -> None:
        began = time.perf_counter()
        extra = {**self.extra, "data": self.batches.state(), "tokens": self._tokens_seen}
        measured = outcome.eval_loss if self._evaluated_step == number else None
        self.checkpoints.save(number, state, extra, measured)
        outcome.save_block_seconds = max(outcome.save_block_seconds, time.perf_counter() - began)
        self._restart_watches()

    def _restart_watches(self) -> None:
        self._watch.start()
        self._log_watch.start()

    def _give_up(
        self, number: int, values: dict[str, float], state: TrainState, outcome: Outcome
    ) -> None:
        self._write_record()
        if self._in_flight:
            # A further step is under way; refused or good, its state is the one there is to save.
            self._tokens_seen += float(jax.device_get(self._in_flight[1])["tokens"])
        self._save(int(state.step), state, outcome)
        self.checkpoints.wait()
        limit = self.config.guard.max_bad_steps
        raise NonFiniteError(
            f"stopped at step {number}: {limit} updates in a row were refused",
            where=f"loss {values['loss']:.4g}, grad_norm {values['grad_norm']:.4g}, "
            f"learning_rate {values['learning_rate']:.3g}",
            why="loss or gradients were not finite, or the gradient norm spiked, each time; "
            "the parameters are those before the first of them, and are saved",
            fix="lower --optimizer.learning-rate, set --optimizer.clip-norm 1, or use "
            "--dtype float32; --guard.max-bad-steps sets the patience",
        )


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


@dataclass
class _Profile:
    """Runs jax's profiler around the chosen steps; ends it however the run ends."""

    steps: range
    folder: Path
    _running: bool = False

    def before(self, number: int) -> None:
        if self.steps and number == self.steps.start:
            jax.profiler.start_trace(str(self.folder))
            self._running = True

    def after(self, number: int, state: TrainState) -> None:
        if self._running and number + 1 >= self.steps.stop:
            jax.block_until_ready(state.step)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()

    def __enter__(self) -> _Profile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
