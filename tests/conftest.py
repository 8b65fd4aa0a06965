"""Every test sees eight simulated CPU devices, strict promotion and a warm compilation cache.

The device count must be set before jax starts its backend, so it is set here, at import, and no
test sets it again. Compiled programs are kept in the user's cache folder between runs: most of a
cold run is XLA compiling the same small programs. Commands that tests start as subprocesses find
the same cache through the environment.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jax
import parity_table
import pytest
from browsing import Browser, find_browser

from meshwright.sharding.topology import IN_ORDER

# Ours, as the entry point of an install would load it: make_mesh, and the marker of devices.
pytest_plugins = ["pytester", "meshwright.sharding.pytest_plugin"]

DEVICES = 8
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meshwright" / "tests"

# What a test checks is the same program either way; it runs for milliseconds and compiles for
# seconds, a third of them without the fusions' own code generator. Later XLA has no other one.
FAST_COMPILES = ["--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):
    FAST_COMPILES.append("--xla_cpu_use_fusion_emitters=false")

os.environ.setdefault("XLA_FLAGS", " ".join([IN_ORDER, *FAST_COMPILES]))
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", DEVICES)
# A silent [D] + [B, D] broadcast is how a bias meant for one dim lands on another.
jax.config.update("jax_numpy_rank_promotion", "raise")

for option, value in {
    "jax_disable_most_optimizations": True,
    "jax_compilation_cache_dir": str(CACHE),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}.items():
    jax.config.update(option, value)
    os.environ[option.upper()] = str(value)

# Tracing makes many objects, of which few are garbage in cycles: looked for at the default rate,
# that takes a twentieth of a run.
gc.freeze()
gc.set_threshold(50_000, 10, 10)

# The first example of a property may compile a program, which no deadline allows for; and the
# same examples every time, so that a red run is red again.
hypothesis.settings.register_profile("meshwright", deadline=None, derandomize=True)
hypothesis.settings.load_profile("meshwright")


@pytest.fixture(scope="session")
def devices() -> list[Any]:
    """The eight simulated devices."""
    found = jax.devices()
    assert len(found) == DEVICES, f"the backend started before conftest: {found}"
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless browser with one page, for the tests of a module."""
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium or Chrome on the path: apt-get install chromium")
    with Browser(path, tmp_path_factory.mktemp("chromium") / "profile") as found:
        yield found


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What ``-n auto`` means: a worker for each core that has 4 GiB of memory for it. Those that
    have compiled half of the tests' programs hold up to 3.6 GB."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it, macOS has not
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cores, memory_bytes // (4 * 2**30)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-compositions",
        action="store_true",
        help="also hold compositions of three and four parallelisms against one device",
    )
    parser.addoption(
        "--parity-table", type=Path, metavar="FILE", help="put the compositions held into this page"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all-compositions"):
        return
    skip = pytest.mark.skip(reason="three and four axes at once run with --all-compositions")
    for item in items:
        if item.get_closest_marker("every_composition"):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    page: Path | None = config.getoption("--parity-table")
    rows = parity_table.rows_of(terminalreporter.getreports("passed"))
    if page and rows:
        parity_table.write(page, rows)
