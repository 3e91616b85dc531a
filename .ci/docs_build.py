"""Builds the documentation site (`make docs`): docs/ into site/, with warnings as errors, and looks at what came out.

`python .ci/docs_build.py [FOLDER]` needs the extra `docs`. What MkDocs does not ask of the built pages is asked here:
nothing is loaded from another machine, each page says which version it describes, each image has a text, each link
and each anchor leads somewhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import attrs
from docs_site import ROOT, version

LOADS = {  # tag -> the attribute by which it loads something
    "audio": "src", "embed": "src", "iframe": "src", "img": "src", "link": "href", "object": "data", "script": "src",
    "source": "src", "video": "src",
}  # fmt: skip


@attrs.define
class Built:
    """What is asked of one page."""

    loaded: list[str] = attrs.field(factory=list)
    links: list[str] = attrs.field(factory=list)
    anchors: set[str] = attrs.field(factory=set)
    images_without_text: list[str] = attrs.field(factory=list)
    text: str = ""


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.built = Built()

    def handle_starttag(self, tag: str, given: list[tuple[str, str | None]]) -> None:
        attributes = dict(given)
        if tag in LOADS and attributes.get(LOADS[tag]) and attributes.get("rel") not in ("canonical", "next", "prev"):
            self.built.loaded.append(attributes[LOADS[tag]] or "")
        if tag == "img" and not attributes.get("alt"):
            self.built.images_without_text.append(attributes.get("src") or "?")
        if tag == "a" and attributes.get("href"):
            self.built.links.append(attributes["href"] or "")
        self.built.anchors |= {value for name in ("id", "name") if (value := attributes.get(name))}

    def handle_data(self, data: str) -> None:
        self.built.text += data


def read(html: str) -> Built:
    reader = _Reader()
    reader.feed(html)
    return reader.built


def is_elsewhere(address: str) -> bool:
    """Whether an address leads to another machine."""
    return address.startswith(("http:", "https:", "//", "mailto:"))


def faults(site: Path, about: str) -> list[str]:
    """What is wrong with the pages of a built site that describe the version `about`."""
    pages = {path: read(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site)
        found += [f"{name} loads {address}" for address in page.loaded if is_elsewhere(address)]
        found += [f"{name} shows {image} without a text" for image in page.images_without_text]
        if f"DynaTree {about}" not in page.text:
            found.append(f"{name} does not say that it describes DynaTree {about}")
        if name.name == "404.html":  # served for any address, so its links begin at the root of the site
            continue
        for link in page.links:
            if is_elsewhere(link):
                continue
            address, _, anchor = link.partition("#")
            target = (path.parent / unquote(address)).resolve() if address else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                found.append(f"{name} links to {link}, which is not there")
            elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
                found.append(f"{name} links to {link}, and there is no such heading")
    return found


def build(site: Path) -> None:
    """Build the site.

    Raises:
        subprocess.CalledProcessError: MkDocs had an error or a warning, which it has printed.
    """
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # an advertisement of another program
    subprocess.run(command, check=True, cwd=ROOT, env=environment)


def main(arguments: list[str]) -> int | str:
    """Build and check.

    Returns:
        The exit code, or what is wrong.
    """
    site = Path(*arguments[:1] or ["site"]).absolute()
    start = time.monotonic()
    try:
        build(site)
    except subprocess.CalledProcessError as error:
        return f"the site must be built without warnings, but mkdocs ended with {error.returncode}; it said why above"
    wrong = faults(site, version())
    if wrong:
        return "\n".join(["the built pages must be whole:", *wrong])
    num_pages = sum(1 for _ in site.rglob("*.html"))
    print(f"{num_pages} pages of DynaTree {version()} are in {site.name}/, built in {time.monotonic() - start:.0f} s")
    print(f"read them: {Path(sys.executable).name} -m http.server -b 127.0.0.1 -d {site.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
