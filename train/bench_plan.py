"""The closed forms beside the compilers: errors of predicted memory, and of a ranking by time.

``meshwright bench memory_errors`` compiles a documented list of plans for hardware that is not
here and prints the predicted peak, the compiler's and the error. `CHOSEN` are those that the terms
of `meshwright.train.estimate_memory` were chosen on; `HELD_OUT` were compiled afterwards, so their
errors say what to expect of other plans. ``meshwright bench ranking`` does the same for step times
of one model on one topology: what matters to a search is their order, so it prints Spearman's rank
correlation.

Programs are compiled one at a time and cached, so another run only reads them; the first takes
half an hour on two cores. Both take the flags of ``train`` for what all plans share; ``--topology``
keeps the plans of that chip alone. Topologies whose compiler is not installed are left out, and
said so.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from meshwright.models.config import Remat, named
from meshwright.sharding.chips import chip_of
from meshwright.train.bench_traffic import compiled
from meshwright.train.config import TrainConfig
from meshwright.train.estimate import Estimate, estimate
from meshwright.train.estimate_memory import MARGIN
from meshwright.train.run_plan import RunPlan

__all__ = [
    "CHOSEN",
    "HELD_OUT",
    "RANKED",
    "Case",
    "memory_errors",
    "predicted",
    "rank_correlation",
    "ranking",
]

_MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A plan to compile."""

    topology: str
    mesh: str
    model: str
    batch_size: int
    seq_len: int = 2048
    remat: Remat = "full"
    grad_accum: int = 1
    zero: int = 0

    def config(self, base: TrainConfig) -> TrainConfig:
        """The run, other settings as ``base`` has them."""
        model = replace(named(self.model), remat=self.remat)
        return replace(
            base,
            model=replace(model, max_length=max(model.max_length, self.seq_len)),
            topology=self.topology,
            mesh=self.mesh,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            grad_accum=self.grad_accum,
            zero=self.zero,  # type: ignore[arg-type]
        )


CHOSEN = (
    Case("a100:1x8", "fsdp=4,tensor=2", "llama-1b", 32, 1024),
    Case("a100:1x8", "fsdp=8", "llama-1b", 16),
    Case("a100:2x8", "fsdp=16", "llama-3b", 32),
    Case("b200:1x8", "data=2,fsdp=4", "llama-3b", 16, 2048, "dots"),
    Case("b200:1x8", "fsdp=8", "llama3-8b", 8),
    Case("h100:1x8", "data=2,fsdp=2,tensor=2", "llama-1b", 16),
    Case("h100:1x8", "data=2,fsdp=4", "qwen3-0.6b", 32, 1024, "dots"),
    Case("h100:1x8", "data=4,fsdp=2", "gpt2-124m", 64, 1024),
    Case("h100:1x8", "data=4,tensor=2", "qwen3-0.6b", 16, zero=1),
    Case("h100:1x8", "data=8", "llama-1b", 32, 1024, "dots"),
    Case("h100:1x8", "data=8", "llama-1b", 8),
    Case("h100:1x8", "data=8", "llama-1b", 8, zero=1),
    Case("h100:1x8", "data=8", "llama-1b", 32, grad_accum=4),
    Case("h100:1x8", "fsdp=4,tensor=2", "llama-3b", 16),
    Case("h100:1x8", "fsdp=8", "gpt2-124m", 64, 1024, "none"),
    Case("h100:1x8", "fsdp=8", "llama-1b", 16, 2048, "dots"),
    Case("h100:1x8", "fsdp=8", "llama-1b", 16),
    Case("h100:1x8", "fsdp=8", "llama-1b", 32, grad_accum=4),
    Case("h100:1x8", "fsdp=8", "llama-1b", 16, 2048, "none"),
    Case("h100:1x8", "fsdp=8", "llama-3b", 8, 4096),
    Case("h100:1x8", "fsdp=8", "qwen3-0.6b", 16),
    Case("h100:1x8", "tensor=8", "llama-1b", 4),
    Case("h100:2x8", "data=2,fsdp=8", "llama-3b", 32, 2048, "dots"),
    Case("h100:2x8", "fsdp=16", "llama-1b", 64),
    Case("h100:2x8", "fsdp=8,tensor=2", "llama3-8b", 32, 1024),
    Case("h100:32x8", "fsdp=32,tensor=8", "llama3-70b", 256),
    Case("h100:4x8", "data=4,fsdp=8", "llama-3b", 64, grad_accum=2),
    Case("h100:4x8", "fsdp=32", "llama3-8b", 64, 2048, "dots"),
    Case("h100:8x8", "data=8,fsdp=8", "llama3-8b", 64, 2048, "dots"),
    Case("h100:8x8", "fsdp=64", "llama3-8b", 64),
    Case("h100:8x8", "fsdp=8,tensor=8", "llama3-8b", 64),
    Case("h200:1x8", "fsdp=8", "llama-1b", 32, 4096),
    Case("h200:2x8", "data=2,fsdp=8", "llama-3b", 32),
    Case("v5e:16x16", "data=16,fsdp=16", "llama3-8b", 256, 4096),
    Case("v5e:2x4", "fsdp=8", "llama-1b", 8, 2048, "dots"),
    Case("v5e:2x4", "fsdp=8", "llama-1b", 16),
    Case("v5e:4x4", "data=4,fsdp=4", "llama-1b", 32),
    Case("v5e:4x4", "fsdp=4,tensor=4", "llama-1b", 16),
    Case("v5p:2x2x2", "fsdp=8", "llama-1b", 32, 4096),
)
"""Plans that the closed forms of memory were chosen on."""

