"""Time the collectives between all local devices: latency and bandwidth of each kind.

A collective's seconds are close to a line over its wire bytes, so a few sizes give both its
latency and its bandwidth (`meshwright.sharding.calibration.fit_link`). Each trip of the loop
sends the sum of the one before, or writes one element of its result into what the next one sends;
an optimization barrier behind the collective keeps XLA from computing that element alone. Adding
whole results up instead would time the addition as well.

The devices stand in one ring, as for a mesh of one axis. Wire bytes are those of what was asked
for: a compiler that does a reduce-scatter as an all-reduce, as TPU's does on small slices, gets
half the rate, which is what a step gets. Simulated devices are refused: they
share one memory, and what a copy within it takes says nothing about links.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.sharding.calibration import LinkRate, fit_link
from meshwright.sharding.errors import ConfigError
from meshwright.sharding.units import format_count, format_seconds
from meshwright.train.stopwatch import Stopwatch, chained, rate_of

__all__ = ["measure_links", "wire_bytes"]

_KINDS = ("all-gather", "reduce-scatter", "all-reduce")
_MIB = 1 << 20
_SIZES = (_MIB, 8 * _MIB, 64 * _MIB, 256 * _MIB)  # of the full buffer S
_GUESSED_BANDWIDTH = 50e9
_GUESSED_LATENCY = 20e-6


def wire_bytes(kind: str, full_bytes: int, devices: int) -> int:
    """Bytes a device sends in one execution over a ring.

    Source: Chan et al., "Collective communication: theory, practice, and experience", 2007;
    counted as in `meshwright.sharding.planned.Collective`.

    >>> wire_bytes("all-gather", 800, 8), wire_bytes("all-reduce", 800, 8)
    (700, 1400)
    """
    once = full_bytes * (devices - 1) // devices
    return 2 * once if kind == "all-reduce" else once


def measure_links(
    devices: Sequence[Any],
    seconds: float,
    say: Callable[[str], None] = lambda text: None,
    *,
    sizes: Sequence[int] = _SIZES,
    simulated: bool = False,
) -> tuple[LinkRate, ...]:
    """Latency and bandwidth of each kind of collective over all of ``devices``.

    Args:
        devices: two or more.
        seconds: to spend; every kind gets its smallest two sizes even so.
        say: gets a line about each kind.
        sizes: full buffers in bytes, smallest first, multiples of 4 × devices².
        simulated: measure CPU devices all the same, to test the programs.

    Raises:
        ConfigError: the devices are simulated, or there is only one.
    """
    count = len(devices)
    if count < 2 or (devices[0].platform == "cpu" and not simulated):
        one = count < 2
        raise ConfigError(
            "cannot measure the links between these devices",
            where=f"{count} device(s) of the platform {devices[0].platform}",
            why="there is nothing to send to" if one else "simulated devices share one memory",
            fix="run it where there are several TPU or GPU devices",
        )
    mesh = Mesh(np.asarray(devices), ("all",))
    watch = Stopwatch(devices[0])
    end = time.perf_counter() + seconds
    found = []
    for index, kind in enumerate(_KINDS):
        left = max(0.0, end - time.perf_counter())
        link = _measure_kind(watch, mesh, kind, sizes, left / (len(_KINDS) - index))
        found.append(link)
        latency = format_seconds(link.latency_seconds)
        say(f"{kind} of {count}: {format_count(link.bandwidth)}B/s after {latency}")
    return tuple(found)


def _measure_kind(
    watch: Stopwatch, mesh: Mesh, kind: str, sizes: Sequence[int], seconds: float
) -> LinkRate:
    count = mesh.devices.size
    end = time.perf_counter() + seconds
    points: list[tuple[int, float]] = []
    bandwidth, latency = _GUESSED_BANDWIDTH, _GUESSED_LATENCY
    for index, size in enumerate(sizes):
        wire = wire_bytes(kind, size, count)
        guess = latency + wire / bandwidth
        left = end - time.perf_counter()
        if len(points) > 1 and (watch.least_seconds(guess) > left or not watch.holds(3 * size)):
            break
        # Of an all-gather each device holds its part; of the other two the whole buffer.
        held = size if kind == "all-gather" else size * count
        split = NamedSharding(mesh, PartitionSpec("all"))
        # Zeros, which sums of sums of sums leave as they are; the compiler does not see them.
        make = jax.jit(lambda held=held: jnp.zeros((held // 4,), jnp.float32), out_shardings=split)
        program = chained(_program(mesh, kind))
        timed = watch.trips(program, [make()], guess, max(0.0, left) / (len(sizes) - index))
        points.append((wire, 1 / rate_of(1.0, timed).value))
        link = fit_link(kind, count, points)
        bandwidth, latency = link.bandwidth, link.latency_seconds
    return fit_link(kind, count, points)


def _program(mesh: Mesh, kind: str) -> Callable[..., jax.Array]:
    split = PartitionSpec("all")

    def collective(x: jax.Array) -> jax.Array:
        match kind:
            case "all-gather":
                return lax.all_gather(x, "all", tiled=True)
            case "reduce-scatter":
                return lax.psum_scatter(x, "all", tiled=True)
            case _:
                return lax.psum(x, "all")

    def trip(_: Any, x: jax.Array) -> jax.Array:
        result = lax.optimization_barrier(collective(x))
        # An all-reduce works in place only where its operand is not needed again: anything else
        # would add a copy of the buffer.
        return result if kind == "all-reduce" else x.at[0].set(result[-1])

    def run(trips: int, x: jax.Array) -> jax.Array:
        return jax.shard_map(
            lambda x: lax.fori_loop(0, trips, trip, x),
            mesh=mesh,
            in_specs=split,
            out_specs=split,
            check_vma=False,
        )(x)

    return run
