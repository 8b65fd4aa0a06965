"""Everything a training run is told, as one frozen tree of dataclasses.

A configuration is a function that returns a `TrainConfig` (`default_config` is the one behind
``meshwright train``); a variant is one `dataclasses.replace` away. Every field is also a flag
of the command line and a key of a config file, under the same name and with the docstring
below it as its help, so that there is one place where a setting is declared.

A configuration that cannot be run is refused when it is built, as far as that can be known
without jax: this module imports none, so a wrong flag is answered before jax has loaded. What
needs the devices (does the mesh fit them, do they divide the batch) is checked by the run.

The alternative, a mutable tree filled in by later stages, was rejected: a value could then
differ between the moment it is checked, saved and used.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, get_args

from meshwright.models.config import ModelConfig, named
from meshwright.sharding.errors import ConfigError, RulesError, did_you_mean
from meshwright.sharding.mesh import AXES, MeshSpec
from meshwright.sharding.rules import Rules, Table
from meshwright.sharding.schedule import ScheduleKind
from meshwright.sharding.token_layout import ContextKind, TokenLayout
from meshwright.sharding.topology import Topology

__all__ = [
    "HYPERPARAMETERS",
    "Accumulate",
    "ContextConfig",
    "DataConfig",
    "Dtype",
    "GuardConfig",
    "LossConfig",
    "OptimizerConfig",
    "OptimizerName",
    "PipelineConfig",
    "Schedule",
    "TrainConfig",
    "Zero",
    "default_config",
]

Accumulate = Literal["whole", "sharded"]
Dtype = Literal["bfloat16", "float32"]
OptimizerName = Literal["adamw", "adafactor", "lion", "muon", "sgd"]
Schedule = Literal["cosine", "wsd", "constant"]
Zero = Literal[0, 1, 2]

HYPERPARAMETERS: dict[str, tuple[str, ...]] = {
    "adamw": ("b1", "b2", "eps"),
    "adafactor": ("eps", "momentum"),
    "lion": ("b1", "b2"),
    "muon": ("b1", "b2", "eps", "momentum"),
    "sgd": ("momentum",),
}
"""The settings each optimizer has of b1, b2, eps and momentum. Muon's b1, b2 and eps are those
of the AdamW that it leaves embeddings, norms and biases to."""

_LONGEST_DERIVED_WARMUP = 2000


@dataclass(frozen=True)
class DataConfig:
    """What text is trained on, and how it becomes tokens."""

    path: str | None = None
    """A text file, a .jsonl file or a folder of them. None: the source of Python's own standard
    library, found on this machine."""
    tokenizer: str = "bytes"
    """`bytes`, or the file of a tokenizer that `meshwright tokenize` trained."""
    mask_documents: bool = False
    """Keep attention and loss within each document of a packed row."""
    heldout_fraction: float = 0.05
    """Fraction of the documents kept for evaluation."""
    cache: str | None = None
    """Folder for the tokens, made once for each text and tokenizer. None: one in the user's cache
    folder."""

    def __post_init__(self) -> None:
        _check_number(self, "data.heldout_fraction", 0, 1, open_low=True)
        for name in ("path", "tokenizer", "cache"):
            _check_text(self, f"data.{name}")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its learning rate over time, and clipping."""

    name: OptimizerName = "adamw"
    """The update rule."""
    learning_rate: float = 3e-3
    """Learning rate at its highest, after warm-up."""
    schedule: Schedule = "cosine"
    """After warm-up: `cosine` decay, `wsd` (stays, then decays linearly), or `constant`."""
    warmup_steps: int | None = None
    """Steps of linear warm-up from 0. None: a sixth of the steps, 2000 at most."""
    decay_fraction: float = 0.2
    """Fraction of the steps that `wsd` decays over, at the end."""
    final_fraction: float = 0.1
    """Learning rate at the end, as a fraction of the highest."""
    weight_decay: float = 0.1
    """Weight decay, decoupled from the gradient and scaled by the learning rate."""
    b1: float | None = None
    """Decay of the running mean of gradients. None: the optimizer's default."""
    b2: float | None = None
    """Decay of the running mean of squared gradients. None: the optimizer's default."""
    eps: float | None = None
    """Added where the update divides. None: the optimizer's default."""
    momentum: float | None = None
    """Momentum of sgd, muon and adafactor. None: the optimizer's default."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm where they exceed it; 0: never."""

    def __post_init__(self) -> None:
        _check_choice(self, "optimizer.name", OptimizerName)
        _check_choice(self, "optimizer.schedule", Schedule)
        _check_number(self, "optimizer.learning_rate", 0, open_low=True)
        _check_number(self, "optimizer.decay_fraction", 0, 1, open_high=False)
        _check_number(self, "optimizer.final_fraction", 0, 1, open_high=False)
        _check_number(self, "optimizer.weight_decay", 0)
        _check_number(self, "optimizer.clip_norm", 0)
        if self.warmup_steps is not None:
            _check_whole(self, "optimizer.warmup_steps", 0)
        for name in ("b1", "b2", "eps", "momentum"):
            if getattr(self, name) is not None:
                self._check_hyperparameter(name)

    def _check_hyperparameter(self, name: str) -> None:
        known = HYPERPARAMETERS[self.name]
        if name not in known:
            raise ConfigError(
                f"cannot set optimizer.{name} for the optimizer `{self.name}`",
                where=f"optimizer.name={self.name}, optimizer.{name}={getattr(self, name)}",
                why=f"`{self.name}` has no {name}, so this would have no effect",
                fix=f"{self.name} has {' and '.join(f'optimizer.{word}' for word in known)}",
            )
        if name == "eps":
            _check_number(self, "optimizer.eps", 0, open_low=True)
        else:
            _check_number(self, f"optimizer.{name}", 0, 1)

    def warmup_for(self, steps: int) -> int:
        """Steps of warm-up in a run of ``steps``: as set, else derived.

        >>> OptimizerConfig().warmup_for(120), OptimizerConfig(warmup_steps=7).warmup_for(120)
        (20, 7)
        """
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(steps // 6, _LONGEST_DERIVED_WARMUP)


@dataclass(frozen=True)
class LossConfig:
    """What is added to the cross-entropy."""

    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator (Chowdhery et al. 2022); 0: off."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread over the whole vocabulary."""
    chunks: int = 1
    """Parts the length of a row is cut into for the logits, one at a time in memory; more than 1
    computes them again in the backward pass."""

    def __post_init__(self) -> None:
        _check_number(self, "loss.z_loss", 0)
        _check_number(self, "loss.label_smoothing", 0, 1)
        _check_whole(self, "loss.chunks", 1)


@dataclass(frozen=True)
class ContextConfig:
    """How attention crosses the context axis, over which the length of rows is split."""

    kind: ContextKind = "ring"
    """ring: keys and values go round, one block at a time in memory. gather: all of them on every
    device. ulysses: heads are exchanged for tokens and back; needs heads that the axis divides."""
    order: TokenLayout = "zigzag"
    """Which tokens a device has. zigzag and striped give all devices the same work under a causal
    mask, contiguous the last one nearly twice the mean."""

    def __post_init__(self) -> None:
        _check_choice(self, "context.kind", ContextKind)
        _check_choice(self, "context.order", TokenLayout)


@dataclass(frozen=True)
class PipelineConfig:
    """How microbatches go through the stages that the layers are split over."""

    schedule: ScheduleKind = "1f1b"
    """1f1b: a microbatch goes back as soon as it has arrived; few are in memory. gpipe: all go
    forward first. interleaved: each stage holds several groups of layers; less idle time.
    v-shape: two groups, down the stages and up again; half of what 1f1b keeps in memory."""
    chunks: int = 2
    """Groups of layers a stage holds where they are interleaved."""

    def __post_init__(self) -> None:
        _check_choice(self, "pipeline.schedule", ScheduleKind)
        _check_whole(self, "pipeline.chunks", 2)


@dataclass(frozen=True)
class GuardConfig:
    """When an update is skipped, and when the run gives up."""

    max_bad_steps: int = 10
    """Skipped steps in a row after which the run stops with exit code 3."""
    spike_factor: float = 0.0
    """Skip the update where the gradient norm exceeds its running mean this many times; 0: only
    where loss or gradients are not finite."""

    def __post_init__(self) -> None:
        _check_whole(self, "guard.max_bad_steps", 1)
        _check_number(self, "guard.spike_factor", 0)
        if 0 < self.spike_factor <= 1:
            raise ConfigError(
                f"cannot use guard.spike_factor={self.spike_factor}",
                why="a gradient norm at its running mean would count as a spike",
                fix="use 0 for off, or more than 1, such as 10",
            )


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Raises:
        ConfigError: on construction, for settings that cannot be run.
        MeshError, TopologyError, RulesError: on construction, for a mesh, topology or rule that
            cannot be read.

    >>> import dataclasses
    >>> dataclasses.replace(default_config(), batch_size=30, grad_accum=4)
    Traceback (most recent call last):
        ...
    meshwright.sharding.errors.ConfigError: cannot cut the batch into microbatches
      where: batch_size=30, grad_accum=4
      why:   30 rows are not divisible by 4
      fix:   use batch_size 28 or 32, or grad_accum 3 or 5
    """

    model: ModelConfig
    """Sizes and choices of the model."""
    mesh: str = "auto"
    """Mesh axes and sizes, such as data=2,fsdp=-1,tensor=2; one may be -1, what is left. auto:
    data=2,fsdp=2,tensor=2 on eight simulated devices, else fsdp=-1."""
    topology: str = "auto"
    """Devices: local, or cpu:N to simulate N. auto: accelerators where there are any, else
    cpu:8."""
    zero: Zero = 0
    """ZeRO stage over the data axis: 1 shards the optimizer state, 2 the gradients as well."""
    accumulate: Accumulate = "whole"
    """With grad_accum over 1. whole: gradients cross the data axes once a step and each device
    holds its whole sum. sharded: once a microbatch, into shards; less memory, more traffic."""
    sequence: bool = False
    """Split tokens over the tensor axis too, between the regions that it splits."""
    context: ContextConfig = field(default_factory=ContextConfig)
    """How attention crosses the context axis."""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    """How microbatches go through the stages."""
    rules: tuple[str, ...] = ()
    """A rule put before those of the strategies, such as params.mlp=tensor or, in all tables,
    vocab=none; axes are joined by +. Repeat the flag for more."""
    steps: int = 150
    """Optimizer steps."""
    batch_size: int = 32
    """Rows an optimizer step, over all devices."""
    seq_len: int = 128
    """Tokens a row."""
    grad_accum: int = 1
    """Microbatches an optimizer step."""
    seed: int = 0
    """Seed of the initial parameters and of the order of the data."""
    dtype: Dtype | None = None
    """What the model computes in. None: bfloat16 on accelerators, float32 on CPU."""
    out: str | None = None
    """Folder the run writes to, or with resume goes on in. None: the next free runs/MODEL-NNN."""
    resume: bool = False
    """Go on from the last checkpoint in the out folder, on this mesh or any other."""
    data: DataConfig = field(default_factory=DataConfig)
    """What text is trained on, and how it becomes tokens."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer, its learning rate over time, and clipping."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What is added to the cross-entropy."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """When an update is skipped, and when the run gives up."""
    log_every: int = 10
    """Steps between lines of metrics."""
    eval_every: int = 50
    """Steps between evaluations on held-out text; 0: never."""
    eval_batches: int = 4
    """Batches an evaluation reads."""
    checkpoint_every: int = 50
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = 3
    """Newest checkpoints kept."""
    keep_best: int = 1
    """Checkpoints kept for the lowest held-out loss, besides the newest."""
    profile_steps: str | None = None
    """Steps to profile, first:stop without the stop: 10:13 profiles 10, 11 and 12."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    sample_tokens: int = 200
    """Tokens of generated text shown at the end; 0: none."""
    sample_prompt: str = "def "
    """What the generated text starts from."""
    compilation_cache: str | None = None
    """Folder where compiled programs are kept between runs. None: one in the user's cache folder;
    off: nowhere."""

    def __post_init__(self) -> None:
        _check_choice(self, "zero", Zero)
        _check_choice(self, "accumulate", Accumulate)
        if self.dtype is not None:
            _check_choice(self, "dtype", Dtype)
        for name in ("steps", "batch_size", "seq_len", "grad_accum", "log_every", "eval_batches"):
            _check_whole(self, name, 1)
        _check_whole(self, "keep_last", 1)
        self._check_seed()
        for name in ("eval_every", "checkpoint_every", "keep_best", "sample_tokens"):
            _check_whole(self, name, 0)
        for name in ("out", "compilation_cache"):
            _check_text(self, name)
        Topology.parse(self.topology)
        if self.mesh != "auto":
            MeshSpec.parse(self.mesh)
        self._check_rules()
        self._check_batch()
        self._check_schedule()
        self._check_length()
        self._check_chunks()
        self._check_profile()

    @property
    def profile_range(self) -> range:
        """The steps to profile; empty when none are."""
        if self.profile_steps is None:
            return range(0)
        first, stop = self.profile_steps.split(":")
        return range(int(first), int(stop))

    def _check_seed(self) -> None:
        _check_whole(self, "seed", 0)
        if self.seed >= 2**32:
            # jax.random.key keeps the low 32 bits without a word: 2**32 would be seed 0 again.
            low = self.seed % 2**32
            _refuse("seed", self.seed, "a seed has 32 bits", f"use {low}, or any below {2**32}")

    def _check_rules(self) -> None:
        known, rules = Rules(), Rules()
        for text in self.rules:
            rules = rules.with_text(text)
        for table in get_args(Table):
            dims = known.known_dims(table)
            for rule in rules.user_rules(table):
                what = f"cannot use the rule `{table}.{rule}`"
                if not any(rule.matches(dim) for dim in dims):
                    why = f"the model has no dim `{rule.dim}` in {table}"
                    raise RulesError(what, why=why, fix=did_you_mean(rule.dim, dims))
                for axis in rule.axes:
                    if axis not in AXES:
                        fix = did_you_mean(axis, (*AXES, "none"))
                        raise RulesError(what, why=f"`{axis}` is not a mesh axis", fix=fix)

    def _check_batch(self) -> None:
        rows, parts = self.batch_size, self.grad_accum
        if rows % parts:
            multiples = [n for n in (rows - rows % parts, rows - rows % parts + parts) if n]
            below = max(n for n in range(1, parts) if rows % n == 0)
            above = next((n for n in range(parts + 1, rows + 1) if rows % n == 0), None)
            divisors = [str(n) for n in (below, above) if n]
            raise ConfigError(
                "cannot cut the batch into microbatches",
                where=f"batch_size={rows}, grad_accum={parts}",
                why=f"{rows} rows are not divisible by {parts}",
                fix=f"use batch_size {' or '.join(map(str, multiples))}, "
                f"or grad_accum {' or '.join(divisors)}",
            )

    def _check_schedule(self) -> None:
        optimizer, steps = self.optimizer, self.steps
        warmup = optimizer.warmup_for(steps)
        wsd = optimizer.schedule == "wsd"
        decay = round(optimizer.decay_fraction * steps) if wsd else 0
        if warmup + decay > steps:
            decays = f" and {decay} of decay" if decay else ""
            where = f"steps={steps}, optimizer.warmup_steps={warmup}"
            raise ConfigError(
                "cannot fit the learning rate schedule into the run",
                where=where + (f", optimizer.decay_fraction={optimizer.decay_fraction}" * wsd),
                why=f"{warmup} steps of warm-up{decays} are more than {steps}",
                fix=f"use optimizer.warmup_steps {max(steps - decay, 0)} or less, or more steps",
            )

    def _check_length(self) -> None:
        model = self.model
        if model.positions == "learned" and self.seq_len > model.max_length:
            raise ConfigError(
                f"cannot train `{model.name}` on rows of {self.seq_len} tokens",
                where=f"seq_len={self.seq_len}, model.max_length={model.max_length}",
                why=f"its learned positions end at {model.max_length}",
                fix=f"use seq_len {model.max_length} or less, or model.max_length {self.seq_len}",
            )

    def _check_chunks(self) -> None:
        length, chunks = self.seq_len, self.loss.chunks
        if length % chunks:
            below = max(n for n in range(1, chunks) if length % n == 0)
            above = next((n for n in range(chunks + 1, length + 1) if length % n == 0), None)
            raise ConfigError(
                "cannot cut rows into chunks for the loss",
                where=f"seq_len={length}, loss.chunks={chunks}",
                why=f"{length} tokens are not divisible by {chunks}",
                fix=f"use loss.chunks {below}" + (f" or {above}" if above else ""),
            )

    def _check_profile(self) -> None:
        text = self.profile_steps
        if text is None:
            return
        if not re.fullmatch(r"\d+:\d+", text):
            why, fix = "it is not first:stop in whole numbers", "write it like 10:13"
        elif not self.profile_range:
            first = text.split(":")[0]
            why, fix = "it holds no step", f"write {first}:{int(first) + 3} for three steps"
        elif self.profile_range[-1] > self.steps:
            why = f"the run has {self.steps} steps"
            fix = f"end it at {self.steps + 1} or before, or use more steps"
        else:
            return
        raise ConfigError(f"cannot profile the steps `{text}`", why=why, fix=fix)


def default_config() -> TrainConfig:
    """The run of ``meshwright train`` with no flags: `tiny` on the source of Python itself.

    Made for a machine with no accelerator: two CPU cores are enough, and eight devices are
    simulated on them.
    """
    return TrainConfig(model=named("tiny"))


def _check_whole(config: Any, path: str, least: int) -> None:
    value = _value(config, path)
    if isinstance(value, bool) or not isinstance(value, int):
        _refuse(path, value, "it must be a whole number", "write it in digits only")
    if value < least:
        _refuse(path, value, f"{value} is below {least}", f"use {least} or more")


def _check_number(
    config: Any,
    path: str,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = True,
) -> None:
    """Refuse a value that is no finite number, or outside of low … high; open ends excluded."""
    value = _value(config, path)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        _refuse(path, value, "it must be a finite number", "write a number such as 0.1 or 1e-3")
    too_low = value <= low if open_low else value < low
    too_high = value >= high if open_high else value > high
    if too_low or too_high:
        wanted = f"above {low:g}" if open_low else f"{low:g} or more"
        if math.isfinite(high):
            wanted += f" and below {high:g}" if open_high else f" and {high:g} or less"
        _refuse(path, value, f"{value} is out of range", f"use a number {wanted}")


def _check_choice(config: Any, path: str, choice: Any) -> None:
    value, known = _value(config, path), get_args(choice)
    if value not in known or isinstance(value, bool):
        words = [str(item) for item in known]
        _refuse(path, value, "it is not one of the choices", did_you_mean(str(value), words))


def _check_text(config: Any, path: str) -> None:
    """Refuse empty text: an unset shell variable in a script would otherwise mean this folder."""
    if _value(config, path) == "":
        _refuse(path, "", "it is empty", "give a path, or leave it out for the default")


def _value(config: Any, path: str) -> Any:
    return getattr(config, path.rsplit(".", 1)[-1])


def _refuse(path: str, value: Any, why: str, fix: str) -> NoReturn:
    shown = repr(value) if value == "" else value
    raise ConfigError(f"cannot use {path}={shown}", why=why, fix=fix)