HELD_OUT = (
    Case("b200:1x8", "fsdp=4,tensor=2", "llama3-8b", 16),
    Case("h100:1x8", "data=2,tensor=4", "llama-3b", 8, 2048, "dots"),
    Case("h100:1x8", "data=4,fsdp=2", "llama-1b", 16, 4096),
    Case("h100:1x8", "fsdp=2,tensor=4", "qwen3-0.6b", 16, 2048, "dots"),
    Case("h100:1x8", "fsdp=8", "gpt2-1.5b", 32, 1024),
    Case("h100:1x8", "fsdp=8", "llama-3b", 16, 1024, "none"),
    Case("h100:4x8", "fsdp=16,tensor=2", "qwen3-8b", 32),
    Case("h200:2x8", "fsdp=16", "qwen3-8b", 32, 2048, "dots"),
    Case("v5e:2x4", "data=2,fsdp=2,tensor=2", "llama-1b", 16),
    Case("v5e:2x4", "data=8", "gpt2-124m", 64, 1024),
    Case("v5e:2x4", "fsdp=8", "qwen3-0.6b", 16, 4096),
    Case("v5e:8x8", "fsdp=64", "llama3-8b", 64),
    Case("v5e:8x8", "fsdp=8,tensor=8", "llama3-8b", 64, 4096),
    Case("v5p:2x2x2", "data=8", "llama-1b", 16, 4096),
    Case("v5p:2x2x2", "fsdp=8", "llama-1b", 32, 4096, "none"),
    Case("v5p:4x4x4", "data=4,fsdp=16", "llama3-8b", 128, 4096, "dots"),
    Case("v5p:4x4x4", "fsdp=16,tensor=4", "llama3-8b", 128, 8192),
    Case("v6e:4x4", "fsdp=16", "llama-3b", 32, 4096),
)
"""Plans compiled when the closed forms stood."""

_SHAPES: tuple[tuple[str, Remat, int, int], ...] = (
    ("data=16", "dots", 1, 0),
    ("data=16", "full", 1, 0),
    ("data=16", "full", 1, 1),
    ("data=16", "none", 1, 0),
    ("data=2,fsdp=4,tensor=2", "full", 1, 0),
    ("data=2,fsdp=8", "dots", 1, 0),
    ("data=2,fsdp=8", "full", 1, 0),
    ("data=2,fsdp=8", "full", 2, 0),
    ("data=2,tensor=8", "full", 1, 0),
    ("data=4,fsdp=4", "dots", 2, 0),
    ("data=4,fsdp=4", "full", 1, 0),
    ("data=4,tensor=4", "dots", 1, 0),
    ("data=8,fsdp=2", "dots", 1, 0),
    ("data=8,fsdp=2", "full", 1, 0),
    ("data=8,tensor=2", "full", 1, 0),
    ("fsdp=16", "dots", 1, 0),
    ("fsdp=16", "dots", 2, 0),
    ("fsdp=16", "full", 1, 0),
    ("fsdp=16", "full", 2, 0),
    ("fsdp=16", "none", 1, 0),
    ("fsdp=2,tensor=8", "full", 1, 0),
    ("fsdp=4,tensor=4", "dots", 1, 0),
    ("fsdp=4,tensor=4", "full", 1, 0),
    ("fsdp=8,tensor=2", "full", 1, 0),
)
RANKED = tuple(
    Case("h100:2x8", mesh, "llama-1b", 32, 2048, remat, parts, zero)
    for mesh, remat, parts, zero in _SHAPES
)
"""Plans of one model, one batch and one cluster, as a search would compare them."""


