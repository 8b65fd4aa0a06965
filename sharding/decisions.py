"""From dims and rules to specs: one decision a leaf, each with its reason, or an error.

`resolve` is the heart of the library. It needs no devices and allocates nothing: it takes
described leaves, rules and the sizes of a mesh, and returns a Decision for each leaf. It either
returns specs that jax accepts or raises; it never falls back to a replicated leaf, which is
what `jit` and Flax do in silence when a dim does not divide or a name is unknown.

Checked for each leaf: every dim name is known to the table; no mesh axis splits two dims of the
leaf; every split dim is a multiple of the parts. Checked for the whole table: rules mention only
axes the mesh has; no rule of the user's is unused; no strategy splits nothing. Checked by
`check_mesh` for all tables together: every mesh axis is used by something.

Cost: linear in the leaves; equal (shape, dims) pairs are decided once.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.sharding.dims import Leaf, format_dims, format_shape
from meshwright.sharding.errors import PlacementError, RulesError, did_you_mean
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.rules import FLAX, STANDARD, Rule, Rules, ShapeRule, Table

__all__ = [
    "Decision",
    "Decisions",
    "axes_of",
    "check_mesh",
    "entry_of",
    "resolve",
    "resolve_dims",
]

_NAMES_SHOWN = 3
_FAR_BELOW = 8


@dataclass(frozen=True)
class Decision:
    """Where one leaf lives, and why.

    Attributes:
        leaf: path, shape, dtype and dims.
        spec: the partition spec, trailing Nones left out.
        rule: the rules that split it, or what keeps it whole.
        reason: who said so, in words.
        bytes_per_device: bytes of the leaf on each device.
    """

    leaf: Leaf
    spec: PartitionSpec
    rule: str
    reason: str
    bytes_per_device: int


@dataclass(frozen=True)
class Decisions:
    """The decisions of one table, in the leaves' flattening order.

    Attributes:
        table: which table decided.
        mesh: the mesh's names and sizes.
        decisions: one for each leaf.
    """

    table: Table
    mesh: MeshSpec
    decisions: tuple[Decision, ...]
    _by_path: dict[str, Decision] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_path = {decision.leaf.path: decision for decision in self.decisions}
        object.__setattr__(self, "_by_path", by_path)

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)

    def __getitem__(self, path: str) -> Decision:
        """The decision for a leaf path; PlacementError with near misses if there is none."""
        if path not in self._by_path:
            raise PlacementError(f"no leaf `{path}`", fix=did_you_mean(path, self._by_path))
        return self._by_path[path]

    @property
    def bytes_per_device(self) -> int:
        """Bytes of all leaves on each device."""
        return sum(decision.bytes_per_device for decision in self.decisions)

    @property
    def size_bytes(self) -> int:
        """Bytes of all leaves, unsharded."""
        return sum(decision.leaf.size_bytes for decision in self.decisions)

    def specs(self, tree: Any) -> Any:
        """The specs as a tree of the structure that was described.

        Raises:
            PlacementError: the tree has another number of leaves.
        """
        structure = jax.tree.structure(tree)
        if structure.num_leaves != len(self.decisions):
            raise PlacementError(
                "cannot give this tree the decisions of another",
                why=f"it has {structure.num_leaves} leaves, {len(self.decisions)} were decided",
                fix="pass the tree that was described, or one of its structure",
            )
        return jax.tree.unflatten(structure, [decision.spec for decision in self.decisions])

    def shardings(self, tree: Any, mesh: Mesh) -> Any:
        """As `specs`, as NamedShardings on a built mesh: what `jax.jit` takes."""
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            self.specs(tree),
            is_leaf=lambda node: isinstance(node, PartitionSpec),
        )


def resolve(
    leaves: Sequence[Leaf],
    rules: Rules,
    mesh: MeshSpec | Mesh,
    table: Table,
    *,
    check_used: bool = True,
    beside: Sequence[Leaf] = (),
) -> Decisions:
    """Decide where each leaf lives.

    Args:
        leaves: described leaves (see `meshwright.sharding.dims.describe`).
        rules: the tables.
        mesh: sizes by axis name; a built mesh serves too.
        table: which table to apply.
        check_used: refuse rules that decide nothing; for leaves that are only part of what the
            table places (an optimizer without moments has none to split), say False.
        beside: leaves whose sizes count too where it is asked which leaves are small: of moments,
            the parameters.

    Raises:
        MeshError: a mesh with a size of -1.
        RulesError: an axis the mesh has not, a mesh axis no rule uses, a rule of yours that
            matches nothing, a strategy that splits nothing.
        PlacementError: a leaf that cannot be placed; says how many more are like it.

    >>> from meshwright.sharding import data, fsdp, fold
    >>> leaf = Leaf("w", (8, 6), jax.numpy.dtype("float32"), ("embed", "mlp"))
    >>> mesh = MeshSpec.parse("data=2,fsdp=4")
    >>> decisions = resolve([leaf], fold(data(), fsdp()), mesh, "params")
    >>> decisions["w"].spec == jax.sharding.PartitionSpec("fsdp"), decisions["w"].bytes_per_device
    (True, 48)
    """
    spec = MeshSpec.of(mesh) if isinstance(mesh, Mesh) else mesh
    _ = spec.device_count  # refuses a size that is still -1
    if check_used:
        check_mesh(rules, spec)
    else:
        _check_axes(rules, spec)
    decider = _Decider(rules, spec, table)
    decider.survey(leaves)
    decider.measure([*leaves, *beside])
    decisions: list[Decision] = []
    failures: list[tuple[Leaf, PlacementError]] = []
    for leaf in leaves:
        try:
            decisions.append(decider.decide(leaf))
        except PlacementError as error:
            failures.append((leaf, error))
    if failures:
        raise _with_count(failures)
    if check_used:
        _check_used(rules, table, leaves, decisions)
    return Decisions(table, spec, tuple(decisions))


def resolve_dims(
    dims: Sequence[str | None], shape: Sequence[int], rules: Rules, mesh: MeshSpec, table: Table
) -> PartitionSpec:
    """Resolve one array given by its dims: what constraints on activations use.

    Raises:
        PlacementError: as `resolve`.
    """
    name = f"{table} {format_dims(tuple(dims))}"
    leaf = Leaf(name, tuple(shape), jax.numpy.dtype("float32"), tuple(dims))
    return _Decider(rules, mesh, table).decide(leaf).spec


def check_mesh(rules: Rules, mesh: MeshSpec) -> None:
    """Check rules and mesh against each other, without any leaf.

    Raises:
        RulesError: a rule names an axis the mesh has not, or a mesh axis larger than one is
            used by no rule.

    >>> from meshwright.sharding import data, fold
    >>> check_mesh(fold(data()), MeshSpec.parse("data=2,tensor=2"))
    Traceback (most recent call last):
    meshwright.sharding.errors.RulesError: no rule uses the mesh axis `tensor`
      where: mesh data=2,tensor=2, strategies data(data)
      why:   the 2 devices along it would all hold and do the same
      fix:   fold in a strategy that uses `tensor`, or make it 1
    """
    _check_axes(rules, mesh)
    used = rules.axes()
    for axis, size in mesh.sizes.items():
        if size > 1 and axis not in used:
            folded = ", ".join(f"{name}({on})" for name, on in rules.strategies) or "none"
            raise RulesError(
                f"no rule uses the mesh axis `{axis}`",
                where=f"mesh {mesh}, strategies {folded}",
                why=f"the {size} devices along it would all hold and do the same",
                fix=f"fold in a strategy that uses `{axis}`, or make it 1",
            )


def _check_axes(rules: Rules, mesh: MeshSpec) -> None:
    for axis, who in rules.axes().items():
        if axis not in mesh.sizes:
            raise RulesError(
                f"the mesh has no axis `{axis}`",
                where=f"mesh {mesh}; asked for by {who}",
                why=f"its axes are {', '.join(mesh.names)}",
                fix=f"add {axis}=1 to the mesh, or use one of its axes",
            )


class _Decider:
    """Applies one table to leaves, deciding equal (shape, dims) pairs once."""

    def __init__(self, rules: Rules, mesh: MeshSpec, table: Table) -> None:
        self.rules, self.mesh = rules, mesh
        self.table: Table = table
        self._sizes = mesh.sizes
        self._shape_rule = rules.shape_rule(table)
        self._known: dict[Any, tuple[PartitionSpec, str, str, int]] = {}
        self._lookups: dict[str, Rule | None] = {}
        self._common: dict[tuple[str, ...], int] = {}
        self._small_bytes = self._shape_rule.min_bytes if self._shape_rule else 0

    def survey(self, leaves: Sequence[Leaf]) -> None:
        """Note what the sizes that the same axes split have in common, for what errors suggest."""
        for leaf in leaves:
            for name, size in zip(leaf.dims or (), leaf.shape, strict=leaf.dims is not None):
                rule = self._find(name) if name else None
                if rule and rule.axes:
                    self._common[rule.axes] = math.gcd(self._common.get(rule.axes, 0), size)

    def measure(self, leaves: Sequence[Leaf]) -> None:
        """Where every leaf is small, as in a test, only those far below the largest are."""
        largest = max((leaf.size_bytes for leaf in leaves), default=0)
        if largest < self._small_bytes:
            self._small_bytes = largest // _FAR_BELOW

    def _find(self, name: str) -> Rule | None:
        if name not in self._lookups:
            self._lookups[name] = self.rules.lookup(self.table, name)
        return self._lookups[name]

    def decide(self, leaf: Leaf) -> Decision:
        key = (leaf.shape, leaf.dims, leaf.dtype.itemsize, leaf.by_shape)
        kept = self._kept_whole(leaf)
        found = None if kept else self._known.get(key)
        if found is None:
            if leaf.dims is not None:
                found = self._by_dims(leaf, leaf.dims)
            else:
                found = kept or self._by_shape(leaf)
            if not kept:
                self._known[key] = found
        spec, rule, reason, parts = found
        return Decision(leaf, spec, rule, reason, leaf.size_bytes // parts)

    def _by_dims(self, leaf: Leaf, dims: tuple[str | None, ...]) -> Any:
        rules = [self._rule_for(leaf, name) for name in dims]
        entries: list[Any] = []
        taken: dict[str, int] = {}
        for index, rule in enumerate(rules):
            axes = rule.axes if rule else ()
            self._check_divides(leaf, index, rule, axes)
            for axis in axes:
                if axis in taken:
                    self._refuse_twice(leaf, axis, rules[taken[axis]], rule)
                taken[axis] = index
            entries.append(entry_of(axes))
        splitting = [rule for rule in rules if rule and rule.axes]
        if splitting:
            text = ", ".join(str(rule) for rule in splitting)
            by = " and ".join(dict.fromkeys(rule.source for rule in splitting))
            return self._found(entries, text, f"split by {by}")
        return self._found([], "whole", self._why_whole(rules))

    def _rule_for(self, leaf: Leaf, name: str | None) -> Rule | None:
        if name is None:
            return None
        rule = self._find(name)
        if rule is None and (self.rules.splits_parameters or self.table == "activations"):
            raise PlacementError(
                f"no rule knows the dim `{name}` of `{leaf.path}`",
                where=f"shape {format_shape(leaf.shape)}, dims {format_dims(leaf.dims)}, "
                f"table {self.table}",
                why="an unknown name would leave the dim whole in silence",
                fix=f"{did_you_mean(name, self.rules.known_dims(self.table))}; or say "
                f"`{self.table}.{name}=none`",
            )
        return rule

    def _why_whole(self, rules: Sequence[Rule | None]) -> str:
        asked = [rule for rule in rules if rule and rule.source != STANDARD]
        if asked:
            by = " and ".join(dict.fromkeys(rule.source for rule in asked))
            return f"kept whole by {by}: {', '.join(str(rule) for rule in asked)}"
        return "no strategy splits its dims"

    def _check_divides(self, leaf: Leaf, index: int, rule: Rule | None, axes: Any) -> None:
        parts = math.prod(self._sizes[axis] for axis in axes)
        size = leaf.shape[index]
        if rule is None or size % parts == 0:
            return
        named = "+".join(axes)
        common = self._common.get(tuple(axes), size)
        divisors = [n for n in range(1, min(common, 4096) + 1) if common % n == 0]
        fitting = ", ".join(map(str, divisors[:8])) + (", …" if len(divisors) > 8 else "")
        fitting = f"one of {fitting}" if len(divisors) > 1 else fitting
        upper = -(-size // parts) * parts
        raise PlacementError(
            f"cannot split dim {index} of `{leaf.path}` over axis `{named}`",
            where=f"shape {format_shape(leaf.shape)}, dims {format_dims(leaf.dims)}, "
            f"rule `{self.table}.{rule}` of {rule.source}, mesh {self.mesh}",
            why=f"{rule.dim} is {size} and the mesh asks for {parts} parts: "
            f"{size} is not divisible by {parts}",
            fix=f"make `{named}` {fitting}, make {rule.dim} {upper} (the next multiple"
            f" of {parts}), or keep it whole: `{rule.dim}=none`",
        )

    def _refuse_twice(
        self, leaf: Leaf, axis: str, first: Rule | None, second: Rule | None
    ) -> NoReturn:
        raise PlacementError(
            f"cannot split two dims of `{leaf.path}` over the same axis `{axis}`",
            where=f"shape {format_shape(leaf.shape)}, dims {format_dims(leaf.dims)}, rules "
            f"`{self.table}.{first}` and `{self.table}.{second}`",
            why="each device along an axis holds one part, so an axis splits one dim of a leaf",
            fix=f"keep one of the two whole: `{second.dim if second else ''}=none`",
        )

    def _kept_whole(self, leaf: Leaf) -> tuple[PartitionSpec, str, str, int] | None:
        """Undeclared leaves that no axis should split: scalars, and paths named as whole."""
        if leaf.dims is not None:
            return None
        if math.prod(leaf.shape) <= 1:
            return self._found([], "whole", "scalar")
        rule = self._shape_rule
        for pattern in rule.whole if rule else ():
            if any(fnmatch.fnmatchcase(path, pattern) for path in (leaf.path, leaf.moment_of)):
                return self._found([], "whole", f"`{pattern}` kept whole by {rule.source}")  # type: ignore[union-attr]
        return None

    def _by_shape(self, leaf: Leaf) -> Any:
        rule = self._shape_rule
        if leaf.by_shape and (rule is None or not rule.axes):
            return self._found([], "whole", "no names asked for, and no strategy splits by shape")
        if rule is None or (not rule.axes and self.rules.splits_parameters):
            folded = ", ".join(f"{name}()" for name, _ in self.rules.strategies) or "none"
            raise PlacementError(
                f"no rule matches `{leaf.path}`",
                where=f"shape {format_shape(leaf.shape)}, no dim names, table {self.table}, "
                f"strategies {folded}",
                why="rules go by dim names, and none of these strategies splits leaves by shape",
                fix="name its dims (Flax metadata, or DimPatterns for its path), or say that it "
                f'needs no names: ("{leaf.path}", None)',
            )
        if not rule.axes:
            return self._found([], "whole", f"kept whole by {rule.source}")
        if leaf.size_bytes < self._small_bytes:
            why = f"{leaf.size_bytes} bytes, under the {self._small_bytes} of {rule.source}"
            return self._found([], "whole", f"small: {why}")
        parts = math.prod(self._sizes[axis] for axis in rule.axes)
        fitting = [index for index, size in enumerate(leaf.shape) if size % parts == 0]
        if not fitting:
            self._refuse_shape(leaf, rule, parts)
        chosen = max(fitting, key=lambda index: leaf.shape[index])
        entries: list[Any] = [None] * len(leaf.shape)
        entries[chosen] = entry_of(rule.axes)
        text = f"dim {chosen} → {'+'.join(rule.axes)}"
        return self._found(entries, text, f"largest dim that divides, by {rule.source}")

    def _refuse_shape(self, leaf: Leaf, rule: ShapeRule, parts: int) -> NoReturn:
        named = "+".join(rule.axes)
        largest = max(range(len(leaf.shape)), key=lambda index: leaf.shape[index])
        size = leaf.shape[largest]
        divisors = [n for n in range(1, min(size, 4096) + 1) if size % n == 0]
        raise PlacementError(
            f"cannot split `{leaf.path}` over axis `{named}`",
            where=f"shape {format_shape(leaf.shape)}, no dim names, {rule.source}, "
            f"mesh {self.mesh}",
            why=f"none of {', '.join(map(str, leaf.shape))} is divisible by {parts}",
            fix=f"make `{named}` one of {', '.join(map(str, divisors[:8]))}, make dim {largest} "
            f'{-(-size // parts) * parts}, or keep the leaf whole: fsdp(whole=("{leaf.path}",))',
        )

    def _found(
        self, entries: Sequence[Any], rule: str, reason: str
    ) -> tuple[PartitionSpec, str, str, int]:
        trimmed = list(entries)
        while trimmed and trimmed[-1] is None:
            trimmed.pop()
        axes = [axis for entry in trimmed if entry for axis in axes_of(entry)]
        parts = math.prod(self._sizes[axis] for axis in axes)
        return PartitionSpec(*trimmed), rule, reason, parts


def entry_of(axes: Sequence[str]) -> str | tuple[str, ...] | None:
    """Axes as an entry of a PartitionSpec: one alone is written without a tuple.

    >>> entry_of(("data", "fsdp")), entry_of(("data",)), entry_of(())
    (('data', 'fsdp'), 'data', None)
    """
    return tuple(axes) if len(axes) > 1 else next(iter(axes), None)


def axes_of(entry: Any) -> tuple[str, ...]:
    """The axes of an entry of a PartitionSpec; none for a dim that is whole.

    >>> axes_of("data"), axes_of(None)
    (('data',), ())
    """
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _with_count(failures: Sequence[tuple[Leaf, PlacementError]]) -> PlacementError:
    """The first failure, saying how many more there are and naming some."""
    _, first = failures[0]
    if len(failures) == 1:
        return first
    others = ", ".join(leaf.path for leaf, _ in failures[1 : 1 + _NAMES_SHOWN])
    dots = ", …" if len(failures) > 1 + _NAMES_SHOWN else ""
    more = f"{first.why}; {len(failures) - 1} more leaves fail too ({others}{dots})"
    return PlacementError(first.what, where=first.where, why=more, fix=first.fix)


def _check_used(
    rules: Rules, table: Table, leaves: Sequence[Leaf], decisions: Sequence[Decision]
) -> None:
    names = {name for leaf in leaves for name in leaf.dims or () if name}
    for rule in rules.user_rules(table):
        if not any(rule.matches(name) for name in names):
            raise RulesError(
                f"the rule `{table}.{rule}` matches nothing",
                where=f"{len(leaves)} leaves with the dims {', '.join(sorted(names)) or 'none'}",
                why=f"no leaf has a dim `{rule.dim}`",
                fix=did_you_mean(rule.dim, names) if names else "name the model's dims",
            )
    split = {
        axis
        for decision in decisions
        for entry in decision.spec
        if entry
        for axis in axes_of(entry)
    }
    # A Flax list serves all tables at once, so none of them needs all of it.
    wanted = {
        axis: rule.source
        for rule in rules.table(table)
        for axis in rule.axes
        if not rule.source.startswith(FLAX)
    }
    shape_rule = rules.shape_rule(table)
    wanted |= dict.fromkeys(shape_rule.axes, shape_rule.source) if shape_rule else {}
    for axis, source in wanted.items():
        if axis not in split and leaves:
            raise RulesError(
                f"{source} splits nothing over axis `{axis}`",
                where=f"table {table}, {len(leaves)} leaves with the dims "
                f"{', '.join(sorted(names)) or 'none'}",
                why=_why_nothing(rules, table, axis, shape_rule is not None),
                fix=f"name the model's dims, tell {source} which dims to split, or leave it out",
            )


def _why_nothing(rules: Rules, table: Table, axis: str, by_shape: bool) -> str:
    whole = [str(rule) for rule in rules.user_rules(table) if axis not in rule.axes]
    if whole:
        return f"your rules come first: {', '.join(whole)}"
    small = ", and all undeclared leaves are small" if by_shape else ""
    return f"no leaf has a dim it names{small}"
