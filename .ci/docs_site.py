"""Hooks of MkDocs (`hooks:` in mkdocs.yml): what the pages of docs/ need to become a site, and GitHub does not.

The pages are written for both: they are readable on GitHub as they stand, with links to files outside docs/, and with
HTML comments before the blocks that a test runs or compares. Here

- files outside docs/ become pages: README.md and its like as they are, code that is linked as a listing;
- the comments become titles of the blocks;
- `<!-- commands -->` becomes the reference of all commands, `<!-- python: MODULE -->` before a line of names that of
  these names;
- the version of pyproject.toml stands on every page.
"""

from __future__ import annotations

import posixpath
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from markdown import Markdown
from markdown.extensions import Extension
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))  # MkDocs runs this file as a file, not as a module

from docs_reference import expanded

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {  # files outside docs/ that are pages of the site -> where they stand in it
    "README.md": "readme.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "LICENSE": "license.md",
    "CITATION.cff": "citation.md",
}
SOURCES = "source"  # folder of the site for listings of code

FENCE = re.compile(r"^ *```.*?^ *```$", re.M | re.S)
LINK = re.compile(r"(?P<text>!?\[[^\[\]]*\])\((?P<target>[^)\s]+)\)")
MARKER = re.compile(r"^<!-- (?P<marker>[^\n]+) -->\n+```(?P<language>\w+)$", re.M)
ROW = re.compile(r"^\|.*$", re.M)
CODE = re.compile(r"`[^`\n]+`")
ITEM = re.compile(r"(?:[-*]|\d+\.) ")
LANGUAGES = {".py": "python", ".pyi": "python", ".toml": "toml", ".json": "json", ".csv": "text", ".cff": "yaml"}


def version() -> str:
    """The version that the pages describe."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])


# hooks


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.site_name = f"DynaTree {version()}"
    config.copyright = f"These pages describe DynaTree {version()}. Licence: Apache-2.0."
    config.nav = with_all_pages(config.nav or [])
    config.markdown_extensions.append(_ListsAsOnGitHub())  # type: ignore[arg-type]  # instances are as good as names
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=_page_of(ROOT / name)))
    for path in sorted(linked_sources(files)):
        files.append(File.generated(config, f"{SOURCES}/{path}.md", content=listing(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    origin = next((name for name, uri in PAGES.items() if uri == here), f"docs/{here}")
    if not here.startswith(f"{SOURCES}/"):
        markdown = with_site_links(markdown, origin, here)
    return with_bars_in_code(expanded(with_titles(with_lists_as_on_github(markdown))))


class _ListsAsOnGitHub(Extension):
    """Nested lists and paragraphs of lists are indented by two characters, as on GitHub, where Markdown wants four."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.tab_length = 2


def own_pages() -> list[str]:
    """The pages of docs/, but for those of the example packages."""
    patterns = ("*.md", "notebooks/*.md", "results/*.md")
    return [str(path.relative_to(DOCS)) for pattern in patterns for path in DOCS.glob(pattern)]


def pages_of(nav: object) -> list[str]:
    """The pages that a navigation names, in its order."""
    parts = nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else []
    return [nav] if isinstance(nav, str) else [page for part in parts for page in pages_of(part)]


def with_all_pages(nav: list[dict[str, list[str]]]) -> list[dict[str, list[str]]]:
    """The navigation with the pages that it does not name, behind the guides."""
    known = set(pages_of(nav))
    others = sorted(set(own_pages()) - known)
    return [{title: [*pages, *others] if title == "Guides" else pages for title, pages in part.items()} for part in nav]


# links


def outside_fences(markdown: str) -> Iterator[tuple[bool, str]]:
    """The text in parts: (whether it is prose, the part)."""
    last = 0
    for fence in FENCE.finditer(markdown):
        yield True, markdown[last : fence.start()]
        yield False, fence[0]
        last = fence.end()
    yield True, markdown[last:]


def is_outside(target: str) -> bool:
    return target.startswith(("http://", "https://", "mailto:"))


