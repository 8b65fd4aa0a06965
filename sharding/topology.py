"""Hardware as a value: which chips, how many, wired how, and how to get hold of them.

A topology is written in one word, so that it can be a flag, a line in a config file and a
line in a report:

=============  ==========================================================================
written form   meaning
=============  ==========================================================================
``auto``       the accelerators of this machine, or ``cpu:8`` where there are none
``local``      whatever devices jax finds on this machine (all processes of the job)
``cpu:8``      eight simulated CPU devices, over all processes of the job
``v5e:4x4``    a TPU slice of 16 chips; ``v4`` and ``v5p`` and ``tpu7x`` take three numbers
``h100:2x8``   2 hosts of 8 GPUs
``…*2``        two such slices, joined by the data-centre network
=============  ==========================================================================

The forms for hardware that is not here parse, print and count; compiling for them is the
job of ``meshwright plan``, and asking them for devices says so. Simulated devices have to be
set up before jax starts its backend; `Topology.devices` does it when it still can and
explains when it cannot. jax is imported only inside the methods that need devices.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Any, Literal

from meshwright.sharding.chips import CHIPS
from meshwright.sharding.errors import TopologyError, did_you_mean

__all__ = ["GPU_CHIPS", "IN_ORDER", "TPU_CHIPS", "Topology"]

IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
"""XLA flag that keeps simulated devices to one order of operations. Without it, in programs that
come from the compilation cache, XLA for CPUs runs collectives inside a loop beside others outside
of it, and may take one for the other: wrong numbers, or a process that hangs and is aborted after
40 seconds (jaxlib 0.10.2). Steps take no longer with it."""

TPU_CHIPS = {name: chip.torus_dims for name, chip in CHIPS.items() if chip.kind == "tpu"}
"""TPU generations and the number of numbers their slice shape has (the torus dimensions)."""

GPU_CHIPS = tuple(name for name, chip in CHIPS.items() if chip.kind == "gpu")
"""GPU chips; their shape is hosts × GPUs a host."""

_OTHER_NAMES = {
    "v5": "v5p",
    "v5litepod": "v5e",
    "v5lite": "v5e",
    "v6lite": "v6e",
    "trillium": "v6e",
    "v7": "tpu7x",
    "v7x": "tpu7x",
    "tpu7": "tpu7x",
    "ironwood": "tpu7x",
}
"""What makers, clouds and other tools call a chip → what it is called here."""

_FORMS = "local, cpu:8, v5e:4x4, v5p:4x4x8, v5p:4x4x8*2, h100:2x8"
_SIMULATED_BY_DEFAULT = 8
_MOST_SIMULATED = 1024


@dataclass(frozen=True)
class Topology:
    """Chips, their arrangement, and the number of slices.

    Attributes:
        chip: ``auto``, ``local``, ``cpu``, a TPU generation or a GPU name.
        shape: chips along each physical dimension of one slice; ``(N,)`` for ``cpu:N``;
            ``(hosts, gpus)`` for GPUs; empty for ``auto`` and ``local``.
        slices: how many such slices, joined by a slower network.

    >>> Topology.parse("v5p:4x4x8*2").device_count
    256
    >>> str(Topology.parse("h100:2x8"))
    'h100:2x8'
    """

    chip: str
    shape: tuple[int, ...] = ()
    slices: int = 1

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.shape) or self.slices < 1:
            raise TopologyError(
                f"cannot use the topology `{self}`",
                why="every number in it counts devices and must be at least 1",
                fix=f"write it like one of {_FORMS}",
            )

    @property
    def kind(self) -> Literal["auto", "local", "cpu", "tpu", "gpu"]:
        """Which family of hardware this is, and so how devices are obtained."""
        if self.chip in TPU_CHIPS:
            return "tpu"
        if self.chip in GPU_CHIPS:
            return "gpu"
        return self.chip  # type: ignore[return-value]  # parse admits no other chip

    @property
    def chip_count(self) -> int | None:
        """Chips in all slices; None where only the machine can tell (auto, local)."""
        return math.prod(self.shape) * self.slices if self.shape else None

    @property
    def device_count(self) -> int | None:
        """Devices in all slices, two a chip on tpu7x; None where only the machine can tell.

        >>> Topology.parse("tpu7x:4x4x4").chip_count, Topology.parse("tpu7x:4x4x4").device_count
        (64, 128)
        """
        if self.chip_count is None:
            return None
        return self.chip_count * (CHIPS[self.chip].devices_per_chip if self.chip in CHIPS else 1)

    @property
    def groups(self) -> int:
        """How many groups of devices a slow network joins: slices, or hosts of GPUs."""
        return self.slices * (self.shape[0] if self.kind == "gpu" else 1)

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Read a written form.

        Raises:
            TopologyError: an unknown chip, a malformed shape, or the wrong number of numbers.
        """
        if text in ("auto", "local"):
            return cls(text)
        found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", text.strip())
        if not found:
            chips = ["auto", "local", "cpu", *TPU_CHIPS, *GPU_CHIPS]
            word = text.split(":")[0]
            raise TopologyError(
                f"cannot read the topology `{text}`",
                why="a topology is `local` or a chip, a colon and a shape",
                fix=f"write it like one of {_FORMS}"
                + (f"; {_suggest(word, chips)}" if word not in chips else ""),
            )
        chip, shape_text, slices = found.groups()
        shape = tuple(int(size) for size in shape_text.split("x"))
        cls._check_rank(text, chip, shape, slices)
        return cls(chip, shape, int(slices or 1))

    @staticmethod
    def _check_rank(text: str, chip: str, shape: tuple[int, ...], slices: str | None) -> None:
        ranks = {"cpu": 1, **TPU_CHIPS, **dict.fromkeys(GPU_CHIPS, 2)}
        if chip not in ranks:
            raise TopologyError(
                f"cannot read the topology `{text}`",
                why=f"`{chip}` is not a chip meshwright knows",
                fix=_suggest(chip, ["local", *ranks]),
            )
        if len(shape) != ranks[chip]:
            raise TopologyError(
                f"cannot read the topology `{text}`",
                why=f"`{chip}` takes {ranks[chip]} number(s), {len(shape)} given",
                fix=f"write it like {chip}:{'x'.join(['4'] * ranks[chip])}",
            )
        if chip == "cpu" and slices:
            raise TopologyError(
                f"cannot read the topology `{text}`",
                why="simulated CPU devices come as one slice",
                fix=f"write cpu:{shape[0] * int(slices)}",
            )

    def __str__(self) -> str:
        if not self.shape:
            return self.chip
        tail = f"*{self.slices}" if self.slices > 1 else ""
        return f"{self.chip}:{'x'.join(map(str, self.shape))}{tail}"

    def devices(self) -> list[Any]:
        """Return the jax devices, starting jax's backend if it has not started.

        For ``cpu:N`` with the backend already running, its first N CPU devices serve if
        there are that many.

        Raises:
            TopologyError: the hardware is only described, not here; or N simulated devices
                are wanted and the backend already started with fewer.
        """
        import jax

        from meshwright.sharding.processes import started

        match self.kind:
            case "auto":
                _simulate(max(_SIMULATED_BY_DEFAULT // started().count, 1))
                found = jax.devices()
                if found[0].platform == "cpu" and len(found) == 1:
                    return Topology("cpu", (_SIMULATED_BY_DEFAULT,))._simulated_devices()
                return found
            case "local":
                return jax.devices()
            case "cpu":
                return self._simulated_devices()
            case _:
                raise TopologyError(
                    f"cannot run on `{self}`: it describes hardware, it is not this machine",
                    why="compiling for hardware that is not here comes with `meshwright plan`",
                    fix="use --topology local on that hardware, or cpu:8 to simulate",
                )

    def _simulated_devices(self) -> list[Any]:
        import jax

        from meshwright.sharding.processes import started

        wanted, processes = self.shape[0], started().count
        if wanted > _MOST_SIMULATED:
            raise TopologyError(
                f"cannot simulate {wanted} CPU devices",
                why=f"each takes threads and memory here: {_MOST_SIMULATED} is the limit",
                fix=f"use cpu:{_MOST_SIMULATED} or fewer; `meshwright explain` takes any number",
            )
        if wanted % processes:
            raise TopologyError(
                f"cannot simulate {wanted} CPU devices in {processes} processes",
                why=f"{wanted} is not divisible by {processes}, and each gets as many",
                fix=f"use cpu:{-(-wanted // processes) * processes}",
            )
        _simulate(wanted // processes, platform="cpu")
        found = jax.devices("cpu")
        if len(found) < wanted or (processes > 1 and len(found) != wanted):
            raise TopologyError(
                f"cannot simulate {wanted} CPU devices",
                why=f"jax's backend already started in this process with {len(found)}",
                fix=f"ask for the topology before the first jax computation, use cpu:{len(found)},"
                f" or start python with JAX_NUM_CPU_DEVICES={wanted}",
            )
        return found[:wanted]


def _suggest(word: str, chips: list[str]) -> str:
    """A suggestion for a chip that is not known: its other names first, then near misses."""
    plain = re.split(r"[-_ ]", word.strip().lower())[0]
    plain = _OTHER_NAMES.get(plain, plain)
    return f"did you mean `{plain}`?" if plain in chips else did_you_mean(plain, chips)


def _simulate(count: int, platform: str | None = None) -> None:
    """Ask jax for ``count`` CPU devices if its backend has not started; else do nothing.

    ``jax_num_cpu_devices`` is used because it overrides any count in XLA_FLAGS. Those flags get
    `IN_ORDER`, unless they say something about it already.
    """
    import jax

    flags = os.environ.get("XLA_FLAGS", "")
    if IN_ORDER.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {IN_ORDER}".strip()

    try:
        jax.config.update("jax_num_cpu_devices", count)
        if platform:
            jax.config.update("jax_platforms", platform)
    except RuntimeError:
        pass  # the backend runs already: the caller checks what it has
