"""Where tokens of a mixture of experts go, what evens the load, and what the layers report of it.

**By row.** Loads, losses and capacities are those of one row of the batch, never of "the batch":
rows are what is dealt to devices and microbatches, so results that are sums over rows do not
depend on how they are dealt, and need no communication. The balancing loss is thus the
sequence-wise one of DeepSeek-V2 (2024, section 2.2.3), stricter than one over a whole batch: it
asks for balance within each row. Loads over the whole batch would have to be summed over devices
and microbatches before the product that the loss is, a second forward pass. `balance="bias"` has
no such limit: its gradient is linear in the loads, so summing gradients sums loads.

Where the length of rows is split as well, a call sees a part of each row, and the loads and means
of whole rows are sums over the parts (`meshwright.models.hooks.RowParts`): 2E + 1 numbers a row
and layer. Each part then reports its own load, and the first one what all of them drop, so that
sums over parts count nothing twice.

**Bias** (Wang et al. 2024, loss-free balancing): a number an expert, added to the scores for the
choice alone. What evens the load is an update against the overload, outside of the gradient. Here
it is the gradient of a loss whose value is always 0, ``sum_e (b_e - stop(b_e)) * (f_e - 1)``,
where f is the load over the mean load: so it is reduced, accumulated and saved like any other, and
any optimizer moves the bias against the overload. Adam and Lion do so by about their learning
rate a step, as the paper's sign does by a rate of its own.

Shape suffixes: B rows, T length, E experts, k choices of a token.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from meshwright.models.config import ExpertConfig, ModelConfig
from meshwright.models.hooks import RowParts

__all__ = [
    "ExpertSums",
    "Routing",
    "expert_loss",
    "hits_of",
    "load_imbalance",
    "load_of",
    "report",
    "route",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertSums:
    """What the layers of experts report, summed while a batch flows through them.

    All are sums over layers or have a dim for them, so that the report of several microbatches
    or devices is the sum, or concatenation, of theirs.

    Attributes:
        loss: what the training loss must add for each row, per token: float32 [B]; of the whole
            row, as are the next two, also where its length is split.
        balance: the balancing loss of each row, unweighted, summed over layers: float32 [B]. As
            many as there are layers of experts where the load is even.
        z: the router's z-loss of each row, unweighted, summed over layers: float32 [B].
        load: choices that went to each expert, dropped ones included, over all rows:
            int32 [layers of experts, E].
        dropped: choices that found no room, over all rows: int32 [layers of experts].
        layer: the layer that reports next, int32 scalar.
    """

    loss: Array
    balance: Array
    z: Array
    load: Array
    dropped: Array
    layer: Array

    @classmethod
    def zeros(cls, config: ModelConfig, rows: int) -> ExpertSums:
        """What no layer has added to yet, for a batch of ``rows``."""
        layers, row = config.expert_layers, jnp.zeros((rows,), jnp.float32)
        load = jnp.zeros((layers, config.experts.count), jnp.int32)
        start = jnp.zeros((), jnp.int32)
        return cls(row, row, row, load, jnp.zeros((layers,), jnp.int32), start)

    def plus(
        self, loss: Array, balance: Array, z: Array, load: Array, dropped: Array
    ) -> ExpertSums:
        """Add what one layer reports: loss, balance, z [B], load [E] and dropped, a scalar."""
        return ExpertSums(
            loss=self.loss + loss,
            balance=self.balance + balance,
            z=self.z + z,
            load=jax.lax.dynamic_update_index_in_dim(self.load, load, self.layer, 0),
            dropped=jax.lax.dynamic_update_index_in_dim(self.dropped, dropped, self.layer, 0),
            layer=self.layer + 1,
        )


@dataclass(frozen=True)
class Routing:
    """Where the tokens go.

    Attributes:
        ids: the experts of each token, best first, int32 [B, T, k].
        weights: of their outputs, float32 [B, T, k].
        shares: the router's scores as shares of 1, float32 [B, T, E].
    """

    ids: Array
    weights: Array
    shares: Array


def expert_loss(sums: ExpertSums, weights: Array) -> Array:
    """What a training loss that is summed over tokens must add; a float32 scalar.

    Args:
        sums: of the layers.
        weights: of the tokens in the loss, float32 [B, T].
    """
    return jnp.sum(sums.loss * jnp.sum(weights, axis=1))


def load_of(sums: ExpertSums) -> dict[str, Array]:
    """What of the sums is no loss: ``load`` and ``dropped``."""
    return {"load": sums.load, "dropped": sums.dropped}


def load_imbalance(load: Array) -> Array:
    """The load of the busiest expert over the mean, in the worst layer; 1 is even.

    Args:
        load: of `ExpertSums`, [layers, E], summed over all that shall count together.

    >>> float(load_imbalance(jnp.array([[2, 2, 2, 2], [6, 2, 0, 0]])))
    3.0
    """
    load = load.astype(jnp.float32)
    mean = jnp.maximum(jnp.mean(load, axis=1), 1e-9)
    return jnp.max(jnp.max(load, axis=1) / mean)


def route(settings: ExpertConfig, logits: Array, bias: Array | None = None) -> Routing:
    """Choose each token's experts, and weigh them.

    Args:
        settings: scoring, number of choices, normalisation.
        logits: of the router, float32 [B, T, E].
        bias: added to the scores for the choice alone, [E].

    Scores are the softmax of the logits, or their sigmoid (DeepSeek-V3 2024, section 2.1.2). The
    best are chosen first and normalised then: for a softmax that is the softmax over the chosen
    logits (Jiang et al. 2024, Mixtral). All of it works on the logarithms of scores, where
    dividing by a sum is a softmax, and where small sigmoids neither vanish nor tie.
    """
    softmax = settings.scoring == "softmax"
    log_scores = (jax.nn.log_softmax if softmax else jax.nn.log_sigmoid)(logits)
    ranked = jax.lax.stop_gradient(log_scores)
    if bias is not None:
        ranked = jnp.exp(ranked) + jax.lax.stop_gradient(bias).astype(jnp.float32)[None, None]
    ids = _best(ranked, settings.top_k)
    chosen = _pick(log_scores, ids)
    return Routing(
        ids=ids,
        weights=jax.nn.softmax(chosen, axis=-1) if settings.normalise else jnp.exp(chosen),
        shares=jax.nn.softmax(log_scores, axis=-1),
    )


def _best(scores: Array, choices: int) -> Array:
    """Places of the highest scores, the highest first and the first of equals: int32 [..., k].

    As `jax.lax.top_k`, whose operand compilers gather whole where its rows are split over devices.
    """
    found = []
    for _ in range(choices):
        found.append(jnp.argmax(scores, axis=-1))
        scores = jnp.where(hits_of(found[-1], scores.shape[-1]), -jnp.inf, scores)
    return jnp.stack(found, axis=-1)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _pick(scores: Array, ids: Array) -> Array:
    """``scores`` [B, T, E] at ``ids`` [B, T, k].

    By comparison with every expert, as a gather's transpose is a slow scatter; recomputed, as the
    backward pass would otherwise keep the comparisons, [B, T, k, E].
    """
    return jnp.sum(jnp.where(hits_of(ids, scores.shape[-1]), scores[:, :, None], 0.0), axis=-1)


def hits_of(ids: Array, count: int) -> Array:
    """Whether each choice is each expert: bool [..., E]."""
    return ids[..., None] == jax.lax.broadcasted_iota(ids.dtype, (*ids.shape, count), ids.ndim)


def report(
    settings: ExpertConfig,
    logits: Array,
    routing: Routing,
    bias: Array | None,
    rows: RowParts,
) -> tuple[Array, Array, Array, Array, Array]:
    """What one layer adds to `ExpertSums`.

    With f the load of an expert over the mean load and P its mean share, both in one row:

    - balance: ``sum_e f_e * P_e``, 1 where either is even (Fedus et al. 2022, eq. 4, for one
      choice; by row and for several: DeepSeek-V2 2024, section 2.2.3);
    - z: the mean of ``logsumexp(logits)²`` (Zoph et al. 2022, ST-MoE, eq. 5).

    Args:
        settings: weights of the losses, and the capacity.
        logits: of the router, float32 [B, T, E].
        routing: of these tokens.
        bias: of the router, [E].
        rows: the other parts of these rows, if this is one.

    Returns:
        loss, balance and z of whole rows [B]; of this part, load [E] and dropped, a scalar.
    """
    count, length = settings.count, logits.shape[1] * rows.parts
    mine = jnp.sum(hits_of(routing.ids, count), axis=(1, 2), dtype=jnp.int32)
    squares = jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)), axis=-1)
    parts = mine, jnp.mean(routing.shares, axis=1), squares
    counts, shares, z = rows.total(parts)
    shares, z = shares / rows.parts, z / rows.parts
    load = counts.astype(jnp.float32) * (count / (length * settings.top_k))
    balance = jnp.sum(load * shares, axis=-1)
    loss = settings.z_weight * z
    if settings.balance == "loss":
        loss += settings.balance_weight * balance
    elif bias is not None:
        bias = bias.astype(jnp.float32)
        zero = (bias - jax.lax.stop_gradient(bias))[None]
        loss += settings.balance_weight * jnp.sum(zero * (load - 1), axis=-1)
    capacity = settings.capacity(length)
    kept = counts if capacity is None else jnp.minimum(counts, capacity)
    return loss, balance, z, jnp.sum(mine, axis=0), rows.once(jnp.sum(counts - kept))