def linked_path(target: str, origin: str) -> str:
    """The file that a link of `origin` names; both are paths from the root of the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), target.partition("#")[0]))


def site_target(target: str, origin: str, here: str) -> str:
    """Where a link of the page `here`, which is made from the file `origin`, leads in the site."""
    if is_outside(target) or target.startswith("#"):
        return target
    path, _, anchor = linked_path(target, origin), *target.partition("#")[1:]
    if path == "docs" or (ROOT / path).is_dir():
        raise PluginError(f"{origin}: a link must lead to a file, got the folder {target}")
    if path in PAGES:
        uri = PAGES[path]
    elif path.startswith("docs/"):
        uri = path.removeprefix("docs/")
    else:
        uri = f"{SOURCES}/{path}.md"
    relative = posixpath.relpath(uri, posixpath.dirname(here) or ".")
    return f"{relative}#{anchor}" if anchor else relative


def page_title(path: str) -> str:
    """The first heading of a page, to name it by where the text of a link is its file's name."""
    if path in ("LICENSE", "CITATION.cff"):
        return Path(path).stem.capitalize()
    return next(line for line in (ROOT / path).read_text(encoding="utf-8").splitlines() if line[:2] == "# ")[2:]


def with_site_links(markdown: str, origin: str, here: str) -> str:
    def rewritten(found: re.Match[str]) -> str:
        text, path = found["text"], linked_path(found["target"], origin)
        if (
            text.endswith(".md]")
            and path.endswith(".md")
            and posixpath.basename(path) == posixpath.basename(text[1:-1])
        ):
            text = f"[{page_title(path)}]"
        return f"{text}({site_target(found['target'], origin, here)})"

    return "".join(LINK.sub(rewritten, part) if prose else part for prose, part in outside_fences(markdown))


def linked_sources(files: Files) -> set[str]:
    """The files outside docs/ that any page links, but for those that are pages themselves."""
    found = set()
    pages = {f"docs/{file.src_uri}": Path(file.abs_src_path or "") for file in files.documentation_pages()}
    pages = {name: path for name, path in pages.items() if path.is_file()}  # what is generated has no file
    for origin, path in {**pages, **{name: ROOT / name for name in PAGES}}.items():
        if origin == "LICENSE" or origin.endswith(".cff"):
            continue
        for prose, part in outside_fences(path.read_text(encoding="utf-8")):
            targets = [link["target"] for link in LINK.finditer(part)] if prose else []
            paths = [linked_path(t, origin) for t in targets if not is_outside(t) and not t.startswith("#")]
            found |= {path for path in paths if not path.startswith("docs/") and path not in PAGES}
    return found


def with_lists_as_on_github(markdown: str) -> str:
    """A blank line where a list begins right behind a paragraph, which is a list on GitHub and none to Markdown."""
    return "".join(
        "\n\n".join(_list_apart(block) for block in part.split("\n\n")) if prose else part
        for prose, part in outside_fences(markdown)
    )


def _list_apart(block: str) -> str:
    lines = block.split("\n")
    if ITEM.match(lines[0].lstrip()) or lines[0].startswith(("|", "#")):
        return block
    begin = next((number for number, line in enumerate(lines) if number and ITEM.match(line)), None)
    return block if begin is None else "\n".join([*lines[:begin], "", *lines[begin:]])


def with_bars_in_code(markdown: str) -> str:
    """The code in tables without the backslashes that GitHub wants before a bar, and that would be shown here."""
    return "".join(
        ROW.sub(lambda row: CODE.sub(lambda code: code[0].replace("\\|", "|"), row[0]), part) if prose else part
        for prose, part in outside_fences(markdown)
    )


# what is generated


def listing(path: str) -> str:
    """A page that shows a file of the repository; Markdown is shown as what it says."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return LINK.sub(lambda link: link[0] if is_outside(link["target"]) else link["text"][1:-1], text)
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)  # longer than any in it
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"# {posixpath.basename(path)}\n\n`{path}`\n\n{fence}{language}\n{text}{fence}\n"


def _page_of(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.name == "LICENSE":
        return f"# Licence\n\n```text\n{text}```\n"
    if path.name == "CITATION.cff":
        return f"# How to cite\n\nThe file `CITATION.cff`, which GitHub and Zenodo read:\n\n```yaml\n{text}```\n"
    return text


def with_titles(markdown: str) -> str:
    """The comments before blocks as the blocks' titles; those that say how a test runs them are left out."""

    def titled(found: re.Match[str]) -> str:
        kind, _, rest = found["marker"].partition(" ")
        match kind:
            case "source:":
                title = rest
            case "file:":
                title = rest
            case "generated:":
                title = " ".join(rest.split()[1:]) or "files"
            case "output":
                title = "Output"
            case _:
                title = ""
        return f'```{found["language"]} title="{title}"' if title else f"```{found['language']}"

    return MARKER.sub(titled, markdown)
