"""The page of decisions as text: its data read back, its totals, and no string as markup."""

from __future__ import annotations

import json
import re
from typing import Any

import jax
import pytest
from decision_samples import MESH, PATTERNS, TABLES, page, partly, renamed, shapes, tables
from pages import HOSTILE, Outline

from meshwright.sharding import (
    MeshError,
    MeshSpec,
    data,
    decisions_html,
    describe,
    fold,
    fsdp,
    resolve,
    tensor,
)
from meshwright.sharding.report import spec_json


def document(text: str) -> dict[str, Any]:
    return json.loads(Outline(text).texts["decisions-data"])


def test_every_decision_reads_back() -> None:
    read = document(page(topology="cpu:8"))
    assert (read["schema"], read["title"], read["topology"]) == (
        "meshwright.decisions/1", "three blocks", "cpu:8",
    )  # fmt: skip
    assert list(read["mesh"].items()) == list(MESH.axes)
    told = 0
    for group in read["groups"]:
        for position, table in enumerate(group["tables"]):
            heading, decisions = TABLES[table]
            assert read["tables"][table]["name"] == heading
            assert len(group["leaves"]) == len(decisions)
            for leaf, decision in zip(group["leaves"], decisions, strict=True):
                layout = read["layouts"][leaf["layouts"][position]]
                of = decision.leaf
                assert leaf["path"] == of.path and leaf["dtype"] == str(of.dtype)
                assert (tuple(leaf["shape"]), leaf["bytes"]) == (of.shape, of.size_bytes)
                assert leaf["dims"] == (None if of.dims is None else list(of.dims))
                assert leaf["bytes_per_device"][position] == decision.bytes_per_device
                assert layout["spec"] == spec_json(decision.spec)
                assert (layout["rule"], layout["reason"]) == (decision.rule, decision.reason)
                told += 1
    assert told == sum(len(decisions) for _, decisions in TABLES)


def test_totals_are_those_of_the_decisions() -> None:
    for total, (heading, decisions) in zip(document(page())["tables"], TABLES, strict=True):
        assert total == {
            "name": heading,
            "leaves": len(decisions),
            "bytes": decisions.size_bytes,
            "bytes_per_device": decisions.bytes_per_device,
        }


def test_tables_of_the_same_leaves_share_rows() -> None:
    assert [group["tables"] for group in document(page())["groups"]] == [[0, 1, 2], [3]]
    apart = [TABLES[0], TABLES[3], TABLES[2]]
    assert [group["tables"] for group in document(page(apart))["groups"]] == [[0, 2], [1]]
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "bfloat16"), shapes())
    narrow = resolve(describe(half, PATTERNS), fold(data(), fsdp(), tensor()), MESH, "params")
    assert len(document(page([TABLES[0], ("narrow", narrow)]))["groups"]) == 2


def test_tables_of_some_of_the_leaves_share_rows() -> None:
    mesh, given = partly()
    for order in (given, [given[1], given[0], given[2]]):
        (group,) = document(page(order, mesh))["groups"]
        assert [order[index][0] for index in group["tables"]] == [
            "params",
            "gradients",
            "optimizer",
        ]
        mean, w = group["leaves"]
        assert (mean["path"], mean["bytes_per_device"]) == ("mean", [8, None, None])
        assert mean["layouts"][1:] == [None, None] and None not in w["layouts"]
    assert "gradients: 1 leaf," in Outline(page(given, mesh)).texts["pre"]


def test_leaves_without_names_and_single_devices() -> None:
    mesh = MeshSpec.parse("fsdp=1")
    leaves = describe({"w": jax.ShapeDtypeStruct((3, 5), "float32"), "n": 1.0})
    found = resolve(leaves, fold(fsdp(min_bytes=0)), mesh, "params")
    read = document(page([("params", found)], mesh))
    assert [leaf["dims"] for leaf in read["groups"][0]["leaves"]] == [None, None]
    assert read["topology"] is None and document(page([]))["groups"] == []


def test_a_mesh_that_is_not_theirs_is_refused() -> None:
    with pytest.raises(MeshError, match="cannot show the decisions `params` on this mesh"):
        page(mesh=MeshSpec.parse("data=8"))
    with pytest.raises(MeshError):
        page(mesh=MeshSpec.parse("data=-1,fsdp=2,tensor=2"))


def test_strings_never_become_markup() -> None:
    names = {leaf: leaf + HOSTILE for leaf in ("blocks/0/up", "embed", "rule", "params")}
    attacked = decisions_html(
        renamed(names), title=HOSTILE, mesh=MESH, topology=HOSTILE, holds=[(HOSTILE, 1, HOSTILE)]
    )
    attacked.encode("utf-8")
    assert Outline(attacked).tags == Outline(page()).tags
    read = document(attacked)
    assert read["title"] == HOSTILE
    paths = [leaf["path"] for leaf in read["groups"][0]["leaves"]]
    assert names["blocks/0/up"] in paths


def test_pages_are_whole_and_fetch_nothing() -> None:
    text = page()
    outline = Outline(text)
    assert not outline.open and set(outline.addresses) == {"#leaves"}
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert not re.search(r"@import|url\(|\bfetch\(|XMLHttpRequest|innerHTML|\beval\(", text)
    assert "default-src &#x27;none&#x27;" in text


def test_without_scripts_the_text_is_there() -> None:
    text = Outline(page()).texts["pre"]
    assert "params: 9 leaves" in text and "blocks/2/up" in text and "embed → fsdp+data" in text
    many = tables(MESH, layers=70)
    text = Outline(page(many)).texts["pre"]
    assert "and 10 more leaves" in text and "blocks/69" not in text


def test_rich_markup_in_a_path_is_text() -> None:
    names = {"blocks/0/up": "blocks/[/red]/up"}
    assert "blocks/[/red]/up" in Outline(page(renamed(names))).texts["pre"]
