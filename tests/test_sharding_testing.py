"""Assertions on layouts: what they hold, what they say, and which tests they refuse to be."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import meshwright
import meshwright.testing
from meshwright.sharding import testing
from meshwright.sharding.decisions import Decisions, resolve
from meshwright.sharding.dims import Leaf, describe_optimizer
from meshwright.sharding.errors import ConfigError, MeshError
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.strategies import data, fold, fsdp, tensor
from meshwright.sharding.testing_table import WIDTH, format_table
from meshwright.testing import assert_nothing_replicated, assert_specs

FLOAT32 = jnp.dtype("float32")
LEAVES = (
    Leaf("layers/0/kernel", (64, 128), FLOAT32, ("embed", "mlp")),
    Leaf("layers/1/kernel", (128, 64), FLOAT32, ("mlp", "embed")),
    Leaf("layers/1/bias", (512,), FLOAT32, ("norm",)),
    Leaf("scale", (), FLOAT32, ()),
)
MESH = MeshSpec.parse("data=2,fsdp=2,tensor=2")
RULES = fold(data(), fsdp(), tensor())


@pytest.fixture
def decisions() -> Decisions:
    return resolve(LEAVES, RULES, MESH, "params")


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    return str(error.value)


def test_it_is_where_users_look_for_it() -> None:
    assert meshwright.testing.assert_specs is testing.assert_specs
    assert meshwright.testing.__all__ == testing.__all__
    program = "import sys; import meshwright.testing; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_specs_that_hold(decisions: Decisions) -> None:
    assert_specs(
        decisions,
        {
            "layers/0/*": P("fsdp", "tensor"),
            "layers/*/kernel": "(tensor, fsdp)",
            "layers/1/bias": "whole",
            "scale": P(),
        },
    )


@pytest.mark.parametrize("written", ["whole", "(·)", "(.)", "( - , None)", "(., .)"])
def test_ways_to_write_whole(decisions: Decisions, written: str) -> None:
    assert_specs(decisions, {"layers/1/bias": written})


@pytest.mark.parametrize("spec", [P(("fsdp",), "tensor"), P("fsdp", "tensor", None)])
def test_specs_that_place_alike_are_equal(decisions: Decisions, spec: P) -> None:
    assert_specs(decisions, {"layers/0/kernel": spec})


def test_specs_that_do_not_hold(decisions: Decisions) -> None:
    with pytest.raises(AssertionError) as error:
        assert_specs(
            decisions,
            {"*/kernel": P("fsdp", "tensor"), "*bias": "(fsdp+data)", "scale": "whole"},
        )
    assert message(error) == (
        "2 of 4 leaves not where expected (table params, mesh data=2,fsdp=2,tensor=2)\n"
        "leaf             shape   expected        found           why\n"
        "layers/1/kernel  128×64  (fsdp, tensor)  (tensor, fsdp)  mlp → tensor, embed → fsdp\n"
        "layers/1/bias    512     (fsdp+data)     whole           no strategy splits its dims"
    )


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        (
            {"layers/*/kernal": "whole"},
            "the pattern `layers/*/kernal` decides nothing\n"
            "  where: 4 leaves\n"
            "  why:   it matches no leaf\n"
            "  fix:   mend it; did you mean `layers/1/kernel` or `layers/0/kernel` or "
            "`layers/1/bias`?",
        ),
        (
            {"*": "whole", "scale": "whole"},
            "the pattern `scale` decides nothing\n"
            "  where: 4 leaves\n"
            "  why:   `scale` is decided by an earlier pattern\n"
            "  fix:   remove it",
        ),
        (
            {"*": P("fdsp")},
            "cannot expect `*` to be split over `fdsp`\n"
            "  where: mesh data=2,fsdp=2,tensor=2\n"
            "  why:   it has no axis `fdsp`\n"
            "  fix:   did you mean `fsdp`?",
        ),
        (
            {"*": "fsdp"},
            "cannot read the layout `fsdp`\n"
            "  where: expected of `*`\n"
            "  why:   it is neither `whole` nor an entry for each dim in parentheses\n"
            "  fix:   write it like (·, fsdp+data, tensor), with a dot for a dim that is whole",
        ),
        (
            {"*": None},
            "cannot expect `None` of `*`\n"
            "  why:   a layout is a PartitionSpec that says where each dim lies, or its written "
            "form\n"
            '  fix:   write P("fsdp", None), "(fsdp, ·)" or "whole"',
        ),
    ],
)
def test_expectations_that_cannot_be(
    decisions: Decisions, expected: dict[str, P | str], said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        assert_specs(decisions, expected)
    assert message(error) == said


def test_something_else_than_decisions() -> None:
    with pytest.raises(ConfigError) as error:
        assert_specs({"w": P()}, {})  # type: ignore[arg-type]
    assert message(error) == (
        "a dict has no decisions to hold against\n"
        "  why:   it is neither a plan nor what `resolve` returned\n"
        "  fix:   pass a plan, or its .decisions or .moments"
    )


def test_nothing_is_replicated(decisions: Decisions) -> None:
    assert_nothing_replicated(decisions, over_bytes=2048)
    assert_nothing_replicated(decisions, except_=["*/bias"])
    assert_nothing_replicated(decisions, except_="*/bias")


def test_what_is_replicated_is_listed() -> None:
    decisions = resolve(LEAVES, fold(data()), MeshSpec.parse("data=8"), "params")
    with pytest.raises(AssertionError) as error:
        assert_nothing_replicated(decisions, except_=["*/1/kernel"])
    assert message(error) == (
        "2 leaves over 1.0 KiB whole on each of 8 devices, 34.0 KiB in all (mesh data=8)\n"
        "table   leaf             shape      bytes  why\n"
        "params  layers/0/kernel  64×128  32.0 KiB  no strategy splits its dims\n"
        "params  layers/1/bias    512      2.0 KiB  no strategy splits its dims"
    )


def test_moments_that_stayed_whole_are_found(decisions: Decisions) -> None:
    """The classic: split parameters, and moments that nobody split."""
    shapes = {leaf.path: jax.ShapeDtypeStruct(leaf.shape, FLOAT32) for leaf in LEAVES}
    moments = describe_optimizer({"mu": shapes}, LEAVES)
    whole = resolve(moments, fold(data()), MeshSpec.parse("data=8"), "optimizer")
    assert_nothing_replicated(decisions, 2048)
    with pytest.raises(AssertionError, match="optimizer  mu/layers/0/kernel"):
        assert_nothing_replicated(whole, 2048)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("*/bais", "it matches no leaf"),
        ("*/kernel", "`layers/0/kernel` is split, or of 1.0 KiB or less"),
        ("scale", "`scale` is split, or of 1.0 KiB or less"),
    ],
)
def test_exceptions_that_excuse_nothing(decisions: Decisions, pattern: str, why: str) -> None:
    with pytest.raises(ConfigError) as error:
        assert_nothing_replicated(decisions, except_=["*/bias", pattern])
    assert error.value.what == f"the pattern `{pattern}` decides nothing"
    assert error.value.why == why


def test_one_device_replicates_everything() -> None:
    rules = fold(data())
    with pytest.raises(MeshError) as error:
        assert_nothing_replicated(resolve(LEAVES, rules, MeshSpec.parse("data=1"), "params"))
    assert message(error) == (
        "cannot tell what is replicated on the mesh `data=1`\n"
        "  why:   on one device everything is whole\n"
        "  fix:   use a mesh of two devices or more"
    )


def test_tables_keep_their_width() -> None:
    path, why = "layers/" * 20 + "kernel", "because " * 20
    rows = [[path, "128×64", f"line\n{why}"]] * 30
    written = format_table(["leaf", "shape", "why"], rows)
    lines = written.splitlines()
    assert len(lines) == 1 + 20 + 1 and max(map(len, lines)) == WIDTH
    assert lines[1].startswith("…") and "kernel  128×64  line because" in lines[1]
    assert lines[1].endswith("…") and lines[-1] == "… and 10 more"
