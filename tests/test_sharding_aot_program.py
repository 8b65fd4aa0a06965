"""What a compiler's answer becomes: a program, a verdict on its size, or one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from meshwright.sharding.aot_errors import CompileError
from meshwright.sharding.aot_program import (
    CompiledProgram,
    OutOfMemory,
    compiled_program,
    parse_out_of_memory,
)

REFUSALS = {
    # libtpu 0.0.42, 0.0.50 and what its newer releases say of a scoped allocation
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(32.00T) exceeds available HBM (15.75G).": (32 * 2**40, 15.75 * 2**30),
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (129.00G) exceeds available HBM (31.24G). HLO module: jit_f.\n"
    "See https://openxla.org/xla/errors/error_1000": (129 * 2**30, 31.24 * 2**30),
    "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G "
    "hbm. Exceeded hbm capacity by 4.75G.": (20.5 * 2**30, 15.75 * 2**30),
}


@pytest.mark.parametrize("message", REFUSALS, ids=["0.0.42", "0.0.50", "by space"])
def test_out_of_memory_is_read(message: str) -> None:
    needed, limit = REFUSALS[message]
    found = parse_out_of_memory(message)
    assert found == OutOfMemory(round(needed), round(limit))


def test_out_of_memory_is_never_less_than_the_limit() -> None:
    found = parse_out_of_memory(
        "total memory required for HLO temporaries (15.75G) exceeds available HBM (15.75G)."
    )
    assert found is not None and found.needed_bytes > found.limit_bytes


class JaxRuntimeError(RuntimeError):
    """Stands in for jax's, which is known by its name."""


def _refused_with(message: str) -> CompiledProgram:
    def compile_it() -> Any:
        raise JaxRuntimeError(message)

    return compiled_program(compile_it, text=str, memory=str, lower_seconds=0.5, quick=False)


def test_a_refusal_for_size_is_a_verdict() -> None:
    program = _refused_with(next(iter(REFUSALS)))
    assert program.out_of_memory is not None
    assert program.text is None and program.peak_bytes is None and program.text_error == ""
    assert program.lower_seconds == 0.5


def test_a_kernel_too_large_is_an_error_that_names_it() -> None:
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 256.00M of 128.00M vmem. "
        'Exceeded vmem capacity by 128.00M.\n  Operator: op_name="jit(vm)/pallas_call"\n'
    )
    with pytest.raises(CompileError, match=r"needs 256.0 MiB of vmem, which has 128.0") as caught:
        _refused_with(message)
    assert "jit(vm)/pallas_call" in str(caught.value)
    assert caught.value.chatter == message


def test_another_refusal_is_one_line() -> None:
    with pytest.raises(CompileError, match="why:   INTERNAL: Mosaic failed$"):
        _refused_with("INTERNAL: Mosaic failed\n  deep inside\n")


def test_text_that_cannot_be_read_leaves_memory() -> None:
    def text(_: Any) -> str:
        raise JaxRuntimeError("async-update instruction should have 1 operands\nmore")

    class Stats:
        argument_size_in_bytes = output_size_in_bytes = alias_size_in_bytes = 1
        temp_size_in_bytes = generated_code_size_in_bytes = 2
        peak_memory_in_bytes = 3

    program = compiled_program(
        object, text=text, memory=lambda _: Stats(), lower_seconds=0.0, quick=True
    )
    assert program.text is None and program.text_error.endswith("should have 1 operands")
    assert (program.peak_bytes, program.temp_bytes, program.quick) == (3, 2, True)
