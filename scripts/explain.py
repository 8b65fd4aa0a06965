"""`meshwright explain`: show what a mesh and rules would do to a model, allocating nothing.

``python scripts/explain.py FLAGS`` is the same program.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from meshwright.scripts.flags import Option, read

__all__ = ["OPTIONS", "main"]

_ABOUT = """\
Show where each parameter of a model would live on a mesh, which rule decided and why, with the
bytes a device. Takes the flags of train; nothing is allocated and no accelerator is needed."""

OPTIONS = (
    Option("--json", "FILE", "Also write the decisions as JSON."),
    Option("--html", "FILE", "Also write the decisions as one self-contained page."),
)
"""The flags of the verb that are no settings of a run."""


def main(argv: Sequence[str]) -> int:
    """Run the verb on the words after it and return the exit code."""
    config, given = read(argv, "explain", about=_ABOUT, options=OPTIONS)
    from meshwright.train.explain import explain  # brings jax

    return explain(config, given.get("--json"), given.get("--html"))


if __name__ == "__main__":
    from meshwright.scripts.main import main as run_verb

    sys.exit(run_verb(["explain", *sys.argv[1:]]))
