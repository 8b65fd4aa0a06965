"""Any tree onto a mesh: decisions, shardings, birth in place, layouts held, batches dealt.

A `Placer` is a mesh with rules, and applies them to whatever pytree it is shown: parameters, a
Flax ``TrainState``, an ``nnx.Module`` or a tuple of one and its ``nnx.Optimizer``, linen
variables, an equinox module. Users who keep their own jitted step need nothing else; a
`meshwright.plan` is built on it.

What is an optimizer's state is told by its place: whatever lies in an optax state or below a name
``opt_state``. It goes by the ``optimizer`` table and takes its dims from the parameter whose path
its own ends with; everything else goes by ``params``. Leaves that are no arrays (functions, names,
numbers that a module carries) are passed by; but a number called ``step`` becomes an array on the
mesh when it is born. The first step would make it one, and the second would be compiled anew.

nnx objects are split into their state and merged again, so weights that two modules share are one
leaf. They are built with nnx's eager sharding off: their metadata names dims, and only the rules
say what mesh axes these are.

Cost: one abstract trace of a function whose results are to be placed. The alternative, shardings
read off a first unsharded build, is how large models run out of memory before they train.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.sharding.decisions import Decision, Decisions, resolve, resolve_dims
from meshwright.sharding.dims import (
    DimPatterns,
    Dims,
    Leaf,
    describe,
    describe_optimizer,
    format_path,
)
from meshwright.sharding.errors import PlacementError, TopologyError
from meshwright.sharding.mesh import MeshSpec, with_auto_axes
from meshwright.sharding.placement import check_random
from meshwright.sharding.process_rows import blocks_of, check_agreement, copy_to, from_own_rows
from meshwright.sharding.rules import Rules
from meshwright.sharding.slices import described_mesh
from meshwright.sharding.strategies import Strategy, rules_for
from meshwright.sharding.topology import Topology

__all__ = [
    "Patterns",
    "Placer",
    "TreeLayout",
    "has_nnx",
    "is_array",
    "merge_nnx",
    "split_nnx",
    "strong",
    "unannotated",
]

Patterns = DimPatterns | Mapping[str, Dims | None] | Iterable[tuple[str, Dims | None]]


@dataclass(frozen=True)
class TreeLayout:
    """Where the leaves of one tree live.

    Attributes:
        params: decisions by the ``params`` table, of all that is no optimizer state.
        moments: decisions by the ``optimizer`` table, of the rest.
        in_order: all of them in the tree's flattening order.
    """

    params: Decisions
    moments: Decisions
    in_order: tuple[Decision, ...]

    def specs(self, tree: Any) -> Any:
        """The specs in the structure of the tree that was shown; of what is no array, whole."""
        left = iter(self.in_order)
        return jax.tree.map(
            lambda leaf: next(left).spec if is_array(leaf) else PartitionSpec(), tree
        )

    def shardings(self, tree: Any, mesh: Mesh) -> Any:
        """As `specs`, on a mesh."""
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            self.specs(tree),
            is_leaf=lambda node: isinstance(node, PartitionSpec),
        )


@dataclass(frozen=True)
class Placer:
    """A mesh and the rules by which trees are laid on it.

    Attributes:
        mesh: built mesh.
        rules: folded rules.
        dims: names for leaves without metadata; None for metadata and shapes alone.
        batch_dims: names of the dims of a batch's arrays, by path; arrays that no pattern names
            have rows first.
        described: hardware that is not here, for which ``mesh`` is abstract: everything can be
            decided and compiled for it, nothing placed.
        by_axis_names: where the rules are the strategies that the mesh's axes are named after, the
            written rules added to them: on a mesh of other axes they would be others.

    >>> import jax.numpy as jnp
    >>> placer = Placer.on("data=2,fsdp=4")
    >>> placer.specs({"w": jnp.ones((128, 64))})["w"] == PartitionSpec("fsdp")
    True
    """

    mesh: Mesh
    rules: Rules
    dims: DimPatterns | None = None
    batch_dims: tuple[tuple[str, Dims], ...] = ()
    described: Topology | None = None
    by_axis_names: tuple[str, ...] | None = None

    @classmethod
    def on(
        cls,
        mesh: str | MeshSpec | Mesh,
        rules: Rules | Sequence[Strategy | str] | None = None,
        *,
        dims: Patterns | None = None,
        batch_dims: Mapping[str, Dims] | None = None,
        topology: str | Topology = "local",
    ) -> Placer:
        """A placer from what people write.

        Args:
            mesh: ``"data=2,fsdp=4"``, a spec, or a mesh that exists; its axes are taken as Auto.
            rules: Rules; strategies and rules in their written form; or None for the strategy of
                each of the mesh's axes.
            dims: path patterns that name dims.
            batch_dims: see the class.
            topology: whose devices to take for a mesh that does not exist yet; this machine's, or
                hardware that is not here, such as ``v5p:4x4x4``.

        Raises:
            MeshError, TopologyError, RulesError: what cannot be built or folded.
        """
        target = Topology.parse(topology) if isinstance(topology, str) else topology
        described = None if isinstance(mesh, Mesh) or _is_here(target) else target
        built = _built(mesh, target)
        by_names = None
        if not isinstance(rules, Rules):
            words = tuple(rule for rule in rules or () if isinstance(rule, str))
            by_names = words if len(words) == len(rules or ()) else None
            rules = rules_for(MeshSpec.of(built).names, rules)
        patterns = dims if dims is None or isinstance(dims, DimPatterns) else DimPatterns.of(dims)
        batch_patterns = tuple((batch_dims or {}).items())
        return cls(built, rules, patterns, batch_patterns, described, by_names)

    def on_other(self, mesh: str | MeshSpec | Mesh, topology: str | Topology = "local") -> Placer:
        """The same placer on another mesh: by the same rules, or, where they are those that the
        axes are named after, by those of its axes."""
        rules = self.rules if self.by_axis_names is None else self.by_axis_names
        other = Placer.on(mesh, rules, topology=topology)
        return replace(other, dims=self.dims, batch_dims=self.batch_dims)

    @property
    def spec(self) -> MeshSpec:
        """Names and sizes of the mesh."""
        return MeshSpec.of(self.mesh)

    def check_here(self) -> None:
        """Refuse to place anything on hardware that is only described.

        Raises:
            TopologyError: names it, and what works.
        """
        if self.described is not None:
            raise TopologyError(
                f"cannot place arrays on `{self.described}`",
                why="it describes hardware, it is not this machine",
                fix="look at decisions and report(); to run, use topology='local' on that "
                f"hardware, or 'cpu:{self.mesh.size}' to simulate",
            )

    def in_force(self) -> contextlib.AbstractContextManager[Any]:
        """Sets this mesh where ``jax.set_mesh`` has set another, or the same with Explicit axes."""
        said = jax.sharding.get_abstract_mesh()
        own = said.empty or said == self.mesh.abstract_mesh
        return contextlib.nullcontext() if own else jax.set_mesh(self.mesh)

    def on_mesh(self, tree: Any) -> Any:
        """Arrays of another mesh, as ``jax.set_mesh`` makes them, whole on this one."""

        whole = NamedSharding(self.mesh, PartitionSpec())

        def one(leaf: Any) -> Any:
            made_on = getattr(getattr(leaf, "sharding", None), "mesh", None)
            other = isinstance(leaf, jax.Array) and made_on not in (None, self.mesh)
            return copy_to(leaf, whole) if other else leaf

        return jax.tree.map(one, tree)

    def layout(self, tree: Any) -> TreeLayout:
        """Decide where each leaf of a tree lives.

        Raises:
            DimsError, RulesError, PlacementError: see `meshwright.sharding.decisions.resolve`.
        """
        tree = jax.tree.map(lambda leaf: leaf if is_array(leaf) else None, _state_of(tree))
        leaves = describe(tree)
        inside = _optimizer_paths(tree)
        is_moment = [any(_below(leaf.path, path) for path in inside) for leaf in leaves]
        params = [leaf for leaf, moment in zip(leaves, is_moment, strict=True) if not moment]
        params = list(self.dims.apply(params)) if self.dims else params
        moments = _as_moments(tree, leaves, is_moment, params)
        found = resolve(params, self.rules, self.spec, "params")
        rest = resolve(moments, self.rules, self.spec, "optimizer", check_used=False, beside=params)
        one, other = iter(found), iter(rest)
        in_order = tuple(next(other) if moment else next(one) for moment in is_moment)
        return TreeLayout(found, rest, in_order)

    def specs(self, tree: Any) -> Any:
        """The spec of every leaf, in the structure of the tree (of an nnx object: of its state)."""
        tree = _state_of(tree)
        return self.layout(tree).specs(tree)

    def shardings(self, tree: Any) -> Any:
        """As `specs`, as NamedShardings: what `jax.jit` takes."""
        tree = _state_of(tree)
        return self.layout(tree).shardings(tree, self.mesh)

    def init(self, build: Callable[..., Any], *args: Any) -> Any:
        """Run ``build(*args)`` as one program whose results are born where they are to live.

        Args:
            build: returns any tree, nnx objects in it too; only jax operations.
            args: its arguments, typically an RNG key.

        Returns:
            What ``build`` returns, each array in its layout.

        Raises:
            TopologyError: the mesh is of hardware that is only described.
            DimsError, RulesError, PlacementError: as `layout`.
        """
        self.check_here()
        check_random(self.mesh)
        kept: list[Any] = []

        def arrays(*args: Any) -> Any:
            with unannotated():
                graph, state = split_nnx(build(*args))
            state = jax.tree_util.tree_map_with_path(_counted, state)
            leaves, structure = jax.tree.flatten(state)
            kept[:] = [graph, structure, [None if is_array(leaf) else leaf for leaf in leaves]]
            return [strong(leaf) for leaf in leaves if is_array(leaf)]

        with self.in_force():
            args = self.on_mesh(args)
            shapes = jax.eval_shape(arrays, *args)
            layout = self.layout(_rejoined(shapes, kept[1], kept[2]))
            shardings = [NamedSharding(self.mesh, decision.spec) for decision in layout.in_order]
            made = jax.jit(arrays, out_shardings=shardings)(*args)
        graph, structure, others = kept
        return merge_nnx(graph, _rejoined(made, structure, others))

    def put(self, tree: Any) -> Any:
        """Move a tree that exists already to where its leaves are to live; copies every array.

        Raises:
            TopologyError, DimsError, RulesError, PlacementError: as `init`.
        """
        self.check_here()
        graph, state = split_nnx(tree)

        def placed(leaf: Any, sharding: NamedSharding) -> Any:
            return copy_to(strong(leaf), sharding) if is_array(leaf) else leaf

        return merge_nnx(graph, jax.tree.map(placed, state, self.shardings(state)))

    def hold(self, tree: Any) -> Any:
        """Inside a jitted function: constrain every leaf to its layout; nnx objects in place.

        Without it the compiler chooses where the results of a user's own step live.
        """
        graph, state = split_nnx(tree)

        def held(leaf: Any, sharding: NamedSharding) -> Any:
            return jax.lax.with_sharding_constraint(leaf, sharding) if is_array(leaf) else leaf

        after = jax.tree.map(held, state, self.shardings(state))
        if graph is None:
            return after
        sys.modules["flax.nnx"].update(tree, after)
        return tree

    def batch_shardings(self, batch: Any) -> Any:
        """The sharding of each array of a batch: rows split over the axes of the dim ``batch``.

        Raises:
            PlacementError: rows that the axes do not divide.
        """

        def one(key_path: Any, array: Any) -> NamedSharding:
            shape = np.shape(array)
            dims = self._batch_dims(format_path(key_path), len(shape))
            spec = resolve_dims(dims, shape, self.rules, self.spec, "activations")
            return NamedSharding(self.mesh, spec)

        return jax.tree_util.tree_map_with_path(one, batch)

    def place(self, batch: Any) -> Any:
        """A host's batch onto the devices, rows dealt over the axes of the dim ``batch``.

        With several processes each passes the rows that `rows_of_process` gives, all of them as
        many: usually its block in the order of the processes, the same block as another process
        where the mesh separates the two by other axes only.

        Raises:
            PlacementError: rows that the axes do not divide; with several processes, also shapes
                or rows that differ from another's where they must not.
        """
        self.check_here()
        if jax.process_count() == 1:
            return jax.device_put(batch, self.batch_shardings(batch))
        flat, structure = jax.tree_util.tree_flatten_with_path(batch)
        arrays = [np.asarray(x) for _, x in flat]
        block, blocks = blocks_of(self.mesh, self._batch_axes)
        shapes = tuple((x.shape, x.dtype) for x in arrays)
        if shapes not in self._agreed:
            check_agreement(arrays, block)
            self._agreed.add(shapes)
        placed = []
        for (key_path, _), x in zip(flat, arrays, strict=True):
            dims = self._batch_dims(format_path(key_path), x.ndim)
            dim = dims.index("batch") if "batch" in dims else None
            shape = tuple(size * blocks if d == dim else size for d, size in enumerate(x.shape))
            spec = resolve_dims(dims, shape, self.rules, self.spec, "activations")
            placed.append(from_own_rows(x, NamedSharding(self.mesh, spec), shape, dim))
        return jax.tree.unflatten(structure, placed)

    @property
    def _batch_axes(self) -> Any:
        """The mesh axes that rows are dealt over."""
        rows = (self.mesh.size,)
        spec = resolve_dims(("batch",), rows, self.rules, self.spec, "activations")
        return spec[0] if spec else None

    @functools.cached_property
    def _agreed(self) -> set[Any]:
        """Shapes of batches that all processes have placed."""
        return set()

    def _batch_dims(self, path: str, rank: int) -> Dims:
        for pattern, dims in self.batch_dims:
            named = DimPatterns.of({pattern: dims})
            if named.covers(path):
                if len(dims) > rank:
                    raise PlacementError(
                        f"cannot name the dims of `{path}` of the batch",
                        where=f"{rank} dims, pattern `{pattern}`",
                        why=f"{len(dims)} names for {rank} dims",
                        fix="give one name a dim, None for one that is never split",
                    )
                return (*dims, *[None] * (rank - len(dims)))
        return ("batch", *[None] * (rank - 1)) if rank else ()


def _is_here(target: Topology) -> bool:
    return target.kind not in ("tpu", "gpu")


def _built(mesh: str | MeshSpec | Mesh, target: Topology) -> Any:
    """A mesh of devices; of hardware that is not here, an abstract one."""
    if isinstance(mesh, Mesh):
        return with_auto_axes(mesh)
    spec = MeshSpec.parse(mesh) if isinstance(mesh, str) else mesh
    if not _is_here(target):
        return described_mesh(spec, target)
    devices = target.devices()
    return spec.fill(len(devices), str(target)).build(devices)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array or the shape of one: what is placed."""
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct | np.generic)


