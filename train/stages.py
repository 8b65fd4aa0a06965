"""A decoder cut in two: what a stage of a pipeline does, and the head that follows the last one.

Every stage runs one program. Its *body* looks tokens up, takes the result if it is the first stage
and what the stage before has sent if it is not, and applies its layers. The *head* is norm, logits
and loss of what the last layers have made. Both are the model's own call, with the hooks
(`meshwright.models.hooks`) of a stage: a model that calls them needs to know nothing of pipelines.

What one half does not need of the call is dead code, and removed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from meshwright.models.hooks import Hooks, keep_scored
from meshwright.models.pure import Functional
from meshwright.models.routing import expert_loss, load_of
from meshwright.train.replicas import Batch
from meshwright.train.weights import Weights

__all__ = ["StageModel", "floats_of", "joined"]


def floats_of(tree: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    """The leaves of a tree that can be differentiated, and the others.

    >>> floats_of((jnp.ones(2), jnp.arange(3)))[1]
    [Array([0, 1, 2], dtype=int32)]
    """
    leaves = jax.tree.leaves(tree)
    return [x for x in leaves if _is_float(x)], [x for x in leaves if not _is_float(x)]


def joined(like: Any, floats: list[Any], others: list[Any]) -> Any:
    """Undo `floats_of`, in the structure of ``like``."""
    leaves, tree = jax.tree.flatten(like)
    first, second = iter(floats), iter(others)
    return jax.tree.unflatten(tree, [next(first if _is_float(x) else second) for x in leaves])


@dataclass(frozen=True)
class StageModel:
    """The two halves of a model, for one stage and one replica.

    Attributes:
        model: as functions.
        weights: how parameters are read.
        hooks: a microbatch → the hooks of the step.
    """

    model: Functional
    weights: Weights
    hooks: Callable[[Batch], Hooks]

    def carry(self, params: Any, rows: Batch) -> Any:
        """What flows from stage to stage, as shapes: that which the model gives to its layers."""
        seen: list[Any] = []

        def run_layers(body: Any, stacked: Any, x: Any, remat: Any) -> Any:
            del body, stacked, remat
            seen.append(x)
            return x

        def call(params: Any, rows: Batch) -> Any:
            self._apply(params, rows, replace(self.hooks(rows), run_layers=run_layers))
            return seen[-1]

        return jax.eval_shape(call, params, rows)

    def body(
        self, params: Any, carry: Any, rows: Batch, first: jax.Array, live: jax.Array | None
    ) -> tuple[Any, jax.Array]:
        """Embedding and layers of one stage.

        Args:
            params: working copies; of the layers, those of the stage.
            carry: from the stage before.
            rows: the microbatch.
            first: whether this is the first stage, and ``carry`` is not to be read.
            live: see `Weights.run_layers`.

        Returns:
            What the next stage reads, and what the layers add to the training loss, a float32
            scalar that counts after the last chunk.
        """
        seen: list[Any] = []

        def run_layers(body: Any, stacked: Any, x: Any, remat: Any) -> Any:
            x = jax.tree.map(lambda mine, came: jnp.where(first, mine, came), x, carry)
            seen.append(self.weights.run_layers(body, stacked, x, remat, live))
            return seen[-1]

        def collect(scored: Any, sums: Any) -> Any:
            del scored
            return expert_loss(sums, rows["weights"])

        def score(x: jax.Array, project: Any) -> Any:
            del x, project
            return jnp.zeros((), jnp.float32)

        hooks = replace(self.hooks(rows), run_layers=run_layers, collect=collect, score=score)
        loss = self._apply(params, rows, hooks)
        return seen[-1], loss

    def load(self, carry: Any) -> dict[str, jax.Array]:
        """What the layers of experts report besides losses; nothing without experts."""
        return load_of(carry[1]) if self.model.config.experts.count else {}

    def head(self, params: Any, x: jax.Array, rows: Batch) -> tuple[jax.Array, jax.Array]:
        """Sums of the training loss and of the plain cross-entropy.

        Args:
            params: working copies.
            x: some tokens of the stream, after all layers [B, T, D].
            rows: of these tokens.
        """

        def run_layers(body: Any, stacked: Any, mine: Any, remat: Any) -> Any:
            del body, stacked, remat
            leaves, tree = jax.tree.flatten(mine)
            return jax.tree.unflatten(tree, [x, *leaves[1:]])

        def attention(q: jax.Array, k: jax.Array, v: jax.Array, **_: Any) -> jax.Array:
            # Of dense layers before the stack; what they make is not read.
            del k, v
            return q

        hooks = replace(
            self.hooks(rows), run_layers=run_layers, collect=keep_scored, attention=attention
        )
        return self._apply(params, rows, hooks)

    def _apply(self, params: Any, rows: Batch, hooks: Hooks) -> Any:
        return self.model.apply(
            self.weights.use_all_but_layers(params),
            rows["tokens"],
            positions=rows.get("positions"),
            segments=rows.get("segments"),
            hooks=hooks,
        )


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
