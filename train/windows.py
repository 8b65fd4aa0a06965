"""Fixed windows over one long line of tokens: the examples that training and evaluation read.

Documents stand one after another, each closed by its end token, and window ``i`` is the
``seq_len + 1`` tokens from ``i * seq_len``: its last token is the next window's first, so every
token but the very first is a target exactly once. Nothing is copied until a window is asked for,
and any window can be asked for at any time, which is what makes the order a matter of arithmetic.

Packing documents by length would waste less of a row when they are masked from each other, but
the position of a row would then depend on all rows before it.

When documents are masked, a window also says which document each token belongs to, counted from
1 within the window (0 is padding), positions start again at each document, and the one target
that would cross from a document into the next has weight 0.
"""

from __future__ import annotations

from typing import final

import numpy as np

__all__ = ["Windows"]


@final
class Windows:
    """Random access to windows of ``tokens``; a data source for grain.

    >>> tokens, ends = np.array([5, 6, 0, 7, 8, 9, 0]), np.array([3, 7])
    >>> window = Windows(tokens, ends, seq_len=4, mask_documents=True)[0]
    >>> window["tokens"].tolist(), window["targets"].tolist()
    ([5, 6, 0, 7], [6, 0, 7, 8])
    >>> window["weights"].tolist()
    [1.0, 1.0, 0.0, 1.0]
    >>> window["segments"].tolist(), window["positions"].tolist()
    ([1, 1, 1, 2], [0, 1, 2, 0])

    Attributes:
        tokens: unsigned integers, shape (n,); may be a memory map.
        ends: int64, shape (documents,): where each document ends, its end token included; rising,
            the last is n.
        seq_len: length of a window's arrays.
        mask_documents: give `segments` and `positions` too, and weigh crossings 0.
        pad_last: keep the last window where it is short, padded with weight 0; else drop it.
        fingerprint: names the tokens, so that a data position is only used with the same ones.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        ends: np.ndarray,
        seq_len: int,
        *,
        mask_documents: bool = False,
        pad_last: bool = False,
        fingerprint: str = "",
    ) -> None:
        self.tokens = tokens
        self.ends = ends
        self.seq_len = seq_len
        self.mask_documents = mask_documents
        self.pad_last = pad_last
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        targets = max(len(self.tokens) - 1, 0)
        return -(-targets // self.seq_len) if self.pad_last else targets // self.seq_len

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Window ``index`` as arrays of shape (seq_len,).

        Returns:
            `tokens` and `targets` int32, `weights` float32; with masked documents `segments` and
            `positions` int32.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.seq_len
        window = np.asarray(self.tokens[start : start + self.seq_len + 1], np.int32)
        size = len(window) - 1
        item = {
            "tokens": window[:-1],
            "targets": window[1:],
            "weights": np.ones(size, np.float32),
        }
        if self.mask_documents:
            self._mask(start, size, item)
        if size < self.seq_len:
            # Zeros are right for every field: weight 0, and segment 0 is nobody's document.
            short = self.seq_len - size
            item = {name: np.pad(values, (0, short)) for name, values in item.items()}
        return item

    def _mask(self, start: int, size: int, item: dict[str, np.ndarray]) -> None:
        first, last = np.searchsorted(self.ends, (start, start + size), side="right")
        # Where documents begin after the window's own start; each is also where the one before
        # it ended, so the target just before a beginning crosses.
        begins = np.asarray(self.ends[first:last]) - start
        crossing = np.zeros(size + 1, np.int32)
        crossing[begins] = 1
        item["weights"][crossing[1:] == 1] = 0.0
        item["segments"] = 1 + np.cumsum(crossing[:-1], dtype=np.int32)
        starts = np.concatenate(([0], begins)).astype(np.int32)
        item["positions"] = np.arange(size, dtype=np.int32) - starts[item["segments"] - 1]
