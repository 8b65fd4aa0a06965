"""Plans on disk: what comes back, what a spoilt entry does, limits, and two writers at once."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.sharding import plan_cache
from meshwright.sharding.plan_cache import (
    PLAN_CACHE_VARIABLE,
    cache_folder,
    cache_key,
    compiler_facts,
    lookup,
    source_fingerprint,
    store,
)
from meshwright.sharding.topology import Topology

KEY = cache_key({"program": "x"})

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False).filter(lambda x: abs(x) != float("inf")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(PLAN_CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "meshwright" / "plans"


def entry(folder: Path, key: str = KEY) -> Path:
    return folder / f"{key}.plan"


def test_what_was_stored_comes_back(folder: Path) -> None:
    value = {"schema": 1, "text": "π" * 10_000, "nested": [1, 2.5, None, {"a": []}]}
    assert lookup(KEY) is None
    assert store(KEY, value)
    assert lookup(KEY) == value
    assert store(KEY, [1])
    assert lookup(KEY) == [1]
    assert [path.name for path in folder.iterdir()] == [entry(folder).name]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry(folder).stat().st_mode) == 0o600


@given(value=json_values)
def test_any_json_value_survives(value: Any) -> None:
    assert plan_cache._decoded(plan_cache._encoded(value)) == value


def test_values_without_a_json_form_are_refused() -> None:
    with pytest.raises(TypeError):
        store(KEY, {"a": object()})
    with pytest.raises(ValueError):
        store(KEY, float("nan"))


@given(data=st.data())
def test_a_changed_byte_is_noticed(data: st.DataObject) -> None:
    raw = bytearray(plan_cache._encoded({"peak_bytes": 123}))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError):
        plan_cache._decoded(bytes(raw))


def _forged(body: bytes) -> bytes:
    return plan_cache._MAGIC + hashlib.sha256(body).digest() + body


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"garbage",
        plan_cache._encoded({"a": 1})[:-3],
        _forged(b"not compressed"),
        _forged(zlib.compress(b"{not json")),
        _forged(zlib.compress(b"\xff\xfe")),
        _forged(zlib.compress(b"[" * 200_000)),
    ],
    ids=["empty", "garbage", "cut", "raw", "no json", "no text", "too deep"],
)
def test_a_spoilt_entry_is_none_and_goes(folder: Path, raw: bytes) -> None:
    store(KEY, 1)
    entry(folder).write_bytes(raw)
    assert lookup(KEY) is None
    assert not entry(folder).exists()
    assert store(KEY, 2)
    assert lookup(KEY) == 2


def test_the_least_recently_used_go(folder: Path) -> None:
    keys = [cache_key({"n": n}) for n in range(4)]
    for n, key in enumerate(keys):
        store(key, os.urandom(500).hex())
        os.utime(entry(folder, key), (1000 + n, 1000 + n))
    lookup(keys[0])  # used just now
    size = entry(folder, keys[0]).stat().st_size
    assert store(KEY, os.urandom(500).hex(), most_bytes=int(size * 3.5))
    kept = [key for key in [*keys, KEY] if entry(folder, key).exists()]
    assert kept == [keys[0], keys[3], KEY]


def test_an_entry_over_the_limit_is_not_kept(folder: Path) -> None:
    assert not store(KEY, os.urandom(500).hex(), most_bytes=100)
    assert lookup(KEY) is None


def test_half_written_files_go_with_the_oldest(folder: Path) -> None:
    store(KEY, 1)
    left = folder / ".partial-x"
    left.write_bytes(b"x" * 10_000)
    os.utime(left, (1, 1))
    store(KEY, 2, most_bytes=5_000)
    assert not left.exists()
    assert lookup(KEY) == 2


def test_off_and_elsewhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(KEY, 1)
    monkeypatch.setenv(PLAN_CACHE_VARIABLE, "off")
    assert cache_folder() is None
    assert lookup(KEY) is None
    assert not store(KEY, 2)
    monkeypatch.setenv(PLAN_CACHE_VARIABLE, str(tmp_path / "mine"))
    assert lookup(KEY) is None
    assert store(KEY, 3)
    assert entry(tmp_path / "mine").exists()


def test_a_folder_that_cannot_be_written_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where the folder should be")
    assert not store(KEY, 1)
    assert lookup(KEY) is None
    folder.unlink()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert not store(KEY, 1)
    assert list(folder.iterdir()) == []


def test_many_writers_and_readers_never_see_half_an_entry(folder: Path) -> None:
    values = [[n] * 5_000 for n in range(4)]
    store(KEY, values[0])
    wrong: list[Any] = []

    def work(n: int) -> None:
        for _ in range(30):
            store(KEY, values[n], most_bytes=2_000)
            seen = lookup(KEY)
            if seen not in values:
                wrong.append(seen)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert [path.name for path in folder.iterdir()] == [entry(folder).name]


def test_keys_hold_what_a_report_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    v5e = Topology.parse("v5e:4x4")
    facts = compiler_facts(v5e)
    assert facts["topology"] == "v5e:4x4"
    assert facts["sources"] == source_fingerprint()
    assert "jax" in facts["versions"] and "jaxlib" in facts["versions"]
    assert not [name for name in facts["versions"] if "cuda" in name]
    before = cache_key(facts)
    assert cache_key(compiler_facts(v5e)) == before
    assert cache_key(compiler_facts(Topology.parse("v5e:4x8"))) != before
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")
    assert cache_key(compiler_facts(v5e)) != before


def test_a_key_is_not_made_of_what_json_cannot_say() -> None:
    with pytest.raises(TypeError):
        cache_key({"dtype": object()})


def test_a_changed_source_changes_the_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(plan_cache, "find_spec", lambda name: Spec)
    (tmp_path / "a.py").write_text("x = 1\n")
    first = source_fingerprint.__wrapped__()
    assert source_fingerprint.__wrapped__() == first
    (tmp_path / "a.py").write_text("x = 2\n")
    assert source_fingerprint.__wrapped__() != first
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.py").write_text("")
    assert source_fingerprint.__wrapped__() != first
