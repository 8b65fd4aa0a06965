"""Text made into tokens once, split into training and held-out parts, and opened as windows.

The tokens of a text go into one file in a cache folder, named after everything they depend on:
the files' paths, sizes and times, the tokenizer, the held-out fraction. A second run opens it as
a memory map and reads nothing else, however large it is. The file is written under another name
and then renamed, so several processes, or a kill, never leave half a file under the real one;
what describes the file stands at its end, so writing it is one pass, and a cut file is noticed.

A document is held out when a hash of its name (of its text, for a line of ``.jsonl``) falls below
the fraction: documents added later never move the others, and the seed or mesh plays no part, so
held-out losses of different runs compare. Where documents are so few or so uneven that this holds
out less than half the fraction or more than twice, as with a single file, the tail of the tokens
is held out instead.

Each process makes its own tokens where the cache has none. Letting one make them for all would
need a shared folder, which the processes of a run need not have.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import secrets
import shutil
import struct
import tempfile
import time
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from meshwright.sharding.errors import DataError, RunError
from meshwright.train.config import DataConfig
from meshwright.train.documents import Piece, Source, find_source, read_pieces
from meshwright.train.tokenizer import Tokenizer, load_tokenizer
from meshwright.train.windows import Windows

__all__ = ["Corpus", "open_corpus"]

_VERSION = 1
_MAGIC = b"mwtokens"
_FOOTER = struct.Struct("<Q8s")  # length of the description before it, magic
_SUFFIX = ".tokens"
_GROUP_BYTES = 16 << 20
_STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Corpus:
    """Tokenised text, ready to be read as windows.

    Attributes:
        train: windows to train on; a short last one is dropped.
        heldout: windows to evaluate on; a short last one is padded, so every token counts.
        tokenizer: what made the tokens.
        description: what a run's summary says: `source`, `documents`, `bytes`, `tokens`,
            `train_tokens`, `heldout_tokens`, `split`, `skipped_files`, `tokenizer`,
            `vocab_size`, `cache`, and `notes`, sentences that a person should see.
    """

    train: Windows
    heldout: Windows
    tokenizer: Tokenizer
    description: dict[str, Any]


@dataclass(frozen=True)
class _Stored:
    """What a token file says of itself.

    Attributes:
        dtype: of the tokens.
        tokens, documents: how many there are.
        cut: tokens before the held-out documents, which come last.
        bytes: of the text.
        skipped: files that were not text: their number.
        digest: of the tokens and of where documents end.
    """

    dtype: str
    tokens: int
    documents: int
    cut: int
    bytes: int
    skipped: int
    digest: str


def open_corpus(data: DataConfig, *, seq_len: int, vocab_size: int) -> Corpus:
    """Open the text that ``data`` names, tokenising it if that has not been done before.

    Args:
        data: the run's `data` fields.
        seq_len: tokens of a training row.
        vocab_size: the model's; the tokenizer's may not be larger.

    Raises:
        DataError: no text, text that cannot be read, too little of it, or too large a vocabulary.
        MissingExtraError: a trained tokenizer is asked for and `tokenizers` is not installed.
        RunError: there is nowhere to write the tokens.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            "the tokenizer has more tokens than the model",
            where=f"--data.tokenizer {data.tokenizer}",
            why=f"{tokenizer.vocab_size:,} tokens, the model's vocabulary is {vocab_size:,}",
            fix=f"set --model.vocab-size {tokenizer.vocab_size} or more",
        )
    source = find_source(data.path)
    notes: list[str] = []
    mapped, stored, where = _find_tokens(source, tokenizer, data, notes)
    tokens = np.frombuffer(mapped, stored.dtype, stored.tokens)
    ends_at = _aligned(tokens.nbytes)
    ends = np.frombuffer(mapped, np.int64, stored.documents, ends_at)
    cut, split = _choose_cut(stored, data.heldout_fraction)
    _check_length(cut, seq_len, source)
    options = {
        "seq_len": seq_len,
        "mask_documents": data.mask_documents,
        "fingerprint": f"{stored.digest}:{cut}",
    }
    inside = int(np.searchsorted(ends, cut))
    train_ends = np.append(ends[:inside], cut)
    heldout_ends = ends[inside + int(ends[inside] == cut) :] - cut
    if stored.skipped:
        notes.append(f"skipped {stored.skipped:,} files that are not UTF-8 text")
    return Corpus(
        train=Windows(tokens[:cut], train_ends, **options),
        heldout=Windows(tokens[cut:], heldout_ends, pad_last=True, **options),
        tokenizer=tokenizer,
        description={
            "source": source.label,
            "documents": stored.documents,
            "bytes": stored.bytes,
            "tokens": stored.tokens,
            "train_tokens": cut,
            "heldout_tokens": stored.tokens - cut,
            "split": split,
            "skipped_files": stored.skipped,
            "tokenizer": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "cache": where,
            "notes": notes,
        },
    )


