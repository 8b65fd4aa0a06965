"""The benchmarks of the closed forms: their plans can be placed, ranks are Spearman's."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.models.config import named
from meshwright.sharding.planned import PlanReport
from meshwright.sharding.topology import Topology
from meshwright.train import bench_plan
from meshwright.train.bench_plan import (
    CHOSEN,
    HELD_OUT,
    RANKED,
    Case,
    memory_errors,
    predicted,
    rank_correlation,
    ranking,
)
from meshwright.train.config import TrainConfig
from meshwright.train.run_plan import RunPlan

BASE = TrainConfig(named("tiny"))


def test_plans_are_many_and_distinct() -> None:
    assert len({*CHOSEN, *HELD_OUT}) == len(CHOSEN) + len(HELD_OUT) >= 40
    assert len(set(RANKED)) == len(RANKED) >= 20
    assert len({(case.topology, case.model) for case in RANKED}) == 1
    for case in (*CHOSEN, *HELD_OUT, *RANKED):
        config = case.config(BASE)
        assert str(Topology.parse(config.topology)) == case.topology
        assert config.model.remat == case.remat and config.model.max_length >= case.seq_len


values = st.lists(st.integers(0, 9), min_size=3, max_size=12)


@given(values, st.randoms())
def test_rank_correlation_is_of_ranks(one: list[int], random: Any) -> None:
    if len(set(one)) < 2:
        return
    floats = [float(value) for value in one]
    assert rank_correlation(floats, [value**3 for value in floats]) == pytest.approx(1)
    assert rank_correlation(floats, [-value for value in floats]) == pytest.approx(-1)
    other = random.sample(range(100), len(one))
    assert rank_correlation(floats, other) == pytest.approx(rank_correlation(other, floats))


def test_rank_correlation_by_hand() -> None:
    # Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: 4.5 over the root of 4.5 × 5.
    assert rank_correlation([1, 2, 2, 5], [1, 2, 3, 4]) == pytest.approx(4.5 / 22.5**0.5)


def small(topology: str) -> Case:
    return Case(topology, "fsdp=8", "llama-1b", 16)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Compilers that find 1/0.95 of what is predicted, or another part."""
    part = {"peak": 0.95, "seconds": 1.0}

    def compile_(plan: RunPlan) -> PlanReport:
        found, report = predicted(plan), plan.estimate()
        peak = round((found.memory.peak_bytes or 0) / part["peak"])
        memory = replace(found.memory, peak_bytes=peak)
        low = (found.time.step_seconds_low or 0.0) * part["seconds"]
        high = (found.time.step_seconds_high or 0.0) * part["seconds"]
        time = replace(found.time, step_seconds_low=low, step_seconds_high=high)
        return replace(report, memory=memory, time=time)

    monkeypatch.setattr(RunPlan, "compile", compile_)
    monkeypatch.setattr(bench_plan, "CHOSEN", (small("h100:1x8"), small("v5e:2x4")))
    monkeypatch.setattr(bench_plan, "HELD_OUT", (small("a100:1x8"),))
    shapes = [replace(small("h100:1x8"), batch_size=rows) for rows in (8, 16, 32)]
    monkeypatch.setattr(bench_plan, "RANKED", tuple(shapes))
    return part


def test_memory_errors_are_summed_up(compiled: dict[str, float], capsys: Any) -> None:
    assert memory_errors(BASE) == 0
    said = json.loads(capsys.readouterr().out)
    assert [one["error"] for one in said["plans"]] == pytest.approx([-0.05] * 3, abs=1e-6)
    assert said["chosen"]["plans"] == 2 and said["held out"]["plans"] == 1
    assert said["false_fits"] == 0


def test_a_chip_may_be_asked_for_alone(compiled: dict[str, float], capsys: Any) -> None:
    assert memory_errors(replace(BASE, topology="v5e:2x4")) == 0
    said = json.loads(capsys.readouterr().out)
    assert [one["topology"] for one in said["plans"]] == ["v5e:2x4"]


def test_a_false_fit_fails(compiled: dict[str, float], capsys: Any) -> None:
    compiled["peak"] = 0.01
    assert memory_errors(BASE) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["false_fits"] == 3
    assert all(one["error"] is None for one in said["plans"])


def test_ranking_is_perfect_where_seconds_are_proportional(
    compiled: dict[str, float], capsys: Any
) -> None:
    compiled["seconds"] = 2.0
    assert ranking(BASE) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["low"] == said["mean"] == pytest.approx(1)
