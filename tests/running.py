"""Runs the real `meshwright train` on a model so small that compiling it is all that costs.

Every test of a run shares these shapes and settings, so that programs are compiled once and come
from the cache afterwards. The learning rate is constant after warm-up, so that a program does not
depend on the number of steps. Runs happen in this process, and their programs are compiled with
few optimisations, which takes a third of the time.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import pytest

from meshwright.scripts.main import main
from meshwright.train.progress import Progress

__all__ = ["MESH", "ROWS", "SEQ_LEN", "STEPS", "Ran", "Runs", "sample_text"]

MESH = "data=2,fsdp=2,tensor=2"
STEPS = 12
ROWS = 8
SEQ_LEN = 32

_QUICK = "jax_disable_most_optimizations"

_SETTINGS: dict[str, object] = {
    "model": "tiny",
    "model.layers": 2,
    "model.embed": 32,
    "model.mlp": 64,
    "model.heads": 4,
    "model.kv-heads": 4,
    "model.head-dim": 8,
    "mesh": MESH,
    "steps": STEPS,
    "batch-size": ROWS,
    "seq-len": SEQ_LEN,
    "optimizer.schedule": "constant",
    "optimizer.warmup-steps": 2,
    "log-every": 1,
    "eval-every": 4,
    "eval-batches": 2,
    "checkpoint-every": 4,
    "sample-tokens": 0,
}


@dataclass(frozen=True)
class Ran:
    """What a command came to.

    Attributes:
        code: exit code.
        out, err: what it wrote to stdout and stderr.
        folder: the run's folder.
    """

    code: int
    out: str
    err: str
    folder: Path

    @property
    def document(self) -> dict[str, Any]:
        """The JSON object on the last line of stdout."""
        return json.loads(self.out.splitlines()[-1])

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``, as they were when this was first asked for."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def losses(self) -> list[float]:
        """Training loss of each logged step."""
        return [record["loss"] for record in self.records]

    @property
    def heldout(self) -> dict[int, float]:
        """Held-out loss by step."""
        return {r["step"]: r["eval_loss"] for r in self.records if "eval_loss" in r}

    @property
    def checkpoints(self) -> list[int]:
        """Steps that a checkpoint is there of."""
        names = [path.name for path in (self.folder / "checkpoints").iterdir()]
        return sorted(int(name) for name in names if name.isdigit())


@dataclass(frozen=True)
class Runs:
    """Starts runs in one folder.

    Attributes:
        root: where runs go by name; ``text.txt`` in it is what they train on.
    """

    root: Path

    @property
    def text(self) -> Path:
        """The training text, written when first asked for."""
        path = self.root / "text.txt"
        if not path.exists():
            path.write_text(sample_text())
        return path

    def words(self, name: str, *extra: str, **settings: object) -> list[str]:
        """The command of a run.

        Args:
            name: of its folder.
            extra: words that go last; a flag among them replaces the same one of the defaults.
            settings: other values; ``data__path`` stands for ``--data.path``, None for no flag.
        """
        chosen = {
            **_SETTINGS,
            "data.path": self.text,
            "data.cache": self.root / "cache",
            "out": self.root / name,
            **{key.replace("__", ".").replace("_", "-"): settings[key] for key in settings},
        }
        kept = {key: value for key, value in chosen.items() if f"--{key}" not in extra}
        return ["train", *_flags(kept), *extra]

    def __call__(self, name: str, *extra: str, **settings: object) -> Ran:
        """Run to the end."""
        return self.command(self.words(name, *extra, **settings), self.root / name)

    def resume(self, name: str, *extra: str, **settings: object) -> Ran:
        """Go on with a run as it was saved, but for the settings given here."""
        chosen = {key.replace("__", ".").replace("_", "-"): settings[key] for key in settings}
        out = str(self.root / name)
        words = ["train", "--resume", "--out", out, *_flags(chosen), *extra]
        return self.command(words, self.root / name)

    def stopped(self, name: str, step: int, number: signal.Signals, **settings: object) -> Ran:
        """Run, and get a signal when ``step`` is finished and the next one is under way."""
        advance = Progress.advance

        def and_signal(progress: Progress, done: int) -> None:
            advance(progress, done)
            if done == step:
                os.kill(os.getpid(), number)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Progress, "advance", and_signal)
            return self(name, **settings)

    def start(self, words: list[str]) -> subprocess.Popen[str]:
        """Start a command as a process of its own, which finds the same compiled programs."""
        environment = {**os.environ, _QUICK.upper(): "true"}
        command = [sys.executable, "-m", "meshwright", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)

    def command(self, words: list[str], folder: Path) -> Ran:
        """Run any command in this process."""
        out, err = io.StringIO(), io.StringIO()
        with _quick_compiler(), redirect_stdout(out), redirect_stderr(err):
            code = main(words)
        return Ran(code, out.getvalue(), err.getvalue(), folder)


@contextmanager
def _quick_compiler() -> Iterator[None]:
    former = jax.config.values[_QUICK]
    jax.config.update(_QUICK, True)
    try:
        yield
    finally:
        jax.config.update(_QUICK, former)


def _flags(settings: dict[str, object]) -> list[str]:
    """Settings as words of a command line: True for a flag without a value, None for no flag."""
    words: list[str] = []
    for name, value in settings.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def sample_text(words: int = 1600) -> str:
    """Text of a few kilobytes that is the same everywhere and not the same from row to row."""
    dice = random.Random(0)
    known = ["".join(dice.choices("etaoinshrdlu", k=dice.randint(2, 7))) for _ in range(60)]
    return " ".join(dice.choices(known, k=words)) + ".\n"
