"""Communication held against what is allowed: steps that keep to it, and steps that do not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from compiled_texts import golden
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from meshwright.sharding import testing_collectives
from meshwright.sharding.analysis import analyze
from meshwright.sharding.errors import ConfigError
from meshwright.sharding.mesh import MeshSpec
from meshwright.testing import assert_collectives, assert_nothing_replicated, assert_specs
from meshwright.train.model_plan import plan

FSDP = {"fsdp": ["all-gather", "reduce-scatter"], "data": "all-reduce"}
HERE = Path(__file__).name


@dataclass
class Step:
    """A step with its arguments, on the mesh data=2,fsdp=4."""

    jitted: Any
    args: tuple[Any, ...]
    mesh: Mesh


def line_of(code: str) -> str:
    """``file:line`` of the first line with some code in this file."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return f"tests/{HERE}:{next(n for n, line in enumerate(lines, 1) if code in line)}"


def loss(params: Any, x: Any) -> Any:
    hidden = jnp.tanh(x @ params["in"])  # the first matmul
    return jnp.mean((hidden @ params["out"]) ** 2)  # the second matmul


def make_step(make_mesh: Any, *, gathers: bool, dtype: str = "float32") -> Step:
    """An update of two weights; ``gathers`` asks for whole weights, else XLA has to choose."""
    mesh = make_mesh("data=2,fsdp=4")

    def at(*spec: Any) -> NamedSharding:
        return NamedSharding(mesh, P(*spec))

    layout = {"in": at(None, "fsdp"), "out": at("fsdp")}

    def step(params: Any, x: Any) -> Any:
        whole = jax.lax.with_sharding_constraint(params, at()) if gathers else params
        gradients = jax.grad(loss)(whole, x)
        if gathers:
            gradients = jax.lax.with_sharding_constraint(gradients, layout)
        return jax.tree.map(lambda w, g: w - g, params, gradients)

    shapes = {"in": (64, 128), "out": (128, 32)}
    params = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout[name])
        for name, shape in shapes.items()
    }
    x = jax.ShapeDtypeStruct((16, 64), dtype, sharding=at(("data", "fsdp")))
    return Step(jax.jit(step, out_shardings=layout), (params, x), mesh)


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Source lines are shown relative to the working folder."""
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    return str(error.value)


def test_a_step_that_keeps_to_it(make_mesh: Any) -> None:
    step = make_step(make_mesh, gathers=True)
    assert_collectives(step.jitted, *step.args, allow=FSDP)
    # Weights of 32 and 16 KiB: gathered once, ρS; gradients scattered once.
    sent = 2 * 48 * 1024 * 3 // 4
    assert_collectives(step.jitted, *step.args, allow=FSDP, max_bytes={"fsdp": sent})
    assert_collectives(step.jitted, *step.args, allow=FSDP, mesh=step.mesh)


def test_activations_that_nobody_wanted_to_move(make_mesh: Any) -> None:
    """Weights left split while they are applied: XLA gathers the batch and sums activations."""
    step = make_step(make_mesh, gathers=False)
    with pytest.raises(AssertionError) as error:
        assert_collectives(step.jitted, *step.args, allow=FSDP, over_bytes=0)
    assert message(error) == (
        "1 collective of the compiled step is not allowed (mesh data=2,fsdp=4, compiled for "
        "cpu:8)\n"
        "axes  kind        times  bytes each  phase    source"
        "                                         leaf\n"
        f"fsdp  all-reduce      1     1.0 KiB  forward  {line_of('# the second matmul')}\n"
        "allowed: fsdp: all-gather, reduce-scatter; data: all-reduce; and whatever moves 0 B or "
        "less"
    )


def test_an_axis_without_a_word_allows_nothing(make_mesh: Any) -> None:
    step = make_step(make_mesh, gathers=True)
    with pytest.raises(AssertionError) as error:
        assert_collectives(step.jitted, *step.args, allow={"fsdp": FSDP["fsdp"]})
    row = message(error).splitlines()[2]
    assert row.startswith("data  all-reduce      1     8.0 KiB  backward  ")
    assert row.endswith("  params/in")
    with pytest.raises(AssertionError, match="^4 collectives of the compiled step are not"):
        assert_collectives(step.jitted, *step.args, allow={"data": ["all-reduce"]})


def test_too_many_bytes(make_mesh: Any) -> None:
    step = make_step(make_mesh, gathers=True)
    with pytest.raises(AssertionError) as error:
        assert_collectives(step.jitted, *step.args, allow=FSDP, max_bytes={"data": 0, "fsdp": 1e6})
    first, headings, row, second = message(error).splitlines()
    assert first == (
        "a device sends 12.0 KiB over axis `data` in a step, at most 0 B are allowed (mesh "
        "data=2,fsdp=4, compiled for cpu:8)"
    )
    assert headings.split() == ["kind", "times", "sends", "phase", "source", "leaf"]
    assert row.split()[:5] == ["all-reduce", "1", "8.0", "KiB", "backward"]
    assert row.endswith(f"{line_of('# the first matmul')}  params/in")
    assert second.endswith(f"{line_of('# the second matmul')}  params/out")


def test_bytes_of_bfloat16_are_another_machines(make_mesh: Any) -> None:
    step = make_step(make_mesh, gathers=True, dtype="bfloat16")
    assert_collectives(step.jitted, *step.args, allow=FSDP)
    with pytest.raises(ConfigError) as error:
        assert_collectives(step.jitted, *step.args, allow=FSDP, max_bytes={"fsdp": 1e6})
    assert message(error) == (
        "cannot hold bytes on simulated devices against a limit\n"
        "  where: max_bytes of fsdp\n"
        "  why:   the program has bfloat16 or other floating point under 32 bits, and CPU "
        "compilers widen it before they send it\n"
        '  fix:   name the hardware, such as topology="v5p:2x2x2", or test a float32 model'
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"allow": {"fspd": ["all-gather"]}},
            "the mesh has no axis `fspd`\n"
            "  where: allow; mesh data=2,fsdp=4\n"
            "  why:   its axes are data, fsdp\n"
            "  fix:   did you mean `fsdp`?",
        ),
        (
            {"allow": {}, "max_bytes": {"tensor": 1}},
            "the mesh has no axis `tensor`\n"
            "  where: max_bytes; mesh data=2,fsdp=4\n"
            "  why:   its axes are data, fsdp\n"
            "  fix:   known: data, fsdp",
        ),
        (
            {"allow": {"fsdp": ["all-gather", "reduce_scatter"]}},
            "there is no collective `reduce_scatter`\n"
            "  where: allow, axis fsdp\n"
            "  fix:   did you mean `reduce-scatter`?",
        ),
    ],
)
def test_words_that_mean_nothing(make_mesh: Any, wrong: dict[str, Any], said: str) -> None:
    step = make_step(make_mesh, gathers=True)
    with pytest.raises(ConfigError) as error:
        assert_collectives(step.jitted, *step.args, **wrong)
    assert message(error) == said


def test_what_cannot_be_compiled(make_mesh: Any) -> None:
    with pytest.raises(ConfigError, match="cannot compile a function"):
        assert_collectives(loss, allow={})
    with pytest.raises(ConfigError) as error:
        assert_collectives(jax.jit(jnp.sin), jnp.ones(3), allow={})
    assert message(error) == (
        "cannot tell which mesh the function runs on\n"
        "  why:   no argument has a NamedSharding\n"
        "  fix:   pass mesh=..., or arguments that are placed on it"
    )
    assert_collectives(jax.jit(jnp.sin), jnp.ones(3), allow={}, mesh=make_mesh("data=1"))


def test_lines_are_those_of_now_and_not_of_a_cache(make_mesh: Any, tmp_path: Path) -> None:
    """jax looks programs up by what they compute; the same step from another line is a hit."""
    mesh = make_mesh("data=8")
    x = jax.ShapeDtypeStruct((8, 64), "float32", sharding=NamedSharding(mesh, P("data")))
    text = "import jax.numpy as jnp\n{}def f(x):\n    return x.sum(0)\n"
    for lines in (0, 7):
        names: dict[str, Any] = {}
        path = tmp_path / "model.py"
        exec(compile(text.format("\n" * lines), str(path), "exec"), names)
        jax.jit(names["f"]).lower(x).compile()  # into the cache, with the first one's lines
        with pytest.raises(AssertionError, match=f"model.py:{lines + 3}"):
            assert_collectives(jax.jit(names["f"]), x, allow={}, over_bytes=0)


class Reported:
    """A plan of which only the report is asked."""

    def __init__(self, report: Any) -> None:
        self.given = report
        self.spec = self.mesh = self.rules = self.decisions = self.moments = None

    def unused(self, *_: Any) -> Any:
        raise AssertionError("only the report is needed")

    init = place = step = gradients = one_device = unused

    def report(self, topology: str | None = None) -> Any:
        del topology
        return self.given


@pytest.fixture
def report(make_mesh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a golden program, as `analyze` makes it; nothing is compiled."""
    from test_sharding_analysis import compiled

    text = golden("cpu-jax0.10")["step, fsdp"]
    monkeypatch.setenv("MESHWRIGHT_PLAN_CACHE", str(tmp_path / "plans"))
    monkeypatch.setattr(
        "meshwright.sharding.aot_step.compile_lowered_step", lambda *_, **__: compiled(text)
    )
    step = make_step(make_mesh, gathers=True)
    return analyze(step.jitted, *step.args, mesh=MeshSpec((("fsdp", 8),)))


