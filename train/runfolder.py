"""The folder a run writes to: who may write there, and what lies where.

::

    OUT/config.yaml     the resolved configuration, which can be fed back
    OUT/metrics.jsonl   one JSON object a logged step
    OUT/checkpoints/    a folder a saved step, named by its number
    OUT/tensorboard/    event files
    OUT/profile/        traces of the profiled steps

A folder belongs to one run. Starting a run in a folder that holds anything is refused, so
nothing is overwritten; only ``--resume`` goes on in an existing one. With no name given, the
next free number of ``runs/MODEL-NNN`` is taken by creating the folder, which only one of several
runs started at once can do.

The alternative, a time stamp in the name, always is free, but cannot be guessed or typed.

Every failure to write, here and in the files of the run, ends in one place (`refuse`), which
knows a full disk from a folder without permission.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from meshwright.models.config import ModelConfig
from meshwright.sharding.errors import CheckpointError, MeshwrightError, RunError
from meshwright.train.config import default_config
from meshwright.train.configfile import apply, load

__all__ = ["RunFolder", "is_full_disk", "refuse", "saved_steps", "write_whole"]

_RUNS = Path("runs")
# Fields that change neither the parameters' shapes nor what the model computes with them.
_FREE = ("name", "remat", "init_std")
_SHOWN = 4
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run.

    Attributes:
        path: the folder itself.
    """

    path: Path

    @classmethod
    def open(cls, out: str | None, model_name: str, resume: bool) -> RunFolder:
        """Create the folder of a new run, or find that of a run to go on with.

        Args:
            out: folder; None for the next free ``runs/MODEL-NNN``.
            model_name: for that name.
            resume: go on with the run in the folder.

        Raises:
            RunError: the folder holds another run or other files, cannot be created, or, to
                resume, holds no run.
            CheckpointError: to resume, the run there has saved no checkpoint.
        """
        try:
            if resume:
                return cls._existing(out, model_name)
            return cls._new(Path(out)) if out else cls._next_free(model_name)
        except OSError as error:
            path = Path(out) if out else _RUNS
            raise refuse(f"cannot use the run folder `{path}`", path, error) from error

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """A folder a saved step."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def profile(self) -> Path:
        """Traces of the profiled steps."""
        return self.path / "profile"

    def write_config(self, text: str) -> None:
        """Write ``config.yaml`` as a whole: a reader finds the old text or the new, never half.

        Raises:
            RunError: the disk is full or the folder not writable.
        """
        write_whole(self.config, text)

    def check_model(self, model: ModelConfig) -> None:
        """Refuse to resume a run with another model than it was started with.

        Args:
            model: the model to train now.

        Raises:
            CheckpointError: a field of the saved configuration's model differs; names the fields.
            RunError: the saved configuration cannot be read.
        """
        try:
            saved = apply(default_config(), load(self.config), str(self.config)).model
        except MeshwrightError as error:
            raise RunError(
                f"cannot resume the run in `{self.path}`",
                where=str(self.config),
                why=error.why or error.what,
                fix="restore the file, or start a new run with another --out",
            ) from None
        there, here = asdict(saved), asdict(model)
        differing = [
            f"{name} {there[name]} there, {here[name]} here"
            for name in here
            if name not in _FREE and there[name] != here[name]
        ]
        if differing:
            more = len(differing) - _SHOWN
            raise CheckpointError(
                f"cannot resume the run in `{self.path}` with another model",
                where=f"{self.config}: model {saved.name}, and now model {model.name}",
                why="; ".join(differing[:_SHOWN]) + (f"; and {more} more" if more > 0 else ""),
                fix="use the model it was started with, or another --out for a new run",
            )

    @classmethod
    def _new(cls, path: Path) -> RunFolder:
        _create(path)
        found = sorted(entry.name for entry in path.iterdir())
        folder = cls(path)
        if found:
            run = folder.config.exists() or folder.checkpoints.exists()
            shown = ", ".join(found[:_SHOWN]) + (", …" if len(found) > _SHOWN else "")
            raise RunError(
                f"cannot start a run in `{path}`",
                why=f"it holds {'another run' if run else 'other files'}: {shown}",
                fix=("add --resume to go on with it, or " if run else "") + "use another --out",
            )
        return folder

    @classmethod
    def _next_free(cls, model_name: str) -> RunFolder:
        taken = _numbers(model_name)
        number = max(taken, default=0) + 1
        while True:
            path = _RUNS / f"{model_name}-{number:03d}"
            _create(_RUNS)
            try:
                path.mkdir()
            except FileExistsError:
                number += 1
            else:
                return cls(path)

    @classmethod
    def _existing(cls, out: str | None, model_name: str) -> RunFolder:
        if out is None:
            newest = max(_numbers(model_name).items(), default=(0, None))[1]
            raise RunError(
                "cannot tell which run to resume",
                why="--resume goes on in the folder of --out, and none is given",
                fix=f"add --out {newest}" if newest else "add --out and the folder of the run",
            )
        folder = cls(Path(out))
        if not folder.config.is_file():
            exists = "it has no config.yaml" if folder.path.is_dir() else "there is no such folder"
            raise RunError(
                f"cannot resume: `{out}` holds no run",
                why=exists,
                fix="check the folder, or leave out --resume to start a new run",
            )
        if not saved_steps(folder.checkpoints):
            raise CheckpointError(
                f"cannot resume the run in `{out}`",
                where=str(folder.checkpoints),
                why="it has saved no checkpoint",
                fix="start a new run with another --out",
            )
        return folder


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps that a checkpoint folder holds, in order; unfinished ones are not among them.

    >>> saved_steps(Path("no/such/folder"))
    []
    """
    if not checkpoints.is_dir():
        return []
    return sorted(int(entry.name) for entry in checkpoints.iterdir() if entry.name.isdigit())


