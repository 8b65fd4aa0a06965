"""Fused attention: the TPU kernel, interpreted, equals matmuls; what it does not serve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.models.config import named
from meshwright.models.hooks import dot_product
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.placement import Constrain
from meshwright.sharding.rules import Rules
from meshwright.sharding.strategies import data, fold, fsdp, tensor
from meshwright.train import attention as attention_module
from meshwright.train.attention import attention_of, kernel_of
from meshwright.train.config import DataConfig, TrainConfig

Attention = Callable[..., jax.Array]

HEAD_DIM = 16
SCALE = HEAD_DIM**-0.5
RULES = fold(data(), fsdp(), tensor())


def operands(
    rows: int = 2, length: int = 128, heads: int = 4, kv_heads: int = 4, lead: tuple[int, ...] = ()
) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    counts = (heads, kv_heads, kv_heads)
    q, k, v = (
        jax.random.normal(key, (*lead, rows, length, count, HEAD_DIM), jnp.float32)
        for key, count in zip(keys, counts, strict=True)
    )
    return q, k, v


def with_gradients(attend: Attention, mask: jax.Array | None = None, causal: bool = True) -> Any:
    """(q, k, v) → the result, and the gradients of a sum in which no two elements weigh alike."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        def weighed(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = attend(q, k, v, mask=mask, causal=causal, scale=SCALE)
            weights = jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
            return jnp.sum(out * weights), out

        grads, out = jax.grad(weighed, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, grads

    return run


def assert_close(ours: Any, theirs: Any) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4)


def built(devices: list[Any], text: str) -> Mesh:
    spec = MeshSpec.parse(text)
    return spec.build(devices[: spec.device_count])


def has_kernel(function: Callable[..., Any], *arguments: Any) -> bool:
    return "pallas_call" in str(jax.make_jaxpr(function)(*arguments))


@pytest.mark.parametrize(
    ("mesh", "kv_heads", "length"),
    [
        ("data=1", 4, 384),  # blocks of 128: three of them
        ("data=1", 1, 128),  # four query heads share a key head
        ("data=2,tensor=2", 2, 256),
        ("fsdp=2,tensor=2", 4, 128),
    ],
)
def test_splash_equals_matmuls(devices: list[Any], mesh: str, kv_heads: int, length: int) -> None:
    over = built(devices, mesh)
    rules = fold(*({"data": data(), "fsdp": fsdp(), "tensor": tensor()}[a] for a in over.shape))
    attend = attention_of(over, rules, interpret=True)
    arguments = operands(length=length, kv_heads=kv_heads)
    run = with_gradients(attend)
    assert has_kernel(run, *arguments)
    assert_close(jax.jit(run)(*arguments), jax.jit(with_gradients(dot_product))(*arguments))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_splash_under_mapped_mesh_axes(devices: list[Any], kv_heads: int) -> None:
    """As the step calls it: each replica's rows are a mapped dim that is split over an axis."""
    over = built(devices, "data=2,fsdp=2,tensor=2")
    inner = Constrain(RULES, over).without(("data", "fsdp"))
    attend = attention_of(over, inner.rules, interpret=True)
    arguments = operands(rows=1, kv_heads=kv_heads, lead=(2, 2))
    split = NamedSharding(over, PartitionSpec("data", "fsdp", None, None, "tensor"))

    run = with_gradients(attend)
    for axis in ("fsdp", "data"):
        run = jax.vmap(run, spmd_axis_name=axis)
    compiled = jax.jit(run, in_shardings=split).lower(*arguments).compile()
    oracle = jax.vmap(jax.vmap(with_gradients(dot_product)))
    assert_close(compiled(*jax.device_put(arguments, split)), oracle(*arguments))
    text = compiled.as_text() or ""
    for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert f" {kind}(" not in text, "rows and heads are independent: nothing has to move"


