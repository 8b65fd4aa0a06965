"""Every example in a docstring of the package runs, one test a module.

pytest's own ``--doctest-modules`` would import ``sharding/mesh.py`` under the name its path
suggests, beside ``meshwright.sharding.mesh``: two copies of every class. So the modules are
imported here by the names users write, and handed to doctest.
"""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "meshwright": "sharding/_root",
    "meshwright.models": "models",
    "meshwright.scripts": "scripts",
    "meshwright.sharding": "sharding",
    "meshwright.train": "train",
}


def modules_with_examples() -> list[str]:
    found = []
    for package, folder in FOLDERS.items():
        for path in sorted(ROOT.joinpath(folder).glob("*.py")):
            if ">>> " in path.read_text(encoding="utf-8"):
                found.append(package if path.stem == "__init__" else f"{package}.{path.stem}")
    return found


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(import_module(name), optionflags=flags)
    assert result.attempted, f"{name} has examples that doctest does not find"
    assert not result.failed, f"{result.failed} of {result.attempted} examples failed, see stdout"
