"""Several processes, one program: start them together, fetch what they hold.

`start` is ``jax.distributed.initialize`` with the waiting done first and out loud (see
`meshwright.sharding.rollcall`). `fetch` reads arrays whole on every process, for which ``float``,
``np.asarray`` and ``jax.device_get`` only serve while there is one process. Which rows of a batch
a process has to load is in `meshwright.sharding.process_rows`.

Every function here does the plain thing with one process, so that a program needs no branches.
jax is imported inside the functions: `start` must come before jax starts its backend.
"""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from meshwright.sharding.errors import ProcessesError
from meshwright.sharding.rollcall import Lifeline, Seat, call_in, is_loopback

__all__ = ["Processes", "fail", "fetch", "start", "started"]

_VARIABLES = {
    "coordinator": "MESHWRIGHT_COORDINATOR",
    "processes": "MESHWRIGHT_PROCESSES",
    "process": "MESHWRIGHT_PROCESS",
}
_TIMEOUT = "MESHWRIGHT_START_TIMEOUT_SECONDS"
_FORMS = "write host:port, such as node-0:12355"


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        index: its number, from 0.
        count: how many there are.
        coordinator: ``host:port`` of process 0; None with one process.
    """

    index: int = 0
    count: int = 1
    coordinator: str | None = None


@dataclass
class _Started:
    processes: Processes
    lifeline: Lifeline


_current: _Started | None = None


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout_seconds: float | None = None,
) -> Processes:
    """Join the processes of a run; call it before anything that uses a device.

    What is not passed is read from the environment: ``MESHWRIGHT_COORDINATOR``,
    ``MESHWRIGHT_PROCESSES``, ``MESHWRIGHT_PROCESS``; else from what jax finds out by itself on
    SLURM, Open MPI, Cloud TPU and Kubernetes. Where nothing says that there are several
    processes, there is one and nothing is done.

    From then on a process that fails ends the others within seconds, with a message.

    Args:
        coordinator: ``host:port`` where process 0 may listen; the same for all processes.
        processes: how many there are.
        process: the number of this one, from 0.
        timeout_seconds: how long to wait for the others; 60, or what the environment's
            ``MESHWRIGHT_START_TIMEOUT_SECONDS`` says.

    Raises:
        ProcessesError: incomplete or impossible settings; jax's backend has started; a process
            is missing, there twice, or was told another number of processes; process 0 cannot
            be reached.
    """
    global _current
    found = _settings(coordinator, processes, process)
    if _current is not None:
        if found != _current.processes:
            raise ProcessesError(
                "cannot start: this process has joined a run already",
                where=f"now {found}",
                why=f"it is {_current.processes}",
                fix="call start once, before anything else",
            )
        return found
    if found.count == 1:
        return found
    seat = _seat(found, _timeout(timeout_seconds))
    _check_backend()
    lifeline = call_in(seat)
    _current = _Started(found, lifeline)
    _initialize(found, seat)
    _follow_exits(lifeline)
    return found


def started() -> Processes:
    """What `start` came to; one process if it was not called. Does not start jax's backend."""
    return Processes() if _current is None else _current.processes


def fail(error: BaseException, code: int = 1) -> None:
    """Tell the other processes that this one ends with an error that nobody else will see.

    For programs that catch their errors and end by ``sys.exit``. An error that nobody catches
    is told by itself.
    """
    if _current is not None:
        text = (str(error).strip().splitlines() or [""])[0]
        _current.lifeline.fail(f"{type(error).__name__}: {text}" if text else repr(error), code)


