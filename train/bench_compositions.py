"""Every composition of parallelisms against one device, as a table.

`meshwright.train.compositions` lists them, and the tests hold each to 1e-5 on a small model. Here
any model is compared on real text, and the table is what one would show: each composition of one,
two and three axes and a few of four, its mesh and settings, the largest difference of the first
step's gradients over each leaf's largest entry, and of ten losses. A composition that is
refused is listed with its reason. Models with experts are dealt over the expert axis too.
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.sharding.errors import MeshwrightError
from meshwright.sharding.topology import Topology
from meshwright.train.bench import finish, say, text_batches
from meshwright.train.compositions import EXPERT_WAYS, WAYS
from meshwright.train.compositions import compositions as listed
from meshwright.train.config import TrainConfig
from meshwright.train.parity import Case, compare, run_case

__all__ = ["compositions"]

_STEPS = 10


def compositions(config: TrainConfig) -> int:
    """Print the table and, last on stdout, its worst entries as JSON. Takes 5 to 20 s a row."""
    Topology("cpu", (16,)).devices()  # four axes of two
    config = replace(config, dtype=config.dtype or "float32", topology="cpu:16", mesh="auto")
    batches = list(text_batches(config, _STEPS))
    one = run_case(config, Case("data=1"), batches)
    ways = EXPERT_WAYS if config.model.experts.count else WAYS
    worst, equal, count, refused = {"gradient": 0.0, "loss": 0.0}, 0, 0, 0
    for composition in (found for axes in (1, 2, 3, 4) for found in listed(axes, ways)):
        count += 1
        try:
            found = compare(one, run_case(config, composition.case, batches))
        except MeshwrightError as error:
            refused += 1
            say(f"{composition!s:<34} refused: {error.args[0].splitlines()[0]}")
            continue
        equal += found.initial_equal
        worst["gradient"] = max(worst["gradient"], found.gradient)
        worst["loss"] = max(worst["loss"], found.loss)
        say(
            f"{composition!s:<34} gradient {found.gradient:.1e}  loss {found.loss:.1e}  "
            f"initial values {'equal' if found.initial_equal else 'DIFFER'}  {composition.case}"
        )
    return finish(
        model=config.model.name,
        dtype=config.dtype,
        compositions=count,
        refused=refused,
        equal_initial_values=equal,
        steps=_STEPS,
        worst=worst,
    )
