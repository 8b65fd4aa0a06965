"""A configuration as a YAML file: read strictly, written so that it reads back the same.

A file holds the fields of `TrainConfig` that differ from the defaults, nested as the tree is::

    model: llama-1b          # or a mapping: name, and the fields to change
    mesh: fsdp=4,tensor=2
    optimizer:
      learning_rate: 1e-3

Nothing in it is guessed. An unknown key, a value of another type (3.7 for a whole number, 'no'
for true or false) and a key given twice are refused with the file, the key and the nearest
name that exists: a setting that is ignored in silence is a wrong run found late.

PyYAML follows YAML 1.1, where ``1e-3`` is text, ``no`` is false and ``10:13`` is the number 613.
The loader here reads the scalars of YAML 1.2's core schema instead. The writer quotes whatever
either version would misread, so that other programs read a saved configuration as it was meant.
General libraries (cattrs, msgspec, pydantic) were tried: each is too lenient or too slow to
import for a command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from meshwright.models.config import MODELS, ModelConfig, named
from meshwright.sharding.errors import ConfigError, did_you_mean
from meshwright.train.config import TrainConfig

__all__ = [
    "apply",
    "build",
    "convert",
    "describe_type",
    "dump",
    "field_types",
    "inner_type",
    "load",
    "merge",
    "near_fields",
    "tree",
]

_HEADER = "# Read it back with: meshwright train --config FILE\n"
_LARGEST_BYTES = 1 << 20

# The scalars of YAML 1.2's core schema, with the characters each can begin with.
_SCALARS = (
    ("null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")),
    ("int", re.compile(r"[-+]?[0-9]+\Z"), list("-+0123456789")),
    (
        "float",
        re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z"),
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars, and no key twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key `{key.value}` is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or YAML 1.2 would read as something else."""

    def represent_text(self, text: str) -> yaml.Node:
        # Unless it is escaped, PyYAML reads a line separator such as U+0085 back as a blank.
        style = None if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


for _kind, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, _first)
_Dumper.add_representer(str, _Dumper.represent_text)
# PyYAML reads 010 as eight; int does not.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(node.value))


def dump(config: TrainConfig) -> str:
    """Write every field, so that a saved run does not depend on later defaults.

    Returns:
        YAML text from which `load` and `apply` make an equal configuration.
    """
    options = {"sort_keys": False, "allow_unicode": True, "width": math.inf}
    return _HEADER + yaml.dump(tree(config), Dumper=_Dumper, **options)


def load(path: str | Path) -> dict[str, Any]:
    """Read a file into the mapping it holds; `apply` checks its keys and values.

    Raises:
        ConfigError: no such file, unreadable, binary, not YAML, a key given twice, empty, or
            not a mapping.
    """
    text = _read(Path(path))
    try:
        found = yaml.load(text, Loader=_Loader)  # a SafeLoader: it makes no objects
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _unreadable(path, _summary(error), "correct it there") from None
    if found is None:
        raise _unreadable(path, "it is empty", "write fields into it, such as steps: 1000")
    if not isinstance(found, dict):
        why = f"it holds {_shown(found)}, not fields"
        raise _unreadable(path, why, "write fields into it, such as steps: 1000")
    return found


def apply(base: TrainConfig, mapping: Mapping[str, Any], file: str) -> TrainConfig:
    """Return ``base`` with the fields of ``mapping`` in place of its own.

    Args:
        base: where all other fields come from.
        mapping: what `load` returned.
        file: its name, for errors.

    Raises:
        ConfigError: an unknown key or a value of another type.
        MeshwrightError: fields that do not go together, see `TrainConfig`.
    """
    return build(merge(tree(base), mapping, file))


