"""Batches in an order that only the seed decides, from any position, on any number of processes.

Row ``r`` of the run is a function of the seed and ``r``: its epoch, and the place of ``r`` in
that epoch's permutation. Batch ``b`` is rows ``b * batch_size`` to ``(b + 1) * batch_size``, and
process ``p`` of ``n`` reads the ``p``-th of ``n`` equal blocks of it. So the global batches are
the same, row for row, on any mesh, and the whole position is one number, which may be restored
with other processes and even another batch size. A batch may span two epochs; no row is lost.

A thread reads ahead into a bounded queue. The position that `Batches.state` returns travels with
the batch through that queue, so it is always that of the last batch handed out. grain is imported
in that thread: where training starts it early, the import costs the launch nothing.

Sharding a shuffled dataset by slices and saving each process's place, the usual way, loses rows
without a word when the number of processes changes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from meshwright.sharding.errors import ConfigError, DataError, MissingExtraError
from meshwright.train.windows import Windows

__all__ = ["Batch", "Batches", "heldout_batches"]

Batch = dict[str, np.ndarray]
"""Arrays of shape (rows of this process, seq_len), by field."""

_AHEAD = 4
# Rows in a run without a last epoch; more than any run reads, and slices of it still fit in int64.
_ENDLESS = 1 << 60


@final
class Batches(Iterator[Batch]):
    """An iterator of training batches that reads ahead and can be saved and restored.

    Use it as a context manager, or call `close`. All processes of a run must advance together;
    each then has the same state.

    Args:
        source: the windows to read.
        batch_size: rows of the global batch, over all processes.
        seed: decides the order, with the source.
        process_index: which block of each global batch to read. Processes that hold copies of
            the same rows pass the same number.
        process_count: number of such blocks.
        microbatches: parts that the batch is cut into, each of which is dealt to the processes; a
            process's rows come part by part.
        shuffle: a new permutation each epoch; False reads the source in its order.
        epochs: times to go through the source, a last batch that is not full left out; None goes
            on for ever.

    Raises:
        ConfigError: the batch does not divide into the processes' blocks.
        DataError: the source has no windows.
        MissingExtraError: grain is not installed.
    """

    def __init__(
        self,
        source: Windows,
        batch_size: int,
        *,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        microbatches: int = 1,
        shuffle: bool = True,
        epochs: int | None = None,
    ) -> None:
        _check_blocks(batch_size, process_index, process_count, microbatches)
        if not len(source):
            raise DataError(
                "there is no whole window of text to train on",
                why=f"{len(source.tokens):,} tokens, a window needs {source.seq_len + 1:,}",
            )
        if importlib.util.find_spec("grain") is None:
            raise MissingExtraError(
                "cannot read training batches: the `grain` package is not installed",
                fix="pip install 'meshwright[train]'",
            )
        self._source = source
        self._batch_size = batch_size
        self._block = (process_index, process_count)
        self._microbatches = microbatches
        self._seed = seed
        self._shuffle = shuffle
        self._rows = _ENDLESS if epochs is None else epochs * len(source)
        self._next_row = 0
        self._reader: _ReadAhead | None = None
        self._stop_reader: weakref.finalize | None = None

    def start(self) -> None:
        """Begin to read ahead, if that has not begun; the first `next` does it too."""
        if self._reader is None:
            self._reader = _ReadAhead(self._make_reader(self._next_row), _AHEAD)
            # Also stops the thread when the owner forgets us, or the interpreter ends.
            self._stop_reader = weakref.finalize(self, self._reader.close)

    def __next__(self) -> Batch:
        self.start()
        assert self._reader is not None
        batch = self._reader.take()
        self._next_row += self._batch_size
        return batch

    def state(self) -> dict[str, Any]:
        """The position after the last batch handed out, and what it is a position in; JSON."""
        return {"next_row": self._next_row, **self._identity()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position that `state` returned, here or in another process.

        Raises:
            DataError: it is a position in other data, or in another order of it.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise DataError(
                    "cannot go on from this position: the training data is not the same",
                    where="the data position in the checkpoint",
                    why=f"{name} was {state.get(name)}, now it is {mine}",
                    fix="resume with the text, tokenizer, sequence length and seed that the run "
                    "began with, or begin a new run in another folder",
                )
        self.close()
        self._next_row = int(state["next_row"])

    def close(self) -> None:
        """Stop reading ahead. Batches read but not handed out are read again when needed."""
        if self._stop_reader is not None:
            self._stop_reader()
        self._reader = self._stop_reader = None

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _identity(self) -> dict[str, Any]:
        return {
            "data": self._source.fingerprint,
            "windows": len(self._source),
            "seq_len": self._source.seq_len,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def _make_reader(self, first_row: int) -> Callable[[], Generator[Batch, None, None]]:
        # Bound here, so that the thread holds no reference to self and the finalizer can run.
        source, size, seed, shuffle = self._source, self._batch_size, self._seed, self._shuffle
        (index, count), rows = self._block, self._rows - first_row
        microbatches = self._microbatches

        def read() -> Generator[Batch, None, None]:
            from grain import MapDataset, ReadOptions
            from grain.experimental import ElasticIterator, index_shuffle
            from grain.sharding import ShardOptions

            order = _Order(len(source), seed, index_shuffle if shuffle else None)
            dealing = _Dealing(size, count, microbatches)
            dealt = _Dealt(source, order, first_row, rows // size, dealing)
            # Reading a window takes microseconds; grain's own threads would only hand them over.
            options = ReadOptions(num_threads=0, prefetch_buffer_size=0)
            shards = ElasticIterator(
                MapDataset.source(dealt), size, ShardOptions(index, count), read_options=options
            )
            iterator = iter(shards)
            try:
                yield from iterator
            finally:
                iterator.close()

        return read


class _Order:
    """Which window is row ``r`` of the run."""

    def __init__(self, windows: int, seed: int, permute: Callable[..., int] | None) -> None:
        self._windows = windows
        self._seed = seed
        self._permute = permute
        self._epoch_seed = (-1, 0)

    def __getitem__(self, row: int) -> int:
        epoch, place = divmod(row, self._windows)
        if self._permute is None:
            return place
        if self._epoch_seed[0] != epoch:
            self._epoch_seed = (epoch, _hash32(self._seed, epoch))
        # Computed one place at a time: no table of a large corpus in memory.
        return self._permute(place, max_index=self._windows - 1, seed=self._epoch_seed[1], rounds=4)


def _hash32(seed: int, epoch: int) -> int:
    """A seed for one epoch. Not ``seed + epoch``: then run 1's first epoch is run 0's second."""
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class _Dealing:
    """Which rows of a batch each process reads, in which order.

    Attributes:
        size: rows of the batch.
        blocks: how many blocks each microbatch is dealt in.
        microbatches: parts of the batch, one after the other.
    """

    size: int
    blocks: int
    microbatches: int

    def row(self, block: int, place: int) -> int:
        """The row of the batch that comes ``place``-th in a block's share of it."""
        part = self.size // self.microbatches
        microbatch, place = divmod(place, part // self.blocks)
        return microbatch * part + block * (part // self.blocks) + place


class _Dealt:
    """Rows arranged so that grain's shards get whole blocks of each microbatch.

    ElasticIterator deals rows out like cards: within a batch, row ``k`` goes to shard ``k % n``.
    Laid out so, shard ``p`` ends up with the ``p``-th block, which is what a process holds of a
    global array.
    """

    def __init__(
        self, source: Windows, order: _Order, first_row: int, batches: int, dealing: _Dealing
    ) -> None:
        self._source, self._order = source, order
        self._first_row, self._batches, self._dealing = first_row, batches, dealing

    def __len__(self) -> int:
        # Whole batches only: grain lets some shards have a last batch that others do not.
        return self._batches * self._dealing.size

    def __getitem__(self, index: int) -> Batch:
        batch, dealt = divmod(index, self._dealing.size)
        place, shard = divmod(dealt, self._dealing.blocks)
        row = batch * self._dealing.size + self._dealing.row(shard, place)
        return self._source[self._order[self._first_row + row]]


class _ReadAhead:
    """Runs a generator in a thread, at most ``limit`` items ahead of who takes them."""

    def __init__(self, make: Callable[[], Generator[Batch, None, None]], limit: int) -> None:
        self._make, self._limit = make, limit
        self._changed = threading.Condition()
        self._ready: deque[Batch] = deque()
        self._closed = self._done = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="meshwright-data", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        items = self._make()
        try:
            for item in items:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < self._limit)
                    if self._closed:
                        return
                    self._ready.append(item)
                    self._changed.notify_all()
        except BaseException as error:  # whatever it is, the thread that takes must learn of it
            self._error = error
        finally:
            items.close()
            with self._changed:
                self._done = True
                self._changed.notify_all()

    def take(self) -> Batch:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._done)
            if self._ready:
                item = self._ready.popleft()
                self._changed.notify_all()
                return item
        if self._error is not None:
            raise self._error
        raise StopIteration

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()


