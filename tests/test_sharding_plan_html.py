"""The page: safe, complete and well formed as text; sorted, filtered and read in a browser."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import plan_samples
import pytest
from browsing import Browser
from pages import HOSTILE, Outline

from meshwright.sharding.links import MOST_DRAWN, physical_layout
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.plan_html import report_html
from meshwright.sharding.plan_json import report_from_json, report_json
from meshwright.sharding.planned import Collective, PlanReport, PlanWarning
from meshwright.sharding.topology import Topology

SAMPLES = {
    "fitting": plan_samples.fitting(),
    "too_large": plan_samples.too_large(),
    "formulas_only": plan_samples.formulas_only(),
}


def hostile() -> PlanReport:
    """A plan in which every text is an attack."""
    report = plan_samples.too_large()
    attack = HOSTILE
    collective = Collective(
        "all-gather", (attack,), 1, 2**31, 2**30, "forward", None, attack, attack,
        dtype=attack, emitted=attack, operation=attack,
    )  # fmt: skip
    return dataclasses.replace(
        report,
        topology=attack,
        mesh={attack: 16},
        model={"name": attack, attack: attack},
        memory=dataclasses.replace(report.memory, contributors=((attack, 5),)),
        collectives=(collective,),
        traffic={attack: report.traffic["fsdp"]},
        time=dataclasses.replace(report.time, bound_by=attack, communication_seconds={attack: 1}),
        warnings=(PlanWarning(attack, attack, attack, attack, 1, 1.0, attack),),
        decisions=({"path": attack, "spec": [[attack]], "dims": [attack], "rule": attack},),
        provenance={attack: ("formula", attack)},
        unread=(attack,),
    )


@pytest.mark.parametrize("report", [*SAMPLES.values(), hostile()], ids=[*SAMPLES, "hostile"])
def test_pages_are_whole_and_hold_their_document(report: PlanReport) -> None:
    page = report_html(report)
    page.encode("utf-8")
    outline = Outline(page)
    assert not outline.open
    document = json.loads(outline.texts["plan-data"])
    assert document == report_json(report)
    assert report_from_json(document) == report


def test_strings_never_become_markup() -> None:
    assert Outline(report_html(hostile())).tags == Outline(report_html(SAMPLES["fitting"])).tags


def test_nothing_is_fetched() -> None:
    page = report_html(SAMPLES["fitting"])
    outline = Outline(page)
    assert set(outline.addresses) == {"#main"}
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert not re.search(r"@import|url\(|\bfetch\(|XMLHttpRequest|innerHTML|\beval\(", page)
    assert "default-src &#x27;none&#x27;" in page


def test_without_scripts_the_text_is_there() -> None:
    assert (
        "fits: 33.1 of 95.7 GiB a device" in Outline(report_html(SAMPLES["fitting"])).texts["pre"]
    )


def drawn(report: PlanReport, layout: object = None) -> object:
    return json.loads(Outline(report_html(report, layout)).texts["plan-layout"])  # type: ignore[arg-type]


def test_too_many_devices_are_not_drawn() -> None:
    count = 2 * MOST_DRAWN
    report = dataclasses.replace(SAMPLES["fitting"], mesh={"data": 2, "fsdp": MOST_DRAWN})
    assert drawn(report) == {"count": count, "most": MOST_DRAWN}
    entry = {"index": [0, 0], "slice": 0, "coordinates": [0, 0, 0]}
    assert drawn(report, [entry] * count) == {"count": count, "most": MOST_DRAWN}
    assert drawn(SAMPLES["fitting"]) is None


@pytest.mark.parametrize(
    ("topology", "mesh", "planes", "last"),
    [
        ("v5p:4x4x4", "fsdp=64", [f"z = {z}" for z in range(4)], "chip (3, 3, 3)"),
        ("v5e:4x4", "data=4,tensor=4", [""], "chip (3, 3)"),
        ("v5e:2x2*2", "data=2,fsdp=4", ["slice 0", "slice 1"], "slice 1, chip (1, 1)"),
        ("tpu7x:2x2x1", "fsdp=8", ["z = 0"], "chip (1, 1, 0), device 1"),
        ("h100:2x8", "data=2,fsdp=8", ["host 0", "host 1"], "host 1, GPU 7"),
        ("cpu:32", "data=32", [""], "device 31"),
    ],
)
def test_devices_are_drawn_where_they_are(
    topology: str, mesh: str, planes: list[str], last: str
) -> None:
    spec, at = MeshSpec.parse(mesh), Topology.parse(topology)
    report = dataclasses.replace(SAMPLES["fitting"], topology=topology, mesh=spec.sizes)
    found = drawn(report, physical_layout(at, spec))
    assert isinstance(found, list) and len(found) == spec.device_count
    assert sorted({device["plane"] for device in found}) == planes
    assert last in {device["where"] for device in found}
    assert len({device["where"] for device in found}) == len(found)
    assert len({tuple(device["mesh"].values()) for device in found}) == len(found)


def opened(browser: Browser, tmp_path: Path, report: PlanReport, layout=None) -> Browser:
    path = tmp_path / "plan.html"
    path.write_text(report_html(report, layout), encoding="utf-8")
    browser.open(path)
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith("file:")] == []
    return browser


def column(browser: Browser, key: str) -> list[str]:
    """The raw values of a column of the collectives, top to bottom."""
    cells = f'#collectives td[data-key="{key}"]'
    return browser.run(f"[...document.querySelectorAll('{cells}')].map(c => c.dataset.value)")


def sorting(browser: Browser, key: str) -> str:
    heading = f'#collectives th[data-key="{key}"]'
    return browser.run(f"document.querySelector('{heading}').getAttribute('aria-sort')")


def test_a_figure_reads_back(browser: Browser, tmp_path: Path) -> None:
    opened(browser, tmp_path, SAMPLES["fitting"])
    verdict = "document.getElementById('verdict').innerText"
    assert "Fits" in browser.run(verdict)
    assert "33.1 GiB of 95.7 GiB a device, 62.6 GiB to spare" in browser.run(verdict)
    figure = "document.querySelector('[data-figure=\"memory.optimizer_bytes\"]').innerText"
    assert browser.run(figure) == "957.3 MiB"
    read = "JSON.parse(document.getElementById('plan-data').textContent).memory.peak_bytes"
    assert browser.run(read) == SAMPLES["fitting"].memory.peak_bytes


def test_columns_sort(browser: Browser, tmp_path: Path) -> None:
    report = SAMPLES["fitting"]
    opened(browser, tmp_path, report)
    sent = sorted((c.wire_bytes for c in report.collectives), reverse=True)
    assert [int(value) for value in column(browser, "wire_bytes")] == sent
    assert sorting(browser, "wire_bytes") == "descending"
    browser.click('#collectives th[data-key="wire_bytes"] button')
    assert [int(value) for value in column(browser, "wire_bytes")] == sent[::-1]
    assert (sorting(browser, "wire_bytes"), sorting(browser, "leaf")) == ("ascending", "none")
    browser.click('#collectives th[data-key="leaf"] button')
    assert column(browser, "leaf") == sorted(c.leaf for c in report.collectives)
    assert (sorting(browser, "wire_bytes"), sorting(browser, "leaf")) == ("none", "ascending")


def test_rows_filter(browser: Browser, tmp_path: Path) -> None:
    report = SAMPLES["fitting"]
    opened(browser, tmp_path, report)
    browser.type("#filter-text", "MLP bf16")
    mlp = [c for c in report.collectives if "mlp" in c.leaf]
    assert sorted(column(browser, "leaf")) == sorted(c.leaf for c in mlp)
    browser.choose("#filter-kind", "all-gather")
    browser.choose("#filter-phase", "backward")
    browser.choose("#filter-axis", "fsdp")
    kept = [c for c in mlp if (c.kind, c.phase) == ("all-gather", "backward")]
    assert sorted(column(browser, "leaf")) == sorted(c.leaf for c in kept)
    shown = browser.run("({...document.getElementById('collectives-count').dataset})")
    assert shown == {"rows": str(len(kept)), "sent": str(sum(c.wire_bytes for c in kept))}
    browser.click('#collectives th[data-key="leaf"] button')
    assert column(browser, "leaf") == sorted(c.leaf for c in kept)


def test_the_mesh_shows_groups(browser: Browser, tmp_path: Path) -> None:
    mesh = {"data": 4, "fsdp": 8, "tensor": 2}
    report = dataclasses.replace(SAMPLES["fitting"], mesh=mesh)
    layout = physical_layout(Topology.parse("v5p:4x4x4"), MeshSpec(tuple(mesh.items())))
    assert layout
    opened(browser, tmp_path, report, layout)
    captions = "[...document.querySelectorAll('#mesh figcaption')].map(c => c.innerText)"
    assert browser.run(captions) == ["z = 0", "z = 1", "z = 2", "z = 3"]
    fills = "[...document.querySelectorAll('#mesh-planes rect')].map(r => r.getAttribute('fill'))"
    colours = f"new Set({fills}).size"
    assert browser.run(colours) == 4
    browser.choose("#mesh-axis", "fsdp")
    assert browser.run(colours) == 8
    browser.click('#mesh-planes rect[data-device="37"]')
    group = "[...document.querySelectorAll('#mesh-planes rect.group')].map(r => +r.dataset.device)"
    assert sorted(browser.run(group)) == [33, 35, 37, 39, 41, 43, 45, 47]
    said = browser.run("document.getElementById('mesh-readout').innerText")
    chip = ", ".join(map(str, layout[37]["coordinates"]))
    assert f"Device 37: chip ({chip}); data 2 of 4, fsdp 2 of 8, tensor 1 of 2" in said


def test_no_fit_and_unknown_figures_show(browser: Browser, tmp_path: Path) -> None:
    text = "document.body.innerText"
    opened(browser, tmp_path, SAMPLES["too_large"])
    browser.choose("#filter-axis", "data")
    assert column(browser, "kind") == ["all-to-all"]
    for said in ("over by 185.9 GiB", "--model.remat full", "Not read: collective `ragged-foo`"):
        assert said in browser.run(text)
    opened(browser, tmp_path, SAMPLES["formulas_only"])
    for said in ("No verdict", "no program was compiled", "no lower bound known", "unknown"):
        assert said in browser.run(text)
    assert not re.search(r"NaN|undefined|null|Infinity", browser.run(text))


def test_attacks_stay_text(browser: Browser, tmp_path: Path) -> None:
    layout = [{"slice": 0, "coordinates": [i], "index": [i]} for i in range(16)]
    opened(browser, tmp_path, hostile(), layout)
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert browser.run("document.querySelectorAll('script').length") == 3
    assert "<img src=x onerror=alert(2)>" in browser.run("document.body.innerText")
