"""Rules: which mesh axes each dim is split over, in four tables.

==============  ===================================================================
table           what it places
==============  ===================================================================
``params``      the parameters as the step keeps them while it runs
``gradients``   the accumulator of the gradients over microbatches
``optimizer``   the master parameters and the optimizer's moments, between steps
``activations``  the activations that the model constrains by name
==============  ===================================================================

A rule is a dim and the axes that split it. The ZeRO family is nothing but three settings of
these tables: ZeRO-1 splits ``optimizer`` over the data axis, ZeRO-2 also ``gradients``, ZeRO-3
(FSDP) also ``params``. Rules are a value; strategies (see `meshwright.sharding.strategies`) are
functions from Rules to Rules, and a hybrid is their fold.

Within a table rules are ordered and the first whose dim pattern matches the whole name decides.
Strict on purpose, where Flax's two dialects are lenient (linen takes the first *free* axis of
a repeated rule and leaves unknown names replicated; nnx lets the last rule win):

- a dim name that no rule knows is an error, with the near misses;
- a rule of the user's that decides nothing, or that an earlier one hides, is an error;
- a strategy that splits nothing is an error;
- a mesh axis that nothing uses is an error: devices along it would repeat the same work.

Staying whole is something one asks for. The standard vocabulary below does ask: its dims are
whole until a strategy splits them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from meshwright.sharding.errors import RulesError, did_you_mean

__all__ = ["FLAX", "STANDARD", "STANDARD_DIMS", "Rule", "Rules", "ShapeRule", "Table"]

Table = Literal["params", "gradients", "optimizer", "activations"]
_TABLES: tuple[Table, ...] = get_args(Table)

STANDARD_DIMS = {
    "params": (
        "layers",
        "dense_layers",
        "vocab",
        "positions",
        "embed",
        "norm",
        "heads",
        "kv_heads",
        "head_dim",
        "mlp",
        "experts",
        "routes",
    ),
    "activations": (
        "batch",
        "length",
        "sequence",
        "vocab",
        "embed",
        "heads",
        "kv_heads",
        "head_dim",
        "mlp",
    ),
}
"""The dim names the strategies know; gradients and optimizer have those of the parameters.

``experts`` is the dim of a stack of their matrices, ``routes`` that of a router's scores.
Of an activation's tokens, ``length`` is the dim where heads, MLP or vocabulary may be split, and
``sequence`` the same dim between those regions: in the residual stream and its norms."""

STANDARD = "standard vocabulary"
"""Source of the rules every table starts with."""

_USER = "your rule"

FLAX = "read from"
"""How the source of rules that were read from a Flax list begins."""


@dataclass(frozen=True)
class Rule:
    """One dim and the mesh axes that split it.

    Attributes:
        dim: a dim name, or a pattern such as ``expert_*`` that must match the whole name.
        axes: mesh axes, outermost first; empty to keep the dim whole.
        source: who says so, for reasons and errors.

    >>> str(Rule("mlp", ("tensor",)))
    'mlp → tensor'
    """

    dim: str
    axes: tuple[str, ...]
    source: str = _USER

    def matches(self, dim: str) -> bool:
        """Whether this rule's pattern covers the whole name."""
        return self.dim == dim or fnmatch.fnmatchcase(dim, self.dim)

    def __str__(self) -> str:
        return f"{self.dim} → {'+'.join(self.axes) or 'none'}"


@dataclass(frozen=True)
class ShapeRule:
    """How leaves without dim names are placed: by their shape alone.

    The largest dim that the axes divide is split, ties going to the first; scalars and leaves
    under ``min_bytes`` stay whole, and the report says so. No axes: every leaf stays whole.

    Attributes:
        axes: mesh axes to split over, together.
        min_bytes: leaves smaller than this stay whole: splitting them saves nothing and costs
            a collective each. Where all are smaller, those under an eighth of the largest.
        whole: path patterns of leaves that shall stay whole although no dim can be split.
        source: who says so.
    """

    axes: tuple[str, ...]
    min_bytes: int
    whole: tuple[str, ...] = ()
    source: str = _USER


def _standard(table: Table) -> tuple[Rule, ...]:
    names = STANDARD_DIMS["activations" if table == "activations" else "params"]
    return tuple(Rule(name, (), STANDARD) for name in names)


