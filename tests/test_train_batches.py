"""Windows mark documents rightly; batches come in one order, from anywhere, on any processes."""

from __future__ import annotations

import gc
import importlib.util
import json
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.sharding.errors import ConfigError, DataError, MissingExtraError
from meshwright.train.batches import Batch, Batches, heldout_batches
from meshwright.train.windows import Windows

LENGTH = 4


def numbered(count: int, **options: Any) -> Windows:
    """Windows whose first token is their own number times LENGTH."""
    tokens = np.arange(count * LENGTH + 1, dtype=np.uint32)
    return Windows(tokens, np.array([len(tokens)]), LENGTH, **options)


def rows(batch: Batch) -> list[int]:
    return [int(row[0]) // LENGTH for row in batch["tokens"]]


def take(batches: Batches, count: int) -> list[list[int]]:
    return [rows(next(batches)) for _ in range(count)]


def read(windows: int, size: int, count: int, **options: Any) -> list[list[int]]:
    with Batches(numbered(windows), size, **options) as batches:
        return take(batches, count)


# Windows


@st.composite
def packed(draw: st.DrawFn) -> tuple[list[int], int]:
    return draw(st.lists(st.integers(1, 9), min_size=1, max_size=12)), draw(st.integers(1, 11))


@given(packed())
def test_masks_at_document_boundaries(case: tuple[list[int], int]) -> None:
    """Against the plain definition, token by token."""
    lengths, seq_len = case
    document = np.repeat(np.arange(len(lengths)), lengths)
    tokens = np.arange(1, len(document) + 1, dtype=np.uint16)
    source = Windows(tokens, np.cumsum(lengths), seq_len, mask_documents=True, pad_last=True)
    assert len(source) == -(-(len(tokens) - 1) // seq_len)
    for index in range(len(source)):
        item = source[index]
        assert all(values.shape == (seq_len,) for values in item.values())
        began: dict[int, int] = {}
        for place in range(seq_len):
            at = index * seq_len + place
            got = {name: values[place] for name, values in item.items()}
            if at + 1 >= len(tokens):
                assert not any(got.values())
                continue
            mine, after = int(document[at]), int(document[at + 1])
            assert (got["tokens"], got["targets"]) == (tokens[at], tokens[at + 1])
            assert got["weights"] == (mine == after)
            assert got["segments"] == mine - document[index * seq_len] + 1
            assert got["positions"] == place - began.setdefault(mine, place)


@given(st.integers(2, 60), st.integers(1, 12), st.booleans())
def test_windows_cover_every_target_once(count: int, seq_len: int, pad_last: bool) -> None:
    source = Windows(np.arange(count), np.array([count]), seq_len, pad_last=pad_last)
    items = [source[index] for index in range(len(source))]
    kept = [t for item in items for t in item["targets"][item["weights"] > 0]]
    whole = count - 1 if pad_last else (count - 1) // seq_len * seq_len
    assert kept == list(range(1, whole + 1))
    assert all(set(item) == {"tokens", "targets", "weights"} for item in items)
    dtypes = {name: values.dtype for item in items for name, values in item.items()}
    assert not items or dtypes == {"tokens": np.int32, "targets": np.int32, "weights": np.float32}


def test_windows_refuse_what_is_outside() -> None:
    source = numbered(3)
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"window {index} of 3"):
            _ = source[index]
    assert len(Windows(np.zeros(0), np.zeros(0, np.int64), 4)) == 0


# Order


def test_an_epoch_is_a_permutation_and_each_is_another() -> None:
    seen = sum(read(12, 4, 6), [])
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    assert seen[:12] != seen[12:] and seen[:12] != list(range(12))


def test_the_seed_decides_the_order() -> None:
    assert read(50, 4, 5, seed=1) == read(50, 4, 5, seed=1) != read(50, 4, 5, seed=2)
    # Nor is the next seed's first epoch this one's second.
    assert read(12, 4, 6, seed=1)[3:] != read(12, 4, 3, seed=2)
    assert read(50, 4, 5, seed=-(2**70)) == read(50, 4, 5, seed=-(2**70))


def test_batches_run_on_over_the_end_of_an_epoch() -> None:
    assert read(5, 3, 4, shuffle=False) == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]
    assert read(2, 5, 2, shuffle=False) == [[0, 1, 0, 1, 0], [1, 0, 1, 0, 1]]
    seen = sum(read(5, 3, 5), [])
    assert all(sorted(seen[i : i + 5]) == list(range(5)) for i in (0, 5, 10))


