"""Pictures inside the pages: each image of docs/pictures becomes the SVG that `draw` draws now.

An image element could not follow the page's own switch between light and dark, and a file could
be older than the code. Where Markdown is read without Sphinx, the files serve.
"""

from __future__ import annotations

from pathlib import PurePosixPath

import draw
from docutils import nodes
from sphinx.application import Sphinx

__all__ = ["setup"]

_FOLDER = "pictures"


def _inline(app: Sphinx, tree: nodes.document, page: str) -> None:
    if app.builder.format != "html":
        return
    for image in list(tree.findall(nodes.image)):
        path = PurePosixPath(image["uri"])
        if path.parent.name != _FOLDER:
            continue
        if path.stem not in draw.PICTURES:
            raise ValueError(f"{page}: there is no picture `{path.stem}`: {list(draw.PICTURES)}")
        svg = draw.picture(path.stem, about=image.get("alt", ""))
        html = f'<div class="mw-picture">{svg}</div>'
        image.replace_self(nodes.raw(html, html, format="html"))


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("doctree-resolved", _inline)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
