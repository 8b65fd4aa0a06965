"""Calibrations as JSON files: written whole or not at all, and refused if they cannot be true.

================  =======================================================================
key               what it holds (JSON; FLOP/s, bytes a second, seconds, bytes)
================  =======================================================================
``schema``        ``meshwright.calibration/1``
``device_kind``   as jax names the device; ``cpu`` for simulated devices
``platform``      ``tpu``, ``gpu`` or ``cpu``
``device_count``  devices of this machine; all but the links are measured on one of them
``jax``, ``date`` version, and when in UTC
``matmuls``       [{dtype, m, k, n, rate}], ``rate`` being {value, low, high, noisy}
``memory``        {buffer_bytes, rate}: reads and writes of one buffer added up
``attention``     {kernel, dtype, batch, length, heads, head_dim, forward, backward} or null
``links``         [{kind, devices, bandwidth, latency_seconds, points [[wire bytes, seconds]]}]
``matmul_flops``  dtype → the best of ``matmuls``; like the next three for reading only:
                  a document whose copies disagree with the tables is refused
``memory_bandwidth``, ``attention_flops``, ``link_bandwidth``
================  =======================================================================

Keys are only added; those that are not known are left alone. Reading costs a millisecond and
needs no jax. The copies at the end are for people and for tools that want one number, so a file
in which somebody changed one of them and not the measurement is refused: ignoring the change in
silence would be worse. Rejected: YAML, which would make 1e12 a word.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from meshwright.sharding.calibration import (
    AttentionRate,
    Calibration,
    LinkRate,
    MatmulRate,
    MemoryRate,
    Rate,
)
from meshwright.sharding.errors import ConfigError, RunError

__all__ = [
    "CALIBRATION_SCHEMA",
    "calibration_from_json",
    "calibration_json",
    "check_replaceable",
    "load_calibration",
    "save_calibration",
]

CALIBRATION_SCHEMA = "meshwright.calibration/1"

_FAMILY = CALIBRATION_SCHEMA.partition("/")[0] + "/"
_LARGEST_BYTES = 1 << 20
_AGAIN = "measure again with: meshwright calibrate --out FILE"
_COPIES = ("matmul_flops", "memory_bandwidth", "attention_flops", "link_bandwidth")


def calibration_json(calibration: Calibration) -> dict[str, Any]:
    """The document of the module's table."""
    document: dict[str, Any] = {"schema": CALIBRATION_SCHEMA, **_plain(calibration)}
    return document | {name: getattr(calibration, name) for name in _COPIES}


def calibration_from_json(document: Any) -> Calibration:
    """Make the calibration of a document; keys that are not known are left alone.

    Raises:
        ConfigError: another schema, a key that is missing, a number that is not positive, or
            copies that disagree with the tables.
    """
    found = document.get("schema") if isinstance(document, dict) else None
    if found != CALIBRATION_SCHEMA:
        raise ConfigError(
            "cannot read this document as a calibration",
            why=f"its schema is {str(found)[:60]!r}, not {CALIBRATION_SCHEMA!r}",
            fix=_AGAIN,
        )
    try:
        calibration = Calibration(
            matmuls=tuple(_made(MatmulRate, entry) for entry in _list(document, "matmuls")),
            memory=_made(MemoryRate, document["memory"]),
            attention=_optional(AttentionRate, document["attention"]),
            links=tuple(_made(LinkRate, entry) for entry in _list(document, "links")),
            **{name: _typed(document, name, str) for name in ("device_kind", "platform")},
            **{name: _typed(document, name, str) for name in ("jax", "date")},
            device_count=_typed(document, "device_count", int),
        )
    except KeyError as error:
        raise _no_calibration(f"the key {error} is missing") from None
    except ConfigError as error:
        raise _no_calibration(f"{error.what}: {error.why}" if error.why else error.what) from None
    for name in _COPIES:
        if name in document and document[name] != getattr(calibration, name):
            raise ConfigError(
                "cannot read this document as a calibration",
                why=f"`{name}` does not agree with the measurements it is a copy of",
                fix=f"change both, or {_AGAIN}",
            )
    return calibration


def _no_calibration(why: str) -> ConfigError:
    return ConfigError("cannot read this document as a calibration", why=why, fix=_AGAIN)


