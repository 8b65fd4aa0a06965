"""Reading compiled text: shapes, instructions and sources.

The texts are small ones written here in XLA's form, the golden ones of three compilers, and one
compiled on the spot by the installed jax; jaxlib's private parser, in a subprocess, is the oracle
for the number of instructions.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compiled_texts import TARGETS, golden

from meshwright.sharding.errors import MeshwrightError
from meshwright.sharding.hlo import HloSyntaxError, Shape, parse_module, parse_shapes
from meshwright.sharding.hlo_loops import executions
from meshwright.sharding.hlo_source import is_users


def module_of(body: str, *, header: str = ", is_scheduled=true, num_partitions=4") -> str:
    return f"HloModule test{header}\n\n{body}\n"


ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""
PALLAS = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)S(1)} parameter(0), metadata={op_name="x{\\"y\\"}"}
  %call = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call",\
 frontend_attributes={kernel_metadata={
    "a": "}",
  "b": 2
}}, backend_config={"text":"line
break }", "n": [1, {"m": 2}]}
  ROOT %tuple = (f32[8]{0}, /*index=1*/f32[8]{0}) tuple(%call, /*index=1*/%p)
}, execution_thread="main"
"""


@pytest.mark.parametrize(
    ("text", "expected", "size"),
    [
        ("f32[]", [Shape("f32", ())], 4),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", [Shape("bf16", (8, 128), "1,0:T(8,128)(2,1)S(1)")],
         2048),
        ("s4[3]{0:E(4)}", [Shape("s4", (3,), "0:E(4)")], 2),
        ("f8e4m3fn[4,0]", [Shape("f8e4m3fn", (4, 0))], 0),
        ("pred[7]", [Shape("pred", (7,))], 7),
        ("c64[2]", [Shape("c64", (2,))], 16),
        ("f32[<=8,4]", [Shape("f32", (8, 4))], 128),
        ("token[]", [Shape("token", ())], 0),
        ("()", [], 0),
        ("((f32[2]{0}, u32[]), /*index=1*/token[])",
         [Shape("f32", (2,), "0"), Shape("u32", ()), Shape("token", ())], 12),
    ],
)  # fmt: skip
def test_shapes(text: str, expected: list[Shape], size: int) -> None:
    found = parse_shapes(text)
    assert list(found) == expected
    assert sum(shape.bytes for shape in found) == size


def test_memory_space() -> None:
    assert [s.memory_space for s in parse_shapes("(f32[2]{0:T(128)S(5)}, f32[2]{0})")] == [5, 0]


@pytest.mark.parametrize("text", ["", "f32", "f32[2", "(f32[2]", "q32[2]", "f32[2] f", "f32[,]"])
def test_shapes_nobody_defined(text: str) -> None:
    with pytest.raises(HloSyntaxError, match="cannot read the shape"):
        parse_shapes(text)


def test_line_breaks_and_braces_inside_attributes() -> None:
    module = parse_module(module_of(PALLAS))
    entry = module.computations[module.entry]
    assert list(entry.instructions) == ["p", "call", "tuple"]
    assert entry.root.operands == ("call", "p")
    call = entry.instructions["call"]
    assert call.custom_call_target == "tpu_custom_call"
    assert call.attributes["frontend_attributes"].endswith("}}")
    assert call.backend_config == {"text": "line\nbreak }", "n": [1, {"m": 2}]}
    assert entry.instructions["p"].shapes[0].memory_space == 1
    assert entry.instructions["p"].op_name == 'x{\\"y\\"}'
    assert module.partitions == 4


def test_async_forms_and_callees() -> None:
    text = (
        ADD
        + """
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %s = ((f32[8]{0}), f32[8]{0}, s32[]{:S(2)}) slice-start(%p), slice={[0:8]}
  %d = f32[8]{0} slice-done(%s)
  %c = ((f32[8]{0}), f32[8]{0}) call-start(%d), async_execution_thread="sparsecore", to_apply=%add
  %e = f32[8]{0} call-done(%c)
  ROOT %r = f32[] reduce(f32[8]{0} %e, f32[8]{0} %e), dimensions={0}, to_apply=%add
}
"""
    )
    module = parse_module(module_of(text))
    instructions = module.computations["main"].instructions
    assert instructions["s"].attributes["slice"] == "{[0:8]}"
    assert instructions["c"].called == ("add",)
    assert instructions["r"].operands == ("e", "e")
    assert instructions["c"].bytes == 64


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("HloModule", "Module", "does not begin with `HloModule`"),
        ("ENTRY ", "", "has 0 ENTRY computations"),
        ("ROOT ", "", "has no ROOT"),
        ("tuple(%call, /*index=1*/%p)", "tuple(%call, %q)", "uses `q`, which is not defined"),
        ("%call = ", "%p = ", "`p` is defined twice"),
        ("f32[8]{0} custom-call", "f99[ custom-call", "shape is not understood"),
        ("custom-call(", "custom-call ", "no opcode and operands"),
        ('}, execution_thread="main"', "", "ends inside computation `main`"),
        (', custom_call_target="tpu', ' custom_call_target="tpu', "is not an attribute"),
        ("  ROOT", "  nonsense\n  ROOT", "not an instruction"),
        ("ENTRY %main", "Table\n1 2\nENTRY %main", "neither a computation's first line nor"),
        ("num_partitions=4", "num_partitions=x", "num_partitions is not a number"),
    ],
)
def test_what_is_not_understood_is_an_error(old: str, new: str, message: str) -> None:
    text = module_of(PALLAS)
    assert old in text
    with pytest.raises(HloSyntaxError, match=message) as caught:
        parse_module(text.replace(old, new))
    assert isinstance(caught.value, MeshwrightError)
    assert "line " in str(caught.value)


