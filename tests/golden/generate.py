"""Compile the golden programs and keep their texts: a tool for a person, which no test runs.

The tests of the parser of compiled text read ``tests/golden/TARGET-jaxVERSION.json.xz``. Each
file holds small programs whose communication is known in advance, as one compiler wrote them::

    python tests/golden/generate.py v5e              # needs jax[tpu]
    python tests/golden/generate.py h100 --gpu-target SPEC.txt   # needs jax-cuda13-plugin
    python tests/golden/generate.py cpu

Run it in one environment for each line of jax, and commit what changed together with the
expectations. SPEC.txt is a GPU target description in XLA's text form. Nothing is removed from
the texts; only the folders of this checkout and of the environment are replaced by short names.

The programs are of four sorts: one matmul sharded in every way (the partitioner's choice is
checked against a closed form), collectives written by hand under `jax.shard_map` (the program
says what moves), loops, and small training steps.
"""

from __future__ import annotations

import argparse
import json
import lzma
import operator
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TPU_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
}
TPU_TOPOLOGIES = {
    "v5e": ("v5e:2x4", 1),
    "v5p": ("v5p:2x2x2", 1),
    "tpu7x": ("tpu7x:2x2x1", 1),
    "v5e-four": ("v5e:2x2", 1),
    "v5e-slices": ("v5e:2x4", 2),
    "v5e-four-slices": ("v5e:2x2", 4),
}


def devices_of(target: str, gpu_target: str) -> list[Any]:
    """Devices that need not exist, eight of them (sixteen for two slices)."""
    os.environ.update(TPU_SETTINGS, JAX_PLATFORMS="cpu")
    import jax

    if target == "cpu":
        jax.config.update("jax_num_cpu_devices", 8)
        return jax.devices()
    from jax.experimental import topologies

    if target == "h100":
        config = Path(gpu_target).read_text(encoding="utf-8")
        return topologies.get_topology_desc(
            platform="cuda", target_config=config, topology="1x1x8"
        ).devices
    name, slices = TPU_TOPOLOGIES[target]
    return topologies.get_topology_desc(
        platform="tpu", topology_name=name, num_slices=slices
    ).devices


def mesh_over(devices: list[Any], **sizes: int) -> Any:
    """A mesh in the flat order of the devices."""
    import jax
    import numpy as np

    shape = tuple(sizes.values())
    cube = np.array(devices[: int(np.prod(shape))]).reshape(shape)
    auto = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.sharding.Mesh(cube, tuple(sizes), axis_types=auto)


