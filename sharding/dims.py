"""Names for the dimensions of every leaf of a pytree: what the rules are about.

A leaf's dims, such as ``("embed", "heads", "head_dim")``, say what its dimensions mean. They
belong to the model and never mention a mesh. They come from one of four places, in this order:

1. a tree of tuples handed in beside the leaves;
2. `DimPatterns`, an ordered list of path patterns, for pytrees that carry no names;
3. Flax metadata: nnx variables (``dims=…``, else Flax's own ``out_sharding``,
   ``sharding_names`` or ``sharding``), linen boxes (``nn.Partitioned`` and its logical kin);
4. nothing: the leaf is *undeclared*, and only a strategy that says how to treat undeclared
   leaves can place it.

A leaf's address is its path, keys joined by ``/``: ``layers/attn/wq``. Optimizer state gets its
dims from the parameters: a state leaf whose path ends with a parameter's path has that
parameter's dims when the shapes agree, and the remaining dims when it is a factored moment
(one dim summed away, as in Adafactor). The alternative, copying the parameter's final spec, is
how moments come to inherit a replicated layout unnoticed; here they are resolved by their own
table.

Cost: one flatten of the tree; flax is looked at only if the program has imported it.
"""

from __future__ import annotations

import fnmatch
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import numpy as np

from meshwright.sharding.errors import DimsError, did_you_mean

__all__ = [
    "DimPatterns",
    "Dims",
    "Leaf",
    "describe",
    "describe_optimizer",
    "dims_of",
    "format_dims",
    "format_path",
    "format_shape",
]

Dims = tuple[str | None, ...]
"""One name a dimension, outermost first; None for a dimension that is never split."""

_NNX_METADATA = ("dims", "out_sharding", "sharding_names", "sharding")


