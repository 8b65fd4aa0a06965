"""`meshwright calibrate`: measure this machine's device for `meshwright plan`.

``python scripts/calibrate.py FLAGS`` is the same program.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

from meshwright.scripts.flags import FlagReader
from meshwright.sharding.calibration_file import check_replaceable
from meshwright.sharding.errors import ConfigError

__all__ = ["CalibrateFlags", "main"]

_ABOUT = """\
Measure what this machine's device reaches in matmuls, memory, attention and, with several
devices, collectives, and write it to a file that replaces data-sheet rates in
`meshwright plan --calibration FILE`."""


@dataclass(frozen=True)
class CalibrateFlags:
    """Where the rates go, and how long to measure."""

    out: str = "calibration.json"
    """File to write; an older calibration there is replaced, any other file is kept."""
    seconds: float = 40.0
    """Time to spend, compiling included; less measures smaller sizes."""

    def __post_init__(self) -> None:
        if not self.out:
            raise ConfigError("cannot use --out ''", why="it is empty", fix="give a file name")
        if not 0 < self.seconds < math.inf:
            raise ConfigError(
                f"cannot use --seconds {self.seconds}",
                why="it is the time to spend, and must be more than 0",
                fix="use --seconds 40",
            )


def main(argv: Sequence[str]) -> int:
    """Run the verb on the words after it and return the exit code."""
    reader = FlagReader(CalibrateFlags, "meshwright calibrate", _ABOUT)
    defaults = {field.name: field.default for field in fields(CalibrateFlags)}
    flags = CalibrateFlags(**reader.read(argv, defaults))
    check_replaceable(flags.out)  # before jax is waited for
    from meshwright.train.calibrate import calibrate

    return calibrate(flags.out, flags.seconds)


if __name__ == "__main__":
    from meshwright.scripts.main import main as run_verb

    sys.exit(run_verb(["calibrate", *sys.argv[1:]]))
