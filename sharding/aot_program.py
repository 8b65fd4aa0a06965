"""A program compiled for hardware that is not here, as a value: its text and its memory.

`compile_lowered` runs in the child of `meshwright.sharding.aot` and turns what jax returns, which
cannot leave the process, into a `CompiledProgram`, which can.

The memory figure that counts is the peak. Arguments plus temporaries can be half as much again
(temporaries of different times are added up as if they all lived at once), and the TPU compiler's
own verdict is on the peak. On CPU the peak that XLA gives equals the arguments, which says
nothing.

A TPU program that does not fit is refused, in one of a few wordings; that is an answer, not an
error, and becomes `OutOfMemory`. A kernel that asks for more on-chip memory than there is is
refused in almost the same words, but no other mesh would help it: that is a `CompileError`.
A GPU program is never refused.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from meshwright.sharding.aot_errors import CompileError
from meshwright.sharding.aot_wheels import versions
from meshwright.sharding.hlo_source import located

if TYPE_CHECKING:
    from jax.stages import Lowered

__all__ = [
    "CompiledProgram",
    "OutOfMemory",
    "compile_lowered",
    "compiled_program",
    "parse_out_of_memory",
]

_UNITS = {unit: 1024**power for power, unit in enumerate(("", "K", "M", "G", "T", "P", "E"))}
_SIZE = r"([\d.]+)([KMGTPE]?)i?B?"
# libtpu 0.0.42 to 0.0.51; the newer put an error code before and the module's name after.
_OUT_OF_MEMORY = (
    re.compile(
        rf"total memory required for .{{1,60}}? \({_SIZE}\) exceeds available HBM \({_SIZE}\)"
    ),
    re.compile(rf"[Rr]an out of memory in memory space hbm\. Used {_SIZE} of {_SIZE} hbm"),
)
_KERNEL = re.compile(rf"[Rr]an out of memory in memory space (\w+)\. Used {_SIZE} of {_SIZE} \w+")


@dataclass(frozen=True)
class OutOfMemory:
    """What the TPU compiler said when it refused a program for its size.

    Attributes:
        needed_bytes: peak of one device, arguments included; written by the compiler with two
            decimals, so true to about 0.03%, and never less than the limit.
        limit_bytes: what it allows on this chip.
    """

    needed_bytes: int
    limit_bytes: int


@dataclass(frozen=True)
class CompiledProgram:
    """What a compile gives, per device; byte counts are None where it gave no program.

    Attributes:
        text: the optimised program, or None where it cannot be read or there is none.
        text_error: why it cannot be read.
        argument_bytes, output_bytes: as laid out by the compiler, padding included.
        alias_bytes: of the output, what reuses donated arguments.
        temp_bytes: sum of temporaries.
        peak_bytes: the largest sum at any moment, arguments included.
        generated_code_bytes: the program itself.
        compile_seconds, lower_seconds: wall time; lowering includes tracing.
        versions: jax, jaxlib and the compilers.
        chatter: what the compiler wrote to stdout and stderr.
        out_of_memory: the verdict of a TPU compiler that refused.
        quick: compiled with little effort; peaks are then up to 10% off, and some programs
            that do not fit are accepted.
    """

    text: str | None
    argument_bytes: int | None
    output_bytes: int | None
    alias_bytes: int | None
    temp_bytes: int | None
    peak_bytes: int | None
    generated_code_bytes: int | None
    compile_seconds: float
    lower_seconds: float
    text_error: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    chatter: str = ""
    out_of_memory: OutOfMemory | None = None
    quick: bool = False

    def saying(self, chatter: str) -> CompiledProgram:
        """The same with what the compiler wrote, its stack frames as lines of the source."""
        return replace(self, chatter=located(chatter, self.text))


def parse_out_of_memory(message: str) -> OutOfMemory | None:
    """Read a compiler's refusal; None where it is about something else.

    >>> found = parse_out_of_memory("Ran out of memory on HBM, the total memory required for "
    ...     "HLO temporaries (16.67G) exceeds available HBM (15.75G).")
    >>> f"{found.needed_bytes / 2**30:.2f} of {found.limit_bytes / 2**30:.2f}"
    '16.67 of 15.75'
    """
    for pattern in _OUT_OF_MEMORY:
        if found := pattern.search(message):
            needed, limit = _bytes(*found.groups()[:2]), _bytes(*found.groups()[2:])
            return OutOfMemory(max(needed, limit + 1), limit)
    return None


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])


def compile_lowered(
    lowered: Lowered, *, quick: bool = False, lower_seconds: float = 0.0
) -> CompiledProgram:
    """Compile what jax lowered; for use in the child.

    Args:
        lowered: by ``jitted.lower(...)``, for compile-only devices.
        quick: a look at low effort (O0), a fifth of the time on TPU; no verdict.
        lower_seconds: to be noted in the result.

    Raises:
        CompileError: the compiler refuses the program for another reason than its size.
    """
    with _effort(quick):
        return compiled_program(
            lowered.compile,
            text=lambda compiled: compiled.as_text(),
            memory=lambda compiled: compiled.memory_analysis(),
            lower_seconds=lower_seconds,
            quick=quick,
        )


def compiled_program(
    compile_it: Callable[[], Any],
    *,
    text: Callable[[Any], str],
    memory: Callable[[Any], Any],
    lower_seconds: float,
    quick: bool,
) -> CompiledProgram:
    """Compile in whatever way and collect what comes of it.

    Args:
        compile_it: returns the compiled thing.
        text, memory: take its program and its memory figures from it.
        lower_seconds, quick: to be noted.

    Raises:
        CompileError: as `compile_lowered`.
    """
    started = time.monotonic()
    compiled, refused = None, None
    try:
        compiled = compile_it()
    except Exception as error:
        if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError"):
            raise
        refused = parse_out_of_memory(str(error))
        if refused is None:
            raise _refusal(str(error)) from error
    seconds = time.monotonic() - started
    written, trouble = None, ""
    if compiled is not None:
        try:
            written = text(compiled)
        except Exception as error:  # a libtpu newer than jaxlib's parser
            trouble = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
    found = None if compiled is None else memory(compiled)
    return CompiledProgram(
        text=written,
        text_error=trouble,
        argument_bytes=_figure(found, "argument_size_in_bytes"),
        output_bytes=_figure(found, "output_size_in_bytes"),
        alias_bytes=_figure(found, "alias_size_in_bytes"),
        temp_bytes=_figure(found, "temp_size_in_bytes"),
        peak_bytes=_figure(found, "peak_memory_in_bytes"),
        generated_code_bytes=_figure(found, "generated_code_size_in_bytes"),
        compile_seconds=seconds,
        lower_seconds=lower_seconds,
        versions=versions(),
        out_of_memory=refused,
        quick=quick,
    )


def _figure(found: Any, name: str) -> int | None:
    return None if found is None else int(getattr(found, name))


@contextmanager
def _effort(quick: bool) -> Iterator[None]:
    import jax

    former = jax.config.values["jax_optimization_level"]
    if quick:
        jax.config.update("jax_optimization_level", "O0")
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", former)


def _refusal(message: str) -> CompileError:
    """A compiler's message in one sentence; all of it goes to the chatter."""
    if found := _KERNEL.search(message):
        space, needed, limit = found.group(1), _bytes(*found.groups()[1:3]), found.groups()[3:5]
        name = re.search(r'op_name="([^"]+)"', message)
        return CompileError(
            "the compiler refuses the program",
            failure="refused",
            where=name.group(1) if name else "",
            why=f"a kernel needs {needed / 2**20:.1f} MiB of {space}, "
            f"which has {_bytes(*limit) / 2**20:.1f} MiB",
            fix="give the kernel smaller blocks",
            chatter=message,
        )
    first = message.strip().splitlines()[0] if message.strip() else "no reason given"
    return CompileError(
        "the compiler refuses the program", failure="refused", why=first[:400], chatter=message
    )
