"""A step through a pipeline: microbatches pass from stage to stage, forwards and backwards.

The stages run one program in lockstep (`meshwright.sharding.schedule` says which unit each has at
which tick). The stage is a mapped dim of arrays, split over its mesh axis, as replicas are
(`meshwright.train.replicas`), and inside of theirs; everything within a stage, other parallelisms
included, is as it is without a pipeline. Between ticks activations move on by one stage, and
gradients back by one: one permute each.

**Both directions are written out.** The gradient of a loop over ticks would run all of them
forwards first, which is GPipe, and keep what m microbatches need. Here a tick may be one unit of
each direction; what a unit leaves for its way back lies in a slot of a buffer until then
(`meshwright.train.traced`), and gradients are summed in float32.

**The head** is no stage's own: that stage would work longer than the others, and all would wait at
every tick. The one with the last layers deals its tokens to all stages, each computes the loss of a
p-th of them and their gradients at once, and sends those back: ρA more for that stage, A/p for the
others.
Embedding and head are therefore needed by all stages. They are gathered over the stage axis once
a step, and so are their gradients summed; between steps each stage holds a part of them.

Ticks without work for a stage compute on what is there, and what comes of it is dropped. The
alternative, a conditional, saves nothing, as others work meanwhile, and puts collectives into
branches that not all devices take.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshwright.models.pure import LAYERS
from meshwright.sharding.schedule import Loop, Schedule, Units
from meshwright.train.replicas import Batch, Replicas
from meshwright.train.stages import StageModel, floats_of, joined
from meshwright.train.stagewise import Stagewise
from meshwright.train.traced import Halves, Picked

__all__ = ["Pipeline"]

_State = dict[str, Any]
"""What ticks hand on: ``x`` (arrived at each stage), ``grad`` (of what each stage has taken back,
not sent yet), ``kept`` (what units leave for their way back), ``losses`` (gradients of the last
chunk's results), ``sums`` (gradients so far), ``plain`` (loss so far) and ``load`` (of experts, so
far)."""

_Tick = dict[str, jax.Array]
"""One row of `Units`: arrays [stages]; and ``live``."""


@dataclass(frozen=True)
class Pipeline:
    """A schedule over the stages of a mesh.

    Attributes:
        schedule: who does what when.
        replicas: what a step maps over besides stages.
        model: what a stage does.
        live: which places of the stacked layers hold one, bool [places].
        stream: parts that the tokens of the stream are split into, on one replica.
    """

    schedule: Schedule
    replicas: Replicas
    model: StageModel
    live: np.ndarray
    stream: int = 1

    def gradients(self, working: Any, batch: Batch, scale: jax.Array) -> tuple[Any, Any]:
        """Summed gradients, and what is counted of the batch, as `meshwright.train.step.Sums`.

        Args:
            working: parameters as the step keeps them; layers as they are stored.
            batch: dealt to replicas, [microbatches, replicas of each level, rows, length].
            scale: of the loss, a float32 scalar.

        Returns:
            Float32 accumulators as `Weights.zero_accumulators` lays them out, and sums.
        """
        run = _Run(self, working, batch, scale)
        state = run.start()
        for loop in self.schedule.loops():
            state = run.loop(state, loop)
        sums = {"plain": jnp.sum(state["plain"]), **run.load(state["load"])}
        return run.by_place(state["sums"]), sums

    def plain_sum(self, working: Any, batch: Batch) -> jax.Array:
        """The plain cross-entropy of a batch, summed; forward only. Arguments as `gradients`."""
        return _Run(self, working, batch, jnp.ones(())).plain_sum()


class _Run:
    """One step's arrays, and the ticks that work on them.

    Dims: R the replicas' levels, p stages, v chunks of a stage, k layers of a chunk.
    """

    def __init__(self, pipeline: Pipeline, working: Any, batch: Batch, scale: jax.Array) -> None:
        self.schedule, self.scale, self.stream = pipeline.schedule, scale, pipeline.stream
        self.replicas, self.model = pipeline.replicas, pipeline.model
        self.weights = pipeline.model.weights
        self.on_stage = Stagewise(self.replicas, self.schedule.end)
        self.places = pipeline.live.reshape(self.schedule.stages, self.schedule.chunks, -1)
        self.working = {**working, LAYERS: self._by_chunk(working[LAYERS])}
        self.batch = {name: jnp.moveaxis(x, 0, self.on_stage.at) for name, x in batch.items()}
        self._inside_maps(self._trace)

    def _trace(self) -> None:
        """Find which parameters body and head read, and trace the body's two halves."""
        rows: Any = {name: self._of_one(x) for name, x in self.batch.items()}
        part: Any = {
            name: self._of_one(x) for name, x in jax.eval_shape(self._head_rows, 0).items()
        }
        params = {name: jax.tree.map(_shape_of, leaf) for name, leaf in self.working.items()}
        params[LAYERS] = jax.tree.map(functools.partial(_shape_of, skip=2), params[LAYERS])
        self.carry = self.model.carry(params, rows)
        live = None if self.places.all() else jax.ShapeDtypeStruct(self.places.shape[2:], bool)
        floats, others = floats_of(self.carry)
        data = (others, rows, jax.ShapeDtypeStruct((), bool), live)
        stream = floats[0]
        shape = (*part["tokens"].shape, *stream.shape[2:])
        some = jax.ShapeDtypeStruct(shape, stream.dtype)
        self.body_reads = Picked.of(self._body, params, floats, data)
        self.head_reads = Picked.of(self.model.head, params, some, part)
        self.body_of_list = self.body_reads.taking_a_list(self._body)
        self.body = Halves(self.body_of_list, self.body_reads.pick(params), floats, data)

    def _inside_maps(self, call: Callable[[], None]) -> None:
        """Call where the maps' axes are known: what jax leaves for a backward pass avoids them."""

        def one(x: jax.Array) -> jax.Array:
            call()
            return x

        over_stages = jax.vmap(one, spmd_axis_name=self.replicas.stage)
        sizes = *map(self.replicas.size, self.replicas.levels), self.schedule.stages
        jax.eval_shape(self.replicas.mapped(over_stages), jax.ShapeDtypeStruct(sizes, jnp.float32))

    def start(self) -> _State:
        """Before the first tick."""
        floats, _ = floats_of(self.carry)
        slots, stages = self.schedule.slots, self.schedule.stages
        zeros = functools.partial(self._zeros, stages)
        kept = functools.partial(self._zeros, stages, slots)
        at_once = self.schedule.returns_at_once
        sums = self.weights.zero_accumulators(
            {**self.working, LAYERS: jax.tree.map(_flat, self.working[LAYERS])}
        )
        sums = {**sums, LAYERS: self._by_chunk(sums[LAYERS], len(self.weights.lead))}
        return {
            "x": jax.tree.map(zeros, self.carry),
            "grad": list(map(zeros, floats)),
            "kept": list(map(kept, self.body.kept)),
            "losses": None if at_once else kept(floats[0]),
            "sums": sums,
            "plain": jnp.zeros((), jnp.float32),
            "load": jax.tree.map(zeros, self.model.load(self.carry)),
        }

    def loop(self, state: _State, loop: Loop) -> _State:
        """Ticks as a loop over their parts; a conditional in place of parts would put collectives
        in a branch."""
        if not loop.repeats or not loop.size:
            return state
        units = self._units(loop)
        if loop.repeats > 1:
            units = jax.tree.map(lambda x: x.reshape(-1, loop.size, *x.shape[1:]), units)
            return jax.lax.scan(
                lambda state, units: (self._parts(state, units, loop), None), state, units
            )[0]
        return self._parts(state, units, loop)

    def _parts(self, state: _State, units: Any, loop: Loop) -> _State:
        """One repeat of a loop."""
        done = 0
        for ticks, head in loop.parts:
            # Which of the directions that alternate; the same at every repeat.
            tick = functools.partial(self._tick, head=head, at=loop.start + done)
            if ticks > 1:
                part = jax.tree.map(operator.itemgetter(slice(done, done + ticks)), units)
                state = jax.lax.scan(tick, state, part)[0]
            elif ticks:
                now = jax.tree.map(operator.itemgetter(done), units)
                if done:
                    # Else compilers mix the two, and hold the temporaries of both.
                    state, now = jax.lax.optimization_barrier((state, now))
                state = tick(state, now)[0]
            done += ticks
        return state

    def _units(self, loop: Loop) -> tuple[_Tick | None, _Tick | None]:
        """What there is to do at the ticks of a loop, in each direction."""
        schedule = self.schedule
        start, stop = loop.start - schedule.delay, loop.stop - schedule.delay
        there = schedule.forward().between(loop.start, loop.stop) if loop.forwards else None
        back = schedule.backward().between(start, stop) if loop.backwards else None
        return self._arrays(there), self._arrays(back)

    def _tick(
        self, state: _State, units: tuple[_Tick | None, _Tick | None], *, head: bool, at: int
    ) -> tuple[_State, None]:
        there, back = units
        grad = None
        if there is not None:
            state, made = self._forward(state, there, self.schedule.sends(at, 1, around=not head))
            if head:
                state, grad = self._loss(state, made, there)
        if back is not None:
            came = self.schedule.sends(at - 1, -1, around=grad is None)
            state = self._backward(state, back, grad, came)
        return state, None

    def plain_sum(self) -> jax.Array:
        """The loss alone, forward only."""
        start = jax.tree.map(functools.partial(self._zeros, self.schedule.stages), self.carry)

        def tick(state: Any, now: _Tick, at: int) -> Any:
            x, plain = state

            def one(chunk: Any, first: Any, live: Any, floats: Any, others: Any, rows: Any) -> Any:
                data = (others, rows, first, live)
                (floats, _), others = self.body_of_list(chunk, floats, data)
                return floats, others

            floats, others = self._mapped(one, self._chunk(now), now["first"], now.get("live"))(
                *floats_of(x), self._rows(now)
            )
            x = joined(self.carry, floats, others)
            made = self._head(floats[0], now, gradients=False)
            return self.on_stage.send(x, self.schedule.sends(at, 1)), plain + made

        def ticks(state: Any, now: _Tick) -> tuple[Any, None]:
            for at in range(together):
                state = tick(state, jax.tree.map(operator.itemgetter(at), now), at)
            return state, None

        # Of a v-shape the directions alternate, and its last forward tick is empty.
        units, together = self.schedule.forward(), 1 + self.schedule.folded
        count = len(units.valid) // together * together
        units = self._arrays(units.between(0, count))
        units = jax.tree.map(lambda x: x.reshape(-1, together, *x.shape[1:]), units)
        return jax.lax.scan(ticks, (start, jnp.zeros((), jnp.float32)), units)[0][1]

    def _body(self, params: Any, floats: Any, data: Any) -> Any:
        others, rows, first, live = data
        carry, loss = self.model.body(params, joined(self.carry, floats, others), rows, first, live)
        floats, others = floats_of(carry)
        return (floats, loss), others

    def _forward(
        self, state: _State, now: _Tick, sends: Sequence[tuple[int, int]]
    ) -> tuple[_State, jax.Array]:
        """One unit forwards on every stage; also what the stages have made, before it moves on."""

        def one(chunk: Any, first: Any, live: Any, floats: Any, others: Any, rows: Any) -> Any:
            return self.body.forward(chunk, floats, (others, rows, first, live))

        over_all = self._mapped(one, self._chunk(now), now["first"], now.get("live"))
        floats, others, kept = over_all(*floats_of(state["x"]), self._rows(now))
        store = functools.partial(self.on_stage.store, slot=now["slot"], valid=now["valid"])
        made = joined(self.carry, floats, others)
        load = jax.tree.map(
            lambda total, x: total + self.on_stage.mask(now["last"], x, 0),
            state["load"],
            self.model.load(made),
        )
        x = self.on_stage.send(made, sends)
        kept = list(map(store, state["kept"], kept))
        return {**state, "kept": kept, "x": x, "load": load}, floats[0]

    def _loss(self, state: _State, made: jax.Array, now: _Tick) -> tuple[_State, jax.Array | None]:
        """The head on what the last chunk has made, and the gradient for it to take back."""
        plain, grads, grad = self._head(made, now)
        sums = list(map(jnp.add, self.head_reads.pick(state["sums"]), grads))
        state = {
            **state,
            "plain": state["plain"] + plain,
            "sums": self.head_reads.put(state["sums"], sums),
        }
        if self.schedule.returns_at_once:
            return state, grad
        losses = self.on_stage.store(state["losses"], grad, now["slot"], now["last"])
        return {**state, "losses": losses}, None

    def _head(self, made: jax.Array, now: _Tick, *, gradients: bool = True) -> Any:
        """Loss of the last chunk's tokens, and its gradients: of what the head reads, and of the
        tokens, whole on the stage of that chunk again."""
        stage, reads = self.on_stage, self.head_reads
        weights = reads.pick(self.working)
        some = stage.deal(made, self.stream)
        rows = self._head_rows(now["microbatch"][self.schedule.end])
        valid = jnp.any(now["last"]).astype(jnp.float32)

        def loss(weights: Any, x: jax.Array, rows: Batch) -> Any:
            return self.model.head(reads.whole(weights), x, rows)

        def one(x: jax.Array, rows: Batch) -> Any:
            if not gradients:
                return loss(weights, x, rows)[1] * valid
            _, back, plain = jax.vjp(
                lambda weights, x: loss(weights, x, rows), weights, x, has_aux=True
            )
            grads, grad = back(self.scale)
            return [g.astype(jnp.float32) for g in grads], grad, plain

        over_stages = jax.vmap(one, spmd_axis_name=self.replicas.stage)
        if not gradients:
            return jnp.sum(self.replicas.mapped(over_stages)(some, rows))
        grads, grad, plain = self.replicas.mapped(over_stages, out_axes=(None, 0, 0))(some, rows)
        return jnp.sum(plain), grads, stage.collect(grad, self.stream, made.shape[stage.at + 2])

    def _backward(
        self,
        state: _State,
        now: _Tick,
        grad: jax.Array | None,
        sends: Sequence[tuple[int, int]],
    ) -> _State:
        """One unit backwards on every stage, from what the stage after took back a tick ago and
        sends now, or the last chunk's from the head."""
        stage = self.on_stage
        kept = [stage.load(x, now["slot"]) for x in state["kept"]]
        if state["losses"] is not None:
            grad = stage.load(state["losses"], now["slot"])
        arrived = now["valid"] & ~now["last"]
        came = stage.send(state["grad"], sends)
        came = [stage.mask(arrived, x, 0) for x in came]
        if grad is not None:
            came[0] = stage.mask(now["last"], grad, came[0])
        loss_grad = jnp.where(now["last"], self.scale, 0.0)

        def one(chunk: Any, loss_grad: Any, _: Any, kept: Any, came: Any) -> Any:
            grads, back = self.body.backward(chunk, kept, came, loss_grad)
            return [g.astype(jnp.float32) for g in grads], back

        over_all = self._mapped(one, self._chunk(now), loss_grad, None, out_axes=(None, 0))
        grads, back = over_all(kept, came)
        return {
            **state,
            "sums": self._added(state["sums"], grads, now),
            "grad": back,
        }

    def _added(self, sums: Any, grads: list[jax.Array], now: _Tick) -> Any:
        """Add gradients of units [lead, p, …] to the sums, where they are of a unit."""
        reads, lead = self.body_reads, len(self.weights.lead)
        layered = reads.pick(_layered(self.working))
        found = []
        for total, grad, of_layer in zip(reads.pick(sums), grads, layered, strict=True):
            valid = now["valid"].reshape(-1, *[1] * (grad.ndim - lead - 1))
            grad = jnp.where(valid, grad, 0.0)
            if not of_layer:
                found.append(total + grad)
            else:
                found.append(self.on_stage.add(total, grad, now["chunk"], lead))
        return self.weights.accumulated(reads.put(sums, found), by_chunk=True)

    def _mapped(
        self, one: Callable[..., Any], chunk: list[Any], first: Any, live: Any, **how: Any
    ) -> Any:
        """``one`` over stages and replicas.

        Args:
            one: of the parameters that the body reads, two things of the stage, and the rest.
            chunk: these parameters; layers with a dim for the stage.
            first, live: arrays [p, …] or None.
            how: of `Replicas.mapped`.

        Returns:
            A function of the rest, arrays [R, p, …].
        """
        axes = [0 if layer else None for layer in self.body_reads.pick(_layered(self.working))]

        def over_stages(*rest: Any) -> Any:
            mapped = (None if first is None else 0, None if live is None else 0)
            call = jax.vmap(
                one,
                in_axes=(axes, *mapped, *[0] * len(rest)),
                spmd_axis_name=self.replicas.stage,
            )
            return call(chunk, first, live, *rest)

        return self.replicas.mapped(over_stages, **how)

    def _chunk(self, now: _Tick) -> list[jax.Array]:
        """The parameters that the body reads; of the layers, each stage's chunk [p, k, …]."""
        layered = self.body_reads.pick(_layered(self.working))
        leaves = self.body_reads.pick(self.working)
        return [
            self.on_stage.pick(leaf, now["chunk"], 0) if layer else leaf
            for leaf, layer in zip(leaves, layered, strict=True)
        ]

    def _rows(self, now: _Tick) -> Batch:
        """Each stage's microbatch, [R, p, rows, length]."""
        take = functools.partial(jnp.take, indices=now["microbatch"], axis=self.on_stage.at)
        return {name: self.on_stage.hold(take(x)) for name, x in self.batch.items()}

    def _head_rows(self, microbatch: Any) -> Batch:
        """Each stage's part of the tokens of a microbatch, [R, p, rows, length / p]."""
        at = self.on_stage.at
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=microbatch, axis=at)
        return {
            name: self.on_stage.dealt(take(x, keepdims=False), self.stream)
            for name, x in self.batch.items()
        }

    def _arrays(self, units: Units | None) -> _Tick | None:
        if units is None:
            return None
        found: dict[str, Any] = dict(vars(units))
        if not self.places.all():
            found["live"] = self.places[np.arange(self.schedule.stages), units.chunk]
        return {name: jnp.asarray(x) for name, x in found.items()}

    def _by_chunk(self, layers: Any, lead: int = 0) -> Any:
        """[lead, places, …] → [lead, p, v, k, …]."""
        return jax.tree.map(
            lambda x: x.reshape(*x.shape[:lead], *self.places.shape, *x.shape[lead + 1 :]), layers
        )

    def by_place(self, sums: Any) -> Any:
        """Gradients of layers as parameters are stored: [lead, p, v, k, …] → [lead, places, …]."""
        lead = len(self.weights.lead)
        flat = jax.tree.map(functools.partial(_flat, lead=lead), sums[LAYERS])
        return {**sums, LAYERS: flat}

    def load(self, load: Any) -> Any:
        """Loads of experts [R, p, …] summed over replicas; whole on the stage of the last chunk."""
        return self.replicas.total(jax.tree.map(lambda x: jnp.sum(x, self.on_stage.at), load))

    def _zeros(self, *args: Any) -> jax.Array:
        """Zeros [R, leading numbers, …] of a shape."""
        *more, shape = args
        lead = map(self.replicas.size, self.replicas.levels)
        return self.on_stage.hold(jnp.zeros((*lead, *more, *shape.shape), shape.dtype))

    def _of_one(self, x: Any) -> jax.ShapeDtypeStruct:
        """The shape on one replica, of one microbatch or stage."""
        return _shape_of(x, skip=self.on_stage.at + 1)


def _layered(params: Any) -> Any:
    """For each parameter, whether it is of the stacked layers."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == LAYERS, params)


def _shape_of(x: Any, skip: int = 0) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape[skip:], x.dtype)


def _flat(x: jax.Array, lead: int = 0) -> jax.Array:
    """[lead, p, v, k, …] → [lead, p · v · k, …]."""
    return x.reshape(*x.shape[:lead], -1, *x.shape[lead + 3 :])