def array(mesh: Any, shape: tuple[int, ...], *spec: Any, dtype: str = "bfloat16") -> Any:
    """An argument: shape, type and placement without data."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def text_of(function: Callable[..., Any], *arguments: Any, out: Any = None) -> str:
    """Compile for the devices of the arguments and return the text."""
    import jax

    settings = {} if out is None else {"out_shardings": out}
    text = jax.jit(function, **settings).lower(*arguments).compile().as_text()
    assert text
    return text


def matmuls(devices: list[Any]) -> Iterator[tuple[str, Callable[[], str]]]:
    """y = x w, each operand and the result whole or split over one dim, on eight devices."""
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = mesh_over(devices, fsdp=8)
    rows, depth, columns = 1024, 512, 256

    def place(dims: str, split: str) -> tuple[Any, ...]:
        return tuple("fsdp" if dim == split else None for dim in dims)

    for x in ("", "m", "k"):
        for w in ("", "k", "n"):
            for y in ("", "m", "n"):
                a = array(mesh, (rows, depth), *place("mk", x))
                b = array(mesh, (depth, columns), *place("kn", w))
                out = NamedSharding(mesh, PartitionSpec(*place("mn", y)))
                yield (
                    f"matmul x={x or '-'} w={w or '-'} y={y or '-'}",
                    lambda a=a, b=b, out=out: text_of(operator.matmul, a, b, out=out),
                )


def large_matmuls(devices: list[Any]) -> Iterator[tuple[str, Callable[[], str]]]:
    """Matmuls large enough for windowed einsums."""
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = mesh_over(devices, fsdp=8)
    wide = mesh_over(devices, data=2, fsdp=4)
    cases = {
        "gather w": (mesh, ("fsdp", None), ("fsdp", None), ("fsdp", None)),
        "gather x": (mesh, ("fsdp", None), (None, "fsdp"), (None, "fsdp")),
        "scatter y": (mesh, (None, "fsdp"), ("fsdp", None), ("fsdp", None)),
        "gather w of 4": (wide, (("data", "fsdp"), None), ("fsdp", None), (("data", "fsdp"), None)),
    }
    for name, (over, x, w, y) in cases.items():
        a, b = array(over, (65536, 8192), *x), array(over, (8192, 8192), *w)
        out = NamedSharding(over, PartitionSpec(*y))
        yield (
            f"large matmul, {name}",
            lambda a=a, b=b, out=out: text_of(operator.matmul, a, b, out=out),
        )


def unrolled_matmuls(devices: list[Any]) -> Iterator[tuple[str, Callable[[], str]]]:
    """Windowed einsums over so few devices that their loops are unrolled; two with one name."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    # In ring order: over neighbours that are none, the compiler makes no rings.
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=auto, devices=devices)
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    columns = NamedSharding(mesh, PartitionSpec(None, "fsdp"))

    def between(x: Any, a: Any, b: Any) -> Any:
        return jax.lax.with_sharding_constraint(x @ a, columns) @ b

    x = array(mesh, (65536, 8192), "fsdp")
    wide = array(mesh, (8192, 16384), "fsdp")
    narrow = array(mesh, (16384, 4096), "fsdp")
    wide_columns = array(mesh, (8192, 16384), None, "fsdp")
    by_depth = array(mesh, (65536, 8192), None, "fsdp")
    cases: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "gather w": (operator.matmul, (x, wide)),
        "scatter y": (operator.matmul, (by_depth, wide)),
        "gather both weights": (lambda x, a, b: (x @ a) @ b, (x, wide, narrow)),
        "gather x, scatter y": (between, (x, wide_columns, narrow)),
    }
    for name, (function, arguments) in cases.items():
        yield (
            f"four, {name}",
            lambda function=function, arguments=arguments: text_of(function, *arguments, out=split),
        )


def by_hand(devices: list[Any]) -> Iterator[tuple[str, Callable[[], str]]]:
    """One collective under shard_map, over each choice of axes of a 2x4 mesh."""
    import jax
    from jax.sharding import PartitionSpec

    mesh = mesh_over(devices, data=2, fsdp=4)
    for axes in (("data",), ("fsdp",), ("data", "fsdp")):
        n = 1
        for axis in axes:
            n *= mesh.shape[axis]
        ring = [(i, (i + 1) % n) for i in range(n)]
        operations: dict[str, Callable[[Any], Any]] = {
            "psum": lambda x, axes=axes: jax.lax.psum(x, axes),
            "all_gather": lambda x, axes=axes: jax.lax.all_gather(x, axes, axis=0, tiled=True),
            "psum_scatter": lambda x, axes=axes: jax.lax.psum_scatter(
                x, axes, scatter_dimension=0, tiled=True
            ),
            "all_to_all": lambda x, axes=axes: jax.lax.all_to_all(x, axes, 0, 1, tiled=True),
            "ppermute": lambda x, axes=axes, ring=ring: jax.lax.ppermute(x, axes, ring),
        }
        for name, operation in operations.items():
            spec = PartitionSpec(("data", "fsdp"))
            mapped = jax.shard_map(
                operation, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
            )
            argument = array(mesh, (1024, 128), ("data", "fsdp"), dtype="float32")
            yield (
                f"{name} over {','.join(axes)}",
                lambda mapped=mapped, argument=argument: text_of(mapped, argument),
            )


