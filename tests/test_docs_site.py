"""The built site: complete, without warnings, without a network, legible in light and in dark.

Needs the extra ``docs``; without it these tests are skipped. ``.ci/run`` runs them with it.
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from browsing import Browser, find_browser

pytest.importorskip("furo", reason="the extra `docs` is not installed")
pytest.importorskip("myst_parser", reason="the extra `docs` is not installed")

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "docs"))

import draw  # noqa: E402
import reference_pages  # noqa: E402
from sphinx.util.inventory import InventoryFile  # noqa: E402

LEAST_CONTRAST = 4.5  # WCAG 2.1, level AA, for text


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    # A proxy that is not there: whoever asks the network gets an error, and so a warning.
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    flags = ["-W", "--keep-going", "-n", "-q", "-b", "html"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *flags, "docs", out],
        cwd=ROOT,
        env=os.environ | nowhere,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return out


def test_every_public_name_is_documented(site: Path) -> None:
    content = (site / "objects.inv").read_bytes()
    found = InventoryFile.loads(content, uri="").data
    documented = {name for kind in found for name in found[kind] if kind.startswith("py:")}
    homes = set(reference_pages.homes().values())
    assert len(homes) > 70 and homes <= documented


def test_every_verb_has_its_help(site: Path) -> None:
    page = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    for verb in reference_pages.VERBS:
        assert f"usage: meshwright {verb}" in page


def test_pages_hold_what_they_need(site: Path) -> None:
    """No style, script or picture comes from another host; and no path of this machine is told."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?:[^\"]*)", text)
        assert not loaded, page.name
        assert str(ROOT) not in text and str(Path.home()) + "/" not in text, page.name


@pytest.mark.parametrize("name", draw.PICTURES)
def test_pictures_are_in_the_pages(site: Path, name: str) -> None:
    stripes = f'id="mw-stripes-{name}"'
    assert any(stripes in page.read_text(encoding="utf-8") for page in site.rglob("*.html"))


def test_examples_of_the_extension() -> None:
    result = doctest.testmod(reference_pages)
    assert result.attempted and not result.failed


@pytest.mark.skipif(not find_browser(), reason="no Chromium or Chrome")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_of_pictures_is_legible(site: Path, theme: str, tmp_path: Path) -> None:
    with Browser(find_browser() or "", tmp_path / "profile") as browser:
        browser.call("Page.navigate", url=(site / "strategies" / "zero.html").as_uri())
        deadline = time.monotonic() + 20
        while browser.run("document.readyState") != "complete" and time.monotonic() < deadline:
            time.sleep(0.05)
        browser.run(f"document.body.dataset.theme = '{theme}'")
        page = colour(browser.run("getComputedStyle(document.body).backgroundColor"))
        inks = browser.run(
            "[...new Set([...document.querySelectorAll('svg.mw text')]"
            ".map(text => getComputedStyle(text).fill))]"
        )
        widths = browser.run(
            "[...document.querySelectorAll('svg.mw')].map(s => s.getBoundingClientRect().width)"
        )
        complaints, asked = browser.complaints(), browser.requests()
    assert len(inks) == 2 and len(widths) == 2 and min(widths) > 600
    assert (luminance(page) < 0.1) == (theme == "dark")
    for ink in inks:
        assert contrast(colour(ink), page) >= LEAST_CONTRAST, (ink, page)
    assert not complaints
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def colour(text: str) -> tuple[float, ...]:
    return tuple(int(value) / 255 for value in re.findall(r"\d+", text)[:3])


def luminance(rgb: tuple[float, ...]) -> float:
    red, green, blue = (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: Any, other: Any) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
