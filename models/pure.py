"""A decoder as pure functions of a plain tree of arrays: what a train step needs of it.

The module is flax nnx; a compiled, donated train step wants functions and nested dicts. This
is the bridge, and the only place that crosses it. The static half of the module is traced
once a configuration and cached, so a call costs a merge and no second initialisation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from meshwright.models.attention import Cache
from meshwright.models.config import ModelConfig
from meshwright.models.decoder import Decoder
from meshwright.models.hooks import Hooks

__all__ = ["LAYERS", "Functional", "Places", "functional", "reordered"]

LAYERS = "layers"
"""The key of the parameters that are stacked and scanned."""

Places = Sequence[int | None]
"""The layer that each place of a stack holds; None for an empty one."""


def reordered(x: Array, there: Places, wanted: Places) -> Array:
    """A stack [places, …] of layers in another order; zeros in empty places.

    >>> reordered(jnp.array([5, 6, 7]), (2, 0, 1), (0, 1, None, 2)).tolist()
    [6, 7, 0, 5]
    """
    where = np.array([-1 if layer is None else there.index(layer) for layer in wanted])
    found = jnp.take(x, where, axis=0, mode="clip")
    if None not in wanted:
        return found
    return jnp.where((where >= 0).reshape(-1, *[1] * (x.ndim - 1)), found, 0)


@dataclass(frozen=True)
class Functional:
    """The pure functions of the decoder that ``config`` describes; hashable and static.

    Params are nested dicts with string keys, such as ``params["layers"]["attn"]["wq"]``
    [layers, embed, heads, head_dim]. The trees of `dims` and `shapes` are made once and shared:
    read them only.

    Attributes:
        config: of the decoder.
        places: which layer each place of the stacked layers holds, None for an empty place, as
            `meshwright.sharding.schedule.layer_slots` deals them to stages; empty for all layers
            in order. It is how params are *stored*: `apply` and `extend` run the layers they are
            given as they come, so give them `in_order`, or hooks that know.

    >>> from meshwright.models.config import named
    >>> model = functional(named("llama3-70b"))
    >>> model.dims["layers"]["mlp"]["w_up"]
    ('layers', 'embed', 'mlp')
    >>> model.shapes["layers"]["mlp"]["w_up"].shape
    (80, 8192, 28672)
    """

    config: ModelConfig
    places: tuple[int | None, ...] = ()

    def init(self, key: Array) -> dict[str, Any]:
        """Draw initial parameters, float32; the same for a key on any layout of devices.

        Under jit with output shardings, each device draws its own part only.
        """
        module = Decoder(self.config, nnx.Rngs(params=key))
        return self.placed(nnx.to_pure_dict(nnx.state(module)))

    def placed(self, params: dict[str, Any]) -> dict[str, Any]:
        """Parameters with all layers in order, as they are stored; zeros in empty places."""
        return self._reordered(params, self.layers, self.places)

    @property
    def layers(self) -> range:
        """Numbers of the stacked layers."""
        return range(self.config.layers - self.config.experts.first_dense)

    @property
    def live(self) -> np.ndarray:
        """Which places of the stacked layers hold one, bool [places]."""
        return np.array([layer is not None for layer in self.places or self.layers])

    def in_order(self, params: dict[str, Any]) -> dict[str, Any]:
        """Undo `placed`."""
        return self._reordered(params, self.places, self.layers)

    def _reordered(self, params: dict[str, Any], there: Places, wanted: Places) -> dict[str, Any]:
        if not self.places:
            return params
        layers = jax.tree.map(lambda x: reordered(x, there, wanted), params[LAYERS])
        return {**params, LAYERS: layers}

    def apply(
        self,
        params: dict[str, Any],
        tokens: Array,
        *,
        positions: Array | None = None,
        segments: Array | None = None,
        hooks: Hooks | None = None,
    ) -> Array:
        """Logits float32 [B, T, V] of ``tokens`` int32 [B, T]; see `Decoder.__call__`.

        Computes in the dtype of ``params``.
        """
        module = self._module(params)
        return module(tokens, positions=positions, segments=segments, hooks=hooks)

    def extend(
        self, params: dict[str, Any], tokens: Array, cache: Cache, *, hooks: Hooks | None = None
    ) -> tuple[Array, Cache]:
        """Read ``tokens`` int32 [B, T] after those in the cache; see `Decoder.extend`."""
        return self._module(params).extend(tokens, cache, hooks=hooks)

    def empty_cache(self, params: dict[str, Any], batch: int, length: int) -> Cache:
        """A cache for ``batch`` rows of up to ``length`` tokens, in the dtype of ``params``."""
        return Cache.empty(self.config, batch, length, params["embedding"].dtype)

    @property
    def dims(self) -> dict[str, Any]:
        """Names of every parameter's dims, in the structure of the params."""
        return _described(self.config)[1]

    @property
    def shapes(self) -> dict[str, Any]:
        """Shape and dtype of every parameter, as `jax.ShapeDtypeStruct`; nothing is drawn."""
        shapes = _described(self.config)[2]
        return jax.eval_shape(self.placed, shapes) if self.places else shapes

    def _module(self, params: dict[str, Any]) -> Decoder:
        return nnx.merge(_described(self.config)[0], params)


def functional(config: ModelConfig, places: tuple[int | None, ...] = ()) -> Functional:
    """The pure functions of the decoder that ``config`` describes; places: see `Functional`."""
    return Functional(config, places)


@functools.lru_cache(maxsize=32)
def _described(config: ModelConfig) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The static graph of the module, the dims and the shapes of its parameters."""
    abstract = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    dims = jax.tree.map(
        lambda param: param.get_metadata()["dims"],
        state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    return graph, nnx.to_pure_dict(dims), nnx.to_pure_dict(state)
