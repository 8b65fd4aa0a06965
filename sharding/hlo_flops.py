"""FLOPs of one compiled instruction: contractions in all the forms that compilers give them.

A matmul of M×K by K×N is 2·M·N·K FLOPs, a multiply and an add for each pair. It reaches compiled
text as a ``dot``, as a call of a library (cuBLAS, oneDNN), or, on TPU, as a ``convolution`` whose
window does what a batch or contracting dim did. So a convolution is counted by what its window
really touches: positions that lie in padding or in the holes of a dilated operand cost nothing,
which is what makes a convolution with 13 padded positions and a window of 4 a batched matmul.

Fused attention is a call of its own. Its FLOPs are those of the matmuls the kernel runs, each
2·b·h·T·S·d less what it skips: 2 forward; backward 5 in one kernel (cuDNN; scores again, dV, dP,
dQ, dK), or 3 for dQ and 4 for dK and dV in two (splash attention recomputes scores and dP in
both). That is 2.5 and 3.5 times the forward pass. Under a causal mask splash attention visits
the blocks on and below the diagonal, which its operands tell; of cuDNN, whose blocks are not
published, half is counted.

Elementwise work is not counted: it is bound by memory traffic. The alternative, XLA's own
``cost_analysis()``, counts loop bodies once and has no figure for custom calls.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meshwright.sharding.hlo import Computation, Instruction, Shape
from meshwright.sharding.hlo_traffic import FREE_TARGETS

__all__ = ["Flops", "UnpricedError", "flops_of", "valid_positions"]

_DTYPES = {"f8": "fp8", "s8": "int8", "u8": "int8", "s4": "int8", "u4": "int8", "bf16": "bf16"}
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
_SPLASH_MATMULS = {"fwd": 2, "dq": 3, "dkv": 4}
_GEMMS = ("__cublas$gemm", "__cublas$lt$matmul")
_HEAD_DIM_MINOR = 1  # of the splash kernel's layouts; with 2 the sequence is the last dim

# Calls that work, but contract nothing.
_ELEMENTWISE = """
SPMDFullToShardShape SPMDShardToFullShape AsyncCollectiveStart AsyncCollectiveDone
annotate_device_placement MoveToHost MoveToDevice PinToDevice TopK ApproxTopK PartialReduce
__cub$DeviceRadixSort cu_threefry2x32 cu_threefry2x32_ffi LayoutConstraint X64Combine X64SplitLow
X64SplitHigh ZeroCrop
"""
_WITHOUT_FLOPS = FREE_TARGETS | frozenset(_ELEMENTWISE.split())


class UnpricedError(Exception):
    """An instruction whose FLOPs nobody can tell from its text; it says why."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of one execution of an instruction.

    Attributes:
        amount: multiplies and adds.
        dtype: of the operands, as `meshwright.sharding.chips.Chip.peak_flops` names them.
        attention: whether it is a fused attention kernel.
    """

    amount: float
    dtype: str
    attention: bool = False


def flops_of(instruction: Instruction, computation: Computation) -> Flops | None:
    """FLOPs of one execution; None for what contracts nothing.

    Args:
        instruction: of ``computation``; what a fusion or loop does is in what it calls.
        computation: where its operands are.

    Raises:
        UnpricedError: a custom call that nothing is known of, or a damaged attribute.
    """
    opcode = instruction.opcode
    if opcode not in ("dot", "scaled-dot", "ragged-dot", "convolution", "custom-call"):
        return None
    # An operand that is a tuple holds scalars or workspaces, never what is contracted.
    operands = [
        (computation.instructions[name].shapes or (Shape("opaque", ()),))[0]
        for name in instruction.operands
    ]
    try:
        if opcode == "custom-call":
            return _custom_call(instruction, operands)
        if opcode == "convolution":
            amount = _convolution(instruction, operands[0], operands[1])
        elif opcode == "ragged-dot":
            amount = _ragged_dot(instruction, operands[0], operands[1])
        else:
            contracted = _numbers(instruction, "lhs_contracting_dims")
            depth = math.prod(operands[0].dims[d] for d in contracted)
            amount = 2.0 * instruction.shapes[0].elements * depth
    except (ArithmeticError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UnpricedError(f"its attributes are not understood ({error})") from error
    return Flops(amount, _dtype(instruction, operands[:2]))


def _dtype(instruction: Instruction, operands: Sequence[Shape]) -> str:
    """What the matrix units multiply: the widest operand, or what an algorithm rounds to."""
    algorithm = re.match(r"dot_([a-z]+\d+)_", instruction.attributes.get("algorithm", ""))
    if algorithm:
        return _named(algorithm.group(1))
    widest = max(operands, key=lambda shape: shape.bits)
    return _named(widest.dtype)


def _named(dtype: str) -> str:
    if dtype in ("bf16", "f16"):
        return "bf16"
    return next((name for start, name in _DTYPES.items() if dtype.startswith(start)), "f32")


def _numbers(instruction: Instruction, key: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", instruction.attributes.get(key, ""))]


def _ragged_dot(instruction: Instruction, lhs: Shape, rhs: Shape) -> float:
    """Each element of the left operand meets the free dims of the group it is in."""
    held = {
        dim
        for key in ("rhs_contracting_dims", "rhs_batch_dims", "rhs_group_dims")
        for dim in _numbers(instruction, key)
    }
    free = math.prod(size for dim, size in enumerate(rhs.dims) if dim not in held)
    return 2.0 * lhs.elements * free


def _convolution(instruction: Instruction, lhs: Shape, rhs: Shape) -> float:
    """2 · batch · input features · output features · pairs of positions that meet in the window."""
    found = re.fullmatch(r"([^_]+)_([^-]+)->(.+)", instruction.attributes["dim_labels"])
    if not found:
        raise ValueError(f"dim_labels={instruction.attributes['dim_labels']}")
    inputs, kernel, outputs = found.groups()
    groups = int(instruction.attributes.get("batch_group_count", 1))
    amount = 2.0 * lhs.dims[inputs.index("b")] / groups
    amount *= rhs.dims[kernel.index("i")] * rhs.dims[kernel.index("o")]
    window = _window(instruction.attributes.get("window", ""))
    for spatial in sorted(set(inputs) - set("bf")):
        at = int(spatial)
        size = rhs.dims[kernel.index(spatial)]
        amount *= valid_positions(
            lhs.dims[inputs.index(spatial)],
            size,
            instruction.shapes[0].dims[outputs.index(spatial)],
            stride=_at(window, "stride", at, 1),
            pad_low=_at(window, "pad", at, 0),
            lhs_dilate=_at(window, "lhs_dilate", at, 1),
            rhs_dilate=_at(window, "rhs_dilate", at, 1),
        )
    return amount


def _window(text: str) -> dict[str, list[int]]:
    """A window's numbers by name, one a spatial dim; of the padding the low side."""
    found = {}
    for key, value in re.findall(r"(\w+)=(\S+)", text.strip("{}")):
        found[key] = [int(part.split("_")[0]) for part in value.split("x")]
    return found


