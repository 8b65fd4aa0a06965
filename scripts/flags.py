"""Flags to configuration: every field of `TrainConfig` is a flag, read in two stages.

``--config FILE`` and ``--model NAME`` are taken out first, because they set the defaults of all
the others; then tyro reads the rest on top of them. So a flag wins over the file, and the file
over the default; when a run is resumed, its own saved file stands in for ``--config``. One form
sets the fields of a model: ``--model llama-1b --model.layers 4``.

tyro draws flags and help from the types and docstrings of the configuration, but it does not
build it: it would print an error of ours inside a box with its lines run together, and refuse a
file that is right only with the flags. It is handed a struct rule that returns plain nested
values, and `build` does the rest. Mistakes in flags and values are put in this project's words
for the same reason. No jax is imported here, and tyro only when words are read.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

from meshwright.models.config import MODELS, ModelConfig, named
from meshwright.sharding.errors import ConfigError, MeshwrightError
from meshwright.train.config import TrainConfig, default_config
from meshwright.train.configfile import (
    build,
    convert,
    field_types,
    inner_type,
    load,
    merge,
    near_fields,
    tree,
)

__all__ = ["FlagReader", "Option", "parse", "read"]

_HELP = ("-h", "--help")
_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}


@dataclass(frozen=True)
class Option:
    """A flag with one value that is not a field: it is taken out before tyro reads the rest."""

    flag: str
    metavar: str
    help: str


_CONFIG = Option("--config", "FILE", "YAML file of settings; flags win over it.")
_MODEL = Option(
    "--model", "NAME", f"A named size, whose fields --model.FIELD changes: {', '.join(MODELS)}."
)


class _Refused(Exception):
    """Carries an error past tyro, which would print any ValueError itself."""


def parse(argv: Sequence[str], verb: str) -> TrainConfig:
    """Make the configuration that the flags of a verb ask for; see `read`."""
    return read(argv, verb)[0]


def read(
    argv: Sequence[str], verb: str, *, about: str = "", options: Sequence[Option] = ()
) -> tuple[TrainConfig, dict[str, str]]:
    """Make the configuration that the flags ask for, and return the verb's own options.

    Args:
        argv: the words after the verb.
        verb: its name, for help and errors.
        about: what it does, for its help.
        options: flags of the verb that are not fields.

    Returns:
        The configuration, and the values of the options that were given, by flag.

    Raises:
        MeshwrightError: an unknown flag, file, model or value, in the four-line form.
        SystemExit: with code 0, after printing the help.
    """
    options = (_CONFIG, _MODEL, *options)
    wants_help = any(word in _HELP for word in argv)
    try:
        given, rest = _take(argv, options)
        file = given.pop("--config", None) or _config_of_resumed(rest)
        values = _defaults(file, given.pop("--model", None))
    except MeshwrightError:
        if not wants_help:
            raise
        given, rest, values = {}, _HELP, tree(default_config())
    reader = FlagReader(TrainConfig, f"meshwright {verb}", about, options=options)
    return build(reader.read(rest, values)), given


def _take(argv: Sequence[str], options: Sequence[Option]) -> tuple[dict[str, str], list[str]]:
    """Take the options out of the words; each once, and with a value."""
    given: dict[str, str] = {}
    rest = []
    words = list(reversed(argv))
    metavars = {option.flag: option.metavar for option in options}
    while words:
        word = words.pop()
        flag, equals, value = word.partition("=")
        if flag not in metavars:
            rest.append(word)
            continue
        if flag in given:
            raise ConfigError(f"the flag `{flag}` is given twice", fix="give it once")
        if not equals:
            following = words[-1] if words else None
            if _no_value(following):
                _refuse_unfinished(flag, metavars[flag], following)
            value = words.pop()
        given[flag] = value
    return given, rest


def _config_of_resumed(words: Sequence[str]) -> str | None:
    """The configuration saved in the run to resume: it goes on as it began, but for the flags."""
    if "--resume" not in words:
        return None
    pairs = zip(words, [*words[1:], ""], strict=True)
    spaced = [following for word, following in pairs if word == "--out"]
    joined = [word.partition("=")[2] for word in words if word.startswith("--out=")]
    for folder in (*spaced, *joined):
        saved = Path(folder) / "config.yaml"
        if folder and saved.is_file():
            return str(saved)
    return None


def _defaults(file: str | None, model: str | None) -> dict[str, Any]:
    """What the flags are put on top of. A named model replaces the file's, fields and all."""
    values = tree(default_config())
    if file is not None:
        values = merge(values, load(file), file)
    if model is not None:
        values["model"] = tree(named(model))
    return values


