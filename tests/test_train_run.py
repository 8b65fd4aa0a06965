"""Training runs from end to end: what is written and said, going on after a stop, every option.

The runs are real, in this process, on the eight simulated devices; `running` has their shapes.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import MESH, ROWS, SEQ_LEN, STEPS, Ran, Runs

from meshwright.models.config import count_parameters
from meshwright.models.pure import functional
from meshwright.scripts.flags import parse
from meshwright.train.checkpoint import Checkpoints
from meshwright.train.config import ContextConfig, PipelineConfig, TrainConfig
from meshwright.train.configfile import dump
from meshwright.train.corpus import open_corpus
from meshwright.train.optimizer import make_optimizer
from meshwright.train.state import TrainState, abstract_state

pytestmark = pytest.mark.usefixtures("devices")

PATIENCE_SECONDS = 120


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Ran:
    """The run that others are held against: all steps at once, nothing special."""
    return runs("whole")


@pytest.fixture(scope="module")
def stopped(runs: Runs) -> Ran:
    """The same run, asked to stop while step 6 is under way."""
    return runs.stopped("stopped", 5, signal.SIGTERM)


def copied(ran: Ran, name: str) -> Ran:
    """The folder of a run under another name, as one would copy it before trying something."""
    folder = ran.folder.parent / name
    shutil.copytree(ran.folder, folder)
    return Ran(ran.code, ran.out, ran.err, folder)


def truncate(folder: Path) -> None:
    """Cut every file in a folder in half."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def config_of(ran: Ran) -> TrainConfig:
    return parse(["--config", str(ran.folder / "config.yaml")], "train")


def restored(ran: Ran) -> TrainState:
    """The state of a run's newest checkpoint, whole on one device."""
    config, device = config_of(ran), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    model = functional(config.model)
    optimizer = make_optimizer(config.optimizer, config.steps, model.dims)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        abstract_state(model.init, optimizer),
    )
    checkpoints = Checkpoints(ran.folder / "checkpoints")
    try:
        return checkpoints.restore(shapes).state
    finally:
        checkpoints.close()


def heldout_loss_by_hand(ran: Ran) -> float:
    """Mean cross-entropy over all held-out tokens, on one device and in one batch."""
    config, state = config_of(ran), restored(ran)
    model = functional(config.model)
    vocab = config.model.vocab_size
    heldout = open_corpus(config.data, seq_len=config.seq_len, vocab_size=vocab).heldout
    rows = {
        name: np.stack([row[name] for row in map(heldout.__getitem__, range(len(heldout)))])
        for name in heldout[0]
    }
    masks = {name: jnp.asarray(rows[name]) for name in ("positions", "segments") if name in rows}
    logits = np.asarray(
        jax.jit(model.apply)(state.params, jnp.asarray(rows["tokens"]), **masks), np.float64
    )
    chosen = np.take_along_axis(logits, rows["targets"][..., None], axis=-1)[..., 0]
    losses = rows["weights"] * (np.log(np.exp(logits).sum(-1)) - chosen)
    return float(losses.sum() / rows["weights"].sum())


# What a run writes and says


def test_the_last_line_on_stdout_is_the_only_one_and_says_what_came_of_it(whole: Ran) -> None:
    assert whole.code == 0
    assert whole.out.count("\n") == 1 and whole.out.endswith("\n")
    said = whole.document
    assert said["steps"] == STEPS
    assert said["loss"] == whole.losses[-1]
    assert said["eval_loss"] == whole.heldout[STEPS]
    assert said["checkpoint"] == str(whole.folder / "checkpoints" / str(STEPS))
    assert Path(said["checkpoint"]).is_dir()
    assert said["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert said["parameters"] == count_parameters(config_of(whole).model)
    for name in ("tokens_per_second", "first_step_seconds", "compile_seconds"):
        assert said[name] > 0, name


def test_every_logged_step_has_its_numbers(whole: Ran) -> None:
    required = {"step", "loss", "grad_norm", "learning_rate", "tokens"}
    required |= {"tokens_per_second", "step_seconds"}
    for record in whole.records:
        assert required <= record.keys()
        assert all(isinstance(value, int | float) for value in record.values())
    assert [record["step"] for record in whole.records] == list(range(1, STEPS + 1))
    assert [record["tokens"] for record in whole.records] == [
        ROWS * SEQ_LEN * step for step in range(1, STEPS + 1)
    ]
    assert list(whole.heldout) == [4, 8, 12]
    warmup = [record["learning_rate"] for record in whole.records[:4]]
    assert warmup == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3])


