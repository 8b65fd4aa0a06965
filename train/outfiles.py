"""Files that a command is asked to write: refused before the work where they cannot be written.

Most of what makes a file unwritable (a folder that does not exist, a name given twice) is known
before anything is computed, and an error after a minute of compiling is an error too late. What
is known only in the act, such as a full disk, is the same error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from meshwright.sharding.errors import ConfigError, RunError

__all__ = ["check_writable", "write_text"]


def check_writable(asked: Mapping[str, str | None]) -> dict[str, Path]:
    """Check the files that flags name.

    Args:
        asked: file names by flag, without its dashes; None where the flag was not given.

    Returns:
        The files to write, by flag.

    Raises:
        ConfigError: two flags name one file.
        RunError: a file that cannot be written.
    """
    files = {flag: Path(name) for flag, name in asked.items() if name}
    for flag, path in files.items():
        other = next((name for name in files if name != flag and files[name] == path), None)
        if other:
            raise ConfigError(
                f"cannot write --{other} and --{flag} to the same file",
                where=str(path),
                fix="name two files",
            )
        folder = path.parent
        why = (
            "it is a folder" if path.is_dir()
            else f"there is no folder `{folder}`" if not folder.is_dir()
            else "" if os.access(path if path.exists() else folder, os.W_OK)
            else "permission denied"
        )  # fmt: skip
        if why:
            raise _cannot(path, why)
    return files


def write_text(path: Path, text: str) -> None:
    """Write a file as UTF-8.

    Raises:
        RunError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _cannot(path, str(error.strerror or error)) from None


def _cannot(path: Path, why: str) -> RunError:
    return RunError(f"cannot write `{path}`", why=why, fix="name another file")
