"""One HTML file that opens anywhere: a skeleton, a style, a script and JSON documents, joined.

A page is named for the three files beside this module that make it: ``NAME.html``, ``NAME.css``
and ``NAME.js``, the latter two put behind ``page.css`` and ``page.js``, which all pages share. The
script draws everything from the documents in the page (``<script type="application/json">``), so
page and document cannot disagree, and other tools can read the document back.

Nothing of a user's program is ever markup. Documents are escaped so that no string can end their
element, scripts set text only (never ``innerHTML``), and a content security policy with the
hashes of our own script and style makes the browser refuse anything else: a leaf called
``</script>`` is a leaf with a strange name. The page asks for nothing, by the same policy.

Rejected: a template engine (a dependency, for two pages), and a chart library (half a megabyte
in each file, and a licence).
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["assemble"]


def assemble(
    name: str,
    *,
    texts: Mapping[str, str],
    documents: Mapping[str, Any],
    scripts: Sequence[str] = (),
) -> str:
    """Join a page to one file.

    Args:
        name: of the page's files, such as ``plan_page``.
        texts: plain text for the skeleton's marks ``<!--key-->``.
        documents: values that JSON can hold, for the marks within script elements.
        scripts: files beside this module that the page's own script stands on.

    Returns:
        The text of an HTML file, to be written as UTF-8.
    """
    style = _asset("page.css") + _asset(f"{name}.css")
    script = "".join(map(_asset, ("page.js", *scripts, f"{name}.js")))
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src {_hash(style)}; script-src {_hash(script)}"
    )
    parts = {"policy": html.escape(policy), "style": style, "script": script}
    parts |= {key: _text(text) for key, text in texts.items()}
    parts |= {key: _embedded(value) for key, value in documents.items()}
    # The skeleton alone is searched for marks: a value may look like one.
    pieces = re.split(r"<!--(\w+)-->", _asset(f"{name}.html"))
    assert sorted(pieces[1::2]) == sorted(parts), f"{name}.html has {pieces[1::2]}"
    pieces[1::2] = [parts[key] for key in pieces[1::2]]
    return "".join(pieces)


@cache
def _asset(file: str) -> str:
    return Path(__file__).with_name(file).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """A content security policy's name for an inline element."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _embedded(value: Any) -> str:
    """JSON that no HTML parser takes for the end of its element or for a comment."""
    text = json.dumps(value, allow_nan=False)  # ASCII only, so lone surrogates stay escapes
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _text(text: str) -> str:
    """Escaped, and without the lone surrogates that UTF-8 cannot hold."""
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))
