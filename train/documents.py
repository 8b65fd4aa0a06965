"""Finds the documents to train on and reads them as pieces of clean UTF-8 text.

Without a path the text is the source of Python's own standard library: real, always there, and
the same for everyone who runs the same Python. Its test folders are left out: what remains is more
of one kind, and its 12 MB (Python 3.11) become tokens in a fraction of a second, where the tests
would add 20 MB to everybody's first run.

A document is a file, or one line of a ``.jsonl`` file. Text means UTF-8 without NUL bytes; token
0 of the byte tokenizer, end of document, relies on the second half. In a folder a file that is
something else is skipped and reported; named by itself, it is an error. Whether a file is text
is decided by its first 64 MB: reading all of a large file twice to find one stray byte near its
end costs more than the error which that byte raises instead.

Long documents come in pieces of about a megabyte, cut after a newline where there is one, so
that memory stays bounded and a tokenizer has several strings to work on at once. Listing and
reading are apart, so that a run whose tokens are cached only lists.
"""

from __future__ import annotations

import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

from meshwright.sharding.errors import DataError, did_you_mean

__all__ = ["FileEntry", "Piece", "Source", "find_source", "read_pieces"]

_PIECE_BYTES = 1 << 20
_BLOCK_BYTES = 64 << 20
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


@dataclass(frozen=True)
class FileEntry:
    """One file of a source: enough to tell that it changed, without reading it.

    Attributes:
        name: path relative to the source's root, with forward slashes.
        size: bytes.
        mtime_ns: time of the last change, nanoseconds.
    """

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Source:
    """Where the text is; nothing has been read yet.

    Attributes:
        kind: `stdlib`, one `file`, or a `folder`.
        root: the folder that the names in `files` start from.
        files: every file, sorted by name.
        label: what to call this source in a summary.
    """

    kind: Literal["stdlib", "file", "folder"]
    root: Path
    files: tuple[FileEntry, ...]
    label: str


@dataclass(frozen=True)
class Piece:
    """A part of one document, in order; most documents are one piece.

    Attributes:
        key: what decides the split the document goes to: a file's name, a jsonl line's text.
        text: UTF-8 without NUL bytes, whole characters, never empty.
        last: this piece ends its document.
    """

    key: bytes
    text: bytes
    last: bool


def find_source(path: str | None) -> Source:
    """List the files at ``path``; None means the Python standard library's own source.

    In a folder, hidden files and folders and links to folders are left out.

    Raises:
        DataError: nothing there, nothing in it, or not readable.
    """
    if path is None:
        return _find_stdlib()
    found = Path(path).expanduser().absolute()
    try:
        if found.is_dir():
            files = tuple(_list_folder(found, _is_visible, _is_visible))
            if not files:
                _refuse_empty(found, "the folder holds no files")
            return Source("folder", found, files, str(found))
        if found.is_file():
            info = found.stat()
            entry = FileEntry(found.name, info.st_size, info.st_mtime_ns)
            return Source("file", found.parent, (entry,), str(found))
        if found.exists():
            raise DataError(
                "cannot read training data from something that is neither a file nor a folder",
                where=f"--data.path {path}",
                fix="name a text file, a .jsonl file or a folder",
            )
    except OSError as error:
        _refuse_unreadable(found, error)
    _refuse_missing(path, found)


def _find_stdlib() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = _SKIPPED_FOLDERS | _TEST_FOLDERS
    try:
        files = tuple(
            _list_folder(root, lambda name: name not in skipped, lambda name: name.endswith(".py"))
        )
    except OSError:
        files = ()
    if not files:
        raise DataError(
            "cannot find the source of Python's standard library to train on",
            where=str(root),
            why="this Python was installed without its .py files",
            fix="name a text file, a .jsonl file or a folder with --data.path",
        )
    return Source("stdlib", root, files, f"Python {platform.python_version()} standard library")


def _is_visible(name: str) -> bool:
    return not name.startswith(".")


def _list_folder(
    root: Path, takes_folder: Callable[[str], bool], takes_file: Callable[[str], bool]
) -> list[FileEntry]:
    """Every file under ``root``, sorted by name, so that the order is the same on any machine."""
    found: list[FileEntry] = []
    folders = [(str(root), "")]
    while folders:
        folder, prefix = folders.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_dir(follow_symlinks=False):
                    if takes_folder(entry.name):
                        folders.append((entry.path, f"{name}/"))
                elif takes_file(entry.name) and entry.is_file():
                    info = entry.stat()
                    found.append(FileEntry(name, info.st_size, info.st_mtime_ns))
    return sorted(found, key=lambda entry: entry.name)


def read_pieces(source: Source, on_skip: Callable[[str], None]) -> Iterator[Piece]:
    """Read every document of ``source`` in order, piece by piece.

    Args:
        source: from `find_source`.
        on_skip: called with the name of each file of a folder that is not text.

    Raises:
        DataError: a file is unreadable, a jsonl line is invalid, or there is no text at all.
    """
    empty = True
    for entry in source.files:
        path = source.root / entry.name
        try:
            with path.open("rb") as file:
                lines = path.suffix == ".jsonl"
                pieces = _read_lines(path, file) if lines else _read_text(path, file, entry.name)
                for piece in pieces:
                    empty = False
                    yield piece
        except _NotTextError as error:
            if source.kind == "file" or not error.at_start:
                raise error.as_data_error() from None
            on_skip(entry.name)
        except OSError as error:
            _refuse_unreadable(path, error)
    if empty:
        first = source.root / source.files[0].name if source.kind == "file" else source.root
        count = len(source.files)
        why = "the file is empty" if source.kind == "file" else f"none of its {count} files is text"
        _refuse_empty(first, why)


