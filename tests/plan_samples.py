"""Plans to show: one that fits, one that does not, one of formulas alone.

The figures are what such plans come to (parameters, traffic and FLOPs by the closed forms), so
that tables and pages are judged with numbers of real length. Nothing is compiled here.
"""

from __future__ import annotations

from typing import Any

from meshwright.sharding.planned import (
    AxisTraffic,
    Change,
    Collective,
    ComputeEstimate,
    MemoryEstimate,
    Origin,
    Phase,
    PlanReport,
    PlanWarning,
    StepEstimate,
)

__all__ = ["fitting", "formulas_only", "too_large"]

_GIB = 2**30
_SIZES = {
    "layers/attn/wq": 4096 * 4096,
    "layers/attn/wk": 4096 * 1024,
    "layers/attn/wv": 4096 * 1024,
    "layers/attn/wo": 4096 * 4096,
    "layers/mlp/gate": 4096 * 14336,
    "layers/mlp/up": 4096 * 14336,
    "layers/mlp/down": 14336 * 4096,
    "embedding": 128256 * 4096,
    "head": 4096 * 128256,
}
_LINES = {"attn": "models/attention.py:141", "mlp": "models/layers.py:203"}


_MEMORY = MemoryEstimate(
    parameters_bytes=501_891_328,
    gradients_bytes=501_891_328,
    optimizer_bytes=1_003_782_660,
    batch_bytes=262_144,
    activations_bytes=int(8.25 * _GIB),
    temporaries_bytes=int(22.98 * _GIB),
    peak_bytes=int(33.1 * _GIB),
    limit_bytes=int(95.74 * _GIB),
    contributors=(
        ("logits of the loss, float32 4×8192×128256", 16_810_770_432),
        ("residual stream kept for each layer, bfloat16 32×4×8192×4096", int(8.0 * _GIB)),
        ("optimizer moments, float32", 1_003_782_656),
        ("gathered mlp/gate, mlp/up and mlp/down of two layers", 704_643_072),
    ),
)
_WARNINGS = (
    PlanWarning(
        code="undeclared-collective",
        what="Activations cross the mesh in an all-to-all that no strategy asked for.",
        source="models/attention.py:88",
        leaf="(batch, seq, embed)",
        cost_bytes=4_026_531_840,
        cost_seconds=0.0447,
        fix="constrain the heads of the attention output: rule heads → tensor",
    ),
    PlanWarning(code="tile-padding", what="12 of 128 rows of each tile are padding."),
)
_PROVENANCE: dict[str, tuple[Origin, str]] = {
    "memory": ("compiler", "memory analysis of libtpu 0.0.42.1, peak over the schedule"),
    "memory.parameters_bytes": ("formula", "shapes and shardings, exact"),
    "memory.gradients_bytes": ("formula", "shapes and shardings, exact"),
    "memory.optimizer_bytes": ("formula", "shapes and shardings, exact"),
    "memory.limit_bytes": ("data sheet", "what libtpu enforces on v5p"),
    "collectives": ("compiler", "parsed from the compiled program, loop trips multiplied"),
    "traffic.fsdp.wire_bytes": ("compiler", "sum of the collectives on the axis"),
    "traffic.fsdp.lower_bound_bytes": ("formula", "2 gathers and 1 scatter of bfloat16"),
    "traffic.fsdp.bandwidth": ("data sheet", "6 links of 90 GB/s each way"),
    "flops": ("formula", "6N + 12Lhs a token"),
    "time.compute_seconds": ("compiler", "cycle estimates of each fusion at 1.75 GHz"),
    "time.communication_seconds": ("data sheet", "wire bytes over the axis's links"),
}


def fitting() -> PlanReport:
    """llama3-8b on a v5p slice of 64 chips, parameters sharded over all of them."""
    collectives = _fsdp_collectives(64, layers=32)
    wire = sum(collective.wire_bytes for collective in collectives)
    bound = 63 / 64 * 3 * 2 * 8_030_261_248
    seconds = wire / 540e9
    return PlanReport(
        topology="v5p:4x4x4",
        mesh={"fsdp": 64},
        model={
            "name": "llama3-8b",
            "parameters": 8_030_261_248,
            "batch_size": 256,
            "seq_len": 8192,
            "dtype": "bfloat16",
            "remat": "full",
            "strategies": ["fsdp(fsdp)"],
        },
        memory=_MEMORY,
        collectives=collectives,
        traffic={"fsdp": AxisTraffic(wire, bound, 540e9, seconds)},
        flops=ComputeEstimate(2.66e15, 1.284e17, 1.148e17, 1.326, 1.9e12),
        time=StepEstimate(
            compute_seconds=6.41,
            memory_seconds=0.687,
            communication_seconds={"fsdp": seconds},
            step_seconds_low=6.41,
            step_seconds_high=6.41 + seconds,
            tokens_per_second_per_chip=(5111.0, 5041.0),
            mfu=(0.681, 0.672),
            peak_flops=459e12,
            bound_by="compute",
            roofline_seconds=5.8,
        ),
        warnings=(
            PlanWarning(
                code="fp32-on-the-wire",
                what="The gradient of `head` is reduced in float32.",
                source="models/decoder.py:212",
                leaf="head",
                cost_bytes=1_034_321_920,
                cost_seconds=0.0019,
                fix="--loss.grad-dtype bfloat16",
            ),
        ),
        decisions=tuple(_decision(leaf, size, 64) for leaf, size in _SIZES.items()),
        provenance=_PROVENANCE,
    )


