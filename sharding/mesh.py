"""Named mesh axes as a value: parsed, checked, filled, split over hosts, then built.

A mesh is written ``data=2,fsdp=-1,tensor=2``. One size may be -1: the devices that are left.
``fsdp=2*4`` says that the axis has 8 parts, 2 across hosts (or slices) and 4 within.

Order matters more than it seems: neighbouring devices share the fastest links, so the axis
with the most frequent traffic must vary fastest. The order is therefore canonical, slowest
link first, and does not depend on how the mesh was written::

    replica, stage, data, fsdp, expert, context, tensor

Axis types are always passed (Auto): `jax.make_mesh` changed its default to Explicit in 0.9,
and a mesh whose meaning depends on the installed jax is a trap.

This module imports jax only inside the functions that build a mesh, so that a wrong mesh on
the command line is refused in milliseconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meshwright.sharding.errors import MeshError, did_you_mean

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh, Mesh

__all__ = ["AXES", "MeshSpec", "with_auto_axes"]

AXES = ("replica", "stage", "data", "fsdp", "expert", "context", "tensor")
"""The axis names of the written form, in canonical order: slowest link first."""


@dataclass(frozen=True)
class MeshSpec:
    """Ordered named axes with their sizes; no devices yet.

    Attributes:
        axes: (name, size) in mesh order, at most one size being -1 until `fill`.
        across: (name, parts) of the axes whose split between hosts or slices is stated;
            the others are split by `split` when a mesh is built.

    The constructor keeps the order given and admits any identifier as a name, for meshes
    that exist already; `parse` admits the canonical names only and puts them in order.

    >>> MeshSpec.parse("tensor=2,data=-1").fill(8)
    MeshSpec(axes=(('data', 4), ('tensor', 2)), across=())
    >>> str(MeshSpec.parse("tensor=2, fsdp=2*4"))
    'fsdp=2*4,tensor=2'
    """

    axes: tuple[tuple[str, int], ...]
    across: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if not names:
            self._refuse("it has no axes", "give it one, such as data=-1")
        for name in names:
            if not name.isidentifier():
                self._refuse(f"`{name}` is not a name", "use letters, digits and _")
            if names.count(name) > 1:
                self._refuse(f"axis `{name}` is given twice", "give each axis once")
        free = [name for name, size in self.axes if size == -1]
        if len(free) > 1:
            self._refuse(
                f"the sizes of {' and '.join(free)} are both -1, and only one can be what is left",
                f"give a size to all but one, such as {free[0]}=2",
            )
        for name, size in self.axes:
            if size < 1 and size != -1:
                self._refuse(f"{name}={size} is not a size", f"use {name}=1 or more, or -1")
        for name, parts in self.across:
            size = dict(self.axes).get(name, 0)
            if size < 1 or parts < 1 or size % parts:
                self._refuse(
                    f"axis `{name}` of {size} cannot have {parts} parts across hosts",
                    f"write {name}=ACROSS*WITHIN",
                )

    def _refuse(self, why: str, fix: str) -> None:
        raise MeshError(f"cannot use the mesh `{self}`", why=why, fix=fix)

    @classmethod
    def parse(cls, text: str) -> MeshSpec:
        """Read the written form and put the axes in canonical order.

        Raises:
            MeshError: malformed text, an unknown or repeated axis, two -1, a size below 1.
        """
        axes: dict[str, int] = {}
        across: dict[str, int] = {}
        for part in (piece.strip() for piece in text.split(",")):
            found = re.fullmatch(r"(\w+)\s*=\s*(-?\d+)(?:\*(\d+))?", part)
            if not found:
                raise MeshError(
                    f"cannot read the mesh `{text}`",
                    why=f"`{part}` is not an axis with a size",
                    fix="write it like data=2,fsdp=-1,tensor=2",
                )
            name, first, within = found.group(1), int(found.group(2)), found.group(3)
            if name not in AXES:
                raise MeshError(
                    f"cannot read the mesh `{text}`",
                    why=f"`{name}` is not a mesh axis",
                    fix=did_you_mean(name, AXES),
                )
            if name in axes:
                raise MeshError(
                    f"cannot read the mesh `{text}`",
                    why=f"axis `{name}` is given twice",
                    fix="give each axis once",
                )
            axes[name] = first * int(within) if within else first
            if within:
                across[name] = first
        order = sorted(axes, key=AXES.index)
        return cls(
            tuple((name, axes[name]) for name in order),
            tuple((name, across[name]) for name in order if name in across),
        )

    @classmethod
    def of(cls, mesh: Mesh | AbstractMesh) -> MeshSpec:
        """The spec of a mesh that exists already, whatever its axes are called."""
        return cls(tuple((str(name), int(size)) for name, size in mesh.shape.items()))

    def __str__(self) -> str:
        across = dict(self.across)
        return ",".join(
            f"{name}={across[name]}*{size // across[name]}" if name in across else f"{name}={size}"
            for name, size in self.axes
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Axis names in mesh order."""
        return tuple(name for name, _ in self.axes)

    @property
    def sizes(self) -> dict[str, int]:
        """Axis sizes by name, in mesh order."""
        return dict(self.axes)

    @property
    def device_count(self) -> int:
        """Product of the sizes; a mesh with a -1 has none yet and raises MeshError."""
        if any(size == -1 for _, size in self.axes):
            self._refuse("one size is still -1", "call fill(device_count) first")
        return math.prod(size for _, size in self.axes)

    def fill(self, device_count: int, devices: str = "") -> MeshSpec:
        """Replace -1 by what is left of ``device_count`` and check the product.

        Args:
            device_count: devices the mesh must use, all of them.
            devices: how to call them in an error, such as ``cpu:8``.

        Raises:
            MeshError: the sizes do not multiply to the device count; names the sizes that do.
        """
        known = math.prod(size for _, size in self.axes if size != -1)
        free = next((name for name, size in self.axes if size == -1), None)
        if (device_count % known) if free else (known != device_count):
            called = f"{devices} has" if devices else "there are"
            product = " × ".join(str(size) for _, size in self.axes if size != -1)
            relation = "does not divide" if free else "is not"
            raise MeshError(
                f"cannot lay the mesh `{self}` on {device_count} devices",
                why=f"{called} {device_count} devices; {product} = {known} {relation} "
                f"{device_count}",
                fix=self._nearest(device_count, known, devices),
            )
        return MeshSpec(
            tuple((n, device_count // known if n == free else size) for n, size in self.axes),
            self.across,
        )

    def _nearest(self, device_count: int, known: int, devices: str) -> str:
        """Meshes that differ in one size and do multiply to the device count."""
        choices = []
        for name, size in self.axes:
            others = known // size if size != -1 else known
            if size != -1 and device_count % others == 0:
                right = MeshSpec(
                    tuple((n, device_count // others if n == name else s) for n, s in self.axes)
                )
                if -1 not in right.sizes.values():
                    choices.append(str(right))
        if devices.startswith("cpu:"):
            choices.append(f"this mesh with --topology cpu:{known}")
        if not choices:
            choices.append(f"{self.names[0]}=-1 alone")
        return f"use {' or '.join(choices)}"

    def split(self, groups: int) -> tuple[tuple[str, int, int], ...]:
        """Say for each axis how much of it crosses the slow network and how much does not.

        Args:
            groups: hosts or slices.

        Returns:
            (name, across, within) for each axis; the ``across`` multiply to ``groups``.
            Axes whose split is stated keep it; the rest of ``groups`` is taken from the
            outermost axes inwards, because they carry the least frequent traffic.

        Raises:
            MeshError: the axes' sizes do not allow it.

        >>> MeshSpec.parse("data=4,tensor=4").split(8)
        (('data', 4, 1), ('tensor', 2, 2))
        """
        stated = dict(self.across)
        left = groups
        for parts in stated.values():
            if left % parts:
                self._refuse(
                    f"{parts} parts across do not divide {groups} hosts or slices",
                    f"state parts that multiply to {groups}",
                )
            left //= parts
        rows = []
        for name, size in self.axes:
            part = stated[name] if name in stated else math.gcd(size, left)
            left //= 1 if name in stated else part
            rows.append((name, part, size // part))
        if left != 1:
            self._refuse(
                f"its axes cannot be cut along {groups} hosts or slices: a factor {left} is left",
                f"make an outer axis a multiple of {groups}, such as {self.names[0]}={groups}",
            )
        return tuple(rows)

    def build(self, devices: Sequence[Any]) -> Mesh:
        """Lay the mesh over devices, slow links outermost; axis types are Auto.

        Raises:
            MeshError: the sizes do not multiply to ``len(devices)``, or cannot be cut along
                the hosts or slices the devices belong to.
        """
        import numpy as np
        from jax.experimental import mesh_utils
        from jax.sharding import AxisType, Mesh

        spec = self.fill(len(devices))
        shape = tuple(spec.sizes.values())
        auto = (AxisType.Auto,) * len(shape)
        tpu = devices[0].platform == "tpu"
        group_of = _slice_index if tpu else _process_index
        groups = sorted({group_of(device) for device in devices})
        if tpu and len(groups) == 1:
            return Mesh(_on_one_slice(shape, devices), spec.names, axis_types=auto)
        rows = spec.split(len(groups))
        across, within = tuple(row[1] for row in rows), tuple(row[2] for row in rows)
        if tpu:
            laid = mesh_utils.create_hybrid_device_mesh(
                within, across, devices, allow_split_physical_axes=True
            )
        else:
            ordered = sorted(devices, key=lambda device: (group_of(device), device.id))
            rank = len(shape)
            cube = np.array(ordered).reshape(across + within)
            pairs = [index for axis in range(rank) for index in (axis, rank + axis)]
            laid = cube.transpose(pairs).reshape(shape)
        return Mesh(laid, spec.names, axis_types=auto)

    def abstract(self) -> AbstractMesh:
        """The mesh without devices, for checking specs and tracing; axis types are Auto."""
        from jax.sharding import AbstractMesh, AxisType

        count = len(self.axes)
        return AbstractMesh(tuple(self.sizes.values()), self.names, (AxisType.Auto,) * count)


def with_auto_axes(mesh: Mesh) -> Mesh:
    """The mesh over the same devices with every Explicit axis made Auto; itself if there is none.

    `jax.make_mesh` makes Explicit axes unless told otherwise, on which layouts are part of an
    array's type and no compiler places anything: shardings, as rules decide them, need Auto ones.
    """
    from jax.sharding import AxisType, Mesh

    if AxisType.Explicit not in mesh.axis_types:
        return mesh
    types = tuple(AxisType.Auto if t == AxisType.Explicit else t for t in mesh.axis_types)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def _on_one_slice(shape: tuple[int, ...], devices: Sequence[Any]) -> Any:
    """Devices of a TPU slice in mesh order: as jax lays them, or by coordinates where it cannot.

    jax refuses meshes that cut a torus dimension on most generations unless asked to, and up to
    0.10 fails on dimensions such as 28.
    """
    import itertools

    import numpy as np
    from jax.experimental import mesh_utils

    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, TypeError, ValueError):
        from meshwright.sharding.links import lay_on_torus, torus_coordinates

    places = [(*device.coords, device.core_on_chip) for device in devices]
    dims = tuple(1 + max(place[dim] for place in places) for dim in range(len(places[0])))
    by_place: dict[tuple[int, ...], Any] = dict(zip(places, devices, strict=True))
    parts = lay_on_torus(dims, shape)
    order = itertools.product(*(range(size) for size in shape))
    laid = np.empty(len(places), object)
    laid[:] = [by_place[tuple(torus_coordinates(parts, index))] for index in order]
    return laid.reshape(shape)


def _slice_index(device: Any) -> int:
    return getattr(device, "slice_index", 0)


def _process_index(device: Any) -> int:
    return device.process_index