def strong(leaf: Any) -> Any:
    """A number or an array, without the weak type of a Python number: a step that takes that away
    is compiled anew for what it made."""
    if not hasattr(leaf, "dtype"):
        return jnp.asarray(leaf, jnp.result_type(leaf))
    weak = getattr(leaf, "weak_type", False)
    return jax.lax.convert_element_type(leaf, leaf.dtype) if weak else leaf


def has_nnx(tree: Any) -> bool:
    """Whether there are nnx objects in a tree; does not import nnx, which has made them."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return False
    objects = nnx.Pytree if hasattr(nnx, "Pytree") else nnx.Module
    found = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, objects))
    return any(isinstance(node, objects) for node in found)


def split_nnx(tree: Any) -> tuple[Any, Any]:
    """(graph, state) of a tree with nnx objects; (None, tree) of any other."""
    if not has_nnx(tree):
        return None, tree
    return sys.modules["flax.nnx"].split(tree)


def merge_nnx(graph: Any, state: Any) -> Any:
    """Undo `split_nnx`."""
    return state if graph is None else sys.modules["flax.nnx"].merge(graph, state)


@contextlib.contextmanager
def unannotated() -> Iterator[None]:
    """While nnx variables are made in this context their metadata names dims, not mesh axes."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not hasattr(nnx, "use_eager_sharding"):
        yield
        return
    with nnx.use_eager_sharding(False):
        yield


