"""Bad input, each kind as a new user would give it: a short clear error, and nothing left behind.

All of it goes through the real command in this process. Most of it is refused before anything is
compiled, so that it costs a fraction of a second.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import MESH, Ran, Runs

pytestmark = pytest.mark.usefixtures("devices")


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """Runs in a folder of this test's own, with the text to train on already there."""
    made = Runs(tmp_path)
    assert made.text.exists()
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A small run that is done, to be copied."""
    ran = Runs(tmp_path_factory.mktemp("finished"))("run", steps=2, eval_every=0)
    assert ran.code == 0
    return ran


@pytest.fixture
def run_there(finished: Ran, runs: Runs) -> Path:
    """A copy of the finished run, under the name ``there``."""
    return Path(shutil.copytree(finished.folder, runs.root / "there"))


def contents(root: Path) -> dict[str, bytes | None]:
    """Every file and folder below ``root``, but for the cache of tokens."""
    paths = [path for path in root.rglob("*") if "cache" not in path.relative_to(root).parts[:1]]
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def message_of(ran: Ran, code: int = 2) -> str:
    """The error of a refused command, once it has the form that errors have."""
    assert (ran.code, ran.out) == (code, ""), ran.err
    assert "Traceback" not in ran.err
    assert ran.err.count("error: ") == 1
    message = ran.err[ran.err.index("error: ") :]
    assert message.endswith("\n")
    what, *lines = message.splitlines()
    assert what.startswith("error: ") and not what.endswith(".")
    assert [line[:9] for line in lines] == sorted(
        {line[:9] for line in lines}, key=["  where: ", "  why:   ", "  fix:   "].index
    )
    assert lines and lines[-1].startswith(("  why:   ", "  fix:   "))
    assert all(len(line) < 400 for line in message.splitlines())
    return message


def assert_refused(runs: Runs, words: str, message: str, code: int = 2) -> None:
    """Run, and check the error and that no file has come, gone or changed."""
    before = contents(runs.root)
    ran = runs("new", *words.split())
    assert re.search(message, message_of(ran, code)), ran.err
    assert contents(runs.root) == before


# Flags, meshes and devices


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--stesp 3", "no flag `--stesp`\n.*did you mean `--steps`"),
        ("--model tinny", "unknown model `tinny`\n.*\n.*did you mean `tiny`"),
        ("--optimizer.name adam", "did you mean `adamw`"),
        ("--dtype float16", "--dtype.*\n.*bfloat16, float32"),
        ("--steps 0", "steps=0\n.*0 is below 1"),
        ("--batch-size 0", "batch_size=0"),
        ("--seq-len -1", "seq_len=-1"),
        ("--steps ten", "takes a whole number"),
        ("--optimizer.learning-rate nan", "learning_rate=nan"),
        ("--mesh fspd=2", "`fspd` is not a mesh axis\n.*did you mean `fsdp`"),
        ("--mesh data=-1,fsdp=-1", "sizes of data and fsdp are both -1"),
        ("--mesh data=2,data=4", "axis `data` is given twice"),
        ("--mesh data=0", "data=0 is not a size"),
        ("--mesh data", "`data` is not an axis with a size\n.*data=2,fsdp=-1,tensor=2"),
        ("--mesh data=3", "on 8 devices\n.*\n.*use data=8"),
        ("--mesh data=4,tensor=4", "4 × 4 = 16 is not 8\n.*data=2,tensor=4 or data=4,tensor=2"),
        ("--mesh data=3,fsdp=-1", "3 = 3 does not divide 8"),
        ("--mesh data=2 --topology cpu:3", "cpu:3 has 3 devices; .*\n.*--topology cpu:2"),
        ("--mesh replica=8", "mesh axis `replica`\n.*\n.*no strategy in this version"),
        ("--topology cpu:16", "backend already started in this process with 8\n.*use cpu:8"),
        ("--topology cpu:0", "at least 1"),
        ("--topology gpu:8", "`gpu` is not a chip"),
        ("--topology v5e:4x4", "comes with `meshwright plan`"),
        ("--topology h100:2x8", "comes with `meshwright plan`"),
        ("--zero 1 --mesh fsdp=8", "ZeRO splits optimizer state over the data axis"),
        ("--profile-steps 3:99", "the run has 12 steps"),
        ("--guard.spike-factor 1", "count as a spike"),
    ],
)
def test_flags_meshes_and_devices(runs: Runs, words: str, message: str) -> None:
    assert_refused(runs, words, message)


# Promise 1: nothing is replicated in silence


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # A dim that an axis does not divide: the leaf, the shape, the rule, the arithmetic.
        (
            "--model.vocab-size 257",
            r"dim 0 of `embedding`.*`tensor`\n.*257×32.*params\.vocab → tensor.*tensor\(\)"
            r".*\n.*257 is not divisible by 2\n.*258",
        ),
        (
            "--model.heads 3 --model.kv-heads 3",
            r"`layers/attn/wk`.*\n.*2×32×3×8.*\n.*3 is not divisible by 2.*3 more leaves.*\n.*4",
        ),
        ("--model.heads 6 --model.kv-heads 3", "kv_heads is 3"),
        ("--model.mlp 65", "65 is not divisible by 2"),
        ("--model.embed 33", r"fsdp\(\).*\n.*33 is not divisible by 2"),
        (
            "--model.layers 3 --rules params.layers=data",
            "dim 0 of `layers/.*\n.*your rule.*\n.*layers is 3.*divisible by 2.*\n.*layers 4",
        ),
        ("--batch-size 6", "6 rows over 4 devices\n.*\n.*data=2 × fsdp=2 = 4 parts\n.*4 or 8"),
        ("--batch-size 2 --mesh data=8", "2 rows over 8 devices\n.*\n.*\n.*--batch-size 8"),
        ("--grad-accum 3", "8 rows are not divisible by 3"),
        ("--grad-accum 4", "each microbatch has 2 rows .* = 4 parts\n.*--batch-size 16"),
        (
            "--seq-len 33 --rules activations.length=fsdp --rules activations.batch=data",
            "33 is not divisible by 4 .2 blocks a device.\n.*rows of 32 or 36 tokens",
        ),
        # Rows whose length is split, and what goes with them.
        (
            "--mesh context=8 --seq-len 24",
            "24 is not divisible by 16 .*\n.*rows of 16 or 32 tokens",
        ),
        (
            "--mesh data=2,context=4 --context.kind ulysses --model.heads 2 --model.kv-heads 2",
            "exchange 2 query heads .*\n.*\n.*not divisible by 4\n.*use context of 1, 2, or",
        ),
        ("--mesh fsdp=8 --context.kind ulysses", "context.kind=ulysses\n.*\n.*there is none"),
        ("--mesh fsdp=8 --sequence", "sequence=True\n.*\n.*tensor axis, and there is none"),
        # Stages, and what they are filled with.
        ("--mesh stage=4,data=2 --grad-accum 2", "4 stages with 2 .*\n.*\n.*\n.*--grad-accum 4 or"),
        (
            "--mesh stage=2,data=4 --grad-accum 3 --batch-size 12 --model.layers 4"
            " --pipeline.schedule interleaved",
            "3 microbatches over 2 stages\n.*\n.*groups of 2.*\n.*--grad-accum 2 or 4",
        ),
        (
            "--mesh stage=4,data=2 --grad-accum 4",
            "2 layers into 4 groups\n.*\n.*4 is more than 2.*\n.*stage=2 or less",
        ),
        (
            "--mesh stage=2,data=4 --grad-accum 2 --pipeline.schedule interleaved",
            "2 layers into 4 groups\n.*2 chunks a stage.*\n.*\n.*stage=1 or less",
        ),
        ("--mesh fsdp=8 --pipeline.schedule gpipe", "pipeline.schedule=gpipe\n.*\n.*there is none"),
        (
            "--mesh stage=2,data=4 --grad-accum 2 --pipeline.chunks 3",
            "pipeline.chunks=3\n.*\n.*only where they are interleaved",
        ),
        (
            "--mesh stage=2,data=4 --grad-accum 2 --rules params.layers=none",
            "`params.layers → none`\n.*\n.*layers of its own",
        ),
        ("--mesh fsdp=4,expert=2", "experts of `tiny` to devices\n.*\n.*no experts\n.*tiny-moe"),
        (
            "--mesh expert=8 --model tiny-moe --model.experts.count 12",
            "deal 12 experts to 8 devices\n.*\n.*not divisible by 8\n.*6, 12, or 8 or 16",
        ),
        (
            "--mesh stage=2,data=4 --grad-accum 2 --model.remat offload",
            "offload in a pipeline\n.*\n.*buffers on the device\n.*--model.remat full",
        ),
        # An axis used twice.
        (
            "--mesh fsdp=8 --rules params.mlp=fsdp",
            "two dims of `layers/mlp/w_down`.*`fsdp`\n.*params.mlp → fsdp.*params.embed → fsdp",
        ),
        ("--rules activations.length=tensor", "two dims of `activations .*`tensor`"),
        # A rule that nothing matches, that another hides, or that cannot be read.
        ("--rules params.positions=tensor", "`params.positions → tensor` matches nothing"),
        (
            "--rules params.mlp=none --rules params.mlp=tensor",
            "is shadowed\n.*earlier rule `params.mlp → none`",
        ),
        ("--rules params.mlp", "cannot read the rule `params.mlp`"),
        ("--rules parms.mlp=tensor", "no table `parms`\n.*did you mean `params`"),
        # A dim or an axis that nobody knows.
        ("--rules params.mpl=tensor", "no dim `mpl` in params\n.*did you mean `mlp`"),
        ("--rules activations.lenght=none", "did you mean `length`"),
        ("--rules params.mlp=tenser", "`tenser` is not a mesh axis\n.*did you mean `tensor`"),
        ("--mesh fsdp=8 --rules params.mlp=tensor", "mesh has no axis `tensor`"),
        # A strategy that splits nothing, so devices would repeat the same work.
        (
            "--mesh fsdp=8 --rules params.embed=none --rules optimizer.embed=none",
            r"fsdp\(\) splits nothing over axis `fsdp`",
        ),
    ],
)
def test_nothing_is_replicated_in_silence(runs: Runs, words: str, message: str) -> None:
    assert_refused(runs, words, message)


@pytest.mark.parametrize(
    ("words", "fixed"),
    [
        ("--mesh data=4,tensor=4", "--mesh data=4,tensor=2"),
        ("--mesh data=3", "--mesh data=8"),
        ("--model.vocab-size 257", "--model.vocab-size 258"),
        ("--model.vocab-size 257", "--model.vocab-size 257 --rules vocab=none"),
        ("--batch-size 6", "--batch-size 4"),
        ("--batch-size 6", "--batch-size 8"),
        ("--grad-accum 4", "--grad-accum 4 --batch-size 16"),
    ],
)
def test_what_an_error_suggests_works(runs: Runs, words: str, fixed: str) -> None:
    suggestion = fixed.split()[-1].replace("258", "vocab 258")
    assert suggestion in message_of(runs("new", *words.split())).rpartition("fix:")[2]
    # explain refuses what train would, and compiles nothing.
    mesh = [] if "--mesh" in fixed else ["--mesh", MESH]
    rows = [] if "--batch-size" in fixed else ["--batch-size", "8"]
    ran = runs.command(["explain", *mesh, *rows, *fixed.split()], runs.root)
    assert (ran.code, ran.err) == (0, "")


# Training data


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "cannot find the training data\n.*--data.path .*missing.txt"),
        ("txet.txt", None, "did you mean `text.txt`"),
        ("empty.txt", b"", "no text to train on\n.*empty.txt\n.*the file is empty"),
        ("binary", bytes(range(256)), "not UTF-8 text\n.*byte 0\n.*NUL byte"),
        ("latin.txt", "café ".encode("latin-1") * 99, "not UTF-8 text\n.*byte 3\n.*0xe9"),
        ("short.txt", b"hello", "shorter than one training row\n.*\n.*a row needs 33.*\n.*3 or"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "broken.jsonl, line 2\n.*not JSON"),
        ("other.jsonl", b'{"txt": "a"}\n', "line 1\n.*no \"text\"; its keys: 'txt'"),
        ("empty/", None, "the folder holds no files"),
        ("binaries/", b"\0\1\2", "none of its 1 files is text"),
    ],
)
def test_training_data(runs: Runs, name: str, content: bytes | None, message: str) -> None:
    path = runs.root / name
    if name.endswith("/"):
        path.mkdir()
        path = path / "file"
    if content is not None:
        path.write_bytes(content)
    assert_refused(runs, f"--data.path {runs.root / name}", message)


def test_training_data_that_may_not_be_read(runs: Runs) -> None:
    path = runs.root / "secret.txt"
    path.write_text("secret")
    path.chmod(0)
    message = "cannot read the training data\n.*secret.txt\n.*Permission denied"
    if os.access(path, os.R_OK):  # root may read anything but this
        path, message = Path("/proc/self/mem"), "cannot read the training data\n.*/proc/self/mem"
    if not path.exists():
        pytest.skip("this user may read every file")
    ran = runs("new", data__path=path)
    assert re.search(message, message_of(ran)), ran.err
    assert not ran.folder.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data.tokenizer byte", "did you mean `bytes`"),
        ("--data.tokenizer missing.json", "No such file.*\n.*meshwright tokenize"),
        ("--model.vocab-size 128", "256 tokens, the model's vocabulary is 128\n.*256 or more"),
        ("--data.heldout-fraction 0.9999", "shorter than one training row"),
        ("--data.heldout-fraction 1", "below 1"),
    ],
)
def test_tokenizers_and_splits(runs: Runs, words: str, message: str) -> None:
    assert_refused(runs, words, message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sample-tokens 5000", "max.length"),
        ("--sample-tokens 30 --model.max-length 32", "max.length"),
        ("--sample-tokens 8 --sample-prompt \udcff", "Unicode"),
    ],
)
def test_a_sample_that_cannot_be_made_is_refused_before_training(
    runs: Runs, words: str, message: str
) -> None:
    # Not after the last step, when whoever reads stdout would lose what the run came to.
    assert_refused(runs, f"{words} --steps 2", message)


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("grain", ""),
        ("tensorboardX", ""),
        ("tokenizers", "--data.tokenizer {root}/bpe.json"),
    ],
)
def test_an_extra_that_is_missing_is_said_with_its_command(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, package: str, words: str
) -> None:
    (runs.root / "bpe.json").write_text("{}")
    monkeypatch.setitem(sys.modules, package, None)
    settings = f"{words} --steps 2 --eval-every 0".format(root=runs.root)
    assert_refused(runs, settings, r"pip install 'meshwright\[train\]'")


# Config files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stpes: 3\n", "no field `stpes`\n.*new.yaml\n.*did you mean `steps`"),
        ("optimizer:\n  learning_rat: 1\n", "did you mean `optimizer.learning_rate`"),
        ("steps: 3.7\n", "cannot set `steps` to 3.7\n.*\n.*whole number\n.*3 or 4"),
        ("resume: 'no'\n", "true or false"),
        ("dtype: float16\n", "one of bfloat16, float32"),
        ("mesh: fspd=8\n", "did you mean `fsdp`"),
        ("model: tinny\n", "did you mean `tiny`"),
        ("steps: 3\nsteps: 4\n", "line 2.*`steps` is given twice"),
        ("steps: [\n", "cannot read the config file"),
        ("", "it is empty"),
        ("- 3\n", "not fields"),
        (None, "there is no such file"),
    ],
)
def test_config_files(runs: Runs, text: str | None, message: str) -> None:
    file = runs.root / "new.yaml"
    if text is not None:
        file.write_text(text)
    before = contents(runs.root)
    ran = runs.command(["train", "--config", str(file), "--out", str(runs.root / "new")], runs.root)
    assert re.search(message, message_of(ran)), ran.err
    assert contents(runs.root) == before


# Folders


def test_a_folder_that_holds_another_run_is_left_as_it_is(runs: Runs, run_there: Path) -> None:
    assert_refused(runs, f"--out {run_there}", "holds another run: .*\n.*--resume .* another --out")


def test_a_folder_that_holds_other_files_is_left_as_it_is(runs: Runs) -> None:
    (runs.root / "mine").mkdir()
    (runs.root / "mine" / "thesis.tex").write_text("years of work")
    assert_refused(
        runs, f"--out {runs.root}/mine", "holds other files: thesis.tex\n.*another --out"
    )


def test_a_folder_that_cannot_be_made(runs: Runs) -> None:
    assert_refused(runs, f"--out {runs.text}", "there is a file of that name")
    assert_refused(runs, f"--out {runs.text}/run", "Not a directory")


def test_a_refused_run_takes_no_number(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    message_of(runs("unused", out=None, data__path="missing.txt"))
    assert not list(tmp_path.glob("runs/*"))


# Resuming


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--model.layers 3", 4, "with another model\n.*\n.*layers 2 there, 3 here"),
        ("--model llama-1b", 4, "model tiny, and now model llama-1b"),
        ("--optimizer.name sgd", 4, "another model or optimizer\n.*\n.*`opt_state/.*absent there"),
        ("--seed 1 --steps 4", 2, "data is not the same\n.*\n.*seed was 0, now it is 1"),
        ("--seq-len 16 --steps 4", 2, "data is not the same"),
        ("--data.path {root}/text.txt --steps 4", 2, "data is not the same\n.*\n.*data was"),
        ("--data.path {root}/missing.txt", 2, "cannot find the training data"),
        ("--mesh data=3", 2, "on 8 devices"),
        ("--stesp 3", 2, "did you mean `--steps`"),
    ],
)
def test_a_run_that_cannot_go_on_so_is_left_as_it_is(
    runs: Runs, run_there: Path, words: str, code: int, message: str
) -> None:
    runs.text.write_text("another text, " * 99)
    before = contents(runs.root)
    ran = runs.resume("there", *words.format(root=runs.root).split())
    assert re.search(message, message_of(ran, code)), ran.err
    assert contents(runs.root) == before


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("missing", 2, "holds no run\n.*there is no such folder"),
        ("empty", 2, "holds no run\n.*it has no config.yaml"),
        ("unsaved", 4, "it has saved no checkpoint"),
        ("torn", 2, "config.yaml"),
    ],
)
def test_what_is_no_run_cannot_be_resumed(
    runs: Runs, run_there: Path, name: str, code: int, message: str
) -> None:
    (runs.root / "empty").mkdir()
    shutil.copytree(run_there, runs.root / "unsaved", ignore=lambda *_: ["checkpoints"])
    shutil.copytree(run_there, runs.root / "torn")
    (runs.root / "torn" / "config.yaml").write_text("model: [")
    before = contents(runs.root)
    ran = runs.resume(name)
    assert re.search(message, message_of(ran, code)), ran.err
    assert contents(runs.root) == before


def test_resuming_needs_to_be_told_where(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = runs.command(["train", "--resume"], tmp_path)
    assert "none is given\n  fix:   add --out" in message_of(ran)


# Full disks


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """An empty folder to mount a small file system on; unmounted at the end."""
    folder = tmp_path / "disk"
    folder.mkdir()
    yield folder
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def make_disk(folder: Path, size: str) -> None:
    """Mount a file system of ``size``, or give the mounted one another size; root may."""
    option = f"size={size}" + (",remount" if os.path.ismount(folder) else "")
    command = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")


def test_a_disk_that_fills_up_loses_no_checkpoint(runs: Runs, mount: Path) -> None:
    make_disk(mount, "1m")
    full = runs("full", out=mount / "run", checkpoint_every=2, eval_every=0)
    message = message_of(full)
    assert re.search(r"disk is full: it takes up to [\d.]+ KiB, .* are free\n.*--resume", message)
    saved = Ran(full.code, full.out, full.err, mount / "run").checkpoints
    assert saved and saved[-1] < 12
    make_disk(mount, "8m")
    resumed = Runs(mount).resume("run")
    assert resumed.code == 0
    assert f"resumed at step {saved[-1]}" in resumed.err
    assert [record["step"] for record in resumed.records] == list(range(1, 13))


@pytest.mark.parametrize("size", ["4k", "8k", "64k"])
def test_a_disk_too_small_for_a_run_is_no_traceback(runs: Runs, mount: Path, size: str) -> None:
    make_disk(mount, size)
    ran = runs("full", out=mount / "run", eval_every=0)
    assert "the disk is full" in message_of(ran)


def test_a_full_disk_for_tokens_is_only_a_note(runs: Runs, mount: Path) -> None:
    make_disk(mount, "8k")
    ran = runs("new", data__cache=mount, steps=2, eval_every=0)
    assert ran.code == 0
    assert "tokens are not kept for the next run" in ran.err and "No space left" in ran.err
