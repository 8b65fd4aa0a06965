"""`meshwright train`: read the flags, run the training.

``python scripts/train.py FLAGS`` is the same program.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from meshwright.scripts.flags import read
from meshwright.sharding.errors import MeshwrightError

__all__ = ["main"]

_ABOUT = """\
Train a decoder language model. With no flags: the model `tiny` on the source of Python's own
standard library, on the accelerators of this machine or, where there are none, on eight
simulated CPU devices. Progress goes to stderr; the last line on stdout is one JSON object."""


def main(argv: Sequence[str]) -> int:
    """Run the verb on the words after it and return the exit code."""
    config, _ = read(argv, "train", about=_ABOUT)
    from meshwright.sharding.processes import fail, start

    start()
    try:
        from meshwright.train.run import run_training  # brings jax

        return run_training(config)
    except BaseException as error:
        fail(error, error.exit_code if isinstance(error, MeshwrightError) else 1)
        raise


if __name__ == "__main__":
    from meshwright.scripts.main import main as run_verb

    sys.exit(run_verb(["train", *sys.argv[1:]]))
