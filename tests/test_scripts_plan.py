"""`meshwright plan` as a user meets it: exit codes, what goes where, files, bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compiled_texts import golden, program

from meshwright.scripts.main import main
from meshwright.sharding.aot import ChildResult
from meshwright.sharding.aot_errors import CompileError
from meshwright.sharding.aot_program import CompiledProgram, OutOfMemory
from meshwright.sharding.aot_wheels import wheels
from meshwright.sharding.plan_json import report_from_json
from meshwright.train import planning
from meshwright.train import run_plan as plan_module

GIB = 2**30
TINY = ["--model", "tiny", "--batch-size", "16"]
TPU = [*TINY, "--topology", "v5e:2x4", "--mesh", "fsdp=8"]

CONTRACT = (
    "schema topology mesh model fits memory collectives traffic flops time warnings decisions "
    "provenance"
)
WITHIN = {
    "memory": "parameters_bytes gradients_bytes optimizer_bytes activations_bytes "
    "temporaries_bytes peak_bytes limit_bytes",
    "time": "compute_seconds memory_seconds communication_seconds step_seconds_low "
    "step_seconds_high mfu",
    "collectives": "kind axes count bytes wire_bytes phase overlaps source leaf",
    "traffic": "wire_bytes lower_bound_bytes ratio",
}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MESHWRIGHT_PLAN_CACHE", str(tmp_path / "plans"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the verb in this process; no output of it may hold a traceback."""

    def call(*words: str) -> tuple[int, str, str]:
        code = main(["plan", *words])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Compilers are installed, and every compile is answered with ``answer``."""
    told: dict[str, Any] = {"asked": 0, "answer": program(golden("v5e-jax0.10")["step, fsdp"])}

    def run_child(job: str, payload: tuple[Any, ...], **_: Any) -> ChildResult:
        told["asked"] += 1
        if isinstance(told["answer"], Exception):
            raise told["answer"]
        fields = {**vars(told["answer"]), "quick": payload[2]}
        return ChildResult(CompiledProgram(**fields), "the compiler said", 1.0)

    monkeypatch.setattr(plan_module, "run_child", run_child)
    for module in (plan_module, planning):
        monkeypatch.setattr(module, "require_wheels", lambda topology: None)
    return told


@pytest.fixture
def no_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "meshwright.sharding.aot_wheels._version",
        lambda name: "0.10.2" if name in ("jax", "jaxlib") else None,
    )


def budget(folder: Path, text: str) -> str:
    path = folder / "budget.yaml"
    path.write_text(text)
    return str(path)


# --- answers -----------------------------------------------------------------------------------


def test_a_plan_that_fits(run: Run, child: dict[str, Any], tmp_path: Path) -> None:
    files = {kind: tmp_path / f"plan.{kind}" for kind in ("json", "html", "hlo")}
    words = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    code, out, err = run(*TPU, *words)
    assert code == 0 and err.startswith("compiling for v5e:2x4") and err.count("\n") == 1
    assert out.startswith("fits: 3.0 of 15.8 GiB a device")
    document = json.loads(files["json"].read_text())
    assert set(CONTRACT.split()) <= set(document)
    for group, names in WITHIN.items():
        found = document[group]
        found = found[0] if group == "collectives" else found
        found = next(iter(found.values())) if group == "traffic" else found
        assert set(names.split()) <= set(found), group
    assert document["schema"] == "meshwright.plan/1" and document["fits"] is True
    assert document["provenance"]["memory.peak_bytes"]["origin"] == "compiler"
    assert document["model"]["name"] == "tiny" and document["mesh"] == {"fsdp": 8}
    assert report_from_json(document).fits is True
    page = files["html"].read_text()
    assert page.lstrip().lower().startswith("<!doctype html>") and not re.search(
        r"(src|href)=.http", page
    )
    assert files["hlo"].read_text() == golden("v5e-jax0.10")["step, fsdp"]
    assert Path(f"{files['hlo']}.log").read_text() == "the compiler said"
    assert run(*TPU)[0] == 0 and child["asked"] == 1


def test_a_plan_that_does_not_fit(run: Run, child: dict[str, Any], tmp_path: Path) -> None:
    child["answer"] = program(
        None, peak_bytes=None, out_of_memory=OutOfMemory(17 * GIB, int(15.75 * GIB))
    )
    where = tmp_path / "p.json"
    code, out, err = run(*TPU, "--json", str(where))
    assert code == 1 and "trying what would fit" in err and "Traceback" not in err
    assert out.startswith("does NOT fit: 17.0 of 15.8 GiB a device, over by 1.2 GiB")
    assert "largest in memory" in out and "changes tried" in out
    changes = json.loads(where.read_text())["memory"]["changes"]
    assert changes and {change["origin"] for change in changes} == {"compiler"}
    assert child["asked"] == 1 + len(changes)


def test_a_program_that_was_refused_leaves_its_chatter(
    run: Run, child: dict[str, Any], tmp_path: Path
) -> None:
    child["answer"] = program(None, peak_bytes=None, out_of_memory=OutOfMemory(17 * GIB, GIB))
    code, _, err = run(*TPU, "--hlo", str(tmp_path / "p.hlo"))
    assert code == 1 and "there is no program" in err
    assert (tmp_path / "p.hlo").read_text() == ""
    assert (tmp_path / "p.hlo.log").read_text() == "the compiler said"


@pytest.mark.parametrize(("limit", "code"), [("4GiB", 0), ("2GiB", 1)])
def test_a_budget(run: Run, child: dict[str, Any], tmp_path: Path, limit: str, code: int) -> None:
    found, out, _ = run(*TPU, "--budget", budget(tmp_path, f"memory.peak_bytes: {limit}\n"))
    assert found == code
    assert ("within the budget" in out) == (code == 0)
    assert ("over budget: memory.peak_bytes is 3.0 GiB" in out) == (code == 1)


def test_a_quick_look_gives_no_verdict(run: Run, child: dict[str, Any], tmp_path: Path) -> None:
    where = tmp_path / "p.json"
    for words in (["--quick"], ["--effort", "quick"]):
        code, out, err = run(*TPU, *words, "--json", str(where))
        assert code == 0 and out.startswith("no verdict") and "low effort" in err
        assert json.loads(where.read_text())["fits"] is None
    child["answer"] = program(None, out_of_memory=OutOfMemory(17 * GIB, GIB))
    code, out, _ = run(*TPU, "--quick", "--seq-len", "256")
    assert code == 0 and out.startswith("no verdict")


def test_shapes_alone_when_asked(run: Run, child: dict[str, Any]) -> None:
    code, out, err = run(*TPU, "--effort", "shapes")
    assert code == 0 and child["asked"] == 0 and err == "" and out.startswith("fits")
    code, out, _ = run(*TINY, "--effort", "shapes")  # eight simulated devices
    assert code == 0 and out.startswith("no verdict")


def test_without_wheels_shapes_answer(run: Run, no_wheels: None, tmp_path: Path) -> None:
    where = tmp_path / "p.json"
    for topology, extra in (("v5e:2x4", "tpu"), ("h100:1x8", "gpu-plan")):
        words = [*TINY, "--topology", topology, "--mesh", "fsdp=8"]
        code, out, err = run(*words, "--json", str(where))
        assert code == 0 and out.startswith("fits")
        assert f"pip install 'meshwright[{extra}]'" in err and "closed forms" in err
        document = json.loads(where.read_text())
        assert document["provenance"]["memory"]["origin"] == "formula"
        code, out, err = run(*words, "--hlo", str(tmp_path / "p.hlo"))
        assert code == 2 and out == "" and f"meshwright[{extra}]" in err
        assert not (tmp_path / "p.hlo").exists()


def test_state_over_the_limit_is_answered_at_once(run: Run, child: dict[str, Any]) -> None:
    words = ["--model", "llama3-405b", "--topology", "v5e:16x16", "--batch-size", "256"]
    code, out, err = run(*words)
    assert code == 1 and child["asked"] == 0
    assert out.startswith("does NOT fit") and "nothing was compiled" in err


# --- refusals ----------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[str], str]] = {
    "chip": (["--topology", "v9x:4x4"], "not a chip meshwright knows"),
    "slice": (["--topology", "v5e:3x5"], "use v5e:"),
    "rank": (["--topology", "v5p:4x4"], "3 number"),
    "local": (["--topology", "local"], "cannot plan for `local`"),
    "product": (["--topology", "v5e:2x4", "--mesh", "fsdp=7"], "fix:"),
    "slices": (["--topology", "v5e:2x4*2", "--mesh", "data=2/3,fsdp=8"], "fix:"),
    "batch": (["--topology", "v5e:2x4", "--batch-size", "12"], "--batch-size 8 or 16"),
    "parameter": (["--topology", "v5e:1x1", "--model", "llama3-405b"], "larger than a device"),
    "effort": (["--effort", "little"], "no effort `little`"),
    "flag": (["--bugdet", "x"], "--budget"),
    "hlo of shapes": (["--hlo", "x.hlo", "--effort", "shapes"], "leave one of the two out"),
    "hlo of simulated": (["--hlo", "x.hlo", "--topology", "cpu:8"], "--hlo"),
    "no budget": (["--budget", "nowhere.yaml"], "there is no such file"),
    "no calibration": (["--topology", "v5e:2x4", "--calibration", "nowhere.json"], "nowhere.json"),
    "folder": (["--json", "nowhere/p.json"], "there is no folder `nowhere`"),
    "is a folder": (["--html", "."], "it is a folder"),
    "twice": (["--json", "p", "--html", "p"], "the same file"),
}


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED)
def test_bad_input(
    run: Run,
    child: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    defaults = {"--model": "tiny", "--batch-size": "16"}
    given = [
        word for flag, value in defaults.items() if flag not in words for word in (flag, value)
    ]
    code, out, err = run(*given, *words)
    assert code == 2 and out == "" and err.startswith("error: ") and said in err
    assert "fix:" in err and child["asked"] == 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memory.peek_bytes: 14GiB\n", "memory.peak_bytes"),
        ("warnings.nonsense: 0\n", "nonsense"),
        ("memory.peak_bytes: much\n", "much"),
        ("- 1\n", "budget"),
    ],
)
def test_a_bad_budget(
    run: Run, child: dict[str, Any], tmp_path: Path, text: str, said: str
) -> None:
    code, out, err = run(*TPU, "--budget", budget(tmp_path, text))
    assert code == 2 and out == "" and said in err and child["asked"] == 0


def test_a_compiler_that_dies(run: Run, child: dict[str, Any], tmp_path: Path) -> None:
    child["answer"] = CompileError(
        "cannot compile for `v5e:2x4`", failure="signal", why="killed", chatter="last words"
    )
    code, out, err = run(*TPU, "--hlo", str(tmp_path / "p.hlo"))
    assert code == 2 and out == "" and "killed" in err and "last words" not in err
    assert (tmp_path / "p.hlo.log").read_text() == "last words"


def test_help_names_the_verbs_own_flags(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for flag in ("--json", "--html", "--hlo", "--budget", "--calibration", "--effort"):
        assert flag in out
    assert re.search(r"0 fits and is within the\s+budget", re.sub(r"[│|]", "", out))


# --- as a process ------------------------------------------------------------------------------


def started(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MESHWRIGHT_PLAN_CACHE": str(folder / "plans")}
    return subprocess.run(
        [sys.executable, "-m", "meshwright", "plan", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        cwd=folder,
        env=environment,
    )


def test_exit_codes_of_the_process(tmp_path: Path) -> None:
    good = started(tmp_path, *TPU, "--effort", "shapes", "--json", "p.json", "--html", "p.html")
    assert good.returncode == 0 and good.stdout.startswith("fits") and good.stderr == ""
    assert json.loads((tmp_path / "p.json").read_text())["fits"] is True
    words = ["--model", "llama3-8b", "--topology", "v5e:2x2", "--effort", "shapes"]
    large = started(tmp_path, *words)
    assert large.returncode == 1 and large.stdout.startswith("does NOT fit")
    bad = started(tmp_path, *TINY, "--topology", "v5e:9x9")
    assert bad.returncode == 2 and bad.stdout == "" and "Traceback" not in bad.stderr


@pytest.mark.skipif(wheels("tpu").installed is None, reason="the libtpu wheel is not installed")
def test_a_real_plan_for_a_tpu(tmp_path: Path) -> None:
    words = [*TINY, "--model.layers", "2", "--topology", "v5e:2x4", "--mesh", "fsdp=8"]
    done = started(tmp_path, *words, "--json", "p.json", "--hlo", "p.hlo")
    assert done.returncode == 0 and done.stdout.startswith("fits"), done.stderr
    assert "WARNING" not in done.stderr  # the compiler's chatter is kept, not shown
    document = json.loads((tmp_path / "p.json").read_text())
    assert document["provenance"]["time.compute_seconds"]["origin"] == "compiler"
    assert (tmp_path / "p.hlo").read_text().startswith("HloModule")