def tree(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts, with lists for tuples: what `dump` writes."""
    values = {}
    for name in field_types(type(config)):
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            value = tree(value)
        values[name] = list(value) if isinstance(value, tuple) else value
    return values


def merge(values: Mapping[str, Any], mapping: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Put a file's fields into a whole tree of values, checking names and types only.

    What the values mean together is for `build`, once everything is merged: a file may be
    wrong without the flags that come with it.
    """
    return _merge(TrainConfig, values, mapping, "", file)


def build(values: Mapping[str, Any]) -> TrainConfig:
    """Make the configuration of a whole tree of values."""
    return _build(TrainConfig, values)


@cache
def field_types(cls: type) -> dict[str, Any]:
    """The fields of a dataclass in order, with their types resolved."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def near_fields(cls: type, path: str) -> list[str]:
    """Fields of a tree, as dotted paths, whose names come close to a misspelt one.

    Those of the same group go first; then the same or a similar name in another group.

    >>> near_fields(TrainConfig, "optimizer.learing_rate"), near_fields(TrainConfig, "qk")
    (['optimizer.learning_rate'], [])
    >>> near_fields(TrainConfig, "learning_rate")
    ['optimizer.learning_rate']
    """
    group, _, key = path.rpartition(".")
    split = {known: known.rpartition(".") for known in _paths(cls, "")}
    for pool in ([known for known, part in split.items() if part[0] == group], list(split)):
        names = [split[known][2] for known in pool]
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
        if near:
            return [known for known in pool if split[known][2] in near]
    return []


def convert(value: Any, hint: Any, name: str, where: str = "") -> Any:
    """Return ``value`` as the type a field has; a whole number may stand for a number.

    Args:
        value: a scalar or list, as YAML has them.
        hint: the field's type: int, float, bool, str, a Literal, tuple[str, ...], or one of
            these or None.
        name: the field or flag, for errors.
        where: the file it was written in, for errors.

    Raises:
        ConfigError: the value is of another type, or not one of the choices.

    >>> convert(3, float, "loss.z_loss")
    3.0
    """
    kind, optional = inner_type(hint)
    if optional and value is None:
        return None
    if get_origin(kind) is Literal:
        for choice in get_args(kind):
            if type(value) is type(choice) and value == choice:
                return choice
    elif get_origin(kind) is tuple:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return list(value)
    elif kind is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    elif type(value) is kind:
        return value
    raise ConfigError(
        f"cannot set `{name}` to {_shown(value)}",
        where=where,
        why=f"it takes {describe_type(hint)}",
        fix=_near_value(value, kind),
    )


def describe_type(hint: Any) -> str:
    """Say in words what a field takes.

    >>> describe_type(int | None), describe_type(Literal["cosine", "wsd"])
    ('a whole number or none', 'one of cosine, wsd')
    """
    kind, optional = inner_type(hint)
    tail = " or none" if optional else ""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}{tail}"
    if get_origin(kind) is tuple:
        return f"a list of texts{tail}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words[kind] + tail


def inner_type(hint: Any) -> tuple[Any, bool]:
    """A field's type without its None, and whether it had one.

    >>> inner_type(int | None)
    (<class 'int'>, True)
    """
    if get_origin(hint) in (Union, types.UnionType):
        (kind,) = (part for part in get_args(hint) if part is not type(None))
        return kind, True
    return hint, False


def _merge(
    cls: Any, values: Mapping[str, Any], mapping: Mapping[str, Any], prefix: str, file: str
) -> dict[str, Any]:
    merged = dict(values)
    for key, value in mapping.items():
        path = f"{prefix}{key}"
        hint = field_types(cls).get(key)
        if hint is None:
            fix = _nearest_key(path, str(key), cls)
            raise ConfigError(f"there is no field `{path}`", where=file, fix=fix)
        if dataclasses.is_dataclass(hint):
            nested = _section(hint, value, path, file)
            under = merged[key]
            if hint is ModelConfig and "name" in nested:
                under = _named_model(nested, file)
            merged[key] = _merge(hint, under, nested, f"{path}.", file)
        else:
            merged[key] = convert(value, hint, path, file)
    return merged


def _nearest_key(path: str, key: str, cls: type) -> str:
    if "." in key:
        group, _, name = key.partition(".")
        return f"nest it: {group}: and under it, indented, {name}:"
    near = near_fields(TrainConfig, path)
    if near:
        return f"did you mean {' or '.join(f'`{name}`' for name in near)}?"
    return did_you_mean(key, field_types(cls))


def _section(hint: Any, value: Any, path: str, file: str) -> dict[str, Any]:
    if hint is ModelConfig and isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict):
        return value
    first = next(name for name in field_types(hint) if name != "name")
    raise ConfigError(
        f"cannot set `{path}` to {_shown(value)}",
        where=file,
        why="it is a group of fields" + (", or a model's name" * (hint is ModelConfig)),
        fix=f"write {path}: and under it, indented, its fields, such as {first}:",
    )


def _named_model(nested: Mapping[str, Any], file: str) -> dict[str, Any]:
    """What a model section starts from: a named size; a name of one's own needs every size."""
    name = convert(nested["name"], str, "model.name", file)
    if name in MODELS:
        return tree(named(name))
    fields = dataclasses.fields(ModelConfig)
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in nested]
    if missing:
        raise ConfigError(
            f"there is no model `{name}`",
            where=file,
            why=f"a model of your own gives {', '.join(missing)} as well",
            fix=did_you_mean(name, MODELS),
        )
    defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    return {
        name: tree(value) if dataclasses.is_dataclass(value) else value
        for name, value in defaults.items()
    }


