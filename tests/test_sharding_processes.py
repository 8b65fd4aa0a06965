"""Several processes: their start and every way it fails, fetching, and rows dealt to them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from together import Ended, free_port, run_together, run_variables

from meshwright.sharding import Placer, Processes, fetch, rows_of_process, start
from meshwright.sharding.errors import PlacementError, ProcessesError
from meshwright.sharding.process_rows import block_of, blocks_of
from meshwright.sharding.rollcall import is_loopback

WAIT = "begin()\nprint('started')"
QUICK = {"MESHWRIGHT_START_TIMEOUT_SECONDS": "3"}
VARIABLES = ("COORDINATOR", "PROCESSES", "PROCESS", "START_TIMEOUT_SECONDS")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.delenv(f"MESHWRIGHT_{name}", raising=False)
    return monkeypatch


# Starts that succeed


def test_without_settings_there_is_one_process(alone: pytest.MonkeyPatch) -> None:
    assert start() == Processes(0, 1, None)
    alone.setenv("MESHWRIGHT_PROCESSES", "1")
    assert start() == start(processes=1, process=0) == Processes()


AT_WORK = Path(__file__).with_name("processes_at_work.py").read_text()


@pytest.fixture(scope="module")
def at_work(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes with four devices each found out, see processes_at_work.py."""
    port, saved = free_port(), str(tmp_path_factory.mktemp("plan") / "saved")
    environments = [run_variables(port, 2, index, SAVED_IN=saved) for index in (0, 1)]
    ended = run_together([AT_WORK] * 2, environments=environments, within_seconds=90)
    assert [process.code for process in ended] == [0, 0], ended[0].err + ended[1].err
    return [process.document for process in ended]


def test_each_process_knows_its_place(at_work: list[dict[str, Any]]) -> None:
    assert [found["place"] for found in at_work] == [[0, 2, 8, 4], [1, 2, 8, 4]]


def test_plain_jax_refuses_what_fetch_gives(at_work: list[dict[str, Any]]) -> None:
    for found in at_work:
        assert "non-addressable" in found["device_get"]
        assert found["sharded"] == list(range(16))
        assert found["partly"] == np.arange(32.0).reshape(8, 4).tolist()
        assert found["held_by_each"] == np.arange(32.0).reshape(4, 8).tolist()
        assert found["key"] == jax.random.key_data(jax.random.key(7)).tolist()
        assert found["passed"] == [3, "text", None]


def test_what_each_process_holds_is_fetched_without_communication(
    at_work: list[dict[str, Any]],
) -> None:
    assert all(found["gathers_of_held"] == 0 for found in at_work)
    assert all(found["gathers_of_sharded"] == 1 for found in at_work)


def test_metrics_of_a_step_are_floats_on_every_process(at_work: list[dict[str, Any]]) -> None:
    first, second = at_work
    assert first["losses"] == second["losses"]
    assert first["losses"][1] < first["losses"][0]
    np.testing.assert_allclose(first["losses"], losses_of_one_process(), rtol=1e-6)


def test_a_model_that_exists_is_placed_saved_and_restored(at_work: list[dict[str, Any]]) -> None:
    for found in at_work:
        leaves, same = found["restored"]
        assert leaves == same > 8


def losses_of_one_process() -> list[float]:
    names: dict[str, Any] = {}
    exec(AT_WORK.partition("# plan\n")[2].partition("# end of plan\n")[0], names)
    return names["train"](slice(0, 16))


def test_rows_of_a_batch_are_dealt_in_the_order_of_processes(
    at_work: list[dict[str, Any]],
) -> None:
    for mesh in ("data=8", "data=4,tensor=2", "data=2,context=4"):
        assert [found["rows"][mesh] for found in at_work] == [[0, 8], [8, 16]]
    for mesh in ("tensor=8", "context=8"):
        assert [found["rows"][mesh] for found in at_work] == [[0, 16], [0, 16]]
    for found in at_work:
        for mesh, whole in found["placed"].items():
            assert whole == np.arange(16 * 8).reshape(16, 8).tolist(), mesh


def test_uneven_and_differing_rows_are_refused_everywhere(at_work: list[dict[str, Any]]) -> None:
    for index, found in enumerate(at_work):
        other = 1 - index
        assert f"process {index} has {4 + 4 * index} rows" in found["uneven"]
        assert f"process {other} has {4 + 4 * other}" in found["uneven"]
        assert f"process {index} and process {other} pass other rows" in found["differing"]


