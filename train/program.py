"""The compiled programs of a run: init, step and evaluation, with their shardings.

A run needs three programs, and a laptop has two cores: tracing holds Python's lock, compiling
does not, so each is traced in turn and handed to a thread that compiles it while the next is
traced and while data is opened. The programs are compiled ahead of time from shapes, so that
what the run executes is what was compiled, and nothing compiles in the middle of training.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from meshwright.models.hooks import Hooks
from meshwright.models.pure import Functional
from meshwright.sharding.process_rows import blocks_of, from_own_rows
from meshwright.train.config import TrainConfig
from meshwright.train.layout import Layout
from meshwright.train.optimizer import learning_rate_schedule, make_optimizer
from meshwright.train.replicas import batch_shardings
from meshwright.train.state import TrainState, abstract_state, init_state, state_shardings
from meshwright.train.step import (
    StepSpec,
    eval_step,
    sampling_hooks,
    sampling_params,
    train_step,
)

__all__ = ["Program", "batch_names", "step_spec"]


def step_spec(
    config: TrainConfig, model: Functional, layout: Layout, mesh: Mesh, dtype: Any
) -> StepSpec:
    """The step's constants from a config.

    Args:
        config: the run.
        model: its model.
        layout: from `meshwright.train.explain.layout_of`.
        mesh: built mesh of the layout's sizes.
        dtype: compute dtype.
    """
    return StepSpec(
        model=model,
        layout=layout,
        mesh=mesh,
        optimizer=make_optimizer(config.optimizer, config.steps, model.dims),
        schedule=learning_rate_schedule(config.optimizer, config.steps),
        compute_dtype=dtype,
        clip_norm=config.optimizer.clip_norm,
        loss=config.loss,
        guard=config.guard,
        context=config.context,
        pipeline=config.pipeline,
    )


def batch_names(config: TrainConfig) -> tuple[str, ...]:
    """The arrays of a batch."""
    names = ("tokens", "targets", "weights")
    return (*names, "segments", "positions") if config.data.mask_documents else names


@dataclass
class Program:
    """Compiled programs of one run on one mesh.

    Attributes:
        config, spec: what they were compiled from.
        shapes: the state's shapes.
        shardings: the state's shardings.
        batch_shardings: by array name.
        compile_seconds: wall time from the first trace until the step was ready.
    """

    config: TrainConfig
    spec: StepSpec
    shapes: TrainState
    shardings: TrainState
    batch_shardings: dict[str, NamedSharding]
    compile_seconds: float = 0.0
    _started: float = 0.0
    _step: Future[Any] | None = None
    _eval: Future[Any] | None = None

    @classmethod
    def prepare(cls, config: TrainConfig, spec: StepSpec) -> Program:
        """Work out shapes and shardings; compiles nothing."""
        shapes = abstract_state(spec.model.init, spec.optimizer)
        shardings = state_shardings(shapes, spec.layout, spec.mesh)
        return cls(
            config,
            spec,
            shapes,
            shardings,
            batch_shardings(spec.layout, spec.mesh, batch_names(config)),
        )

    def start(self) -> None:
        """Trace the step and the evaluation and start compiling both in threads.

        Raises:
            PlacementError, RulesError: an activation that cannot be placed, or an activation
                rule that nothing uses.
        """
        self._started = time.perf_counter()
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile")
        self._step = pool.submit(self.lower_step().compile)
        if self.config.eval_every:
            self._eval = pool.submit(self._lower_eval().compile)
        pool.shutdown(wait=False)

    def lower_step(self) -> Any:
        """The train step, traced and lowered but not compiled."""
        constrain = self.spec.constrain()
        step = jax.jit(
            functools.partial(train_step, self.spec, constrain),
            in_shardings=(self.shardings, self.batch_shardings),
            out_shardings=(self.shardings, None),
            donate_argnums=0,
        )
        lowered = step.lower(self.shapes, self.batch_shapes())
        constrain.check_used()
        return lowered

    def _lower_eval(self) -> Any:
        step = jax.jit(
            functools.partial(eval_step, self.spec, self.spec.constrain()),
            in_shardings=(self.shardings.params, self.batch_shardings),
        )
        return step.lower(self.shapes.params, self.batch_shapes())

    def init(self) -> TrainState:
        """The first state, born sharded."""
        return init_state(
            self.spec.model.init, self.spec.optimizer, self.config.seed, self.shardings
        )

    @property
    def step(self) -> Callable[..., Any]:
        """The compiled step: (state, batch) → (state, scalars); waits for the compiler."""
        if self._step is None:
            self.start()
        assert self._step is not None
        compiled = self._step.result()
        if not self.compile_seconds:
            self.compile_seconds = time.perf_counter() - self._started
        return compiled

    @property
    def eval(self) -> Callable[..., Any]:
        """The compiled evaluation: (params, batch) → (loss sum, weight)."""
        return self._lower_eval().compile() if self._eval is None else self._eval.result()

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a placed batch: [microbatches, rows, length]."""
        config = self.config
        rows = config.batch_size // config.grad_accum
        shape = (config.grad_accum, rows, config.seq_len)
        return {
            name: jax.ShapeDtypeStruct(shape, np.float32 if name == "weights" else np.int32)
            for name in batch_names(config)
        }

    def rows_dealt(self) -> tuple[int, int]:
        """(this process's block of the rows of each microbatch, how many there are)."""
        axes = self.spec.layout.rules.axes_for("activations", "batch") or None
        return blocks_of(self.spec.mesh, axes)

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Put this process's rows of a batch onto its devices.

        Args:
            batch: arrays [rows of this process, length], microbatch after microbatch.
        """
        micro = self.config.grad_accum
        shapes = self.batch_shapes()

        def one(name: str, x: np.ndarray) -> jax.Array:
            cut = x.reshape(micro, x.shape[0] // micro, *x.shape[1:])
            if jax.process_count() == 1:
                return jax.make_array_from_process_local_data(self.batch_shardings[name], cut)
            return from_own_rows(cut, self.batch_shardings[name], shapes[name].shape, 1)

        return {name: one(name, batch[name]) for name in self.batch_shardings}

    def sampler(self, params: Any) -> tuple[Any, Hooks]:
        """Parameters and hooks for generating text from masters on this mesh."""
        prepared = jax.jit(functools.partial(sampling_params, self.spec))(params)
        return prepared, sampling_hooks(self.spec)
