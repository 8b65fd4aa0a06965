"""The opcodes of XLA's text: which move data between devices, which are known not to.

A parser that looks only for the collectives it knows is silent about the one it does not. So
the opcodes that move nothing are listed too (from the opcode table of XLA's ``hlo_opcode.h``, and
the TPU compiler's own), and whatever is in neither list is reported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from meshwright.sharding.planned import Kind

__all__ = ["COLLECTIVES", "LOCAL", "base_and_form", "is_asynchronous"]

COLLECTIVES: Mapping[str, Kind] = {
    "all-gather": "all-gather",
    "all-reduce": "all-reduce",
    "reduce-scatter": "reduce-scatter",
    "all-to-all": "all-to-all",
    "collective-permute": "collective-permute",
    "collective-broadcast": "collective-broadcast",
}
"""Collectives whose bytes the text tells, without ``-start``."""

_LOCAL = """
abs acos acosh add add-dependency after-all and asin asinh async-done async-start async-update
atanh batch-norm-grad batch-norm-inference batch-norm-training bitcast bitcast-convert broadcast
call cbrt ceil cholesky clamp compare complex concatenate conditional constant convert
convolution copy copy-done copy-start cos cosh cosine count-leading-zeros custom-call divide
domain dot dynamic-reshape dynamic-slice dynamic-update-slice erf exp exponential
exponential-minus-one fft floor fusion gather get-dimension-size get-tuple-element imag infeed
iota is-finite log log-plus-one logistic map maximum minimum multiply negate not opt-barrier
optimization-barrier or outfeed pad parameter partition-id popcnt power ragged-dot real recv
recv-done reduce reduce-precision reduce-window remainder replica-id reshape reverse rng
rng-bit-generator rng-get-and-update-state round-nearest-afz round-nearest-even rsqrt scaled-dot
scatter select select-and-scatter send send-done set-dimension-size shift-left
shift-right-arithmetic shift-right-logical sign sin sine sinh slice sort sqrt stochastic-convert
subtract tan tanh topk transpose triangular-solve tuple while xor
"""
LOCAL = frozenset(_LOCAL.split())
"""Opcodes that move nothing between devices by themselves; send and recv must be looked into."""

# Sugar: any of these may be written with -start, -update and -done around a hidden computation.
_ASYNC = re.compile(r"(.+)(-(?:start|update|done))")


def base_and_form(opcode: str) -> tuple[str, str]:
    """An opcode without its asynchronous ending, and that ending.

    >>> base_and_form("all-gather-start"), base_and_form("all-gather"), base_and_form("copy-done")
    (('all-gather', '-start'), ('all-gather', ''), ('copy-done', ''))
    """
    found = None if opcode in LOCAL else _ASYNC.fullmatch(opcode)
    return (found.group(1), found.group(2)) if found else (opcode, "")


def is_asynchronous(opcode: str) -> bool:
    """Whether an opcode starts, continues or ends something that runs beside others."""
    return _ASYNC.fullmatch(opcode) is not None