@dataclass(frozen=True)
class FlagReader:
    """tyro over a tree of dataclasses, returning nested values in place of an instance.

    Attributes:
        root: the dataclass at the top; each class may occur once in its tree.
        prog: the program and verb, for the help and errors.
        about: what it does, for the help.
        positional: a field of the root that is written without a flag.
        options: flags that were taken out already, shown in the help.
    """

    root: type
    prog: str
    about: str = ""
    positional: str = ""
    options: Sequence[Option] = ()

    def flags(self) -> dict[str, Any]:
        """Every flag and the type of its field, the ``no-`` forms included."""
        found: dict[str, Any] = {option.flag: str for option in self.options}
        for path, hint in _walk(self.root, ""):
            if path != self.positional:
                found[_flag(path)] = hint
            if hint is bool:
                found[_flag(path, "no-")] = hint
        return found

    def read(self, words: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
        """Put the values of the words over ``values``, the whole tree of defaults.

        Raises:
            ConfigError: an unknown flag, a flag without a value, a value of another type.
            SystemExit: with code 0, after printing the help.
        """
        import tyro

        flags = self.flags()
        wants_help = any(word in _HELP for word in words)
        if wants_help:
            words = _HELP[:1]  # help is asked for where another word is wrong
        _check_words(words, flags)
        registry = tyro.constructors.ConstructorRegistry()
        sections = dict(_sections(self.root, "", values))

        @registry.struct_rule
        def to_values(info: Any) -> Any:
            if info.type not in sections:
                return None
            fields = tuple(self._fields(info.type, *sections[info.type], wants_help))
            return tyro.constructors.StructConstructorSpec(lambda **found: found, fields)

        try:
            found, unknown = tyro.cli(
                self.root,
                prog=self.prog,
                description=self.about,
                args=words,
                return_unknown_args=True,
                registry=registry,
            )
        except _Refused as refused:
            raise refused.args[0] from None
        filled = _fill(values, found)
        if self.positional and unknown and not unknown[0].startswith("-"):
            filled[self.positional] = unknown.pop(0)
        if unknown:
            self._refuse(unknown[0], words, flags)
        return filled

    def _fields(
        self, cls: type, prefix: str, section: Mapping[str, Any], wants_help: bool
    ) -> Iterator[Any]:
        from tyro.conf import Positional, Suppress, UseAppendAction, arg
        from tyro.constructors import MISSING_NONPROP, StructFieldSpec

        for option in self.options if cls is self.root else ():
            shown = section["model"]["name"] if option is _MODEL else None
            shown_as: Any = Annotated[str | None, arg(name=option.flag[2:], metavar=option.metavar)]
            yield StructFieldSpec(f"option {option.flag}", shown_as, shown, option.help)
        for name, hint in field_types(cls).items():
            kind: Any = hint
            default = section[name]
            if dataclasses.is_dataclass(hint):
                default = MISSING_NONPROP
            elif get_origin(hint) is tuple:
                # An empty default, because tyro would add to a file's rules, not replace them.
                kind, default = UseAppendAction[Annotated[hint, arg(metavar="RULE")]], ()
            elif name == self.positional:
                # tyro 1.0 mishandles one beside unknown words, so it is for the help only.
                kind = Positional[Annotated[hint, arg(metavar=name.upper())]]
                kind = kind if wants_help else Suppress[hint]
            elif hint is not bool:
                kind = Annotated[hint, _leaf(_flag(prefix + name), hint)]
            if (cls, name) == (ModelConfig, "name"):
                kind = Suppress[kind]  # --model NAME sets it, and all that it stands for
            yield StructFieldSpec(name, kind, default, _lazy_doc(cls, name))

    def _refuse(self, word: str, words: Sequence[str], flags: Mapping[str, Any]) -> NoReturn:
        flag = word.partition("=")[0].replace("_", "-")
        if word.startswith("--"):
            raise ConfigError(f"there is no flag `{flag}`", fix=self._nearest(flag, flags))
        place = list(words).index(word)
        two_before, before = [other.replace("_", "-") for other in ["", "", *words][place:][:2]]
        if flags.get(before) is bool:
            _refuse_value(before, word)
        why, fix = "it is neither a flag nor the value of one", f"see {self.prog} --help"
        if two_before in flags:
            repeats = get_origin(flags[two_before]) is tuple
            why = f"`{two_before}` takes one value"
            fix = f"write {two_before} {word}" if repeats else "put a value with spaces in quotes"
        raise ConfigError(f"cannot use the word `{word}`", why=why, fix=fix)

    def _nearest(self, flag: str, flags: Mapping[str, Any]) -> str:
        if flag == "--model.name":
            return "write --model NAME to choose a named size"
        inside = [known for known in flags if known.startswith(f"{flag}.") and ".no-" not in known]
        if inside:
            return f"it is a group of flags: {', '.join(inside)}"
        path = re.sub(r"(^|\.)no-", r"\1", flag[2:]).replace("-", "_")
        near = get_close_matches(flag, [option.flag for option in self.options])
        paths = [] if near and "." not in flag else near_fields(self.root, path)
        near = [known for path in paths if (known := _flag(path)) in flags] + near
        if near:
            return f"did you mean {' or '.join(f'`{known}`' for known in near)}?"
        return f"see {self.prog} --help"


def _check_words(words: Sequence[str], flags: Mapping[str, Any]) -> None:
    """Refuse a flag without its value, or with one too many: tyro has a box of its own for it."""
    for word, following in zip(words, [*words, None][1:], strict=True):
        name, equals, value = word.partition("=")
        flag = name.replace("_", "-")
        if flags.get(flag) is bool and equals:
            _refuse_value(flag, value)
        if flags.get(flag, bool) is not bool and not equals and _no_value(following):
            _refuse_unfinished(flag, _metavar(flags[flag]), following)


def _refuse_value(flag: str, value: str) -> NoReturn:
    positive = re.sub(r"(^--|\.)no-", r"\1", flag)
    raise ConfigError(
        f"cannot use the word `{value}`",
        why=f"`{flag}` takes no value",
        fix=f"write {positive} or {_flag(positive[2:], 'no-')}",
    )


def _no_value(word: str | None) -> bool:
    """Whether a word after a flag is not its value: none is left, or a flag that is no number."""
    return word is None or (word.startswith("-") and isinstance(_scalar(word, float), str))


def _refuse_unfinished(flag: str, metavar: str, following: str | None) -> NoReturn:
    fix = f"write {flag} {metavar}"
    if following is not None:
        fix += f", or {flag}={following} if that is its value"
    raise ConfigError(f"the flag `{flag}` has no value", fix=fix)


def _leaf(flag: str, hint: Any) -> Any:
    """How tyro shows a field with one value and converts its word."""
    from tyro.constructors import PrimitiveConstructorSpec

    def from_words(words: list[str]) -> Any:
        try:
            return convert(_scalar(words[0], hint), hint, flag)
        except ConfigError as error:
            raise _Refused(error) from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=_metavar(hint),
        instance_from_str=from_words,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


def _scalar(text: str, hint: Any) -> Any:
    """What a config file would hold where the command line has this text."""
    kind, optional = inner_type(hint)
    if optional and text.lower() == "none":
        return None
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if str(choice) == text), text)
    for number in (int, float) if kind in (int, float) else ():
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _metavar(hint: Any) -> str:
    kind, _ = inner_type(hint)
    if get_origin(kind) is Literal:
        return f"{{{','.join(map(str, get_args(kind)))}}}"
    return _METAVARS.get(kind, "RULE")


