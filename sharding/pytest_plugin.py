"""The pytest plugin: simulated devices for the tests that ask for them, and meshes over them.

pytest loads it in every run of everybody who has meshwright installed, so it does nothing until
asked, and imports neither jax nor much else (some milliseconds). It is asked in two ways::

    pytest --meshwright-devices 8          # every test: devices for whatever asks for them

    @pytest.mark.devices(8)                # this test: eight of them
    def test_my_model(make_mesh):
        mesh = make_mesh("data=2,fsdp=4")

Simulated devices must be set up before jax starts its backend, once a process. The option sets
them before anything is collected, so that a test module may compute while it is imported. Markers
are known when collection ends: the largest number among the selected tests is then set, if no
import has started the backend before. A test that cannot have its number fails, and is told which
module took it away; ``--meshwright-devices 0`` skips it instead.

The alternative, starting a process for each number of devices, costs an import of jax a test. A
fixture that forces a number when it is first used comes too late once another test has run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from meshwright.sharding.errors import MeshwrightError
    from meshwright.sharding.mesh import MeshSpec

__all__ = [
    "devices",
    "make_mesh",
    "mesh",
    "pytest_addoption",
    "pytest_collection_finish",
    "pytest_configure",
    "pytest_make_collect_report",
    "pytest_runtest_setup",
]

_NAMES = ("meshwright", "meshwright.sharding.pytest_plugin")
_OPTION = "--meshwright-devices"
_COUNT, _PLATFORMS = "JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS"


@dataclass
class _Asked:
    """What a run was asked for, and who started jax's backend before it could be done.

    Attributes:
        option: the number on the command line; None without one.
        starter: during what jax's backend started, once it has.
    """

    option: int | None
    starter: str = ""


_ASKED = pytest.StashKey[_Asked]()


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Add the option; and keep this module from being registered under its other name.

    pytest knows it as ``meshwright``, of the entry point, or by its module's name where somebody
    writes ``-p`` or ``pytest_plugins``, and refuses the second of the two with a traceback.
    """
    for name in _NAMES:
        if name != pluginmanager.get_name(sys.modules[__name__]):
            pluginmanager.set_blocked(name)
    parser.getgroup("meshwright", "tests on simulated devices").addoption(
        _OPTION,
        type=_count,
        metavar="N",
        help="simulate N CPU devices, from before the tests are imported; 0: skip the tests whose "
        "number of devices cannot be had, which otherwise fail",
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of devices, such as 8 (or 0)")
    return int(text)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker; with a number on the command line, have jax start with it."""
    config.addinivalue_line(
        "markers", "devices(n): the test runs on n devices, simulated ones where it can be"
    )
    asked = config.stash[_ASKED] = _Asked(config.getoption(_OPTION))
    if _has_started():
        asked.starter = "before the tests were collected, by a conftest.py or a plugin"
    elif asked.option:
        _simulate(asked.option, config)


# The older kind of wrapper, which every pytest from 7.0 on knows.
@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Note which module starts jax's backend while it is collected."""
    yield
    asked = collector.config.stash[_ASKED]
    if not asked.starter and _has_started():
        asked.starter = f"while {collector.nodeid or 'the tests'} was collected"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Set the largest number that a selected test asks for, if it still can be."""
    config = session.config
    wanted = max((_wanted(item) or 0 for item in session.items), default=0)
    if not wanted or _has_started() or config.option.collectonly:
        return
    known = _configured()
    if wanted > known.count and (config.stash[_ASKED].option or known.platforms in ("", "cpu")):
        _simulate(wanted, config)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test that cannot have its devices, before any of its fixtures is made."""
    marker = item.get_closest_marker("devices")
    if marker is None:
        return
    wanted = _wanted(item)
    if wanted is None:
        given = ", ".join(
            [*map(repr, marker.args), *(f"{k}={v!r}" for k, v in marker.kwargs.items())]
        )
        from meshwright.sharding.errors import ConfigError

        _refuse(
            ConfigError(
                f"cannot read the marker devices({given})",
                where=item.nodeid,
                why="it takes one whole number, 1 or more",
                fix="write @pytest.mark.devices(8); where the marker is another plugin's, say "
                "-p no:meshwright",
            )
        )
        return
    import jax

    found = jax.devices()
    if len(found) < wanted:
        _lacking(item, wanted, found)


def _lacking(item: pytest.Item, wanted: int, found: list[Any]) -> None:
    from meshwright.sharding.errors import TopologyError

    asked = item.config.stash[_ASKED]
    kind = found[0].platform
    here = f"{len(found)} {kind} device{'s' if len(found) > 1 else ''}"
    option = f"run pytest {_OPTION} {wanted}"
    if kind == "cpu" and asked.starter:
        why = f"jax's backend started with {here} {asked.starter}"
        fix = "make no array and ask for no devices there, outside of functions"
        fix += "" if asked.option else f"; or {option}, which sets them before"
    elif kind == "cpu":
        why, fix = f"jax's backend started with {here} when the tests ran", option
    else:
        why = f"jax has {here} here, and no others are simulated beside them"
        fix = f"{option}, which simulates them on CPU, or {_OPTION} 0, which skips such tests"
    error = TopologyError(
        f"the test asks for {wanted} devices and there are {len(found)}",
        where=item.nodeid,
        why=why,
        fix=fix,
    )
    if asked.option == 0:
        pytest.skip(f"{error.what}: {error.why}")
    _refuse(error)


def _refuse(error: MeshwrightError) -> None:
    pytest.fail(str(error), pytrace=False)


def _wanted(item: pytest.Item) -> int | None:
    """The number in a test's marker; None without one, or with something else in it."""
    marker = item.get_closest_marker("devices")
    if marker is None or marker.kwargs or len(marker.args) != 1:
        return None
    (count,) = marker.args
    return count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else None


@dataclass(frozen=True)
class _Configured:
    """What jax will start with: simulated devices (1 where nobody says), and platforms."""

    count: int
    platforms: str


def _configured() -> _Configured:
    jax = sys.modules.get("jax")
    if jax is None:
        count = os.environ.get(_COUNT, "")
        return _Configured(int(count) if count.isdecimal() else 1, os.environ.get(_PLATFORMS, ""))
    return _Configured(max(jax.config.jax_num_cpu_devices, 1), jax.config.jax_platforms or "")


def _has_started() -> bool:
    """Whether jax's backend runs; False where jax is not imported or does not say.

    jax has no public way to ask without starting it. Without an answer a failing test is told
    less, and nothing else changes: setting the number is refused by jax itself.
    """
    bridge = sys.modules.get("jax._src.xla_bridge")
    ask = getattr(bridge, "backends_are_initialized", None)
    return bool(ask()) if ask else False


def _simulate(count: int, config: pytest.Config) -> None:
    """Have jax start with simulated devices, here and in processes that tests start.

    By the environment, which jax reads when it is imported, and by its config where it has been.
    """
    from meshwright.sharding.topology import IN_ORDER

    flags = os.environ.get("XLA_FLAGS", "")
    if IN_ORDER.partition("=")[0] not in flags:
        flags = f"{flags} {IN_ORDER}".strip()
    values = {_COUNT: str(count), _PLATFORMS: "cpu", "XLA_FLAGS": flags}
    before = {name: os.environ.get(name) for name in values}

    def restore() -> None:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})

    config.add_cleanup(restore)
    os.environ.update(values)
    if jax := sys.modules.get("jax"):
        try:
            jax.config.update("jax_num_cpu_devices", count)
            jax.config.update("jax_platforms", "cpu")
        except RuntimeError:
            pass  # the backend runs already: the tests that lack devices say so