def test_the_losses_fall(whole: Ran) -> None:
    assert whole.losses[0] == pytest.approx(np.log(256), rel=0.03)
    assert whole.losses[-1] < whole.losses[0] - 0.5
    assert whole.heldout[4] > whole.heldout[8] > whole.heldout[12]


def test_people_are_told_what_was_decided_and_how_it_goes(whole: Ran) -> None:
    config = config_of(whole)
    for said in (
        f"{count_parameters(config.model):,} parameters",
        "8 simulated CPU devices",
        f"{MESH}: data(data) + fsdp(fsdp) + tensor(tensor)",
        "layers/attn/wq",
        str(config.data.path),
        str(whole.folder),
        f"step {STEPS}/{STEPS}",
        f"held-out {whole.heldout[STEPS]:.4f}",
        f"checkpoint {whole.document['checkpoint']}",
    ):
        assert said in whole.err, said


def test_the_saved_configuration_makes_the_same_run_again(runs: Runs, whole: Ran) -> None:
    assert config_of(whole) == parse(runs.words("whole")[1:], "train")
    folder = runs.root / "again"
    words = ["train", "--config", str(whole.folder / "config.yaml"), "--out", str(folder)]
    again = runs.command(words, folder)
    assert again.code == 0
    assert again.losses == whole.losses
    assert again.heldout == whole.heldout


def test_checkpoints_are_kept_and_tensorboard_files_written(runs: Runs, whole: Ran) -> None:
    assert whole.checkpoints == [4, 8, 12]
    (events,) = (whole.folder / "tensorboard").iterdir()
    assert all(tag in events.read_bytes() for tag in (b"loss", b"eval_loss", b"learning_rate"))
    few = runs("few", "--no-tensorboard", keep_last=1, keep_best=0)
    assert few.checkpoints == [12]
    assert sorted(path.name for path in few.folder.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
    ]