def test_epochs_end_and_stay_ended() -> None:
    with Batches(numbered(5), 3, epochs=2, shuffle=False) as batches:
        assert [rows(batch) for batch in batches] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]
        with pytest.raises(StopIteration):
            next(batches)


@pytest.mark.parametrize("epochs", [None, 3])
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_hold_blocks_of_the_same_global_batch(processes: int, epochs: int | None) -> None:
    # 3 epochs of 13 rows end with 7 left over, which some shards could fill a batch from.
    count = 4
    alone = read(13, 8, count, seed=3, epochs=epochs)
    shares = [
        read(13, 8, count, seed=3, epochs=epochs, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == alone


def test_all_processes_end_together() -> None:
    for index in range(4):
        with Batches(numbered(13), 8, process_index=index, process_count=4, epochs=3) as batches:
            assert len(list(batches)) == 39 // 8


# Position


@settings(max_examples=15, deadline=None)
@given(
    done=st.integers(0, 6),
    before=st.sampled_from([1, 2, 4]),
    after=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_resuming_equals_not_stopping(done: int, before: int, after: int, seed: int) -> None:
    """Mid-epoch, at its end and in later ones, on the same or another number of processes."""
    source, size = numbered(10), 4
    whole = read(10, size, 9, seed=seed)
    states = []
    for index in range(before):
        first = Batches(source, size, seed=seed, process_index=index, process_count=before)
        with first:
            take(first, done)
            states.append(json.loads(json.dumps(first.state())))
    assert all(state == states[0] for state in states)
    shares = []
    for index in range(after):
        second = Batches(source, size, seed=seed, process_index=index, process_count=after)
        with second:
            second.restore(states[0])
            assert second.state() == states[0]
            shares.append(take(second, 9 - done))
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole[done:]


def test_resuming_with_another_batch_size_loses_no_row() -> None:
    whole = sum(read(10, 2, 12), [])
    with Batches(numbered(10), 6) as first, Batches(numbered(10), 4) as second:
        seen = sum(take(first, 1), [])
        second.restore(first.state())
        assert seen + sum(take(second, 4), []) == whole[:22]


def test_the_state_is_of_the_last_batch_handed_out() -> None:
    with Batches(numbered(100), 2, shuffle=False) as batches:
        batches.start()
        assert batches.state()["next_row"] == 0
        take(batches, 3)
        assert batches.state()["next_row"] == 6
        batches.restore({**batches.state(), "next_row": 2})
        assert take(batches, 1) == [[2, 3]]
        batches.close()
        assert take(batches, 1) == [[4, 5]]


@pytest.mark.parametrize(
    ("other", "options", "message"),
    [
        (numbered(11), {}, "windows was 10, now it is 11"),
        (numbered(10, fingerprint="b"), {}, "data was , now it is b"),
        (numbered(10), {"seed": 7}, "seed was 0, now it is 7"),
        (numbered(10), {"shuffle": False}, "shuffle was True, now it is False"),
    ],
)
def test_positions_in_other_data_are_refused(
    other: Windows, options: dict[str, Any], message: str
) -> None:
    state = Batches(numbered(10), 2).state()
    with Batches(other, 2, **options) as batches:
        with pytest.raises(DataError, match=message):
            batches.restore(state)
        assert batches.state()["next_row"] == 0


# Thread


class _Failing(Exception):
    pass


def test_errors_while_reading_reach_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Windows.__getitem__

    def fail_at_5(self: Windows, index: int) -> Batch:
        if index == 5:
            raise _Failing("disk on fire")
        return real(self, index)

    monkeypatch.setattr(Windows, "__getitem__", fail_at_5)
    with Batches(numbered(20), 2, shuffle=False) as batches:
        assert take(batches, 2) == [[0, 1], [2, 3]]
        for _ in range(2):
            with pytest.raises(_Failing, match="disk on fire"):
                next(batches)
        assert batches.state()["next_row"] == 4


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "meshwright-data"]


def test_reading_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    full = threading.Event()
    real = Windows.__getitem__

    def count(self: Windows, index: int) -> Batch:
        asked.append(index)
        if len(asked) == 2 * 6:  # one handed out, four ready, one waiting for room
            full.set()
        return real(self, index)

    monkeypatch.setattr(Windows, "__getitem__", count)
    with Batches(numbered(1000), 2) as batches:
        next(batches)
        assert full.wait(30)
        full.clear()
        assert not full.wait(0.05) and len(asked) == 12


def test_the_thread_ends_with_its_owner() -> None:
    assert not readers()
    batches = Batches(numbered(10), 2)
    assert not readers(), "nothing runs before it is asked for"
    next(batches)
    assert len(readers()) == 1
    batches.close()
    batches.close()
    assert not readers()
    forgotten = Batches(numbered(10), 2)
    next(forgotten)
    del forgotten
    gc.collect()
    assert not readers()


# Refusals


def test_batches_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match="use a batch size of 8 or 12"):
        Batches(numbered(10), 10, process_count=4)
    with pytest.raises(ConfigError, match="use a batch size of 4$"):
        Batches(numbered(10), 2, process_count=4)
    with pytest.raises(ConfigError, match="use a batch size of 1$"):
        Batches(numbered(10), 0)
    with pytest.raises(ConfigError, match="no process 2 of 2"):
        next(heldout_batches(numbered(10), 4, process_index=2, process_count=2))


def test_nothing_to_read() -> None:
    with pytest.raises(DataError, match="1 tokens, a window needs 5"):
        Batches(numbered(0), 2)


def test_without_grain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'meshwright\[train\]'"):
        Batches(numbered(10), 2)
    assert list(heldout_batches(numbered(10), 2))


# Held-out batches


@given(st.integers(2, 90), st.integers(1, 6), st.sampled_from([1, 2, 4]))
def test_held_out_tokens_count_once(tokens: int, per_process: int, processes: int) -> None:
    source = Windows(np.arange(tokens), np.array([tokens]), LENGTH, pad_last=True)
    size = per_process * processes
    shares = [
        list(heldout_batches(source, size, process_index=i, process_count=processes))
        for i in range(processes)
    ]
    assert {len(share) for share in shares} == {-(-len(source) // size)}
    batches = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    assert all(batch["tokens"].shape == (size, LENGTH) for batch in batches)
    counted = [t for batch in batches for t in batch["targets"][batch["weights"] > 0]]
    assert counted == list(range(1, tokens))


def test_limited_held_out_rows_are_spread_out() -> None:
    found = [rows(batch) for batch in heldout_batches(numbered(100), 2, limit=3)]
    assert found == [[0, 16], [33, 50], [66, 83]]
    assert [rows(batch) for batch in heldout_batches(numbered(100), 2, limit=3)] == found
    assert len(list(heldout_batches(numbered(3), 2, limit=9))) == 2


def test_held_out_padding_keeps_the_fields() -> None:
    source = numbered(1, mask_documents=True)
    (batch,) = heldout_batches(source, 3)
    assert set(batch) == {"tokens", "targets", "weights", "segments", "positions"}
    assert batch["weights"].sum() == LENGTH and batch["segments"][1:].sum() == 0