@pytest.fixture
def devices(request: pytest.FixtureRequest) -> list[Any]:
    """The devices of this test: as many as its marker ``devices(n)`` says, all without one."""
    import jax

    return jax.devices()[: _wanted(request.node)]


@pytest.fixture
def make_mesh(devices: list[Any]) -> Callable[[str | MeshSpec], Mesh]:
    """Make meshes over this test's devices: ``make_mesh("data=2,fsdp=4")``.

    The returned function takes a mesh's written form or a `MeshSpec`, and gives a
    ``jax.sharding.Mesh`` whose axis types are Auto. One size may be -1, which takes all devices
    of the test; without, the first that are needed serve. It raises MeshError for a mesh that
    is larger than the test's devices or not well formed.
    """
    from meshwright.sharding.errors import MeshError
    from meshwright.sharding.mesh import MeshSpec

    def make(mesh: str | MeshSpec) -> Mesh:
        __tracebackhide__ = True  # what a reader wants is the line of the test
        spec = MeshSpec.parse(mesh) if isinstance(mesh, str) else mesh
        if -1 in spec.sizes.values():
            return spec.build(devices)
        if spec.device_count > len(devices):
            raise MeshError(
                f"cannot lay the mesh `{spec}` on {len(devices)} of this test's devices",
                why=f"it needs {spec.device_count}",
                fix=f"mark the test @pytest.mark.devices({spec.device_count}), or run pytest "
                f"{_OPTION} {spec.device_count}",
            )
        return spec.build(devices[: spec.device_count])

    return make


@pytest.fixture
def mesh(request: pytest.FixtureRequest, make_mesh: Callable[[str | MeshSpec], Mesh]) -> Mesh:
    """The mesh that an indirect parameter writes, as `make_mesh` makes it.

    ::

        @pytest.mark.devices(8)
        @pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=4"], indirect=True)
        def test_my_model(mesh): ...
    """
    if not hasattr(request, "param"):
        from meshwright.sharding.errors import MeshError

        error = MeshError(
            "the fixture `mesh` is not told which mesh",
            where=request.node.nodeid,
            why="it makes the mesh that a parameter of the test writes, and there is none",
            fix='add @pytest.mark.parametrize("mesh", ["data=2,fsdp=4"], indirect=True), or use '
            "the fixture make_mesh",
        )
        pytest.fail(str(error), pytrace=False)
    return make_mesh(request.param)
