"""Checks of pages that have to be whole in themselves."""

from __future__ import annotations

from html.parser import HTMLParser


class PageChecker(HTMLParser):
    """Open tags have to be closed in order; collects the sources of pictures by what they show."""

    VOID = frozenset({"img", "meta", "br", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: dict[str, list[str]] = {}

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "img":
            self.images.setdefault(given["alt"], []).append(given["src"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
