"""Which compilers for absent hardware are installed, and whether they pair with this jax.

A TPU compiler is the libtpu wheel, an NVIDIA one the two wheels of jax's CUDA plugin. Both are
found by package metadata alone: importing libtpu loads 0.7 GB and takes its lock file, and
importing jax would make a missing wheel a slow error.

Which libtpu pairs with a jax is written in that jax's own metadata, as the requirement of its
``tpu`` extra, so no table here goes out of date. A libtpu newer than jaxlib's parser of compiled
programs still compiles and still gives memory, but the program's text may be unreadable (tried:
jax 0.10.2 with libtpu 0.0.51 reads v5e programs and fails on v5p, v6e and tpu7x); so a wrong pair
is a note, not an error. The CUDA plugin refuses to load beside another jaxlib, so there a wrong
pair is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from meshwright.sharding.errors import MissingExtraError
from meshwright.sharding.topology import Topology

__all__ = ["Wheel", "require_wheels", "versions", "wheels"]

_EXTRA = {"tpu": "tpu", "gpu": "gpu-plan"}
_PLUGINS = ("jax-cuda13", "jax-cuda12")


@dataclass(frozen=True)
class Wheel:
    """A compiler's package.

    Attributes:
        distribution: its name on the package index.
        installed: version, or None.
        pairs_with: the version that belongs to the installed jax, ``0.0.42.*`` for any release
            of 0.0.42; None where jax's metadata does not say.
        paired: whether what is installed is that; True where nobody can tell.
        module: what jax imports of it.
    """

    distribution: str
    installed: str | None
    pairs_with: str | None
    paired: bool
    module: str


def wheels(kind: Literal["tpu", "gpu"]) -> Wheel:
    """Look for the compiler of a kind of chip; package metadata only, nothing is imported.

    Returns:
        For ``gpu``, the CUDA 13 plugin or else the CUDA 12 one; its version counts as installed
        only if both of its wheels, plugin and pjrt, are there.
    """
    if kind == "tpu":
        installed, wanted = _version("libtpu"), _required_by_jax("libtpu")
        return Wheel("libtpu", installed, wanted, _satisfies(installed, wanted), "libtpu")
    jaxlib = _version("jaxlib")
    found = [(name, _version(f"{name}-plugin"), _version(f"{name}-pjrt")) for name in _PLUGINS]
    name, plugin, pjrt = next((row for row in found if row[1] and row[2]), found[0])
    # One release of jaxlib has one release of each: a pjrt of another version is no pair either.
    seen = plugin if plugin == pjrt else f"{plugin} with pjrt {pjrt}"
    installed = seen if plugin and pjrt else None
    module = f"jax_plugins.xla_{name.removeprefix('jax-')}"
    return Wheel(f"{name}-plugin", installed, jaxlib, _satisfies(installed, jaxlib), module)


def require_wheels(topology: Topology) -> str | None:
    """Refuse a topology whose compiler is not installed.

    Args:
        topology: TPU or GPU; the others need no wheel.

    Returns:
        None, or a sentence that names a libtpu of another version than jax's own: compiling and
        memory work, the program's text may not be readable.

    Raises:
        MissingExtraError: no compiler for these chips, or a CUDA plugin of another version than
            jaxlib's; the fix line is the command to run.
    """
    if topology.kind not in ("tpu", "gpu"):
        return None
    kind: Literal["tpu", "gpu"] = "tpu" if topology.kind == "tpu" else "gpu"
    wheel = wheels(kind)
    if wheel.installed is None:
        maker = "TPU" if kind == "tpu" else "NVIDIA"
        raise MissingExtraError(
            f"cannot compile for `{topology}`",
            why=f"the {maker} compiler ({wheel.distribution}) is not installed",
            fix=f"pip install 'meshwright[{_EXTRA[kind]}]'",
        )
    if wheel.paired:
        return None
    mended = _command(wheel)
    pair = f"{wheel.distribution} {wheel.installed} is installed"
    if kind == "gpu":
        raise MissingExtraError(
            f"cannot compile for `{topology}`",
            why=f"{pair}, and jaxlib {wheel.pairs_with} loads only its own version",
            fix=mended,
        )
    return (
        f"{pair}, and jax {_version('jax')} pairs with {wheel.pairs_with}: the compiled program's "
        f"text may not be readable, which leaves memory alone; {mended}"
    )


def versions(topology: Topology | None = None) -> dict[str, str]:
    """Versions that decide what a compile gives: jax, jaxlib and the compilers installed.

    Args:
        topology: only the compiler of these chips; None for all that are installed.
    """
    names = ["jax", "jaxlib"]
    kinds: tuple[Literal["tpu", "gpu"], ...] = ("tpu", "gpu")
    names += [
        wheels(kind).distribution for kind in kinds if topology is None or topology.kind == kind
    ]
    found = {name: _version(name) for name in names}
    return {name: version for name, version in found.items() if version}


def _command(wheel: Wheel) -> str:
    packages = [wheel.distribution]
    if wheel.distribution.endswith("-plugin"):
        packages.append(wheel.distribution.replace("-plugin", "-pjrt"))
    pinned = " ".join(f"'{package}=={wheel.pairs_with}'" for package in packages)
    return f"pip install {pinned}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _required_by_jax(distribution: str) -> str | None:
    """The version in jax's own requirement, such as ``libtpu==0.0.42.*; extra == "tpu"``."""
    try:
        lines = metadata.requires("jax") or []
    except metadata.PackageNotFoundError:
        return None
    pattern = re.compile(rf"{re.escape(distribution)}\s*==\s*([\w.*]+)")
    found = [match for line in lines if (match := pattern.match(line))]
    return found[0].group(1) if found else None


def _satisfies(installed: str | None, wanted: str | None) -> bool:
    if installed is None:
        return False
    if wanted is None:
        return True
    if wanted.endswith(".*"):
        return installed == wanted[:-2] or installed.startswith(wanted[:-1])
    return installed == wanted