def _plain(value: Any) -> Any:
    """The same value made of what JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return fields | {"noisy": value.noisy} if isinstance(value, Rate) else fields
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return value


def _made(cls: Callable[..., Any], entry: Any) -> Any:
    """An instance of one of this module's classes from the keys it knows."""
    if not isinstance(entry, Mapping):
        raise ConfigError(f"`{json.dumps(entry)[:60]}` stands where a table should")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # always a dataclass
        match field.type:
            case "Rate":
                values[field.name] = _made(Rate, entry[field.name])
            case "str":
                values[field.name] = _typed(entry, field.name, str)
            case "int":
                values[field.name] = _typed(entry, field.name, int)
            case "float":
                values[field.name] = _typed(entry, field.name, float)
            case _:
                pairs = _list(entry, field.name)
                if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
                    raise ConfigError(f"`{field.name}` must be a list of pairs")
                values[field.name] = tuple((size, seconds) for size, seconds in pairs)
    return cls(**values)


def _optional(cls: Callable[..., Any], entry: Any) -> Any:
    return None if entry is None else _made(cls, entry)


def _list(entry: Mapping[str, Any], name: str) -> list[Any]:
    return _typed(entry, name, list)


def _typed(entry: Mapping[str, Any], name: str, kind: type) -> Any:
    value = entry[name]
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise ConfigError(
            f"`{name}` is `{json.dumps(value)[:60]}`, not of the type {kind.__name__}"
        )
    if kind is not float or isinstance(value, float):
        return value
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"`{name}` is too large") from None


def load_calibration(path: str | Path) -> Calibration:
    """Read a calibration file.

    Raises:
        ConfigError: no such file, not JSON, another schema, or numbers that cannot have been
            measured.
    """
    document = _parsed(str(path), _read(Path(path)))
    try:
        return calibration_from_json(document)
    except ConfigError as error:
        raise _unreadable(str(path), error.why, error.fix) from None


def save_calibration(calibration: Calibration, path: str | Path) -> None:
    """Write a calibration file whole or not at all, in place of an older one if there is one.

    Raises:
        RunError: another kind of file is there, or the folder cannot be written.
    """
    check_replaceable(path)
    target = Path(path)
    text = json.dumps(calibration_json(calibration), indent=2) + "\n"
    try:
        target = target.expanduser().resolve()  # a link keeps pointing at what it points at
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise _unwritable(target, error) from None


def check_replaceable(path: str | Path) -> None:
    """Refuse a place for a calibration before a minute is spent on measuring one.

    Raises:
        RunError: something is there that is no calibration, or the folder cannot be written.
    """
    target = Path(path)
    try:
        target = target.expanduser()
        taken = target.exists() and not _is_calibration(target)
        folder = target.resolve().parent
        probe = folder / f".{secrets.token_hex(8)}"
        if not taken:
            try:
                probe.touch(exist_ok=False)
            finally:
                probe.unlink(missing_ok=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unwritable(target, error) from None
    if taken:
        raise RunError(
            f"will not overwrite `{target}` with a calibration",
            why="it is a folder" if target.is_dir() else "it is there and is no calibration file",
            fix="name another file with --out FILE, or remove that one first",
        )


def _is_calibration(path: Path) -> bool:
    """Whether a file says it is a calibration, of this version or another."""
    if not path.is_file():  # reading a pipe or a terminal would wait for ever
        return False
    try:
        document = json.loads(_read(path))
    except (ConfigError, ValueError, RecursionError):
        return False
    schema = document.get("schema") if isinstance(document, dict) else None
    return isinstance(schema, str) and schema.startswith(_FAMILY)


def _unwritable(target: Path, error: Exception) -> RunError:
    return RunError(
        f"cannot write the calibration file `{target}`",
        why=getattr(error, "strerror", None) or str(error),
        fix="name a file in a folder that exists, can be written and has space: --out FILE",
    )


def _parsed(path: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        why = f"it is not JSON: line {error.lineno}, column {error.colno}: {error.msg}"
    except RecursionError:
        why = "it is nested too deeply"
    except ValueError as error:  # a number of more digits than Python reads
        why = str(error)
    raise _unreadable(path, why, _AGAIN)


def _read(path: Path) -> str:
    try:
        with path.expanduser().open("rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise _unreadable(str(path), "there is no such file", f"make one: {_AGAIN}") from None
    except IsADirectoryError:
        raise _unreadable(str(path), "it is a folder", "give the file in it") from None
    except UnicodeDecodeError:
        raise _unreadable(str(path), "it is not UTF-8 text", _AGAIN) from None
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a null character
        why = getattr(error, "strerror", None) or str(error)
        raise _unreadable(str(path), why, "give a file that you may read") from None
    if len(content) > _LARGEST_BYTES:
        raise _unreadable(str(path), "it is over 1 MiB", "give a calibration file")
    return text


def _unreadable(path: str, why: str, fix: str) -> ConfigError:
    return ConfigError(f"cannot use the calibration file `{path}`", why=why, fix=fix)
