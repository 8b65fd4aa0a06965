"""How fast plans are estimated: whole-model estimates a second, on one core.

A ranking of ten thousand candidates should take seconds, so the rate is watched by a benchmark.
The candidates differ in mesh, batch, accumulation and recomputation, as those of a search do.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

from meshwright.models.config import named
from meshwright.sharding.chips import CHIPS
from meshwright.sharding.links import axis_links
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.topology import Topology
from meshwright.train.config import TrainConfig
from meshwright.train.estimate import estimate
from meshwright.train.parallelism import choose_rules

__all__ = ["estimates_per_second"]

_MESHES = ("fsdp=64", "data=8,fsdp=8", "fsdp=8,tensor=8", "data=2,fsdp=4,tensor=8", "data=64")


def estimates_per_second(seconds: float = 1.0) -> float:
    """Estimate a Llama-3-8B on 64 H100s over and over, every time another candidate.

    Args:
        seconds: of processor time to measure for; others on the machine do not count.

    Returns:
        Estimates a second of processor time, choosing the rules of each candidate included.
    """
    model = named("llama3-8b")
    config = TrainConfig(model, batch_size=512, seq_len=8192)
    models = [replace(model, remat=remat) for remat in ("none", "dots", "full")]
    specs = [MeshSpec.parse(mesh) for mesh in _MESHES]
    cluster = Topology.parse("h100:8x8")
    links = {spec: axis_links(cluster, spec) for spec in specs}
    candidates = [
        (replace(config, model=model, grad_accum=accum), spec)
        for spec, accum, model in itertools.product(specs, (1, 2, 4), models)
    ]
    done, start = 0, time.process_time()
    for one, mesh in itertools.cycle(candidates):
        rules = choose_rules(one, mesh)
        chip = CHIPS["h100"]
        estimate(one, mesh, rules, chip, links[mesh], compute_itemsize=2, fused_attention=True)
        done += 1
        if done % 50 == 0 and time.process_time() - start >= seconds:
            break
    return done / (time.process_time() - start)
