"""Calibrating this machine: real but tiny measurements, of which only the sense is checked."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from meshwright.scripts import calibrate as verb
from meshwright.sharding.calibration import Calibration, LinkRate
from meshwright.sharding.calibration_file import load_calibration
from meshwright.sharding.errors import ConfigError, RunError
from meshwright.train import calibrate as module
from meshwright.train.calibrate import calibrate, measure
from meshwright.train.calibrate_links import measure_links, wire_bytes
from meshwright.train.stopwatch import Stopwatch, chained, rate_of


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def tiny(said: list[str]) -> Calibration:
    """What the least measurement finds; eight simulated devices count as one CPU."""
    return measure(0.01, say=said.append)


def test_a_tiny_measurement_makes_sense(tiny: Calibration, said: list[str]) -> None:
    assert tiny.device_kind == tiny.platform == "cpu" and tiny.jax == jax.__version__
    assert tiny.date.endswith("+00:00") and tiny.links == ()
    assert set(tiny.matmul_flops) == {"bf16", "f32"}
    # No CPU does less than a megaflop or more than a petaflop a second, or reads faster.
    for flops in tiny.matmul_flops.values():
        assert 1e6 < flops < 1e15
    for entry in tiny.matmuls:
        assert entry.rate.value > tiny.matmul_flops[entry.dtype] / 20
    assert 1e6 < tiny.memory_bandwidth < 1e14
    assert tiny.attention is not None and tiny.attention.kernel == "matmul"
    assert all(1e5 < flops < 1e15 for flops in tiny.attention_flops.values())
    assert len(said) == len(tiny.matmuls) + 3


def test_larger_sizes_follow_while_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WIDTHS", (16, 32, 64))
    watch = Stopwatch(jax.devices()[0])
    end = math.inf
    monkeypatch.setattr(watch, "trips", lambda build, operands, guess, seconds: [guess])
    found = module._matmuls(watch, "f32", end, lambda text: None)
    assert [(e.m, e.k, e.n) for e in found] == [(32, 16, 64), (64, 32, 128), (128, 64, 256)]
    monkeypatch.setattr(watch, "holds", lambda held: held < 100_000)
    assert len(module._matmuls(watch, "f32", end, lambda text: None)) == 2
    assert len(module._matmuls(watch, "f32", 0.0, lambda text: None)) == 1


@pytest.mark.parametrize("trips", [1, 15, 16, 17, 35])
def test_every_pair_of_matmuls_is_done(trips: int) -> None:
    """Against a power computed one by one; what is measured is not what XLA can shorten."""
    x, up, down = (
        module._random(seed, shape, "f32", scale)
        for seed, shape, scale in ((0, (8, 4), 1.0), (1, (4, 16), 0.5), (2, (16, 4), 0.25))
    )
    found = module._pairs(trips, x, up, down)
    wanted = x
    for _ in range(trips):
        wanted = wanted @ up @ down
        wanted = wanted / jnp.max(jnp.abs(wanted))
    assert jnp.allclose(found, wanted, rtol=1e-3, atol=1e-3)


def test_the_loop_keeps_the_work() -> None:
    """One matmul pair stays in the loop's body: neither hoisted, nor merged, nor dropped."""
    x = module._random(0, (32, 16), "f32", 1.0)
    weights = [module._random(1, (16, 64), "f32", 1.0), module._random(2, (64, 16), "f32", 1.0)]
    text = jax.jit(lambda *a: module._pairs(7, *a)).lower(x, *weights).compile().as_text() or ""
    assert " while(" in text and '"n":"7"' in text
    passes = jax.jit(lambda *a: module._passes(9, *a)).lower(x, x[0, 0]).compile().as_text() or ""
    assert " while(" in passes and '"n":"9"' in passes


def test_values_stay_in_range() -> None:
    x = module._random(0, (64, 32), "bf16", 1.0)
    weights = [module._random(1, (32, 128), "bf16", 32**-0.5)]
    weights.append(module._random(2, (128, 32), "bf16", 128**-0.5))
    found = jax.jit(lambda *a: module._pairs(2000, *a))(x, *weights)
    assert float(jnp.max(jnp.abs(found))) == 1.0