def write_whole(path: Path, text: str) -> None:
    """Replace a file's text at once, so that a kill leaves the old text or the new.

    Raises:
        RunError: the disk is full or the folder not writable.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise refuse(f"cannot write `{path}`", path, error) from error


def refuse(what: str, path: Path, error: Exception, needed: int | None = None) -> RunError:
    """Make the RunError for a failure to write below ``path``; a full disk is said in bytes.

    Args:
        what: what could not be done.
        path: what was written.
        error: an OSError, or another library's error that wraps one.
        needed: bytes the write takes at most, if known.
    """
    if not is_full_disk(error):
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return RunError(
            what,
            where=str(path),
            why=reason.strip().splitlines()[0] if reason.strip() else type(error).__name__,
            fix="check that the folder is writable, or use another --out",
        )
    # Only here, where seconds no longer matter: it imports jax.
    from meshwright.sharding.units import format_bytes

    free = shutil.disk_usage(_existing_parent(path)).free
    takes = f"it takes up to {format_bytes(needed)}, " if needed is not None else ""
    return RunError(
        what,
        where=str(path),
        why=f"the disk is full: {takes}{format_bytes(free)} are free",
        fix="free some space and go on with --resume, or use another --out",
    )


def is_full_disk(error: Exception) -> bool:
    """Whether an error is a full disk or an exhausted quota, also when only its text says so."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    codes = "|".join(str(code) for code in _FULL)
    pattern = rf"No space left on device|Disk quota exceeded|os_error_code='({codes})'"
    return re.search(pattern, str(error)) is not None


def _numbers(model_name: str) -> dict[int, Path]:
    """The numbered run folders of a model, by number."""
    if not _RUNS.is_dir():
        return {}
    found = {}
    for entry in _RUNS.iterdir():
        match = re.fullmatch(re.escape(model_name) + r"-(\d+)", entry.name)
        if match:
            found[int(match.group(1))] = entry
    return found


def _create(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise RunError(
            f"cannot create the folder `{path}`",
            why="there is a file of that name",
            fix="use another --out, or move the file away",
        ) from None
    except OSError as error:
        raise refuse(f"cannot create the folder `{path}`", path, error) from error


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
