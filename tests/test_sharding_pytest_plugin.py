"""The pytest plugin: numbers of devices had, refused and skipped; meshes; nothing when unasked.

Most runs are within this process, which has eight devices, by pytest's own ``pytester``. What
needs a jax that has not started runs in a process of its own; there are four of those.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from meshwright.sharding.errors import ConfigError, MeshError, TopologyError
from meshwright.sharding.mesh import MeshSpec

NAME = "meshwright.sharding.pytest_plugin"
ROOT = Path(__file__).resolve().parent.parent
ENTRY_POINT = f"[pytest11]\nmeshwright = {NAME}\n"
# Classes that a run within this process raises must be those of the tests after it.
LOADED = (ConfigError, MeshError, MeshSpec, TopologyError)


def run(pytester: pytest.Pytester, *words: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess("-p", NAME, "--strict-markers", "-rs", *words)


def text_of(result: pytest.RunResult, head: str) -> str:
    """The message of the failure whose first line is ``head``, as it is printed."""
    lines = result.outlines
    start = lines.index(head)
    end = next(n for n in range(start + 1, len(lines)) if not lines[n].startswith("  "))
    return "\n".join(lines[start:end])


@pytest.mark.usefixtures("devices")
def test_fixtures(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import jax
        import pytest

        def test_all(devices):
            assert devices == jax.devices()

        @pytest.mark.devices(6)
        class TestSix:
            def test_a_class_is_marked(self, devices, make_mesh):
                assert devices == jax.devices()[:6]
                assert dict(make_mesh("data=2,fsdp=-1").shape) == {"data": 2, "fsdp": 3}
                assert set(make_mesh("data=2").axis_types) == {jax.sharding.AxisType.Auto}

            @pytest.mark.devices(4)
            @pytest.mark.parametrize("mesh", ["data=4", "data=2,fsdp=2"], indirect=True)
            def test_the_closest_marker_counts(self, mesh, devices):
                assert list(mesh.devices.flat) == devices == jax.devices()[:4]

        def test_axes_of_your_own(make_mesh):
            from meshwright.sharding.mesh import MeshSpec
            assert make_mesh(MeshSpec((("x", 2), ("y", 4)))).axis_names == ("x", "y")
    """)
    run(pytester).assert_outcomes(passed=5)


@pytest.mark.usefixtures("devices")
def test_a_conftest_fixture_comes_first(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("""
        import jax
        import pytest

        @pytest.fixture(scope="session")
        def devices():
            return jax.devices()[:2]
    """)
    pytester.makepyfile("""
        def test_mine(devices, make_mesh):
            assert len(devices) == 2 == make_mesh("data=-1").size
    """)
    run(pytester).assert_outcomes(passed=1)


SIXTEEN = """
    import pytest

    @pytest.mark.devices(16)
    def test_sixteen(devices):
        raise AssertionError("it ran")
"""
SAID = "the test asks for 16 devices and there are 8"


@pytest.mark.usefixtures("devices")
def test_too_few_devices_fail(pytester: pytest.Pytester) -> None:
    path = pytester.makepyfile(SIXTEEN)
    result = run(pytester)
    result.assert_outcomes(errors=1)
    assert text_of(result, SAID) == (
        f"{SAID}\n"
        f"  where: {path.name}::test_sixteen\n"
        "  why:   jax's backend started with 8 cpu devices before the tests were collected, by a "
        "conftest.py or a plugin\n"
        "  fix:   make no array and ask for no devices there, outside of functions; or run pytest "
        "--meshwright-devices 16, which sets them before"
    )
    # With the option nobody is told to use the option.
    result = run(pytester, "--meshwright-devices", "16")
    result.assert_outcomes(errors=1)
    assert text_of(result, SAID).endswith("there, outside of functions")


@pytest.mark.usefixtures("devices")
def test_too_few_devices_skip_where_told_to(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SIXTEEN)
    result = run(pytester, "--meshwright-devices", "0")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines([f"SKIPPED * {SAID}: jax's backend started with 8 cpu devices *"])


def test_accelerators_are_not_simulated_beside(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="gpu")])
    path = pytester.makepyfile(SIXTEEN)
    result = run(pytester)
    result.assert_outcomes(errors=1)
    said = "the test asks for 16 devices and there are 1"
    assert text_of(result, said) == (
        f"{said}\n"
        f"  where: {path.name}::test_sixteen\n"
        "  why:   jax has 1 gpu device here, and no others are simulated beside them\n"
        "  fix:   run pytest --meshwright-devices 16, which simulates them on CPU, or "
        "--meshwright-devices 0, which skips such tests"
    )


@pytest.mark.parametrize("given", ["", "'8'", "0", "True", "8, 4", "n=8"])
def test_markers_that_say_no_number(pytester: pytest.Pytester, given: str) -> None:
    path = pytester.makepyfile(f"""
        import pytest

        @pytest.mark.devices({given})
        def test_it():
            pass
    """)
    result = run(pytester)
    result.assert_outcomes(errors=1)
    head = f"cannot read the marker devices({given})"
    assert text_of(result, head) == (
        f"{head}\n"
        f"  where: {path.name}::test_it\n"
        "  why:   it takes one whole number, 1 or more\n"
        "  fix:   write @pytest.mark.devices(8); where the marker is another plugin's, say "
        "-p no:meshwright"
    )


