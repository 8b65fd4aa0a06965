"""Text is found, checked, tokenised once, split the same way everywhere, and kept safely."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.sharding.errors import DataError, RunError
from meshwright.train import corpus as corpus_module
from meshwright.train import documents
from meshwright.train.config import DataConfig
from meshwright.train.corpus import Corpus, open_corpus
from meshwright.train.documents import find_source, read_pieces
from meshwright.train.tokenizer import train_tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.mkdir()
    return path


def open_at(path: Path | None, seq_len: int = 4, vocab_size: int = 256, **fields: Any) -> Corpus:
    if path is not None:
        fields.setdefault("cache", str(path.parent / "cache"))
    config = DataConfig(path=None if path is None else str(path), **fields)
    return open_corpus(config, seq_len=seq_len, vocab_size=vocab_size)


def decoded(corpus: Corpus) -> tuple[list[bytes], list[bytes]]:
    """The documents of either split; a document that the split cuts is in both."""
    found = []
    for windows in (corpus.train, corpus.heldout):
        starts = [0, *windows.ends[:-1]]
        parts = zip(starts, windows.ends, strict=True)
        found.append([windows.tokens[a:b].astype(np.uint8).tobytes() for a, b in parts])
    return found[0], found[1]


def write_folder(folder: Path, count: int = 60) -> dict[str, bytes]:
    files = {f"d{i % 7}/f{i:03}.txt": f"file {i} é\n".encode() * 5 for i in range(count)}
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return files


def test_the_default_is_the_standard_library(tmp_path: Path) -> None:
    found = open_at(None, seq_len=128, cache=str(tmp_path))
    said = found.description
    assert said["source"].startswith("Python 3.") and said["split"] == "by document"
    assert said["documents"] > 300 and said["tokens"] == said["bytes"] + said["documents"]
    assert said["train_tokens"] + said["heldout_tokens"] == said["tokens"]
    names = [entry.name for entry in find_source(None).files]
    assert names == sorted(names) and "argparse.py" in names
    assert not [name for name in names if "site-packages" in name or "/test/" in name]
    assert "    def " in found.tokenizer.decode(found.train.tokens[:200_000])


def test_a_folder_is_split_by_file(text: Path) -> None:
    files = write_folder(text)
    (text / ".hidden").write_bytes(b"secret")
    found = open_at(text, heldout_fraction=0.2)
    train, heldout = decoded(found)
    assert sorted(train + heldout) == sorted(content + b"\0" for content in files.values())
    assert found.description["split"] == "by document" and len(heldout) > 3
    in_order = [content + b"\0" for _, content in sorted(files.items())]
    assert train == [content for content in in_order if content in train]


def test_new_files_move_no_others(text: Path) -> None:
    write_folder(text)
    before = {content for content in decoded(open_at(text, heldout_fraction=0.2))[1]}
    (text / "new.txt").write_bytes(b"new\n" * 9)
    after = {content for content in decoded(open_at(text, heldout_fraction=0.2))[1]}
    assert after - {b"new\n" * 9 + b"\0"} == before


def test_a_file_is_one_document_and_its_tail_is_held_out(text: Path) -> None:
    path = text / "one.txt"
    path.write_bytes(b"0123456789" * 20)
    found = open_at(path, heldout_fraction=0.1)
    train, heldout = decoded(found)
    assert b"".join(train + heldout) == b"0123456789" * 20 + b"\0"
    assert len(found.heldout.tokens) == 20 and len(train) == len(heldout) == 1
    assert "tail" in found.description["split"]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.floats(0.01, 0.9))
def test_splits_part_the_tokens(lengths: list[int], fraction: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        lines = [json.dumps({"text": "x" * n + str(i)}) for i, n in enumerate(lengths)]
        path.write_text("\n".join(lines))
        try:
            found = open_at(path, seq_len=1, heldout_fraction=fraction)
        except DataError as error:
            assert "shorter than one training row" in str(error)
            return
    for windows in (found.train, found.heldout):
        ends = windows.ends.tolist()
        assert ends == sorted(set(ends)) and ends[0] > 0 and ends[-1] == len(windows.tokens)
    assert len(found.heldout) > 0
    joined = np.concatenate([found.train.tokens, found.heldout.tokens])
    assert len(joined) == found.description["tokens"]
    assert sum(joined == 0) == len(lengths)


def test_jsonl_is_split_by_the_text_of_a_line(text: Path) -> None:
    path = text / "text.jsonl"
    lines = [json.dumps({"text": f"line {i} 日\n", "n": i}) for i in range(80)]
    path.write_text("\n".join([*lines, "", '{"text": ""}', lines[0]]), encoding="utf-8")
    found = open_at(path, heldout_fraction=0.2)
    train, heldout = decoded(found)
    assert found.description["split"] == "by document" and len(train + heldout) == 81
    assert not set(train) & set(heldout), "copies of a document belong to one split"
    assert b"line 3 \xe6\x97\xa5\n\0" in train + heldout


def test_a_folder_may_hold_jsonl(text: Path) -> None:
    (text / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (text / "b.txt").write_text("three")
    train, heldout = decoded(open_at(text, seq_len=1))
    assert b"".join(train + heldout) == b"one\0two\0three\0"


def test_long_documents_come_in_pieces(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_PIECE_BYTES", 7)
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 16)
    content = "añ\n日本語日本語日本語日本語\n🙂🙂🙂🙂🙂 \n\nlast".encode()
    (text / "a.txt").write_bytes(content)
    (text / "b.jsonl").write_text(json.dumps({"text": content.decode()}))
    pieces = list(read_pieces(find_source(str(text)), on_skip=pytest.fail))
    assert all(piece.text.decode() and len(piece.text) <= 16 for piece in pieces)
    assert b"".join(piece.text for piece in pieces) == content * 2
    ends = [i for i, piece in enumerate(pieces) if piece.last]
    assert len(ends) == 2 and ends[1] == len(pieces) - 1 and len(pieces) > 8
    assert {piece.key for piece in pieces} == {b"a.txt", content}


def test_binary_files_of_a_folder_are_skipped_and_reported(text: Path) -> None:
    write_folder(text)
    (text / "image.png").write_bytes(b"\x89PNG\0\0")
    (text / "latin.txt").write_bytes("é".encode("latin-1"))
    (text / "empty.txt").write_bytes(b"")
    found = open_at(text)
    assert found.description["skipped_files"] == 2
    assert found.description["notes"] == ["skipped 2 files that are not UTF-8 text"]
    again = open_at(text)
    assert again.description["notes"] == found.description["notes"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "the file is empty"),
        ("empty.jsonl", b"\n\n", "the file is empty"),
        ("zip.txt", b"abc\0def", "byte 3[\\s\\S]*NUL byte"),
        ("latin.txt", b"caf\xe9 au lait", "byte 3[\\s\\S]*0xe9 there is not UTF-8"),
        ("cut.txt", "abcé".encode()[:-1], "byte 3[\\s\\S]*not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', "line 2[\\s\\S]*not JSON"),
        ("b.jsonl", b'\n\n{"body": "x", "id": 1}', "line 3[\\s\\S]*its keys: 'body', 'id'"),
        ("c.jsonl", b'["text"]', "line 1[\\s\\S]*holds list, not an object"),
        ("d.jsonl", b'{"text": 3}', '"text" is int, not a string'),
        ("e.jsonl", b'{"text": "\\u0000"}', "NUL character"),
        ("f.jsonl", b'{"text": "\\ud800"}', "not UTF-8"),
        ("g.jsonl", b'{"text": "\xff"}', "not UTF-8"),
        ("h.jsonl", b"[" * 100_000, "line 1"),
        ("short.txt", b"abcd", "3 tokens to train on, a row needs 5[\\s\\S]*use --seq-len 2 or"),
        ("one.txt", b"a", "0 tokens to train on[\\s\\S]*use more text"),
    ],
)
def test_files_that_cannot_be_used(text: Path, name: str, content: bytes, message: str) -> None:
    path = text / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_at(path)
    assert caught.value.fix
    cache = text / "cache"
    assert name in ("short.txt", "one.txt") or not list(cache.iterdir())


def test_the_sequence_length_that_the_error_names_works(text: Path) -> None:
    path = text / "short.txt"
    path.write_bytes(b"abcd")
    assert len(open_at(path, seq_len=2).train) == 1


def test_folders_that_cannot_be_used(text: Path) -> None:
    with pytest.raises(DataError, match="the folder holds no files"):
        open_at(text)
    (text / "a").write_bytes(b"\0")
    (text / "b").write_bytes(b"\xff")
    with pytest.raises(DataError, match="none of its 2 files is text"):
        open_at(text)


def test_paths_that_cannot_be_used(text: Path) -> None:
    (text / "shakespeare.txt").write_bytes(b"to be")
    with pytest.raises(DataError, match=r"did you mean `shakespeare\.txt`"):
        open_at(text / "shakespear.txt")
    with pytest.raises(DataError, match="cannot find the training data"):
        open_at(text / "no" / "such" / "file")
    os.mkfifo(text / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        open_at(text / "pipe")


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_unreadable_files_and_folders(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(text)
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(DataError, match="Permission denied"):
            open_at(text)
    real = Path.open

    def open_but(self: Path, *args: Any, **named: Any) -> Any:
        return refuse() if self.name == "f003.txt" else real(self, *args, **named)

    monkeypatch.setattr(Path, "open", open_but)
    with pytest.raises(DataError, match=r"f003\.txt[\s\S]*Permission denied"):
        open_at(text)


def test_a_tokenizer_larger_than_the_model(text: Path) -> None:
    (text / "a.txt").write_bytes(b"abc")
    with pytest.raises(DataError, match="256 tokens, the model's vocabulary is 100"):
        open_at(text, vocab_size=100)


def test_a_trained_tokenizer(text: Path, tmp_path: Path) -> None:
    files = write_folder(text, 40)
    trained = train_tokenizer(str(text), 300, tmp_path / "bpe.json")
    found = open_at(text, vocab_size=300, tokenizer=trained.name)
    plain = open_at(text)
    assert found.description["tokens"] < plain.description["tokens"] / 2
    assert found.train.tokens.dtype == np.uint16 and plain.train.tokens.dtype == np.uint8
    both = [*found.train.tokens, *found.heldout.tokens]
    assert both.count(0) == len(files)
    assert found.tokenizer.decode(found.train.tokens).startswith("file 0 é\n")


def test_tokens_are_kept(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(text)
    first = open_at(text)
    monkeypatch.setattr(corpus_module, "read_pieces", pytest.fail)
    again = open_at(text)
    assert np.array_equal(first.train.tokens, again.train.tokens)
    assert first.description == again.description
    assert first.train.fingerprint == again.train.fingerprint
    assert open_at(text, seq_len=9, mask_documents=True).train.seq_len == 9


def test_a_changed_text_is_read_again(text: Path) -> None:
    write_folder(text)
    first = open_at(text)
    (text / "d0" / "f000.txt").write_bytes(b"changed")
    second = open_at(text)
    assert first.train.fingerprint != second.train.fingerprint
    assert any(b"changed\0" in part for part in decoded(second))


def test_a_kill_leaves_nothing_that_is_taken_for_tokens(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(text)
    cache = text.parent / "cache"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            open_at(text)
    assert not list(cache.iterdir())
    fresh, stale = cache / "a.tokens.fresh", cache / "a.tokens.stale"
    for left in (fresh, stale):
        left.write_bytes(b"half")
    long_ago = time.time() - 1e6
    os.utime(stale, (long_ago, long_ago))
    assert open_at(text).description["documents"] == 60
    assert fresh.exists() and not stale.exists()


@pytest.mark.parametrize(
    "keep", [slice(0), slice(3), slice(500), slice(-1), slice(1, None), slice(-16, None)]
)
def test_a_cut_token_file_is_made_again(text: Path, keep: slice) -> None:
    write_folder(text)
    path = Path(open_at(text).description["cache"])
    whole = path.read_bytes()
    # Replaced, as a copy would be: cutting a file that is mapped would be a bus error.
    path.unlink()
    path.write_bytes(whole[keep])
    open_at(text)
    assert path.read_bytes() == whole


def test_processes_that_start_at_once_agree(text: Path) -> None:
    write_folder(text)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: open_at(text), range(4)))
    assert len({corpus.train.fingerprint for corpus in found}) == 1
    assert len(list((text.parent / "cache").iterdir())) == 1


def test_an_unusable_cache_is_noted_and_done_without(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(text)
    blocked = text.parent / "file"
    blocked.write_bytes(b"")
    found = open_at(text, cache=str(blocked / "cache"))
    assert found.description["cache"] == "temporary"
    assert "cannot be used: Not a directory" in found.description["notes"][0]
    normal = open_at(text)
    assert np.array_equal(found.train.tokens, normal.train.tokens)
    assert found.train.fingerprint == normal.train.fingerprint
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(RunError, match=r"nowhere to write[\s\S]*--data\.cache"):
        open_at(text, cache=str(blocked / "cache"))


def test_the_cache_folder_follows_the_environment(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(text)
    monkeypatch.setenv("XDG_CACHE_HOME", str(text.parent / "xdg"))
    where = Path(open_at(text, cache=None).description["cache"])
    assert where.parent == text.parent / "xdg" / "meshwright" / "data"