@dataclass(frozen=True)
class Rules:
    """Four tables of rules; immutable, every method returns new Rules.

    Attributes:
        params, gradients, optimizer, activations: ordered rules, first match decides.
        undeclared: (table, ShapeRule) pairs for leaves without dim names.
        strategies: (strategy, axis) pairs already folded in, in order.
        splits_parameters: whether any strategy splits parameters or their state by name; until
            one does, every leaf is whole whatever its dims are called, because that is what
            plain data parallelism means.
        notes: what to know of rules that were written for another engine; see `from_flax`.

    >>> Rules().split("params", "mlp", "tensor", "tensor()").lookup("params", "mlp").axes
    ('tensor',)
    """

    params: tuple[Rule, ...] = _standard("params")
    gradients: tuple[Rule, ...] = _standard("gradients")
    optimizer: tuple[Rule, ...] = _standard("optimizer")
    activations: tuple[Rule, ...] = _standard("activations")
    undeclared: tuple[tuple[Table, ShapeRule], ...] = ()
    strategies: tuple[tuple[str, str], ...] = ()
    splits_parameters: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def from_flax(
        cls,
        rules: Sequence[tuple[str, str | Sequence[str] | None]],
        dialect: Literal["linen", "nnx"] = "linen",
        *,
        mesh_axes: Sequence[str] = (),
    ) -> Rules:
        """Rules from a list written for Flax, with a note of each name that means another thing.

        Args:
            rules: pairs of a logical name and a mesh axis, several, or None.
            dialect: whose reading of repeated and unknown names to start from.
            mesh_axes: for nnx, names that metadata uses for mesh axes themselves.

        Raises:
            RulesError: a rule that cannot be read, or no such dialect.

        >>> rules = Rules.from_flax([("batch", ("data", "fsdp")), ("embed", "fsdp")])
        >>> rules.token_axes(), rules.axes_for("params", "embed")
        (('data', 'fsdp'), ('fsdp',))
        """
        from meshwright.sharding.flax_rules import read_flax_rules

        # A checker that is shown this file under two names sees two classes.
        return read_flax_rules(rules, dialect, mesh_axes)  # type: ignore[return-value]

    def table(self, name: Table) -> tuple[Rule, ...]:
        """The rules of one table, in order."""
        tables = {
            "params": self.params,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
        }
        if name not in tables:
            raise RulesError(f"there is no table `{name}`", fix=did_you_mean(name, _TABLES))
        return tables[name]

    def lookup(self, table: Table, dim: str) -> Rule | None:
        """The first rule of a table that matches a dim, or None."""
        return next((rule for rule in self.table(table) if rule.matches(dim)), None)

    def axes_for(self, table: Table, dim: str) -> tuple[str, ...]:
        """The axes that split a dim; none where no rule matches it."""
        rule = self.lookup(table, dim)
        return rule.axes if rule else ()

    def split(self, table: Table, dim: str, axis: str, source: str) -> Rules:
        """Add an axis to what already splits a dim: how strategies write.

        Axes of several strategies join on one dim in the order of the fold.
        """
        rules = list(self.table(table))
        for index, rule in enumerate(rules):
            if rule.dim == dim:
                by = f"{rule.source} and {source}" if rule.axes else source
                axes = rule.axes if axis in rule.axes else (*rule.axes, axis)
                rules[index] = Rule(dim, axes, by)
                break
        else:
            rules.append(Rule(dim, (axis,), source))
        return replace(self, **{table: tuple(rules)})

    def with_rule(self, table: Table, dim: str, axes: Sequence[str] | str | None) -> Rules:
        """Put a rule of your own before the strategies'; None keeps the dim whole.

        Raises:
            RulesError: no such table, or an earlier rule of yours hides this one.
        """
        chosen = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        mine = [rule for rule in self.table(table) if rule.source == _USER]
        others = [rule for rule in self.table(table) if rule.source != _USER]
        for earlier in mine:
            if earlier.matches(dim):
                raise RulesError(
                    f"the rule `{table}.{Rule(dim, chosen)}` is shadowed",
                    where=f"by your earlier rule `{table}.{earlier}`",
                    why=f"the first match decides, and `{earlier.dim}` matches all of `{dim}`",
                    fix="put the narrower rule first, or remove one of the two",
                )
        split = self.splits_parameters or (table != "activations" and bool(chosen))
        tables = {table: (*mine, Rule(dim, chosen), *others)}
        return replace(self, splits_parameters=split, **tables)

    def with_text(self, text: str) -> Rules:
        """Add a rule in its written form, ``params.mlp=tensor``; ``none`` keeps a dim whole.

        Without a table, as in ``vocab=none``, it goes into every table that knows the dim.

        Raises:
            RulesError: malformed, unknown table, unknown dim, or as `with_rule`.

        >>> str(Rules().with_text("activations.length=none").lookup("activations", "length"))
        'length → none'
        """
        left, equals, right = (part.strip() for part in text.partition("="))
        table, dot, dim = left.rpartition(".")
        if not (equals and dim and right) or (dot and not table):
            raise RulesError(
                f"cannot read the rule `{text}`",
                why="a rule is a table, a dot, a dim, an equals sign and mesh axes",
                fix="write it like params.mlp=tensor, optimizer.embed=data+fsdp or, for all "
                "tables, vocab=none",
            )
        names = tuple(axis.strip() for axis in right.split("+"))
        chosen = None if names == ("none",) else names
        if dot:
            return self.with_rule(cast(Table, table), dim, chosen)  # refuses any other word
        tables: list[Table] = [name for name in _TABLES if self.lookup(name, dim)]
        if not tables:
            known = [known for name in _TABLES for known in self.known_dims(name)]
            raise RulesError(
                f"cannot use the rule `{text}`",
                why=f"no table knows the dim `{dim}`",
                fix=did_you_mean(dim, known),
            )
        rules = self
        for name in tables:
            rules = rules.with_rule(name, dim, chosen)
        return rules

    def shape_rule(self, table: Table) -> ShapeRule | None:
        """What places undeclared leaves in a table: the join of all strategies' shape rules."""
        found = [rule for name, rule in self.undeclared if name == table]
        if not found:
            return None
        return ShapeRule(
            tuple(dict.fromkeys(axis for rule in found for axis in rule.axes)),
            max(rule.min_bytes for rule in found),
            tuple(dict.fromkeys(path for rule in found for path in rule.whole)),
            " and ".join(dict.fromkeys(rule.source for rule in found)),
        )

    def known_dims(self, table: Table) -> tuple[str, ...]:
        """Every dim name or pattern a table has a rule for."""
        return tuple(dict.fromkeys(rule.dim for rule in self.table(table)))

    def token_axes(self) -> tuple[str, ...]:
        """Mesh axes that split the tokens of a batch (its rows or their length).

        A weight cannot stay split over one of these while it is applied: each device holds
        different tokens and needs all of the weight. So these are the axes weights are
        gathered over at use, and gradients summed over.
        """
        found = (self.axes_for("activations", dim) for dim in ("batch", "length"))
        return tuple(dict.fromkeys(axis for axes in found for axis in axes))

    def expert_axes(self) -> tuple[str, ...]:
        """Mesh axes that experts are dealt to: token axes that their matrices stay split over."""
        return tuple(axis for name, axis in self.strategies if name == "expert")

    def stream_axes(self) -> tuple[str, ...]:
        """Mesh axes that split the tokens of the stream between the regions of tensor parallelism,
        besides those that split the length of rows everywhere."""
        length = self.axes_for("activations", "length")
        sequence = self.axes_for("activations", "sequence")
        return tuple(axis for axis in sequence if axis not in length)

    def stage_axes(self) -> tuple[str, ...]:
        """Mesh axes whose devices are stages of a pipeline, each with layers of its own."""
        return tuple(axis for name, axis in self.strategies if name == "pipeline")

    def user_rules(self, table: Table) -> tuple[Rule, ...]:
        """The rules of a table that no strategy wrote."""
        return tuple(rule for rule in self.table(table) if rule.source == _USER)

    def axes(self) -> dict[str, str]:
        """Every mesh axis the rules mention, with who mentions it first."""
        found: dict[str, str] = {}
        for table in _TABLES:
            for rule in self.table(table):
                for axis in rule.axes:
                    found.setdefault(axis, f"{rule.source}, rule `{table}.{rule}`")
        for table, rule in self.undeclared:
            for axis in rule.axes:
                found.setdefault(axis, f"{rule.source}, for undeclared leaves of {table}")
        return found
