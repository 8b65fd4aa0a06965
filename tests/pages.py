"""What tests of all HTML pages share: a parser that sees their outline, and a string of attacks."""

from __future__ import annotations

from html.parser import HTMLParser

__all__ = ["HOSTILE", "Outline"]

HOSTILE = (
    "</script ></script x='\t<script>alert(1)</script><img src=x onerror=alert(2)>\u2028"
    "<!--\ud800 &amp; '\""
)
"""Ends every element, starts others, and cannot be encoded: what a user's string may hold."""


class Outline(HTMLParser):
    """Elements in order, the text of scripts, and whether everything that opens closes."""

    VOID = ("meta", "input", "br", "img", "link", "hr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: dict[str, str] = {}
        self.addresses: list[str] = []
        self._id = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self._id = found.get("id") or tag
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "action")]
        assert not [key for key in found if key.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[self._id] = self.texts.get(self._id, "") + data