def _walk(cls: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted paths and types of the fields that are flags."""
    for name, hint in field_types(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _walk(hint, f"{prefix}{name}.")
        elif (cls, name) != (ModelConfig, "name"):
            yield f"{prefix}{name}", hint


def _sections(
    cls: Any, prefix: str, values: Mapping[str, Any]
) -> Iterator[tuple[type, tuple[str, Mapping[str, Any]]]]:
    """Each dataclass of a tree with the prefix of its fields and their values."""
    yield cls, (prefix, values)
    for name, hint in field_types(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _sections(hint, f"{prefix}{name}.", values[name])


def _fill(values: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """What tyro found, less the options, and with the default of a list that was not given."""
    filled = {}
    for name, default in values.items():
        value = found[name]
        if isinstance(default, dict):
            value = _fill(default, value)
        filled[name] = (list(value) or default) if isinstance(value, tuple) else value
    return filled


def _flag(path: str, prefix: str = "") -> str:
    group, dot, name = path.rpartition(".")
    return f"--{group}{dot}{prefix}{name}".replace("_", "-")


def _lazy_doc(cls: type, name: str) -> Callable[[], str | None]:
    return lambda: _docs(cls).get(name)  # only the help reads sources


@cache
def _docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass; none where the source is not to be had."""
    try:
        source = inspect.getsource(cls)
    except OSError:
        return {}
    body = ast.parse(textwrap.dedent(source)).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for field, doc in itertools.pairwise(body):
        match field, doc:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(value=ast.Constant(str(text))):
                docs[name] = " ".join(text.split())
    return docs
