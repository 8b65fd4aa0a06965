"""The optimizers and their learning rate, composed from optax.

`make_optimizer` returns one `optax.GradientTransformation` for a configuration. Clipping is not
part of it: the step clips by the global norm itself, because it also reports that norm and
skips the update where it is not finite.

What is a matrix is read from the names of the dims, not from ranks. A weight
``(embed, heads, head_dim)`` maps ``embed`` to all heads together, so its neighbouring head dims
count as one side; a bias ``(heads, head_dim)`` has one side only and is no matrix, although it
has two dims. ``layers`` is a stack of separate weights, not a side. Two things hang on this:

Weight decay reaches matrices and embedding tables, not norm scales and biases: those set the
scale and offset of their output, a handful of numbers without redundancy, and pulling them to 0
takes that freedom away without simplifying anything.

Muon orthogonalises the matrices, each layer's on its own; embeddings, the output head, norms
and biases get AdamW (Jordan et al. 2024: a lookup table's rows are not one linear map). Its
update has the root mean square of AdamW's, ``0.2 * sqrt(max(fan_in, fan_out))`` times the
orthogonal matrix (Liu et al. 2025, "Muon is Scalable for LLM Training", eq. 4), so one learning
rate serves both. Orthogonalising needs whole matrices: the compiler gathers what is split.

Where the states keep what (``PATH`` is a parameter's path, so a moment is sharded as its
parameter, see `meshwright.sharding.describe_optimizer`; counters are int32 scalars)::

    adamw      0/count, 0/mu/PATH, 0/nu/PATH, 2/count
    lion       0/count, 0/mu/PATH, 2/count
    sgd        0/trace/PATH, 2/count                  (momentum 0: 1/count alone)
    adafactor  0/count, 0/v_row/PATH, 0/v_col/PATH, 0/v/PATH, 2/count, 3/inner_state/count
               (with momentum: 3/count, 3/ema/PATH, 4/inner_state/count in place of the last)
    muon       inner_states/muon/inner_state/: 0/count, 0/mu/PATH of matrices, 3/count
               inner_states/adam/inner_state/: 0/count, 0/mu/PATH, 0/nu/PATH of the others, 2/count

Adafactor's ``v_row`` is a parameter's shape without its largest dim, ``v_col`` without the
second largest, and ``v`` has shape [1]; a parameter whose second largest dim is below 128 has
``v`` in full and the other two of shape [1].

Rejected: `optax.contrib.muon` as a whole. It gives the rest Nesterov Adam, decays either none
or all of it, and keeps the constant Newton-Schulz coefficients in the state, an array with no
parameter to take a layout from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from meshwright.train.config import OptimizerConfig

__all__ = ["learning_rate_schedule", "make_optimizer"]

_Schedule = Callable[[Any], jax.Array]

_STACKED = ("layers", "dense_layers", "experts", "routes")
_HEADS = ("heads", "kv_heads", "head_dim")
_TABLES = ("vocab", "positions")
_MUON_RMS = 0.2
# b2 of 0.95 is what language models are trained with (Brown et al. 2020, appendix B; Touvron et
# al. 2023, section 2.2); optax's 0.999 remembers for longer than gradients there stay alike.
_DEFAULTS: dict[str, dict[str, float]] = {
    "adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8},
    "adafactor": {"eps": 1e-30, "momentum": 0.0},
    "lion": {"b1": 0.9, "b2": 0.99},
    "muon": {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "momentum": 0.95},
    "sgd": {"momentum": 0.9},
}


def learning_rate_schedule(cfg: OptimizerConfig, steps: int) -> _Schedule:
    """Return the learning rate as a function of the number of updates made so far.

    With W steps of warm-up, t counted from 0, p the highest rate and f ``final_fraction``::

        t < W     p * (t + 1) / (W + 1)                           never 0, p at t = W
        constant  p
        cosine    p * (f + (1 - f) * (1 + cos(pi * u)) / 2)       u = (t - W) / (steps - W)
        wsd       p * (1 - (1 - f) * u)                           u = (t - steps + D) / D, from 0

    where D is ``decay_fraction`` of the steps, and u stays within 0 and 1. Cosine: Loshchilov
    and Hutter 2017, eq. 5, without restarts. WSD, warm-up, stable, decay: Hu et al. 2024
    (MiniCPM), section 4, with the linear decay of Hägele et al. 2024, section 3.

    Args:
        cfg: schedule, ``learning_rate`` and the fractions.
        steps: optimizer steps of the whole run.

    Returns:
        A traceable function of a whole number, giving a float32 scalar.

    >>> rate = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=3), 103)
    >>> [round(float(rate(t)), 3) for t in (0, 1, 3, 53, 103, 500)]
    [0.25, 0.5, 1.0, 0.55, 0.1, 0.1]
    """
    peak, final = cfg.learning_rate, cfg.final_fraction
    warmup = cfg.warmup_for(steps)
    decay = round(cfg.decay_fraction * steps)

    def rate(step: Any) -> jax.Array:
        t = jnp.asarray(step, jnp.float32)
        if cfg.schedule == "cosine":
            u = jnp.clip((t - warmup) / max(steps - warmup, 1), 0.0, 1.0)
            share = final + (1 - final) * (1 + jnp.cos(math.pi * u)) / 2
        elif cfg.schedule == "wsd":
            u = jnp.clip((t - (steps - decay)) / max(decay, 1), 0.0, 1.0)
            share = 1 - (1 - final) * u
        else:
            share = jnp.ones_like(t)
        return peak * share * jnp.minimum((t + 1) / (warmup + 1), 1.0)

    return rate


def make_optimizer(
    cfg: OptimizerConfig, steps: int, dims: Any
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of a configuration, without gradient clipping.

    Every weight decay is decoupled from the gradient and multiplied by the learning rate
    (Loshchilov and Hutter 2019). Adafactor takes absolute steps (no scaling by the parameter's
    own size), so that its learning rate means what it means for the others; its clipping of an
    update to a root mean square of 1, and its factoring, see a stack of layers as one array.

    Args:
        cfg: name, learning rate and settings; None means the default of that optimizer.
        steps: optimizer steps of the whole run, for the schedule.
        dims: nested dict of the parameters' structure, a tuple of dim names a leaf.

    Returns:
        Its states are pytrees of arrays laid out as this module's docstring says. ``update``
        needs the parameters as well as the gradients.

    References:
        AdamW: Loshchilov and Hutter 2019. Adafactor: Shazeer and Stern 2018. Lion: Chen et al.
        2023. Muon: Jordan et al. 2024.
    """
    rate = learning_rate_schedule(cfg, steps)
    decayed = _map_dims(lambda leaf: len(_sides(leaf)) > 1, dims)
    build = {"adamw": _adamw, "adafactor": _adafactor, "lion": _lion, "muon": _muon, "sgd": _sgd}
    made = build[cfg.name](cfg, rate, decayed, dims)
    return optax.with_extra_args_support(made)


