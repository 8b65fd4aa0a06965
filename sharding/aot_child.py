"""The child process of `meshwright.sharding.aot.run_child`: makes devices, does one job, answers.

``python -m meshwright.sharding.aot_child FOLDER`` reads the job in the folder, imports its
function, calls it with the payload and the topology's devices, and writes the answer beside it:
the value, or the exception. The parent has set the environment and sent stdout and stderr to a
file before anything was loaded, which catches what C++ writes as well.

Compile-only devices are not in jax's list of devices and cannot hold an array; they have ids,
coordinates and a slice, which is what a mesh is laid over.

The process leaves by `os._exit`: the destructors of a compiler are one more chance to crash after
all is done, and take time.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from meshwright.sharding.aot import ANSWER, JOB, Raised
from meshwright.sharding.errors import MeshwrightError
from meshwright.sharding.topology import Topology

__all__ = ["main", "target_devices"]

_PR_SET_PDEATHSIG = 1
_HOST_BOUNDS = (2, 2, 1)


def target_devices(topology: Topology) -> list[Any]:
    """Devices to compile for, in the compiler's order; for TPU and GPU none of them is here.

    A ``tpu7x`` chip is two devices. A ``v4`` chip is one, as its two cores share their memory.

    Args:
        topology: TPU or GPU; simulated CPU devices are made too.

    Raises:
        JaxRuntimeError: the compiler does not know such a shape.
    """
    if topology.kind == "gpu":
        from jax.experimental import topologies

        from meshwright.sharding.gpu_targets import target_config

        hosts, gpus = topology.shape
        described = topologies.get_topology_desc(
            platform="cuda",
            target_config=target_config(topology.chip),
            topology=f"{topology.slices}x{hosts}x{gpus}",
        )
        return list(described.devices)
    if topology.kind == "tpu":
        from jax.experimental import topologies

        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{topology.chip}:{'x'.join(map(str, topology.shape))}",
            num_slices=topology.slices,
            **_tpu_options(topology),
        )
        return list(described.devices)
    return topology.devices()


def _tpu_options(topology: Topology) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if topology.chip == "v4":
        # The default is two devices a chip, over which jax cannot lay a mesh.
        options["chip_config_name"] = "megacore"
    shape = (*topology.shape, 1, 1)[:3]
    if any(size % bound for size, bound in zip(shape, _HOST_BOUNDS, strict=True)):
        # A part of a host, such as v5e:1x1: the default of 2×2 chips a host would be refused.
        smaller = zip(shape, _HOST_BOUNDS, strict=True)
        options["chips_per_host_bounds"] = tuple(min(pair) for pair in smaller)
    return options


def main(folder: str) -> None:
    """Do the job in ``folder`` and write the answer there."""
    _die_with_parent()
    path = Path(folder)
    job, payload, topology = pickle.loads((path / JOB).read_bytes())
    try:
        module, _, name = job.partition(":")
        function = getattr(import_module(module), name)
        answer = pickle.dumps(function(payload, target_devices(topology) if topology else []))
    except Exception as error:
        answer = pickle.dumps(_packed(error))
    # A file of this name is complete: it gets it when it is.
    partial = path / f"{ANSWER}.partial"
    partial.write_bytes(answer)
    partial.rename(path / ANSWER)


def _packed(error: Exception) -> Raised:
    """The exception in a form that the parent can read whatever it is."""
    own = error if isinstance(error, MeshwrightError) else None
    text = "".join(traceback.format_exception(error))
    if own is not None:
        own.__cause__ = own.__context__ = None
        try:
            pickle.loads(pickle.dumps(own))
        except Exception:
            own = None
    return Raised(own, type(error).__name__, str(error), text)


def _die_with_parent() -> None:
    """Have Linux kill this process when the parent is gone, however it went; else do nothing."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