def _at(window: Mapping[str, Sequence[int]], key: str, index: int, default: int) -> int:
    return window[key][index] if key in window else default


def valid_positions(
    length: int,
    kernel: int,
    out: int,
    *,
    stride: int = 1,
    pad_low: int = 0,
    lhs_dilate: int = 1,
    rhs_dilate: int = 1,
) -> int:
    """Pairs (output, kernel position) of a window that meet an element, neither padding nor hole.

    Args:
        length, kernel, out: elements of the operand, the kernel and the result along one dim.
        stride: of the window.
        pad_low: padding before the first element, negative where elements are cut off.
        lhs_dilate, rhs_dilate: distance of neighbouring elements of the operand and the kernel.

    >>> valid_positions(4, 4, 4, stride=3, lhs_dilate=4)  # a batch dim of 4
    4
    >>> valid_positions(1, 8, 8, pad_low=7)  # an outer product: each output meets one position
    8
    """
    step = math.gcd(stride, lhs_dilate)
    period = lhs_dilate // step
    inverse = pow(stride // step, -1, period)
    last = (length - 1) * lhs_dilate
    pairs = 0
    for position in range(kernel):
        offset = position * rhs_dilate - pad_low  # of what output 0 meets
        if offset % step:
            continue
        # Outputs o with 0 <= o·stride + offset <= last, and lhs_dilate dividing that sum.
        low = max(0, -(offset // stride))
        high = min(out - 1, (last - offset) // stride)
        first = (-offset // step) * inverse % period
        first += -(-max(0, low - first) // period) * period
        if first <= high:
            pairs += (high - first) // period + 1
    return pairs


def _custom_call(instruction: Instruction, operands: Sequence[Shape]) -> Flops | None:
    target = instruction.custom_call_target
    if target in _WITHOUT_FLOPS:
        return None
    splash = _SPLASH.search(f"{instruction.name} {instruction.op_name}")
    if target == "tpu_custom_call" and splash:
        return Flops(_splash(instruction, operands, splash.group(1)), "bf16", attention=True)
    if target.startswith("__cudnn$fmha"):
        return Flops(_cudnn(instruction, operands[0]), _named(operands[0].dtype), attention=True)
    if target.startswith(_GEMMS):
        config = instruction.backend_config["gemm_backend_config"]
        dims = config["dot_dimension_numbers"]  # type: ignore[index]
        lhs, rhs = operands[:2]
        shared = math.prod(lhs.dims[int(d)] for d in dims.get("lhs_contracting_dimensions", ()))
        batch = math.prod(lhs.dims[int(d)] for d in dims.get("lhs_batch_dimensions", ()))
        amount = 2.0 * lhs.elements * (rhs.elements // (shared * batch))
        return Flops(amount, _dtype(instruction, operands[:2]))
    if target == "__onednn$matmul":
        config = instruction.backend_config.get("onednn_matmul_config", {})
        depth = operands[0].dims[-2 if config.get("transpose_a") else -1]  # type: ignore[attr-defined]
        amount = 2.0 * instruction.shapes[0].elements * depth
        return Flops(amount, _dtype(instruction, operands[:2]))
    raise UnpricedError(f"nothing is known of the custom call `{target}`")


def _cudnn(instruction: Instruction, queries: Shape) -> float:
    """Of cuDNN's fused attention: the settings hold the scores' shape and the mask."""
    config = instruction.backend_config["cudnn_fmha_backend_config"]
    keys = int(config["intermediate_tensor_shape"]["dimensions"][-1])  # type: ignore[index]
    causal = "CAUSAL" in config.get("mask_type", "")  # type: ignore[attr-defined]
    matmuls = 5 if "Backward" in instruction.custom_call_target else 2
    return matmuls * 2.0 * queries.elements * keys * (0.5 if causal else 1.0)


def _splash(instruction: Instruction, operands: Sequence[Shape], kernel: str) -> float:
    """Of one kernel of splash attention; queries and keys are the first two float operands."""
    queries, keys = [shape for shape in operands if shape.dtype[0] in "bf"][:2]
    settings = _splash_settings(instruction)
    head_first = settings.get("k_layout", _HEAD_DIM_MINOR) == _HEAD_DIM_MINOR
    length = queries.dims[-2 if settings.get("q_layout", 1) == _HEAD_DIM_MINOR else -1]
    source = keys.dims[-2 if head_first else -1]
    matmuls = _SPLASH_MATMULS[kernel]
    if kernel == "dkv" and len(instruction.shapes) > 4:
        matmuls = 5  # two results more than dK, dV and their accumulators: it makes dQ too
    visited = _visited(operands, kernel, length, source, settings)
    return matmuls * 2.0 * queries.elements * source * visited


def _splash_settings(instruction: Instruction) -> Mapping[str, int]:
    text = instruction.attributes.get("frontend_attributes", "")
    found = re.search(r'"xprof_metadata":("(?:[^"\\]|\\.)*")', text)
    try:
        value = json.loads(json.loads(found.group(1))) if found else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _visited(
    operands: Sequence[Shape], kernel: str, length: int, source: int, settings: Mapping[str, int]
) -> float:
    """Part of the scores that a splash kernel computes.

    What precedes the queries says which block comes next: (heads, blocks of queries, blocks of
    keys), where the inner one of the kernel's loops is as long as the longest row of blocks that
    the mask leaves. Positions among the integers that follow (segments come in pairs) mean that
    the mask is computed: causal if no row is shortened, else a window.
    """
    first = next(n for n, shape in enumerate(operands) if shape.dtype[0] in "bf")
    if first == 0:
        return 1.0
    grid = operands[0].dims
    own = settings.get({"fwd": "block_q", "dq": "block_q_dq", "dkv": "block_q_dkv"}[kernel])
    other = settings.get({"fwd": "block_kv", "dq": "block_kv_dq", "dkv": "block_kv_dkv"}[kernel])
    rows, columns = grid[-2:]
    whole_rows, whole_columns = (
        length // (own or length // rows),
        source // (other or source // columns),
    )
    computed = sum(shape.dtype == "s32" for shape in operands[first:]) % 2 == 1
    if (rows, columns) != (whole_rows, whole_columns) or not computed or length != source:
        return min(1.0, rows * columns / (whole_rows * whole_columns))
    # Block (i, j) holds a key that some query of it may see if j's first is not after i's last.
    seen = sum(-(-(i + 1) * columns // rows) for i in range(rows))
    return seen / (rows * columns)
