"""What the assertions ask of a plan, so that whoever has one of these can be tested.

A protocol and no class: plans are made in another room (`meshwright.train.model_plan`), and a
project with a trainer of its own passes any object with these members.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from meshwright.sharding.errors import ConfigError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from meshwright.sharding.decisions import Decisions
    from meshwright.sharding.mesh import MeshSpec
    from meshwright.sharding.planned import PlanReport
    from meshwright.sharding.rules import Rules

__all__ = ["PlanLike", "is_plan", "tables_of"]

_MEMBERS = (
    "spec",
    "mesh",
    "rules",
    "decisions",
    "moments",
    "init",
    "place",
    "step",
    "gradients",
    "one_device",
    "report",
)


class PlanLike(Protocol):
    """A model resolved on a mesh, with the step it compiles to."""

    @property
    def spec(self) -> MeshSpec:
        """Names and sizes of the mesh, filled."""
        ...

    @property
    def mesh(self) -> Mesh:
        """The built mesh."""
        ...

    @property
    def rules(self) -> Rules:
        """What decided."""
        ...

    @property
    def decisions(self) -> Decisions:
        """Where every leaf of the model lives, trained or not."""
        ...

    @property
    def moments(self) -> Decisions:
        """Where the optimizer's state lives."""
        ...

    def init(self, key: Any) -> Any:
        """The first state; its ``params`` are the trained leaves."""
        ...

    def place(self, batch: Any) -> Any:
        """A host's batch on the devices."""
        ...

    def step(self, state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        """The next state and metrics, ``loss`` among them; donates the state."""
        ...

    def gradients(self, state: Any, batch: Any) -> tuple[Any, Any]:
        """(loss, gradients)."""
        ...

    def one_device(self) -> PlanLike:
        """The same on one device."""
        ...

    def report(self, topology: str | None = None) -> PlanReport:
        """The compiled step, read; None for simulated devices."""
        ...


def is_plan(value: object) -> TypeGuard[PlanLike]:
    """Whether a value has what a plan has, itself or through ``__getattr__``.

    ``isinstance`` with a protocol looks at the class alone from Python 3.12 on, which leaves out
    objects that wrap a plan.
    """
    return all(hasattr(value, name) for name in _MEMBERS)


def tables_of(plan_or_decisions: Any, *, moments: bool) -> tuple[Decisions, ...]:
    """The decisions of a plan, with its moments' or without; decisions as they are.

    Raises:
        ConfigError: it is neither.
    """
    from meshwright.sharding.decisions import Decisions

    if isinstance(plan_or_decisions, Decisions):
        return (plan_or_decisions,)
    if is_plan(plan_or_decisions):
        plan = plan_or_decisions
        return (plan.decisions, plan.moments) if moments else (plan.decisions,)
    raise ConfigError(
        f"a {type(plan_or_decisions).__name__} has no decisions to hold against",
        why="it is neither a plan nor what `resolve` returned",
        fix="pass a plan, or its .decisions or .moments",
    )
