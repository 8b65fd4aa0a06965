"""Checkpoints: same values on another mesh, the last and best kept, damage and full disks survived.

The states are a few small arrays; what is tested is the order of events, not the speed.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from meshwright.sharding.errors import CheckpointError, RunError
from meshwright.sharding.processes import fetch
from meshwright.train.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("devices")

Opened = Callable[..., Checkpoints]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """The kinds of nodes and leaves a train state has."""

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


def mesh_of(**sizes: int) -> Mesh:
    """A mesh of the first devices, as many as it takes."""
    shape = tuple(sizes.values())
    chosen = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return Mesh(chosen, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def shardings(state: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """``spec`` for the matrices, whole for the rest."""
    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: split if leaf.ndim == 2 else whole, state)


def new_state(width: int = 8) -> State:
    shape = (16, width)
    params = {
        "embedding": jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape),
        "layers": {"attn": {"wq": jnp.full(shape, 2.5)}, "norm": {"scale": jnp.ones((3,))}},
    }
    state = State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optax.adamw(1e-3).init(params),
        key=jax.random.key(7),
    )
    return jax.device_put(state, shardings(state, mesh_of(fsdp=8), PartitionSpec("fsdp")))


def abstract_of(state: Any, placed: Any | None = None) -> Any:
    placed = jax.tree.map(lambda leaf: leaf.sharding, state) if placed is None else placed
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        placed,
    )


def numbers(tree: Any) -> list[np.ndarray]:
    """The values of the leaves, copied: a view of a buffer would change when it is donated."""
    return [np.array(leaf, copy=True) for leaf in jax.tree.leaves(fetch(tree))]


def assert_same(found: Any, expected: list[np.ndarray]) -> None:
    for got, wanted in zip(numbers(found), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """Opens the checkpoints of one folder, as a new process would; closes them at the end."""
    every: list[Checkpoints] = []

    def open_(keep_last: int = 3, keep_best: int = 1, folder: Path | None = None) -> Checkpoints:
        every.append(Checkpoints(folder or tmp_path / "checkpoints", keep_last, keep_best))
        return every[-1]

    yield open_
    for checkpoints in every:
        checkpoints.close()


def save_steps(checkpoints: Checkpoints, *steps: int, width: int = 8, **losses: float) -> State:
    """Save states whose params hold their step; ``s20=1.5`` gives step 20 a held-out loss."""
    state = new_state(width)
    for step in steps:
        params = jax.tree.map(lambda leaf, step=step: jnp.full_like(leaf, step), state.params)
        state = replace(state, params=params)
        checkpoints.save(step, state, {"at": step}, losses.get(f"s{step}"))
    checkpoints.wait()
    return state


def kept(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def damage(checkpoints: Checkpoints, step: int) -> None:
    """Cut every file of a checkpoint in half, as a crashed file system may."""
    for path in checkpoints.path(step).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# Saving and restoring


def test_restores_what_was_saved_with_keys_nodes_and_extra(opened: Opened) -> None:
    state = new_state()
    saving = opened()
    saving.save(3, state, {"data": {"position": 96}, "mesh": "fsdp=8"}, eval_loss=2.5)
    saving.wait()
    restored = opened().restore(abstract_of(state))
    assert (restored.step, restored.notes) == (3, ())
    assert restored.extra == {"data": {"position": 96}, "mesh": "fsdp=8"}
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert restored.state.key.dtype == state.key.dtype
    assert_same(restored.state, numbers(state))


@pytest.mark.parametrize(
    ("sizes", "spec"),
    [
        ({"data": 2, "tensor": 4}, PartitionSpec(None, "tensor")),
        ({"data": 2, "fsdp": 2, "tensor": 2}, PartitionSpec(("data", "fsdp"), "tensor")),
        ({"fsdp": 2}, PartitionSpec("fsdp")),
    ],
    ids=["columns", "both", "fewer devices"],
)
def test_restores_on_another_mesh_straight_into_its_shards(
    opened: Opened, sizes: dict[str, int], spec: PartitionSpec
) -> None:
    state = new_state()
    saving = opened()
    saving.save(1, state, {})
    saving.wait()
    placed = shardings(state, mesh_of(**sizes), spec)
    restored = opened().restore(abstract_of(state, placed))
    assert_same(restored.state, numbers(state))
    for leaf, wanted in zip(jax.tree.leaves(restored.state), jax.tree.leaves(placed), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
        shard = wanted.shard_shape(leaf.shape)
        assert all(part.data.shape == shard for part in leaf.addressable_shards)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 4}], ids=["split", "copies"])
def test_a_state_donated_while_it_is_written_is_saved_as_it_was(
    opened: Opened, sizes: dict[str, int]
) -> None:
    step = jax.jit(
        lambda state: replace(state, params=jax.tree.map(lambda leaf: leaf + 1, state.params)),
        donate_argnums=0,
    )
    state = new_state()
    state = step(jax.device_put(state, shardings(state, mesh_of(**sizes), PartitionSpec("fsdp"))))
    expected, abstract = numbers(state), abstract_of(state)
    saving = opened()
    saving.save(1, state, {})
    jax.block_until_ready(step(step(state)))
    saving.wait()
    assert_same(opened().restore(abstract).state, expected)


def test_a_step_saved_already_is_not_saved_again(opened: Opened) -> None:
    checkpoints = opened()
    save_steps(checkpoints, 5)
    checkpoints.save(5, new_state(), {"at": "again"})
    assert checkpoints.restore(abstract_of(new_state())).extra == {"at": 5}


# What is kept


def test_the_newest_and_those_with_the_lowest_held_out_loss_are_kept(opened: Opened) -> None:
    checkpoints = opened(keep_last=2, keep_best=1)
    save_steps(checkpoints, 10, 20, 30, 40, 50, s10=3.0, s20=1.5, s30=2.0, s40=float("nan"))
    assert kept(checkpoints) == ["20", "40", "50"]


def test_losses_are_known_again_after_a_restart(opened: Opened) -> None:
    before = opened(keep_last=1, keep_best=1)
    save_steps(before, 10, 20, s10=1.0, s20=2.0)
    before.close()
    after = opened(keep_last=1, keep_best=1)
    save_steps(after, 30, 40, s30=1.5)
    assert kept(after) == ["10", "40"]


def test_no_best_is_kept_when_none_is_asked_for(opened: Opened) -> None:
    checkpoints = opened(keep_last=1, keep_best=0)
    save_steps(checkpoints, 10, 20, s10=1.0, s20=2.0)
    assert kept(checkpoints) == ["20"]


# Damage


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(opened: Opened) -> None:
    saving = opened()
    save_steps(saving, 10, 20, 30)
    saving.close()
    damage(saving, 30)
    damage(saving, 20)
    resumed = opened(keep_last=1)
    restored = resumed.restore(abstract_of(new_state()))
    assert (restored.step, restored.extra) == (10, {"at": 10})
    assert [note.split(" (")[0] for note in restored.notes] == [
        "checkpoint 30 is damaged",
        "checkpoint 20 is damaged",
    ]
    assert kept(resumed) == ["10", "20", "30"], "restoring alone must change nothing on disk"

    # Going on: the damaged ones neither count as newest nor block their own step.
    save_steps(resumed, 20)
    assert kept(resumed) == ["20", "unusable-20", "unusable-30"]
    assert resumed.restore(abstract_of(new_state())).step == 20


def test_any_single_damaged_file_is_noticed_or_does_not_matter(opened: Opened) -> None:
    saving = opened()
    # Wide enough for shards to have files of their own: small ones are kept in the index.
    state = save_steps(saving, 10, 20, width=512)
    saving.close()
    expected, abstract = numbers(state), abstract_of(state)
    files = [path for path in saving.path(20).rglob("*") if path.is_file()]
    assert len(files) > 5
    noticed = 0
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        restored = opened().restore(abstract)
        path.write_bytes(content)
        if restored.step == 20:
            assert_same(restored.state, expected)
        else:
            assert restored.step == 10 and restored.notes, path
            noticed += 1
    assert noticed > 3


def test_when_none_can_be_used_each_is_named(opened: Opened) -> None:
    checkpoints = opened()
    save_steps(checkpoints, 10, 20)
    damage(checkpoints, 10)
    damage(checkpoints, 20)
    with pytest.raises(CheckpointError, match="checkpoint 20 is damaged .*checkpoint 10 is damage"):
        opened().restore(abstract_of(new_state()))


def test_an_empty_folder_has_no_checkpoint(opened: Opened) -> None:
    with pytest.raises(CheckpointError, match="there is none"):
        opened().restore(abstract_of(new_state()))


def test_another_model_is_named_and_not_taken_for_damage(opened: Opened) -> None:
    saving = opened()
    save_steps(saving, 10, 20)
    wider = new_state(width=4)
    params = {**wider.params, "head": jnp.ones((4, 2))}
    other = replace(wider, params=jax.device_put(params, jax.devices()[0]))
    with pytest.raises(CheckpointError, match="another model or optimizer") as caught:
        opened().restore(abstract_of(other))
    text = str(caught.value)
    assert "`params/embedding` is 16×8 float32 there and 16×4 float32 here" in text
    assert "`params/head` is absent there and 4×2 float32 here" in text
    assert "and 3 more" in text


def test_a_process_killed_while_saving_leaves_the_checkpoint_before(
    opened: Opened, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    program = f"""
        import os, signal
        from pathlib import Path
        import jax, jax.numpy as jnp
        from meshwright.train.checkpoint import Checkpoints
        state = {{"w": jax.random.normal(jax.random.key(0), (2000, 2000))}}
        checkpoints = Checkpoints(Path({str(folder)!r}))
        checkpoints.save(1, state, {{}})
        checkpoints.wait()
        checkpoints.save(2, jax.tree.map(jnp.zeros_like, state), {{}})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=120)
    assert ended.returncode == -signal.SIGKILL
    left = opened(folder=folder)
    assert len(kept(left)) == 2 and "1" in kept(left), kept(left)
    abstract = {"w": jax.ShapeDtypeStruct((2000, 2000), jnp.float32)}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    restored = left.restore(jax.tree.map(lambda leaf: leaf.update(sharding=device), abstract))
    assert restored.step == 1
    assert float(jnp.abs(restored.state["w"]).sum()) > 0
    left.save(3, restored.state, {})
    left.wait()
    assert kept(left) == ["1", "3"], "the unfinished folder is cleared"


