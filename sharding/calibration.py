"""What a device was measured to reach: rates that replace those of data sheets.

`meshwright calibrate` measures them on one machine, a file keeps them
(`meshwright.sharding.calibration_file`), and `meshwright plan` puts them in place of the
maker's. The idea: a data sheet gives one number for all matmuls, a device reaches less, and much
less on small ones. So a calibration holds a table of rates by shape, and prices any other shape
from its neighbours. Every rate keeps the spread of its repeats, since a figure from a busy
machine is worse than none.

Needs no jax; pricing a shape takes microseconds. Rejected: fractions of the data sheet, which
would change their meaning with every correction of the data sheet's figures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meshwright.sharding.chips import Chip, chip_of_device_kind
from meshwright.sharding.errors import ConfigError

__all__ = [
    "AttentionRate",
    "Calibration",
    "LinkRate",
    "MatmulRate",
    "MemoryRate",
    "Rate",
    "check_matches",
    "fit_link",
]

_NOISY = 0.1
_AGAIN = "measure again with: meshwright calibrate --out FILE"


@dataclass(frozen=True)
class Rate:
    """A measured rate, in FLOP/s or bytes a second.

    Attributes:
        value: of the median repeat.
        low: of the slowest.
        high: of the fastest.

    Raises:
        ConfigError: not finite and positive, or the value outside its spread.

    >>> Rate(100.0, 98.0, 104.0).noisy, Rate(100.0, 80.0, 104.0).noisy
    (False, True)
    """

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            _check_positive(name, getattr(self, name))
        if not self.low <= self.value <= self.high:
            raise ConfigError(
                f"cannot use the rate {self.value!r}",
                why=f"it is outside its own spread of {self.low!r} to {self.high!r}",
                fix=_AGAIN,
            )

    @property
    def noisy(self) -> bool:
        """Whether the spread is more than a tenth of the value."""
        return (self.high - self.low) > _NOISY * self.value


@dataclass(frozen=True)
class MatmulRate:
    """FLOP/s of a pair of matmuls, [m, k] @ [k, n] and [m, n] @ [n, k], as in a feed-forward.

    Attributes:
        dtype: of operands and result, ``bf16`` or ``f32``, at jax's default precision.
        m, k, n: sizes.
        rate: 4 m k n FLOPs over the seconds of the pair.
    """

    dtype: str
    m: int
    k: int
    n: int
    rate: Rate

    def __post_init__(self) -> None:
        for name in ("m", "k", "n"):
            _check_positive(name, getattr(self, name))


@dataclass(frozen=True)
class MemoryRate:
    """Bytes a second of ``x = x + 1`` over one buffer: what it reads and what it writes.

    Attributes:
        buffer_bytes: its size; one that fits a cache would measure the cache.
        rate: twice the buffer over the seconds of a pass.
    """

    buffer_bytes: int
    rate: Rate

    def __post_init__(self) -> None:
        _check_positive("buffer_bytes", self.buffer_bytes)


@dataclass(frozen=True)
class AttentionRate:
    """Useful FLOP/s of causal attention with the kernel the train step uses on this device.

    Useful FLOPs do not depend on the kernel: 2 B N T² H forward, the causal half of the two
    matmuls of 2 B N T² H each, and twice that backward. What a kernel recomputes or throws away
    makes its rate lower, so seconds are useful FLOPs over the rate, whatever the kernel does.

    Attributes:
        kernel: ``cudnn``, ``splash`` or ``matmul``.
        dtype: of queries, keys and values.
        batch, length, heads, head_dim: B, T, N and H; as many key heads as query heads.
        forward, backward: useful FLOP/s of each pass alone.
    """

    kernel: str
    dtype: str
    batch: int
    length: int
    heads: int
    head_dim: int
    forward: Rate
    backward: Rate

    def __post_init__(self) -> None:
        for name in ("batch", "length", "heads", "head_dim"):
            _check_positive(name, getattr(self, name))


@dataclass(frozen=True)
class LinkRate:
    """One kind of collective over all devices of the machine: latency and bandwidth.

    Attributes:
        kind: ``all-gather``, ``reduce-scatter`` or ``all-reduce``.
        devices: how many took part.
        bandwidth: wire bytes a second of one device, wire bytes as in
            `meshwright.sharding.planned.Collective`.
        latency_seconds: of an execution that moves nothing, by the line of `fit_link`.
        points: (wire bytes, median seconds) as measured, smallest first.
    """

    kind: str
    devices: int
    bandwidth: float
    latency_seconds: float
    points: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        _check_positive("devices", self.devices)
        _check_positive("bandwidth", self.bandwidth)
        if self.latency_seconds:  # one of 0 is what a fit finds where bandwidth explains all
            _check_positive("latency_seconds", self.latency_seconds)
        for size, seconds in self.points:
            _check_positive("points", size)
            _check_positive("points", seconds)


@dataclass(frozen=True)
class Calibration:
    """Everything that was measured on one machine, and where.

    Attributes:
        device_kind: as jax names the device.
        platform: ``tpu``, ``gpu`` or ``cpu``.
        device_count: devices of the machine that jax counts.
        jax: its version.
        date: when, in UTC.
        matmuls: at least one; of one dtype from small to large.
        memory: bandwidth of the device's memory.
        attention: None where it was not measured.
        links: empty on a single device and on simulated ones.
    """

    device_kind: str
    platform: str
    device_count: int
    jax: str
    date: str
    matmuls: tuple[MatmulRate, ...]
    memory: MemoryRate
    attention: AttentionRate | None = None
    links: tuple[LinkRate, ...] = ()

    def __post_init__(self) -> None:
        _check_positive("device_count", self.device_count)
        if not self.matmuls:
            raise ConfigError("cannot use a calibration without matmuls", fix=_AGAIN)

    @property
    def matmul_flops(self) -> dict[str, float]:
        """Best sustained FLOP/s by dtype."""
        best: dict[str, float] = {}
        for entry in self.matmuls:
            best[entry.dtype] = max(best.get(entry.dtype, 0.0), entry.rate.value)
        return best

    @property
    def memory_bandwidth(self) -> float:
        """Bytes read and written a second."""
        return self.memory.rate.value

    @property
    def attention_flops(self) -> dict[str, float]:
        """Useful FLOP/s, ``forward`` and ``backward``; empty where they were not measured."""
        if self.attention is None:
            return {}
        return {
            "forward": self.attention.forward.value,
            "backward": self.attention.backward.value,
        }

    @property
    def link_bandwidth(self) -> dict[str, float]:
        """Wire bytes a second by kind of collective; empty where there are no links."""
        return {link.kind: link.bandwidth for link in self.links}

    @property
    def noisy(self) -> tuple[str, ...]:
        """What was measured with a spread over a tenth, in words."""
        rates = [(f"{m.dtype} matmul of {m.m}x{m.k}x{m.n}", m.rate) for m in self.matmuls]
        rates.append(("memory", self.memory.rate))
        if self.attention is not None:
            rates.append(("attention forward", self.attention.forward))
            rates.append(("attention backward", self.attention.backward))
        return tuple(name for name, rate in rates if rate.noisy)

    def matmul_rate(self, dtype: str, m: int, k: int, n: int) -> float:
        """FLOP/s to expect of [m, k] @ [k, n], from the table's entries of that dtype.

        The rate is a power of the work between two neighbours in the table (a straight line of
        log FLOP/s over log FLOPs), stays at the largest entry's above it, and follows the line of
        the two smallest below it, falling at most as fast as the work: then every matmul takes
        the same time, which is what starting one costs. Operands much flatter than the table's
        are bound by memory, which is for the caller to add.

        Args:
            dtype: ``bf16`` or ``f32``.
            m, k, n: sizes.

        Raises:
            ConfigError: nothing of this dtype was measured.
        """
        points = sorted(
            (math.log(e.m * e.k * e.n), math.log(e.rate.value))
            for e in self.matmuls
            if e.dtype == dtype
        )
        if not points:
            raise ConfigError(
                f"cannot price a matmul of {dtype}",
                why=f"this calibration measured {', '.join(self.matmul_flops)}",
                fix=_AGAIN,
            )
        return math.exp(_on_line(points, math.log(m * k * n)))


def _on_line(points: Sequence[tuple[float, float]], x: float) -> float:
    if x >= points[-1][0] or len(points) == 1:
        return points[-1][1]
    if x < points[0][0]:
        slope = min(1.0, max(0.0, _slope(points[0], points[1])))
        return points[0][1] + slope * (x - points[0][0])
    after = next(index for index, point in enumerate(points) if point[0] > x)
    left, right = points[after - 1], points[after]
    return left[1] + _slope(left, right) * (x - left[0])


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    run = right[0] - left[0]
    return (right[1] - left[1]) / run if run else 0.0


def fit_link(kind: str, devices: int, points: Sequence[tuple[int, float]]) -> LinkRate:
    """Latency and bandwidth of a collective: the line seconds = latency + wire bytes / bandwidth.

    Least squares of relative errors, so that small sizes, which tell the latency, count as much as
    large ones. A line with a negative latency is fitted again through the origin.

    Args:
        kind: of collective.
        devices: that took part.
        points: (wire bytes, seconds), at least one.

    >>> link = fit_link("all-gather", 8, [(1000, 3e-6), (2000, 4e-6), (8000, 10e-6)])
    >>> f"{link.latency_seconds:.1e} s, {link.bandwidth:.1e} bytes a second"
    '2.0e-06 s, 1.0e+09 bytes a second'
    """
    points = tuple(sorted(points))
    # With errors relative to y, each point asks that latency / y + slope x / y be 1.
    pairs = [(1 / seconds, size / seconds) for size, seconds in points]
    aa, bb = (sum(pair[i] ** 2 for pair in pairs) for i in (0, 1))
    ab, a, b = sum(p * q for p, q in pairs), sum(p for p, _ in pairs), sum(q for _, q in pairs)
    determinant = aa * bb - ab * ab
    latency = slope = 0.0
    if determinant > 1e-9 * aa * bb:  # else all sizes are the same
        latency = (a * bb - b * ab) / determinant
        slope = (b * aa - a * ab) / determinant
    if latency <= 0 or slope <= 0:
        latency, slope = 0.0, b / bb
    return LinkRate(kind, devices, 1 / slope, latency, points)


def check_matches(calibration: Calibration, chip: Chip) -> None:
    """Refuse a calibration that was not measured on a plan's chip.

    Raises:
        ConfigError: it is of another chip, or of a device whose figures are not known.
    """
    found = chip_of_device_kind(calibration.device_kind)
    if found is not None and found.name == chip.name:
        return
    named = f"`{calibration.device_kind}`" + (f", a {found.name}" if found else "")
    raise ConfigError(
        f"cannot use a calibration of another device for `{chip.name}`",
        where=f"measured on {named} on {calibration.date}",
        why=f"to jax, `{chip.name}` is {' or '.join(chip.device_kinds)}; rates do not carry over",
        fix=f"plan for {found.name}, or run `meshwright calibrate` on a {chip.name}"
        if found
        else f"run `meshwright calibrate` on a {chip.name}, or plan with the data sheet's rates",
    )


def _words(value: Any) -> str:
    return json.dumps(value, default=str)[:60]


def _check_positive(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ConfigError(
            f"cannot use {_words(value)} for `{name}`",
            why="what is measured is a positive number",
            fix=_AGAIN,
        )