def fetch(tree: Any) -> Any:
    """The arrays of a tree, whole, as numpy arrays on every process.

    Arrays of which every process holds all parts are read without communication; the others are
    gathered, one after the other, for which they must fit whole into the memory of each device.
    RNG keys come as their numbers. What is no jax array is passed by.

    With several processes all of them must call it, with the same tree.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        if _all_hold_all(leaf.sharding, leaf.shape):
            whole = np.empty(leaf.shape, leaf.dtype)
            for shard in leaf.addressable_shards:
                whole[shard.index] = shard.data
            return whole
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(one, tree)


def _all_hold_all(sharding: Any, shape: tuple[int, ...]) -> bool:
    """Whether each process's devices hold all parts; every process comes to the same answer."""
    import math

    held: dict[int, set[Any]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        parts = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        held.setdefault(device.process_index, set()).add(parts)
    size = math.prod(shape)
    return all(
        sum(math.prod(stop - start for start, stop in part) for part in parts) == size
        for parts in held.values()
    )


def _settings(coordinator: str | None, processes: int | None, process: int | None) -> Processes:
    """What was passed, what the environment says, what jax detects, in this order."""
    given: dict[str, Any] = {
        "coordinator": coordinator or os.environ.get(_VARIABLES["coordinator"]) or None,
        "processes": _number("processes") if processes is None else processes,
        "process": _number("process") if process is None else process,
    }
    if given["processes"] == 1 and given["process"] in (None, 0):
        return Processes()
    said = [name for name, value in given.items() if value is not None]
    if len(said) < len(given):
        _detect(given)
    absent = [name for name, value in given.items() if value is None]
    if len(absent) == len(given) or (not said and given["processes"] == 1):
        return Processes()
    if absent:
        raise ProcessesError(
            "cannot start: not all is known of the processes of this run",
            where="; ".join(
                f"{name} {value}" for name, value in given.items() if value is not None
            ),
            why=f"{' and '.join(absent)} missing, and no cluster was detected that says",
            fix="set " + ", ".join(_VARIABLES[name] for name in absent),
        )
    count, index = given["processes"], given["process"]
    if count < 1 or not 0 <= index < count:
        raise ProcessesError(
            f"cannot start: there is no process {index} of {count}",
            why="processes are numbered from 0" if count > 0 else "there must be at least one",
            fix=f"use a number from 0 to {count - 1} (MESHWRIGHT_PROCESS)"
            if count > 0
            else "set MESHWRIGHT_PROCESSES to the number of processes that are started",
        )
    return Processes(index, count, given["coordinator"]) if count > 1 else Processes()


def _number(name: str) -> int | None:
    text = os.environ.get(_VARIABLES[name])
    if not text:
        return None
    with suppress(ValueError):
        return int(text)
    raise ProcessesError(
        f"cannot start: `{text}` is no number",
        where=f"environment variable {_VARIABLES[name]}",
        fix="write a whole number, such as 2",
    )


def _timeout(given: float | None) -> float:
    text = os.environ.get(_TIMEOUT) or "60"
    with suppress(ValueError):
        seconds = float(text) if given is None else given
        if 0 < seconds < float("inf"):
            return seconds
    raise ProcessesError(
        f"cannot wait `{text if given is None else given}` seconds for the other processes",
        where=f"environment variable {_TIMEOUT}" if given is None else "timeout_seconds",
        fix="use a number above 0, such as 60",
    )


def _detect(given: dict[str, Any]) -> None:
    """Fill in what jax finds out on a cluster; the ports and names are those it would use."""
    given["coordinator"] = given["coordinator"] or os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        from jax._src.clusters import ClusterEnv  # jax asks it too, but only when it starts

        detect: Any = ClusterEnv.auto_detect_unset_distributed_params
    except (ImportError, AttributeError):
        return
    try:
        found = detect(*given.values(), None, None, 60)
    except Exception as error:
        raise ProcessesError(
            "cannot start: jax cannot find out about this cluster",
            why=(str(error).splitlines() or [repr(error)])[0],
            fix=f"set {', '.join(_VARIABLES.values())}",
        ) from error
    given.update(zip(given, found, strict=False))


def _seat(found: Processes, timeout_seconds: float) -> Seat:
    address = found.coordinator or ""
    host, _, port = address.rpartition(":")
    plain = host.strip("[]")
    if not plain or not port.isdigit() or not 0 < int(port) < 65536 or "/" in address:
        raise ProcessesError(
            f"cannot start: `{address}` is no address of a coordinator",
            why="it needs the name of process 0's host and a port from 1 to 65535",
            fix=_FORMS,
        )
    hosts = _host_count()
    if is_loopback(plain) and hosts > 1:
        raise ProcessesError(
            f"cannot start: `{plain}` is a different machine on every host",
            where=f"coordinator {address}, {hosts} hosts",
            why="each host would look for process 0 on itself",
            fix="give the name or address of process 0's host, as the other hosts know it",
        )
    return Seat(found.index, found.count, plain, int(port), timeout_seconds)


def _host_count() -> int:
    """How many hosts the launcher says there are; 1 where none says."""

    def number(name: str) -> int:
        text = os.environ.get(name, "")
        return int(text) if text.isdigit() else 1

    local = number("OMPI_COMM_WORLD_LOCAL_SIZE")
    return max(
        number("SLURM_STEP_NUM_NODES"),
        -(-number("OMPI_COMM_WORLD_SIZE") // max(local, 1)),
        len([name for name in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]),
    )


def _check_backend() -> None:
    jax = sys.modules.get("jax")
    if jax is None:
        return
    if jax.distributed.is_initialized():
        raise ProcessesError(
            "cannot start: jax.distributed.initialize was called already",
            why="start calls it, after all processes have come",
            fix="call one of the two",
        )
    before = jax.config.values["jax_num_cpu_devices"]
    try:  # refused once the backend runs
        jax.config.update("jax_num_cpu_devices", 2 if before == 1 else 1)
        jax.config.update("jax_num_cpu_devices", before)
    except RuntimeError:
        raise ProcessesError(
            "cannot start: jax's backend runs already in this process",
            why="something before start used a device: an array, jax.devices(), a jitted function, "
            "or an import that does one of these",
            fix="call start first, right after the imports",
        ) from None


def _initialize(found: Processes, seat: Seat) -> None:
    """Start jax's own service and clients, now that everybody is there."""
    import jax

    # jax's connection follows http_proxy and https_proxy, and then waits for ever for a proxy to
    # reach a host of the cluster; ours does not.
    for name in ("no_proxy", "NO_PROXY"):
        if any(other.lower().endswith("_proxy") for other in os.environ):
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), seat.host]))
    try:
        jax.distributed.initialize(
            seat.address,
            found.count,
            found.index,
            initialization_timeout=max(int(seat.timeout_seconds), 30),
        )
    except (RuntimeError, ValueError) as error:
        raise ProcessesError(
            "cannot start: jax refused to start the processes",
            where=f"process {found.index} of {found.count}, coordinator {seat.address}",
            why=(str(error).splitlines() or [repr(error)])[0],
            fix="all processes came, so the addresses are right; look for the same error in their "
            "output",
        ) from error


def _follow_exits(lifeline: Lifeline) -> None:
    """Tell the others how this process ends. Runs before jax's own exit, which waits for them."""
    shown = sys.excepthook

    def tell(kind: Any, error: BaseException, trace: Any) -> None:
        fail(error)
        shown(kind, error, trace)

    sys.excepthook = tell
    atexit.register(lifeline.leave)
