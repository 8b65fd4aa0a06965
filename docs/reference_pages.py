"""Reference pages made from the package: public names by autodoc, commands by their ``--help``.

Two directives for the ``.rst`` pages in docs/reference:

- ``.. public-names:: meshwright.sharding`` documents every name of the package's ``__all__``,
  a section for each module that defines some. Packages import names on first use, so autodoc
  finds no members by looking; the list is ``__all__`` itself, and a name added there is
  documented without touching docs/. A name exported twice is described once, in its own package.
- ``.. commands::`` shows what ``meshwright VERB --help`` prints, for every verb there is.

Docstrings write names in single backticks, for people who read them in an editor. Here those that
are public names become links, and all others code. The alternative, Sphinx's roles in docstrings,
would be noise everywhere else.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import io
import os
import re
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config
from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

from meshwright.scripts.main import VERBS, main

__all__ = [
    "PACKAGES",
    "Commands",
    "PublicNames",
    "help_of",
    "homes",
    "linked",
    "setup",
    "signature_of",
]

PACKAGES = (
    "meshwright.sharding",
    "meshwright.models",
    "meshwright.train",
    "meshwright.testing",
    "meshwright",
)
"""Whose names are documented; the first that has a name describes it."""

_HELP_COLUMNS = 96
_STYLE: Any = Config(napoleon_use_ivar=True, napoleon_use_rtype=False)
_LITERAL = re.compile(r"(``[^`\n]+``)(?=(\w?))")
_IN_BACKTICKS = re.compile(r"(?<![`:\w])`([^`\n]+)`(?![`_\w])")


@functools.cache
def homes() -> dict[str, str]:
    """Every public name, by all its spellings, and the full name it is documented under.

    >>> homes()["meshwright.RunPlan"], homes()["meshwright.sharding.mesh.MeshSpec"]
    ('meshwright.train.RunPlan', 'meshwright.sharding.MeshSpec')
    """
    found: dict[str, str] = {}
    described: dict[int, str] = {}
    for package in PACKAGES:
        module = import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, ModuleType) or name.startswith("__"):
                continue
            home = described.setdefault(id(value), f"{package}.{name}")
            spellings = {name, f"{package}.{name}", f"{_module_of(module, name)}.{name}"}
            found |= {spelling: home for spelling in spellings if spelling not in found}
    return found


def _module_of(package: ModuleType, name: str) -> str:
    inner = getattr(package, "_MODULE_OF", {}).get(name, "")
    return f"{package.__name__}.{inner}".rstrip(".")


def linked(text: str) -> str:
    """Turn single backticks of a docstring into links to public names, or into code.

    >>> linked("as `MeshSpec` and `no_such` do, see ``x`` and :ref:`y`")
    'as :py:obj:`~meshwright.sharding.MeshSpec` and ``no_such`` do, see ``x`` and :ref:`y`'
    """

    def role(found: re.Match[str]) -> str:
        name = found[1]
        home = homes().get(name)
        owner = homes().get(name.rpartition(".")[0])
        if home is None and owner:  # a method or a field of a public class
            return f":py:obj:`{name} <{owner}>`"
        return f":py:obj:`~{home}`" if home else f"``{name}``"

    # ``Array``s: markup ends only where no letter follows.
    return _LITERAL.sub(lambda m: m[1] + ("\\ " if m[2] else ""), _IN_BACKTICKS.sub(role, text))


def help_of(verb: str) -> str:
    """What ``meshwright VERB --help`` prints, or ``meshwright --help`` for no verb."""
    words = [verb, "--help"] if verb else ["--help"]
    said = io.StringIO()
    plain = {"COLUMNS": str(_HELP_COLUMNS), "NO_COLOR": "1", "TERM": "dumb"}
    with mock.patch.dict(os.environ, plain), contextlib.redirect_stdout(said):
        if code := main(words):
            raise RuntimeError(f"meshwright {' '.join(words)} ended with exit code {code}")
    return said.getvalue().rstrip() + "\n"


class PublicNames(SphinxDirective):
    """``.. public-names:: PACKAGE``, its content the modules to begin with, in that order."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        package = import_module(self.arguments[0])
        first = [word for line in self.content for word in line.split()]
        groups: dict[str, list[str]] = {name: [] for name in first}
        for name in package.__all__:
            if not isinstance(getattr(package, name), ModuleType) and not name.startswith("__"):
                inner = getattr(package, "_MODULE_OF", {}).get(name, "")
                groups.setdefault(inner, []).append(name)
        order = [*first, *sorted(set(groups) - set(first))]
        text = "\n".join(self._section(package, group, groups[group]) for group in order)
        return self.parse_text_to_nodes(text, allow_section_headings=True)

    def _section(self, package: ModuleType, group: str, names: list[str]) -> str:
        full = {name: f"{package.__name__}.{name}" for name in names}
        here = [name for name in names if homes()[full[name]] == full[name]]
        elsewhere = [n for n in names if n not in here]
        lines: list[str] = []
        if not names:
            raise self.error(f"no public name of {package.__name__} comes from `{group}`")
        if here and group:
            about = inspect.getdoc(import_module(f"{package.__name__}.{group}")) or ""
            lines += [group, "-" * len(group), "", linked(about.splitlines()[0]), ""]
        for name in elsewhere:
            lines += [f"- ``{full[name]}`` is :py:obj:`{homes()[full[name]]}`.", ""]
        for name in here:
            lines += _documented(package, name)
        return "\n".join(lines)