# Full disks


def test_a_full_disk_while_saving_says_how_much_is_missing(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = opened()
    state = save_steps(checkpoints, 10)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(RunError, match=r"the disk is full: it takes up to 3\.1 KiB, .* are free"):
        checkpoints.save(20, state, {})
    monkeypatch.undo()
    checkpoints.save(20, state, {})
    checkpoints.wait()
    assert kept(checkpoints) == ["10", "20"]


def test_a_disk_that_really_is_full_loses_no_checkpoint(
    opened: Opened, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        checkpoints = opened(keep_last=1, folder=small / "checkpoints")
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        state = {"w": jax.random.normal(jax.random.key(0), (100, 100))}
        checkpoints.save(1, state, {})
        large = {str(n): jax.random.normal(jax.random.key(n), (400, 400)) for n in range(4)}
        checkpoints.save(2, large, {})
        with pytest.raises(RunError, match=r"the disk is full: it takes up to 2\.4 MiB"):
            checkpoints.wait()
        assert kept(checkpoints) == ["1"], "what was half written makes room again"
        found = opened(folder=checkpoints.folder).restore(abstract_of(state))
        assert found.step == 1 and found.state["w"].sharding == device
        checkpoints.save(3, state, {})
        checkpoints.close()
        assert kept(checkpoints) == ["3"]
        assert capfd.readouterr().err == ""
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
