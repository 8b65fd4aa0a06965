"""FLOPs of compiled instructions: matmuls in every form, convolutions, attention kernels.

Small programs with known answers, written here in XLA's form or compiled on the spot for CPU.
XLA's own count is the oracle where it is right: on programs without loops.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.sharding.hlo import parse_module
from meshwright.sharding.hlo_cost import ProgramCost, cost_of
from meshwright.sharding.hlo_flops import valid_positions


def compiled(function: Any, *shapes: tuple[int, ...], dtype: str = "float32") -> tuple[Any, Any]:
    """The cost of a function compiled for this machine's CPU, and the executable."""
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    program = jax.jit(function).lower(*arguments).compile()
    return cost_of(parse_module(program.as_text() or "")), program


def cost(body: str, header: str = "", before: str = "") -> ProgramCost:
    """The cost of an entry computation written by hand."""
    return cost_of(
        parse_module(f"HloModule t{header}\n\n{before}\nENTRY %main () -> f32[] {{\n{body}\n}}\n")
    )


def test_one_matmul_is_two_m_n_k() -> None:
    found, _ = compiled(lambda a, b: a @ b, (64, 32), (32, 16))
    assert found.device_flops == 2 * 64 * 32 * 16
    assert found.matmul_flops == {"f32": 2 * 64 * 32 * 16}
    assert found.attention_flops == 0
    assert found.unread == ()


def test_batched_matmul_inside_a_larger_expression() -> None:
    found, _ = compiled(
        lambda a, b: jnp.sum(jax.nn.gelu(jnp.einsum("bhtd,bhsd->bhts", a, b))),
        (2, 3, 16, 8),
        (2, 3, 32, 8),
    )
    assert found.device_flops == 2 * (2 * 3) * 16 * 32 * 8


def scanned(weights: Any, x: Any) -> Any:
    return jnp.sum(jax.lax.scan(lambda c, w: (jnp.sin(c @ w), None), x, weights)[0])


def test_a_scan_counts_every_layer() -> None:
    layers, rows, width = 5, 32, 16
    found, program = compiled(scanned, (layers, width, width), (rows, width))
    one = 2 * rows * width * width
    assert found.device_flops == layers * one
    # The alternative would have said a fifth of it.
    assert program.cost_analysis()["flops"] < 2 * one


@pytest.mark.parametrize(("remat", "matmuls"), [(False, 3), (True, 4)])
def test_gradients_and_recomputation_of_a_scan(remat: bool, matmuls: int) -> None:
    layers, rows, width = 4, 32, 16

    def layer(c: Any, w: Any) -> tuple[Any, None]:
        return jnp.sin(c @ w), None

    def loss(weights: Any, x: Any) -> Any:
        body = jax.checkpoint(layer, prevent_cse=True) if remat else layer
        return jnp.sum(jax.lax.scan(body, x, weights)[0])

    found, _ = compiled(jax.grad(loss, argnums=(0, 1)), (layers, width, width), (rows, width))
    assert found.device_flops == matmuls * layers * 2 * rows * width * width


