"""The activations benchmark: what compiled steps keep for their backward pass, over closed forms.

``meshwright bench activations`` compiles one model under every strategy and remat policy and
prints, for each, the activations on a device by the compiler over those by
`meshwright.train.estimate_memory`. It takes the flags of ``train`` for what all plans share;
``--topology`` keeps the plans of that chip alone. Compiled programs are cached.

*Activations* here is all that grows with the rows of a batch: what layers keep for the backward
pass, logits and their gradient, and the temporaries of the fullest moment (recomputed activations,
scores, buffers of attention). A compiler says the sum of a device at its fullest moment, its peak,
and nothing of what that is made of. So the same is taken off both sides: what does not grow with
the rows (masters, moments, gradients, weights as matmuls read them), as the closed form has it, by
the difference that one more row a device makes. State is exact; an error of the closed form in
gradients or weights counts as one of activations. Batches are large enough that activations are
most of what is not state.

Rejected: the difference of two compiled peaks. Two programs of one step are scheduled apart, which
says more of their schedules than of a row.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import replace

from meshwright.models.config import Remat
from meshwright.train.bench_plan import predicted
from meshwright.train.bench_traffic import Planned, compiled, words_of
from meshwright.train.config import TrainConfig
from meshwright.train.run_plan import RunPlan

__all__ = ["KEPT", "activations", "growing_bytes"]

_DENSE = Planned("h100:1x8", "fsdp=8", "llama-1b", 64, 2048, vocab_size=32_000)
_MOE = Planned(
    "h100:1x8", "expert=8", "mixtral-8x7b", 16, 4096, capacity_factor=1.25, layers=4
)  # fmt: skip
_PIPED = replace(_DENSE, mesh="stage=4,data=2", grad_accum=16)

_LONG = replace(_DENSE, mesh="context=8", batch_size=8, seq_len=16_384)

_STRATEGIES = (
    replace(_DENSE, mesh="data=8"),
    replace(_DENSE, mesh="data=8", zero=1),
    replace(_DENSE, mesh="data=8", zero=2, grad_accum=2, batch_size=128),
    _DENSE,
    replace(_DENSE, mesh="tensor=8", batch_size=16),
    replace(_DENSE, mesh="tensor=8", batch_size=16, sequence=True),
    _LONG,
    replace(_LONG, context="gather"),
    replace(_LONG, context="ulysses"),
    _MOE,
    _PIPED,
    replace(_PIPED, schedule="gpipe"),
    replace(_PIPED, schedule="interleaved"),
    replace(_PIPED, schedule="v-shape"),
)
"""A plan of each strategy. Without microbatches ZeRO-2 is ZeRO-1."""

_POLICIES: tuple[Remat, ...] = ("full", "save-attention", "dots", "none")

KEPT = (
    *(replace(plan, remat=remat) for remat in _POLICIES for plan in _STRATEGIES),
    replace(_DENSE, remat="offload"),
)
"""Every strategy under every remat policy. Its vocabulary is Llama 2's, so that logits do not
hide what layers keep; batches stay below the size from which XLA rewrites GPU programs, where cuDNN
is installed: attention as matmuls keeps scores of length × length with ``none``."""


def activations(config: TrainConfig) -> int:
    """Print activations on a device by the compiler over those by closed form."""
    found = []
    for plan, run, report in compiled(KEPT, config):
        closed, peak = growing_bytes(run), report.memory.peak_bytes or 0
        ours = predicted(run).memory.peak_bytes or 0
        theirs = peak - (ours - closed)
        found.append({**plan.settings(), "attention": run.kernel(compiled=True),
                      "activations_bytes": theirs, "closed_form_bytes": closed,
                      "ratio": theirs / closed, "peak_bytes": peak})  # fmt: skip
        words = " ".join(f"{size / 2**20:9.0f}" for size in (theirs, closed))
        print(f"{words_of(plan)}{words} MiB {theirs / closed:6.3f}", file=sys.stderr, flush=True)
    ratios = [one["ratio"] for one in found]
    summary = {"median": statistics.median(ratios), "worst": max(ratios)} if ratios else {}
    print(json.dumps({"benchmark": "activations", **summary, "plans": found}), file=sys.stdout)
    return 0


def growing_bytes(run: RunPlan) -> int:
    """What of the predicted peak grows with the rows of a batch, in bytes; see the module.

    Args:
        run: whose closed forms are asked, for its own batch and for one more row of every
            microbatch on a device.
    """
    config = run.config
    rows = run.rules.axes_for("activations", "batch")
    step = config.grad_accum * math.prod(run.mesh.sizes[axis] for axis in rows)
    more = RunPlan.of(replace(config, batch_size=config.batch_size + step))
    peaks = [predicted(one).memory for one in (run, more)]
    grown = [(one.peak_bytes or 0) - one.batch_bytes for one in peaks]
    return (grown[1] - grown[0]) * (config.batch_size // step)