def _documented(package: ModuleType, name: str) -> list[str]:
    value = getattr(package, name)
    full = f"{package.__name__}.{name}"
    if inspect.isclass(value):
        return [f".. autoclass:: {full}", ""]
    if inspect.isroutine(value):
        return [f".. autofunction:: {full}", ""]
    home = _module_of(package, name)
    about = ModuleAnalyzer.for_module(home).find_attr_docs().get(("", name))
    if about is None:  # an alias of a type: what it stands for says it
        about = [f"``{re.sub(r'[a-z_.]+[.](?=[A-Z])', '', str(value))}``"]
    return [f".. py:data:: {full}", "", *(f"   {linked(line)}" for line in about), ""]


class Commands(SphinxDirective):
    """``.. commands::`` has a section for each verb: what it is for and its help."""

    def run(self) -> list[nodes.Node]:
        found: list[nodes.Node] = [_block(help_of(""))]
        for verb, (_, about) in VERBS.items():
            title = f"meshwright {verb}"
            text = f"{title}\n{'-' * len(title)}\n\n{about[0].upper()}{about[1:]}.\n"
            section, *_ = self.parse_text_to_nodes(text, allow_section_headings=True)
            assert isinstance(section, nodes.section)
            section += _block(help_of(verb))
            found.append(section)
        return found


def _block(text: str) -> nodes.literal_block:
    return nodes.literal_block(text, text, language="text")


class _Docstring(GoogleDocstring):
    """Google style as napoleon reads it, with several attributes on one line as this code has."""

    def _consume_fields(self, *args: Any, **kwargs: Any) -> Any:
        return super()._consume_fields(*args, **{**kwargs, "multiple": True})


def _mend(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make reStructuredText of a docstring.

    napoleon would take the words before a colon in the docstring of a field for its type, so
    those are read as any other docstring.
    """
    kind: Any = "method" if what in ("attribute", "data", "property") else what
    text = linked("\n".join(lines))
    lines[:] = _Docstring(text, _STYLE, app, kind, name, obj, options).lines()


class _Words(str):
    """Text that is shown as it is, where `inspect` shows the ``repr`` of a value."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def signature_of(value: Any) -> tuple[str, str]:
    """The arguments and the result of a class or function, annotated as its source is.

    autodoc would evaluate the annotations and show where jax and the standard library keep their
    types today. Names this package exports are written in full with a tilde, Sphinx's form of a
    link that shows the last part; defaults that are no plain values are dots.

    >>> from meshwright.sharding import MeshSpec
    >>> signature_of(MeshSpec.fill)
    ("(device_count: int, devices: str = '')", '~meshwright.sharding.MeshSpec')
    """
    found = inspect.signature(value)
    arguments = [
        argument.replace(
            annotation=_annotation(argument.annotation), default=_default(argument.default)
        )
        for argument in found.parameters.values()
        if argument.name != "self"
    ]
    result = _annotation(found.return_annotation)
    result = "" if result is inspect.Signature.empty or inspect.isclass(value) else str(result)
    return str(inspect.Signature(arguments)), result


def _annotation(found: Any) -> Any:
    if not isinstance(found, str):
        return (
            found if found is inspect.Signature.empty else _Words(inspect.formatannotation(found))
        )

    def full(word: re.Match[str]) -> str:
        home = homes().get(word[0])
        return f"~{home}" if home and home.rpartition(".")[2][0].isupper() else word[0]

    return _Words(re.sub(r"[A-Za-z_][\w.]*", full, found))


def _default(found: Any) -> Any:
    if found is inspect.Signature.empty:
        return found
    if callable(found):
        return _Words(getattr(found, "__name__", "...").replace("<lambda>", "..."))
    try:
        ast.literal_eval(repr(found))
    except (SyntaxError, ValueError):
        return _Words("...")
    return found


def _sign(app: Sphinx, what: str, name: str, obj: Any, *others: Any) -> tuple[str, str] | None:
    del app, name, others
    return signature_of(obj) if what in ("class", "exception", "function", "method") else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("public-names", PublicNames)
    app.add_directive("commands", Commands)
    app.connect("autodoc-process-docstring", _mend)
    app.connect("autodoc-process-signature", _sign)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