def _choose_cut(stored: _Stored, fraction: float) -> tuple[int, str]:
    """Where the held-out tokens begin, and how that was chosen."""
    share = (stored.tokens - stored.cut) / stored.tokens
    if stored.cut and fraction / 2 <= share <= min(2 * fraction, (1 + fraction) / 2):
        return stored.cut, "by document"
    # Two tokens are the least that have a target.
    return stored.tokens - max(2, round(stored.tokens * fraction)), "the tail of the tokens"


def _check_length(train_tokens: int, seq_len: int, source: Source) -> None:
    if train_tokens > seq_len:
        return
    longest = train_tokens - 1
    raise DataError(
        "the text is shorter than one training row",
        where=source.label,
        why=f"{max(train_tokens, 0):,} tokens to train on, a row needs {seq_len + 1:,} "
        f"(--seq-len {seq_len} and one more)",
        fix=f"use --seq-len {longest} or less, or more text" if longest > 0 else "use more text",
    )


def _find_tokens(
    source: Source, tokenizer: Tokenizer, data: DataConfig, notes: list[str]
) -> tuple[mmap.mmap, _Stored, str]:
    """The token file, mapped: from the cache, made for it, or made in a temporary place."""
    name = _key(source, tokenizer, data.heldout_fraction) + _SUFFIX
    try:
        folder = _cache_folder(data.cache)
        path = folder / name
        found = _open_tokens(path)
        if found is None:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_stale(folder)
            _write_tokens_file(path, source, tokenizer, data.heldout_fraction)
            found = _open_tokens(path)
        if found is not None:
            return *found, str(path)
        reason = "the file just written there is not whole"
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home folder
        reason = f"{error.strerror or error}" if isinstance(error, OSError) else str(error)
    notes.append(f"tokens are not kept for the next run, the cache cannot be used: {reason}")
    try:
        with tempfile.TemporaryFile() as file:
            _write_tokens(file, source, tokenizer, data.heldout_fraction, aside_in=None)
            file.flush()
            found = _map_tokens(file)
    except OSError as error:
        raise RunError(
            "there is nowhere to write the tokens of the training text",
            where=f"{data.cache or 'the cache folder'}: {reason}; "
            f"the temporary folder: {error.strerror or error}",
            why=f"about {sum(entry.size for entry in source.files):,} bytes of text to tokenise",
            fix="free some space, or name a folder with --data.cache",
        ) from error
    assert found is not None
    return *found, "temporary"


def _cache_folder(chosen: str | None) -> Path:
    if chosen is not None:
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "meshwright" / "data"