def memory_errors(config: TrainConfig) -> int:
    """Print predicted and compiled peaks of all plans; 1 if one that does not fit was let pass."""
    found, false_fits = [], 0
    for part, cases in (("chosen", CHOSEN), ("held out", HELD_OUT)):
        for case, plan, report in compiled(cases, config):
            ours = predicted(plan).memory.peak_bytes or 0
            peak, limit = report.memory.peak_bytes or 0, report.memory.limit_bytes or 0
            let_pass = predicted(plan, MARGIN).memory.fits
            false_fits += bool(let_pass) and peak > limit
            # A program that does not fit is refused or rewritten: its peak is nobody's figure.
            error = ours / peak - 1 if peak <= limit else None
            found.append({**case.__dict__, "part": part, "predicted_bytes": ours,
                          "peak_bytes": peak, "limit_bytes": limit, "error": error})  # fmt: skip
            words = "does not fit" if error is None else f"{error:+7.1%}"
            _say(f"{_words(case)}{ours / _MIB:9.0f}{peak / _MIB:9.0f} MiB  {words}")
    summary: dict[str, Any] = {"false_fits": false_fits}
    for part in ("chosen", "held out"):
        errors = [abs(one["error"]) for one in found
                  if one["part"] == part and one["error"] is not None]  # fmt: skip
        if errors:
            summary[part] = {"plans": len(errors), "median": statistics.median(errors),
                             "worst": max(errors)}  # fmt: skip
            _say(f"{part}: {len(errors)} plans, median {statistics.median(errors):.1%}, "
                 f"worst {max(errors):.1%}")  # fmt: skip
    _say(f"let pass with a margin of {MARGIN:.0%}, but too large: {false_fits}")
    _answer({"benchmark": "memory_errors", **summary, "plans": found})
    return 1 if false_fits else 0


def ranking(config: TrainConfig) -> int:
    """Print step times by closed forms and from compiled programs, and how alike their order is."""
    found = []
    for case, plan, report in compiled(RANKED, config):
        ours, theirs = predicted(plan).time, report.time
        times = [
            (one.step_seconds_low or 0.0, one.step_seconds_high or 0.0) for one in (ours, theirs)
        ]
        found.append({**case.__dict__, "predicted_seconds": times[0], "compiled_seconds": times[1]})
        words = " ".join(f"{1e3 * low:7.1f} to{1e3 * high:7.1f} ms" for low, high in times)
        _say(f"{_words(case)}{words}")
    if len(found) < 2:
        return 0
    pairs = [(one["predicted_seconds"], one["compiled_seconds"]) for one in found]
    low = rank_correlation([a[0] for a, _ in pairs], [b[0] for _, b in pairs])
    mean = rank_correlation([sum(a) for a, _ in pairs], [sum(b) for _, b in pairs])
    _say(f"{len(found)} plans: rank correlation {low:.3f} of the low ends, {mean:.3f} of the means")
    _answer({"benchmark": "ranking", "low": low, "mean": mean, "plans": found})
    return 0


def predicted(plan: RunPlan, margin: float = 0.0) -> Estimate:
    """The closed forms of the program that can be compiled here.

    Args:
        plan: whose attention may be matmuls here and a fused kernel where it runs.
        margin: of memory; see `meshwright.train.estimate.estimate`.
    """
    return estimate(
        plan.config,
        plan.mesh,
        plan.rules,
        chip_of(plan.topology),
        plan.links,
        compute_itemsize=plan.itemsize,
        fused_attention=plan.kernel(compiled=True) != "matmuls",
        margin=margin,
    )


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks.

    >>> rank_correlation([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 40.0, 30.0])
    0.8
    """
    return statistics.correlation(_ranks(one), _ranks(other))


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first = {value: place for place, value in reversed(list(enumerate(ordered)))}
    return [first[value] + (ordered.count(value) - 1) / 2 for value in values]


def _words(case: Case) -> str:
    extra = f" zero {case.zero}" if case.zero else ""
    extra += f" {case.grad_accum} microbatches" if case.grad_accum > 1 else ""
    return (
        f"{case.topology:<11}{case.mesh:<24}{case.model:<11}{case.remat:<5}"
        f"{case.batch_size:>4} x {case.seq_len:<5}{extra:<16}"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _answer(found: dict[str, Any]) -> None:
    print(json.dumps(found), file=sys.stdout)
