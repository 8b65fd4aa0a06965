"""Decisions of plain pytrees, as a user's program would have them, and their page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import optax

from meshwright.sharding import (
    Decisions,
    DimPatterns,
    MeshSpec,
    data,
    decisions_html,
    describe,
    describe_optimizer,
    fold,
    fsdp,
    resolve,
    tensor,
    zero1,
)

__all__ = ["MESH", "PATTERNS", "TABLES", "Tables", "page", "partly", "renamed", "shapes", "tables"]

Tables = list[tuple[str, Decisions]]
PATTERNS = DimPatterns(
    (("*/up", ("embed", "mlp")), ("*/down", ("mlp", "embed")), ("*/scale", ("norm",)))
)


def shapes(layers: int = 3) -> Any:
    """A plain pytree of a user's: eight columns a layer more, so that no two are equal."""
    return {
        "blocks": [
            {
                "up": jax.ShapeDtypeStruct((16, 64 * (n + 1)), "float32"),
                "down": jax.ShapeDtypeStruct((64 * (n + 1), 16), "float32"),
                "scale": jax.ShapeDtypeStruct((16,), "float32"),
            }
            for n in range(layers)
        ]
    }


def tables(mesh: MeshSpec, layers: int = 3) -> Tables:
    """Parameters whole over data, their optimizer state split over it: roles that differ."""
    tree = shapes(layers)
    leaves = describe(tree, PATTERNS)
    rules = fold(data(), fsdp(), tensor(), zero1())
    moments = jax.eval_shape(optax.adam(1e-3).init, tree)
    state = describe_optimizer(moments, leaves)
    return [
        ("params", resolve(leaves, rules, mesh, "params")),
        ("gradients", resolve(leaves, rules, mesh, "gradients")),
        ("optimizer", resolve(leaves, rules, mesh, "optimizer")),
        ("moments", resolve(state, rules, mesh, "optimizer")),
    ]


MESH = MeshSpec.parse("data=2,fsdp=2,tensor=2")
TABLES = tables(MESH)


def page(
    given: Sequence[tuple[str, Decisions]] = TABLES, mesh: MeshSpec = MESH, **more: Any
) -> str:
    return decisions_html(given, title="three blocks", mesh=mesh, **more)


def renamed(names: dict[str, str]) -> Tables:
    """The tables with other paths, dims, rules and reasons."""

    def changed(decision: Any) -> Any:
        leaf = decision.leaf
        dims = leaf.dims and tuple(names.get(dim, dim) for dim in leaf.dims)
        leaf = dataclasses.replace(leaf, path=names.get(leaf.path, leaf.path), dims=dims)
        rule = names.get("rule", decision.rule)
        return dataclasses.replace(decision, leaf=leaf, rule=rule, reason=rule)

    return [
        (names.get(heading, heading), dataclasses.replace(d, decisions=tuple(map(changed, d))))
        for heading, d in TABLES
    ]


def partly() -> tuple[MeshSpec, Tables]:
    """A model of which one leaf is not trained, so that two tables are not about it."""
    mesh = MeshSpec.parse("data=2,fsdp=2")
    leaves = describe({"w": jax.ShapeDtypeStruct((8, 4), "float32"), "mean": 1.0})
    trained = [leaf for leaf in leaves if leaf.path == "w"]
    rules = fold(data(), fsdp(min_bytes=0), zero1())
    return mesh, [
        ("params", resolve(leaves, rules, mesh, "params")),
        ("gradients", resolve(trained, rules, mesh, "gradients")),
        ("optimizer", resolve(trained, rules, mesh, "optimizer")),
    ]
