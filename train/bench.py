"""The benchmarks: what the README quotes, each one command, measured where it runs.

``meshwright bench NAME`` prints a table to stderr and one JSON object as the last line of stdout.
Times are ratios within one run or medians of repeated runs; nothing here is a test. All take
the flags of ``train``, so any of them can be asked of another model or mesh.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.topology import Topology
from meshwright.train.config import TrainConfig
from meshwright.train.handwritten import handwritten_step
from meshwright.train.parity import Case, all_cases, compare, program_of, run_case
from meshwright.train.program import Program

__all__ = [
    "collective_counts",
    "finish",
    "launch",
    "lowering",
    "overhead",
    "parity",
    "pauses",
    "say",
    "text_batches",
]

_PAIRS = 40
_PARITY_STEPS = 20
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def parity(config: TrainConfig) -> int:
    """Losses and gradients on every mesh of 1, 2, 4 and 8 devices against those of one device.

    In bfloat16 the yardstick is one device against itself with the rows of each batch in
    another order, which is the same sum in another order. With ``--mesh`` only the cases of that
    mesh are run.
    """
    Topology("cpu", (8,)).devices()
    config = replace(config, dtype=config.dtype or "float32", topology="cpu:8")
    batches = list(text_batches(config, _PARITY_STEPS))
    one = run_case(config, Case("data=1"), batches)
    worst = {"gradient": 0.0, "loss": 0.0}
    cases = [case for case in all_cases() if case != Case("data=1")]
    if config.mesh != "auto":
        cases = [case for case in cases if case.mesh == str(MeshSpec.parse(config.mesh))]
    equal = 0
    built = set()
    for case in cases:
        # Each mesh builds its own initial values once; its other cases start from the same.
        start = one.initial if case.mesh in built else None
        built.add(case.mesh)
        found = compare(one, run_case(config, case, batches, start))
        equal += start is None and found.initial_equal
        worst["gradient"] = max(worst["gradient"], found.gradient)
        worst["loss"] = max(worst["loss"], found.loss)
        say(
            f"{case!s:<42} gradient {found.gradient:.1e}  loss {found.loss:.1e}  "
            + ("" if start else f"initial values {'equal' if found.initial_equal else 'DIFFER'}")
        )
    reordered = {"gradient": 0.0, "loss": 0.0}
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(config.batch_size)
        shuffled = [{name: x[order] for name, x in batch.items()} for batch in batches]
        for case in (Case("data=1"), Case("data=1", config.batch_size // 4)):
            found = compare(one, run_case(config, case, shuffled, one.initial))
            reordered["gradient"] = max(reordered["gradient"], found.gradient)
            reordered["loss"] = max(reordered["loss"], found.loss)
    say(f"worst of {len(cases)} cases: gradient {worst['gradient']:.1e}, loss {worst['loss']:.1e}")
    say(
        f"one device, rows reordered: gradient {reordered['gradient']:.1e}, "
        f"loss {reordered['loss']:.1e}"
    )
    return finish(
        dtype=config.dtype,
        cases=len(cases),
        steps=_PARITY_STEPS,
        meshes=len(built),
        meshes_with_equal_initial_values=equal,
        worst=worst,
        one_device_reordered=reordered,
    )


def overhead(config: TrainConfig) -> int:
    """Time of the step over the same mathematics written by hand, with both's collectives."""
    Topology("cpu", (8,)).devices()
    config = replace(config, mesh="data=2,fsdp=2,tensor=2", dtype="float32", grad_accum=1)
    program = program_of(config)
    (batch,) = text_batches(config, 1)
    ours, by_hand = _two_steps(program, batch)
    seconds: dict[str, list[float]] = {"ours": [], "by_hand": []}
    losses = {}
    for _ in range(_PAIRS):
        for name, step in (("ours", ours), ("by_hand", by_hand)):
            began = time.perf_counter()
            losses[name] = step()
            seconds[name].append(time.perf_counter() - began)
    warm = {name: found[3:] for name, found in seconds.items()}
    ratio = statistics.median(a / b for a, b in zip(warm["ours"], warm["by_hand"], strict=True))
    found = {name: statistics.median(values) for name, values in warm.items()}
    counts = {"ours": ours.collectives, "by_hand": by_hand.collectives}
    for name in ("ours", "by_hand"):
        say(f"{name:<8} {found[name]:.4f} s a step, collectives {counts[name]}")
    say(f"ratio of paired steps, median of {len(warm['ours'])}: {ratio:.3f}")
    return finish(ratio=ratio, seconds=found, collectives=counts, losses=losses)