def test_the_error_names_the_line() -> None:
    text = module_of(PALLAS).replace("  ROOT", "  nonsense here\n  ROOT")
    number = text[: text.index("nonsense")].count("\n") + 1
    with pytest.raises(HloSyntaxError, match=f"line {number}: nonsense here"):
        parse_module(text)


SOURCES = """
FileNames
1 "/v/lib/python3.11/site-packages/optax/_src/update.py"
2 "/me/model.py"
3 "/v/lib/python3.11/site-packages/meshwright/train/step.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=10 end_line=10 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=20 end_line=20 column=1 end_column=2}
3 {file_name_id=3 function_name_id=1 line=30 end_line=30 column=1 end_column=2}

StackFrames
1 {file_location_id=3 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=1 parent_frame_id=3}
4 {file_location_id=1 parent_frame_id=2}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %a = f32[8]{0} sine(%p), metadata={op_name="jit(f)/sin" stack_frame_id=3}
  %b = f32[8]{0} sine(%a), metadata={op_name="jit(f)/sin" stack_frame_id=4}
  %c = f32[8]{0} sine(%b), metadata={source_file="/me/x.py" source_line=7}
  ROOT %d = f32[8]{0} sine(%c)
}
"""


def test_sources_are_the_users_innermost_frame() -> None:
    module = parse_module(module_of(SOURCES))
    at = module.computations["main"].instructions
    assert module.source_of(at["a"]) == "/me/model.py:20"
    assert module.source_of(at["b"]).endswith("update.py:10")  # no user's frame: the innermost
    assert module.source_of(at["c"]) == "/me/x.py:7"
    assert module.source_of(at["d"]) == ""
    optax = module.source_of(at["a"], lambda file: "optax" in file)
    assert optax.endswith("optax/_src/update.py:10")


def test_our_machinery_is_not_the_users() -> None:
    assert is_users("/x/meshwright/models/decoder.py")
    assert not is_users("/x/meshwright/train/step.py")
    assert not is_users("/usr/lib/python3.12/functools.py")


@pytest.mark.parametrize("target", TARGETS)
def test_golden_texts_parse(target: str) -> None:
    for name, text in golden(target).items():
        module = parse_module(text)
        lines = sum(line.startswith(("  %", "  ROOT ")) for line in text.splitlines())
        count = sum(len(c.instructions) for c in module.computations.values())
        assert count == lines, name  # these texts have no line that begins so inside a string
        assert 0 not in executions(module).values(), name


def test_speed() -> None:
    """A module of 20 MB must take seconds, not minutes; this machine does 10 MB/s when idle."""
    text = golden("v5e-jax0.10")["microbatches, fsdp"]
    began = time.process_time()
    parse_module(text)
    assert len(text) / (time.process_time() - began) > 1e6


def test_the_installed_jax_is_read() -> None:
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32)

    def function(x: Any) -> Any:
        return jax.lax.fori_loop(0, 11, lambda i, c: jnp.sin(c) * i, x)

    module = parse_module(jax.jit(function).lower(x).compile().as_text() or "")
    assert 11 in executions(module).values()
    entry = module.computations[module.entry]
    assert entry.parameters[0].shapes[0].dims == (16, 8)


def test_jaxlibs_own_parser_agrees() -> None:
    """In a subprocess: it is private, and may abort on what another version wrote."""
    program = (
        "import json, sys\n"
        "from jaxlib import _hlo\n"
        "texts = json.load(sys.stdin)\n"
        "module = lambda text: _hlo.hlo_module_from_text(text)\n"
        "print(json.dumps({name: {c.name: len(c.instructions()) for c in module(t).computations()}"
        " for name, t in texts.items()}))\n"
    )
    names = ("matmul x=k w=k y=m", "scan 3 of scan 5", "microbatches, fsdp")
    texts = {name: golden("cpu-jax0.10")[name] for name in names}
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    if done.returncode != 0:
        pytest.skip(f"jaxlib's private parser is not to be had: {done.stderr[-200:]}")
    for name, counts in json.loads(done.stdout).items():
        ours = parse_module(texts[name]).computations
        assert {n: len(c.instructions) for n, c in ours.items()} == counts
