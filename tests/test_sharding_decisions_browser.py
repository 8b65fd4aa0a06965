"""The page of decisions in a real browser: searched, sorted, pointed at by mouse, touch and key."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import pytest
from browsing import Browser
from decision_samples import MESH, TABLES, page, partly, renamed, tables
from pages import HOSTILE

from meshwright.sharding import MeshSpec, decisions_html, describe, fold, fsdp, resolve


def opened(browser: Browser, tmp_path: Path, text: str) -> Browser:
    path = tmp_path / "decisions.html"
    path.write_text(text, encoding="utf-8")
    browser.open(path)
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith("file:")] == []
    return browser


def rows(browser: Browser, grid: int = 0) -> list[str]:
    """The paths of the rows that are there, top to bottom."""
    return browser.run(
        f"[...document.querySelectorAll('#grid-{grid} .row')].map(row => row.dataset.path)"
    )


def fact(browser: Browser, name: str) -> list[str]:
    """What the details say of a leaf under a name, for each layout it has."""
    cells = f"#leaf [data-fact={name}]"
    return browser.run(f"[...document.querySelectorAll('{cells}')].map(cell => cell.innerText)")


def row(path: str) -> str:
    return f'#grid-0 .row[data-path="{path}"]'


def test_search_narrows_rows(browser: Browser, tmp_path: Path) -> None:
    opened(browser, tmp_path, page())
    every = [decision.leaf.path for decision in TABLES[0][1]]
    assert rows(browser) == every
    count = "document.querySelector('.count').innerText"
    for words, kept in {
        "BLOCKS/1": [path for path in every if "/1/" in path],
        "dim:norm": [path for path in every if path.endswith("scale")],
        "spec:fsdp+data path:up": [path for path in every if path.endswith("up")],
        "tensor,": [path for path in every if path.endswith("down")],
        "path:embed": [],
    }.items():
        browser.run("document.getElementById('search').value = ''")
        browser.type("#search", words)
        assert rows(browser) == kept, words
        assert browser.run(count) == f"{len(kept)} of {len(every)} leaves"
    assert "No leaf is like that." in browser.run("document.getElementById('groups').innerText")


def test_the_legend_chooses_and_its_colours_are_those_of_the_rows(
    browser: Browser, tmp_path: Path
) -> None:
    opened(browser, tmp_path, page())
    keys = "[...document.querySelectorAll('.key-button')].map(key => key.dataset.key)"
    assert browser.run(keys) == ["fsdp+tensor", "data+fsdp+tensor", "whole"]
    paint = "getComputedStyle(document.querySelector({!r})).background"
    swatch = '.key-button[data-key="{}"] .key'
    found = {key: browser.run(paint.format(swatch.format(key))) for key in browser.run(keys)}
    assert len(set(found.values())) == 3
    for path, key in {"blocks/0/up": "fsdp+tensor", "blocks/2/scale": "whole"}.items():
        assert browser.run(paint.format(f"{row(path)} .key")) == found[key]
    browser.click('.key-button[data-key="whole"]')
    assert rows(browser) == [f"blocks/{n}/scale" for n in range(3)]
    browser.click('.key-button[data-key="data+fsdp+tensor"]')  # of the optimizer, for the others
    assert len(rows(browser)) == 9
    browser.click('.key-button[data-key="whole"]')
    assert "blocks/0/scale" not in rows(browser) and len(rows(browser)) == 6


def test_every_column_sorts(browser: Browser, tmp_path: Path) -> None:
    opened(browser, tmp_path, page())
    first, optimizer = TABLES[0][1], TABLES[2][1]
    given = [decision.leaf.path for decision in first]
    at = {decision.leaf.path: decision for decision in first}
    values = {
        "path": lambda path: path,
        "shape": lambda path: [int(n) for n in at[path].leaf.shape],
        "dims": lambda path: at[path].leaf.dims,
        "bytes": lambda path: -at[path].leaf.size_bytes,
        "device-0": lambda path: -at[path].bytes_per_device,
        "device-2": lambda path: -optimizer[path].bytes_per_device,
        "dtype": lambda path: str(at[path].leaf.dtype),
    }
    for key, value in values.items():
        browser.click(f'#grid-0 [data-key="{key}"] button')
        assert rows(browser) == sorted(given, key=value), key
    heading = "document.querySelector('#grid-0 [data-key={}]').getAttribute('aria-sort')"
    assert browser.run(heading.format("dtype")) == "ascending"
    assert browser.run(heading.format("path")) == "none"
    for key in ("layout-0", "layout-2", "why"):
        browser.click(f'#grid-0 [data-key="{key}"] button')
        cells = f"#grid-0 .row [data-position='{key[-1]}'] .chip" if key != "why" else ".row .why"
        shown = browser.run(f"[...document.querySelectorAll({cells!r})].map(c => c.innerText)")
        grouped = list(dict.fromkeys(shown))  # equal ones stand together
        assert len(grouped) > 1 and shown == sorted(shown, key=grouped.index), key
    for _ in range(3):
        browser.click('#grid-0 [data-key="bytes"] button')
    assert rows(browser) == given  # as given again


@pytest.mark.parametrize("how", ["hover", "tap", "keyboard"])
def test_pointing_at_a_leaf_tells_all_of_it(browser: Browser, tmp_path: Path, how: str) -> None:
    opened(browser, tmp_path, page())
    path = "blocks/0/up"
    assert "Point at a leaf" in browser.run("document.getElementById('leaf').innerText")
    if how == "hover":
        browser.hover(row(path))
    elif how == "tap":
        browser.tap(row(path))
    else:
        browser.run("document.querySelector('#grid-0 [data-key=dtype] button').focus()")
        for key in ("Tab", "End", "Home", "ArrowDown", "ArrowDown"):
            browser.press(key)
        assert browser.run("document.activeElement.dataset.path") == path
        told = "document.getElementById(document.activeElement.getAttribute('aria-describedby'))"
        assert path in browser.run(f"{told}.innerText")
    params, optimizer = TABLES[0][1][path], TABLES[2][1][path]
    assert params.spec != optimizer.spec
    assert fact(browser, "reason") == [params.reason, optimizer.reason]
    assert fact(browser, "rule") == [params.rule, optimizer.rule]
    assert fact(browser, "dims") == ["(embed, mlp)"]
    assert fact(browser, "shape") == ["16×64"]
    assert fact(browser, "bytes") == ["4.0 KiB"]
    assert fact(browser, "device") == ["1.0 KiB a device", "512 B a device"]
    assert fact(browser, "spread") == ["4 parts, each on 2 devices", "8 parts, each on one device"]
    said = browser.run("document.getElementById('leaf').innerText")
    assert f"mu/{path}" in said and f"nu/{path}" in said


def test_the_mesh_shows_who_holds_which_part(browser: Browser, tmp_path: Path) -> None:
    opened(browser, tmp_path, page())
    captions = "[...document.querySelectorAll('#mesh figcaption')].map(one => one.innerText)"
    assert browser.run(captions) == ["data 0", "data 1"]
    names = "document.querySelector('#mesh svg').textContent"
    assert "tensor 2" in browser.run(names) and "fsdp 2" in browser.run(names)
    fills = "[...document.querySelectorAll('#mesh rect')].map(cell => cell.getAttribute('fill'))"
    browser.click(row("blocks/0/up"))
    painted = browser.run(fills)
    assert painted[:4] == painted[4:] and len(set(painted)) == 4  # alike along data
    browser.press("ArrowRight")  # the layout of the optimizer
    assert len(set(browser.run(fills))) == 8
    readout = "document.getElementById('mesh-readout').innerText"
    browser.hover('#mesh rect[data-cell="6"]')
    said = "Device 6: data 1 of 2, fsdp 1 of 2, tensor 0 of 2. It holds embed[12:16], mlp[0:32]"
    assert said in browser.run(readout)
    shards = dict(
        jax.NamedSharding(MESH.build(jax.devices()), TABLES[2][1]["blocks/0/up"].spec)
        .devices_indices_map((16, 64)).items()
    )  # fmt: skip
    assert shards[jax.devices()[6]] == (slice(12, 16), slice(0, 32))
    browser.click(row("blocks/0/scale"))
    browser.hover('#mesh rect[data-cell="6"]')
    assert "It holds all of blocks/0/scale." in browser.run(readout)


@pytest.mark.parametrize(
    ("written", "cells", "note"),
    [
        ("fsdp=2,tensor=4", 8, ""),
        ("fsdp=16,tensor=4", 28, "28 of 64 devices are drawn"),
        ("fsdp=64", 64, ""),
        ("data=1,fsdp=4096", 7, "7 of 4,096 devices are drawn"),
        ("replica=2,data=8,fsdp=16,tensor=4", 60, "60 of 1,024 devices are drawn"),
        ("fsdp=1", 1, "Not drawn, as it has one part: fsdp."),
    ],
)
def test_large_meshes_are_abbreviated_and_say_so(
    browser: Browser, tmp_path: Path, written: str, cells: int, note: str
) -> None:
    mesh = MeshSpec.parse(written)
    opened(browser, tmp_path, page([], mesh))
    assert browser.run("document.querySelectorAll('#mesh rect').length") == cells
    said = browser.run("document.getElementById('mesh-note')?.innerText ?? ''")
    assert note in said and bool(said) == (bool(note))
    drawn = browser.run("document.getElementById('mesh').innerText")
    split = [(name, size) for name, size in mesh.axes if size > 1]
    labels = browser.run("document.querySelector('#mesh').textContent + document.title")
    for name, size in split[-2:]:
        assert f"{name} {size}" in labels
    for name, _ in split[:-2]:
        assert re.search(rf"{name} \d", drawn)


def test_other_leaves_stay_closed_until_opened(browser: Browser, tmp_path: Path) -> None:
    opened(browser, tmp_path, page())
    assert rows(browser, 1) == []
    browser.type("#search", "mu/")
    count = "document.querySelectorAll('.count')[1].innerText"
    assert browser.run(count) == "9 of 19 leaves"
    browser.click("details:nth-of-type(2) summary")
    browser.run("new Promise(requestAnimationFrame)")
    assert rows(browser, 1) == [d.leaf.path for d in TABLES[3][1] if "mu/" in d.leaf.path]


def test_leaves_without_names_show(browser: Browser, tmp_path: Path) -> None:
    mesh = MeshSpec.parse("fsdp=4")
    leaves = describe({"w": jax.ShapeDtypeStruct((3, 8), "float32"), "n": 1.0})
    found = resolve(leaves, fold(fsdp(min_bytes=0)), mesh, "params")
    opened(browser, tmp_path, page([("params", found)], mesh))
    browser.hover(row("w"))
    assert fact(browser, "dims") == ["undeclared"]
    assert fact(browser, "reason") == [found["w"].reason]
    browser.hover('#mesh rect[data-cell="3"]')
    readout = browser.run("document.getElementById('mesh-readout').innerText")
    assert "Device 3: fsdp 3 of 4. It holds dim 1[6:8] of w." in readout
    browser.hover(row("n"))
    assert fact(browser, "shape") == ["scalar"] and fact(browser, "reason") == ["scalar"]
    assert fact(browser, "spread") == ["whole on each of 4 devices"]


def test_a_table_that_is_not_about_a_leaf_leaves_a_gap(browser: Browser, tmp_path: Path) -> None:
    mesh, given = partly()
    opened(browser, tmp_path, page(given, mesh))
    assert rows(browser) == ["mean", "w"]
    cells = f"[...document.querySelectorAll('{row('mean')} .layout')].map(cell => cell.innerText)"
    assert browser.run(cells) == ["whole", "none"]
    browser.click(row("mean"))
    browser.press("ArrowRight")  # there is no other layout to go to
    assert fact(browser, "reason") == ["scalar"]
    browser.click('#grid-0 [data-key="device-2"] button')
    assert rows(browser) == ["w", "mean"]
    browser.hover(row("w"))
    assert fact(browser, "reason") == [given[0][1]["w"].reason, given[2][1]["w"].reason]
    assert browser.complaints() == []


def test_totals_show(browser: Browser, tmp_path: Path) -> None:
    opened(browser, tmp_path, page(holds=[("together", 12345, "of everything")]))
    values = (
        "[...document.querySelectorAll('[data-table] b[data-value]')].map(b => +b.dataset.value)"
    )
    assert browser.run(values) == [decisions.bytes_per_device for _, decisions in TABLES]
    assert "12.1 KiB" in browser.run("document.getElementById('holds').innerText")


def test_thousands_of_leaves_have_few_elements(browser: Browser, tmp_path: Path) -> None:
    many = tables(MESH, layers=1700)
    opened(browser, tmp_path, page(many))
    everything = "document.querySelectorAll('*').length"
    assert browser.run(everything) < 2000
    browser.click(row("blocks/0/up"))
    browser.press("End")
    assert browser.run("document.activeElement.dataset.path") == many[0][1].decisions[-1].leaf.path
    browser.run("document.getElementById('grid-0').scrollTop = 100000")
    browser.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    shown = rows(browser)
    middle = many[0][1].decisions[100000 // 52].leaf.path
    assert middle in shown and len(shown) < 60 and browser.run(everything) < 2000
    browser.type("#search", "blocks/1234/")
    assert len(rows(browser)) == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 800])
def test_pages_fit_their_window(browser: Browser, tmp_path: Path, scheme: str, width: int) -> None:
    browser.call(
        "Emulation.setDeviceMetricsOverride",
        width=width, height=900, deviceScaleFactor=1, mobile=False,
    )  # fmt: skip
    prefers = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.call("Emulation.setEmulatedMedia", features=prefers)
    try:
        opened(browser, tmp_path, page(topology="cpu:8"))
        browser.click(row("blocks/1/down"))
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        light = "getComputedStyle(document.body).backgroundColor"
        assert (
            browser.run(light) == {"light": "rgb(244, 245, 248)", "dark": "rgb(13, 16, 23)"}[scheme]
        )
    finally:
        browser.call("Emulation.clearDeviceMetricsOverride")
        browser.call("Emulation.setEmulatedMedia", features=[])


def test_attacks_stay_text(browser: Browser, tmp_path: Path) -> None:
    names = {name: name + HOSTILE for name in ("blocks/0/up", "embed", "rule", "params")}
    attacked = decisions_html(renamed(names), title=HOSTILE, mesh=MESH, topology=HOSTILE)
    opened(browser, tmp_path, attacked)
    browser.hover('#grid-0 .row[data-index="1"]')
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert "<img src=x onerror=alert(2)>" in browser.run(
        "document.getElementById('leaf').innerText"
    )
    assert browser.complaints() == []
