"""Checkpoints: saved while training goes on, restored on any mesh, whole or not at all.

Orbax does the writing. A save copies every shard to host memory before it returns, so the step
that runs next may donate and overwrite the state; threads write the files. (On CPU devices it
may hold a shard instead of copying it; jax then does not reuse that buffer.) They are written
into a folder ``STEP.orbax-checkpoint-tmp`` that is renamed when all is there, and only after
that are older checkpoints deleted. A process killed at any moment therefore leaves every
checkpoint that was there, and perhaps an unfinished folder, which the next save removes.

Each checkpoint holds two items: ``state``, the arrays under their paths, and ``about``, one JSON
file with the shape and dtype of every array, the held-out loss, and what the caller adds (data
position, configuration, mesh). The description is compared first, so that a checkpoint of
another model is an error that names leaves, and never mistaken for a damaged one.

Restoring gives each device its part of each array from the file, in the shardings asked for;
the mesh that saved it does not matter. A file that is missing, cut short or overwritten in its
index raises as Orbax reads it, and the checkpoint before is tried. Single bytes changed within
the numbers are not noticed: nothing holds a digest of them yet. A damaged checkpoint is set aside
under another name when the run saves again, for it would otherwise count among the newest, or be
in the way of its own step.

Arrays are stored in nested dicts by path, RNG keys as their numbers. Orbax can store custom
pytree nodes, but then the files depend on how optax happens to nest its states, and empty
states and RNG keys come back by rules of their own.

Cost: the state once more in host memory until it is written. Orbax takes about as long to import
as flax, so it is imported by the first save or restore, or by `Checkpoints.prepare`.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from meshwright.sharding.errors import CheckpointError, MeshwrightError, RunError
from meshwright.train.relayout import Reordering
from meshwright.train.runfolder import is_full_disk, refuse, saved_steps

__all__ = ["Checkpoints", "Restored"]

_UNFINISHED = "*.orbax-checkpoint-tmp*"
_SET_ASIDE = "unusable-"
_REPLICA_SLICE_BYTES = 16 * 2**20
_SHOWN = 4


@dataclass(frozen=True)
class Restored:
    """A checkpoint as it was restored.

    Attributes:
        step: the step it was saved at.
        state: arrays in the structure and shardings asked for.
        extra: what the run saved beside the state.
        notes: a sentence for each newer checkpoint that could not be used.
    """

    step: int
    state: Any
    extra: dict[str, Any]
    notes: tuple[str, ...]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie, one folder a step; made by the first save.
        keep_last: newest checkpoints to keep, one or more.
        keep_best: checkpoints with the lowest held-out loss to keep besides.
    """

    def __init__(self, folder: Path, keep_last: int = 3, keep_best: int = 1) -> None:
        self._folder = folder.absolute()
        self._keep = _LastAndBest(keep_last, keep_best, {})
        self._manager: Any = None
        self._opening = threading.Lock()
        self._unusable: list[int] = []
        self._writable = False
        self._needed = 0

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self._folder

    def path(self, step: int) -> Path:
        """The folder of one checkpoint."""
        return self._folder / str(step)

    def prepare(self) -> None:
        """Import Orbax and read what is there, ahead of time; may run in another thread."""
        self._open()

    def save(
        self, step: int, state: Any, extra: dict[str, Any], eval_loss: float | None = None
    ) -> None:
        """Save in the background; returns once the state is copied and may be donated.

        Waits for the save before, if that is still being written. A step that is saved already
        is not saved again.

        Args:
            step: its number.
            state: pytree of arrays, RNG keys among them.
            extra: JSON values to give back at restore.
            eval_loss: held-out loss at this step, if known; the lowest are kept.

        Raises:
            RunError: the disk is full or the folder not writable, now or during the save before.
        """
        self.wait()
        manager = self._open_for_writing()
        if step in manager.all_steps():
            return
        loss = eval_loss if eval_loss is not None and math.isfinite(eval_loss) else None
        about = {
            "leaves": _described(state),
            "keys": _key_kinds(state),
            "eval_loss": loss,
            "extra": extra,
        }
        self._keep.losses[step] = loss
        self._needed = sum(int(leaf.nbytes) for leaf in jax.tree.leaves(state))
        args = _orbax().args
        items = args.Composite(state=args.PyTreeSave(_nested(state)), about=args.JsonSave(about))
        try:
            manager.save(step, args=items, force=True)
        except Exception as error:
            if not isinstance(error, OSError) and not is_full_disk(error):
                raise
            raise self._failed(error) from error

    def wait(self) -> None:
        """Wait until what was saved is on disk, and older checkpoints are deleted.

        Raises:
            RunError: the save failed, as on a full disk; the checkpoints before it are whole.
        """
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Wait as `wait` does, then end Orbax's threads."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()
                self._manager = None

    def restore(
        self, abstract: Any, reordering: Callable[[dict[str, Any]], Reordering] | None = None
    ) -> Restored:
        """Restore the newest usable checkpoint, each array straight into its sharding.

        Args:
            abstract: the state as ShapeDtypeStructs, each with the sharding it is to have.
            reordering: what was saved beside the state → how its layers are to be reordered.

        Raises:
            CheckpointError: there is none; none can be used, naming each; or the newest is of
                another model, naming the first leaves that differ.
        """
        steps = saved_steps(self._folder)
        notes: list[str] = []
        for step in reversed(steps):
            found = self._try(step, abstract, notes, reordering)
            if found is not None:
                return found
            self._unusable.append(step)
        raise CheckpointError(
            f"cannot use any checkpoint in `{self._folder}`",
            why="; ".join(notes) if notes else "there is none",
            fix="start a new run with another --out",
        )

    def _try(
        self,
        step: int,
        abstract: Any,
        notes: list[str],
        reordering: Callable[[dict[str, Any]], Reordering] | None,
    ) -> Restored | None:
        try:
            about = self._about(step)
            order = reordering(about["extra"]) if reordering else None
            saved = order.as_saved(abstract) if order and order.needed else abstract
            self._check_same_model(step, about["leaves"], _described(saved))
            ocp, nested = _orbax(), _nested(saved)
            into = ocp.checkpoint_utils.construct_restore_args(nested)
            restore = ocp.args.PyTreeRestore(nested, restore_args=into)
            items = ocp.args.Composite(state=restore)
            arrays = self._open().restore(step, args=items).state
            state = _unnested(arrays, saved, about["keys"])
            if order and order.needed:
                state = order.to_run(abstract)(state)
        except MeshwrightError:
            raise
        except Exception as error:
            notes.append(f"checkpoint {step} is damaged ({_brief(error)})")
            return None
        return Restored(step, state, about["extra"], tuple(notes))

    def _about(self, step: int) -> dict[str, Any]:
        args = _orbax().args
        restored = self._open().restore(step, args=args.Composite(about=args.JsonRestore()))
        return restored.about

    def _check_same_model(
        self, step: int, there: dict[str, list[Any]], here: dict[str, list[Any]]
    ) -> None:
        differing = [
            f"`{path}` is {_shown(there.get(path))} there and {_shown(here.get(path))} here"
            for path in {**here, **there}
            if there.get(path) != here.get(path)
        ]
        if differing:
            more = len(differing) - _SHOWN
            raise CheckpointError(
                f"cannot restore checkpoint {step}: it is of another model or optimizer",
                where=str(self.path(step)),
                why="; ".join(differing[:_SHOWN]) + (f"; and {more} more" if more > 0 else ""),
                fix="use the model and optimizer it was saved with, or another --out",
            )

    def _open(self) -> Any:
        with self._opening:
            if self._manager is None:
                ocp = _orbax()
                options = ocp.CheckpointManagerOptions(create=False, preservation_policy=self._keep)
                self._manager = ocp.CheckpointManager(
                    self._folder,
                    options=options,
                    item_handlers={
                        "state": _state_handler(ocp),
                        "about": ocp.JsonCheckpointHandler(),
                    },
                )
            return self._manager

    def _open_for_writing(self) -> Any:
        """The manager, once the folder exists, leftovers are gone and unusable ones set aside."""
        manager = self._open()
        if self._writable:
            return manager
        if jax.process_index() == 0:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._clear_unfinished()
                for step in self._unusable:
                    self.path(step).rename(_free_name(self._folder / f"{_SET_ASIDE}{step}"))
            except OSError as error:
                raise refuse("cannot save a checkpoint", self._folder, error) from error
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("meshwright checkpoint folder")
        manager.reload()
        for step in manager.all_steps():
            self._keep.losses[step] = self._saved_loss(step)
        self._unusable.clear()
        self._writable = True
        return manager

    def _saved_loss(self, step: int) -> float | None:
        try:
            return self._about(step)["eval_loss"]
        except Exception:  # a damaged one is not among the best
            return None

    def _clear_unfinished(self) -> None:
        for path in self._folder.glob(_UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)

    def _failed(self, error: Exception) -> RunError:
        """Make room again, and the error to raise; Orbax forgets its steps when a save fails."""
        if jax.process_index() == 0:
            self._clear_unfinished()
        self._manager.reload()
        return refuse("cannot save a checkpoint", self._folder, error, self._needed)