def test_without_a_name_a_run_takes_the_next_free_folder(
    runs: Runs, whole: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = runs.words("unused", out=None, steps=2, eval_every=0)
    for folder in (Path("runs/tiny-001"), Path("runs/tiny-002")):
        ran = runs.command(words, folder)
        assert ran.code == 0
        assert ran.losses == whole.losses[:2]
        assert ran.document["checkpoint"] == f"{folder}/checkpoints/2"
        assert ran.document["eval_loss"] is None


def test_chosen_steps_are_profiled(runs: Runs) -> None:
    ran = runs("profiled", profile_steps="2:4", steps=4, eval_every=0)
    assert ran.code == 0
    assert list((ran.folder / "profile").rglob("*.xplane.pb"))


def test_the_last_step_can_be_profiled(runs: Runs) -> None:
    ran = runs("profiled-last", profile_steps="2:3", steps=2, eval_every=0)
    assert ran.code == 0
    assert list((ran.folder / "profile").rglob("*.xplane.pb"))


# Stop anywhere, resume anywhere


def test_sigterm_finishes_the_step_saves_and_exits_143(stopped: Ran) -> None:
    assert stopped.code == 143
    assert "SIGTERM: finishing this step, then saving" in stopped.err
    assert stopped.document["steps"] == 6
    assert [record["step"] for record in stopped.records] == list(range(1, 7))
    assert stopped.checkpoints == [4, 6]
    assert stopped.document["checkpoint"].endswith("checkpoints/6")


def test_ctrl_c_finishes_the_step_saves_and_exits_130(runs: Runs) -> None:
    ran = runs.stopped("interrupted", 2, signal.SIGINT)
    assert ran.code == 130
    assert "SIGINT: finishing this step, then saving; Ctrl-C again stops at once" in ran.err
    assert (ran.document["steps"], ran.checkpoints) == (3, [3])


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(whole: Ran, stopped: Ran) -> None:
    ran = copied(stopped, "resumed")
    resumed = Runs(ran.folder.parent).resume("resumed")
    assert resumed.code == 0
    assert f"resumed at step 6, saved on mesh {MESH}" in resumed.err
    assert [record["step"] for record in resumed.records] == list(range(1, STEPS + 1))
    assert resumed.losses == whole.losses
    assert {step: resumed.heldout[step] for step in (8, 12)} == {
        step: whole.heldout[step] for step in (8, 12)
    }
    assert [record["tokens"] for record in resumed.records] == [
        record["tokens"] for record in whole.records
    ]
    jax.tree.map(np.testing.assert_array_equal, restored(resumed).params, restored(whole).params)


@pytest.mark.parametrize(
    "settings",
    [
        {"mesh": "fsdp=8"},
        {"mesh": "data=4,tensor=2", "grad_accum": 2, "zero": 1},
        {"mesh": "data=1", "topology": "cpu:1", "grad_accum": 4},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_a_run_resumes_on_another_mesh_with_the_same_losses(
    whole: Ran, stopped: Ran, settings: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(stopped.folder, tmp_path / "moved")
    resumed = Runs(tmp_path).resume("moved", **settings)
    assert resumed.code == 0
    assert [record["step"] for record in resumed.records] == list(range(1, STEPS + 1))
    assert resumed.losses == pytest.approx(whole.losses, rel=5e-6)
    for step in (8, 12):
        assert resumed.heldout[step] == pytest.approx(whole.heldout[step], rel=5e-6)


def test_settings_of_axes_that_the_new_mesh_has_not_do_not_stop_a_resumed_run(
    stopped: Ran, tmp_path: Path
) -> None:
    saved = shutil.copytree(stopped.folder, tmp_path / "moved") / "config.yaml"
    words = ["--config", str(saved), "--zero", "1", "--context.order", "striped"]
    saved.write_text(dump(parse([*words, "--pipeline.schedule", "v-shape"], "train")))
    resumed = Runs(tmp_path).resume("moved", mesh="data=1", topology="cpu:1", grad_accum=4)
    assert resumed.code == 0
    for name, left_out in {"zero": False, "pipeline": True, "context": True}.items():
        assert (f"no axis for the setting `{name}`" in resumed.err) == left_out
    found = config_of(resumed)
    assert (found.pipeline, found.context) == (PipelineConfig(), ContextConfig())


def test_a_run_killed_between_checkpoints_makes_the_lost_steps_again(
    runs: Runs, whole: Ran
) -> None:
    killed = copied(whole, "killed")
    shutil.rmtree(killed.folder / "checkpoints" / "12")
    with (killed.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    resumed = runs.resume("killed")
    assert resumed.code == 0
    assert "resumed at step 8" in resumed.err
    assert [record["step"] for record in resumed.records] == list(range(1, STEPS + 1))
    assert resumed.losses == whole.losses
    assert resumed.heldout == whole.heldout


def test_a_finished_run_can_be_made_longer(runs: Runs, whole: Ran) -> None:
    copied(whole, "longer")
    unchanged = runs.resume("longer")
    assert (unchanged.code, unchanged.document["steps"]) == (0, STEPS)
    assert unchanged.records == whole.records
    longer = runs.resume("longer", steps=STEPS + 2)
    assert (longer.code, longer.document["steps"]) == (0, STEPS + 2)
    assert [record["step"] for record in longer.records] == list(range(1, STEPS + 3))
    assert longer.losses[:STEPS] == whole.losses


def test_a_resumed_run_saves_the_settings_it_goes_on_with(runs: Runs, whole: Ran) -> None:
    changed = copied(whole, "changed")
    assert runs.resume("changed", steps=STEPS + 1, keep_last=2).code == 0
    # Or else the next --resume, after a kill, would take the run for finished.
    config = config_of(changed)
    assert (config.steps, config.keep_last) == (STEPS + 1, 2)


def test_a_truncated_checkpoint_falls_back_to_the_one_before(runs: Runs, whole: Ran) -> None:
    damaged = copied(whole, "damaged")
    truncate(damaged.folder / "checkpoints" / "12")
    resumed = runs.resume("damaged")
    assert resumed.code == 0
    assert "checkpoint 12 is damaged" in resumed.err
    assert "resumed at step 8" in resumed.err
    assert resumed.losses == whole.losses
    assert 12 in resumed.checkpoints


def test_when_every_checkpoint_is_truncated_nothing_is_touched(runs: Runs, whole: Ran) -> None:
    damaged = copied(whole, "all-damaged")
    truncate(damaged.folder / "checkpoints")
    before = sorted(damaged.folder.rglob("*"))
    metrics = (damaged.folder / "metrics.jsonl").read_bytes()
    resumed = runs.resume("all-damaged")
    assert (resumed.code, resumed.out) == (4, "")
    for step in whole.checkpoints:
        assert f"checkpoint {step} is damaged" in resumed.err
    assert "start a new run with another --out" in resumed.err
    assert sorted(damaged.folder.rglob("*")) == before
    assert (damaged.folder / "metrics.jsonl").read_bytes() == metrics


def test_a_real_process_is_stopped_by_sigterm_and_its_run_resumed(runs: Runs, whole: Ran) -> None:
    process = runs.start(runs.words("process", steps=10**6, eval_every=0))
    metrics = runs.root / "process" / "metrics.jsonl"
    until = time.monotonic() + PATIENCE_SECONDS
    try:
        while not (metrics.exists() and metrics.read_text().count("\n") > 2):
            assert process.poll() is None and time.monotonic() < until, process.communicate()
            time.sleep(0.05)
        process.terminate()
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert "Traceback" not in err
    done = json.loads(out)["steps"]
    ran = Ran(process.returncode, out, err, metrics.parent)
    assert ran.checkpoints[-1] == done
    assert ran.losses[:3] == whole.losses[:3]
    resumed = runs.resume("process", steps=done + 1)
    assert (resumed.code, resumed.document["steps"]) == (0, done + 1)
    assert [record["step"] for record in resumed.records] == list(range(1, done + 2))


# Updates that are refused


def test_a_run_that_diverges_stops_with_finite_parameters(runs: Runs) -> None:
    ran = runs("diverged", optimizer__learning_rate=1e30, guard__max_bad_steps=3, eval_every=0)
    assert (ran.code, ran.out) == (3, "")
    assert "3 updates in a row were refused" in ran.err
    assert "lower --optimizer.learning-rate" in ran.err
    assert "Traceback" not in ran.err
    refused = [record["step"] for record in ran.records if record["skipped"]]
    assert refused == list(range(refused[0], refused[0] + 3))
    assert ran.records[-1]["step"] == refused[-1]
    assert ran.records[-1]["grad_norm"] is None
    state = restored(ran)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params))
    assert int(state.skipped) >= 3


def test_a_spiking_gradient_skips_the_update_and_is_counted(runs: Runs) -> None:
    factor = 1.05
    ran = runs("spikes", guard__spike_factor=factor, eval_every=0, guard__max_bad_steps=STEPS)
    assert ran.code == 0
    # The rule again, on the norms as they were logged.
    mean, expected = 0.0, []
    for record in ran.records:
        norm = record["grad_norm"]
        good = mean == 0 or norm <= factor * mean
        mean = 0.95 * (mean or norm) + 0.05 * norm if good else mean
        expected.append(0 if good else 1)
    assert [record["skipped"] for record in ran.records] == expected
    assert 0 < sum(expected) < STEPS
    assert int(restored(ran).skipped) == sum(expected)
    # A refused update is not a step of the schedule.
    rates = [record["learning_rate"] for record in ran.records]
    assert rates == pytest.approx(
        [1e-3 * min(step - sum(expected[:step]) + 1, 3) for step in range(STEPS)]
    )


# Every option


@pytest.mark.parametrize("name", ["adafactor", "lion", "muon", "sgd"])
def test_each_optimizer_trains_on_the_hybrid_mesh(runs: Runs, whole: Ran, name: str) -> None:
    rate = 0.1 if name == "sgd" else 3e-3
    settings = {"optimizer__name": name, "optimizer__learning_rate": rate}
    ran = runs(name, steps=4, eval_every=0, **settings)
    assert ran.code == 0
    assert ran.losses[0] == whole.losses[0]
    assert ran.losses[-1] < ran.losses[0] - 0.02


def test_the_held_out_loss_counts_every_token_once(runs: Runs, whole: Ran) -> None:
    assert whole.heldout[STEPS] == pytest.approx(heldout_loss_by_hand(whole), rel=1e-5)
    # All rows in one batch with more room than rows, on another mesh.
    copied(whole, "wide")
    wide = runs.resume("wide", batch_size=2 * ROWS, mesh="fsdp=8", steps=STEPS + 1)
    assert wide.code == 0
    assert wide.heldout[STEPS + 1] == pytest.approx(heldout_loss_by_hand(wide), rel=1e-5)


def test_documents_are_kept_apart_when_asked(runs: Runs) -> None:
    documents = runs.root / "documents.jsonl"
    texts = [line for line in runs.text.read_text().split(" ") for _ in range(2)]
    lines = [" ".join(texts[start : start + 9]) for start in range(0, len(texts), 9)]
    documents.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    ran = runs("masked", "--data.mask-documents", data__path=documents, eval_batches=9)
    assert ran.code == 0
    assert ran.losses[-1] < ran.losses[0] - 0.5
    # A document of some 50 bytes: most rows hold a crossing, which is not a target.
    tokens = ran.records[-1]["tokens"]
    assert 0.9 < tokens / (STEPS * ROWS * SEQ_LEN) < 1
    assert ran.heldout[STEPS] == pytest.approx(heldout_loss_by_hand(ran), rel=1e-5)


def test_a_tokenizer_is_trained_used_and_shown_in_a_sample(runs: Runs) -> None:
    tokenizer = runs.root / "bpe.json"
    words = ["tokenize", str(runs.text), "--vocab-size", "320", "--out", str(tokenizer)]
    assert runs.command(words, runs.root).code == 0
    settings = {"data__tokenizer": tokenizer, "model__vocab_size": 320, "sample_tokens": 8}
    ran = runs("bpe", steps=4, **settings)
    assert ran.code == 0
    assert str(tokenizer) in ran.err
    assert "sample\n  | def " in ran.err
    assert ran.losses[-1] < ran.losses[0]
    assert ran.document["parameters"] == count_parameters(config_of(ran).model)


def test_bfloat16_trains_close_to_float32(runs: Runs, whole: Ran) -> None:
    ran = runs("bfloat16", dtype="bfloat16")
    assert ran.code == 0
    assert "bfloat16 compute" in ran.err
    assert ran.losses != whole.losses
    assert ran.losses == pytest.approx(whole.losses, rel=0.01)
    masters = jax.tree.leaves(restored(ran).params)
    assert {leaf.dtype for leaf in masters} == {jnp.dtype("float32")}