@dataclass(frozen=True)
class Leaf:
    """One array of a pytree, described.

    Attributes:
        path: keys joined by ``/``.
        shape: global shape.
        dtype: element type; a jax extended dtype for RNG keys.
        dims: names of the dimensions, or None if undeclared.
        source: where the dims come from, for the reports.
        by_shape: its owner said that no names are needed: strategies place it by its shape, and
            where none of them does it stays whole.
        moment_of: of an optimizer's leaf without dims, the path of its parameter.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    dims: Dims | None = None
    source: str = "no names"
    by_shape: bool = False
    moment_of: str = ""

    def __post_init__(self) -> None:
        if self.dims is not None and not _is_dims(self.dims):
            raise DimsError(
                f"cannot name the dimensions of `{self.path}`",
                where=f"shape {format_shape(self.shape)}, {self.dims!r} from {self.source}",
                why="dims are a tuple with one name, or None, for each dimension",
                fix='write them like ("embed", "mlp")',
            )
        if self.dims is not None and len(self.dims) != len(self.shape):
            raise DimsError(
                f"cannot name the dimensions of `{self.path}`",
                where=f"shape {format_shape(self.shape)}, dims {format_dims(self.dims)}"
                f" from {self.source}",
                why=f"{len(self.dims)} names for {len(self.shape)} dimensions",
                fix="give one name a dimension, None for one that is never split",
            )

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole, unsharded leaf."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class DimPatterns:
    """Ordered path patterns that name the dims of a pytree's leaves; the first match decides.

    Attributes:
        patterns: (pattern, dims) pairs; a pattern must match the whole path, ``*`` matches
            any run of characters, slashes included. Dims of None give no names: what the model
            declares itself stands, and leaves without names are placed by their shape.

    Every array with at least one dimension needs a pattern (or metadata of its own), and
    every pattern that gives names must decide something.

    >>> import jax
    >>> tree = {"in": {"w": jax.ShapeDtypeStruct((4, 8), "float32")}}
    >>> DimPatterns((("*/w", ("embed", "mlp")),)).apply(describe(tree))[0].dims
    ('embed', 'mlp')
    >>> DimPatterns.of({"*/w": ("embed", "mlp"), "*": None}).patterns[1]
    ('*', None)
    """

    patterns: tuple[tuple[str, Dims | None], ...]

    @classmethod
    def of(cls, patterns: Mapping[str, Dims | None] | Iterable[tuple[str, Dims | None]]) -> Self:
        """Patterns from a dict or from pairs, in their order."""
        pairs = patterns.items() if isinstance(patterns, Mapping) else patterns
        return cls(
            tuple((str(pattern), dims if dims is None else tuple(dims)) for pattern, dims in pairs)
        )

    def covers(self, path: str) -> bool:
        """Whether one of the patterns matches a path."""
        return any(fnmatch.fnmatchcase(path, pattern) for pattern, _ in self.patterns)

    def apply(self, leaves: Iterable[Leaf]) -> tuple[Leaf, ...]:
        """Name the leaves.

        Raises:
            DimsError: a leaf that nothing names, a pattern that decides nothing, or a
                pattern whose number of dims is not the leaf's.
        """
        used: set[int] = set()
        named = [self._name(leaf, used) for leaf in leaves]
        for index, (pattern, dims) in enumerate(self.patterns):
            if index not in used and dims is not None:
                raise DimsError(
                    f"the dims pattern `{pattern}` decides nothing",
                    where=f"pattern {index + 1} of {len(self.patterns)}, dims {format_dims(dims)}",
                    why=self._why_unused(index, [leaf.path for leaf in named]),
                    fix="remove it, or mend the pattern; "
                    + did_you_mean(pattern, [leaf.path for leaf in named][:20]),
                )
        return tuple(named)

    def _name(self, leaf: Leaf, used: set[int]) -> Leaf:
        for index, (pattern, dims) in enumerate(self.patterns):
            if fnmatch.fnmatchcase(leaf.path, pattern):
                used.add(index)
                if dims is None:
                    return replace(leaf, by_shape=leaf.dims is None)
                return replace(leaf, dims=tuple(dims), source=f"pattern `{pattern}`")
        if leaf.dims is None and leaf.shape:
            raise DimsError(
                f"no dims pattern matches `{leaf.path}`",
                where=f"shape {format_shape(leaf.shape)}, {len(self.patterns)} patterns",
                why="with patterns given, every array must be named by one",
                fix=f'add ("{leaf.path}", ({", ".join(["…"] * len(leaf.shape))},)), or at the end '
                '("*", None) for leaves that need no names',
            )
        return leaf

    def _why_unused(self, index: int, paths: Sequence[str]) -> str:
        pattern = self.patterns[index][0]
        hits = [path for path in paths if fnmatch.fnmatchcase(path, pattern)]
        if not hits:
            return "it matches no leaf"
        earlier = next(p for p, _ in self.patterns if fnmatch.fnmatchcase(hits[0], p))
        return f"it is shadowed: `{hits[0]}` is decided by the earlier `{earlier}`"


def describe(tree: Any, dims: DimPatterns | Any | None = None) -> tuple[Leaf, ...]:
    """Describe every leaf of a pytree of arrays or shapes, in flattening order.

    Args:
        tree: arrays, ``jax.ShapeDtypeStruct``s, nnx modules or states, linen variables, optax
            states, dataclasses: any pytree.
        dims: None to take Flax metadata where there is any; `DimPatterns`; or a tree of the
            same structure whose leaves are tuples of names (or None).

    Raises:
        DimsError: wrong number of names for a leaf, or as `DimPatterns.apply`.

    >>> import jax.numpy as jnp
    >>> [leaf.path for leaf in describe({"b": jnp.ones(2), "a": [jnp.ones(3)]})]
    ['a/0', 'b']
    """
    leaves = tuple(_described(tree))
    if dims is None:
        return leaves
    if isinstance(dims, DimPatterns):
        return dims.apply(leaves)
    flat, _ = jax.tree_util.tree_flatten_with_path(
        dims, is_leaf=lambda node: node is None or _is_dims(node)
    )
    named = {format_path(key_path): names for key_path, names in flat}
    paths = [leaf.path for leaf in leaves]
    if list(named) != paths:
        strange = next((path for path in named if path not in paths), None)
        missing = next((path for path in paths if path not in named), None)
        raise DimsError(
            "cannot pair the dims with the leaves",
            why=f"{len(named)} tuples of names for {len(leaves)} leaves"
            + (f"; `{missing}` has none" if missing else "")
            + (f"; `{strange}` is no leaf" if strange else ""),
            fix="give a tree of the same structure, one tuple of names a leaf",
        )
    return tuple(
        leaf if names is None else replace(leaf, dims=names, source="the model's dims")
        for leaf, names in zip(leaves, named.values(), strict=True)
    )


def dims_of(tree: Any) -> dict[str, Dims | None]:
    """Return the dims that a tree's own metadata declares, by leaf path."""
    return {leaf.path: leaf.dims for leaf in describe(tree)}


def describe_optimizer(
    state: Any, params: Sequence[Leaf], *, anywhere: bool = False
) -> tuple[Leaf, ...]:
    """Describe an optimizer state, taking dims from the parameters by path and shape.

    Args:
        state: an optax state (or any pytree that holds trees shaped like the parameters).
        params: the described parameters.
        anywhere: the parameters' paths begin with where they lie in a larger tree, so the end of a
            path is enough, if no other parameter's ends so.

    Returns:
        A leaf for each array of the state. Moments have their parameter's dims, factored
        moments the dims that remain; what belongs to no parameter has none.
    """
    by_path = _by_ends(params) if anywhere else {leaf.path: leaf for leaf in params}
    # Not the state's own metadata: optax keeps a parameter's box around what it reduced, so the
    # names on a factored moment are those of more dims than it has.
    return tuple(_as_moment(leaf, by_path) for leaf in _described(state, metadata=False))


def _by_ends(leaves: Sequence[Leaf]) -> dict[str, Leaf]:
    """Leaves by every end of their paths that no other leaf's path has."""
    found: dict[str, Leaf | None] = {}
    for leaf in leaves:
        parts = leaf.path.split("/")
        for start in range(len(parts)):
            end = "/".join(parts[start:])
            found[end] = None if end in found else leaf
    return {end: leaf for end, leaf in found.items() if leaf is not None}


