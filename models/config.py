"""What a decoder is, as a value: sizes and the choices that make it Llama-3, Qwen-3 or GPT-2.

One frozen dataclass describes every family. A family is not a class but a handful of choices
(norm, positions, activation, biases, QK-norm, tied embeddings), so a variant is one
`dataclasses.replace` away and anything that reads a configuration reads all of them::

    dataclasses.replace(named("llama-1b"), layers=4, remat="full")

A value that cannot be a model is refused here, before jax is imported, and so is a field that
would have no effect (RoPE scaling on learned positions): a setting that is ignored in silence
is a wrong run found late.

The named sizes are in `sizes`; `MODELS` and `named` are served from there on first use, as
they need this class and this class must not need them.

This module imports no jax, flax or numpy: the command line reads it to print its help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from meshwright.sharding.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from meshwright.models.sizes import MODELS, named

__all__ = [
    "MODELS",
    "Activation",
    "ModelConfig",
    "Norm",
    "Positions",
    "Remat",
    "count_parameters",
    "named",
]

Norm = Literal["rms", "layer"]
Positions = Literal["rope", "learned"]
Activation = Literal["swiglu", "gelu"]
Remat = Literal["none", "full", "dots"]

_SIZES = ("vocab_size", "layers", "embed", "heads", "kv_heads", "head_dim", "mlp", "max_length")
_POSITIVE = ("norm_eps", "rope_theta", "init_std")
_CHOICES = {"norm": Norm, "positions": Positions, "activation": Activation, "remat": Remat}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of one decoder transformer.

    Raises:
        ConfigError: on construction, for a value that cannot be a model.

    >>> small = ModelConfig("small", vocab_size=256, layers=2, embed=64, heads=4, kv_heads=2,
    ...                     head_dim=16, mlp=128, max_length=128)
    >>> small.group_size
    2
    >>> import dataclasses
    >>> dataclasses.replace(small, kv_heads=3)
    Traceback (most recent call last):
        ...
    meshwright.sharding.errors.ConfigError: cannot build the model `small`
      where: heads=4, kv_heads=3
      why:   4 query heads cannot share 3 key and value heads evenly
      fix:   use kv_heads=2 or 4, or heads=3 or 6
    """

    name: str
    """What the model is called in reports and checkpoints."""
    vocab_size: int
    """Number of token ids; rows of the embedding."""
    layers: int
    """Number of transformer blocks."""
    embed: int
    """Width of the residual stream."""
    heads: int
    """Number of query heads."""
    kv_heads: int
    """Number of key and value heads; `heads` must be a multiple of it."""
    head_dim: int
    """Width of one head; heads × head_dim need not be `embed`."""
    mlp: int
    """Width of the hidden layer of the MLP."""
    max_length: int
    """Longest sequence, in tokens; with learned positions, rows of their table."""
    norm: Norm = "rms"
    """`rms`: RMSNorm (Zhang and Sennrich 2019). `layer`: LayerNorm (Ba et al. 2016)."""
    norm_eps: float = 1e-5
    """Added to the mean square or variance before the root."""
    positions: Positions = "rope"
    """`rope`: rotary embeddings (Su et al. 2021). `learned`: a trained table, as in GPT-2."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    rope_factor: float = 1.0
    """Llama-3.1 frequency scaling: long wavelengths are stretched this much; 1 means none."""
    rope_low_freq_factor: float = 1.0
    """Scaling is whole for wavelengths over rope_original_length divided by this."""
    rope_high_freq_factor: float = 4.0
    """Scaling is absent for wavelengths under rope_original_length divided by this."""
    rope_original_length: int = 8192
    """Sequence length, in tokens, before the scaling extended it."""
    activation: Activation = "swiglu"
    """`swiglu`: gated SiLU, three matrices (Shazeer 2020). `gelu`: tanh GELU, two matrices."""
    bias: bool = False
    """Biases on every projection of a block, and on LayerNorm; RMSNorm never has one."""
    qk_norm: bool = False
    """Norm of each query and key head before the rotation, as in Qwen-3."""
    tied: bool = False
    """The logits use the embedding's own weights instead of a matrix of their own."""
    remat: Remat = "none"
    """What backward recomputes: `none`, `full` (whole block), `dots` (all but weight matmuls)."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        for field, choice in _CHOICES.items():
            self._check_choice(field, get_args(choice))
        for field in _SIZES:
            self._check_size(field)
        for field in _POSITIVE:
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                default = getattr(type(self), field)
                self._refuse(
                    f"{field}={value}",
                    f"{field} must be a number above 0",
                    f"use {field}={default}, the default",
                )
        if self.heads % self.kv_heads:
            self._refuse_heads()
        self._check_rope()

    @property
    def group_size(self) -> int:
        """Query heads that share one key and value head."""
        return self.heads // self.kv_heads

    def _refuse(self, where: str, why: str, fix: str = "") -> None:
        raise ConfigError(f"cannot build the model `{self.name}`", where=where, why=why, fix=fix)

    def _check_choice(self, field: str, known: tuple[str, ...]) -> None:
        value = getattr(self, field)
        if value not in known:
            fix = did_you_mean(str(value), known)
            self._refuse(f"{field}={value}", f"{field} is one of {', '.join(known)}", fix)

    def _check_size(self, field: str) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int):
            self._refuse(
                f"{field}={value!r}",
                f"{field} must be a whole number",
                f"write {field} in digits only",
            )
        if value < 1:
            self._refuse(f"{field}={value}", f"{value} is below 1", f"use {field}=1 or more")

    def _refuse_heads(self) -> None:
        heads, kv_heads = self.heads, self.kv_heads
        below = max(n for n in range(1, kv_heads) if heads % n == 0)
        above = min((n for n in range(kv_heads + 1, heads + 1) if heads % n == 0), default=None)
        shared = f"kv_heads={below}" + ("" if above is None else f" or {above}")
        down = heads - heads % kv_heads
        multiples = f"heads={down} or {down + kv_heads}" if down else f"heads={kv_heads}"
        self._refuse(
            f"heads={heads}, kv_heads={kv_heads}",
            f"{heads} query heads cannot share {kv_heads} key and value heads evenly",
            f"use {shared}, or {multiples}",
        )

    def _check_rope(self) -> None:
        """Refuse rotary settings that cannot work, and those that would have no effect."""
        if self.positions == "learned":
            self._check_unused(("rope_theta", "rope_factor"), "positions=learned has no rotation")
        elif self.head_dim % 2:
            self._refuse(
                f"head_dim={self.head_dim}, positions=rope",
                "RoPE rotates pairs of numbers and an odd head_dim leaves one over",
                f"use head_dim={self.head_dim - 1 or 2} or {self.head_dim + 1}",
            )
        scaling = ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_length")
        if self.rope_factor == 1:
            self._check_unused(scaling, "rope_factor=1 means no scaling")
            return
        if not (math.isfinite(self.rope_factor) and self.rope_factor > 1):
            self._refuse(
                f"rope_factor={self.rope_factor}",
                "the scaling can only stretch wavelengths",
                "use rope_factor=1 for no scaling, or more",
            )
        if self.rope_original_length < 1:
            self._check_size("rope_original_length")
        if not 0 < self.rope_low_freq_factor < self.rope_high_freq_factor < math.inf:
            self._refuse(
                f"rope_low_freq_factor={self.rope_low_freq_factor}, "
                f"rope_high_freq_factor={self.rope_high_freq_factor}",
                "the low factor must be above 0 and below the high one",
                "use 1 and 4, the values of Llama-3.1",
            )

    def _check_unused(self, fields: tuple[str, ...], why: str) -> None:
        # The class attribute of a dataclass field is its default.
        changed = [field for field in fields if getattr(self, field) != getattr(type(self), field)]
        if changed:
            self._refuse(
                ", ".join(f"{field}={getattr(self, field)}" for field in changed),
                f"{why}, so this would have no effect",
                "use " + ", ".join(f"{field}={getattr(type(self), field)}" for field in changed),
            )


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters of the model, in closed form: nothing is traced or allocated.

    Tied embeddings count once. Equal to the sum over the real module's leaves (tested), and
    to the published count of every named size.

    >>> from meshwright.models.config import named
    >>> count_parameters(named("gpt2-124m"))
    124439808
    """
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    norm = 2 if config.norm == "layer" and config.bias else 1  # parameters an entry
    matrices = 3 if config.activation == "swiglu" else 2
    block = 2 * norm * config.embed
    block += 2 * config.embed * queries + 2 * config.embed * keys
    block += matrices * config.embed * config.mlp
    if config.bias:
        block += queries + 2 * keys + config.embed + (matrices - 1) * config.mlp + config.embed
    if config.qk_norm:
        block += 2 * norm * config.head_dim
    total = config.layers * block + norm * config.embed
    total += config.vocab_size * config.embed * (1 if config.tied else 2)
    if config.positions == "learned":
        total += config.max_length * config.embed
    return total


def __getattr__(name: str) -> Any:
    if name in ("MODELS", "named"):
        from meshwright.models import sizes

        return getattr(sizes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