def test_random_numbers_have_the_variance_asked_for() -> None:
    found = module._random(3, (512, 256), "f32", 0.25)
    assert abs(float(jnp.mean(found))) < 0.005
    assert float(jnp.std(found)) == pytest.approx(0.25, rel=0.02)
    assert abs(float(jnp.corrcoef(found[:-1].ravel(), found[1:].ravel())[0, 1])) < 0.02


def test_a_program_too_short_is_compiled_again() -> None:
    watch = Stopwatch(jax.devices()[0])
    built: list[int] = []

    def program(trips: int, x: jax.Array) -> jax.Array:
        built.append(trips)
        return lax.fori_loop(0, trips, lambda _, x: jnp.cos(x), x)

    x = jnp.ones((8,))
    seconds = watch.trips(chained(program), [x], 1.0, 0.0)
    assert len(seconds) == 3 and min(seconds) > 0
    assert built[0] == 1 and built[-1] > 1  # a cosine does not take the second that was guessed
    assert built[-1] * max(seconds) >= watch.call_seconds
    assert float(x[0]) == 1.0  # the operand itself is not given away
    rate = rate_of(1.0, seconds)
    assert rate.low <= rate.value <= rate.high


def test_collectives_are_measured_and_fitted(devices: list[Any], said: list[str]) -> None:
    sizes = (4 * 64, 16 * 64, 64 * 64)
    found = measure_links(devices, 0.0, said.append, sizes=sizes, simulated=True)
    assert [link.kind for link in found] == ["all-gather", "reduce-scatter", "all-reduce"]
    for link in found:
        assert link.devices == 8 and link.bandwidth > 0
        assert [wire for wire, _ in link.points] == [wire_bytes(link.kind, s, 8) for s in sizes[:2]]


@pytest.mark.parametrize("count", [1, 8])
def test_simulated_devices_have_no_links(devices: list[Any], count: int) -> None:
    with pytest.raises(ConfigError, match="cannot measure the links"):
        measure_links(devices[:count], 1.0)


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
def test_time_that_cannot_be_spent(seconds: float) -> None:
    with pytest.raises(ConfigError, match="seconds"):
        measure(seconds)


@pytest.fixture
def measured(tiny: Calibration, monkeypatch: pytest.MonkeyPatch) -> Calibration:
    """What the command finds in the tests below, at once; with links, for the table."""
    links = (LinkRate("all-gather", 8, 3e11, 2e-5),)
    found = dataclasses.replace(tiny, device_kind="TPU [v9]", device_count=8, links=links)
    monkeypatch.setattr(module, "measure", lambda seconds, say: found)
    return found


def test_the_command_writes_and_shows(
    tmp_path: Path,
    measured: Calibration,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert verb.main([]) == 0
    assert load_calibration("calibration.json") == measured
    assert verb.main(["--seconds", "3"]) == 0  # over its own file
    shown = capsys.readouterr().out
    for text in ("TPU [v9]", "f32", "512x256x1024", "FLOP/s", "all-gather", "wrote calibration"):
        assert text in shown


def test_the_command_refuses_before_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measure", lambda *_, **__: pytest.fail("measured"))
    other = tmp_path / "notes.txt"
    other.write_text("precious")
    for out in (other, tmp_path, tmp_path / "no" / "where.json"):
        for run in (lambda out: verb.main(["--out", str(out)]), lambda out: calibrate(str(out))):
            with pytest.raises(RunError) as error:
                run(out)
            assert error.value.exit_code == 2 and len(str(error.value).splitlines()) <= 4
    assert other.read_text() == "precious"
    for words in (["--seconds", "0"], ["--seconds", "-1"], ["--seconds", "soon"], ["--out", ""]):
        with pytest.raises(ConfigError):
            verb.main(words)


def test_a_measurement_that_cannot_be_written_is_printed(
    tmp_path: Path,
    measured: Calibration,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> None:
        raise RunError("cannot write")

    monkeypatch.setattr(module, "save_calibration", full)
    with pytest.raises(RunError):
        calibrate(str(tmp_path / "calibration.json"))
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["device_kind"] == measured.device_kind
