"""Tokenizers round-trip any text, and refuse files they cannot use."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.sharding.errors import ConfigError, DataError, MissingExtraError, RunError
from meshwright.train.tokenizer import (
    END_OF_DOCUMENT,
    BpeTokenizer,
    ByteTokenizer,
    load_tokenizer,
    train_tokenizer,
)

TEXT = "def add(one, two):\n    return one + two\n\n" * 20 + "añb 日本語 🙂\t  x\r\n"
# Everything UTF-8 can hold except NUL.
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8", newline="")
    return path


@pytest.fixture(scope="module")
def bpe(text_file: Path) -> BpeTokenizer:
    return train_tokenizer(str(text_file), 300, text_file.parent / "bpe.json")


@given(texts)
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == list(text.encode())
    assert tokenizer.end_id not in ids
    assert tokenizer.decode(ids) == text


def test_bytes_decode_whatever_a_model_samples() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([65, 300, -1, 0xC3, 66]) == "A\ufffd\ufffd\ufffdB"
    assert tokenizer.decode([65, 0, 66]) == f"A{END_OF_DOCUMENT}B"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_text_that_is_not_text_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="cannot encode text"):
        ByteTokenizer().encode(text)


def test_bpe_round_trips(bpe: BpeTokenizer) -> None:
    @given(texts)
    def check(text: str) -> None:
        ids = bpe.encode(text)
        assert bpe.end_id not in ids and bpe.decode(ids) == text
        assert not len(ids) or ids.max() < bpe.vocab_size

    check()


def test_bpe_is_shorter_and_ends_documents_with_0(bpe: BpeTokenizer) -> None:
    assert bpe.end_id == 0 and bpe.vocab_size <= 300
    assert len(bpe.encode(TEXT)) < len(TEXT.encode()) / 2
    one, two = bpe.encode_batch([b"return one", "日".encode()])
    assert bpe.decode([*one, 0, *two]) == f"return one{END_OF_DOCUMENT}日"


def test_text_that_spells_the_end_of_a_document_stays_text(bpe: BpeTokenizer) -> None:
    ids = bpe.encode(f"a{END_OF_DOCUMENT}b")
    assert bpe.end_id not in ids and bpe.decode(ids) == f"a{END_OF_DOCUMENT}b"


def test_training_is_deterministic_and_says_what_it_did(
    text_file: Path, bpe: BpeTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "again.json"
    again = train_tokenizer(str(text_file), 300, out)
    assert out.read_bytes() == Path(bpe.name).read_bytes()
    assert again.fingerprint == bpe.fingerprint
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"--data.tokenizer {out}" in captured.err and "tokens on" in captured.err
    assert [path.name for path in out.parent.iterdir()] == ["again.json"]


def test_training_never_overwrites(text_file: Path, bpe: BpeTokenizer) -> None:
    before = Path(bpe.name).read_bytes()
    with pytest.raises(RunError, match="will not overwrite"):
        train_tokenizer(str(text_file), 400, bpe.name)
    assert Path(bpe.name).read_bytes() == before


def test_training_needs_room_for_all_bytes(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use 257 or more"):
        train_tokenizer(str(text_file), 256, tmp_path / "out.json")


def test_a_full_disk_leaves_no_file(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match="No space left"):
        train_tokenizer(str(text_file), 300, tmp_path / "out.json")
    assert not list(tmp_path.iterdir())


def test_load_by_name(bpe: BpeTokenizer) -> None:
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)
    assert load_tokenizer(bpe.name).fingerprint == bpe.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{}", "not a tokenizer.json"),
        ("text", "not a tokenizer.json"),
        (b"\xff\0", "not a tokenizer.json"),
        ("no end", "has none of <|endoftext|>".replace("|", r"\|")),
    ],
)
def test_files_that_are_no_tokenizer(
    content: str | bytes | None, message: str, bpe: BpeTokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    if content == "no end":
        model = json.loads(Path(bpe.name).read_text("utf-8"))
        model["added_tokens"][0]["content"] = "<other>"
        del model["model"]["vocab"][END_OF_DOCUMENT]
        model["model"]["vocab"]["<other>"] = 0
        content = json.dumps(model)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(path))


def test_a_misspelt_bytes_is_recognised() -> None:
    with pytest.raises(DataError, match="did you mean `bytes`"):
        load_tokenizer("byte")


def test_an_unreadable_tokenizer(bpe: BpeTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        load_tokenizer(bpe.name)


def test_without_the_package(
    bpe: BpeTokenizer, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load_tokenizer("bytes").vocab_size == 256
    with pytest.raises(MissingExtraError, match=r"pip install 'meshwright\[train\]'"):
        load_tokenizer(bpe.name)
    with pytest.raises(MissingExtraError, match=r"pip install 'meshwright\[train\]'"):
        train_tokenizer(str(text_file), 300, tmp_path / "out.json")
