"""What would make a plan fit: the smallest changes, each tried.

A plan that does not fit is no answer; what is asked next is what to change. The candidates are the
settings that trade time or traffic for memory and leave the training run the same: another remat
policy, more microbatches, ZeRO on the data axis, fsdp in place of data, more of tensor. One change
is tried before two together. The closed forms put the candidates in order, in milliseconds; those
they find small enough are then compiled, until a few fit, because a closed form is no verdict.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from meshwright.sharding.errors import MeshwrightError
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.planned import Change, PlanReport
from meshwright.train.config import TrainConfig
from meshwright.train.estimate_memory import MARGIN
from meshwright.train.run_plan import RunPlan

__all__ = ["candidates", "with_changes"]

_COMPILED = 3  # candidates compiled at most; each takes as long as the plan did
_SHOWN = 4
# Estimates carry the margin of the closed forms, and without it are within 10% of the compiler's
# peak: one that is this much over the limit may still fit.
_DOUBT = 1.10 * (1 + MARGIN)


@dataclass(frozen=True)
class _Candidate:
    flags: str
    plan: RunPlan
    peak_bytes: int


def with_changes(plan: RunPlan, report: PlanReport, *, compile_them: bool) -> PlanReport:
    """The report with the changes that were tried.

    Args:
        plan: that does not fit.
        report: of it.
        compile_them: by the compiler; else, and where the closed forms find none of them near
            the limit, by the closed forms.
    """
    limit = report.memory.limit_bytes
    if limit is None:
        return report
    found = [candidate for config, flags in candidates(plan.config, plan.mesh)
             if (candidate := _estimated(plan, config, flags))]  # fmt: skip
    near = [candidate for candidate in found if candidate.peak_bytes <= limit * _DOUBT]
    if compile_them and near:
        changes = [change for candidate in near[:_COMPILED] if (change := _compiled(candidate))]
    else:
        # What fits in the order of the candidates, then what comes nearest to fitting.
        # Those that fit in the order of the candidates, smallest change first; else the nearest.
        ranked = sorted(found, key=lambda one: max(one.peak_bytes, limit))
        ranked = [one for one in ranked if not _is_more(one, ranked, limit)]
        changes = [
            Change(one.flags, one.peak_bytes, one.peak_bytes <= limit, "formula")
            for one in ranked[:_SHOWN]
        ]
    memory = replace(report.memory, changes=tuple(changes))
    return replace(report, memory=memory)


def candidates(config: TrainConfig, mesh: MeshSpec) -> Iterator[tuple[TrainConfig, str]]:
    """Changed runs with the flags that make them, single changes first.

    Args:
        config: the run.
        mesh: its filled mesh.
    """
    single = [
        *_remat(config),
        *_microbatches(config, mesh),
        *_zero(config, mesh),
        *_meshes(config, mesh),
    ]
    yield from single
    most_remat = single[len(_remat(config)) - 1] if _remat(config) else (config, "")
    base, flags = most_remat
    others = [*_microbatches(base, mesh), *_zero(base, mesh), *_meshes(base, mesh)]
    if flags:
        for changed, more in others:
            yield changed, f"{flags} {more}"
    for changed, more in _meshes(base, mesh):
        for last, micro in _microbatches(changed, MeshSpec.parse(changed.mesh)):
            yield last, " ".join(filter(None, (flags, more, micro)))


def _is_more(one: _Candidate, others: list[_Candidate], limit: int) -> bool:
    """Whether a candidate adds to another one that fits already."""
    words = set(one.flags.split())
    return any(set(other.flags.split()) < words for other in others if other.peak_bytes <= limit)


def _remat(config: TrainConfig) -> list[tuple[TrainConfig, str]]:
    order = ["none", "dots", "save-attention", "full"]
    if config.model.remat not in order:
        return []  # offload: there is nothing on the device to let go of
    tighter = order[order.index(config.model.remat) + 1 :]
    return [
        (replace(config, model=replace(config.model, remat=remat)), f"--model.remat {remat}")
        for remat in tighter
    ]


def _microbatches(config: TrainConfig, mesh: MeshSpec) -> list[tuple[TrainConfig, str]]:
    """More of them; under fsdp their sums in shards, for whole ones take more than they save."""
    found: list[tuple[TrainConfig, str]] = []
    how = ""
    if mesh.sizes.get("fsdp", 1) > 1 and config.accumulate == "whole":
        config, how = replace(config, accumulate="sharded"), " --accumulate sharded"
        if config.grad_accum > 1:
            found.append((config, how.strip()))
    parts = config.grad_accum * 2
    while parts <= config.batch_size and len(found) < 4:
        if config.batch_size % parts == 0:
            found.append((replace(config, grad_accum=parts), f"--grad-accum {parts}{how}"))
        parts *= 2
    return found


def _zero(config: TrainConfig, mesh: MeshSpec) -> list[tuple[TrainConfig, str]]:
    if mesh.sizes.get("data", 1) == 1 or config.zero:
        return []
    return [(replace(config, zero=stage), f"--zero {stage}") for stage in (1, 2)]


def _meshes(config: TrainConfig, mesh: MeshSpec) -> list[tuple[TrainConfig, str]]:
    """All of data moved into fsdp; tensor twice, four and eight times what it is; fsdp alone."""
    sizes = mesh.sizes
    data, fsdp, tensor = (sizes.get(axis, 1) for axis in ("data", "fsdp", "tensor"))
    wanted = [(1, data * fsdp, tensor)] if data > 1 else []
    for times in (2, 4, 8):
        if (data * fsdp) % times == 0:
            wanted.append((1, data * fsdp // times, tensor * times))
    if tensor > 1:
        wanted.append((1, data * fsdp * tensor, 1))
    found = []
    for shape in wanted:
        named = zip(("data", "fsdp", "tensor"), shape, strict=True)
        text = ",".join(f"{axis}={size}" for axis, size in named if size > 1)
        if text and text != str(mesh):
            # Without data there is nothing for ZeRO to split, and with fsdp no need of it.
            changed = replace(config, mesh=text, zero=0)
            found.append((changed, f"--mesh {text}" + (" --zero 0" if config.zero else "")))
    return found


def _estimated(plan: RunPlan, config: TrainConfig, flags: str) -> _Candidate | None:
    """None for a change that cannot be placed."""
    try:
        changed = RunPlan.of(config, plan.topology)
        peak = changed.estimate().memory.peak_bytes
    except MeshwrightError:
        return None
    return _Candidate(flags, changed, peak) if peak is not None else None


def _compiled(candidate: _Candidate) -> Change | None:
    try:
        memory = candidate.plan.compile().memory
    except MeshwrightError:
        return None
    if memory.peak_bytes is None:
        return None
    return Change(candidate.flags, memory.peak_bytes, bool(memory.fits), "compiler")
