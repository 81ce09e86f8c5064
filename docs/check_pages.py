"""Checks built pages: every link inside them leads somewhere, and nothing comes from another host.

    python docs/check_pages.py docs/build

Links that a reader follows to other sites are left alone; only what a browser would load by itself
(styles, scripts, fonts, pictures, frames) has to lie beside the pages.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FOREIGN_IN_CSS = re.compile(r"""(?:@import\s+|url\(\s*)["']?(?:https?:)?//[^\s"')]+""")
LOADED = {"script": "src", "img": "src", "source": "src", "iframe": "src", "link": "href"}


class Page(HTMLParser):
    """What one page loads, where it links to, and the anchors it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if values.get(LOADED.get(tag, "")):
            self.loads.append(values[LOADED[tag]])


def check_pages(folder: Path) -> list[str]:
    """One line per problem; empty when all is well."""
    pages = {path: Page(path) for path in sorted(folder.rglob("*.html"))}
    if not pages:
        return [f"{folder}: expected built pages, found none"]
    problems = []
    for path, page in pages.items():
        name = path.relative_to(folder)
        foreign = [address for address in page.loads if urlsplit(address).netloc]
        problems += [f"{name}: loads {address} from another host" for address in foreign]
        near = [address for address in page.loads if address not in foreign]
        for address in [*near, *page.links]:
            if not leads_somewhere(address, path, pages):
                problems.append(f"{name}: {address} leads nowhere")
    for path in sorted(folder.rglob("*.css")):
        found = FOREIGN_IN_CSS.findall(path.read_text(encoding="utf-8"))
        problems += [f"{path.relative_to(folder)}: {text} is another host's" for text in found]
    return problems


def leads_somewhere(address: str, path: Path, pages: dict[Path, Page]) -> bool:
    """Whether a link of `path` has a target; links to other sites count as having one."""
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return True
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not target.is_file():
        return False
    return not parts.fragment or target not in pages or parts.fragment in pages[target].anchors


def main() -> int:
    problems = check_pages(Path(sys.argv[1]).resolve())
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
