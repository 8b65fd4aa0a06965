"""Every error meshwright raises on purpose, and the one form they are written in.

The tree (all are ``ValueError``: the caller's input is at fault, never ours)::

    MeshwrightError               exit code 2
    ├── ConfigError               a flag, a config file, a field's value
    │   └── MissingExtraError     a command needs packages of an extra that is not installed
    ├── TopologyError             devices: written form, unknown chip, backend already started
    ├── MeshError                 mesh axes: written form, sizes, device count
    ├── ProcessesError            several processes: one missing, twice, or at a wrong address
    ├── DimsError                 names of a leaf's dimensions: absent, wrong rank, bad pattern
    ├── RulesError                the rules themselves: unused, shadowed, unknown dim or axis
    │   └── PlacementError        one leaf cannot be placed: indivisible, axis twice, unmatched
    ├── CompileError              no program from a compiler; in `meshwright.sharding.aot_errors`
    ├── HloSyntaxError            a compiled text that cannot be read; in `meshwright.sharding.hlo`
    ├── DataError                 training data: missing, empty, binary, too short
    ├── RunError                  the output folder: another run's, full disk, unwritable
    ├── CheckpointError           exit code 4: none usable, another model's
    └── NonFiniteError            exit code 3: the loss or gradients stayed non-finite

Each message has up to four lines: what could not be done; where (leaf, shape, rule, mesh);
the arithmetic or the values that broke the rule; the nearest values that work::

    cannot split dim 0 of `layers/attn/wk` over axis `tensor`
      where: shape 8×128, dims (kv_heads, head_dim), rule kv_heads → tensor, mesh tensor=16
      why:   8 is not divisible by 16
      fix:   use `tensor` of 1, 2, 4 or 8, or replicate this dim with the rule kv_heads → none

This module imports nothing, so that the command line can refuse bad input without jax.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DimsError",
    "MeshError",
    "MeshwrightError",
    "MissingExtraError",
    "NonFiniteError",
    "PlacementError",
    "ProcessesError",
    "RulesError",
    "RunError",
    "TopologyError",
    "did_you_mean",
]


class MeshwrightError(ValueError):
    """Base of every deliberate error; prints as the four-line form of this module.

    Args:
        what: what could not be done, one sentence without a full stop.
        where: the leaf, shape, rule, mesh, file or flag concerned.
        why: the arithmetic or the values that broke the rule.
        fix: the nearest values that work, or the command to run.

    >>> print(MeshwrightError("cannot cut", why="8 is not divisible by 3", fix="use 2 or 4"))
    cannot cut
      why:   8 is not divisible by 3
      fix:   use 2 or 4
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        lines = [what]
        lines += [
            f"  {label:<6} {text}"
            for label, text in (("where:", where), ("why:", why), ("fix:", fix))
            if text
        ]
        super().__init__("\n".join(lines))


class ConfigError(MeshwrightError):
    """A flag, config file key or field value is not acceptable."""


class MissingExtraError(ConfigError):
    """A command needs an extra that is not installed; the fix line is the command to run."""


class TopologyError(MeshwrightError):
    """Devices that do not exist, cannot be written so, or cannot be had in this process."""


class MeshError(MeshwrightError):
    """A mesh's written form, axis names or sizes are wrong for the devices."""


class ProcessesError(MeshwrightError):
    """The processes of a run do not come together, or do not agree."""


class DimsError(MeshwrightError):
    """A leaf has no dim names, the wrong number of them, or a pattern names nothing."""


class RulesError(MeshwrightError):
    """A rule is unused, shadowed, or names an unknown dim or mesh axis."""


class PlacementError(RulesError):
    """One leaf cannot be placed as the rules ask."""


class DataError(MeshwrightError):
    """Training data is missing, empty, binary, unreadable or too short."""


class RunError(MeshwrightError):
    """The output folder belongs to another run, is not writable, or the disk is full."""


class CheckpointError(MeshwrightError):
    """No usable checkpoint, or one of another model."""

    exit_code = 4


class NonFiniteError(MeshwrightError):
    """Training stopped because loss or gradients stayed non-finite or kept spiking."""

    exit_code = 3


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a suggestion for a misspelt ``word``: near misses, else all known names.

    >>> did_you_mean("fspd", ["data", "fsdp", "tensor"])
    'did you mean `fsdp`?'
    >>> did_you_mean("zzz", ["data", "fsdp"])
    'known: data, fsdp'
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(f'`{name}`' for name in near)}?"
    return f"known: {', '.join(names)}" if names else "none are known"
