"""The same numbers on every mesh: run one training on many meshes and compare with one device.

A case is a mesh and the settings that change how a step is laid out on it. Every case starts
from the same seed and reads the same batches. Compared are the initial parameters (bitwise), the
first step's gradients (largest difference over the leaf's largest entry) and the loss of every
step (relative). The tests hold these on a small model, the benchmark prints them for ``tiny``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from meshwright.models.config import Remat
from meshwright.models.pure import functional
from meshwright.sharding.schedule import ScheduleKind
from meshwright.sharding.token_layout import ContextKind, TokenLayout
from meshwright.sharding.topology import Topology
from meshwright.train.config import ContextConfig, PipelineConfig, TrainConfig, Zero
from meshwright.train.explain import layout_of
from meshwright.train.parallelism import (
    check_batch,
    choose_dtype,
    choose_mesh,
    choose_places,
)
from meshwright.train.program import Program, step_spec
from meshwright.train.relayout import Reordering
from meshwright.train.state import TrainState
from meshwright.train.step import StepSpec, apply_gradients, gradients

__all__ = [
    "Case",
    "Difference",
    "Result",
    "all_cases",
    "compare",
    "meshes",
    "program_of",
    "run_case",
]


@dataclass(frozen=True)
class Case:
    """One way to run a training.

    Attributes:
        mesh: written form; its product is the number of devices used.
        grad_accum: microbatches.
        zero: ZeRO stage.
        accumulate: ``whole`` or ``sharded``.
        sequence: tokens split over the tensor axis between its regions.
        context, order: kind of attention over the context axis, and which tokens a device has.
        remat: what is recomputed; None for what the model says.
        schedule: of the pipeline, where there is one.
    """

    mesh: str
    grad_accum: int = 1
    zero: Zero = 0
    accumulate: Any = "whole"
    sequence: bool = False
    context: ContextKind = "ring"
    order: TokenLayout = "zigzag"
    remat: Remat | None = None
    schedule: ScheduleKind = "1f1b"

    def __str__(self) -> str:
        parts = [self.mesh]
        parts += [f"accum={self.grad_accum}"] if self.grad_accum > 1 else []
        parts += [f"zero={self.zero}"] if self.zero else []
        parts += [self.accumulate] if self.accumulate != "whole" else []
        parts += ["sequence"] if self.sequence else []
        parts += [f"{self.context}, {self.order}"] if "context" in self.mesh else []
        parts += [self.schedule] if "stage" in self.mesh else []
        parts += [f"remat={self.remat}"] if self.remat else []
        return " ".join(parts)

    def of(self, config: TrainConfig) -> TrainConfig:
        """A run as this case has it."""
        model = replace(config.model, remat=self.remat or config.model.remat)
        return replace(
            config,
            model=model,
            mesh=self.mesh,
            grad_accum=self.grad_accum,
            zero=self.zero,
            accumulate=self.accumulate,
            sequence=self.sequence,
            context=ContextConfig(self.context, self.order),
            pipeline=PipelineConfig(self.schedule),
        )


@dataclass(frozen=True)
class Result:
    """Numbers of one case, on the host.

    Attributes:
        initial: the state before the first step.
        gradients: of the first step, before clipping.
        losses: of every step.
        scalars: all that the first step returned.
    """

    initial: TrainState
    gradients: Any
    losses: list[float]
    scalars: dict[str, float]


@dataclass(frozen=True)
class Difference:
    """How far a case is from another.

    Attributes:
        initial_equal: whether the initial parameters are bitwise the same.
        gradient: largest |difference| over the leaf's largest |entry|, over all leaves.
        loss: largest relative difference of a step's loss.
    """

    initial_equal: bool
    gradient: float
    loss: float


def meshes(devices: int) -> list[str]:
    """Every mesh of so many devices over data, fsdp and tensor; axes of one are left out.

    >>> meshes(2)
    ['tensor=2', 'fsdp=2', 'data=2']
    """
    found = []
    for data, fsdp in ((d, f) for d in _divisors(devices) for f in _divisors(devices // d)):
        sizes = {"data": data, "fsdp": fsdp, "tensor": devices // data // fsdp}
        text = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
        found.append(text or "data=1")
    return found


def all_cases(device_counts: Sequence[int] = (1, 2, 4, 8)) -> Iterator[Case]:
    """Every mesh, with and without accumulation, and each ZeRO stage where there is a data axis."""
    for count in device_counts:
        for mesh in meshes(count):
            for grad_accum in (1, 2):
                yield Case(mesh, grad_accum)
                if grad_accum > 1 and "fsdp" in mesh:
                    yield Case(mesh, grad_accum, accumulate="sharded")
                if "data" in mesh and count > 1:
                    yield Case(mesh, grad_accum, 1)
                    yield Case(mesh, grad_accum, 2)


def run_case(
    config: TrainConfig,
    case: Case,
    batches: Sequence[dict[str, np.ndarray]],
    start: TrainState | None = None,
) -> Result:
    """Train on one mesh, one step a batch.

    Args:
        config: the run; the case's fields replace its own.
        case: mesh and the rest.
        batches: host batches, one a step.
        start: a state on the host to start from, with layers in order, which saves compiling the
            init program; by default the case builds its own on its mesh.
    """
    program = program_of(case.of(config))
    if start is None:
        state = program.init()
    else:
        stored = Reordering((), program.spec.model.places, len(program.spec.model.layers))
        state = jax.device_put(stored.reordered(start), program.shardings)
    in_order = program.spec.model.in_order
    initial, first, all_scalars = jax.device_get(state), None, []
    initial = replace(initial, params=jax.device_get(in_order(initial.params)))
    step = jax.jit(
        functools.partial(_step_and_gradients, program.spec),
        out_shardings=(program.shardings, None, program.shardings.params),
        donate_argnums=0,
    )
    for host in batches:
        state, scalars, grads = step(state, program.place(host))
        # Fetched first: sorted in shards, each case would compile the sorting of its own shapes.
        first = jax.device_get(in_order(jax.device_get(grads))) if first is None else first
        all_scalars.append({name: float(value) for name, value in scalars.items()})
    return Result(initial, first, [found["loss"] for found in all_scalars], all_scalars[0])


def program_of(config: TrainConfig) -> Program:
    """The program of a config on the first devices of this machine that its mesh needs."""
    devices = Topology("local").devices()
    spec = choose_mesh(config, _count(config.mesh), simulated=True)
    model = functional(config.model, choose_places(config, spec))
    layout = layout_of(config, model, spec)
    check_batch(config, layout.rules, spec)
    dtype = choose_dtype(config, on_cpu=devices[0].platform == "cpu")
    mesh = spec.build(devices[: spec.device_count])
    return Program.prepare(config, step_spec(config, model, layout, mesh, dtype))


def compare(one: Result, other: Result) -> Difference:
    """How far ``other`` is from ``one``."""
    leaves = list(
        zip(jax.tree.leaves(one.gradients), jax.tree.leaves(other.gradients), strict=True)
    )
    equal = jax.tree.map(np.array_equal, one.initial.params, other.initial.params)
    return Difference(
        initial_equal=all(jax.tree.leaves(equal)),
        gradient=max(float(np.max(np.abs(a - b)) / np.max(np.abs(a))) for a, b in leaves),
        loss=max(abs(a - b) / abs(a) for a, b in zip(one.losses, other.losses, strict=True)),
    )


def _step_and_gradients(spec: StepSpec, state: TrainState, batch: Any) -> Any:
    """A train step that also returns its gradients: one program to compile, not two."""
    found = gradients(spec, spec.constrain(), state.params, batch)
    return (*apply_gradients(spec, state, *found), found[0])


def _count(mesh: str) -> int:
    sizes = [int(part.partition("=")[2]) for part in mesh.split(",")]
    return int(np.prod(sizes))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
