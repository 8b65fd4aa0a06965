"""`meshwright bench NAME`: run one of the benchmarks whose numbers the README quotes.

``python scripts/bench.py NAME FLAGS`` is the same program. The benchmarks are functions
from a configuration to an exit code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from meshwright.scripts.flags import read
from meshwright.sharding.errors import ConfigError, did_you_mean

__all__ = ["BENCHMARKS", "main"]

BENCHMARKS = {
    "parity": ("bench", "losses and gradients on every mesh against those of one device"),
    "compositions": (
        "bench_compositions",
        "the same for every composition of parallelisms, as a table",
    ),
    "overhead": ("bench", "time of the step against the same mathematics written by hand"),
    "library": (
        "bench_library",
        "a plan's step against a user's own, an import against jax's, 100,000 leaves resolved",
    ),
    "launch": ("bench", "seconds from the command to the first finished step, cold and warm"),
    "lowering": ("bench", "time to trace and lower the step against the number of layers"),
    "pauses": ("bench", "time the loop waits for data, and for a checkpoint"),
    "memory_errors": ("bench_plan", "peaks by closed form against those of compiled plans"),
    "ranking": ("bench_plan", "order of plans by closed form against that of compiled ones"),
    "activations": ("bench_activations", "activations of compiled plans against closed forms"),
    "traffic": ("bench_traffic", "wire bytes of compiled plans against their lower bounds"),
}
"""Each benchmark, a function of that name in a module of `meshwright.train`, and what it is for."""


def main(argv: Sequence[str]) -> int:
    """Run the verb on the words after it and return the exit code."""
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        print(_help(), end="")
        return 0
    if name not in BENCHMARKS:
        what = f"there is no benchmark `{name}`" if name else "there is no benchmark named"
        raise ConfigError(what, fix=did_you_mean(name, BENCHMARKS))
    module, what = BENCHMARKS[name]
    config, _ = read(argv[1:], f"bench {name}", about=f"Measure {what}.")
    return getattr(import_module(f"meshwright.train.{module}"), name)(config)  # brings jax


def _help() -> str:
    lines = [f"  {name:<14} {what}" for name, (_, what) in BENCHMARKS.items()]
    listed = "\n".join(lines)
    return f"usage: meshwright bench NAME [FLAGS of train]\n\n{listed}\n"


if __name__ == "__main__":
    from meshwright.scripts.main import main as run_verb

    sys.exit(run_verb(["bench", *sys.argv[1:]]))