def loops(devices: list[Any]) -> Iterator[tuple[str, Callable[[], str]]]:
    """A psum inside loops of every sort, and in a branch."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    mesh = mesh_over(devices, fsdp=8)

    def step(x: Any) -> Any:
        return jax.lax.psum(jnp.sin(x), "fsdp") * 0.125

    def scan(x: Any, length: int) -> Any:
        return jax.lax.scan(lambda c, _: (step(c), None), x, None, length=length)[0]

    def nested(x: Any) -> Any:
        return jax.lax.scan(lambda c, _: (scan(c, 5), None), x, None, length=3)[0]

    def by_two(x: Any) -> Any:
        def body(state: tuple[Any, Any]) -> tuple[Any, Any]:
            return state[0] + 2, step(state[1])

        return jax.lax.while_loop(lambda state: state[0] < 9, body, (jnp.int32(0), x))[1]

    def downwards(x: Any) -> Any:
        def body(state: tuple[Any, Any]) -> tuple[Any, Any]:
            return state[0] // 2, step(state[1])

        return jax.lax.while_loop(lambda state: state[0] > 1, body, (jnp.int32(64), x))[1]

    def on_data(x: Any) -> Any:
        return jax.lax.while_loop(lambda c: c[0, 0] > 0.5, step, x)

    def branch(x: Any) -> Any:
        return jax.lax.cond(x[0, 0] > 0, step, lambda c: c, x)

    cases = {
        "scan 4": lambda x: scan(x, 4),
        "scan 3 of scan 5": nested,
        "while by two below 9": by_two,
        "while halving from 64": downwards,
        "while on data": on_data,
        "branch": branch,
    }
    for name, function in cases.items():
        spec = PartitionSpec("fsdp")
        mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        argument = array(mesh, (1024, 128), "fsdp", dtype="float32")
        yield name, lambda mapped=mapped, argument=argument: text_of(mapped, argument)


LAYERS, BATCH, WIDTH, HIDDEN, MICROBATCHES = 4, 4096, 512, 2048, 3


def steps(devices: list[Any]) -> Iterator[tuple[str, Callable[[], str]]]:
    """Gradients of a stack of two-matmul layers under each strategy."""
    import jax
    import jax.numpy as jnp

    def loss(weights: Any, x: Any) -> Any:
        def layer(c: Any, w: Any) -> tuple[Any, None]:
            return c + jax.nn.gelu(c @ w[0]) @ w[1], None

        y = jax.lax.scan(jax.checkpoint(layer), x, weights)[0]
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    def microbatched(weights: Any, batches: Any) -> Any:
        def one(total: Any, x: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.grad(loss)(weights, x)), None

        return jax.lax.scan(one, jax.tree.map(jnp.zeros_like, weights), batches)[0]

    strategies = {
        "data": ({"data": 8}, (None, None, None), (None, None, None), ("data", None)),
        "fsdp": ({"fsdp": 8}, (None, "fsdp", None), (None, None, "fsdp"), ("fsdp", None)),
        "tensor": ({"tensor": 8}, (None, None, "tensor"), (None, "tensor", None), (None, None)),
        "fsdp and tensor": (
            {"fsdp": 2, "tensor": 4},
            (None, "fsdp", "tensor"),
            (None, "tensor", "fsdp"),
            ("fsdp", None),
        ),
    }
    for name, (sizes, first, second, batch) in strategies.items():
        mesh = mesh_over(devices, **sizes)
        weights = (
            array(mesh, (LAYERS, WIDTH, HIDDEN), *first),
            array(mesh, (LAYERS, HIDDEN, WIDTH), *second),
        )
        out = tuple(weight.sharding for weight in weights)
        x = array(mesh, (BATCH, WIDTH), *batch)
        yield (
            f"step, {name}",
            lambda w=weights, x=x, out=out: text_of(jax.grad(loss), w, x, out=out),
        )
        xs = array(mesh, (MICROBATCHES, BATCH, WIDTH), None, *batch)
        if name in ("data", "fsdp"):
            yield (
                f"microbatches, {name}",
                lambda w=weights, x=xs, out=out: text_of(microbatched, w, x, out=out),
            )


def between_slices(devices: list[Any]) -> Iterator[tuple[str, Callable[[], str]]]:
    """Collectives over axes that cross two slices, do not, and do in part."""
    import jax
    from jax.sharding import PartitionSpec

    meshes = [{"data": 2, "fsdp": 8}, {"fsdp": 16}]
    if devices[-1].slice_index == 3:
        meshes = [{"data": 2, "fsdp": 4, "tensor": 2}]  # half of fsdp crosses slices, as data does
    for sizes in meshes:
        mesh = mesh_over(devices, **sizes)
        axes = tuple(sizes)
        for over in dict.fromkeys([*((axis,) for axis in axes), axes]):
            operations: dict[str, Callable[[Any], Any]] = {
                "psum": lambda x, over=over: jax.lax.psum(x, over),
                "all_gather": lambda x, over=over: jax.lax.all_gather(x, over, tiled=True),
                "psum_scatter": lambda x, over=over: jax.lax.psum_scatter(x, over, tiled=True),
            }
            for name, operation in operations.items():
                spec = PartitionSpec(axes)
                mapped = jax.shard_map(
                    operation, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
                )
                argument = array(mesh, (2048, 128), axes, dtype="float32")
                sized = ",".join(f"{axis}={size}" for axis, size in sizes.items())
                yield (
                    f"{name} over {','.join(over)} of {sized}",
                    lambda mapped=mapped, argument=argument: text_of(mapped, argument),
                )


def kernels(devices: list[Any]) -> Iterator[tuple[str, Callable[[], str]]]:
    """A Pallas kernel beside a psum, in a loop: its call holds line breaks and braces."""
    import jax
    from jax.experimental import pallas as pl
    from jax.sharding import PartitionSpec

    mesh = mesh_over(devices, fsdp=8)

    def kernel(x: Any, y: Any) -> None:
        y[...] = x[...] * 2.0

    def body(x: Any) -> Any:
        doubled = pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            name="twice",
            metadata={"text": "a } b", "more": "c"},
        )(x)
        return jax.lax.psum(doubled, "fsdp")

    def function(x: Any) -> Any:
        return jax.lax.scan(lambda c, _: (body(c), None), x, None, length=7)[0]

    spec = PartitionSpec("fsdp")
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    argument = array(mesh, (1024, 128), "fsdp", dtype="float32")
    yield "kernel in scan 7", lambda: text_of(mapped, argument)


def programs(target: str, devices: list[Any]) -> Iterator[tuple[str, Callable[[], str]]]:
    """Name and compiler of every golden program of a target."""
    if target == "v5e-four":
        yield from unrolled_matmuls(devices)
        return
    if "slices" in target:
        yield from between_slices(devices)
        return
    yield from matmuls(devices)
    yield from by_hand(devices)
    yield from loops(devices)
    yield from steps(devices)
    if target != "cpu":
        yield from large_matmuls(devices)
    if target in TPU_TOPOLOGIES:
        yield from kernels(devices)


def main() -> None:
    """Write one file of texts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("target", choices=["cpu", "h100", *TPU_TOPOLOGIES])
    parser.add_argument("--gpu-target", default="", help="file with a GPU target description")
    parser.add_argument("--only", default="", help="programs whose name contains this; prints them")
    flags = parser.parse_args()
    devices = list(devices_of(flags.target, flags.gpu_target))
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    texts = {}
    for name, compile_text in programs(flags.target, devices):
        if flags.only not in name:
            continue
        try:
            text = compile_text()
        except Exception as error:  # what a compiler cannot do is part of the record
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            continue
        texts[name] = text.replace(str(HERE), "golden").replace(sys.prefix, "venv")
        print(f"{name}: {len(text)} characters", file=sys.stderr)
        if flags.only:
            print(text)
    if not flags.only:
        line = ".".join(jax.__version__.split(".")[:2])
        path = HERE / f"{flags.target}-jax{line}.json.xz"
        path.write_bytes(lzma.compress(json.dumps(texts, indent=0).encode(), preset=9))
        print(f"{path.name}: {path.stat().st_size} bytes, {len(texts)} programs", file=sys.stderr)


if __name__ == "__main__":
    main()
