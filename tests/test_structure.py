"""The shape of the source tree: sizes, one-way imports, honest `__all__`, what stays jax-free.

These rules keep the tails short and the command line quick; each is cheap to keep and slow to
win back. All but one are read from the syntax tree, so a broken module is reported, not imported.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A room may import the rooms before it, never one after it.
ROOMS = ("sharding", "models", "train", "scripts")
PACKAGES = ("meshwright", "meshwright.sharding", "meshwright.models", "meshwright.train")
OTHERS = ("docs", "tests")
SOURCES = sorted(path for room in (*ROOMS, *OTHERS) for path in ROOT.joinpath(room).rglob("*.py"))
MODULES = [path for path in SOURCES if path.parent.name in ROOMS]

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
HEAVY = ("jax", "flax", "numpy", "optax", "grain", "orbax")
# The only modules of sharding/ that need jax to be imported.
WITH_JAX = (
    "decisions",
    "dims",
    "logical",
    "placement",
    "placer",
    "report",
    "testing",
    "testing_collectives",
    "testing_compiles",
    "testing_numbers",
)
JAX_FREE = (
    "meshwright",
    *sorted(
        f"meshwright.sharding.{path.stem}"
        for path in MODULES
        if path.parent.name == "sharding" and path.stem not in ("__init__", *WITH_JAX)
    ),
    "meshwright.models.config",
    "meshwright.models.sizes",
    "meshwright.train.config",
    "meshwright.train.configfile",
    "meshwright.train.estimate",
    "meshwright.train.shapes",
    *sorted(f"meshwright.scripts.{path.stem}" for path in MODULES if path.parent.name == "scripts"),
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_source = pytest.mark.parametrize("path", SOURCES, ids=name_of)
each_module = pytest.mark.parametrize("path", MODULES, ids=name_of)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every module this file names in an import, with its line."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            if base == "meshwright":
                yield from ((node.lineno, f"meshwright.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, base


def declared_all(path: Path) -> list[str]:
    for node in tree_of(path).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            targets = [node.target]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
            return ast.literal_eval(node.value)
    pytest.fail(f"{name_of(path)} declares no __all__")


def in_order(names: Iterable[str]) -> list[str]:
    """CONSTANTS, then Classes, then functions, each by the alphabet: what ruff's RUF022 writes."""
    return sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))


def public_definitions(path: Path) -> set[str]:
    """Names without a leading underscore that the file itself defines at its top level."""
    names: set[str] = set()
    for node in tree_of(path).body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Assign():
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return {name for name in names if not name.startswith("_")}


@each_source
def test_files_and_functions_are_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_FILE_LINES, f"{name_of(path)} has {lines} lines"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{name_of(path)}: {node.name} has {length} lines"


@each_source
def test_files_open_with_what_they_are_for(path: Path) -> None:
    assert ast.get_docstring(tree_of(path)), f"{name_of(path)} has no module docstring"


@each_module
def test_imports_run_one_way(path: Path) -> None:
    allowed = ROOMS[: ROOMS.index(path.parent.name) + 1]
    for line, module in imports_of(path):
        assert not module.startswith("."), f"{name_of(path)}:{line} imports relatively: {module}"
        parts = module.split(".")
        if parts[0] == "meshwright" and len(parts) > 1 and parts[1] in ROOMS:
            assert parts[1] in allowed, f"{name_of(path)}:{line} imports {module}"


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem[0] != "_"], ids=name_of)
def test_all_is_complete(path: Path) -> None:
    names = declared_all(path)
    assert len(names) == len(set(names))  # ruff keeps the order (RUF022)
    missing = public_definitions(path) - set(names)
    assert not missing, f"public but not in __all__ (or wants a leading underscore): {missing}"
    module = import_module(f"meshwright.{path.parent.name}.{path.stem}")
    assert not [name for name in names if not hasattr(module, name)]


@pytest.mark.parametrize("package", PACKAGES)
def test_package_exports_resolve(package: str) -> None:
    module = import_module(package)
    names = module.__all__
    assert names == in_order(set(names))
    for name in names:
        value = getattr(module, name)
        is_module = isinstance(value, ModuleType)
        assert is_module == (package == "meshwright" and name in (*ROOMS, "testing")), (
            f"{package}.{name}"
        )
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = module.no_such_name


@pytest.mark.parametrize("package", PACKAGES[1:])
def test_package_lists_agree(package: str) -> None:
    """What type checkers read, what runs and `__all__` are three lists of the same names."""
    path = ROOT / package.split(".")[1] / "__init__.py"
    seen_by_checkers = {
        alias.asname: (node.module or "").rpartition(".")[2]
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    module = import_module(package)
    assert seen_by_checkers == module._MODULE_OF
    assert set(seen_by_checkers) == set(module.__all__)


@pytest.mark.parametrize("package", PACKAGES[1:])
def test_no_export_shares_a_module_name(package: str) -> None:
    """Importing ``package.x`` binds ``x`` to the module and would hide an export called ``x``."""
    room = package.split(".")[1]
    stems = {path.stem for path in MODULES if path.parent.name == room}
    clashes = stems & set(import_module(package).__all__)
    assert not clashes, f"{package}: both a module and an export: {sorted(clashes)}"


def test_light_modules_never_import_jax() -> None:
    """Help and bad flags must not wait for jax: one subprocess imports each light module in turn.

    The offender named is the first module after which a heavy one is loaded.
    """
    program = (
        "import importlib, json, sys\n"
        f"for name in {JAX_FREE!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "    if heavy: print(json.dumps({'module': name, 'loads': heavy})); break\n"
        "else: print(json.dumps(None))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) is None


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name != "scripts"], ids=name_of)
def test_library_modules_do_not_print_to_stdout(path: Path) -> None:
    """The last line of stdout is a program's result; a stream named by ``file=`` is a choice."""
    lines = [
        node.lineno
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
        and (isinstance(node.func, ast.Name) and node.func.id == "print")
        and not any(keyword.arg == "file" for keyword in node.keywords)
    ]
    assert not lines, f"{name_of(path)} prints on lines {lines}"


def test_scripts_do_not_shadow_the_standard_library() -> None:
    """`python scripts/train.py` puts scripts/ first on the path: a tokenize.py there breaks it."""
    stems = {path.stem for path in MODULES if path.parent.name == "scripts"}
    assert not stems & sys.stdlib_module_names


def test_no_file_names_a_private_path_or_a_registry() -> None:
    """Somebody's home folder or package index in a committed file breaks everybody else's copy."""
    private = re.compile(r"(?<![\w./-])/(home|root|Users|work)/\w")
    registry = re.compile(r"https?://[^\s\"']*(pypi|pythonhosted|/simple\b)|\b(extra-)?index-url\b")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout, so which files are the project's is unknown")
    paths = [ROOT / name for name in done.stdout.split("\0") if name]
    found = []
    for path in paths:
        if path == Path(__file__).resolve() or not path.is_file():
            continue
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
            if private.search(line) or registry.search(line):
                found.append(f"{name_of(path)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)
