"""Text to token ids and back: plain bytes, or a trained byte-level BPE.

Both round-trip every text exactly, because both work on UTF-8 bytes: there is no unknown token.
Bytes need nothing trained or installed, and make a model's vocabulary 256; a BPE makes the same
text several times shorter, at the price of a file to keep with the run. A BPE is kept in the
``tokenizer.json`` form of the `tokenizers` package, so files made elsewhere work as well, if they
have a token for the end of a document.

Encoding takes many texts at once, since that is where the BPE can use all cores.
"""

from __future__ import annotations

import abc
import hashlib
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import final

import numpy as np

from meshwright.sharding.errors import (
    ConfigError,
    DataError,
    MissingExtraError,
    RunError,
    did_you_mean,
)
from meshwright.train.documents import Source, find_source, read_pieces

__all__ = [
    "END_OF_DOCUMENT",
    "BpeTokenizer",
    "ByteTokenizer",
    "Tokenizer",
    "load_tokenizer",
    "train_tokenizer",
]

END_OF_DOCUMENT = "<|endoftext|>"
"""How the end of a document is written in decoded text, and called in the tokenizers we train."""

# Names that the end of a document goes by in files made elsewhere.
_END_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>")
_BYTES = 256


class Tokenizer(abc.ABC):
    """Text to ids and back.

    Attributes:
        name: `bytes`, or the file's path.
        vocab_size: one more than the largest id.
        end_id: the id that ends a document; `encode` and `encode_batch` never return it.
        fingerprint: differs when the ids for some text may differ.
    """

    name: str
    vocab_size: int
    end_id: int
    fingerprint: str

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each UTF-8 text, of any unsigned integer dtype."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ``ids``. What is not UTF-8, or no id of ours, becomes U+FFFD."""

    @final
    def encode(self, text: str) -> np.ndarray:
        """Ids of ``text`` as int32, shape (tokens,).

        Raises:
            DataError: the text holds a NUL character or half of a surrogate pair.
        """
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError("cannot encode text that is not Unicode", why=str(error)) from None
        if b"\0" in data:
            raise DataError("cannot encode text with a NUL character", fix="remove it")
        return self.encode_batch([data])[0].astype(np.int32)


@final
class ByteTokenizer(Tokenizer):
    """Every byte is a token. Byte 0, which text never holds, ends a document.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("né").tolist()
    [110, 195, 169]
    >>> tokenizer.decode([110, 195, 169, 0, 110])
    'né<|endoftext|>n'
    """

    def __init__(self) -> None:
        self.name = "bytes"
        self.vocab_size = _BYTES
        self.end_id = 0
        self.fingerprint = "bytes"

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, np.uint8) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        values = np.asarray(ids, np.int64)
        # A model's vocabulary may be larger than ours; 0xff is never part of UTF-8.
        known = np.where((values >= 0) & (values < _BYTES), values, 0xFF).astype(np.uint8)
        documents = known.tobytes().split(b"\0")
        return END_OF_DOCUMENT.join(text.decode("utf-8", errors="replace") for text in documents)


@final
class BpeTokenizer(Tokenizer):
    """A ``tokenizer.json`` file.

    Raises:
        MissingExtraError: the `tokenizers` package is not installed.
        DataError: the file is missing, unreadable, not a tokenizer, or names no end of document.
    """

    def __init__(self, path: str | Path) -> None:
        package = _import_tokenizers()
        raw = _read_tokenizer(Path(path))
        try:
            self._model = package.Tokenizer.from_str(raw.decode("utf-8"))
        except Exception as error:  # the package raises a bare Exception
            raise DataError(
                "cannot use a file as a tokenizer",
                where=str(path),
                why=f"it is not a tokenizer.json file: {error}",
                fix="train one with `meshwright tokenize`, or use `bytes`",
            ) from None
        # Text that happens to spell a special token stays text.
        self._model.encode_special_tokens = True
        self._model.no_truncation()
        self._model.no_padding()
        ids = self._model.get_vocab(with_added_tokens=True)
        ends = [ids[name] for name in _END_NAMES if name in ids]
        if not ends:
            raise DataError(
                "cannot use a tokenizer without a token for the end of a document",
                where=str(path),
                why=f"it has none of {', '.join(_END_NAMES)}",
                fix="train one with `meshwright tokenize`, or use `bytes`",
            )
        self.name = str(path)
        self.vocab_size = max(ids.values()) + 1
        self.end_id = ends[0]
        self.fingerprint = hashlib.sha256(raw).hexdigest()

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        strings = [text.decode("utf-8") for text in texts]
        found = self._model.encode_batch_fast(strings, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32) for encoding in found]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=False)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that ``--data.tokenizer`` names: `bytes`, or a file's path."""
    return ByteTokenizer() if name == "bytes" else BpeTokenizer(Path(name).expanduser())


