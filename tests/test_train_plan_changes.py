"""Changes that would make a plan fit: which are thought of, in what order, and each tried."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.models.config import named
from meshwright.scripts.flags import parse
from meshwright.sharding.aot_errors import CompileError
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.planned import PlanReport
from meshwright.train.config import TrainConfig
from meshwright.train.plan_changes import candidates, with_changes
from meshwright.train.run_plan import RunPlan

GIB = 2**30


def run_of(**changes: Any) -> TrainConfig:
    model = replace(named("llama3-8b"), remat=changes.pop("remat", "none"))
    fields: dict[str, Any] = {
        "topology": "v5e:4x4",
        "mesh": "data=2,fsdp=8",
        "batch_size": 64,
        "seq_len": 2048,
    }
    return TrainConfig(model, **{**fields, **changes})


def proposed(run: TrainConfig) -> dict[str, TrainConfig]:
    return {flags: config for config, flags in candidates(run, MeshSpec.parse(run.mesh))}


def test_single_changes_come_first() -> None:
    flags = list(proposed(run_of()))
    assert flags[:3] == [f"--model.remat {word}" for word in ("dots", "save-attention", "full")]
    assert flags[3:7] == [f"--grad-accum {n} --accumulate sharded" for n in (2, 4, 8, 16)]
    assert flags[7:9] == ["--zero 1", "--zero 2"]
    assert flags[9:11] == ["--mesh fsdp=16", "--mesh fsdp=8,tensor=2"]
    assert not [words for words in flags[:12] if "remat" in words and "mesh" in words]
    assert "--model.remat full --mesh fsdp=16" in flags


def test_nothing_is_proposed_that_is_so_already() -> None:
    flags = proposed(run_of(remat="full", mesh="fsdp=16", batch_size=1))
    assert not [words for words in flags if "remat" in words or "zero" in words]
    assert not [words for words in flags if "grad-accum" in words or "fsdp=16" in words]
    assert "--mesh fsdp=8,tensor=2" in flags


def test_microbatches_are_summed_in_shards_where_there_are_any() -> None:
    """Whole float32 sums of every parameter would take more than smaller batches give back."""
    assert "--accumulate sharded" in proposed(run_of(grad_accum=2))
    assert "--grad-accum 2" in proposed(run_of(mesh="data=16"))
    assert "--grad-accum 4" in proposed(run_of(grad_accum=2, accumulate="sharded"))
    plan = RunPlan.of(run_of())
    peaks = [
        RunPlan.of(run, plan.topology).estimate().memory.peak_bytes or 0
        for run in (proposed(plan.config)["--grad-accum 4 --accumulate sharded"], plan.config)
    ]
    assert peaks[0] < peaks[1] / 2


def test_a_mesh_without_data_takes_zero_away() -> None:
    """Else the flags as written would be refused: ZeRO splits over a data axis."""
    found = proposed(run_of(zero=1))
    assert "--mesh fsdp=16 --zero 0" in found and found["--mesh fsdp=16 --zero 0"].zero == 0
    assert all("--zero" in words for words in found if "--mesh" in words)


runs = st.builds(
    run_of,
    remat=st.sampled_from(["none", "dots", "full"]),
    mesh=st.sampled_from(["data=2,fsdp=8", "fsdp=16", "data=16", "data=4,tensor=4", "tensor=16"]),
    batch_size=st.sampled_from([16, 48, 64]),
    grad_accum=st.sampled_from([1, 2]),
)


@settings(max_examples=12)
@given(runs, st.sampled_from([0, 1, 2]))
def test_the_flags_make_the_run(run: TrainConfig, zero: Any) -> None:
    """Each candidate is what its flags, put after the user's command, would have planned."""
    run = replace(run, zero=zero if "data" in run.mesh else 0)
    words = ["--model", "llama3-8b", "--model.remat", run.model.remat, "--mesh", run.mesh]
    words += ["--topology", "v5e:4x4", "--batch-size", str(run.batch_size), "--seq-len", "2048"]
    words += ["--grad-accum", str(run.grad_accum), "--zero", str(run.zero)]
    words += ["--accumulate", "whole"]
    for flags, config in list(proposed(run).items())[::7]:
        added = flags.split()
        given = dict(zip(added[::2], added[1::2], strict=True))
        kept = [
            word
            for flag, value in zip(words[::2], words[1::2], strict=True)
            for word in (flag, given.pop(flag, value))
        ]
        assert not given, f"{given} are flags the command did not have"
        assert parse(kept, "plan") == config


def tried(plan: RunPlan, *, compile_them: bool) -> PlanReport:
    report = plan.estimate()
    assert report.fits is False
    return with_changes(plan, report, compile_them=compile_them)


def test_closed_forms_try_what_fits_first() -> None:
    changes = tried(
        RunPlan.of(run_of(batch_size=32, seq_len=1024)), compile_them=False
    ).memory.changes
    assert 0 < len(changes) <= 4
    assert all(change.origin == "formula" for change in changes)
    verdicts = [change.fits for change in changes]
    assert verdicts[0] and verdicts == sorted(verdicts, reverse=True)


def test_where_nothing_fits_the_nearest_are_shown() -> None:
    """And no compiler is asked: it could only agree."""
    plan = RunPlan.of(replace(run_of(mesh="fsdp=4", topology="v5e:2x2"), model=named("llama3-70b")))
    changes = tried(plan, compile_them=True).memory.changes
    assert {change.origin for change in changes} == {"formula"}
    assert not any(change.fits for change in changes)
    peaks = [change.peak_bytes for change in changes]
    assert peaks == sorted(peaks) and peaks[0] < (plan.estimate().memory.peak_bytes or 0)


def test_the_compiler_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the closed forms find small enough is compiled, three at most, and failures left."""
    asked: list[str] = []

    def compile_it(plan: RunPlan, **_: Any) -> PlanReport:
        asked.append(f"{plan.config.model.remat} {plan.config.grad_accum} {plan.mesh}")
        if len(asked) == 1:
            raise CompileError("cannot compile", failure="signal", why="killed")
        report = plan.estimate()
        peak = (20 if len(asked) == 2 else 10) * GIB
        return replace(report, memory=replace(report.memory, peak_bytes=peak))

    monkeypatch.setattr(RunPlan, "compile", compile_it)
    changes = tried(
        RunPlan.of(run_of(batch_size=32, seq_len=1024)), compile_them=True
    ).memory.changes
    assert len(asked) == 3
    assert [(c.peak_bytes, c.fits, c.origin) for c in changes] == [
        (20 * GIB, False, "compiler"),
        (10 * GIB, True, "compiler"),
    ]


def test_without_a_limit_there_is_nothing_to_try() -> None:
    plan = RunPlan.of(run_of(topology="cpu:16"))
    report = plan.estimate()
    assert with_changes(plan, report, compile_them=True) is report
