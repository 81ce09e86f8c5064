"""Arguments of `mil.heatmap` on the benchmark of these tests, and the links of its pages."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SMALL = ["device=cpu", "training.epochs=2", "training.min_epochs=1"]


def arguments(bench: Path, name: str = "heat", *more: str) -> list[str]:
    root = bench.parent
    return [
        f"run={bench}",
        f"output={root}/{name}",
        f"slides={root}/cohort/slides",
        "device=cpu",
        *more,
    ]


class Links(HTMLParser):
    """What a page leads to; open tags have to be closed in order."""

    VOID = frozenset({"img", "meta", "input", "rect", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.found += [
            value
            for name, value in attrs
            if name in ("src", "href") and not value.startswith(("data:", "#"))
        ]
        assert tag not in {"link", "iframe", "object", "embed"}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def links(page: Path) -> Links:
    """The page, every one of its links leading to a file."""
    parsed = Links()
    parsed.feed(page.read_text())
    assert parsed.open == []
    for link in parsed.found:
        assert not urlsplit(link).scheme and (page.parent / unquote(link)).is_file(), link
    return parsed
