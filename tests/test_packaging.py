"""What is published is what users get: sdist, wheel from that sdist, a new environment, a run.

The wheel is built from the unpacked sdist, as installers do, so a file missing from the sdist
fails here. Everything happens in a copy: building in the checkout would leave `build/` behind,
whose stale modules setuptools would put in the next wheel. The new environment borrows the
dependencies of this one through a path file, so that nothing but our wheel is installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "meshwright": "sharding/_root",
    "meshwright/models": "models",
    "meshwright/scripts": "scripts",
    "meshwright/sharding": "sharding",
    "meshwright/train": "train",
}
FOLDERS = ("sharding", "models", "train", "scripts", "tests", "docs")
FILES = ("pyproject.toml", "MANIFEST.in", "LICENSE", "README.md")
PAGES = tuple(
    str(path.relative_to(ROOT))
    for suffix in ("css", "html", "js")
    for path in sorted(ROOT.joinpath("sharding").glob(f"*.{suffix}"))
)

pytestmark = pytest.mark.wheel


def run(command: Sequence[str | Path], cwd: Path) -> str:
    # No PYTHONPATH, and pip's own settings stay: the new environment must stand by itself.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def need_build_tools() -> None:
    try:
        ready = int(version("setuptools").split(".")[0]) >= 80 and bool(version("pip"))
    except PackageNotFoundError:
        ready = False
    if not ready:
        reason = "building needs pip and setuptools>=80: pip install -e '.[test]'"
        # A machine that publishes must not skip the proof that what it publishes works.
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_build_tools()
    work = tmp_path_factory.mktemp("build")
    copy, out = work / "copy", work / "sdist"
    ignore = shutil.ignore_patterns("__pycache__", "_build", "*.egg-info", ".*_cache")
    for folder in FOLDERS:
        if ROOT.joinpath(folder).exists():
            shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for file in FILES:
        shutil.copy(ROOT / file, copy / file)
    out.mkdir()
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run([sys.executable, "-c", build, out], cwd=copy)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    out = sdist.parent.parent / "wheel"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    run([*command, "--no-index", "--wheel-dir", out, sdist], cwd=sdist.parent)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def environment(wheel: Path) -> Path:
    """A new virtual environment, outside the checkout, with the wheel in it."""
    place = wheel.parent.parent / "environment"
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    (packages,) = place.glob("lib/python*/site-packages")
    # Path files found on a path that a path file added are not read: an editable install of
    # this checkout stays behind.
    borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    packages.joinpath("borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps"]
    run([*command, "--no-index", "--force-reinstall", "--ignore-installed", wheel], cwd=place)
    return place


def test_sdist_holds_sources_tests_and_licence(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {*FILES, *PAGES, "sharding/_root/py.typed", "tests/conftest.py"}
    for folder in ("sharding", "sharding/_root", "models", "train", "scripts"):
        needed |= {str(path.relative_to(ROOT)) for path in ROOT.joinpath(folder).glob("*.py")}
    assert not needed - names


def test_wheel_holds_our_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        scripts = archive.read(entry_points).decode()
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    expected = {"meshwright/py.typed", *(f"meshwright/{path}" for path in PAGES)}
    for package, folder in PACKAGES.items():
        expected |= {f"{package}/{path.name}" for path in ROOT.joinpath(folder).glob("*.py")}
    assert names == expected
    assert "meshwright = meshwright.scripts.main:main" in scripts
    assert "[pytest11]\nmeshwright = meshwright.sharding.pytest_plugin" in scripts
    assert licences


def test_wheel_is_what_the_new_environment_imports(environment: Path) -> None:
    program = (
        "import importlib.util as u, meshwright as m, meshwright.sharding.errors as e\n"
        "print(m.__file__, m.__version__, e.__file__, sep='\\n')\n"
        "print(*[n for n in ('sharding', 'models', 'train', 'scripts') if u.find_spec(n)])"
    )
    out = run([environment / "bin" / "python", "-c", program], cwd=environment)
    root, number, errors, stray = out.splitlines()
    assert Path(root).is_relative_to(environment)
    assert Path(errors).is_relative_to(environment)
    assert f"meshwright-{number}.dist-info" in {
        path.name for path in environment.glob("lib/python*/site-packages/*")
    }
    assert stray == "", f"importable at the top level: {stray}"


def test_wheel_trains(environment: Path, tmp_path: Path) -> None:
    out = run([environment / "bin" / "meshwright", "train", "--steps", "2"], cwd=tmp_path)
    assert json.loads(out.splitlines()[-1])["steps"] == 2


def test_version_is_written_once() -> None:
    import meshwright

    assert f'version = "{meshwright.__version__}"' in ROOT.joinpath("pyproject.toml").read_text()
