"""Experts dealt to devices: which numbers of them divide, and how tokens travel to them.

Arithmetic alone, for whoever plans; `meshwright.train.expert_exchange` does the travelling.
"""

from __future__ import annotations

import math
from typing import Literal

from meshwright.sharding.errors import PlacementError

__all__ = ["DroplessWay", "check_experts", "dropless_way", "places_of_part"]

DroplessWay = Literal["gather", "ragged"]
"""How tokens travel where none may be dropped."""


def check_experts(count: int, parts: int) -> None:
    """Check that experts can be dealt to devices.

    Args:
        count: experts of a layer.
        parts: devices of the expert axis.

    Raises:
        PlacementError: with the sizes of the axis, and the numbers of experts, that work.

    >>> check_experts(8, 4)
    """
    if count % parts == 0:
        return
    fit = [str(size) for size in range(1, count + 1) if count % size == 0]
    near = sorted({max(count // parts, 1) * parts, -(-count // parts) * parts})
    raise PlacementError(
        f"cannot deal {count} experts to {parts} devices",
        where=f"expert={parts}, {count} experts in a layer",
        why=f"{count} is not divisible by {parts}",
        fix=f"use expert of {', '.join(fit)}, or {' or '.join(map(str, near))} experts",
    )


def dropless_way(count: int, choices: int, parts: int) -> DroplessWay:
    """Which of the exact forms to take, by what they send when the router is even.

    Ragged never sends more tokens than an all-gather, but in as many messages as there are devices,
    with no sums on the way home. It must save a quarter.

    Args:
        count: E.
        choices: k.
        parts: e.

    >>> dropless_way(8, 2, 8), dropless_way(8, 2, 2), dropless_way(64, 8, 8)
    ('ragged', 'gather', 'ragged')
    """
    stays_away = math.comb(count - count // parts, choices) / math.comb(count, choices)
    return "ragged" if stays_away > 0.25 else "gather"


def places_of_part(capacity: int, parts: int) -> int:
    """Places of an expert's buffer on each device of an axis that splits the length of rows.

    Args:
        capacity: places for a whole row.
        parts: devices of the axis.

    >>> places_of_part(10, 4)
    3
    """
    return -(-capacity // parts)