def test_plans_are_read_from_their_report(report: Any) -> None:
    allow = {"fsdp": ["all-gather", "reduce-scatter"]}
    assert_collectives(Reported(report), allow=allow)
    named = replace(
        report, collectives=tuple(replace(one, leaf="layers/mlp") for one in report.collectives)
    )
    with pytest.raises(AssertionError) as error:
        assert_collectives(Reported(named), allow={"fsdp": ["all-gather"]})
    assert message(error) == (
        "1 collective of the compiled step is not allowed (mesh fsdp=8, compiled for cpu:8)\n"
        "axes  kind            times  bytes each  phase     source                  leaf\n"
        "fsdp  reduce-scatter      4     8.0 MiB  backward  golden/generate.py:232  layers/mlp\n"
        "allowed: fsdp: all-gather; and whatever moves 1.0 KiB or less"
    )
    with pytest.raises(ConfigError, match="cannot hold bytes on simulated devices"):
        assert_collectives(Reported(report), allow=allow, max_bytes={"fsdp": 1e9})
    with pytest.raises(ConfigError, match="a plan has its arguments and its mesh already"):
        assert_collectives(Reported(report), 1, allow=allow)


def test_a_plan_and_its_own_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled in a child for simulated devices; kept by nobody."""
    monkeypatch.setenv("MESHWRIGHT_PLAN_CACHE", str(tmp_path / "plans"))
    shapes = {"in": (64, 128), "out": (128, 32)}

    def make(key: Any) -> Any:
        return {name: jax.random.normal(key, shape) for name, shape in shapes.items()}

    made = plan(
        make,
        optimizer=optax.adam(1e-3),
        loss=loss,
        batch=jax.ShapeDtypeStruct((1024, 64), "float32"),
        mesh="data=2,fsdp=4",
    )
    assert_specs(made, {"in": "(·, fsdp)", "out": P("fsdp")})
    assert_nothing_replicated(made)
    assert_collectives(made, allow=FSDP, max_bytes={"fsdp": 2 * 48 * 1024})
    with pytest.raises(AssertionError, match=r"fsdp  all-gather .*  in\n"):
        assert_collectives(made, allow={"fsdp": ["reduce-scatter"], "data": "all-reduce"})


def test_what_could_not_be_read_is_no_pass(report: Any) -> None:
    doubt = "custom-call `nccl` of `main` to `x` may communicate; what it moves is not counted"
    with pytest.raises(AssertionError) as error:
        assert_collectives(
            Reported(replace(report, collectives=(), unread=(doubt,))), allow={"fsdp": []}
        )
    assert message(error) == f"the compiled program could not be read whole:\n{doubt}"


def test_every_kind_is_known() -> None:
    assert set(testing_collectives._KINDS) >= {"all-gather", "all-to-all", "collective-permute"}