def _key(source: Source, tokenizer: Tokenizer, fraction: float) -> str:
    """A name that differs where the tokens may."""
    parts = {
        "version": _VERSION,
        "root": str(source.root),
        "files": [(entry.name, entry.size, entry.mtime_ns) for entry in source.files],
        "tokenizer": tokenizer.fingerprint,
        "heldout_fraction": fraction,
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _open_tokens(path: Path) -> tuple[mmap.mmap, _Stored] | None:
    try:
        with path.open("rb") as file:
            return _map_tokens(file)
    except FileNotFoundError:
        return None


def _map_tokens(file: BinaryIO) -> tuple[mmap.mmap, _Stored] | None:
    """Map a token file. None if it is not whole, which a kill or a full disk may cause."""
    size = os.fstat(file.fileno()).st_size
    if size < _FOOTER.size:
        return None
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    length, magic = _FOOTER.unpack(mapped[size - _FOOTER.size :])
    begin = size - _FOOTER.size - length
    if magic != _MAGIC or begin < 0:
        return None
    try:
        stored = _Stored(**json.loads(mapped[begin : size - _FOOTER.size]))
    except (TypeError, ValueError):
        return None
    tokens = stored.tokens * np.dtype(stored.dtype).itemsize
    return (mapped, stored) if begin == _aligned(tokens) + 8 * stored.documents else None


def _aligned(size: int) -> int:
    return -(-size // 8) * 8


def _remove_stale(folder: Path) -> None:
    """Remove what killed runs left; a file in the making is younger than a day."""
    for left in folder.glob(f"*{_SUFFIX}.*"):
        with contextlib.suppress(OSError):  # another process may be quicker
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()


def _write_tokens_file(path: Path, source: Source, tokenizer: Tokenizer, fraction: float) -> None:
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            _write_tokens(file, source, tokenizer, fraction, aside_in=path.parent)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class _Part:
    """Training or held-out documents on their way to a file."""

    file: BinaryIO
    dtype: np.dtype[Any]
    end_id: int
    digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    tokens: int = 0
    ends: array[int] = field(default_factory=lambda: array("q"))

    def add(self, ids: np.ndarray, last: bool) -> None:
        ids = ids.astype(self.dtype, copy=False)
        if last:
            ids = np.append(ids, self.dtype.type(self.end_id))
        data = ids.tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.tokens += len(ids)
        if last:
            self.ends.append(self.tokens)


def _write_tokens(
    file: BinaryIO, source: Source, tokenizer: Tokenizer, fraction: float, *, aside_in: Path | None
) -> None:
    """Tokenise ``source`` into ``file``: tokens, held-out ones last; ends; description; footer."""
    sizes = (np.uint8, np.uint16, np.uint32)
    dtype = np.dtype(next(t for t in sizes if tokenizer.vocab_size - 1 <= np.iinfo(t).max))
    skipped: list[str] = []
    size = 0
    # The held-out part is small; it waits in a file of its own until the first part is done.
    with tempfile.TemporaryFile(dir=aside_in) as aside:
        train = _Part(file, dtype, tokenizer.end_id)
        heldout = _Part(aside, dtype, tokenizer.end_id)
        for group in _groups(read_pieces(source, skipped.append)):
            encoded = tokenizer.encode_batch([piece.text for piece in group])
            for piece, ids in zip(group, encoded, strict=True):
                part = heldout if _is_held_out(piece.key, fraction) else train
                part.add(ids, piece.last)
                size += len(piece.text)
        aside.seek(0)
        shutil.copyfileobj(aside, file, 1 << 20)
    tokens = train.tokens + heldout.tokens
    file.write(b"\0" * (_aligned(tokens * dtype.itemsize) - tokens * dtype.itemsize))
    ends = np.concatenate(
        [np.array(train.ends, np.int64), np.array(heldout.ends, np.int64) + train.tokens]
    )
    file.write(ends.tobytes())
    digest = hashlib.blake2b(train.digest.digest() + heldout.digest.digest(), digest_size=16)
    digest.update(ends.tobytes())
    stored = _Stored(
        dtype=dtype.name,
        tokens=tokens,
        documents=len(ends),
        cut=train.tokens,
        bytes=size,
        skipped=len(skipped),
        digest=digest.hexdigest(),
    )
    description = json.dumps(asdict(stored)).encode()
    file.write(description + _FOOTER.pack(len(description), _MAGIC))


def _groups(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces some megabytes at a time: enough for every core, little enough to hold."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text)
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _is_held_out(key: bytes, fraction: float) -> bool:
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
