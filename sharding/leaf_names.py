"""Which leaf an array of a compiled program is, as far as its shape tells.

Compilers keep the sizes of an array and neither their order nor its name: they transpose, drop dims
of 1, and lose scopes when they combine. So leaves are looked up by their sizes, in any order. A
shape that several leaves share names two of them and how many more there are: naming all fills the
table, naming one would be a guess.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["either", "sizes_of"]

_NAMED = 2


def sizes_of(shape: Sequence[int]) -> tuple[int, ...]:
    """The sizes of a shape in ascending order, ones left out: what compilers keep of it.

    >>> sizes_of((64, 1, 8)) == sizes_of((8, 64)) == (8, 64)
    True
    """
    return tuple(sorted(size for size in shape if size != 1))


def either(paths: Sequence[str]) -> str:
    """The leaves that an array may be, in words; empty for none.

    >>> either(["w"]), either(["up", "down"]), either(["q", "k", "v", "o"])
    ('w', 'up or down', 'q or k and 2 more')
    """
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return " or ".join(paths[:_NAMED]) + more