def _adamw(cfg: OptimizerConfig, rate: _Schedule, decayed: Any, _: Any) -> Any:
    b1, b2, eps = (_setting(cfg, name) for name in ("b1", "b2", "eps"))
    return optax.adamw(rate, b1, b2, eps, weight_decay=cfg.weight_decay, mask=decayed)


def _lion(cfg: OptimizerConfig, rate: _Schedule, decayed: Any, _: Any) -> Any:
    b1, b2 = _setting(cfg, "b1"), _setting(cfg, "b2")
    return optax.lion(rate, b1, b2, weight_decay=cfg.weight_decay, mask=decayed)


def _sgd(cfg: OptimizerConfig, rate: _Schedule, decayed: Any, _: Any) -> Any:
    momentum = _setting(cfg, "momentum")
    return optax.chain(
        *([optax.trace(momentum)] if momentum else []),
        optax.add_decayed_weights(cfg.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(rate),
    )


def _adafactor(cfg: OptimizerConfig, rate: _Schedule, decayed: Any, _: Any) -> Any:
    return optax.adafactor(
        rate,
        multiply_by_parameter_scale=False,
        momentum=_setting(cfg, "momentum") or None,
        # optax adds this decay after the learning rate, so it has to bring its own.
        weight_decay_rate=lambda step: cfg.weight_decay * rate(step),
        eps=_setting(cfg, "eps"),
        weight_decay_mask=decayed,
    )


def _muon(cfg: OptimizerConfig, rate: _Schedule, decayed: Any, dims: Any) -> Any:
    numbers = _map_dims(lambda leaf: _muon_numbers(leaf) or optax.MaskedNode(), dims)
    labels = _map_dims(lambda leaf: "muon" if _muon_numbers(leaf) else "adam", dims)
    matrices = optax.chain(
        _orthogonal_momentum(_setting(cfg, "momentum"), numbers),
        optax.stateless(lambda updates, _: jax.tree.map(_rescale, updates, numbers)),
        optax.add_decayed_weights(cfg.weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    others = _adamw(cfg, rate, decayed, dims)
    return optax.partition({"muon": matrices, "adam": others}, labels)


def _orthogonal_momentum(momentum: float, numbers: Any) -> optax.GradientTransformation:
    """`optax.contrib.scale_by_muon` with its constant coefficients kept out of the state."""
    inner: Any = scale_by_muon(beta=momentum, weight_dimension_numbers=numbers)

    def init(params: Any) -> Any:
        return inner.init(params)._replace(ns_coeffs=())

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        coefficients = inner.init({}).ns_coeffs
        updates, state = inner.update(updates, state._replace(ns_coeffs=coefficients), params)
        return updates, state._replace(ns_coeffs=())

    return optax.GradientTransformation(init, update)


def _rescale(update: jax.Array, numbers: MuonDimensionNumbers) -> jax.Array:
    fans = [
        math.prod(update.shape[axis] for axis in _axes(side))
        for side in (numbers.reduction_axis, numbers.output_axis)
    ]
    return update * (_MUON_RMS * math.sqrt(max(fans)))


def _muon_numbers(dims: tuple[str | None, ...]) -> MuonDimensionNumbers | None:
    """Input and output axes of a matrix; None for what AdamW updates.

    >>> _muon_numbers(("layers", "heads", "head_dim", "embed"))
    MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=(3,))
    """
    sides = _sides(dims)
    if len(sides) != 2 or set(dims) & set(_TABLES):
        return None
    return MuonDimensionNumbers(reduction_axis=sides[0], output_axis=sides[1])


def _sides(dims: tuple[str | None, ...]) -> list[tuple[int, ...]]:
    """The axes of a weight grouped into what it maps from and to; weights are stored input first.

    >>> _sides(("layers", "embed", "kv_heads", "head_dim")), _sides(("heads", "head_dim"))
    ([(1,), (2, 3)], [(0, 1)])
    """
    sides: list[tuple[int, ...]] = []
    for axis, name in enumerate(dims):
        if name in _STACKED:
            continue
        if name in _HEADS and axis and dims[axis - 1] in _HEADS:
            sides[-1] += (axis,)
        else:
            sides.append((axis,))
    return sides


def _setting(cfg: OptimizerConfig, name: str) -> float:
    given = getattr(cfg, name)
    return _DEFAULTS[cfg.name][name] if given is None else given


def _axes(side: Any) -> tuple[int, ...]:
    return (side,) if isinstance(side, int) else tuple(side)


def _map_dims(fn: Callable[[tuple[str | None, ...]], Any], dims: Any) -> Any:
    return jax.tree.map(fn, dims, is_leaf=lambda node: isinstance(node, tuple))