class _NotTextError(Exception):
    """A file is not UTF-8 text; carries what an error message needs."""

    def __init__(self, path: Path, offset: int, why: str, *, at_start: bool) -> None:
        super().__init__(why)
        self.path, self.offset, self.why, self.at_start = path, offset, why, at_start

    def as_data_error(self) -> DataError:
        return DataError(
            "cannot train on a file that is not UTF-8 text",
            where=f"{self.path}, byte {self.offset:,}",
            why=self.why,
            fix="convert it to UTF-8 text, for example with `iconv -t UTF-8`, or name another file",
        )


def _read_text(path: Path, file: BinaryIO, name: str) -> Iterator[Piece]:
    """A whole file as one document. Holds one piece back, to know which is the last."""
    key = name.encode("utf-8", errors="surrogateescape")
    held: bytes | None = None
    for text in _read_clean(path, file):
        if held is not None:
            yield Piece(key, held, last=False)
        held = text
    if held is not None:
        yield Piece(key, held, last=True)


def _read_clean(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Checked text of a file, cut after newlines into about a megabyte each."""
    offset, rest = 0, b""
    while True:
        read = file.read(_BLOCK_BYTES)
        block = rest + read
        if not block:
            return
        # The end of the file is not a cut: what is left there has to be whole by itself.
        end = _last_cut(block, 0, len(block)) if read else len(block)
        block, rest = block[:end], block[end:]
        _check_text(path, block, offset)
        yield from _cut(block)
        offset += len(block)


def _cut(text: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(text):
        stop = start + _PIECE_BYTES
        stop = len(text) if stop >= len(text) else _last_cut(text, start, stop)
        yield text[start:stop]
        start = stop


def _last_cut(block: bytes, start: int, stop: int) -> int:
    """Where to end a piece that begins at ``start``: after a newline, or between characters.

    >>> _last_cut(b"ab\\ncd", 0, 5), _last_cut("né".encode(), 0, 2)
    (3, 1)
    """
    newline = block.rfind(b"\n", start, stop)
    if newline >= 0:
        return newline + 1
    lead = stop
    # Back over the bytes 0b10xxxxxx that continue a character; UTF-8 has at most three.
    while lead > start and stop - lead < 4:
        lead -= 1
        if block[lead] & 0xC0 != 0x80:
            return lead if block[lead] >= 0xC0 and lead > start else stop
    return stop


def _check_text(path: Path, block: bytes, offset: int) -> None:
    nul = block.find(b"\0")
    if nul >= 0:
        why = "it holds a NUL byte: a binary file, or text in UTF-16"
        raise _NotTextError(path, offset + nul, why, at_start=offset == 0)
    try:
        block.decode("utf-8")
    except UnicodeDecodeError as error:
        why = f"byte 0x{block[error.start]:02x} there is not UTF-8"
        raise _NotTextError(path, offset + error.start, why, at_start=offset == 0) from None


def _read_lines(path: Path, file: BinaryIO) -> Iterator[Piece]:
    """A document for each line of a .jsonl file; blank lines and empty texts are passed over."""
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        text = _text_of_line(path, number, line)
        pieces = list(_cut(text))
        for position, piece in enumerate(pieces, 1):
            yield Piece(text, piece, last=position == len(pieces))


def _text_of_line(path: Path, number: int, line: bytes) -> bytes:
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            why = f"it holds {type(record).__name__}, not an object"
        elif "text" not in record:
            why = f'it has no "text"; its keys: {", ".join(map(repr, record)) or "none"}'
        elif not isinstance(record["text"], str):
            why = f'its "text" is {type(record["text"]).__name__}, not a string'
        elif "\0" in record["text"]:
            why = 'its "text" holds a NUL character, which stands for the end of a document'
        else:
            return record["text"].encode("utf-8")
    except json.JSONDecodeError as error:
        why = f"it is not JSON: {error.msg} at column {error.colno}"
    except (UnicodeError, RecursionError) as error:
        why = f"it is not UTF-8 text: {error}"
    raise DataError(
        "cannot read a line of a .jsonl file",
        where=f"{path}, line {number:,}",
        why=why,
        fix='write one object a line, such as {"text": "…"}, or remove the line',
    )


def _refuse_missing(path: str, found: Path) -> NoReturn:
    try:
        names = [entry.name for entry in found.parent.iterdir()]
    except OSError:
        names = []
    near = did_you_mean(found.name, names)
    raise DataError(
        "cannot find the training data",
        where=f"--data.path {path}",
        why=f"there is no {found}",
        fix=near
        if near.startswith("did you mean")
        else "name a text file, a .jsonl file or a folder, or leave --data.path out",
    )


def _refuse_empty(path: Path, why: str) -> NoReturn:
    raise DataError(
        "there is no text to train on",
        where=str(path),
        why=why,
        fix="name a text file, a .jsonl file or a folder of them, or leave --data.path out",
    )


def _refuse_unreadable(path: Path, error: OSError) -> NoReturn:
    raise DataError(
        "cannot read the training data",
        where=str(error.filename or path),
        why=error.strerror or str(error),
        fix="make it readable to this user, or name another with --data.path",
    ) from error
