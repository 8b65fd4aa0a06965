"""``meshwright plan``: one question answered, printed and written down.

The question is a configuration and a topology; the answer a report, by the compiler where there is
one for the topology and from shapes where there is not. Where a plan does not fit, changes that
would make it fit are tried, not guessed (`meshwright.train.plan_changes`). Nothing is written
before the report is whole, and a file that cannot be written is refused before anything compiles.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from meshwright.sharding.aot_errors import CompileError
from meshwright.sharding.aot_program import CompiledProgram
from meshwright.sharding.aot_wheels import require_wheels
from meshwright.sharding.budget import Breach, Budget, check, load_budget
from meshwright.sharding.calibration import check_matches
from meshwright.sharding.calibration_file import load_calibration
from meshwright.sharding.chips import chip_of
from meshwright.sharding.errors import ConfigError, MissingExtraError, did_you_mean
from meshwright.sharding.links import physical_layout
from meshwright.sharding.plan_html import report_html
from meshwright.sharding.plan_json import report_json
from meshwright.sharding.plan_text import print_report, verdict_text
from meshwright.sharding.plan_warnings import WARNING_CODES
from meshwright.sharding.planned import PlanReport
from meshwright.sharding.step_time import PUBLISHED, MeasuredRates
from meshwright.sharding.topology import Topology
from meshwright.sharding.units import format_bytes
from meshwright.train.config import TrainConfig
from meshwright.train.outfiles import check_writable, write_text
from meshwright.train.plan_changes import with_changes
from meshwright.train.plan_leaves import check_leaves
from meshwright.train.run_plan import RunPlan

__all__ = ["Asked", "answer"]

_EFFORTS = ("full", "quick", "shapes")
_WIDTH = 100


@dataclass(frozen=True)
class Asked:
    """What the verb's own flags ask for.

    Attributes:
        json, html, hlo: files to write.
        budget: file of limits.
        calibration: file of measured rates.
        effort: ``full``, ``quick`` or ``shapes``.
    """

    json: str | None = None
    html: str | None = None
    hlo: str | None = None
    budget: str | None = None
    calibration: str | None = None
    effort: str = "full"

    def __post_init__(self) -> None:
        if self.effort not in _EFFORTS:
            raise ConfigError(
                f"there is no effort `{self.effort}`", fix=did_you_mean(self.effort, _EFFORTS)
            )
        if self.hlo and self.effort == "shapes":
            raise ConfigError(
                "cannot write a compiled program",
                where=f"--hlo {self.hlo}, --effort shapes",
                why="nothing is compiled from shapes",
                fix="leave one of the two out",
            )


def answer(config: TrainConfig, asked: Asked) -> int:
    """Plan a run, print the report and write what was asked for.

    Returns:
        0 where it fits and is within the budget; 1 where it does not.

    Raises:
        MeshwrightError: bad input; nothing was written.
    """
    topology = _topology(config)
    budget = load_budget(asked.budget) if asked.budget else None
    rates = _rates(asked.calibration, topology)
    files = check_writable({"json": asked.json, "html": asked.html, "hlo": asked.hlo})
    plan = RunPlan.of(config, topology)
    check_leaves(plan.layout, topology)
    if budget:  # a limit on what no plan has is refused before the work is done
        check(budget, plan.estimate(rates), WARNING_CODES)
    compiler = _has_compiler(topology, asked)
    if compiler:
        print(f"compiling for {topology} (a minute or two; cached) …", file=sys.stderr)
    report, compiled = _report(plan, asked, rates, compiler)
    if report.fits is False:
        print(f"{verdict_text(report)}; trying what would fit …", file=sys.stderr)
        report = with_changes(plan, report, compile_them=compiler)
    breaches = check(budget, report, WARNING_CODES) if budget else ()
    _print(report, budget, breaches)
    _write(files, plan, report, compiled)
    return 1 if report.fits is False or breaches else 0


def _topology(config: TrainConfig) -> Topology:
    """The hardware asked about; ``auto`` is the eight simulated devices of a first run."""
    topology = Topology.parse(config.topology)
    if topology.kind == "local":
        raise ConfigError(
            "cannot plan for `local`",
            why="it stands for whatever devices are found, and a plan looks for none",
            fix="name the hardware, such as --topology v5p:4x4x4, h100:2x8 or cpu:8",
        )
    return Topology("cpu", (8,)) if topology.kind == "auto" else topology


def _rates(path: str | None, topology: Topology) -> MeasuredRates:
    chip = chip_of(topology)
    if path is None:
        return PUBLISHED
    calibration = load_calibration(path)
    if chip is None:
        raise ConfigError(
            f"cannot use the calibration `{path}`",
            where=f"--topology {topology}",
            why="simulated devices have no rates to replace",
            fix="leave it out, or plan for hardware",
        )
    check_matches(calibration, chip)
    return MeasuredRates.of(calibration, chip)


def _has_compiler(topology: Topology, asked: Asked) -> bool:
    """Whether a compiler is to be asked: not where there is none and nothing depends on one."""
    if asked.effort == "shapes" or (topology.kind == "cpu" and not asked.hlo):
        return False
    if topology.kind == "cpu":
        raise ConfigError(
            "cannot write a compiled program",
            where=f"--hlo {asked.hlo}, --topology {topology}",
            why="for simulated devices nothing is compiled: their program is no other hardware's",
            fix="leave --hlo out, or plan for hardware, such as v5e:2x4 or h100:1x8",
        )
    try:
        require_wheels(topology)
    except MissingExtraError as error:
        if asked.hlo:
            raise
        print(f"note: {error}\n  The figures below are closed forms.", file=sys.stderr)
        return False
    return True


def _report(
    plan: RunPlan, asked: Asked, rates: MeasuredRates, compiler: bool
) -> tuple[PlanReport, CompiledProgram | None]:
    """By the compiler if there is one and it is wanted, else from shapes."""
    if compiler and plan.outgrows and not asked.hlo:
        print(
            f"note: parameters and optimizer state alone take {format_bytes(plan.state_bytes)} on "
            "each device, more than it has:\n  nothing was compiled, the figures below are closed "
            "forms.",
            file=sys.stderr,
        )
        compiler = False
    if not compiler:
        return plan.estimate(rates), None
    try:
        compiled = plan.compiled(quick=asked.effort == "quick")
    except CompileError as error:
        if asked.hlo:
            _keep_chatter(asked.hlo, error.chatter)
        raise
    if compiled.quick:
        print("note: compiled at low effort, which gives no verdict.", file=sys.stderr)
    return plan.report(compiled, rates), compiled


def _print(report: PlanReport, budget: Budget | None, breaches: tuple[Breach, ...]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    print_report(report, console)
    if budget is None:
        return
    if not breaches:
        console.print(f"\nwithin the budget {budget.path}", highlight=False)
    for breach in breaches:
        console.print(f"\nover budget: {breach.text}", highlight=False, markup=False)


def _write(
    files: Mapping[str, Path], plan: RunPlan, report: PlanReport, compiled: CompiledProgram | None
) -> None:
    for kind, path in files.items():
        if kind == "json":
            write_text(path, json.dumps(report_json(report), indent=2, allow_nan=False) + "\n")
        elif kind == "html":
            write_text(path, report_html(report, physical_layout(plan.topology, plan.mesh)))
        elif compiled is not None:
            if compiled.text is None:
                why = compiled.text_error or "the compiler refuses it for its size"
                print(f"note: `{path}` is empty, there is no program: {why}", file=sys.stderr)
            write_text(path, compiled.text or "")
            _keep_chatter(str(path), compiled.chatter)


def _keep_chatter(program: str, chatter: str) -> None:
    """What the compiler wrote goes beside the program, and there also if it gave none."""
    with contextlib.suppress(OSError):
        Path(f"{program}.log").write_text(chatter, encoding="utf-8")
