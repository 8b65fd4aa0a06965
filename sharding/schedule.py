"""Pipeline schedules: which unit of work each stage does at which tick, and who owns which layer.

A step in a pipeline is ``m`` microbatches through ``p`` stages. In an interleaved one each stage
holds ``v`` groups of layers, *chunks*, and a microbatch goes round ``v`` times. A *unit* is one
microbatch in one chunk, forwards or backwards. All stages work in lockstep: one program, in which
a tick is one unit forwards, one backwards, or one of each, and after which activations move on by
one stage and their gradients back by one.

A schedule here is one number, the *delay*: the tick at which the last chunk takes its first unit
back. Forward units enter at ticks 0, 1, 2, … in the order of rounds (p microbatches through chunk
0, the same through chunk 1, …); backward units in the same order with chunks reversed, the delay
later.

===============  =======================  ======================  ==============================
schedule         delay                    units held at once      idle share of a step
===============  =======================  ======================  ==============================
``gpipe``        after all forward units  m                       (p - 1) / (m + p - 1)
``1f1b``         p - 1: at once           2p - 1                  (p - 1) / (m + p - 1)
``interleaved``  vp - 1: at once          (v + 1)p - 1, each 1/v  (p - 1) / (vm + p - 1)
``v-shape``      2p - 1: at once          2p, each a half         (p - 1/2) / (m + p - 1/2)
===============  =======================  ======================  ==============================

Ticks before the delay run forwards only and ticks after the last forward unit backwards only, so
that idle time is (p - 1) units of either kind and no more. GPipe: Huang et al. 2019; 1F1B:
Narayanan et al., PipeDream, 2019; interleaved: Narayanan et al. 2021, section 2.2.

Lockstep costs memory: a stage has its gradient 2(p - 1 - i) ticks after it sent its activation,
where machines that alternate freely hold p - i microbatches. Under ``1f1b`` ours holds
2(p - 1 - i) + 1, and arrays are as large on every stage: 2p - 1, but never m. ``v-shape`` evens
that out: the model goes down the stages and up again, so that a stage has chunk i, which waits
long, and chunk 2p - 1 - i, which does not: together what p microbatches leave, on every stage. It
costs what two chunks cost, twice the messages, and half a tick, as pairs of ticks are what repeats.
The placement is that of Qi et al., "Pipeline parallelism with controllable memory", 2024. The
alternative, half ticks in which odd stages run forwards while even ones run backwards, holds p as
well, but every half tick then lasts as long as a backward unit: a quarter to a half more time.

Arithmetic only: no mesh and no jax.
"""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from meshwright.sharding.errors import PlacementError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Loop", "Schedule", "ScheduleKind", "Units", "layer_slots"]

ScheduleKind = Literal["1f1b", "gpipe", "interleaved", "v-shape"]
"""The order of a pipeline's work."""


@dataclass(frozen=True)
class Units:
    """What each stage does at each tick, in one direction. Arrays [ticks, stages].

    Attributes:
        microbatch: of the unit, int32; 0 where there is none.
        chunk: of the unit, int32.
        slot: where its activations are kept between the directions, int32.
        valid: whether there is a unit, bool.
        first: whether it is in the model's first chunk, bool.
        last: whether it is in the model's last chunk, bool.
    """

    microbatch: np.ndarray
    chunk: np.ndarray
    slot: np.ndarray
    valid: np.ndarray
    first: np.ndarray
    last: np.ndarray

    def between(self, start: int, stop: int) -> Units:
        """The ticks from ``start`` up to ``stop``."""
        found = {name: x[start:stop] for name, x in self.arrays().items()}
        return Units(**found)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return dict(vars(self))


@dataclass(frozen=True)
class Loop:
    """Ticks that repeat.

    Attributes:
        start: the first of them.
        repeats: how often all parts run.
        parts: one after the other, ticks of each and whether microbatches come out of the model's
            last chunk at them.
        forwards, backwards: which units there are.
    """

    start: int
    repeats: int
    parts: tuple[tuple[int, bool], ...]
    forwards: bool = False
    backwards: bool = False

    @property
    def size(self) -> int:
        """Ticks of one repeat."""
        return sum(ticks for ticks, _ in self.parts)

    @property
    def stop(self) -> int:
        """The tick after all of them."""
        return self.start + self.repeats * self.size


