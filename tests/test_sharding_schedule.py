"""Pipeline schedules, run unit by unit: everything is done once, in order, where there is room."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.sharding.bounds import bubble_fraction
from meshwright.sharding.errors import PlacementError
from meshwright.sharding.schedule import Schedule, ScheduleKind, Units, layer_slots


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    kind = draw(st.sampled_from(get_args(ScheduleKind)))
    stages = draw(st.integers(1, 6))
    chunks = {"interleaved": draw(st.integers(2, 4)), "v-shape": 2}.get(kind, 1)
    rounds, more = draw(st.integers(1, 5)), draw(st.integers(0, stages - 1))
    microbatches = stages * rounds + (0 if kind == "interleaved" else more)
    return Schedule(kind, stages, microbatches, chunks)


def unit(schedule: Schedule, units: Units, tick: int, stage: int) -> tuple[int, int, int]:
    """Microbatch, place in the model, and slot."""
    chunk, p = int(units.chunk[tick, stage]), schedule.stages
    place = chunk * p + (p - 1 - stage if schedule.folded and chunk else stage)
    return int(units.microbatch[tick, stage]), place, int(units.slot[tick, stage])


@given(schedules())
@settings(max_examples=60, deadline=None)
def test_every_unit_is_done_once_and_after_what_it_needs(schedule: Schedule) -> None:
    p, groups = schedule.stages, schedule.stages * schedule.chunks
    there, back = schedule.forward(), schedule.backward()
    done: dict[tuple[int, int], int] = {}
    returned: dict[tuple[int, int], int] = {}
    held: dict[tuple[int, int], tuple[int, int]] = {}
    for tick in range(schedule.ticks):
        for stage in range(p) if tick < schedule.forward_ticks else ():
            if there.valid[tick, stage]:
                microbatch, place, slot = unit(schedule, there, tick, stage)
                assert (microbatch, place) not in done
                if place:
                    # What a stage sends is there at the next tick, and not kept for later.
                    assert done[microbatch, place - 1] == tick - 1
                assert there.first[tick, stage] == (place == 0)
                assert there.last[tick, stage] == (place == groups - 1)
                assert held.setdefault((stage, slot), (microbatch, place)) == (microbatch, place)
                done[microbatch, place] = tick
        row = tick - schedule.delay
        for stage in range(p) if row >= 0 else ():
            if back.valid[row, stage]:
                microbatch, place, slot = unit(schedule, back, row, stage)
                assert held.pop((stage, slot)) == (microbatch, place)
                if place < groups - 1:
                    assert returned[microbatch, place + 1] == tick - 1
                elif schedule.returns_at_once:
                    assert done[microbatch, place] == tick
                returned[microbatch, place] = tick
    assert len(done) == len(returned) == schedule.microbatches * groups
    assert not held


@given(schedules())
@settings(max_examples=60, deadline=None)
def test_idle_ticks_are_the_closed_form(schedule: Schedule) -> None:
    p, m, v = schedule.stages, schedule.microbatches, schedule.chunks
    if schedule.folded:
        # As without chunks, and the half tick forwards that makes pairs of them.
        expected = bubble_fraction(p, m)
        assert schedule.idle_fraction == pytest.approx((p - 0.5) / (m + p - 0.5))
        assert not schedule.forward().valid[-1].any()
    else:
        expected = bubble_fraction(p, m, chunks=v)
        assert schedule.idle_fraction == pytest.approx(expected)
    for units in (schedule.forward(), schedule.backward()):
        # A tick with work for any stage lasts one unit; stages without work wait.
        lasting = int(units.valid.any(axis=1).sum())
        assert 1 - units.valid.sum() / (lasting * p) == pytest.approx(expected)


@given(schedules())
@settings(max_examples=60, deadline=None)
def test_what_is_sent_arrives_where_it_is_needed(schedule: Schedule) -> None:
    """What a stage makes at a tick is on the stage that has the unit after it at the next one."""
    for units, by, first in ((schedule.forward(), 1, 0), (schedule.backward(), -1, schedule.delay)):
        for row in range(len(units.valid) - 1):
            sent = dict(schedule.sends(first + row, by))
            assert len(set(sent.values())) == len(sent), "every stage receives from one at most"
            for stage in range(schedule.stages):
                if not units.valid[row, stage]:
                    continue
                microbatch, place, _ = unit(schedule, units, row, stage)
                if not 0 <= place + by < schedule.stages * schedule.chunks:
                    assert schedule.folded <= (stage not in sent)
                    continue
                to = sent[stage]
                assert units.valid[row + 1, to]
                assert unit(schedule, units, row + 1, to)[:2] == (microbatch, place + by)


@given(schedules())
@settings(max_examples=60, deadline=None)
def test_loops_are_all_ticks_in_order(schedule: Schedule) -> None:
    tick, there, back = 0, schedule.forward(), schedule.backward()
    for loop in schedule.loops():
        if loop.stop == loop.start or not loop.repeats:
            continue
        assert loop.start == tick
        assert not schedule.folded or loop.repeats == 1 or loop.size % 2 == 0
        for _ in range(loop.repeats):
            for ticks, head in loop.parts:
                for now in range(tick, tick + ticks):
                    assert loop.forwards == (now < schedule.forward_ticks)
                    assert loop.backwards == (now >= schedule.delay)
                    if loop.forwards:
                        assert head or not there.last[now].any()
                    if loop.backwards and schedule.returns_at_once and not head:
                        assert not back.last[now - schedule.delay].any()
                tick += ticks
        assert tick == loop.stop
    assert tick == schedule.ticks


@given(schedules())
@settings(max_examples=60, deadline=None)
def test_slots_are_as_many_as_the_first_stage_needs(schedule: Schedule) -> None:
    p, m, v = schedule.stages, schedule.microbatches, schedule.chunks
    most = {"gpipe": m, "v-shape": 2 * p}.get(schedule.kind, (v + 1) * p - 1)
    assert schedule.slots == min(m * v, most)


def test_interleaving_idles_less_than_gpipe_as_the_formula_says() -> None:
    gpipe, twice = Schedule("gpipe", 4, 8), Schedule("interleaved", 4, 8, 2)
    assert gpipe.idle_fraction == pytest.approx(3 / 11)
    assert twice.idle_fraction == pytest.approx(3 / 19)
    # In ticks of a whole stage.
    assert twice.forward_ticks / 2 < gpipe.forward_ticks


@pytest.mark.parametrize(
    ("layers", "stages", "chunks", "fix"),
    [
        (4, 4, 2, "use stage=2 or less, or --pipeline.schedule 1f1b, or 8 layers or more"),
        (3, 4, 2, "use stage=1 or less, or 8 layers or more"),
        (1, 1, 2, "use --pipeline.schedule 1f1b, or 2 layers or more"),
    ],
)
def test_too_few_layers_say_what_works(layers: int, stages: int, chunks: int, fix: str) -> None:
    with pytest.raises(PlacementError) as caught:
        layer_slots(layers, stages, chunks)
    assert caught.value.fix == fix


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 3), st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_layer_has_one_place(layers: int, stages: int, chunks: int, folded: bool) -> None:
    folded = folded and chunks == 2
    if stages * chunks > layers:
        with pytest.raises(PlacementError, match="some group would have no layer"):
            layer_slots(layers, stages, chunks)
        return
    places = layer_slots(layers, stages, chunks, folded=folded)
    assert sorted(place for place in places if place is not None) == list(range(layers))
    assert len(places) == stages * chunks * -(-layers // (stages * chunks))
    grid = np.array([-1 if p is None else p for p in places]).reshape(stages, chunks, -1)
    if folded:
        grid[:, 1] = grid[::-1, 1].copy()
    # Chunk c of the model is on stage c mod p; within it layers are in order, empty places last.
    in_order = [x for x in grid.transpose(1, 0, 2).reshape(-1).tolist() if x >= 0]
    assert in_order == list(range(layers))
    live = grid >= 0
    assert (live[..., :-1] | ~live[..., 1:]).all() and live[..., 0].all()
    if stages * chunks > 1 and layers % (stages * chunks):
        assert not live[-1, -1, -1], "the last stage, which has the loss to wait for, has one less"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Schedule("1f1b", 4, 3), "4 stages with 3 microbatches"),
        (
            lambda: Schedule("interleaved", 4, 6, 2),
            "6 is not divisible by 4\n.*--grad-accum 4 or 8",
        ),
        (lambda: layer_slots(3, 2, 2), "4 is more than 3"),
    ],
)
def test_what_cannot_be_filled_is_refused(make: object, text: str) -> None:
    assert callable(make)
    with pytest.raises(PlacementError, match=text):
        make()
