"""Model FLOPs a token, and the peak of the chips we know: model FLOP utilisation.

MFU is useful work over what the hardware could do: model FLOPs a token × tokens a second over
chips × peak. Recomputation does not count as useful work. Two conventions are in use, about 12%
apart at 8k tokens, so both are here and the one shown is named:

- full: 6Ψ + 12·L·N·H·s, every query with every key (PaLM, Chowdhery et al., 2022, appendix B);
- causal: 6Ψ + 6·L·N·H·s, only the half that a causal mask keeps.

Ψ counts the parameters that take part in matmuls: not an embedding that is only read, but a
tied one does the logits. Peaks are dense bfloat16 from the makers' data sheets.
"""

from __future__ import annotations

from meshwright.models.config import ModelConfig, count_parameters

__all__ = ["flops_per_token", "peak_flops"]

_PEAK_BFLOAT16 = (
    # (start of jax's device_kind, FLOP/s, source)
    ("NVIDIA A100", 312e12, "NVIDIA A100 data sheet, 2021"),
    ("NVIDIA H100", 989e12, "NVIDIA H100 SXM data sheet, 2023"),
    ("NVIDIA H200", 989e12, "NVIDIA H200 SXM data sheet, 2024"),
    ("NVIDIA B200", 2250e12, "NVIDIA HGX B200 data sheet, 2025"),
    ("TPU v4", 275e12, "Google Cloud TPU v4 documentation"),
    ("TPU v5 lite", 197e12, "Google Cloud TPU v5e documentation"),
    ("TPU v5e", 197e12, "Google Cloud TPU v5e documentation"),
    ("TPU v5", 459e12, "Google Cloud TPU v5p documentation"),
    ("TPU v6", 918e12, "Google Cloud TPU v6e documentation"),
)


def flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool = False) -> float:
    """Forward and backward FLOPs of the model for one token.

    Args:
        config: the model.
        seq_len: tokens a row, which attention grows with.
        causal: count only the attention that a causal mask keeps.
    """
    read_only = 0 if config.tied else config.vocab_size * config.embed
    if config.positions == "learned":
        read_only += config.max_length * config.embed
    attention = 12 * config.layers * config.heads * config.head_dim * seq_len
    return 6 * (count_parameters(config) - read_only) + attention / (2 if causal else 1)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device as jax names it; None if we do not know it.

    >>> peak_flops("NVIDIA H100 80GB HBM3")
    989000000000000.0
    >>> peak_flops("cpu") is None
    True
    """
    return next((peak for kind, peak, _ in _PEAK_BFLOAT16 if device_kind.startswith(kind)), None)
