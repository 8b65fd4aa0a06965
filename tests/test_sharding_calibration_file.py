"""Calibration files: they read back as written, and none that cannot be true is read at all."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.sharding.calibration import (
    AttentionRate,
    Calibration,
    LinkRate,
    MatmulRate,
    MemoryRate,
    Rate,
)
from meshwright.sharding.calibration_file import (
    CALIBRATION_SCHEMA,
    calibration_from_json,
    calibration_json,
    check_replaceable,
    load_calibration,
    save_calibration,
)
from meshwright.sharding.errors import ConfigError, RunError

sizes = st.integers(1, 2**40)
positive = st.floats(1e-9, 1e18)
texts = st.text(max_size=12)
rates = st.tuples(positive, positive, positive).map(sorted).map(lambda v: Rate(v[1], v[0], v[2]))
matmuls = st.builds(MatmulRate, st.sampled_from(["bf16", "f32"]), sizes, sizes, sizes, rates)
attentions = st.builds(AttentionRate, texts, texts, sizes, sizes, sizes, sizes, rates, rates)
points = st.lists(st.tuples(sizes, positive), max_size=3).map(tuple)
links = st.builds(LinkRate, texts, sizes, positive, st.just(0.0) | positive, points)
calibrations = st.builds(
    Calibration,
    texts,
    texts,
    sizes,
    texts,
    texts,
    st.lists(matmuls, min_size=1, max_size=3).map(tuple),
    st.builds(MemoryRate, sizes, rates),
    st.none() | attentions,
    st.lists(links, max_size=3).map(tuple),
)
SAMPLE = Calibration(
    "NVIDIA H100 80GB HBM3",
    "gpu",
    8,
    "0.10.2",
    "2026-01-01T00:00:00+00:00",
    (MatmulRate("bf16", 512, 256, 1024, Rate(6e14, 5.9e14, 6.1e14)),),
    MemoryRate(1 << 30, Rate(3e12, 2e12, 3e12)),
    AttentionRate(
        "cudnn", "bf16", 2, 4096, 16, 128, Rate(4e14, 4e14, 4e14), Rate(3e14, 3e14, 3e14)
    ),
    (LinkRate("all-gather", 8, 3.5e11, 2e-5, ((917504, 2.3e-5),)),),
)


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "calibration.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


@given(calibrations)
def test_documents_read_back(calibration: Calibration) -> None:
    document = json.loads(json.dumps(calibration_json(calibration), allow_nan=False))
    assert calibration_from_json(document) == calibration


def test_files_read_back(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    save_calibration(SAMPLE, path)
    assert load_calibration(path) == load_calibration(str(path)) == SAMPLE
    document = json.loads(path.read_text())
    assert document["schema"] == CALIBRATION_SCHEMA == "meshwright.calibration/1"
    assert document["matmul_flops"] == {"bf16": 6e14} and document["memory_bandwidth"] == 3e12
    assert document["memory"]["rate"]["noisy"] and not document["matmuls"][0]["rate"]["noisy"]
    assert list(tmp_path.iterdir()) == [path]  # no temporary file stays


def test_keys_of_later_versions_are_left_alone() -> None:
    document = calibration_json(SAMPLE)
    document["matmuls"][0]["novel"] = document["novel"] = 1
    del document["matmul_flops"]  # a copy
    assert calibration_from_json(document) == SAMPLE


CHANGES = [
    ({"schema": "meshwright.calibration/9"}, "meshwright.calibration/9"),
    ({"schema": "meshwright.plan/1"}, "meshwright.plan/1"),
    ({"schema": None}, "its schema is"),
    ({"matmuls": []}, "without matmuls"),
    ({"matmuls": {}}, "`matmuls` is `{}`"),
    ({"matmuls": [3]}, "`3` stands where a table should"),
    ({"matmuls": [{"dtype": "bf16"}]}, "the key 'm' is missing"),
    ({"matmuls.0.m": -512}, "cannot use -512 for `m`"),
    ({"matmuls.0.m": 51.2}, "`m` is `51.2`"),
    ({"matmuls.0.dtype": 16}, "`dtype` is `16`"),
    ({"matmuls.0.rate.value": -1.0}, "cannot use -1.0 for `value`"),
    ({"matmuls.0.rate.value": "fast"}, '`value` is `"fast"`'),
    ({"matmuls.0.rate.value": True}, "`value` is `true`"),
    ({"matmuls.0.rate.low": 6.05e14}, "outside its own spread"),
    ({"matmuls.0.rate.value": 5.95e14}, "`matmul_flops` does not agree"),
    ({"matmul_flops": {"bf16": 9e14}}, "`matmul_flops` does not agree"),
    ({"memory_bandwidth": 4e12}, "`memory_bandwidth` does not agree"),
    ({"memory.rate.high": float("inf")}, "cannot use Infinity for `high`"),
    ({"memory.rate.high": float("nan")}, "cannot use NaN for `high`"),
    ({"memory.rate.high": 10**400}, "`high` is too large"),
    ({"memory": None}, "`null` stands where a table should"),
    ({"device_count": 0}, "cannot use 0 for `device_count`"),
    ({"device_kind": None}, "`device_kind` is `null`"),
    ({"links.0.bandwidth": 0}, "cannot use 0.0 for `bandwidth`"),
    ({"links.0.latency_seconds": -1e-6}, "cannot use -1e-06 for `latency_seconds`"),
    ({"links.0.points": [[1]]}, "`points` must be a list of pairs"),
    ({"links.0.points": [[1, -1]]}, "cannot use -1 for `points`"),
    ({"attention.forward": 4e14}, "stands where a table should"),
]


@pytest.mark.parametrize(("changes", "said"), CHANGES, ids=str)
def test_documents_that_cannot_be_true(tmp_path: Path, changes, said: str) -> None:
    document = json.loads(json.dumps(calibration_json(SAMPLE)))
    for path, value in changes.items():
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        place = document
        for part in parents:
            place = place[part]
        place[last] = value
    path = written(tmp_path, document)
    with pytest.raises(ConfigError) as error:
        load_calibration(path)
    assert said in str(error.value) and str(path) in str(error.value)
    assert len(str(error.value).splitlines()) <= 4 and error.value.exit_code == 2
    assert error.value.why and error.value.fix


@pytest.mark.parametrize("key", [*calibration_json(SAMPLE)][:10])
def test_keys_that_are_missing(tmp_path: Path, key: str) -> None:
    document = calibration_json(SAMPLE)
    del document[key]
    with pytest.raises(ConfigError, match=key):
        load_calibration(written(tmp_path, document))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON: line 1, column 1"),
        ('{"schema": ', "not JSON: line 1"),
        ("schema: meshwright.calibration/1", "not JSON"),
        ("[]", "its schema is"),
        ("3", "its schema is"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 10_000, "digits"),
        ("\x00", "not JSON"),
        (" " * (2**20 + 1), "over 1 MiB"),
    ],
    ids=range(9),
)
def test_files_that_are_no_documents(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_calibration(written(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    cases = {
        tmp_path / "absent.json": "there is no such file",
        tmp_path: "it is a folder",
        tmp_path / "a\0b": "null",
        binary: "not UTF-8",
    }
    for path, said in cases.items():
        with pytest.raises(ConfigError, match=said) as error:
            load_calibration(path)
        assert len(str(error.value).splitlines()) <= 4


@given(st.recursive(st.none() | st.booleans() | st.floats() | texts, st.lists, max_leaves=5))
def test_values_put_anywhere_are_refused_or_read(value: Any) -> None:
    for key in calibration_json(SAMPLE):
        document = calibration_json(SAMPLE)
        for place in (document, document["matmuls"][0], document["memory"]["rate"]):
            if key in place:
                place[key] = value
        with contextlib.suppress(ConfigError):
            calibration_from_json(document)


def test_an_older_calibration_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    older = written(tmp_path, {"schema": "meshwright.calibration/0"})
    link = tmp_path / "link.json"
    link.symlink_to(older)
    save_calibration(SAMPLE, link)
    assert link.is_symlink() and load_calibration(older) == SAMPLE
    for text in ("", "precious", "{}", '{"schema": "meshwright.plan/1"}', "[" * 100_000):
        other = tmp_path / "other.json"
        other.write_text(text)
        with pytest.raises(RunError, match="will not overwrite"):
            save_calibration(SAMPLE, other)
        assert other.read_text() == text
    with pytest.raises(RunError, match="it is a folder"):
        save_calibration(SAMPLE, tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RunError, match="no calibration file"):
        check_replaceable(tmp_path / "pipe")


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    file = written(tmp_path, "text")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (tmp_path / "no" / "folder.json", file / "x", tmp_path / "a\0b", loop / "x"):
        for act in (check_replaceable, lambda path: save_calibration(SAMPLE, path)):
            with pytest.raises(RunError, match="cannot write the calibration file") as error:
                act(path)
            assert len(str(error.value).splitlines()) <= 4 and error.value.exit_code == 2
    with pytest.raises(RunError):
        check_replaceable("~no-such-user-here/x")
    check_replaceable(tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


def test_a_full_disk_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "calibration.json"
    save_calibration(SAMPLE, path)
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match="No space left"):
        save_calibration(SAMPLE, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
