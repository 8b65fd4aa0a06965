"""How the tokens of a row are dealt to the devices of a context axis, and what work that makes.

Under a causal mask a late token has more keys than an early one, so the deal decides who works:

==========  =========================================  ==========================================
layout      device p of c holds                        causal work of the busiest over the mean
==========  =========================================  ==========================================
contiguous  the p-th of c blocks                       (2c - 1) / c: the last device sees all keys
zigzag      the p-th and the p-th last of 2c blocks    1, exactly
striped     tokens p, p + c, p + 2c, …                 (T + c) / (T + 1) in rows of T tokens
==========  =========================================  ==========================================

A ring moves in lockstep: in every step each device has the keys of one other, and all wait for
the slowest. So the work is balanced *per step*: the chunk pairs listed here are as many on every
device, and what no query needs is not in the list. Off the diagonal of the ring, zigzag computes
two of the four pairs of half blocks, without a masked score; striped computes a triangle in
every step, whose diagonal chunks are half masked. Contiguous has nothing to leave out: in each
step some device needs all pairs, so those that need none wait (or compute what is masked, the
same to the clock), and causality saves only the first step. It is here for masks that are not
causal and for models whose other layers need neighbouring tokens together.

Striped and zigzag: Brandon et al., "Striped attention: faster ring attention for causal
transformers", 2023, and its zigzag variant (two mirrored blocks a device), which keeps blocks
long enough for kernels. Rejected: lists made at run time from token indices. They would differ in
length among devices, and a loop must be as long on all of them.

Arithmetic only: no mesh and no jax. Lengths are in tokens of a whole row unless a name says local.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from meshwright.sharding.errors import PlacementError

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "ContextKind",
    "RingPairs",
    "TokenLayout",
    "causal_pairs",
    "check_heads",
    "check_length",
    "chunk_length",
    "executed_pairs",
    "gathered_pairs",
    "place_in_row",
    "ring_pairs",
    "token_order",
]

TokenLayout = Literal["contiguous", "zigzag", "striped"]

_STRETCH = 8
"""A divisor this much smaller than asked for is not worth having: see `chunk_length`."""


ContextKind = Literal["ring", "gather", "ulysses"]
"""How attention crosses the axis that splits the length of rows."""


@dataclass(frozen=True)
class RingPairs:
    """The (query chunk, key chunk) pairs of a device's steps, each int32 [pairs, 2].

    Which list a step takes depends on who owns the keys that are there: the device itself, one
    earlier on the axis, or one later. The last two are equally long, so that every step takes
    the same time on every device.

    Attributes:
        own: the first step, on the device's own keys.
        earlier: keys of a device before this one.
        later: keys of a device after this one.
    """

    own: np.ndarray
    earlier: np.ndarray
    later: np.ndarray


def check_length(layout: TokenLayout, length: int, parts: int) -> None:
    """Check that rows of ``length`` tokens can be dealt to ``parts`` devices.

    Raises:
        PlacementError: with the nearest lengths that work.

    >>> check_length("zigzag", 24, 4)
    """
    assert layout in get_args(TokenLayout), layout
    blocks = _blocks(layout, parts)
    if length > 0 and length % blocks == 0:
        return
    below = length // blocks * blocks
    choices = " or ".join(str(size) for size in (below, below + blocks) if size > 0)
    held = "" if blocks == parts else f" ({blocks // parts} blocks a device)"
    other = length > 0 and length % parts == 0
    raise PlacementError(
        f"cannot deal rows of {length} tokens to {parts} devices, {layout}",
        where=f"length {length}, context={parts}, layout {layout}",
        why=f"{length} is not divisible by {blocks}{held}" if length > 0 else "a row has no tokens",
        fix=f"use rows of {choices} tokens{', or the layout striped' if other else ''}",
    )


def check_heads(kind: ContextKind, heads: int, kv_heads: int, parts: int) -> None:
    """Check that attention with these heads can be split over ``parts`` devices.

    `ring` and `gather` serve any number: they split tokens only. `ulysses` gives every device
    ``heads / parts`` query heads and the key heads those use, a key head to several devices where
    there are fewer than devices.

    Args:
        kind: the algorithm.
        heads: query heads of one device, as split over other axes (tensor).
        kv_heads: key heads of one device, likewise.
        parts: devices of the context axis.

    Raises:
        PlacementError: with the sizes of the axis that work.

    >>> check_heads("ulysses", 32, 8, 16)
    """
    if heads % kv_heads:
        raise PlacementError(
            f"cannot share {kv_heads} key heads among {heads} query heads",
            where=f"context={parts}, {heads} query heads and {kv_heads} key heads on a device",
            why=f"{heads} is not divisible by {kv_heads}",
            fix=f"use key heads that divide {heads}",
        )
    if kind != "ulysses" or _serves(heads, kv_heads, parts):
        return
    fit = [str(size) for size in range(1, heads + 1) if _serves(heads, kv_heads, size)]
    if heads % parts:
        why = f"{heads} query heads are not divisible by {parts}"
    else:
        why = f"neither of {kv_heads} key heads and {parts} devices divides the other"
    raise PlacementError(
        f"cannot exchange {heads} query heads and {kv_heads} key heads over {parts} devices",
        where=f"context={parts}, {heads} query heads and {kv_heads} key heads on a device",
        why=why,
        fix=f"use context of {', '.join(fit)}, or --context.kind ring or gather",
    )


def _serves(heads: int, kv_heads: int, parts: int) -> bool:
    return heads % parts == 0 and (kv_heads % parts == 0 or parts % kv_heads == 0)


def token_order(layout: TokenLayout, length: int, parts: int) -> np.ndarray:
    """Where in the row each dealt token is, device after device.

    Args:
        layout: the deal.
        length: of a row.
        parts: devices of the axis.

    Returns:
        int32 [length]: entry p · (length / parts) + t is the place in the row of token t on
        device p. ``row[order]`` deals a row; ``order.argsort()`` undoes it.

    Raises:
        PlacementError: as `check_length`.

    >>> token_order("zigzag", 8, 2).tolist()
    [0, 1, 6, 7, 2, 3, 4, 5]
    >>> token_order("striped", 8, 2).tolist()
    [0, 2, 4, 6, 1, 3, 5, 7]
    """
    import numpy as np

    check_length(layout, length, parts)
    dealt = np.arange(length, dtype=np.int32)
    local = length // parts
    return place_in_row(layout, length, parts, dealt // local, dealt % local)


def place_in_row(layout: TokenLayout, length: int, parts: int, device: Any, at: Any) -> Any:
    """The place in the row of token ``at`` on ``device``: `token_order` as arithmetic.

    Args:
        layout: the deal.
        length: of a row.
        parts: devices of the axis.
        device, at: integers or integer arrays, of numpy or jax, traced or not.

    >>> place_in_row("zigzag", 8, 2, device=0, at=2)
    6
    """
    local = length // parts
    if layout == "striped":
        return device + at * parts
    if layout == "contiguous":
        return device * local + at
    half = local // 2
    high = at // half  # 0 in the first block of the device, 1 in the second
    block = device + high * (2 * parts - 1 - 2 * device)
    return block * half + at % half


def chunk_length(layout: TokenLayout, length: int, parts: int, limit: int) -> int:
    """Tokens of the chunks that a device's block (zigzag: half block) is cut into.

    The largest divisor of the block up to ``limit``. A block with hardly any divisors would be
    cut into splinters that no hardware multiplies well; where the divisor is less than an eighth
    of the limit and there is one above of up to twice the limit, that one is taken.

    >>> chunk_length("striped", 8192, 4, 512), chunk_length("striped", 4 * 600, 4, 512)
    (512, 300)
    >>> chunk_length("striped", 4 * 521, 4, 512)
    521
    """
    block = length // _blocks(layout, parts)
    divisors = _divisors(block)
    below = max(size for size in divisors if size <= max(limit, 1))
    above = min((size for size in divisors if size > limit), default=below)
    return above if below * _STRETCH < limit and above <= 2 * limit else below


def ring_pairs(
    layout: TokenLayout, length: int, parts: int, chunk: int, *, causal: bool
) -> RingPairs:
    """The chunk pairs of every step of a ring: see `RingPairs`.

    Args:
        layout: the deal.
        length: of a row.
        parts: devices of the ring.
        chunk: tokens of a chunk, a divisor of a device's block (`chunk_length`).
        causal: leave out pairs in which no query may attend to any key.

    >>> ring_pairs("zigzag", 16, 2, 2, causal=True).earlier.tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1], [3, 0], [3, 1]]
    >>> len(ring_pairs("zigzag", 16, 2, 2, causal=False).earlier)
    16
    """
    import numpy as np

    count = length // parts // chunk
    half = count // 2
    queries, keys = np.divmod(np.arange(count * count, dtype=np.int32), count)

    def those(chosen: Any) -> np.ndarray:
        return np.stack([queries[chosen], keys[chosen]], axis=1)

    everywhere, triangle = queries >= 0, queries >= keys
    if not causal:
        return RingPairs(*[those(everywhere)] * 3)
    if layout == "striped":
        return RingPairs(*[those(triangle)] * 3)
    if layout == "contiguous":
        return RingPairs(those(triangle), those(everywhere), those(everywhere))
    # A device's low half comes before, and its high half after, all halves of later devices.
    return RingPairs(those(triangle), those(keys < half), those(queries >= half))


def gathered_pairs(
    layout: TokenLayout, length: int, parts: int, chunk: int, *, causal: bool
) -> np.ndarray:
    """The chunk pairs of each device when the keys of all devices are gathered in their order.

    Args:
        layout, length, parts, chunk, causal: as `ring_pairs`.

    Returns:
        int32 [parts, pairs, 2], query chunk by query chunk; key chunks are counted through the
        gathered keys.

    >>> gathered_pairs("zigzag", 8, 2, 2, causal=True).tolist()[0]
    [[0, 0], [1, 0], [1, 1], [1, 2], [1, 3]]
    """
    import numpy as np

    pairs = ring_pairs(layout, length, parts, chunk, causal=causal)
    count = length // parts // chunk
    found = []
    for device in range(parts):
        lists = [pairs.earlier] * device + [pairs.own] + [pairs.later] * (parts - 1 - device)
        shifted = [
            pair + np.array([0, owner * count], np.int32) for owner, pair in enumerate(lists)
        ]
        mine = np.concatenate(shifted)
        found.append(mine[np.lexsort((mine[:, 1], mine[:, 0]))])
    return np.stack(found)


def causal_pairs(layout: TokenLayout, length: int, parts: int) -> list[int]:
    """The (query, key) pairs that each device needs: token t attends to the t + 1 up to itself.

    They sum to length · (length + 1) / 2.

    Raises:
        PlacementError: as `check_length`.

    >>> causal_pairs("zigzag", 16, 4), causal_pairs("contiguous", 16, 4)
    ([34, 34, 34, 34], [10, 26, 42, 58])
    """
    import numpy as np

    keys = token_order(layout, length, parts).astype(np.int64) + 1
    return keys.reshape(parts, -1).sum(axis=1).tolist()


def executed_pairs(
    layout: TokenLayout, length: int, parts: int, chunk: int, *, causal: bool = True
) -> list[int]:
    """The (query, key) pairs that every device computes in each step of a ring.

    Args:
        layout, length, parts, chunk, causal: as `ring_pairs`.

    Returns:
        One number a step, the same on all devices: the step of its own keys first. Attention
        over gathered keys computes their sum.

    Raises:
        PlacementError: as `check_length`.

    >>> executed_pairs("zigzag", 64, 4, 2), executed_pairs("contiguous", 64, 4, 2)
    ([144, 128, 128, 128], [144, 256, 256, 256])
    """
    check_length(layout, length, parts)
    pairs = ring_pairs(layout, length, parts, chunk, causal=causal)
    assert len(pairs.earlier) == len(pairs.later), "the devices of a step must work alike"
    return [len(pairs.own) * chunk**2] + [len(pairs.later) * chunk**2] * (parts - 1)


def _blocks(layout: TokenLayout, parts: int) -> int:
    """Pieces of neighbouring length that a row must be cut into evenly."""
    return 2 * parts if layout == "zigzag" else parts


def _divisors(number: int) -> list[int]:
    low = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return low + [number // size for size in low]