def _as_moment(leaf: Leaf, by_path: Mapping[str, Leaf]) -> Leaf:
    end = leaf.path
    while (param := by_path.get(end)) is None and "/" in end:
        end = end.partition("/")[2]
    if param is None:
        return leaf
    if param.dims is None:
        return replace(leaf, by_shape=param.by_shape, moment_of=param.path)
    if leaf.shape == param.shape:
        return replace(leaf, dims=param.dims, source=f"moment of `{param.path}`")
    dropped = _dropped_dim(leaf, param)
    if dropped is None:
        return leaf
    dims = param.dims[:dropped] + param.dims[dropped + 1 :]
    return replace(leaf, dims=dims, source=f"factored moment of `{param.path}`")


def _dropped_dim(leaf: Leaf, param: Leaf) -> int | None:
    """Which dim of the parameter a factored moment has summed away; None if that is unclear."""
    choices = [
        dim
        for dim in range(len(param.shape))
        if param.shape[:dim] + param.shape[dim + 1 :] == leaf.shape
    ]
    if len(choices) == 1:
        return choices[0]
    # Equal sizes leave the shape ambiguous. Optax's factored moments drop the largest dim in
    # `v_row` and the second largest in `v_col`, "largest" as numpy's argsort orders them.
    by_size = np.argsort(param.shape)
    names = leaf.path.split("/")
    for name, rank in (("v_row", -1), ("v_col", -2)):
        if name in names and len(by_size) >= 2 and int(by_size[rank]) in choices:
            return int(by_size[rank])
    return None


def _described(tree: Any, *, metadata: bool = True) -> Iterable[Leaf]:
    boxed = _box_types()
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        _as_pytree(tree), is_leaf=lambda node: isinstance(node, boxed)
    )
    for key_path, node in nodes:
        path = format_path(key_path)
        if not isinstance(node, boxed):
            yield _leaf(path, node, None, "no names")
            continue
        names, source = _names_of(node) if metadata else (None, "no names")
        inner = jax.tree_util.tree_flatten_with_path(node)[0]
        for inner_path, value in inner:
            # A box holds one array as a rule; its own `value` key is no part of the address.
            tail = format_path(inner_path) if len(inner) > 1 else ""
            yield _leaf(f"{path}/{tail}" if tail else path, value, names, source)


def _leaf(path: str, value: Any, dims: Dims | None, source: str) -> Leaf:
    try:
        shape, dtype = tuple(value.shape), value.dtype
    except AttributeError:
        array = np.asarray(value)
        if array.dtype == object:
            raise DimsError(
                f"`{path}` is not an array",
                where=f"a {type(value).__name__}",
                why="only arrays and numbers can be placed on devices",
                fix="partition the tree first and describe only its arrays",
            ) from None
        shape, dtype = array.shape, array.dtype
    return Leaf(path, shape, dtype, dims, source)


def _box_types() -> tuple[type, ...]:
    """Flax's metadata-carrying types, if the program uses Flax at all."""
    found: list[type] = []
    if nnx := sys.modules.get("flax.nnx"):
        found.append(nnx.Variable)
    if meta := sys.modules.get("flax.core.meta"):
        found.append(meta.AxisMetadata)
    return tuple(found)


def _as_pytree(tree: Any) -> Any:
    """An nnx module as its state, whose paths are attribute names; anything else as it is."""
    nnx = sys.modules.get("flax.nnx")
    return nnx.state(tree) if nnx and isinstance(tree, nnx.Module) else tree


def _names_of(box: Any) -> tuple[Dims | None, str]:
    nnx = sys.modules.get("flax.nnx")
    if nnx and isinstance(box, nnx.Variable):
        metadata = box.get_metadata()
        for key in _NNX_METADATA:
            if metadata.get(key) is not None:
                return tuple(metadata[key]), f"nnx metadata `{key}`"
        return None, "no names"
    names = getattr(box, "names", None)  # nn.Partitioned and LogicallyPartitioned have them
    return (None, "no names") if names is None else (tuple(names), "linen metadata")


def _is_dims(node: Any) -> bool:
    return isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)


def format_path(key_path: Sequence[Any]) -> str:
    """Join jax's path keys with ``/``, as bare names: ``layers/0/attn/wq``."""
    return "/".join([_NAME_OF.get(type(key), str)(key) for key in key_path])


# A table and not a match statement: large models have a hundred thousand of these.
_NAME_OF: dict[type, Callable[[Any], str]] = {
    jax.tree_util.DictKey: lambda key: str(key.key),
    jax.tree_util.FlattenedIndexKey: lambda key: str(key.key),
    jax.tree_util.GetAttrKey: lambda key: str(key.name),
    jax.tree_util.SequenceKey: lambda key: str(key.idx),
}


def format_shape(shape: Sequence[int]) -> str:
    """Write a shape as ``8×128``; a scalar as ``scalar``."""
    return "×".join(map(str, shape)) or "scalar"


def format_dims(dims: Dims | None) -> str:
    """Write dims as ``(embed, mlp)``; undeclared ones as ``undeclared``."""
    return "undeclared" if dims is None else f"({', '.join(str(name) for name in dims)})"