@dataclass(frozen=True)
class Schedule:
    """A pipeline's work over time.

    Attributes:
        kind: which order.
        stages: p.
        microbatches: m, at least p; a multiple of p where chunks are interleaved.
        chunks: v, groups of layers a stage holds; 1 unless interleaved, 2 of a v-shape.

    >>> [Schedule(kind, 4, 12).slots for kind in ("gpipe", "1f1b")]
    [12, 7]
    >>> Schedule("v-shape", 4, 12, 2).slots  # of half the layers
    8
    >>> Schedule("1f1b", 4, 12).idle_fraction, Schedule("interleaved", 4, 12, 2).idle_fraction
    (0.2, 0.1111111111111111)
    """

    kind: ScheduleKind
    stages: int
    microbatches: int
    chunks: int = 1

    def __post_init__(self) -> None:
        assert self.kind in get_args(ScheduleKind), self.kind
        assert self.chunks == 2 or not self.folded, self.chunks
        p, m, v = self.stages, self.microbatches, self.chunks
        where = f"stage={p}, microbatches={m}"
        if m < p:
            raise PlacementError(
                f"cannot fill a pipeline of {p} stages with {m} microbatch{'es' * (m > 1)}",
                where=where,
                why=f"{m} is less than {p}: some stage would never have work",
                fix=f"use --grad-accum {p} or more, or stage={m} or less",
            )
        if v > 1 and m % p and not self.folded:
            below = m // p * p
            raise PlacementError(
                f"cannot interleave {m} microbatches over {p} stages",
                where=f"{where}, {v} chunks a stage",
                why=f"they go round in groups of {p}, and {m} is not divisible by {p}",
                fix=f"use --grad-accum {below} or {below + p}, or --pipeline.schedule 1f1b",
            )

    @property
    def units(self) -> int:
        """Units of one direction that a stage works on in a step: vm."""
        return self.microbatches * self.chunks

    @property
    def folded(self) -> bool:
        """Whether chunks go down the stages and up again; else they go round."""
        return self.kind == "v-shape"

    @property
    def end(self) -> int:
        """The stage with the model's last chunk."""
        return 0 if self.folded else self.stages - 1

    @property
    def delay(self) -> int:
        """The tick at which the last chunk does its first backward unit."""
        if self.kind == "gpipe":
            return self.forward_ticks
        return self.chunks * self.stages - 1

    @property
    def forward_ticks(self) -> int:
        """Ticks that run forwards. Of a v-shape there are ticks in pairs, at the first of which a
        microbatch comes out of the last chunk: there is nothing for the very last of them."""
        return self.units + (2 * self.stages - 1 if self.folded else self.stages - 1)

    @property
    def ticks(self) -> int:
        """Ticks of a step; those with a unit in both directions last as long as one of each."""
        return self.delay + self.forward_ticks - self.folded

    @property
    def slots(self) -> int:
        """Units whose activations a stage has room for: the most that wait to be taken back."""
        return int(self._slots.max()) + 1

    @property
    def returns_at_once(self) -> bool:
        """Whether the last chunk takes a microbatch back in the tick in which it arrives."""
        return self.kind != "gpipe"

    @property
    def idle_fraction(self) -> float:
        """Part of a step that a stage is idle forwards; backwards it is no more."""
        return (self.forward_ticks - self.units) / self.forward_ticks

    def loops(self) -> tuple[Loop, ...]:
        """All ticks in order, as loops of which each is compiled once."""
        p, m, v, both = self.stages, self.microbatches, self.chunks, self.returns_at_once
        if self.folded:
            quiet = (1, False)
            return (
                Loop(0, 1, (quiet,), forwards=True),
                Loop(1, p - 1, (quiet, quiet), forwards=True),
                Loop(2 * p - 1, m, ((1, True), quiet), forwards=True, backwards=True),
                Loop(2 * (p + m) - 1, p - 1, (quiet, quiet), backwards=True),
            )
        # The head has its first work when a unit has been through all stages and chunks; then as
        # many ticks in a row as there are stages, once a round of all chunks.
        arrives, forward = p * v - 1, self.forward_ticks
        first = p if v > 1 else forward - arrives
        rest = max(0, forward - arrives - first) // (p * v)
        left = max(forward, self.delay)
        return (
            Loop(0, 1, ((arrives, False),), forwards=True),
            Loop(arrives, 1, ((first, True),), forwards=True, backwards=both),
            Loop(arrives + p, rest, ((p * v - p, False), (p, True)), forwards=True, backwards=both),
            Loop(left, 1, ((self.ticks - left, False),), backwards=True),
        )

    def sends(self, tick: int, by: int, *, around: bool = True) -> tuple[tuple[int, int], ...]:
        """Who sends to whom what was made at a tick: pairs of a stage and the one with the chunk
        that follows (``by`` 1), or comes before (-1); that may be the same stage.

        Args:
            tick: of what is sent; matters where chunks go down and up.
            by: 1 for activations, -1 for their gradients.
            around: also from the last stage to the first, where chunks go round.

        >>> Schedule("v-shape", 3, 6, 2).sends(0, 1)
        ((0, 1), (1, 0), (2, 2))
        """
        p = self.stages
        if self.folded:
            ways = [by if (tick - stage) % 2 == 0 else -by for stage in range(p)]
            pairs = [(stage, min(stage + way, p - 1)) for stage, way in enumerate(ways)]
            return tuple((stage, to) for stage, to in pairs if to >= 0)
        pairs = [(stage, (stage + by) % p) for stage in range(p)]
        if self.chunks == 1 or not around:
            pairs = [(stage, to) for stage, to in pairs if to - stage == by]
        return tuple(pairs)

    def forward(self) -> Units:
        """Forward units, [forward_ticks, stages]."""
        import numpy as np

        tick = np.arange(self.forward_ticks)[:, None]
        if self.folded:
            return self._down_and_up(tick, 0)
        return self._round(tick - np.arange(self.stages))

    def backward(self) -> Units:
        """Backward units, [ticks - delay, stages]; the first row is the tick ``delay``."""
        import numpy as np

        tick = np.arange(self.ticks - self.delay)[:, None]
        if self.folded:
            return self._down_and_up(tick, 1)
        place = tick - np.arange(self.stages)[::-1]
        chunk = place // self.stages % self.chunks
        mirrored = place + (self.chunks - 1 - 2 * chunk) * self.stages
        return self._round(mirrored, (place >= 0) & (place < self.units))

    @functools.cached_property
    def _slots(self) -> np.ndarray:
        """The slot of each unit, the lowest that is free: [units], or [stages, units] where stages
        differ; of a v-shape unit 2i + c is microbatch i in chunk c."""
        import numpy as np

        if self.folded:
            stage, at = np.arange(self.stages)[:, None], np.arange(self.units)
            late = 2 * self.stages - 1 - stage
            starts = at // 2 * 2 + np.where(at % 2, late, stage)
            ends = at // 2 * 2 + self.delay + np.where(at % 2, stage, late)
            return np.stack([_free_slots(*both) for both in zip(starts, ends, strict=True)])
        place = np.arange(self.units)
        chunk = place // self.stages % self.chunks
        returned = np.argsort(place + (self.chunks - 1 - 2 * chunk) * self.stages)
        # The first stage waits longest; what suits it suits all.
        return _free_slots(place, self.delay + returned + self.stages - 1)

    def _round(self, unit: np.ndarray, valid: np.ndarray | None = None) -> Units:
        """Chunks go round: which unit, in the order of rounds, [ticks, stages]."""
        import numpy as np

        if valid is None:
            valid = (unit >= 0) & (unit < self.units)
        unit = np.where(valid, unit, 0)
        # A round is as many microbatches as stages; without chunks to change it is no matter.
        group, chunk = unit // (self.stages * self.chunks), unit // self.stages % self.chunks
        microbatch = group * self.stages + unit % self.stages
        return self._units(microbatch, chunk, self._slots[unit], valid)

    def _down_and_up(self, tick: np.ndarray, arrives_in: int) -> Units:
        """Chunks go down and up; both directions are the same with chunks reversed. A microbatch
        enters at every other tick, so that a stage's two chunks have ticks of their own."""
        import numpy as np

        stage = np.arange(self.stages)
        turned = (tick - stage) % 2
        since = tick - np.where(turned, 2 * self.stages - 1 - stage, stage)
        valid = (since >= 0) & (since < self.units)
        microbatch = np.where(valid, since // 2, 0)
        chunk = np.where(valid, turned ^ arrives_in, 0)
        slot = self._slots[stage, 2 * microbatch + chunk]
        return self._units(microbatch, chunk, slot, valid)

    def _units(
        self, microbatch: np.ndarray, chunk: np.ndarray, slot: np.ndarray, valid: np.ndarray
    ) -> Units:
        import numpy as np

        stage = np.broadcast_to(np.arange(self.stages), valid.shape)
        return Units(
            microbatch=microbatch.astype(np.int32),
            chunk=chunk.astype(np.int32),
            slot=slot.astype(np.int32),
            valid=valid,
            first=valid & (stage == 0) & (chunk == 0),
            last=valid & (stage == self.end) & (chunk == self.chunks - 1),
        )


def _free_slots(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The lowest slot that is free for each of some units, from its start through its end."""
    import numpy as np

    found, free, held = np.zeros(len(starts), np.int32), list[int](), list[tuple[int, int]]()
    for unit in np.argsort(starts, kind="stable"):
        while held and held[0][0] < starts[unit]:
            heapq.heappush(free, heapq.heappop(held)[1])
        slot = heapq.heappop(free) if free else len(held)
        found[unit] = slot
        heapq.heappush(held, (int(ends[unit]), slot))
    return found


def layer_slots(
    layers: int, stages: int, chunks: int = 1, *, folded: bool = False
) -> tuple[int | None, ...]:
    """Which layer of the model each place of the stacked layers holds; None for an empty place.

    The places are split evenly over the stages, in order. Chunk c of the model, its c-th group of
    layers in order, lies on stage c mod p; ``folded``, the second of two chunks in reverse. Where
    the layers do not divide, some chunks have one less: the last first, as its stage also has the
    head's work to wait for, then the first ones.

    Raises:
        PlacementError: more chunks than layers.

    >>> layer_slots(4, 2), layer_slots(4, 2, chunks=2)
    ((0, 1, 2, 3), (0, 2, 1, 3))
    >>> layer_slots(4, 2, chunks=2, folded=True)
    (0, 3, 1, 2)
    >>> layer_slots(5, 3)
    (0, 1, 2, 3, 4, None)
    """
    groups = stages * chunks
    if groups > layers:
        names = f"stage={stages}" + (f", {chunks} chunks a stage" if chunks > 1 else "")
        most = layers // chunks
        works = [f"stage={most} or less"] if most else []
        works += ["--pipeline.schedule 1f1b"] if chunks > 1 and stages <= layers else []
        raise PlacementError(
            f"cannot split {layers} layers into {groups} groups",
            where=f"{names}, layers={layers}",
            why=f"{groups} is more than {layers}: some group would have no layer",
            fix=f"use {', or '.join([*works, f'{groups} layers or more'])}",
        )
    size = -(-layers // groups)
    short = groups * size - layers
    held = [size] * groups
    for group in [groups - 1, *range(groups - 1)][:short]:
        held[group] -= 1
    starts = [sum(held[:group]) for group in range(groups)]
    found: list[int | None] = []
    for stage in range(stages):
        for chunk in range(chunks):
            group = chunk * stages + (stages - 1 - stage if folded and chunk else stage)
            inside = range(starts[group], starts[group] + held[group])
            found += [*inside, *[None] * (size - held[group])]
    return tuple(found)
