"""Quantities as people write and read them: bytes, seconds and large counts.

Formatting and parsing only, with nothing heavy imported, so that a plan kept from yesterday
prints as fast as a file is read. Bytes are written with binary units (1 KiB = 1024 bytes),
FLOPs and rates with decimal ones, as data sheets give them. Everything written here is ASCII.
"""

from __future__ import annotations

import re

__all__ = [
    "BYTE_UNITS",
    "SECOND_UNITS",
    "format_bytes",
    "format_count",
    "format_seconds",
    "parse_quantity",
]

BYTE_UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGTP", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGTP", 1)},
}
"""Bytes in each unit of size: decimal KB to PB, binary KiB to PiB."""

SECOND_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
"""Seconds in each unit of time."""

_QUANTITY = re.compile(
    r"(\d[\d_]*(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?)\s*([A-Za-z%]*)"
)


def format_bytes(count: float) -> str:
    """Write a number of bytes with a binary unit.

    >>> format_bytes(0), format_bytes(1536), format_bytes(80 * 2**30)
    ('0 B', '1.5 KiB', '80.0 GiB')
    """
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while round(size, 1) >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def format_seconds(seconds: float) -> str:
    """Write a time with three significant digits, in a unit that keeps it above one.

    >>> format_seconds(0), format_seconds(1.8437), format_seconds(0.0312), format_seconds(4.5e-6)
    ('0 s', '1.84 s', '31.2 ms', '4.50 us')
    """
    if seconds == 0:
        return "0 s"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale * 0.9995 or unit == "us":
            return f"{_significant(seconds / scale)} {unit}"
    raise AssertionError("the last unit takes what is left")


def format_count(count: float) -> str:
    """Write a large number with a decimal prefix and three significant digits.

    >>> format_count(3.021e15), format_count(64), format_count(459e12), format_count(12_800)
    ('3.02 P', '64', '459 T', '12.8 k')
    """
    for prefix, scale in (
        ("E", 1e18),
        ("P", 1e15),
        ("T", 1e12),
        ("G", 1e9),
        ("M", 1e6),
        ("k", 1e3),
    ):
        if count >= scale * 0.9995:
            return f"{_trimmed(_significant(count / scale))} {prefix}"
    return _trimmed(_significant(count))


def parse_quantity(text: str) -> tuple[float, str] | None:
    """Split a number from the unit behind it; None where the text is no such thing.

    The unit is returned as it is written and may be empty: what it is worth depends on what is
    measured.

    >>> [parse_quantity(text) for text in ("14GiB", "2.5 s", "1e-3", "x")]
    [(14.0, 'GiB'), (2.5, 's'), (0.001, ''), None]
    """
    found = _QUANTITY.fullmatch(text.strip())
    if not found:
        return None
    try:
        return float(found[1].replace("_", "")), found[2]
    except ValueError:
        return None


def _significant(value: float) -> str:
    """At least three significant digits.

    >>> _significant(1.0), _significant(31.24), _significant(1234.5)
    ('1.00', '31.2', '1234')
    """
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def _trimmed(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text
