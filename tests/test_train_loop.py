"""The loop alone, around a fake step that counts: in what order things happen, and with what.

State `n` is the state after n steps, so a save or an evaluation that mixes up two steps shows.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from meshwright.sharding.errors import NonFiniteError
from meshwright.train.config import GuardConfig, default_config
from meshwright.train.loop import Loop, Outcome

TOKENS = 10.0


@dataclass(frozen=True)
class State:
    """Stands for a TrainState after ``step`` steps."""

    step: int

    @property
    def params(self) -> int:
        return self.step


@dataclass(frozen=True)
class Scalar:
    """A number on a device: reading it is an event."""

    value: float
    read: Any

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self.read()
        return np.asarray(self.value, dtype)


@dataclass
class Fakes:
    """All a loop talks to; writes down what happens in ``events``.

    Attributes:
        events: (what, step) in order.
        bad: steps whose update is refused.
        stop_after: the step whose booking brings a signal.
        saved: arguments of each save.
        records: what was written for metrics, by step.
        batches_taken: how many.
    """

    events: list[tuple[str, int]] = field(default_factory=list)
    bad: tuple[int, ...] = ()
    stop_after: int | None = None
    saved: dict[int, dict[str, Any]] = field(default_factory=dict)
    records: dict[int, dict[str, float]] = field(default_factory=dict)
    batches_taken: int = 0
    requested: bool = False

    def __next__(self) -> dict[str, np.ndarray]:
        self.batches_taken += 1
        return {}

    def state(self) -> dict[str, int]:
        return {"next_row": self.batches_taken}

    def place(self, batch: Any) -> Any:
        return batch

    def step(self, state: State, batch: Any) -> tuple[State, dict[str, Scalar]]:
        number = state.step + 1
        self.events.append(("dispatch", number))
        bad = number in self.bad
        in_row = len(list(itertools.takewhile(lambda n: n in self.bad, range(number, 0, -1))))
        values = {
            "loss": math.nan if bad else 5 - number / 10,
            "grad_norm": math.nan if bad else 1.5,
            "learning_rate": 0.1,
            "tokens": TOKENS,
            "skipped": float(bad),
            "bad_in_row": float(in_row),
        }
        first, *others = values
        read = {first: lambda: self.events.append(("read", number))}
        read |= dict.fromkeys(others, lambda: None)
        return State(number), {name: Scalar(value, read[name]) for name, value in values.items()}

    def eval(self, params: int, batch: tuple[float, float]) -> tuple[float, float]:
        self.events.append(("eval", params))
        return batch

    def heldout(self) -> Iterator[tuple[float, float]]:
        # A full batch of 8 counted tokens, and one that is mostly padding.
        yield 16.0, 8.0
        yield 6.0, 2.0

    def save(self, step: int, state: State, extra: dict[str, Any], eval_loss: float | None) -> None:
        self.events.append(("save", step))
        self.saved[step] = {"state": state, "eval_loss": eval_loss, **extra}

    def wait(self) -> None:
        self.events.append(("wait", 0))

    def write(self, step: int, values: dict[str, float]) -> None:
        assert step not in self.records
        self.records[step] = dict(values)

    def show(self, step: int, values: dict[str, float]) -> None:
        assert self.records[step] == values

    def advance(self, step: int) -> None:
        self.requested = self.requested or step == self.stop_after

    @property
    def exit_code(self) -> int:
        return 143 if self.requested else 0

    def of(self, what: str) -> list[int]:
        return [step for event, step in self.events if event == what]


def loop_of(fakes: Any, folder: Path = Path("unused"), **fields: Any) -> Loop:
    config = replace(
        default_config(),
        **{"steps": 9, "log_every": 3, "eval_every": 4, "checkpoint_every": 4, **fields},
    )
    return Loop(
        config=config,
        program=fakes,
        batches=fakes,
        heldout=fakes.heldout,
        checkpoints=fakes,
        metrics=fakes,
        progress=fakes,
        stop=fakes,
        process_start=time.perf_counter(),
        extra={"mesh": "data=8"},
        profile_folder=folder,
    )


def run(fakes: Any, start: Any = State(0), **fields: Any) -> Outcome:
    return loop_of(fakes, **fields).run(start)[1]


# The order of things


def test_a_step_is_dispatched_before_the_one_before_it_is_read() -> None:
    fakes = Fakes()
    run(fakes, eval_every=0, checkpoint_every=0)
    assert fakes.of("dispatch") == fakes.of("read") == list(range(1, 10))
    # The first and the last have nothing to wait behind.
    for step in range(2, 9):
        assert fakes.events.index(("dispatch", step + 1)) < fakes.events.index(("read", step))


def test_what_is_evaluated_and_saved_belongs_to_one_step() -> None:
    fakes = Fakes()
    outcome = run(fakes)
    assert fakes.of("eval") == [4, 4, 8, 8, 9, 9]
    assert fakes.of("save") == [4, 8, 9]
    for step, saved in fakes.saved.items():
        assert saved["state"] == State(step)
        assert saved["data"] == {"next_row": step}
        assert saved["tokens"] == step * TOKENS
        assert saved["mesh"] == "data=8"
    assert fakes.events[-1] == ("wait", 0)
    assert (outcome.step, outcome.loss, outcome.exit_code) == (9, 4.1, 0)


def test_logged_are_the_first_the_last_every_nth_and_the_evaluated_steps() -> None:
    fakes = Fakes()
    run(fakes)
    assert list(fakes.records) == [1, 3, 4, 6, 8, 9]
    assert [step for step, record in fakes.records.items() if "eval_loss" in record] == [4, 8, 9]
    for step, record in fakes.records.items():
        assert record["loss"] == 5 - step / 10
        assert record["tokens"] == step * TOKENS
        assert record["step_seconds"] >= 0


def test_a_held_out_loss_is_weighed_by_tokens_not_by_batches() -> None:
    fakes = Fakes()
    outcome = run(fakes)
    assert outcome.eval_loss == fakes.records[4]["eval_loss"] == 2.2


def test_evaluations_and_checkpoints_can_be_left_out() -> None:
    fakes = Fakes()
    outcome = run(fakes, eval_every=0, checkpoint_every=0)
    assert (fakes.of("eval"), fakes.of("save")) == ([], [9])
    assert outcome.eval_loss is None


@pytest.mark.parametrize(("eval_every", "known"), [(3, []), (8, [8]), (4, [4, 8])])
def test_a_checkpoint_is_ranked_by_the_held_out_loss_of_its_own_step(
    eval_every: int, known: list[int]
) -> None:
    fakes = Fakes()
    run(fakes, eval_every=eval_every)
    ranked = [step for step, saved in fakes.saved.items() if saved["eval_loss"] is not None]
    assert ranked == [*known, 9]


def test_a_resumed_run_goes_on_counting() -> None:
    fakes = Fakes(batches_taken=5)
    loop = loop_of(fakes)
    loop.extra["tokens"] = 5 * TOKENS
    _, outcome = loop.run(State(5))  # type: ignore[arg-type]
    assert fakes.of("dispatch") == [6, 7, 8, 9]
    assert fakes.records[9]["tokens"] == 9 * TOKENS
    assert fakes.saved[8]["data"] == {"next_row": 8}
    assert outcome.step == 9


def test_a_finished_run_has_nothing_left_to_do() -> None:
    fakes = Fakes()
    outcome = run(fakes, start=State(9))
    assert (fakes.events, fakes.records) == ([("wait", 0)], {})
    assert (outcome.step, outcome.loss, outcome.exit_code) == (9, None, 0)


# Stopping


@pytest.mark.parametrize("after", [1, 2, 5, 8])
def test_a_signal_lets_the_step_under_way_finish_and_saves_it(after: int) -> None:
    fakes = Fakes(stop_after=after)
    outcome = run(fakes, eval_every=0)
    assert outcome.exit_code == 143
    done = outcome.step
    assert after <= done <= after + 1
    assert fakes.of("dispatch")[-1] == fakes.of("save")[-1] == done
    assert fakes.saved[done]["state"] == State(done)
    assert fakes.saved[done]["data"] == {"next_row": done}
    assert list(fakes.records)[-1] == done
    assert fakes.events[-1] == ("wait", 0)


def test_no_time_is_spent_on_an_evaluation_after_a_signal() -> None:
    fakes = Fakes(stop_after=3)
    run(fakes)
    assert (fakes.of("eval"), fakes.of("save")) == ([], [4])


def test_a_signal_before_the_first_step_still_saves_one() -> None:
    fakes = Fakes(requested=True)
    outcome = run(fakes)
    assert (outcome.step, outcome.exit_code, fakes.of("save")) == (1, 143, [1])


# Refused updates


def test_refused_updates_in_a_row_end_the_run_after_a_save() -> None:
    fakes = Fakes(bad=(2, 4, 5, 6))
    with pytest.raises(NonFiniteError, match="stopped at step 6: 3 updates in a row") as caught:
        run(fakes, guard=GuardConfig(max_bad_steps=3), eval_every=0, checkpoint_every=0)
    assert "loss nan, grad_norm nan, learning_rate 0.1" in caught.value.where
    assert list(fakes.records)[-1] == 6
    (step,) = fakes.saved
    assert step >= 6
    assert fakes.saved[step]["state"] == State(step)
    assert fakes.saved[step]["data"] == {"next_row": step}
    assert fakes.saved[step]["tokens"] == step * TOKENS
    assert fakes.events[-1] == ("wait", 0)


def test_every_refused_update_shows_in_the_records() -> None:
    fakes = Fakes(bad=(2, 5))
    run(fakes, eval_every=0, log_every=3)
    # Steps 2 and 5 are not logged themselves, and yet a reader must see that they were refused.
    assert sum(record["skipped"] for record in fakes.records.values()) == 2


# Profiling


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """jax's profiler as two events in ``fakes``, so that no test leaves a trace running."""
    holder = SimpleNamespace(fakes=Fakes())

    def event(what: str) -> Any:
        return lambda *_: holder.fakes.events.append((what, 0))

    monkeypatch.setattr(jax.profiler, "start_trace", event("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", event("stop"))
    monkeypatch.setattr(jax, "block_until_ready", lambda value: value)
    yield holder


def profiled(events: list[tuple[str, int]]) -> list[int]:
    """Steps dispatched while a trace was taken; it must have been ended."""
    names = [what for what, _ in events]
    assert names.count("start") == names.count("stop") == 1, names
    inside = events[names.index("start") : names.index("stop")]
    return [step for what, step in inside if what == "dispatch"]


@pytest.mark.parametrize(("text", "steps"), [("2:4", [2, 3]), ("1:2", [1]), ("9:10", [9])])
def test_the_steps_of_the_metrics_are_the_steps_profiled(
    traces: SimpleNamespace, text: str, steps: list[int]
) -> None:
    run(traces.fakes, profile_steps=text)
    assert profiled(traces.fakes.events) == steps


def test_a_run_that_stops_while_profiling_ends_its_trace(traces: SimpleNamespace) -> None:
    traces.fakes.stop_after = 3
    run(traces.fakes, profile_steps="2:9")
    assert profiled(traces.fakes.events)[-1] == 4


def test_a_run_that_fails_while_profiling_ends_its_trace(traces: SimpleNamespace) -> None:
    traces.fakes.bad = (3, 4)
    with pytest.raises(NonFiniteError):
        run(traces.fakes, profile_steps="2:9", guard=GuardConfig(max_bad_steps=2))
    assert profiled(traces.fakes.events)
