"""Plans kept on disk, so that the same question asked again is answered in a moment.

A compile for absent hardware takes from seconds to a minute, and jax's own cache of programs
cannot serve it: entries for such targets are written and can never be read back. What is worth
keeping is the report, which is small. One file an entry, in the user's cache folder, named by a
digest of everything the report depends on: the program or its config, topology, mesh, flags, the
versions of jax and its compilers, and meshwright's own source, for a mended parser must not be
answered with what the broken one said.

A file is a digest of its body, then the body: JSON, compressed. JSON and not pickle: reading a
file that somebody else could write must not run code. A file that does not read as it should is
as good as none, and goes. Writes go to a file of another name first, so that two plans at once
cannot spoil an entry; the least recently used go when the folder is over its limit.

The cache is a convenience: a folder that cannot be written, or a full disk, is no error.
``MESHWRIGHT_PLAN_CACHE=off`` turns it off, another value names the folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from meshwright.sharding.aot_wheels import versions
from meshwright.sharding.topology import Topology

__all__ = [
    "PLAN_CACHE_VARIABLE",
    "cache_folder",
    "cache_key",
    "compiler_facts",
    "lookup",
    "source_fingerprint",
    "store",
]

PLAN_CACHE_VARIABLE = "MESHWRIGHT_PLAN_CACHE"
"""Environment variable: ``off``, or the folder to use."""

_MOST_BYTES = 1 << 30
_SUFFIX = ".plan"
_MAGIC = b"meshwright.plan-cache/1\n"
_ROOMS = ("sharding", "models", "train", "scripts")
# What a compile reads from the environment besides its arguments.
_FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def cache_folder() -> Path | None:
    """Where plans are kept: ``$XDG_CACHE_HOME/meshwright/plans``; None where that is turned off."""
    chosen = os.environ.get(PLAN_CACHE_VARIABLE, "")
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen).expanduser()
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no home folder
        return None
    return Path(home) / "meshwright" / "plans"


def cache_key(facts: Mapping[str, Any]) -> str:
    """Digest of a mapping of JSON values; the order of its keys does not matter.

    >>> cache_key({"a": 1, "b": [2]}) == cache_key({"b": [2], "a": 1})
    True

    Raises:
        TypeError: a value that JSON has no form for, which a key must not be guessed from.
        ValueError: a NaN or an infinity.
    """
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def compiler_facts(topology: Topology) -> dict[str, Any]:
    """What every key has to hold besides the question: versions, sources, compiler flags."""
    try:
        version = metadata.version("meshwright")
    except metadata.PackageNotFoundError:  # run from sources, which are fingerprinted
        version = ""
    return {
        "topology": str(topology),
        "versions": versions(topology),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "meshwright": version,
        "sources": source_fingerprint(),
        "flags": {name: os.environ.get(name, "") for name in _FLAG_VARIABLES},
        "jax": {n: v for n, v in sorted(os.environ.items()) if n.startswith(("JAX_", "FLAX_"))},
    }


@functools.cache
def source_fingerprint() -> str:
    """Digest of meshwright's source files, read once a process; a few milliseconds."""
    digest = hashlib.sha256()
    for room in _ROOMS:
        found = find_spec(f"meshwright.{room}")
        for folder in (found and found.submodule_search_locations) or ():
            for path in sorted(Path(folder).glob("*.py")):
                body = path.read_bytes()
                digest.update(f"{room}/{path.name} {len(body)}\n".encode())
                digest.update(body)
    return digest.hexdigest()


def lookup(key: str) -> Any | None:
    """The value stored under a key; None where there is none that can be read.

    Args:
        key: from `cache_key`.
    """
    folder = cache_folder()
    if folder is None:
        return None
    path = folder / f"{key}{_SUFFIX}"
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    try:
        value = _decoded(raw)
    except ValueError:
        _remove(path)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # used now: the oldest go first
    return value


def store(key: str, value: Any, *, most_bytes: int = _MOST_BYTES) -> bool:
    """Keep a value under a key, replacing what is there.

    Args:
        key: from `cache_key`.
        value: JSON values; tuples come back as lists.
        most_bytes: of the whole folder; the least recently used entries go.

    Returns:
        Whether it was kept: not if the cache is off, its folder cannot be written, the disk is
        full, or the entry alone is over the limit.

    Raises:
        TypeError, ValueError: ``value`` has no JSON form.
    """
    folder = cache_folder()
    if folder is None:
        return False
    raw = _encoded(value)
    if len(raw) > most_bytes:
        return False
    partial = ""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(prefix=".partial-", dir=folder)
        with os.fdopen(descriptor, "wb") as file:
            file.write(raw)
        os.replace(partial, folder / f"{key}{_SUFFIX}")
    except OSError:
        if partial:
            _remove(Path(partial))
        return False
    _shrink(folder, most_bytes, keep=f"{key}{_SUFFIX}")
    return True


def _encoded(value: Any) -> bytes:
    body = zlib.compress(json.dumps(value, separators=(",", ":"), allow_nan=False).encode(), 6)
    return _MAGIC + hashlib.sha256(body).digest() + body


def _decoded(raw: bytes) -> Any:
    """The value of an entry; ValueError for any other bytes."""
    head = len(_MAGIC)
    digest, body = raw[head : head + 32], raw[head + 32 :]
    if raw[:head] != _MAGIC or hashlib.sha256(body).digest() != digest:
        raise ValueError("not an entry, or one that was cut off")
    try:
        return json.loads(zlib.decompress(body))
    except (zlib.error, RecursionError) as error:
        raise ValueError(str(error)) from None


def _shrink(folder: Path, most_bytes: int, keep: str) -> None:
    """Remove the least recently used entries until the folder is within its limit.

    Another process may be doing the same: what is gone is gone. Files that a killed process left
    half-written count as entries, and so go too.
    """
    rows = []
    try:
        for entry in os.scandir(folder):
            if entry.name.endswith(_SUFFIX) or entry.name.startswith(".partial-"):
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                rows.append((found.st_mtime_ns, found.st_size, entry.name))
    except OSError:
        return
    total = sum(size for _, size, _ in rows)
    for _, size, name in sorted(rows):
        if total <= most_bytes:
            return
        if name != keep:
            _remove(folder / name)
            total -= size


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