@dataclass(frozen=True)
class _LastAndBest:
    """Orbax's preservation policy: the newest, and those with the lowest held-out loss."""

    last: int
    best: int
    losses: dict[int, float | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        known = {step: self.losses.get(step) for step in steps}
        ranked = sorted((loss, step) for step, loss in known.items() if loss is not None)
        kept = {*sorted(steps)[-self.last :], *(step for _, step in ranked[: self.best])}
        return [step in kept for step in steps]


@functools.cache
def _state_handler(ocp: Any) -> Any:
    """A handler of pytrees of arrays that does not cut small replicated ones.

    By default Orbax has each replica write a part of every replicated array, cut on the device:
    a program to compile for each shape. For small arrays that costs far more than it saves, and
    it is the training loop that waits.
    """
    arrays = ocp.type_handlers.ArrayHandler(
        min_slice_bytes_for_replica_parallel=_REPLICA_SLICE_BYTES
    )
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _orbax() -> Any:
    """Orbax, imported once, and from then on silent: a failure is told by the error it raises.

    Besides logging what it raises, it reports in three more ways when one of many reads or
    writes has failed and the others end, perhaps much later, with nobody waiting for them: a
    callback for an event loop that is closed, a task never asked for its result, a coroutine
    dropped half way. Only these are dropped here, and only Orbax's.
    """
    import orbax.checkpoint

    shown = sys.unraisablehook

    def all_but_abandoned(event: Any) -> None:
        late = event.object is None and str(event.exc_value) == "Event loop is closed"
        code = event.object.cr_code if inspect.iscoroutine(event.object) else None
        if not late and (code is None or "orbax" not in Path(code.co_filename).parts):
            shown(event)

    sys.unraisablehook = all_but_abandoned
    logging.getLogger("absl").addFilter(lambda log: "orbax" not in Path(log.pathname).parts)
    logging.getLogger("asyncio").addFilter(
        lambda log: "orbax" not in (text := log.getMessage()) or "never retrieved" not in text
    )
    return orbax.checkpoint


def _paths(tree: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Leaves with the names on their path, RNG keys among them."""
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield tuple(jax.tree_util.keystr((key,), simple=True) for key in keys), leaf


def _described(state: Any) -> dict[str, list[Any]]:
    """Shape and dtype of each leaf by path, as JSON values."""
    return {"/".join(names): [*leaf.shape, str(leaf.dtype)] for names, leaf in _paths(state)}


def _nested(state: Any) -> dict[str, Any]:
    """Nested dicts of the leaves by path; arrays or ShapeDtypeStructs, RNG keys as numbers."""
    nested: dict[str, Any] = {}
    for (*parents, last), leaf in _paths(state):
        inside = nested
        for name in parents:
            inside = inside.setdefault(name, {})
        inside[last] = _numbers_of(leaf) if _is_key(leaf) else leaf
    return nested


def _unnested(nested: dict[str, Any], abstract: Any, kinds: dict[str, str]) -> Any:
    """Undo `_nested`: the leaves in the structure of ``abstract``."""
    leaves = []
    for names, wanted in _paths(abstract):
        found: Any = nested
        for name in names:
            found = found[name]
        if _is_key(wanted):
            found = jax.random.wrap_key_data(found, impl=kinds["/".join(names)])
        leaves.append(found)
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _key_kinds(state: Any) -> dict[str, str]:
    """The generator of each RNG key by path: a dtype alone cannot be turned into one again."""
    return {
        "/".join(names): str(jax.random.key_impl(leaf))
        for names, leaf in _paths(state)
        if _is_key(leaf)
    }


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _numbers_of(key: Any) -> Any:
    if not isinstance(key, jax.ShapeDtypeStruct):
        return jax.random.key_data(key)
    data = jax.eval_shape(jax.random.key_data, key)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)


def _shown(leaf: list[Any] | None) -> str:
    if leaf is None:
        return "absent"
    *shape, dtype = leaf
    return f"{'×'.join(map(str, shape)) or 'a scalar'} {dtype}"


def _brief(error: Exception) -> str:
    """The first line of a library's error, cut to what a person reads."""
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    return first if len(first) <= 120 else first[:119] + "…"


def _free_name(path: Path) -> Path:
    """``path``, or with a number added where that is taken."""
    names = [path, *(path.with_name(f"{path.name}-{count}") for count in range(2, 100))]
    return next(name for name in names if not name.exists())
