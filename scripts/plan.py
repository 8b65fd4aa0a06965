"""`meshwright plan`: what a run would hold, move, compute and take on hardware that is not here.

``python scripts/plan.py FLAGS`` is the same program.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from meshwright.scripts.flags import Option, read

__all__ = ["OPTIONS", "main"]

_ABOUT = """\
Compile the train step for hardware that is not here and say whether it fits, what it moves, how
long a step takes and what is wrong with it. Takes the flags of train. Without the hardware's
compiler (extras tpu and gpu-plan), or on cpu:N, the figures are closed forms of the shapes.
Exit codes: 0 fits and is within the budget, 1 does not fit or breaks the budget, 2 bad input."""

OPTIONS = (
    Option("--json", "FILE", "Also write the report as JSON."),
    Option("--html", "FILE", "Also write the report as one self-contained page."),
    Option("--hlo", "FILE", "Also write the compiled program and, to FILE.log, the chatter."),
    Option("--budget", "FILE", "YAML file of limits on figures of the report."),
    Option("--calibration", "FILE", "Measured rates, as `meshwright calibrate` writes them."),
    Option("--effort", "LEVEL", "full (the default), quick (compile at low effort: no verdict) or "
           "shapes (do not compile)."),
)  # fmt: skip
"""The flags of the verb that are no settings of a run."""


def main(argv: Sequence[str]) -> int:
    """Run the verb on the words after it and return the exit code."""
    config, given = read(_spelled_out(argv), "plan", about=_ABOUT, options=OPTIONS)
    from meshwright.train.planning import Asked, answer  # brings jax

    options = {flag.removeprefix("--"): value for flag, value in given.items()}
    return answer(config, Asked(**options))


def _spelled_out(argv: Sequence[str]) -> list[str]:
    """``--quick`` is short for ``--effort quick``."""
    words: list[str] = []
    for word in argv:
        words += ["--effort", "quick"] if word == "--quick" else [word]
    return words


if __name__ == "__main__":
    from meshwright.scripts.main import main as run_verb

    sys.exit(run_verb(["plan", *sys.argv[1:]]))
