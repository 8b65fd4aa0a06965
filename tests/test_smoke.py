"""The few tests that must also pass on the newest Python and jax: everything imports, it trains.

Parity on a mesh is a smoke test too; it carries the same mark where it is written.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    f"meshwright.{room}.{path.stem}"
    for room in ("sharding", "models", "train", "scripts")
    for path in sorted(ROOT.joinpath(room).glob("*.py"))
    if path.stem != "__init__"
]

pytestmark = pytest.mark.smoke


def test_every_module_imports() -> None:
    for name in MODULES:
        import_module(name)


def test_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    import meshwright

    assert meshwright.__version__ == version("meshwright")


def test_two_steps_on_eight_simulated_devices(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "meshwright", "train", "--topology", "cpu:8", "--steps", "2"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["steps"] == 2
    assert summary["loss"] > 0
