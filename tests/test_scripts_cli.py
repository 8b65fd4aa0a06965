"""The command line as a user meets it: flags, help, errors, exit codes, what goes where.

Verbs run in this process with their work replaced by a stub; a few subprocesses check what
only a real start shows.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from meshwright.models.config import MODELS, named
from meshwright.scripts.flags import FlagReader, parse
from meshwright.scripts.main import EXTRAS, VERBS, main
from meshwright.sharding.errors import CheckpointError, NonFiniteError
from meshwright.train.config import OptimizerConfig, TrainConfig, default_config

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"

CONTRACT = (
    "--model --mesh --topology --steps --batch-size --seq-len --grad-accum --seed --dtype --out "
    "--resume --data.path --log-every --eval-every --checkpoint-every --profile-steps --config "
    "--optimizer.learning-rate --data.tokenizer"
)

# A flag that goes or changes its name breaks somebody's script: change this list on purpose.
FLAGS = """\
--accumulate --batch-size --checkpoint-every --compilation-cache --context.kind --context.order
--data.cache --data.heldout-fraction --data.mask-documents --data.path --data.tokenizer --dtype
--eval-batches --eval-every --grad-accum --guard.max-bad-steps --guard.spike-factor --keep-best
--keep-last --log-every --loss.chunks --loss.label-smoothing --loss.z-loss --mesh
--model.activation --model.bias --model.embed --model.experts.balance
--model.experts.balance-weight --model.experts.capacity-factor --model.experts.count
--model.experts.first-dense --model.experts.mlp --model.experts.normalise --model.experts.scoring
--model.experts.shared --model.experts.top-k --model.experts.z-weight --model.head-dim
--model.heads --model.init-std --model.kv-heads --model.layers --model.max-length --model.mlp
--model.norm --model.norm-eps --model.positions --model.qk-norm --model.remat --model.rope-factor
--model.rope-high-freq-factor --model.rope-low-freq-factor --model.rope-original-length
--model.rope-theta --model.tied --model.vocab-size --optimizer.b1 --optimizer.b2
--optimizer.clip-norm --optimizer.decay-fraction --optimizer.eps --optimizer.final-fraction
--optimizer.learning-rate --optimizer.momentum --optimizer.name --optimizer.schedule
--optimizer.warmup-steps --optimizer.weight-decay --out --pipeline.chunks --pipeline.schedule
--profile-steps --resume --rules
--sample-prompt --sample-tokens --seed --seq-len --sequence --steps --tensorboard --topology
--zero
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run the command in this process; no output of it may hold a traceback."""

    def call(*words: str) -> tuple[int, str, str]:
        code = main(words)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    yield call


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """The configurations that training was asked to run."""
    configs: list[TrainConfig] = []
    replace_module(monkeypatch, "run", "run_training", lambda config: configs.append(config) or 0)
    return configs


def replace_module(
    monkeypatch: pytest.MonkeyPatch, name: str, function: str, stub: Callable[..., object]
) -> None:
    module = ModuleType(f"meshwright.train.{name}")
    setattr(module, function, stub)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def changed(**fields: object) -> TrainConfig:
    return dataclasses.replace(default_config(), **fields)  # type: ignore[arg-type]


def test_no_flag_came_or_went() -> None:
    flags = FlagReader(TrainConfig, "meshwright train").flags()
    assert (
        sorted(flag for flag in flags if "-no-" not in flag and ".no-" not in flag) == FLAGS.split()
    )
    assert [flag for flag in flags if flag.endswith("no-resume")] == ["--no-resume"]


def test_train_runs_the_default_with_no_flags(run: Run, trained: list[TrainConfig]) -> None:
    assert run("train") == (0, "", "")
    assert trained == [default_config()]


@pytest.mark.parametrize(
    ("words", "config"),
    [
        ("--steps 7 --batch-size=16", changed(steps=7, batch_size=16)),
        ("--batch_size 16 --grad_accum 2", changed(batch_size=16, grad_accum=2)),
        ("--resume --no-tensorboard", changed(resume=True, tensorboard=False)),
        ("--dtype float32 --zero 2", changed(dtype="float32", zero=2)),
        ("--out none --sample-prompt=--x", changed(sample_prompt="--x")),
        ("--mesh data=2,fsdp=-1", changed(mesh="data=2,fsdp=-1")),
        (
            "--rules params.mlp=tensor --rules activations.length=none",
            changed(rules=("params.mlp=tensor", "activations.length=none")),
        ),
        (
            "--optimizer.name lion --optimizer.learning-rate 1e-4 --optimizer.b1 0",
            changed(optimizer=OptimizerConfig(name="lion", learning_rate=1e-4, b1=0.0)),
        ),
        ("--model llama-1b", changed(model=named("llama-1b"))),
        (
            "--model.layers 4 --model=llama-1b --model.no-tied",
            changed(model=dataclasses.replace(named("llama-1b"), layers=4, tied=False)),
        ),
    ],
)
def test_flags_set_fields(words: str, config: TrainConfig) -> None:
    assert parse(words.split(), "train") == config


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("steps: 5\nseed: 5\ntensorboard: false\nrules: [params.mlp=tensor]\n")
    words = ["--seed", "6", "--config", str(file)]
    from_both = changed(steps=5, seed=6, tensorboard=False, rules=("params.mlp=tensor",))
    assert parse(words, "train") == from_both
    on_top = ["--tensorboard", "--rules", "params.embed=fsdp"]
    assert parse([*words, *on_top], "train") == dataclasses.replace(
        from_both, tensorboard=True, rules=("params.embed=fsdp",)
    )


def test_a_named_model_replaces_the_files(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {name: llama-1b, layers: 2}\n")
    words = ["--config", str(file)]
    assert parse(words, "train").model == dataclasses.replace(named("llama-1b"), layers=2)
    deeper = dataclasses.replace(named("llama-1b"), layers=3)
    assert parse([*words, "--model.layers", "3"], "train").model == deeper
    assert parse([*words, "--model", "tiny"], "train").model == named("tiny")


def test_a_file_may_be_right_only_with_the_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("grad_accum: 5\n")
    assert parse(["--config", str(file), "--batch-size", "10"], "train").grad_accum == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--stesp 3", "no flag `--stesp`\n  fix:   did you mean `--steps`?"),
        ("--learning-rate 3", "did you mean `--optimizer.learning-rate`?"),
        ("--optimiser.b1=3", "no flag `--optimiser.b1`\n  fix:   did you mean `--optimizer.b1`?"),
        ("--no-resum", "did you mean `--resume`?"),
        ("--confg x", "did you mean `--config`?"),
        ("--lr 3", "see meshwright train --help"),
        ("--optimizer muon", "group of flags: --optimizer.name, "),
        ("--model.name tiny", "write --model NAME"),
        ("--model tinny", "did you mean `tiny` or `tiny-moe`?"),
        ("--model tiny --model=tiny", "`--model` is given twice"),
        ("--config a --config b", "`--config` is given twice"),
        ("--model", "`--model` has no value\n  fix:   write --model NAME"),
        ("--model --steps 3", "`--model` has no value"),
        ("--config", "`--config` has no value\n  fix:   write --config FILE"),
        ("--config absent.yaml", "config file `absent.yaml`\n  why:   there is no such file"),
        ("--steps", "`--steps` has no value\n  fix:   write --steps INT"),
        ("--steps --seed 3", "`--steps` has no value"),
        ("--sample-prompt -x", "--sample-prompt=-x if that is its value"),
        ("--steps 3.7", "`--steps` to 3.7\n  why:   it takes a whole number\n  fix:   use 3 or 4"),
        ("--steps 1e3", "use 1000"),
        ("--steps many", "`--steps` to 'many'\n  why:   it takes a whole number"),
        ("--steps=", "`--steps` to ''"),
        ("--steps -1", "steps=-1"),
        (
            "--optimizer.eps small",
            "`--optimizer.eps` to 'small'\n  why:   it takes a number or none",
        ),
        ("--dtype bfloat61", "one of bfloat16, float32 or none\n  fix:   did you mean `bfloat16`?"),
        ("--zero 4", "one of 0, 1, 2"),
        ("--resume True", "`--resume` takes no value\n  fix:   write --resume or --no-resume"),
        ("--resume=1", "`--resume` takes no value"),
        ("--data.mask_documents yes", "or --data.no-mask-documents"),
        ("--rules params.mlp=data params.embed=data", "write --rules params.embed=data"),
        ("--sample-prompt hello world", "put a value with spaces in quotes"),
        ("corpus.txt", "cannot use the word `corpus.txt`"),
        ("--mesh fspd=2", "did you mean `fsdp`?"),
        ("--mesh data=-1,fsdp=-1", "both -1"),
        ("--topology gpu:8", "cannot read the topology `gpu:8`"),
        ("--rules params.mpl=tensor", "did you mean `mlp`?"),
        ("--batch-size 30 --grad-accum 4", "30 rows are not divisible by 4"),
        ("--optimizer.momentum 0.9", "adamw has optimizer.b1 and optimizer.b2 and optimizer.eps"),
        ("--model.heads 7", "7 query heads"),
    ],
)
def test_bad_flags(run: Run, trained: list[TrainConfig], words: str, message: str) -> None:
    code, out, err = run("train", *words.split())
    assert (code, out, trained) == (2, "", [])
    assert err.startswith("error: ") and message in err
    assert err.count("\n") <= 4


def test_help_lists_every_flag_with_its_default(run: Run) -> None:
    code, out, err = run("train", "--help")
    assert (code, err) == (0, "")
    described = " ".join(out.replace("│", " ").split())
    words = set(re.findall(r"[^ ,]+", described))
    assert not {*FLAGS.split(), *CONTRACT.split()} - words
    assert not {name for name in MODELS if name not in words and f"{name}." not in words}
    assert "--model.name" not in words
    assert "--steps INT Optimizer steps. (default: 150)" in described
    assert not re.findall(r"--\S+ (?:[A-Z]+|{\S+}|--\S+) \((?:default|repeatable)", described)


def test_help_shows_the_defaults_of_the_named_model(run: Run) -> None:
    _, out, _ = run("train", "--model", "llama3-8b", "--help")
    assert "(default: 14336)" in " ".join(out.replace("│", " ").split())


@pytest.mark.parametrize("words", ["--bogus -h", "--model nope --help", "--config --help"])
def test_help_wins_over_mistakes(run: Run, words: str) -> None:
    code, out, err = run("train", *words.split())
    assert (code, err) == (0, "") and "--batch-size INT" in out


def test_help_version_and_unknown_verbs(run: Run) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == list(VERBS)
    assert run("-h") == (code, out, err)
    assert run() == (2, "", out)
    code, out, _ = run("--version")
    assert code == 0 and out.startswith("meshwright ")
    code, out, err = run("trian")
    assert (code, out) == (2, "") and "no verb `trian`\n  fix:   did you mean `train`?" in err


def test_explain(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    replace_module(monkeypatch, "explain", "explain", lambda *args: calls.append(args) or 0)
    words = ["--model", "llama-1b", "--json", "a.json", "--mesh", "fsdp=8", "--html", "a.html"]
    assert run("explain", *words)[0] == 0
    assert run("explain")[0] == 0
    wide = changed(model=named("llama-1b"), mesh="fsdp=8")
    assert calls == [(wide, "a.json", "a.html"), (default_config(), None, None)]
    assert "`--json` has no value" in run("explain", "--json")[2]
    assert "did you mean `--json`" in run("explain", "--jsn", "x")[2]
    described = run("explain", "--help")[1]
    assert "--json FILE" in described and "--html FILE" in described


def test_tokenize(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    replace_module(monkeypatch, "tokenizer", "train_tokenizer", lambda *args: calls.append(args))
    assert run("tokenize", "text", "--vocab-size", "512")[0] == 0
    assert run("tokenize", "--out=t.json", "--vocab_size", "300", "text")[0] == 0
    assert calls == [("text", 512, "tokenizer.json"), ("text", 300, "t.json")]
    assert "PATH" in run("tokenize", "--help")[1]
    for words, message in {
        "": "write meshwright tokenize PATH",
        "text --vocab-size 256": "use 257 or more",
        "text --vocab-size x": "`--vocab-size` to 'x'",
        "text more": "cannot use the word `more`",
        "--vocabsize 300 text": "did you mean `--vocab-size`?",
        "text --out=": "it is empty",
    }.items():
        code, out, err = run("tokenize", *words.split())
        assert (code, out) == (2, "") and message in err
    assert len(calls) == 2


def test_bench(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[TrainConfig] = []
    replace_module(monkeypatch, "bench", "parity", lambda config: calls.append(config) or 0)
    assert run("bench", "parity", "--steps", "20")[0] == 0
    assert calls == [changed(steps=20)]
    assert "parity" in run("bench", "--help")[1]
    assert "--steps INT" in run("bench", "parity", "--help")[1]
    assert run("bench", "parrity")[0] == 2
    assert "did you mean `parity`?" in run("bench", "parrity")[2]
    assert "known: " in run("bench")[2]


@pytest.mark.parametrize("error", [NonFiniteError("stopped", fix="x"), CheckpointError("none")])
def test_errors_of_a_run_set_the_exit_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: NonFiniteError | CheckpointError
) -> None:
    fail_with(monkeypatch, error)
    assert run("train") == (error.exit_code, "", f"error: {error}\n")


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(config: TrainConfig) -> int:
        raise error

    replace_module(monkeypatch, "run", "run_training", fail)


@pytest.mark.parametrize("package", EXTRAS)
def test_missing_extras_name_the_command(
    run: Run, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    fail_with(monkeypatch, ModuleNotFoundError("no", name=f"{package}.python.something"))
    code, out, err = run("train")
    assert (code, out) == (2, "")
    assert f"needs the package `{package}`" in err and "pip install 'meshwright[train]'" in err


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ModuleNotFoundError("no", name="meshwright.train.nothing"))
    with pytest.raises(ModuleNotFoundError):
        main(["train"])
    fail_with(monkeypatch, KeyError("ours"))
    with pytest.raises(KeyError):
        main(["train"])


def test_interrupt_before_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    assert run("train") == (130, "", "stopped\n")


@pytest.mark.parametrize(
    ("verb", "words"),
    [("train", "--stesp 3"), ("explain", "--stesp 3"), ("tokenize", "--stesp 3"), ("bench", "x")],
)
def test_each_verb_is_a_script(run: Run, verb: str, words: str) -> None:
    """The same program under both names, and neither loads jax to refuse a flag."""
    path = SCRIPTS / f"{VERBS[verb][0]}.py"
    words_here = [sys.executable, "-X", "importtime", str(path), *words.split()]
    done = subprocess.run(words_here, capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines(keepends=True)
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time")}
    said = "".join(line for line in lines if not line.startswith("import time"))
    assert (done.returncode, done.stdout, said) == run(verb, *words.split())
    assert "meshwright.scripts.flags" in imported
    assert not imported & {"jax", "flax", "numpy", "rich", "optax"}


def test_a_closed_pipe_is_no_error() -> None:
    command = [sys.executable, "-m", "meshwright.scripts.main", "train", "--help"]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