def heldout_batches(
    source: Windows,
    batch_size: int,
    limit: int | None = None,
    *,
    process_index: int = 0,
    process_count: int = 1,
    microbatches: int = 1,
) -> Iterator[Batch]:
    """The same rows at every evaluation, each once, in batches of one shape.

    With a ``limit``, rows are taken at even distances, so that they stand for the whole source
    rather than for its beginning. A last batch that is not full is filled up with rows of weight
    0, so a mean weighted by `weights` counts every row once.

    Args:
        source: the held-out windows.
        batch_size: rows of the global batch.
        limit: batches at most; None reads all.
        process_index: which block of each global batch to read.
        process_count: number of such blocks.
        microbatches: see `Batches`.
    """
    _check_blocks(batch_size, process_index, process_count, microbatches)
    count = len(source) if limit is None else min(len(source), limit * batch_size)
    dealing = _Dealing(batch_size, process_count, microbatches)
    mine = [dealing.row(process_index, place) for place in range(batch_size // process_count)]
    # Every process gives the same number of batches: a missing one would hang the others.
    for first in range(0, count, batch_size):
        rows = [first + row for row in mine]
        yield _stack(source, [r * len(source) // count if r < count else None for r in rows])


def _stack(source: Windows, indices: list[int | None]) -> Batch:
    """The windows of these numbers; of None one of zeros, which weigh nothing."""
    blank = {name: np.zeros_like(values) for name, values in source[0].items()}
    items = [blank if index is None else source[index] for index in indices]
    return {name: np.stack([item[name] for item in items]) for name in items[0]}


def _check_blocks(
    batch_size: int, process_index: int, process_count: int, microbatches: int
) -> None:
    parts = process_count * microbatches
    if batch_size < 1 or batch_size % parts:
        below = max(batch_size, 0) // parts * parts
        near = [size for size in (below, below + parts) if size]
        cut = f", {microbatches} microbatches" if microbatches > 1 else ""
        raise ConfigError(
            "cannot divide a batch between processes",
            where=f"batch size {batch_size}, {process_count} processes{cut}",
            why=f"{batch_size} is not a positive multiple of {parts}",
            fix=f"use a batch size of {' or '.join(map(str, near))}",
        )
    if not 0 <= process_index < process_count:
        raise ConfigError(
            "cannot read a process's share of a batch",
            why=f"there is no process {process_index} of {process_count}",
            fix=f"use 0 to {process_count - 1}",
        )