@pytest.mark.parametrize(
    ("case", "length", "causal"),
    [("a mask", 128, True), ("every key", 128, False), ("an odd length", 96, True)],
)
def test_what_the_kernel_does_not_serve(
    devices: list[Any], case: str, length: int, causal: bool
) -> None:
    over = built(devices, "data=2")
    attend = attention_of(over, fold(data()), interpret=True)
    arguments = operands(length=length)
    mask = jnp.asarray(np.random.default_rng(0).random((2, 1, length, length)) < 0.9)
    mask = mask.at[..., 0].set(True) if case == "a mask" else None
    run = with_gradients(attend, mask, causal)
    assert not has_kernel(run, *arguments)
    assert_close(run(*arguments), with_gradients(dot_product, mask, causal)(*arguments))


def test_fewer_keys_than_queries_are_matmuls(devices: list[Any]) -> None:
    attend = attention_of(built(devices, "data=1"), fold(data()), interpret=True)
    q, _, _ = operands(length=128)
    _, k, v = operands(length=256)
    assert not has_kernel(with_gradients(attend), q, k, v)


def test_heads_laid_out_unlike_keys_are_matmuls(devices: list[Any]) -> None:
    """A device would need keys that another has."""
    over = built(devices, "data=2,tensor=2")
    rules = fold(data(), tensor()).with_text("activations.kv_heads=none")
    arguments = operands(kv_heads=1)
    assert not has_kernel(with_gradients(attention_of(over, rules, interpret=True)), *arguments)


def test_cpu_devices_have_no_kernel(devices: list[Any]) -> None:
    attend = attention_of(built(devices, "data=2"), fold(data()))
    arguments = operands()
    assert not has_kernel(with_gradients(attend), *arguments)
    assert_close(with_gradients(attend)(*arguments), with_gradients(dot_product)(*arguments))


def run_of(**changes: Any) -> TrainConfig:
    model = changes.pop("model", {})
    return TrainConfig(replace(named("gpt2-124m"), **model), seq_len=1024, **changes)


@pytest.mark.parametrize(
    ("kind", "config", "kernel"),
    [
        ("tpu", run_of(), "splash"),
        ("gpu", run_of(), "cudnn"),
        ("cpu", run_of(), "matmuls"),
        ("tpu", replace(run_of(), seq_len=1000), "matmuls"),
        ("gpu", replace(run_of(), seq_len=1000), "cudnn"),
        ("gpu", run_of(dtype="float32"), "matmuls"),
        ("tpu", run_of(dtype="float32"), "splash"),
        ("gpu", run_of(model={"head_dim": 12}), "matmuls"),
        ("tpu", run_of(data=DataConfig(mask_documents=True)), "matmuls"),
        ("gpu", run_of(data=DataConfig(mask_documents=True)), "matmuls"),
    ],
)
def test_the_kernel_a_run_uses(kind: str, config: TrainConfig, kernel: str) -> None:
    assert kernel_of(config, RULES, kind) == kernel


def test_the_kernel_of_keys_laid_out_otherwise() -> None:
    rules: Rules = RULES.with_text("activations.kv_heads=none")
    assert kernel_of(run_of(), rules, "tpu") == "matmuls"


@pytest.mark.parametrize("wheel", [True, False])
def test_gpu_plans_use_cudnn_only_where_its_wheel_is(
    monkeypatch: pytest.MonkeyPatch, wheel: bool
) -> None:
    """A device that is only described: jax cannot compile for cuDNN without the package."""

    class Described:
        platform = "cuda"
        compute_capability = "9.0"

    asked: list[str] = []
    monkeypatch.setattr(attention_module, "has_cudnn_wheel", lambda: wheel)
    monkeypatch.setattr(
        attention_module,
        "dot_product",
        lambda *_, implementation, **__: asked.append(implementation),
    )
    mesh: Any = type("M", (), {"devices": np.array([Described()])})
    attend = attention_of(mesh, RULES)
    q, k, v = (x.astype(jnp.bfloat16) for x in operands())
    attend(q, k, v, causal=True, scale=SCALE)
    attend(q, k, v, mask=jnp.ones((2, 1, 128, 128), bool), causal=True, scale=SCALE)
    attend(*operands(), causal=True, scale=SCALE)
    assert asked == ["cudnn" if wheel else "xla", "xla", "xla"]
