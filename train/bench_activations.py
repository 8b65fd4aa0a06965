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

_STRATEGIES: tuple[tuple[Planned, int], ...] = (
    (replace(_DENSE, mesh="data=8"), 8),
    (replace(_DENSE, mesh="data=8", zero=1), 8),
    (replace(_DENSE, mesh="data=8", zero=2, grad_accum=2, batch_size=128), 16),
    (_DENSE, 8),
    (replace(_DENSE, mesh="tensor=8", batch_size=16), 8),
    (replace(_DENSE, mesh="tensor=8", batch_size=16, sequence=True), 8),
    (replace(_DENSE, mesh="context=8", batch_size=8, seq_len=16_384), 2),
    (replace(_DENSE, mesh="context=8", batch_size=8, seq_len=16_384, context="gather"), 2),
    # Scores of whole rows, without cuDNN: shorter ones than where they are attended to in chunks.
    (replace(_DENSE, mesh="context=8", batch_size=16, seq_len=4096, context="ulysses"), 4),
    (_MOE, 8),
    (_PIPED, 16),
    (replace(_PIPED, schedule="gpipe"), 16),
    (replace(_PIPED, schedule="interleaved"), 16),
)
"""A plan of each strategy, and its rows where no activation is recomputed. Without microbatches
ZeRO-2 is ZeRO-1."""


def _plans() -> tuple[Planned, ...]:
    policies: tuple[Remat, ...] = ("full", "save-attention", "dots", "none")
    found = []
    for remat in policies:
        for plan, fewer in _STRATEGIES:
            rows = fewer if remat == "none" else plan.batch_size
            # A pipeline's microbatches have two rows at least, one for each of its replicas.
            parts = max(1, min(plan.grad_accum, rows // 2))
            found.append(replace(plan, remat=remat, batch_size=rows, grad_accum=parts))
    return tuple(found)


KEPT = (
    *_plans(),
    replace(_DENSE, remat="offload"),
)
"""Every strategy under every remat policy. Its vocabulary is Llama 2's, so that logits do not
hide what layers keep; batches stay below the size from which XLA rewrites GPU programs."""


def activations(config: TrainConfig) -> int:
    """Print activations on a device by the compiler over those by closed form."""
    found = []
    for plan, run, report in compiled(KEPT, config):
        closed, peak = growing_bytes(run), report.memory.peak_bytes or 0
        ours = predicted(run).memory.peak_bytes or 0
        theirs = peak - (ours - closed)
        found.append({**plan.settings(), "activations_bytes": theirs, "closed_form_bytes": closed,
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
