"""Model FLOPs a token, and the peak of the chips we know: model FLOP utilisation.

MFU is useful work over what the hardware could do: model FLOPs a token × tokens a second over
chips × peak. Recomputation does not count as useful work. Two conventions are in use, about 12%
apart at 8k tokens, so both are here and the one shown is named:

- full: 6Ψ + 12·L·N·H·s, every query with every key (PaLM, Chowdhery et al., 2022, appendix B);
- causal: 6Ψ + 6·L·N·H·s, only the half that a causal mask keeps.

Ψ counts the parameters that take part in matmuls: not an embedding that is only read, but a
tied one does the logits. Peaks are dense bfloat16 from the makers' data sheets, as
`meshwright.sharding.chips` has them.
"""

from __future__ import annotations

from meshwright.models.config import ModelConfig, active_parameters
from meshwright.sharding.chips import CHIPS, chip_of_device_kind

__all__ = ["flops_per_token", "peak_flops"]


def flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool = False) -> float:
    """Forward and backward FLOPs of the model for one token.

    Args:
        config: the model; of experts, those a token is sent to.
        seq_len: tokens a row, which attention grows with.
        causal: count only the attention that a causal mask keeps.
    """
    read_only = 0 if config.tied else config.vocab_size * config.embed
    if config.positions == "learned":
        read_only += config.max_length * config.embed
    attention = 12 * config.layers * config.heads * config.head_dim * seq_len
    return 6 * (active_parameters(config) - read_only) + attention / (2 if causal else 1)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device as jax names it; None if we do not know it.

    >>> peak_flops("NVIDIA H100 80GB HBM3")
    989000000000000.0
    >>> peak_flops("cpu") is None
    True
    """
    chip = chip_of_device_kind(device_kind)
    if chip is None and device_kind.startswith("NVIDIA A100") and "MIG" not in device_kind:
        chip = CHIPS["a100"]  # every A100 board has the same tensor cores, whatever its memory
    return chip.peak_flops["bf16"] if chip else None