def launch(config: TrainConfig) -> int:
    """Seconds from the command to its first finished step: empty caches, then full ones."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm", "warm again"):
            out = str(Path(folder) / name.replace(" ", "-"))
            began = time.perf_counter()
            report = _run_train(config, out, {"XDG_CACHE_HOME": folder}, ["--steps", "1"])
            found[name] = {
                "first_step_seconds": report["first_step_seconds"],
                "whole_command_seconds": time.perf_counter() - began,
            }
            say(
                f"{name:<10} first step after {report['first_step_seconds']:.1f} s, "
                f"command done after {found[name]['whole_command_seconds']:.1f} s"
            )
    return finish(**{name.replace(" ", "_"): values for name, values in found.items()})


def lowering(config: TrainConfig) -> int:
    """Seconds to trace and lower the step with 4 and with 64 layers."""
    Topology("cpu", (8,)).devices()
    config = replace(config, mesh="data=2,fsdp=2,tensor=2")
    found: dict[int, list[float]] = {4: [], 64: []}
    for number in range(4):
        for layers in found:
            model = replace(config.model, name=f"bench{number}", layers=layers)
            program = program_of(replace(config, model=model))
            began = time.perf_counter()
            program.lower_step()
            found[layers].append(time.perf_counter() - began)
    few, many = (statistics.median(values[1:]) for values in found.values())
    say(f"4 layers {few:.2f} s, 64 layers {many:.2f} s, ratio {many / few:.2f}")
    return finish(seconds_4_layers=few, seconds_64_layers=many, ratio=many / few)


def pauses(config: TrainConfig) -> int:
    """Share of step time the loop waits for data, and how long a checkpoint holds it up."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--steps", "40", "--checkpoint-every", "10", "--eval-every", "0"]
        report = _run_train(config, str(Path(folder) / "run"), {}, flags)
    step = report["step_seconds"]
    waited = report["data_wait_seconds"] / (step * (report["steps"] - 1))
    blocked = report["save_block_seconds"] / step
    say(f"step {step:.3f} s; waiting for data {waited:.2%} of it")
    say(f"longest stop for a checkpoint {report['save_block_seconds']:.3f} s: {blocked:.2f} steps")
    return finish(step_seconds=step, data_wait_share=waited, save_block_steps=blocked)


class _Timed:
    """A compiled step with its state, called for its side effect and waited for."""

    def __init__(self, compiled: Any, state: Any, batch: Any, loss: Callable[[Any], Any]) -> None:
        self._compiled, self._state, self._batch, self._loss = compiled, state, batch, loss
        self.collectives = collective_counts(compiled.as_text())

    def __call__(self) -> float:
        out = self._compiled(*self._state, *self._batch)
        self._state = out[: len(self._state)]
        value = float(self._loss(out))
        jax.block_until_ready(self._state)
        return value


def _two_steps(program: Program, host: dict[str, np.ndarray]) -> tuple[_Timed, _Timed]:
    spec, shardings = program.spec, program.shardings
    batch = program.place({**host, "weights": np.ones_like(host["weights"])})
    ours = _Timed(
        program.lower_step().compile(), (program.init(),), (batch,), lambda out: out[1]["loss"]
    )
    plain = {name: batch[name][0] for name in ("tokens", "targets")}
    rows = plain["tokens"].sharding
    step = jax.jit(
        handwritten_step(
            program.config.model, spec.mesh, spec.optimizer, spec.clip_norm, spec.compute_dtype
        ),
        in_shardings=(shardings.params, shardings.opt_state, rows, rows),
        out_shardings=(shardings.params, shardings.opt_state, None),
        donate_argnums=(0, 1),
    )
    state = program.init()
    arguments = (state.params, state.opt_state, plain["tokens"], plain["targets"])
    by_hand = _Timed(
        step.lower(*arguments).compile(), arguments[:2], arguments[2:], lambda out: out[2]
    )
    return ours, by_hand


def collective_counts(text: str) -> dict[str, int]:
    """Collective operations in a compiled program's text, by kind; loops are not multiplied."""
    found = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in _KINDS}
    return {kind: count for kind, count in found.items() if count}


def text_batches(config: TrainConfig, count: int) -> Iterator[dict[str, np.ndarray]]:
    """The first batches of a run's text, on the host."""
    from meshwright.train.batches import Batches
    from meshwright.train.corpus import open_corpus

    corpus = open_corpus(config.data, seq_len=config.seq_len, vocab_size=config.model.vocab_size)
    with Batches(corpus.train, config.batch_size, seed=config.seed) as batches:
        for _ in range(count):
            yield next(batches)


def _run_train(
    config: TrainConfig, out: str, environment: dict[str, str], flags: list[str]
) -> dict[str, Any]:
    """Run ``meshwright train`` in a process of its own and return its report."""
    command = [sys.executable, "-m", "meshwright", "train", "--out", out, "--model"]
    command += [config.model.name, "--topology", "cpu:8", "--sample-tokens", "0", *flags]
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "XLA_")) or not environment
    }
    done = subprocess.run(
        command, env={**kept, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def finish(**numbers: Any) -> int:
    """Write a benchmark's numbers to stdout, as JSON; returns the exit code, 0."""
    document = {**numbers, "cores": os.cpu_count(), "jax": jax.__version__}
    sys.stdout.write(json.dumps(document) + "\n")
    return 0


def say(text: str) -> None:
    """Write a line to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