def test_microbatches_multiply_with_layers() -> None:
    micro, layers, rows, width = 3, 4, 8, 16

    def step(weights: Any, batches: Any) -> Any:
        def one(total: Any, x: Any) -> tuple[Any, None]:
            grads = jax.grad(scanned)(weights, x)
            return total + grads, None

        return jax.lax.scan(one, jnp.zeros_like(weights), batches)[0]

    found, _ = compiled(step, (layers, width, width), (micro, rows, width))
    # The gradient of the first layer's input is needed by nobody but is part of the loop's body.
    assert found.device_flops == micro * layers * 3 * 2 * rows * width * width


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [
        ((1, 1), [(1, 1), (2, 2)], (1, 1), 1),
        ((2, 1), [(0, 0), (0, 3)], (1, 2), 1),
        ((1, 2), [(1, 0), (2, 1)], (2, 1), 4),
    ],
)
def test_convolutions_are_as_xla_counts_them(
    stride: tuple[int, int],
    padding: list[tuple[int, int]],
    dilation: tuple[int, int],
    groups: int,
) -> None:
    def convolve(x: Any, w: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x, w, stride, padding, lhs_dilation=dilation, feature_group_count=groups
        )

    found, program = compiled(convolve, (2, 8, 17, 12), (16, 8 // groups, 3, 5))
    assert found.device_flops == program.cost_analysis()["flops"]


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(1, 9),
    kernel=st.integers(1, 9),
    out=st.integers(1, 9),
    stride=st.integers(1, 5),
    pad_low=st.integers(-3, 9),
    lhs_dilate=st.integers(1, 6),
    rhs_dilate=st.integers(1, 4),
)
def test_valid_positions_by_looking_at_each(
    length: int,
    kernel: int,
    out: int,
    stride: int,
    pad_low: int,
    lhs_dilate: int,
    rhs_dilate: int,
) -> None:
    elements = {i * lhs_dilate for i in range(length)}
    expected = sum(
        o * stride + k * rhs_dilate - pad_low in elements for o in range(out) for k in range(kernel)
    )
    found = valid_positions(
        length,
        kernel,
        out,
        stride=stride,
        pad_low=pad_low,
        lhs_dilate=lhs_dilate,
        rhs_dilate=rhs_dilate,
    )
    assert found == expected


@pytest.mark.parametrize(
    ("lhs", "rhs", "result", "attributes", "flops"),
    [
        # What the TPU compiler makes of projections to heads and of attention scores.
        ("64,32,1", "32,8,4", "64,8,4",
         "window={size=8 pad=7_7 rhs_reversal=1}, dim_labels=bf0_i0o->b0f", 64 * 32 * 8 * 4),
        ("64,8,4", "8,4,32", "64,32,1",
         "window={size=8}, dim_labels=b0f_0io->bf0", 64 * 32 * 8 * 4),
        ("64,32", "32,16", "64,16", "dim_labels=bf_io->bf", 64 * 32 * 16),
        ("4,16,4,8", "4,16,4,8", "4,4,16,16",
         "window={size=4x4 stride=3x3 lhs_dilate=4x4}, dim_labels=0b1f_0o1i->01bf",
         4 * 4 * 16 * 16 * 8),
        ("96,64,1", "96,4,8", "4,8,64",
         "window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=fb0_i0o->0fb", 96 * 4 * 8 * 64),
    ],
)  # fmt: skip
def test_matmuls_in_the_form_of_convolutions(
    lhs: str, rhs: str, result: str, attributes: str, flops: int
) -> None:
    found = cost(
        f"  %a = bf16[{lhs}]{{0}} parameter(0)\n  %b = bf16[{rhs}]{{0}} parameter(1)\n"
        f"  ROOT %c = bf16[{result}]{{0}} convolution(%a, %b), {attributes}"
    )
    assert found.device_flops == 2 * flops
    assert found.unread == ()


def test_libraries_calls() -> None:
    gemm = (
        '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],'
        '"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],'
        '"rhs_batch_dimensions":["0"]}}}'
    )
    found = cost(
        "  %a = bf16[3,64,32]{2,1,0} parameter(0)\n  %b = bf16[3,32,16]{2,1,0} parameter(1)\n"
        "  %c = (bf16[3,64,16]{2,1,0}, s8[4096]{0}) custom-call(%a, %b), "
        f'custom_call_target="__cublas$gemm", backend_config={gemm}\n'
        "  %d = f8e4m3fn[64,32]{1,0} parameter(2)\n  %e = f8e4m3fn[32,16]{1,0} parameter(3)\n"
        "  %f = f32[64,16]{1,0} custom-call(%d, %e), "
        'custom_call_target="__onednn$matmul", backend_config={"onednn_matmul_config":{}}\n'
        '  ROOT %g = bf16[8,16]{1,0} custom-call(%a), custom_call_target="TopK"'
    )
    one = 2.0 * 64 * 32 * 16
    assert found.matmul_flops == {"bf16": 3 * one, "fp8": one}
    assert found.unread == ()


def test_ragged_dots_cost_what_their_tokens_cost() -> None:
    found = cost(
        "  %a = bf16[64,32]{1,0} parameter(0)\n  %b = bf16[4,32,16]{2,1,0} parameter(1)\n"
        "  %g = s32[4]{0} parameter(2)\n"
        "  ROOT %c = bf16[64,16]{1,0} ragged-dot(%a, %b, %g), lhs_contracting_dims={1}, "
        "rhs_contracting_dims={1}, lhs_ragged_dims={0}, rhs_group_dims={0}"
    )
    assert found.device_flops == 2 * 64 * 32 * 16


def test_operand_types_go_to_their_own_peak() -> None:
    found = cost(
        "  %a = f32[8,8]{1,0} parameter(0)\n  %b = s8[8,8]{1,0} parameter(1)\n"
        "  %r = f32[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}, "
        "algorithm=dot_bf16_bf16_f32\n"
        "  %s = f32[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"
        "  ROOT %t = s32[8,8]{1,0} dot(%b, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    )
    assert found.matmul_flops == {"bf16": 1024.0, "f32": 1024.0, "int8": 1024.0}


def splash(kernel: str, grid: str, extra: str, results: str, *, heads: int = 4) -> ProgramCost:
    """One splash attention kernel: 1024 positions, 4 heads over 2, blocks of 256, head dim 64."""
    blocks = {"fwd": "", "dq": "_dq", "dkv": "_dkv"}[kernel]
    metadata = (
        f'{{kernel_metadata={{\n"xprof_metadata":"{{\\"block_q{blocks}\\": 256, '
        f'\\"block_kv{blocks}\\": 256, \\"q_layout\\": 1, \\"k_layout\\": 1}}"\n}}}}'
    )
    return cost(
        f"  %n = s8[{grid}]{{2,1,0:T(8,128)}} parameter(0)\n"
        f"  %q = bf16[{heads},1024,64]{{2,1,0}} parameter(1)\n"
        "  %k = bf16[2,1024,64]{2,1,0} parameter(2)\n  %s = s32[1024,128]{1,0} parameter(3)\n"
        f"  ROOT %splash_mha_{kernel}.1 = ({results}) custom-call(%n, %n, %q, %k, %k{extra}), "
        f'custom_call_target="tpu_custom_call", frontend_attributes={metadata}'
    )


UNFUSED = "f32[256,64], f32[256,64], bf16[2,1024,64], bf16[2,1024,64]"


@pytest.mark.parametrize(
    ("kernel", "results", "matmuls"),
    [
        ("fwd", "f32[256,64], bf16[4,1024,64]", 2),
        ("dq", "f32[256,64], bf16[4,1024,64]", 3),
        ("dkv", UNFUSED, 4),
        ("dkv", f"f32[256,64], bf16[4,4,1024,64], {UNFUSED}", 5),
    ],
)
def test_splash_attention_by_kernel_and_mask(kernel: str, results: str, matmuls: int) -> None:
    scores = 2.0 * 4 * 1024 * 1024 * 64
    causal = splash(kernel, "1,4,4", ", %s", results)
    assert causal.attention_flops == matmuls * scores * 10 / 16
    assert causal.device_flops == causal.attention_flops
    assert causal.unread == ()
    # A mask kept as an array may leave any block, and a window leaves two blocks a row.
    assert splash(kernel, "1,4,4", "", results).attention_flops == matmuls * scores
    windowed = "1,2,4" if kernel == "dkv" else "1,4,2"
    assert splash(kernel, windowed, ", %s", results).attention_flops == matmuls * scores / 2


@pytest.mark.parametrize(
    ("target", "mask", "matmuls"),
    [
        ("__cudnn$fmhaSoftmax", "NO_MASK", 2.0),
        ("__cudnn$fmhaSoftmax", "CAUSAL", 1.0),
        ("__cudnn$fmhaSoftmaxBackward", "CAUSAL", 2.5),
    ],
)
def test_cudnn_attention(target: str, mask: str, matmuls: float) -> None:
    config = (
        f'{{"cudnn_fmha_backend_config":{{"fmha_scale":0.1,"mask_type":"{mask}",'
        '"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","4","128","256"]}}}'
    )
    found = cost(
        "  %q = bf16[2,4,128,64]{3,1,2,0} parameter(0)\n  %k = bf16[2,4,256,64]{3,1,2,0} "
        "parameter(1)\n  ROOT %a = (bf16[2,4,128,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), "
        f'custom_call_target="{target}", backend_config={config}'
    )
    assert found.attention_flops == matmuls * 2 * 2 * 4 * 128 * 256 * 64


@pytest.mark.parametrize(
    "line",
    [
        'f32[8]{0} custom-call(%a), custom_call_target="somebody_elses_kernel"',
        'f32[8]{0} custom-call(%a, %a), custom_call_target="__cublas$gemm", backend_config={}',
        "f32[8]{0} convolution(%a, %a), dim_labels=nonsense",
    ],
)
def test_what_cannot_be_priced_is_named(line: str) -> None:
    found = cost(f"  %a = f32[8]{{0}} parameter(0)\n  ROOT %odd = {line}")
    assert found.device_flops == 0
    assert len(found.unread) == 1
    assert found.unread[0].startswith("odd in main: ")


def test_a_loop_on_data_counts_once_and_says_so() -> None:
    def until(x: Any) -> Any:
        return jax.lax.while_loop(lambda c: jnp.sum(c) < 1e6, lambda c: c @ c, x)

    found, _ = compiled(until, (16, 16))
    assert found.device_flops == 2 * 16**3
    assert any("without a known trip count" in line for line in found.unread)