def _counted(key_path: Any, leaf: Any) -> Any:
    """A Python number called ``step`` as an array; anything else as it is."""
    named = bool(key_path) and format_path(key_path[-1:]) == "step"
    return jnp.asarray(leaf) if named and isinstance(leaf, int) else leaf


def _state_of(tree: Any) -> Any:
    """The arrays of a tree, those of nnx objects taken out of them."""
    return split_nnx(tree)[1]


def _rejoined(arrays: Sequence[Any], structure: Any, others: Sequence[Any]) -> Any:
    """A tree of arrays and of the leaves that are none."""
    left = iter(arrays)
    leaves = [next(left) if other is None else other for other in others]
    return jax.tree.unflatten(structure, leaves)


def _is_optimizer(node: Any) -> bool:
    """Whether a node is a state of optax: these are named tuples of its modules."""
    named = isinstance(node, tuple) and hasattr(node, "_fields")
    return named and type(node).__module__.partition(".")[0] == "optax"


def _optimizer_paths(tree: Any) -> tuple[str, ...]:
    """Where optimizer states begin in a tree."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_optimizer)
    found = {}
    for key_path, node in flat:
        names = format_path(key_path).split("/")
        if "opt_state" in names:
            found["/".join(names[: names.index("opt_state") + 1])] = None
        elif _is_optimizer(node):
            found["/".join(names)] = None
    return tuple(found)


def _below(path: str, parent: str) -> bool:
    return not parent or path == parent or path.startswith(f"{parent}/")


def _as_moments(
    tree: Any, leaves: Sequence[Leaf], is_moment: Sequence[bool], params: Sequence[Leaf]
) -> list[Leaf]:
    """The optimizer's leaves with the dims of the parameters they belong to."""
    if not any(is_moment):
        return []
    named = describe_optimizer(tree, params, anywhere=True)
    return [leaf for leaf, moment in zip(named, is_moment, strict=True) if moment]
