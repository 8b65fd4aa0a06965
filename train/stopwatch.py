"""Time work on a device without timing anything else: warm, waited for, repeated, and long.

A call of a compiled program costs tens of microseconds before the device does anything, so work
is repeated inside the program, in trips of a loop that feed each other, until a call lasts a
hundred times that. The number of trips is a constant of the program: a loop that asks whether to
go on costs a round trip to the host on GPU. So a program that proves too short is compiled again
with more trips, which the estimate handed in makes rare.

Costs one or two compilations a measurement. Rejected: a profiler's device times, which need
another tool on every platform and miss the gaps between kernels that a step has too.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from meshwright.sharding.calibration import Rate

__all__ = ["Stopwatch", "chained", "rate_of"]

_OVERHEAD = 100  # a call lasts this many times its dispatch: it is 1% of what is measured
_SHORTEST_CALL = 0.005  # seconds; the clock and the scheduler are noise well below that
_LONGEST_CALL = 0.25  # seconds; more, shorter calls give a better median
_REPEATS = (3, 50)
_MEMORY_PART = 0.25  # of the device that operands may take: a program has copies and results

_Build = Callable[[int, Sequence[Any]], Callable[[], Any]]
"""(trips, operands) → a compiled call that does so many trips."""


class Stopwatch:
    """Times programs on one device.

    Args:
        device: where calls run.

    Attributes:
        device: the same.
        dispatch_seconds: what a call costs that does nothing.
    """

    def __init__(self, device: Any) -> None:
        self.device = device
        with jax.default_device(device):
            nothing = jax.jit(lambda x: x + 1).lower(jnp.zeros(())).compile()
            operand = jnp.zeros(())
            jax.block_until_ready(nothing(operand))
            found = [_seconds_of(lambda: nothing(operand)) for _ in range(20)]
        self.dispatch_seconds = statistics.median(found)

    @property
    def call_seconds(self) -> float:
        """The least a call should last, so that its dispatch does not count."""
        return max(_SHORTEST_CALL, _OVERHEAD * self.dispatch_seconds)

    def least_seconds(self, trip_seconds: float) -> float:
        """What measuring takes at least: a warm-up and the repeats of the shortest call."""
        return (1 + _REPEATS[0]) * max(trip_seconds, self.call_seconds)

    def holds(self, held_bytes: int) -> bool:
        """Whether operands of this size leave the device enough room; True where it won't say."""
        limit = (self.device.memory_stats() or {}).get("bytes_limit")
        return limit is None or held_bytes <= _MEMORY_PART * limit

    def trips(
        self, build: _Build, operands: Sequence[Any], guess: float, seconds: float
    ) -> list[float]:
        """Seconds of one trip, from each of several calls.

        Args:
            build: makes the call.
            operands: handed to it.
            guess: seconds a trip might take; how far off it is costs compilations only.
            seconds: to spend; three calls are made however long they take.
        """
        end = time.perf_counter() + seconds
        wanted = max(self.call_seconds, min(_LONGEST_CALL, seconds / 10))
        trips = max(1, round(wanted / guess))
        while True:
            call = build(trips, operands)
            jax.block_until_ready(call())
            found = [_seconds_of(call)]
            if found[0] >= self.call_seconds:
                break
            # A hundred times more at most: a call interrupted, or too short to tell, misleads.
            trips = min(100 * trips, math.ceil(trips * wanted / found[0]))
        least, most = _REPEATS
        while len(found) < least or (len(found) < most and time.perf_counter() < end):
            found.append(_seconds_of(call))
        return [value / trips for value in found]


def chained(program: Callable[..., jax.Array]) -> _Build:
    """A call for `Stopwatch.trips` whose first operand is replaced by each result.

    The result takes the operand's memory, so that a call copies nothing and calls depend on each
    other like the trips inside them.

    Args:
        program: (trips, *operands) → an array like the first operand.
    """

    def build(trips: int, operands: Sequence[Any]) -> Callable[[], Any]:
        first, *others = operands
        compiled = (
            jax.jit(lambda *values: program(trips, *values), donate_argnums=0)
            .lower(first, *others)
            .compile()
        )
        state = jnp.copy(first)  # a program with other trips starts from the operand again

        def call() -> Any:
            nonlocal state
            state = compiled(state, *others)
            return state

        return call

    return build


def rate_of(work: float, seconds: Sequence[float]) -> Rate:
    """Work a second, of the median of several times.

    >>> rate_of(6.0, [2.0, 1.0, 3.0])
    Rate(value=3.0, low=2.0, high=6.0)
    """
    return Rate(work / statistics.median(seconds), work / max(seconds), work / min(seconds))


def _seconds_of(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began
