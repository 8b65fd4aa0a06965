"""Measure what this machine's device reaches, and keep it for `meshwright plan`.

``meshwright calibrate`` times four things on one device: matmuls of a feed-forward in bfloat16
and float32, from small to as large as time and memory allow; one buffer read and written; causal
attention, forward and backward, with the kernel that training uses here; and, where there are
several real devices, the collectives between them (`meshwright.train.calibrate_links`).

The method, in `meshwright.train.stopwatch`: the work is chained inside one compiled loop, each
trip reading what the one before wrote, so that XLA can neither drop nor hoist any of it; a call
lasts a hundred times what dispatching one costs; the rate is that of the median call. Sizes grow
until the next would not fit what is left of ``seconds``, compilation included, so that the same
command serves two CPU cores and a data centre's accelerator.

Simulated CPU devices share one memory, so what they send each other says nothing, and one of
them is measured without links. Rejected: timing the train step and solving for the rates, which
yields one number for a mixture that no other model has.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from meshwright.models.hooks import cudnn_serves
from meshwright.sharding.calibration import (
    AttentionRate,
    Calibration,
    LinkRate,
    MatmulRate,
    MemoryRate,
    Rate,
)
from meshwright.sharding.calibration_file import (
    calibration_json,
    check_replaceable,
    save_calibration,
)
from meshwright.sharding.errors import ConfigError, RunError
from meshwright.sharding.rules import Rules
from meshwright.sharding.units import format_bytes, format_count, format_seconds
from meshwright.train.attention import attention_of
from meshwright.train.calibrate_links import measure_links
from meshwright.train.stopwatch import Stopwatch, chained, rate_of

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["SECONDS", "calibrate", "calibration_table", "measure"]

SECONDS = 40.0
"""How long a calibration takes unless told otherwise; starting jax comes on top."""

_DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}
_WIDTHS = (256, 512, 1024, 2048, 4096, 8192)  # of the model whose feed-forward is measured
_RESCALE = 16  # pairs of matmuls before their product is brought back to size
# Seconds are shared out in this proportion; what a part leaves goes to those after it.
_SHARES = {"f32": 0.3, "bf16": 0.4, "memory": 0.3, "attention": 0.5, "links": 1.0}
_GUESSED_FLOPS = {"cpu": 5e9}  # to begin with; measured rates take over at once
_LARGEST_BUFFER = {"cpu": 1 << 29}
_BUFFER = 1 << 30  # many times the caches of any accelerator
_LEAST_BANDWIDTH = 1e9  # of memory, to choose a buffer that a short calibration can afford


def calibrate(out: str = "calibration.json", seconds: float = SECONDS) -> int:
    """Measure this machine's device, print the rates to stdout and write them to ``out``.

    Progress goes to stderr. Should writing fail in the end, the document is printed, so that
    the measurement is not lost.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: ``seconds`` is not a positive number.
        RunError: ``out`` is another kind of file, or cannot be written.
    """
    from rich.console import Console

    check_replaceable(out)
    calibration = measure(seconds, say=_say)
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(calibration_table(calibration))
    try:
        save_calibration(calibration, out)
    except RunError:
        sys.stdout.write(json.dumps(calibration_json(calibration)) + "\n")
        raise
    if calibration.noisy:
        noisy = ", ".join(calibration.noisy)
        _say(f"note: repeats differ by over 10%, was the machine busy? {noisy}")
    console.print(f"wrote {out}", highlight=False, markup=False, soft_wrap=True)
    return 0


def measure(
    seconds: float = SECONDS, say: Callable[[str], None] = lambda text: None
) -> Calibration:
    """Measure the devices of this process.

    Args:
        seconds: for everything together, compilation included; each part does its smallest size
            even if there is no time left, so a second is about the least it takes.
        say: gets a line about each thing measured.

    Raises:
        ConfigError: ``seconds`` is not a positive number.
    """
    if not 0 < seconds < math.inf:
        raise ConfigError(
            f"cannot calibrate for {seconds} seconds",
            why="it is the time to spend, and must be more than 0",
            fix=f"use --seconds {SECONDS:g}",
        )
    devices = jax.local_devices()
    device = devices[0]
    linked = len(devices) > 1 and device.platform != "cpu"
    end = time.perf_counter() + seconds
    watch = Stopwatch(device)
    matmuls: list[MatmulRate] = []

    def until(part: str) -> float:
        now = time.perf_counter()
        return now + max(0.0, end - now) * _SHARES[part]

    with jax.default_device(device):
        for dtype in ("f32", "bf16"):
            matmuls += _matmuls(watch, dtype, until(dtype), say)
        memory = _memory(watch, until("memory"), say)
        attention = _attention(watch, until("attention") if linked else end, say)
    links: tuple[LinkRate, ...] = ()
    if linked:
        links = measure_links(devices, until("links") - time.perf_counter(), say)
    return Calibration(
        device_kind=device.device_kind,
        platform=device.platform,
        device_count=len(devices),
        jax=jax.__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        matmuls=tuple(matmuls),
        memory=memory,
        attention=attention,
        links=links,
    )


def _matmuls(
    watch: Stopwatch, dtype: str, until: float, say: Callable[[str], None]
) -> list[MatmulRate]:
    """Rates of one dtype, width after width while time and memory last."""
    found: list[MatmulRate] = []
    rate = _GUESSED_FLOPS.get(watch.device.platform, 1e12)
    for index, width in enumerate(_WIDTHS):
        m, k, n = 2 * width, width, 4 * width
        work = 4 * m * k * n
        left = until - time.perf_counter()
        held = (3 * m * k + m * n + 2 * k * n) * jnp.dtype(_DTYPES[dtype]).itemsize
        # The first size is always measured; another must have room for a warm-up and repeats.
        if found and (watch.least_seconds(work / rate) > left or not watch.holds(held)):
            break
        operands = [
            _random(seed, shape, dtype, scale)
            for seed, shape, scale in ((0, (m, k), 1.0), (1, (k, n), k**-0.5), (2, (n, k), n**-0.5))
        ]
        budget = left / (len(_WIDTHS) - index)
        seconds = watch.trips(chained(_pairs), operands, work / rate, budget)
        measured = rate_of(work, seconds)
        rate = measured.value
        found.append(MatmulRate(dtype, m, k, n, measured))
        say(f"{dtype} matmul {m}x{k}x{n}: {format_count(rate)}FLOP/s")
    return found


def _pairs(trips: int, x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """``trips`` times x @ up @ down, brought back to size before it over- or underflows.

    With random weights of variance 1/rows a pair keeps the size of x within some percent;
    they are not zeros because chips draw less power, and so run faster, on those.
    """

    def pair(_: Any, x: jax.Array) -> jax.Array:
        return (x @ up) @ down

    def rescaled(_: Any, x: jax.Array) -> jax.Array:
        return _to_size(lax.fori_loop(0, _RESCALE, pair, x))

    x = lax.fori_loop(0, trips // _RESCALE, rescaled, x)
    return _to_size(lax.fori_loop(0, trips % _RESCALE, pair, x))


def _to_size(x: jax.Array) -> jax.Array:
    return x / jnp.max(jnp.abs(x))


def _memory(watch: Stopwatch, until: float, say: Callable[[str], None]) -> MemoryRate:
    seconds = until - time.perf_counter()
    most = _LARGEST_BUFFER.get(watch.device.platform, _BUFFER)
    size = max(1 << 20, min(most, int(seconds * _LEAST_BANDWIDTH / 8)))
    while not watch.holds(4 * size) and size > 1 << 20:
        size //= 2
    buffer = jnp.zeros((size // 4,), jnp.float32)
    one = jnp.ones((), jnp.float32)  # an argument: the compiler must not know it
    size = buffer.nbytes
    timed = watch.trips(chained(_passes), [buffer, one], size / _LEAST_BANDWIDTH, seconds)
    rate = rate_of(2 * size, timed)
    say(f"memory, {format_bytes(size)}: {format_count(rate.value)}B/s")
    return MemoryRate(size, rate)


def _passes(trips: int, x: jax.Array, one: jax.Array) -> jax.Array:
    return lax.fori_loop(0, trips, lambda _, x: x + one, x)


def _attention(watch: Stopwatch, until: float, say: Callable[[str], None]) -> AttentionRate:
    """Both passes of the kernel that `attention_of` takes on a mesh of this device alone."""
    device = watch.device
    simulated = device.platform == "cpu"
    batch, length, heads, head_dim = (1, 512, 4, 64) if simulated else (2, 4096, 16, 128)
    dtype = "f32" if simulated else "bf16"
    shape = (batch, length, heads, head_dim)
    q, k, v, g = (_random(seed, shape, dtype, 1.0) for seed in range(4))
    kernel = "splash" if device.platform == "tpu" else "matmul"
    if device.platform == "gpu" and cudnn_serves(q, device):
        kernel = "cudnn"
    mesh = Mesh(np.asarray([device]), ("data",))
    attend = functools.partial(attention_of(mesh, Rules()), causal=True, scale=head_dim**-0.5)
    work = 2 * batch * heads * length**2 * head_dim
    guess = work / (_GUESSED_FLOPS["cpu"] if simulated else 1e13)
    budget = (until - time.perf_counter()) / 2
    program = chained(functools.partial(_forward, attend))
    ahead = rate_of(work, watch.trips(program, [q, k, v], guess, budget))
    # What the forward pass keeps goes in as arguments, so that the loop holds the other alone.
    pull = jax.jit(lambda *operands: jax.vjp(attend, *operands)[1])(q, k, v)
    back = rate_of(2 * work, watch.trips(chained(_backward), [g, pull], 3 * guess, budget))
    for name, rate in (("forward", ahead), ("backward", back)):
        say(f"attention {name}, {kernel}: {format_count(rate.value)}FLOP/s")
    return AttentionRate(kernel, dtype, batch, length, heads, head_dim, ahead, back)


def _forward(
    attend: Callable[..., jax.Array], trips: int, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    return lax.fori_loop(0, trips, lambda _, q: _to_size(attend(q, k, v)), q)


def _backward(trips: int, g: jax.Array, pull: Callable[..., Any]) -> jax.Array:
    return lax.fori_loop(0, trips, lambda _, g: _to_size(sum(pull(g), jnp.zeros_like(g))), g)


def _random(seed: int, shape: tuple[int, ...], dtype: str, scale: float) -> jax.Array:
    """Uniform numbers of variance ``scale``² from a hash of their index (MurmurHash3's finalizer).

    jax's own generator takes seconds to compile for a large array, and nobody needs its quality.
    """

    def make(seed: jax.Array) -> jax.Array:
        bits = lax.iota(jnp.uint32, math.prod(shape)) * np.uint32(0x9E3779B9) + seed
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
        bits = bits ^ (bits >> np.uint32(16))
        unit = bits.astype(jnp.float32) * np.float32(2.0**-31) - 1
        return (unit * np.float32(3**0.5 * scale)).astype(_DTYPES[dtype]).reshape(shape)

    return jax.jit(make)(np.uint32(seed * 0x1000193))


def calibration_table(calibration: Calibration) -> Table:
    """The rates as a table for rich: what, its size, the rate and its spread."""
    from rich.table import Table
    from rich.text import Text

    count, kind = calibration.device_count, calibration.device_kind
    title = Text(f"{kind}, {count} device(s), jax {calibration.jax}")  # brackets are no markup
    table = Table(title=title, title_justify="left")
    for name in ("measured", "size"):
        table.add_column(name)
    for name in ("rate", "spread"):
        table.add_column(name, justify="right")

    def row(what: str, size: str, rate: Rate, unit: str) -> None:
        spread = f"{(rate.high - rate.low) / rate.value:.0%}" + (" noisy" if rate.noisy else "")
        table.add_row(Text(what), Text(size), format_count(rate.value) + unit, spread)

    for entry in calibration.matmuls:
        row(f"matmul, {entry.dtype}", f"{entry.m}x{entry.k}x{entry.n}", entry.rate, "FLOP/s")
    row("memory", format_bytes(calibration.memory.buffer_bytes), calibration.memory.rate, "B/s")
    if calibration.attention:
        entry = calibration.attention
        shape = f"{entry.batch}x{entry.length}x{entry.heads}x{entry.head_dim} {entry.dtype}"
        row(f"attention, {entry.kernel}, forward", shape, entry.forward, "FLOP/s")
        row(f"attention, {entry.kernel}, backward", shape, entry.backward, "FLOP/s")
    for link in calibration.links:
        wait = f"+ {format_seconds(link.latency_seconds)}"
        rate = f"{format_count(link.bandwidth)}B/s"
        table.add_row(Text(link.kind), f"{link.devices} devices", rate, wait)
    if not calibration.links and count > 1:
        table.add_row("links", f"{count} devices", "not measured", "share one memory")
    return table


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
