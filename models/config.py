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
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from meshwright.sharding.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from meshwright.models.sizes import MODELS, named

__all__ = [
    "MODELS",
    "Activation",
    "Balance",
    "ExpertConfig",
    "ModelConfig",
    "Norm",
    "Positions",
    "Remat",
    "Scoring",
    "active_parameters",
    "count_parameters",
    "named",
]

Norm = Literal["rms", "layer"]
Positions = Literal["rope", "learned"]
Activation = Literal["swiglu", "gelu"]
Remat = Literal["none", "full", "dots", "save-attention", "offload"]
Balance = Literal["loss", "bias", "none"]
Scoring = Literal["softmax", "sigmoid"]

_SIZES = ("vocab_size", "layers", "embed", "heads", "kv_heads", "head_dim", "mlp", "max_length")
_POSITIVE = ("norm_eps", "rope_theta", "init_std")
_CHOICES = {"norm": Norm, "positions": Positions, "activation": Activation, "remat": Remat}


@dataclass(frozen=True)
class ExpertConfig:
    """A mixture of experts in place of the MLP; `count` of 0, the default, is a dense model.

    Raises:
        ConfigError: on construction, for values that cannot work or would have no effect.

    >>> ExpertConfig(count=8, capacity_factor=1.25).capacity(64)
    20
    >>> ExpertConfig(count=4, top_k=8)
    Traceback (most recent call last):
        ...
    meshwright.sharding.errors.ConfigError: cannot build a layer of experts
      where: count=4, top_k=8
      why:   a token cannot go to 8 of 4 experts
      fix:   use top_k=4 or less, or count=8 or more
    """

    count: int = 0
    """Experts a layer that tokens are routed to; 0 for a dense MLP."""
    top_k: int = 2
    """Experts that each token goes to."""
    mlp: int | None = None
    """Width of the hidden layer of one expert; none for the model's mlp."""
    shared: int = 0
    """Experts that every token goes to besides, as one MLP of shared × the width of an expert."""
    capacity_factor: float | None = None
    """Tokens of a row an expert takes, over their mean; the rest are dropped. none drops none."""
    scoring: Scoring = "softmax"
    """How the router's logits become scores; sigmoid scores each expert on its own."""
    normalise: bool = True
    """Divide the scores of a token's experts by their sum: the weights of the experts."""
    balance: Balance = "loss"
    """What evens the load: an auxiliary `loss`, a `bias` on the choice alone, or `none`."""
    balance_weight: float = 0.001
    """Weight of the auxiliary loss, a layer; with balance=bias, of the bias's gradient."""
    z_weight: float = 0.0
    """Weight of the router's z-loss, a layer, which keeps its logits small."""
    first_dense: int = 0
    """Layers at the start that keep a dense MLP, of the model's mlp."""

    def __post_init__(self) -> None:
        for field, choice in (("balance", Balance), ("scoring", Scoring)):
            value, known = getattr(self, field), get_args(choice)
            if value not in known:
                why = f"{field} is one of {', '.join(known)}"
                self._refuse(f"{field}={value}", why, did_you_mean(str(value), known))
        lowest = {"count": 0, "top_k": 1, "shared": 0, "first_dense": 0}
        if self.mlp is not None:
            lowest["mlp"] = 1
        for field, least in lowest.items():
            self._check_whole(field, least)
        if not self.count:
            self._refuse_unused([field.name for field in fields(self)], "count=0 is a dense MLP")
            return
        self._check_weights()
        if self.top_k > self.count:
            self._refuse(
                f"count={self.count}, top_k={self.top_k}",
                f"a token cannot go to {self.top_k} of {self.count} experts",
                f"use top_k={self.count} or less, or count={self.top_k} or more",
            )
        if self.top_k == 1 and self.normalise:
            self._refuse(
                "top_k=1, normalise=True",
                "one score over itself is always 1, so the router would learn nothing",
                "use normalise=False, or top_k=2",
            )
        factor = self.capacity_factor
        if factor is not None and not 1 <= factor < math.inf:
            self._refuse(
                f"capacity_factor={factor}",
                "below 1, tokens are dropped even where every expert has as many as the others",
                "use capacity_factor=1.0 or more, or none to drop no token",
            )

    def capacity(self, length: int) -> int | None:
        """Tokens that an expert takes from a row of ``length``; None for all that come.

        ``ceil(capacity_factor * length * top_k / count)`` (Lepikhin et al. 2021, section 2.2),
        and no more than ``length``, as a token goes to an expert once.
        """
        if self.capacity_factor is None:
            return None
        # A little less, so that 1.1 × 10 is 11 and not the next number up.
        mean = length * self.top_k / self.count
        return min(length, math.ceil(self.capacity_factor * mean * (1 - 1e-12)))

    def _refuse(self, where: str, why: str, fix: str) -> None:
        raise ConfigError("cannot build a layer of experts", where=where, why=why, fix=fix)

    def _check_whole(self, field: str, least: int) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int):
            why = f"{field} must be a whole number"
            self._refuse(f"{field}={value!r}", why, f"write {field} in digits only")
        if value < least:
            why = f"{value} is below {least}"
            self._refuse(f"{field}={value}", why, f"use {field}={least} or more")

    def _check_weights(self) -> None:
        if self.balance == "none":
            self._refuse_unused(["balance_weight"], "balance=none balances nothing")
        for field in ("balance_weight", "z_weight"):
            value = getattr(self, field)
            if not 0 <= value < math.inf:
                default = getattr(type(self), field)
                why = f"{field} must be a number of 0 or more"
                self._refuse(f"{field}={value}", why, f"use {field}={default}, the default")
        if self.balance != "none" and not self.balance_weight:
            self._refuse(
                f"balance={self.balance}, balance_weight={self.balance_weight}",
                "a weight of 0 balances nothing",
                f"use balance=none, or balance_weight={type(self).balance_weight}",
            )

    def _refuse_unused(self, names: list[str], why: str) -> None:
        changed = [name for name in names if getattr(self, name) != getattr(type(self), name)]
        if changed:
            fix = "use " + ", ".join(f"{name}={getattr(type(self), name)}" for name in changed)
            self._refuse(
                ", ".join(f"{name}={getattr(self, name)}" for name in changed),
                f"{why}, so this would have no effect",
                fix + ("" if self.count else ", or count=8 for eight experts"),
            )


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
    """What backward recomputes: `none`, `full` (whole block), `dots` (all but weight matmuls),
    `save-attention` (all but attention), `offload` (whole block; its input waits on the host)."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    experts: ExpertConfig = ExpertConfig()
    """A mixture of experts in place of the MLP."""

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
        self._check_experts()

    @property
    def group_size(self) -> int:
        """Query heads that share one key and value head."""
        return self.heads // self.kv_heads

    @property
    def expert_layers(self) -> int:
        """Blocks whose MLP is a mixture of experts: all after the first dense ones, or none."""
        return self.layers - self.experts.first_dense if self.experts.count else 0

    @property
    def expert_mlp(self) -> int:
        """Width of the hidden layer of one expert."""
        return self.experts.mlp or self.mlp

    @property
    def active_mlp(self) -> int:
        """Width of all MLPs that one token of a layer goes through, shared experts included."""
        experts = self.experts
        return (experts.top_k + experts.shared) * self.expert_mlp if experts.count else self.mlp

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

    def _check_experts(self) -> None:
        first = self.experts.first_dense
        if first >= self.layers:
            self._refuse(
                f"layers={self.layers}, experts.first_dense={first}",
                "no layer is left to have experts",
                f"use experts.first_dense={self.layers - 1} or less, or layers={first + 1} or more",
            )
        if self.experts.count and self.bias:
            self._refuse(
                f"bias=True, experts.count={self.experts.count}",
                "experts have no biases",
                "use bias=False, or experts.count=0",
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
    block = 2 * norm * config.embed
    block += 2 * config.embed * queries + 2 * config.embed * keys
    if config.bias:
        block += queries + 2 * keys + config.embed
    if config.qk_norm:
        block += 2 * norm * config.head_dim
    total = config.layers * block + norm * config.embed
    total += (config.layers - config.expert_layers) * _mlp_parameters(config, config.mlp)
    total += config.expert_layers * _expert_parameters(config)
    total += config.vocab_size * config.embed * (1 if config.tied else 2)
    if config.positions == "learned":
        total += config.max_length * config.embed
    return total


def active_parameters(config: ModelConfig) -> int:
    """Number of parameters that one token meets: all but those of the experts it is not sent to.

    Embeddings count, as in the published figures. Equal to `count_parameters` for a dense model.

    >>> from meshwright.models.config import named
    >>> active_parameters(named("mixtral-8x7b")) / 1e9
    12.879925248
    """
    idle = config.experts.count - config.experts.top_k
    if not config.experts.count:
        return count_parameters(config)
    expert = _mlp_parameters(config, config.expert_mlp)
    return count_parameters(config) - config.expert_layers * idle * expert


def _mlp_parameters(config: ModelConfig, width: int) -> int:
    matrices = 3 if config.activation == "swiglu" else 2
    biases = (matrices - 1) * width + config.embed if config.bias else 0
    return matrices * config.embed * width + biases


def _expert_parameters(config: ModelConfig) -> int:
    """Of one layer of experts: router, its bias, experts and shared experts."""
    experts, width = config.experts, config.expert_mlp
    router = experts.count * (config.embed + (experts.balance == "bias"))
    shared = _mlp_parameters(config, experts.shared * width) if experts.shared else 0
    return router + experts.count * _mlp_parameters(config, width) + shared


def __getattr__(name: str) -> Any:
    if name in ("MODELS", "named"):
        from meshwright.models import sizes

        return getattr(sizes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
