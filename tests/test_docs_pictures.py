"""The pictures of the documentation are what the rules resolve to, and the files are current."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax
import numpy as np
import pytest

from meshwright.models.pure import functional
from meshwright.scripts.flags import parse
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.report import format_spec
from meshwright.train.explain import gradients_of, layout_of

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "docs"))

import draw  # noqa: E402

each_picture = pytest.mark.parametrize("name", draw.PICTURES)
SVG = "{http://www.w3.org/2000/svg}"


def shards(name: str) -> list[dict[str, str]]:
    tree = ElementTree.fromstring(draw.picture(name))
    return [
        {key.removeprefix("data-"): value for key, value in group.attrib.items()}
        for group in tree.iter(f"{SVG}g")
        if group.get("class") == "shard"
    ]


@each_picture
def test_file_is_what_is_drawn(name: str) -> None:
    drawn = draw.picture(name)
    kept = (draw.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert kept == drawn, "run `python docs/draw.py`"


def test_no_other_files() -> None:
    assert {path.stem for path in draw.FOLDER.iterdir()} == set(draw.PICTURES)


@each_picture
def test_parts_are_the_indices_jax_gives_each_device(name: str, devices: list[Any]) -> None:
    """The oracle is jax: what a NamedSharding of the spec puts on the device."""
    shown = draw.resolved(name, draw.PICTURES[name])
    count = shown.mesh.device_count
    laid = np.array(devices[:count]).reshape(tuple(shown.mesh.sizes.values()))
    mesh = jax.sharding.Mesh(laid, shown.mesh.names)
    drawn = {(s["roles"], s["array"], s["device"]): s["index"] for s in shards(name)}
    arrays = [(row, array) for row in shown.rows for array in row.arrays]
    assert len(drawn) == len(arrays) * count
    for row, array in arrays:
        where = jax.NamedSharding(mesh, array.spec).devices_indices_map(array.shape)
        for number, device in enumerate(mesh.devices.flat):
            spans = [
                s.indices(size)[:2] for s, size in zip(where[device], array.shape, strict=True)
            ]
            text = ",".join(f"{begin}:{end}" for begin, end in spans)
            assert drawn[", ".join(row.roles), array.name, str(number)] == text


@each_picture
def test_labels_are_the_resolved_specs(name: str) -> None:
    """Role by role against the layout that a run with these flags would have."""
    config = parse(draw.PICTURES[name].split(), "train")
    mesh = MeshSpec.parse(config.mesh)
    layout = layout_of(config, functional(config.model), mesh)
    tables = {
        "optimizer state": [(d.leaf, d.spec) for d in layout.masters],
        "gradients": [(d.leaf, d.spec) for d in gradients_of(layout, config.grad_accum)],
        "weights": [(d.leaf, d.spec) for d in layout.working],
        "weights in use": [(d.leaf, layout.compute_spec(d)) for d in layout.working],
    }
    checked = set()
    for shard in shards(name):
        for role in shard["roles"].split(", "):
            for leaf, spec in tables.get(role, ()):
                if leaf.path.rpartition("/")[2] == shard["array"]:
                    assert axes_in(shard["spec"]) == axes_in(format_spec(spec)), (role, leaf.path)
                    checked.add(role)
    assert checked == set(tables)


def axes_in(label: str) -> list[str]:
    """The axes of a spec in words, in order."""
    return [] if label == "whole" else re.findall(r"[a-z+]+", label)


@each_picture
def test_what_is_on_no_page_is_not_kept(name: str) -> None:
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")]
    assert any(f"pictures/{name}.svg" in page for page in pages)


def test_every_picture_has_a_description() -> None:
    for path in (ROOT / "docs").rglob("*.md"):
        for about, _ in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            assert len(about) > 20, f"{path.name}: describe the picture"


BY_HAND = {
    "fsdp": {
        "embedding in optimizer state, gradients, weights": "(·, fsdp)",
        "w_up in optimizer state, gradients, weights": "(·, fsdp, ·)",
        "embedding in weights in use": "whole",
        "w_up in weights in use": "whole",
        "stream in activations": "(fsdp, ·, ·)",
        "hidden in activations": "(fsdp, ·, ·)",
    },
    "sequence": {
        "embedding in optimizer state, gradients, weights, weights in use": "(tensor, ·)",
        "w_up in optimizer state, gradients, weights, weights in use": "(·, ·, tensor)",
        "stream in activations": "(·, tensor, ·)",
        "hidden in activations": "(·, ·, tensor)",
    },
}


@pytest.mark.parametrize("name", BY_HAND)
def test_some_pictures_in_full(name: str) -> None:
    """Written down by hand, so that an error shared by drawing and resolving would be seen."""
    for device in range(4):
        mine = [shard for shard in shards(name) if shard["device"] == str(device)]
        assert {f"{s['array']} in {s['roles']}": s["spec"] for s in mine} == BY_HAND[name]