@pytest.mark.parametrize("given", ["eight", "-8", "2.5"])
def test_options_that_are_no_number(pytester: pytest.Pytester, given: str) -> None:
    result = run(pytester, f"--meshwright-devices={given}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*'{given}' is not a number of devices, such as 8 (or 0)"])


@pytest.mark.usefixtures("devices")
def test_meshes_that_cannot_be_made(pytester: pytest.Pytester) -> None:
    path = pytester.makepyfile("""
        import pytest

        @pytest.mark.devices(4)
        def test_large(make_mesh):
            make_mesh("data=8")

        def test_untold(mesh):
            pass
    """)
    result = run(pytester)
    result.assert_outcomes(failed=1, errors=1)
    result.stdout.fnmatch_lines(
        [
            "E*MeshError: cannot lay the mesh `data=8` on 4 of this test*s devices",
            "E *why:   it needs 8",
            "E *fix:   mark the test @pytest.mark.devices(8), or run pytest --meshwright-devices 8",
            f"{path.name}:5: MeshError",
        ]
    )
    head = "the fixture `mesh` is not told which mesh"
    assert text_of(result, head).splitlines()[3] == (
        '  fix:   add @pytest.mark.parametrize("mesh", ["data=2,fsdp=4"], indirect=True), or use '
        "the fixture make_mesh"
    )


@pytest.mark.parametrize("way", ["entry point", "-p as well", "conftest as well"])
def test_one_plugin_by_two_names(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """An install's entry point beside ``-p`` or ``pytest_plugins``; pytest refuses such pairs."""
    dist = pytester.mkdir("installed") / "elsewhere-1.dist-info"
    dist.mkdir()
    dist.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1\n")
    dist.joinpath("entry_points.txt").write_text(ENTRY_POINT)
    monkeypatch.syspath_prepend(dist.parent)
    if way == "conftest as well":
        pytester.makeconftest(f"pytest_plugins = [{NAME!r}]")
    pytester.makepyfile("def test_it(pytestconfig): pytestconfig.getini('markers')")
    words = ("-p", NAME) if way == "-p as well" else ()
    pytester.runpytest_inprocess(*words).assert_outcomes(passed=1)
    if way == "entry point":  # which can be left out
        off = pytester.runpytest_inprocess("-p", "no:meshwright", "--markers")
        assert "devices(n)" not in off.stdout.str()


def test_the_entry_point_is_declared() -> None:
    written = ROOT.joinpath("pyproject.toml").read_text(encoding="utf-8")
    head = "[project.entry-points.pytest11]\n"
    section = written.partition(head)[2]
    assert section.splitlines()[0] == f'meshwright = "{NAME}"'
    assert import_module(NAME).pytest_configure


def test_nothing_happens_unasked(pytester: pytest.Pytester) -> None:
    before = dict(os.environ)
    pytester.makepyfile("""
        import sys

        def test_it():
            assert "jax" not in sys.modules
    """)
    fresh(pytester).assert_outcomes(passed=1)
    assert os.environ == before


def fresh(pytester: pytest.Pytester, *words: str) -> pytest.RunResult:
    """In a new process, whose jax has not started."""
    return pytester.runpytest_subprocess("-p", NAME, "--strict-markers", *words)


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("unset")
def test_markers_set_the_largest_number(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import os

        import jax
        import pytest

        @pytest.mark.devices(2)
        def test_two(devices):
            assert len(devices) == 2 and len(jax.devices("cpu")) == 3

        @pytest.mark.devices(3)
        def test_three(devices):
            assert len(devices) == 3 and os.environ["JAX_NUM_CPU_DEVICES"] == "3"
            assert "concurrency_optimized_scheduler=false" in os.environ["XLA_FLAGS"]

        @pytest.mark.devices(5)
        def test_not_selected():
            pass
    """)
    fresh(pytester, "-k", "two or three").assert_outcomes(passed=2, deselected=1)


@pytest.mark.usefixtures("unset")
def test_a_module_that_starts_jax_is_named(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_one="import jax\nready = jax.devices()\n",
        test_two="""
            import pytest

            @pytest.mark.devices(2)
            def test_it(devices):
                assert len(devices) == 2
        """,
    )
    result = fresh(pytester)
    result.assert_outcomes(errors=1)
    assert text_of(result, "the test asks for 2 devices and there are 1") == (
        "the test asks for 2 devices and there are 1\n"
        "  where: test_two.py::test_it\n"
        "  why:   jax's backend started with 1 cpu device while test_one.py was collected\n"
        "  fix:   make no array and ask for no devices there, outside of functions; or run pytest "
        "--meshwright-devices 2, which sets them before"
    )
    fresh(pytester, "--meshwright-devices", "2").assert_outcomes(passed=1)
