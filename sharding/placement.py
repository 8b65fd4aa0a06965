"""Arrays onto devices: state that is born sharded, and constraints that cannot be dropped.

`init_sharded` runs an init function as one jitted program whose outputs have their final
shardings, so no array is ever whole on one device unless its spec says so. With jax's
partitionable threefry (the default) random *bits* do not depend on how the output is split. What
is computed from them in floating point can differ in the last bit between meshes, as compilers
vectorise a logarithm by the shape of a shard; the models of this project draw their initial
values in integers and are bitwise the same on every mesh.

`Constrain` is `jax.lax.with_sharding_constraint` by dim names. jax drops a constraint whose dim
the axis does not divide, without a word; this one raises, naming the dims and the sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from meshwright.sharding.decisions import Decisions, resolve_dims
from meshwright.sharding.errors import ConfigError, RulesError, did_you_mean
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.rules import Rules

__all__ = ["Constrain", "check_random", "init_sharded", "shardings_of"]


def shardings_of(decisions: Decisions, tree: Any, mesh: Mesh) -> Any:
    """Return the NamedShardings of a tree, for `jax.jit`'s in and out shardings."""
    return decisions.shardings(tree, mesh)


def init_sharded(init: Callable[..., Any], *args: Any, shardings: Any) -> Any:
    """Run ``init(*args)`` as one program whose outputs are born with ``shardings``.

    Args:
        init: builds the state; only jax operations.
        args: its arguments, typically an RNG key.
        shardings: a tree of the structure of the result.

    Returns:
        What ``init`` returns, every array laid out as its sharding says.
    """
    return jax.jit(init, out_shardings=shardings)(*args)


def check_random(mesh: Mesh) -> None:
    """Refuse a mesh of several devices under jax's old way of drawing random bits.

    Raises:
        ConfigError: ``jax_threefry_partitionable`` is off.
    """
    if mesh.size > 1 and not jax.config.jax_threefry_partitionable:  # type: ignore[attr-defined]
        raise ConfigError(
            "cannot draw random numbers on several devices",
            where=f"mesh {MeshSpec.of(mesh)}, jax_threefry_partitionable is False",
            why="each device would draw every array whole, and users have had values that differ "
            "by mesh (jax issue 21232)",
            fix='jax.config.update("jax_threefry_partitionable", True), which is the default',
        )


@dataclass(frozen=True)
class Constrain:
    """Constrain an activation by its dim names.

    Attributes:
        rules: the ``activations`` table decides.
        mesh: a built mesh.
        used: every dim name seen so far, so that unused rules can be refused.

    Calling it under a trace raises `PlacementError` for a dim no rule knows, an axis used
    twice, or a dim the axis does not divide, and ValueError-family errors for a wrong rank.
    """

    rules: Rules
    mesh: Mesh
    used: set[str] = field(default_factory=set, compare=False)

    def __call__(self, x: jax.Array, dims: Sequence[str | None]) -> jax.Array:
        self.used.update(name for name in dims if name)
        spec = resolve_dims(dims, x.shape, self.rules, MeshSpec.of(self.mesh), "activations")
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def reshard(
        self,
        x: jax.Array,
        before: Sequence[str | None],
        after: Sequence[str | None],
        *,
        sums: bool = False,
    ) -> jax.Array:
        """Take an activation from one layout to another; its gradient goes the opposite way.

        What `jax.lax.with_sharding_constraint` alone would not do: its transpose constrains the
        gradient to the *new* layout, which sums partial gradients whole before they are split.

        Args:
            x: an activation.
            before, after: names of its dims in the two layouts.
            sums: whether it may be partial sums, which are then summed into the new layout alone;
                its gradient is gathered once, for all that reads it.
        """
        self.used.update(name for name in (*before, *after) if name)
        mesh = MeshSpec.of(self.mesh)
        specs = [
            resolve_dims(dims, x.shape, self.rules, mesh, "activations") for dims in (before, after)
        ]
        old, new = (NamedSharding(self.mesh, spec) for spec in specs)
        put = jax.lax.with_sharding_constraint
        if specs[0] == specs[1]:
            return put(x, new) if sums else x

        @jax.custom_vjp
        def moved(x: jax.Array) -> jax.Array:
            # Held where it is first, so that what made it is not resharded instead.
            return put(x if sums else put(x, old), new)

        def backward(_: None, grad: jax.Array) -> tuple[jax.Array]:
            return (put(put(grad, new) if sums else grad, old),)

        moved.defvjp(lambda x: (moved(x), None), backward)
        return moved(x)

    def without(self, axes: Sequence[str]) -> Constrain:
        """The same constraints with some axes left out of every rule.

        For code under a ``vmap`` whose mapped dim is split over those axes already.
        """
        kept = tuple(
            replace(rule, axes=tuple(axis for axis in rule.axes if axis not in axes))
            for rule in self.rules.activations
        )
        return Constrain(replace(self.rules, activations=kept), self.mesh, self.used)

    def check_used(self) -> None:
        """Refuse a user's activation rule that no constraint has used; call it after tracing.

        Raises:
            RulesError: names the rule and the dims the model constrains.
        """
        for rule in self.rules.user_rules("activations"):
            if not any(rule.matches(name) for name in self.used):
                raise RulesError(
                    f"the rule `activations.{rule}` matches nothing",
                    where=f"the model constrains the dims {', '.join(sorted(self.used))}",
                    why=f"no activation has a dim `{rule.dim}`",
                    fix=did_you_mean(rule.dim, self.used),
                )