def _build(cls: Any, values: Mapping[str, Any]) -> Any:
    made = {}
    for name, hint in field_types(cls).items():
        value = values[name]
        if dataclasses.is_dataclass(hint):
            value = _build(hint, value)
        made[name] = tuple(value) if isinstance(value, list) else value
    return cls(**made)


def _near_value(value: Any, kind: Any) -> str:
    """The nearest value that works, as one would write it; empty where none comes to mind."""
    if get_origin(kind) is Literal:
        words = [str(choice) for choice in get_args(kind)]
        if str(value) in words:
            return f"write {value}, without quotes"
        near = difflib.get_close_matches(str(value), words, n=1)
        return f"did you mean `{near[0]}`?" if near else ""
    if isinstance(value, str):
        return _near_text(value, kind)
    if kind is int and type(value) is float and math.isfinite(value):
        low, high = math.floor(value), math.ceil(value)
        return f"use {low}" if low == high else f"use {low} or {high}"
    if kind is str and value is not None and not isinstance(value, dict | list):
        return f"put it in quotes: '{_shown(value)}'"
    return ""


def _near_text(value: str, kind: Any) -> str:
    resolved = next((name for name, pattern, _ in _SCALARS if pattern.match(value)), "str")
    if kind is float and resolved in ("int", "float") or kind is int and resolved == "int":
        return f"write {value}, without quotes"
    if kind is bool:
        said = {"yes": "true", "on": "true", "true": "true"}
        said |= {"no": "false", "off": "false", "false": "false"}
        if value.lower() in said:
            return f"write {said[value.lower()]}"
    if get_origin(kind) is tuple:
        return f"write [{value}]"
    return ""


def _paths(cls: Any, prefix: str) -> Iterator[str]:
    for name, hint in field_types(cls).items():
        yield f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            yield from _paths(hint, f"{prefix}{name}.")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
    except FileNotFoundError:
        fix = "give its path; a run saves its own as OUT/config.yaml"
        raise _unreadable(path, "there is no such file", fix) from None
    except IsADirectoryError:
        fix = "give the file in it, such as config.yaml"
        raise _unreadable(path, "it is a folder", fix) from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        why = getattr(error, "strerror", None) or str(error)
        raise _unreadable(path, why, "give a file that you may read") from None
    if len(content) > _LARGEST_BYTES:
        raise _unreadable(path, "it is over 1 MiB", "give a YAML file of settings")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        why = "it is not UTF-8 text"
        raise _unreadable(path, why, "give a YAML file of settings") from None


def _unreadable(path: str | Path, why: str, fix: str) -> ConfigError:
    return ConfigError(f"cannot read the config file `{path}`", why=why, fix=fix)


def _summary(error: Exception) -> str:
    """One line of what PyYAML says in several."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    if isinstance(error, yaml.reader.ReaderError):
        return "it holds control characters, so it is not text"
    return " ".join(str(error).split())