def train_tokenizer(path: str | None, vocab_size: int, out: str | Path) -> BpeTokenizer:
    """Train a byte-level BPE on the text at ``path`` and write it to ``out``.

    The same text and size give the same file, byte for byte. Says on stderr what it did.

    Args:
        path: as for ``--data.path``; None is Python's standard library.
        vocab_size: tokens at most, the end of a document (id 0) and the 256 bytes included. Text
            with too few repeated parts gives fewer.
        out: the file to write; it must not exist.

    Raises:
        ConfigError: ``vocab_size`` is below 257.
        MissingExtraError: the `tokenizers` package is not installed.
        DataError: no text at ``path``.
        RunError: ``out`` exists or cannot be written.
    """
    if vocab_size < _BYTES + 1:
        raise ConfigError(
            "cannot train a byte-level tokenizer as small as this",
            where=f"vocabulary size {vocab_size}",
            why=f"{_BYTES} bytes and the end of a document need {_BYTES + 1} tokens",
            fix=f"use {_BYTES + 1} or more, or train on bytes, which needs no tokenizer",
        )
    package = _import_tokenizers()
    target = Path(out).expanduser()
    _refuse_existing(target)
    source = find_source(path)
    model = package.Tokenizer(package.models.BPE())
    model.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    model.decoder = package.decoders.ByteLevel()  # pyright: ignore
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        # Every byte has a token, seen or not, so that any text can be encoded.
        initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counted = _Counted(source)
    model.train_from_iterator(iter(counted), trainer=trainer)
    _write_atomically(target, model.to_str(pretty=True).encode("utf-8"))
    trained = BpeTokenizer(target)
    sys.stderr.write(
        f"trained {trained.vocab_size:,} tokens on {counted.size:,} bytes of {source.label}\n"
        f"use it with --data.tokenizer {target}\n"
    )
    return trained


class _Counted:
    """The texts of a source, and how many bytes they had."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.size = 0

    def __iter__(self) -> Iterator[str]:
        for piece in read_pieces(self._source, on_skip=lambda name: None):
            self.size += len(piece.text)
            yield piece.text.decode("utf-8")


def _import_tokenizers():  # noqa: ANN202 - the module itself; its type has no useful name
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "cannot use a trained tokenizer: the `tokenizers` package is not installed",
            why=str(error),
            fix="pip install 'meshwright[train]'",
        ) from None
    return tokenizers


def _read_tokenizer(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        near = did_you_mean(path.name, ["bytes"])
        train = "train one with `meshwright tokenize`, or use `bytes`"
        raise DataError(
            "cannot read the tokenizer",
            where=f"--data.tokenizer {path}",
            why=error.strerror or str(error),
            fix=near if near.startswith("did you mean") else train,
        ) from error


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise RunError(
            "will not overwrite a file with the new tokenizer",
            where=str(target),
            why="it exists, and runs may depend on it",
            fix="name another file, or remove this one first",
        )


def _write_atomically(target: Path, data: bytes) -> None:
    """A reader, or a run after a kill, sees the whole file or none."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            _refuse_existing(target)  # training takes a while; somebody may have been quicker
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            "cannot write the tokenizer",
            where=str(target),
            why=error.strerror or str(error),
            fix="name a file in a folder that can be written and has space",
        ) from error
