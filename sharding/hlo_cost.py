"""What a compiled program computes and moves through memory in a step, from its text.

Compilers report costs for one pass over the text: a scan over 32 layers counts as one layer, and
custom calls as nothing. Here every computation is taken as often as a step runs it, every
contraction by its shapes (`hlo_flops`), every scheduled instruction by the bytes it touches
(`hlo_traffic`). For a decoder the FLOPs of matmuls come out as the closed form, exactly.

What cannot be priced is named, never dropped: an unknown custom call, a loop without a known
trip count (taken once). Cost: a tenth of a second for a step of a megabyte of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshwright.sharding.hlo import Module
from meshwright.sharding.hlo_flops import UnpricedError, flops_of
from meshwright.sharding.hlo_program import Program
from meshwright.sharding.hlo_traffic import scheduled_computations, traffic_bytes

__all__ = ["ProgramCost", "cost_of"]


@dataclass(frozen=True)
class ProgramCost:
    """Work of one device in one step.

    Attributes:
        matmul_flops: of matmuls and convolutions by operand type, as `Chip.peak_flops` names it.
        attention_flops: of fused attention kernels, by a model of ours.
        memory_traffic_bytes: read and written in device memory.
        unread: in sentences, what could not be priced.
    """

    matmul_flops: Mapping[str, float] = field(hash=False)
    attention_flops: float
    memory_traffic_bytes: float
    unread: tuple[str, ...] = ()

    @property
    def device_flops(self) -> float:
        """All of it: matmuls, convolutions and fused attention."""
        return sum(self.matmul_flops.values()) + self.attention_flops


def cost_of(module: Module) -> ProgramCost:
    """Count FLOPs and memory traffic of a compiled program.

    Args:
        module: from `meshwright.sharding.hlo.parse_module`.

    >>> from meshwright.sharding.hlo import parse_module
    >>> text = '''HloModule m
    ... ENTRY e {
    ...   a = bf16[64,32]{1,0} parameter(0)
    ...   b = bf16[32,16]{1,0} parameter(1)
    ...   ROOT c = bf16[64,16]{1,0} dot(a, b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    ... }
    ... '''
    >>> cost = cost_of(parse_module(text))
    >>> cost.device_flops == 2 * 64 * 32 * 16
    True
    >>> cost.memory_traffic_bytes == 2 * (64 * 32 + 32 * 16 + 64 * 16)
    True
    """
    program = Program(module)
    scheduled = scheduled_computations(module)
    matmuls: dict[str, float] = {}
    attention = traffic = 0.0
    unread: list[str] = []
    for computation in module.computations.values():
        times = program.counts[computation.name]
        if times == 0:
            continue
        if times is None:
            unread.append(f"{computation.name}: a loop without a known trip count, taken once")
            times = 1
        for instruction in computation.instructions.values():
            try:
                found = flops_of(instruction, computation)
            except UnpricedError as error:
                unread.append(f"{instruction.name} in {computation.name}: {error}")
                found = None
            if found is not None and found.attention:
                attention += times * found.amount
            elif found is not None:
                matmuls[found.dtype] = matmuls.get(found.dtype, 0.0) + times * found.amount
            if computation.name in scheduled:
                traffic += times * traffic_bytes(program, instruction)
    return ProgramCost(matmuls, attention, traffic, tuple(unread))
