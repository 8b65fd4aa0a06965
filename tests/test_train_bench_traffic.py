"""The benchmarks of every strategy's plan: plans can be placed, figures are what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, get_args

import pytest

from meshwright.models.config import named
from meshwright.sharding.errors import MissingExtraError
from meshwright.sharding.planned import PlanReport
from meshwright.sharding.schedule import ScheduleKind
from meshwright.sharding.topology import Topology
from meshwright.train import bench_activations, bench_traffic
from meshwright.train.bench_activations import KEPT, activations, growing_bytes
from meshwright.train.bench_plan import predicted
from meshwright.train.bench_traffic import PLANS, Planned, traffic
from meshwright.train.config import TrainConfig
from meshwright.train.run_plan import RunPlan

BASE = TrainConfig(named("tiny"))
STAGED = Planned("h100:1x4", "stage=4", "llama-1b", 8, 512, grad_accum=8)
WIDE = Planned("h100:1x8", "fsdp=8", "llama-1b", 16, 2048, vocab_size=32_000)


@pytest.mark.parametrize("plans", [PLANS, KEPT], ids=["traffic", "activations"])
def test_plans_can_be_placed_and_are_distinct(plans: tuple[Planned, ...]) -> None:
    assert len(set(plans)) == len(plans)
    for plan in plans:
        run = RunPlan.of(plan.config(BASE))
        assert str(run.topology) == plan.topology and not run.outgrows
        assert (run.config.zero, run.config.grad_accum) == (plan.zero, plan.grad_accum)
        assert run.config.context.kind == plan.context


def test_every_strategy_has_a_plan() -> None:
    for plans in (PLANS, KEPT):
        meshes = " ".join(plan.mesh for plan in plans)
        assert all(f"{axis}=" in meshes for axis in ("data", "fsdp", "tensor", "context"))
        assert all(f"{axis}=" in meshes for axis in ("expert", "stage"))
        assert {plan.zero for plan in plans} == {0, 1, 2}
        assert {plan.context for plan in plans} == {"ring", "gather", "ulysses"}
        assert {plan.schedule for plan in plans} == set(get_args(ScheduleKind))
        assert {plan.sequence for plan in plans} == {False, True}
    policies = ("none", "full", "dots", "save-attention")
    kept = {(plan.mesh, plan.zero, plan.sequence, plan.context, plan.schedule) for plan in KEPT}
    for strategy in kept:
        remats = {
            p.remat for p in KEPT if (p.mesh, p.zero, p.sequence, p.context, p.schedule) == strategy
        }
        assert remats >= set(policies), strategy


def test_settings_of_a_plan_reach_the_configuration() -> None:
    plan = Planned(
        "h100:1x8", "expert=8", "mixtral-8x7b", 8, capacity_factor=1.5, layers=2, vocab_size=512,
        remat="dots",
    )  # fmt: skip
    model = plan.config(BASE).model
    assert (model.layers, model.vocab_size, model.remat) == (2, 512, "dots")
    assert model.experts.capacity_factor == 1.5
    assert plan.settings() == {
        "topology": "h100:1x8", "mesh": "expert=8", "model": "mixtral-8x7b", "batch_size": 8,
        "remat": "dots", "capacity_factor": 1.5, "layers": 2, "vocab_size": 512,
    }  # fmt: skip


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Compilers whose programs hold some bytes more than the closed form says."""
    more = {"peak": 0.0}

    def compile_(plan: RunPlan) -> PlanReport:
        if plan.topology.kind == "tpu":
            raise MissingExtraError("no compiler for v5e")
        report, memory = plan.estimate(), predicted(plan).memory
        peak = (memory.peak_bytes or 0) + round(more["peak"])
        return replace(report, memory=replace(memory, peak_bytes=peak))

    monkeypatch.setattr(RunPlan, "compile", compile_)
    absent = replace(WIDE, topology="v5e:2x4")
    monkeypatch.setattr(bench_traffic, "PLANS", (WIDE, absent, STAGED))
    monkeypatch.setattr(bench_activations, "KEPT", (WIDE, absent, STAGED))
    return more


def test_traffic_leaves_out_what_cannot_be_compiled(compiled: Any, capsys: Any) -> None:
    assert traffic(BASE) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert [one["mesh"] for one in said["plans"]] == ["fsdp=8", "stage=4"]
    assert all(r == 1.0 for one in said["plans"] for r in one["ratios"].values())
    assert err.count("left out") == 1 and "grad_accum 8" in err


def test_a_chip_may_be_asked_for_alone(compiled: Any, capsys: Any) -> None:
    assert traffic(replace(BASE, topology="v5e:2x4")) == 0
    assert json.loads(capsys.readouterr().out)["plans"] == []


def test_growing_bytes_are_those_of_twice_the_rows_less_once() -> None:
    for plan in (WIDE, STAGED):
        runs = [RunPlan.of(replace(plan, batch_size=n * plan.batch_size).config(BASE))
                for n in (1, 2)]  # fmt: skip
        first, second = (predicted(run).memory for run in runs)
        grown = (second.peak_bytes or 0) - second.batch_bytes
        grown -= (first.peak_bytes or 0) - first.batch_bytes
        assert growing_bytes(runs[0]) == pytest.approx(grown, rel=1e-6)
        # Logits of a row in float32 are a part of it.
        tokens = plan.seq_len * plan.batch_size // (8 if plan is WIDE else 8 * 4)
        assert growing_bytes(runs[0]) > tokens * 32_000 * 4


def test_what_a_program_holds_more_counts_as_activations(
    compiled: dict[str, float], capsys: Any
) -> None:
    wide = growing_bytes(RunPlan.of(WIDE.config(BASE)))
    compiled["peak"] = 0.25 * wide
    assert activations(BASE) == 0
    said = json.loads(capsys.readouterr().out)
    assert [one["mesh"] for one in said["plans"]] == ["fsdp=8", "stage=4"]
    assert said["plans"][0]["ratio"] == pytest.approx(1.25)
    assert said["plans"][0]["closed_form_bytes"] == wide
    assert said["worst"] == max(one["ratio"] for one in said["plans"]) > 1.25
    assert Topology.parse(said["plans"][0]["topology"]).chip == "h100"
