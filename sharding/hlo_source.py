"""Where an instruction came from: the file and stack-frame tables of compiled text.

XLA prints either ``source_file`` and ``source_line`` in an instruction's metadata, or a
``stack_frame_id`` into four tables (FileNames, FunctionNames, FileLocations, StackFrames). A
frame names its location and its caller. The innermost frame is rarely the useful one: a
``convert_element_type`` comes from deep inside a library, and the reader wants the line of the
model that asked for it; so the chain is walked outwards to the first file that is the user's.

Parents are written plus one by the versions seen (a root has parent 1, and a frame may seem to be
its own parent), because 0 stands for none before printing; a table that has a parent 0 is read
without the shift.
"""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["SourceTable", "is_users", "located"]

_LIBRARIES = re.compile(
    r"(?:^|/)(?:site-packages|dist-packages|lib/python3\.\d+)/|(?:^|/)(?:jax|jaxlib|flax|optax)/"
    r"_?src/|^<|^$"
)
# The models are what a user reads and changes; the rest of the package moves them about.
_MACHINERY = re.compile(r"(?:^|/)(?:meshwright/)(?:sharding|train|scripts)/[^/]*$")
_TITLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_ROW = re.compile(r'(\d+) (?:"((?:[^"\\]|\\.)*)"|\{([^{}\n]*)\})[ \t]*(?:\n|\Z)')
_NUMBER = re.compile(r"(\w+)=(\d+)")


def is_users(file: str) -> bool:
    """Whether a file is the user's: not of an installed library, nor of our own machinery.

    >>> is_users("/me/train.py"), is_users("/v/lib/python3.11/site-packages/optax/_src/base.py")
    (True, False)
    """
    return not (_LIBRARIES.search(file) or _MACHINERY.search(file))


class SourceTable:
    """The four tables, filled while a text is read; empty for texts without them."""

    def __init__(self) -> None:
        self._files: dict[int, str] = {}
        self._locations: dict[int, tuple[int, int]] = {}
        self._frames: dict[int, tuple[int, int]] = {}
        self._shift: int | None = None

    def read(self, text: str, at: int) -> int:
        """Read the table that begins at ``at``; return where it ends, or 0 if there is none."""
        title = next((t for t in _TITLES if text.startswith(t + "\n", at)), None)
        if title is None:
            return 0
        at += len(title) + 1
        while row := _ROW.match(text, at):
            key, name, inside = int(row.group(1)), row.group(2), row.group(3)
            numbers = {k: int(v) for k, v in _NUMBER.findall(inside or "")}
            if title == "FileNames":
                self._files[key] = name or ""
            elif title == "FileLocations":
                self._locations[key] = (numbers.get("file_name_id", 0), numbers.get("line", 0))
            elif title == "StackFrames":
                frame = (numbers.get("file_location_id", 0), numbers.get("parent_frame_id", 0))
                self._frames[key] = frame
            at = row.end()
        return at

    def lookup(self, metadata: str, is_user: Callable[[str], bool]) -> str:
        """``file:line`` for an instruction's metadata; empty where it has no source."""
        frames = self.frames(metadata)
        for wanted in (is_user, lambda file: not _LIBRARIES.search(file), lambda file: True):
            for file, line in frames:
                if file and wanted(file):
                    return f"{file}:{line}"
        return ""

    def frames(self, metadata: str) -> list[tuple[str, int]]:
        """(file, line) from the innermost frame outwards."""
        inline = re.search(r'source_file="((?:[^"\\]|\\.)*)"', metadata)
        if inline:
            line = re.search(r"source_line=(\d+)", metadata)
            return [(inline.group(1), int(line.group(1)) if line else 0)]
        found = re.search(r"stack_frame_id=(\d+)", metadata)
        if self._shift is None:
            self._shift = int(all(parent for _, parent in self._frames.values()))
        frame, frames, seen = int(found.group(1)) if found else 0, [], set()
        while frame in self._frames and frame not in seen:
            seen.add(frame)
            location, parent = self._frames[frame]
            file, line = self._locations.get(location, (0, 0))
            frames.append((self._files.get(file, ""), line))
            frame = parent - self._shift
        return frames


def located(chatter: str, text: str | None) -> str:
    """What the compiler wrote, its stack-frame numbers looked up in the text of its program.

    Args:
        chatter: lines with metadata such as ``metadata={op_name="jit(f)/add" stack_frame_id=4}``.
        text: of the compiled program, for its tables; None where there is none.
    """
    if text is None or "stack_frame_id=" not in chatter:
        return chatter
    table = SourceTable()
    for title in _TITLES:
        start = text.find(f"\n{title}\n")
        if start >= 0:
            table.read(text, start + 1)

    def place(found: re.Match[str]) -> str:
        file, _, line = table.lookup(found.group(), is_users).rpartition(":")
        return f'source_file="{file}" source_line={line}' if file else found.group()

    return re.sub(r"stack_frame_id=\d+", place, chatter)
