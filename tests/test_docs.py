"""The pages under docs/: commands parse, code runs and prints what is shown, links lead somewhere.

How a page is read:

- ```` ```python ```` blocks run, all of a page in order and in one namespace (pages of strategies
  begin with everything of `meshwright.sharding`); a ```` ```text ```` block right below one is
  what it prints, ``…`` standing for anything. Blocks of the guides under adopt/ follow the program
  that the page's ```` ```diff ```` leads to (`test_docs_adopt`). Code that shall not run has
  another fence: ``diff``, ``text``, ``{code-block} python``.
- Lines of ```` ```bash ```` blocks that begin with ``meshwright`` are resolved as the command
  would; the others may install or build.
- The tutorial runs in a process of its own, as a reader's would: it sets up its devices itself.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_docs_adopt import diff_of, program

from meshwright.scripts.flags import parse
from meshwright.train.run_plan import RunPlan

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
TUTORIAL = DOCS / "tutorial.md"
LONGEST_TUTORIAL_SECONDS = 60
OTHER_COMMANDS = ("pip install ", "sphinx-build ", "pytest")

Example = tuple[str, str | None]


def examples(page: Path) -> list[Example]:
    """The python blocks of a page, each with the output shown below it, if any."""
    pattern = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?"
    found = re.findall(pattern, page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [(code, output or None) for code, output in found]


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def name(value: object) -> str:
    return str(value.relative_to(DOCS)) if isinstance(value, Path) else ""


each_page = pytest.mark.parametrize("page", PAGES, ids=name)


@pytest.mark.parametrize(
    ("page", "line"), [(page, line) for page in PAGES for line in commands(page)], ids=name
)
def test_commands_are_resolved(page: Path, line: str) -> None:
    if line.startswith(OTHER_COMMANDS):
        return
    program, verb, *flags = shlex.split(line)
    assert program == "meshwright" and verb in ("train", "plan", "explain"), name(page)
    config = parse(flags, verb)
    if config.topology == "auto":
        flags += ["--topology", "cpu:8"]
    RunPlan.of(parse(flags, verb))


def matches(printed: str, shown: str) -> bool:
    """Whether output is what a page shows, up to trailing blanks; ``…`` stands for anything."""
    tidy = ["\n".join(line.rstrip() for line in text.splitlines()) for text in (printed, shown)]
    pattern = ".*?".join(re.escape(part) for part in tidy[1].split("…"))
    return re.fullmatch(pattern, tidy[0], re.DOTALL) is not None


def check_outputs(found: list[Example], printed: list[str]) -> None:
    for (code, shown), output in zip(found, printed, strict=True):
        if shown is not None:
            assert matches(output, shown), f"this prints\n{output}\nand not\n{shown}\n{code}"


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("page", [p for p in PAGES if examples(p) and p != TUTORIAL], ids=name)
def test_code_runs_and_prints_what_is_shown(page: Path) -> None:
    names: dict[str, object] = {"__name__": "page"}
    if page.parent.name == "adopt":  # their blocks follow the program that their diff leads to
        if page.stem == "equinox":
            pytest.importorskip("equinox", reason="pip install 'meshwright[adoption]'")
        with contextlib.redirect_stdout(io.StringIO()):
            exec(
                compile(program(diff_of(page), " +"), name(page), "exec", dont_inherit=True), names
            )
    if page.parent.name == "strategies":
        exec("from meshwright.sharding import *", names)
    printed = []
    for code, _ in examples(page):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(code, name(page), "exec", dont_inherit=True), names)
        printed.append(said.getvalue())
    check_outputs(examples(page), printed)


_RUNNER = """
import contextlib, io, json, sys
names, printed = {"__name__": "tutorial"}, []
for code in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "tutorial.md", "exec"), names)
    printed.append(said.getvalue())
print(json.dumps(printed))
"""


def test_the_tutorial_runs_from_top_to_bottom() -> None:
    found = examples(TUTORIAL)
    assert len(found) >= 10
    started, used = time.monotonic(), _cpu_seconds_of_children()
    done = subprocess.run(
        [sys.executable, "-c", _RUNNER],
        input=json.dumps([code for code, _ in found]),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    check_outputs(found, json.loads(done.stdout.splitlines()[-1]))
    # By the clock, or by what it used where others are at work on the same cores.
    took = min(time.monotonic() - started, _cpu_seconds_of_children() - used)
    assert took < LONGEST_TUTORIAL_SECONDS


def _cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def prose(page: Path) -> str:
    """A page without its code, whose brackets are no links and whose comments no headings."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    return re.sub(r"`[^`\n]*`", lambda code: code[0].replace("](", "] ("), text)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and MyST make them; and those that are written out."""
    text = prose(page)
    titles = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    return made | set(re.findall(r"^\(([\w-]+)\)=$", text, flags=re.MULTILINE))


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{name(page)}: {link}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{name(page)}: {link}"


def contents(page: Path) -> set[Path]:
    """The pages that a page's toctrees name."""
    found: set[Path] = set()
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^`{3,}\{toctree\}\n(.*?)^`{3,}", text, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            entry = re.sub(r".*<(.+)>$", r"\1", line.strip())
            if entry and not entry.startswith(":"):
                stem = page.parent / entry
                found |= {
                    *stem.parent.glob(f"{stem.name}.md"),
                    *stem.parent.glob(f"{stem.name}.rst"),
                }
    return {path.resolve() for path in found}


def test_every_page_is_in_the_contents() -> None:
    reached, new = set(), {DOCS / "index.md"}
    while new:
        reached |= new
        new = {child for page in new if page.suffix == ".md" for child in contents(page)} - reached
    pages = {path.resolve() for path in (*PAGES, *DOCS.rglob("*.rst"))}
    assert {path for path in pages if "_build" not in path.parts} == reached