# Starts that fail: each process ends by itself, with a message and exit code 2


@pytest.fixture(scope="module")
def failed() -> Iterator[Callable[[str], list[Ended]]]:
    """What processes came to, by what was wrong; they mostly wait, so they wait together."""
    port = [free_port() for _ in range(6)]
    taken = socket.create_server(("", 0))
    busy = taken.getsockname()[1]
    cases: dict[str, list[dict[str, str]]] = {
        "missing": [run_variables(port[0], 3, index, **QUICK) for index in (0, 2)],
        "wrong port": [run_variables(port[1 + index], 2, index, **QUICK) for index in (0, 1)],
        "twice": [run_variables(port[3], 3, index) for index in (0, 1, 1)],
        "disagree": [run_variables(port[4], 2 + index, index) for index in (0, 1)],
        "taken": [run_variables(busy, 2, 0)],
        "something else": [run_variables(busy, 2, 1, **QUICK)],
    }

    def run(environments: list[dict[str, str]]) -> list[Ended]:
        programs = [WAIT] * len(environments)
        return run_together(programs, environments=environments, within_seconds=30)

    with ThreadPoolExecutor(len(cases)) as pool:
        running = {name: pool.submit(run, environments) for name, environments in cases.items()}
        yield lambda name: running[name].result()
    taken.close()


def test_a_process_that_does_not_come(failed: Callable[[str], list[Ended]]) -> None:
    zero, two = failed("missing")
    for process in (zero, two):
        assert process.code == 2
        assert "1 of 3 processes did not come within 3 s" in process.err
        assert "did not come: process 1" in process.err
        assert "Traceback" not in process.err and "Check failure" not in process.err
    assert f"came: 0 ({socket.gethostname()}, pid" in zero.err
    assert "process 0 of 3: waiting for process 1 of 3 (1 s; gives up after 3 s)" in zero.err


def test_a_wrong_port(failed: Callable[[str], list[Ended]]) -> None:
    zero, one = failed("wrong port")
    assert (zero.code, one.code) == (2, 2)
    assert "did not come: process 1" in zero.err
    assert "`localhost` is reached from this host alone" in zero.err
    assert "process 1 of 2 did not reach process 0 within 3 s" in one.err
    assert "Connection refused" in one.err and "this host itself" in one.err
    assert "process 1 of 2: waiting for process 0 at localhost:" in one.err


def test_a_process_there_twice(failed: Callable[[str], list[Ended]]) -> None:
    ended = failed("twice")
    assert ended[0].code == 2
    said = ["two processes say that they are process 1" in process.err for process in ended]
    assert said[0] and any(said[1:])


def test_processes_that_disagree_how_many_they_are(failed: Callable[[str], list[Ended]]) -> None:
    for process in failed("disagree"):
        assert process.code == 2
        assert "process 0 was told 2 processes, process 1 was told 3" in process.err


def test_a_port_that_is_taken(failed: Callable[[str], list[Ended]]) -> None:
    (ended,) = failed("taken")
    assert ended.code == 2 and "Address already in use" in ended.err


def test_something_else_at_the_coordinators_address(failed: Callable[[str], list[Ended]]) -> None:
    (ended,) = failed("something else")
    assert ended.code == 2 and "no process of this run" in ended.err


def test_a_backend_that_has_started() -> None:
    (ended,) = run_together(
        ["import jax; jax.devices()\n" + WAIT], environments=[run_variables(1, 2, 0)]
    )
    assert ended.code == 2 and "jax's backend runs already in this process" in ended.err


# Processes that end before their time


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("raise RuntimeError('no more rows')", "process 1 failed: RuntimeError: no more rows"),
        ("os.kill(os.getpid(), 9)", "ended without a word"),
    ],
)
def test_a_process_that_ends_ends_the_others(ending: str, said: str) -> None:
    stays = "begin()\nimport time\ntime.sleep(100)"
    proxies = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    port = free_port()
    environments = [run_variables(port, 3, index, **proxies) for index in range(3)]
    ended = run_together(
        [stays, f"begin()\n{ending}", stays], environments=environments, within_seconds=20
    )
    for index in (0, 2):
        assert ended[index].code == 1 and ended[index].seconds < 15
        assert f"process {index} of 3: stopping, because process 1" in ended[index].err
        assert said in ended[index].err
    assert ended[1].code in (1, -9)


# Settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"PROCESSES": "2", "PROCESS": "0"}, "coordinator missing"),
        ({"COORDINATOR": "host:12345"}, "processes and process missing"),
        ({"COORDINATOR": "h:1", "PROCESSES": "two", "PROCESS": "0"}, "`two` is no number"),
        ({"COORDINATOR": "h:1", "PROCESSES": "2", "PROCESS": "2"}, "there is no process 2 of 2"),
        ({"COORDINATOR": "h:1", "PROCESSES": "0", "PROCESS": "0"}, "there is no process 0 of 0"),
        ({"COORDINATOR": "host", "PROCESSES": "2", "PROCESS": "0"}, "no address"),
        ({"COORDINATOR": "http://host:80", "PROCESSES": "2", "PROCESS": "0"}, "no address"),
        ({"COORDINATOR": "host:70000", "PROCESSES": "2", "PROCESS": "0"}, "no address"),
    ],
)
def test_wrong_settings(alone: pytest.MonkeyPatch, settings: dict[str, str], said: str) -> None:
    for name, value in settings.items():
        alone.setenv(f"MESHWRIGHT_{name}", value)
    with pytest.raises(ProcessesError, match=said):
        start()


@pytest.mark.parametrize("seconds", ["0", "soon", "inf"])
def test_wrong_patience(alone: pytest.MonkeyPatch, seconds: str) -> None:
    alone.setenv("MESHWRIGHT_START_TIMEOUT_SECONDS", seconds)
    with pytest.raises(ProcessesError, match=f"`{seconds}` seconds"):
        start("host:1234", 2, 0)


def test_loopback_with_several_hosts(alone: pytest.MonkeyPatch) -> None:
    alone.setenv("SLURM_STEP_NUM_NODES", "2")
    with pytest.raises(ProcessesError, match="a different machine on every host"):
        start("127.0.0.1:1234", 2, 0)
    assert not is_loopback("node-0")


def test_slurm_is_detected(alone: pytest.MonkeyPatch) -> None:
    """As far as the address: this machine's jax has a backend, which is refused next."""
    for name, value in {
        "SLURM_JOB_ID": "70001",
        "SLURM_STEP_NODELIST": "node[3-4]",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
    }.items():
        alone.setenv(name, value)
    from meshwright.sharding.processes import _settings

    found = _settings(None, None, None)
    assert (found.index, found.count) == (1, 2)
    assert found.coordinator is not None and found.coordinator.startswith("node3:")


# Rows, on meshes of devices that are not here


class Device:
    """A device of some process."""

    def __init__(self, number: int, process: int) -> None:
        self.id, self.process_index, self.platform = number, process, "cpu"
        self.device_kind = "cpu"


def mesh_of(processes: list[int], **axes: int) -> Mesh:
    devices = np.array([Device(i, process) for i, process in enumerate(processes)])
    return Mesh(devices.reshape(tuple(axes.values())), tuple(axes))


def test_blocks_of_processes() -> None:
    deep = mesh_of([0, 0, 1, 1, 2, 2, 3, 3], data=4, tensor=2)
    assert [blocks_of(deep, "data", p) for p in range(4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    across = mesh_of([0, 0, 1, 1, 2, 2, 3, 3], data=2, tensor=4)
    assert [blocks_of(across, "data", p) for p in range(4)] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert blocks_of(across, None, 3) == (0, 1)


def test_rows_that_do_not_lie_together() -> None:
    mixed = NamedSharding(mesh_of([0, 1, 0, 1], data=4), PartitionSpec("data"))
    with pytest.raises(PlacementError, match="rows 0 to 1, 4 to 5, which do not lie together"):
        block_of(mixed, (8,), 0, 0)
    with pytest.raises(PlacementError, match="none of the mesh's devices"):
        block_of(mixed, (8,), 0, 2)
    with pytest.raises(PlacementError, match="equal blocks"):
        blocks_of(mesh_of([0, 1, 1, 1], data=4), "data", 1)


def test_with_one_process_all_rows_are_its_own(devices: list[Any]) -> None:
    del devices
    placer = Placer.on("data=2,fsdp=4")
    assert rows_of_process(16, placer) == slice(0, 16)
    with pytest.raises(PlacementError, match="12"):
        rows_of_process(12, placer)
    tree = {"x": placer.place(np.arange(16.0)), "n": 3, "key": jax.random.key(7)}
    whole = fetch(tree)
    assert isinstance(whole["x"], np.ndarray) and whole["x"].tolist() == list(range(16))
    assert whole["n"] == 3 and whole["key"].dtype == jnp.uint32