def too_large() -> PlanReport:
    """llama3-70b on 16 v5e chips: over the limit by far, with warnings and changes tried."""
    leaf = "layers/mlp/up"
    gather = Collective(
        "all-gather", ("fsdp",), 160, 75_161_927_680, 65_766_686_720, "forward", True,
        "models/layers.py:203", leaf, 8, "bf16", "all-gather-start", False, 1, "jit(step)/mlp/up",
    )  # fmt: skip
    odd = Collective(
        "all-to-all", ("data", "fsdp"), 80, 4_294_967_296, 4_026_531_840, "backward", False,
        "models/attention.py:88", "(batch, seq, embed)", 16, "f32", "all-to-all", True, 2, "",
    )  # fmt: skip
    fitted = fitting()
    return PlanReport(
        topology="v5e:4x4",
        mesh={"data": 2, "fsdp": 8},
        model={"name": "llama3-70b", "parameters": 70_553_706_496, "remat": "none"},
        memory=MemoryEstimate(
            parameters_bytes=35_276_853_248,
            gradients_bytes=35_276_853_248,
            optimizer_bytes=70_553_706_500,
            batch_bytes=65_536,
            activations_bytes=int(61.2 * _GIB),
            temporaries_bytes=int(9.1 * _GIB),
            peak_bytes=int(201.7 * _GIB),
            limit_bytes=int(15.75 * _GIB),
            contributors=(("optimizer moments, float32", 70_553_706_496), (leaf, 9_395_240_960)),
            changes=(
                Change("--model.remat full", int(145.1 * _GIB), False, "compiler"),
                Change("--topology v5p:4x4x4 --mesh fsdp=64", int(23.2 * _GIB), True, "formula"),
            ),
        ),
        collectives=(gather, odd),
        traffic={
            "data": AxisTraffic(17_000_000_000, 17_000_000_000.0, 9e10, 0.189),
            "fsdp": AxisTraffic(69_793_218_560, 62_500_000_000.0, 9e10, 0.7755),
        },
        flops=fitted.flops,
        time=StepEstimate(
            9.2,
            12.4,
            {"data": 0.189, "fsdp": 0.7755},
            12.4,
            22.56,
            (412.0, 226.0),
            (0.31, 0.17),
            197e12,
            "memory",
        ),  # fmt: skip
        warnings=_WARNINGS,
        decisions=fitted.decisions,
        provenance={
            "memory": ("compiler", "refused by libtpu; parts from shapes"),
            "traffic": ("compiler", "parsed from the compiled program"),
        },
        unread=("collective `ragged-foo` at line 7 is not known: collectives, traffic",),
    )


def formulas_only() -> PlanReport:
    """gpt2-124m on simulated devices, no compiler and no chip: most figures are unknown."""
    return PlanReport(
        topology="cpu:8",
        mesh={"data": 2, "fsdp": 2, "tensor": 2},
        model={"name": "gpt2-124m", "parameters": 124_439_808},
        memory=MemoryEstimate(
            62_219_904, 124_439_808, 124_439_812, 65_536, 301_989_888, 0, None, None
        ),
        collectives=(),
        traffic={
            "data": AxisTraffic(124_439_808, 124_439_808.0),
            "fsdp": AxisTraffic(0, 0.0),
            "tensor": AxisTraffic(603_979_776),
        },
        flops=ComputeEstimate(None, 3.1e12, None, None, None),
        time=StepEstimate(None, None),
        warnings=(),
        decisions=(),
        provenance={
            "memory": ("formula", "closed forms of shapes, mesh and rules"),
            "memory.peak_bytes": ("unknown", "only the compiler for a real target knows"),
            "collectives": ("unknown", "no program was compiled"),
            "traffic": ("formula", "closed forms of the strategies"),
        },
    )


def _fsdp_collectives(n: int, layers: int) -> tuple[Collective, ...]:
    """Each leaf gathered forward and backward and its gradient scattered once, all bfloat16."""
    found = []
    passes: tuple[tuple[Any, Phase, str], ...] = (
        ("all-gather", "forward", "all-gather-start"),
        ("all-gather", "backward", "all-gather-start"),
        ("reduce-scatter", "backward", "reduce-scatter fusion"),
    )
    for leaf, size in _SIZES.items():
        stacked = leaf.startswith("layers/")
        part = leaf.split("/")[1] if stacked else ""
        count = layers if stacked else 1
        for kind, phase, emitted in passes:
            whole = 2 * size * count
            found.append(
                Collective(
                    kind=kind,
                    axes=("fsdp",),
                    count=count,
                    bytes=whole,
                    wire_bytes=whole * (n - 1) // n,
                    phase=phase,
                    overlaps=stacked or None,
                    source=_LINES.get(part, "models/decoder.py:118"),
                    leaf=leaf,
                    participants=n,
                    dtype="bf16",
                    emitted=emitted,
                    loop_depth=int(stacked),
                    operation=f"jit(step)/{phase}/{leaf}",
                )
            )
    return tuple(found)


def _decision(leaf: str, size: int, n: int) -> dict[str, Any]:
    stacked = leaf.startswith("layers/")
    spec = [[], ["fsdp"]] if stacked else [["fsdp"]]
    return {
        "path": leaf,
        "shape": [32, size // 4096, 4096] if stacked else [size // 4096, 4096],
        "dtype": "float32",
        "dims": ["layers", "embed", "mlp"] if stacked else ["vocab", "embed"],
        "rule": "embed → fsdp",
        "reason": "",
        "bytes": 4 * size * (32 if stacked else 1),
        "bytes_per_device": 4 * size * (32 if stacked else 1) // n,
        "specs": {"params": spec, "gradients": spec, "optimizer": spec},
    }
