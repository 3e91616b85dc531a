"""The documentation site: it builds without a warning, and what came out is whole."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import docs_reference
import pytest
from test_docs import DOCS, PAGES, ROOT

# without the extra docs only what needs it is left out
site = pytest.importorskip("docs_site", reason="the extra docs is not installed", exc_type=ModuleNotFoundError)
build = importlib.import_module("docs_build")


# what is built


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_is_whole(tmp_path):
    done = subprocess.run(
        [sys.executable, ".ci/docs_build.py", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "site").glob("*.html")}
    assert {page.stem for page in PAGES if page.parent == DOCS} <= pages.keys()
    assert '<h3 id="dynatree-generate">' in pages["command-reference"]
    assert 'id="dynatree_core.generate"' in pages["python-reference"]
    assert "temperature" in pages["python-reference"]  # from the docstring of generate
    assert "<h2" in pages["changelog"]


def test_what_is_wrong_with_a_page_is_said(tmp_path):
    (tmp_path / "other.html").write_text('<h1 id="there">DynaTree 1.2</h1>')
    (tmp_path / "index.html").write_text(
        '<script src="https://example.com/a.js"></script><link rel="stylesheet" href="//example.com/a.css">'
        '<img src="a.png"><a href="missing.html">1</a><a href="other.html#not-there">2</a><a href="#nor-here">3</a>'
        '<a href="other.html#there">4</a><a href="https://example.com">5</a>'
    )
    assert build.faults(tmp_path, "1.2") == [
        "index.html loads https://example.com/a.js",
        "index.html loads //example.com/a.css",
        "index.html shows a.png without a text",
        "index.html does not say that it describes DynaTree 1.2",
        "index.html links to missing.html, which is not there",
        "index.html links to other.html#not-there, and there is no such heading",
        "index.html links to #nor-here, and there is no such heading",
    ]


def test_the_navigation_names_pages_that_are_there_and_others_come_behind_the_guides():
    listed = re.findall(r"^ +- ([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    pages = site.own_pages()
    assert len(listed) == len(set(listed))
    assert set(listed) <= {*pages, *site.PAGES.values()}
    without = [{"Start": [page for page in listed if page not in ("hooks.md", "chat.md")]}, {"Guides": ["hooks.md"]}]
    assert site.pages_of(site.with_all_pages(without)[1]) == ["hooks.md", *sorted({*pages} - {*listed} | {"chat.md"})]


# pages for GitHub and for the site


@pytest.mark.parametrize(
    ("origin", "here", "target", "expected"),
    [
        ("docs/hooks.md", "hooks.md", "tutorial.md#a-test", "tutorial.md#a-test"),
        ("docs/hooks.md", "hooks.md", "#here", "#here"),
        ("docs/hooks.md", "hooks.md", "../README.md", "readme.md"),
        ("docs/hooks.md", "hooks.md", "../dynatree_core/report.py", "source/dynatree_core/report.py.md"),
        ("docs/results/suite.md", "results/suite.md", "../../LICENSE", "../license.md"),
        ("README.md", "readme.md", "docs/hooks.md#x", "hooks.md#x"),
        ("README.md", "readme.md", "CHANGELOG.md", "changelog.md"),
        ("README.md", "readme.md", "https://example.com/a", "https://example.com/a"),
    ],
)
def test_links_lead_to_the_same_place_in_the_site(origin, here, target, expected):
    assert site.site_target(target, origin, here) == expected


def test_a_link_to_a_folder_is_refused():
    with pytest.raises(Exception, match=r"a link must lead to a file, got the folder \.\./tests"):
        site.site_target("../tests", "docs/hooks.md", "hooks.md")


def test_links_that_show_a_files_name_show_the_pages_title():
    text = "[hooks.md](hooks.md) and [a hook](hooks.md), ![alt](a.svg)\n\n```python\nx = [1](hooks.md)\n```\n"
    shown = site.with_site_links(text, "docs/testing.md", "testing.md")
    assert shown == text.replace("[hooks.md]", "[Hooks: writing a policy]")


def test_comments_become_titles():
    text = "<!-- output -->\n```text\n1\n```\n\n<!-- real-model -->\n```python\n2\n```\n"
    assert site.with_titles(text) == '```text title="Output"\n1\n```\n\n```python\n2\n```\n'


def test_a_list_behind_a_paragraph_is_a_list():
    assert site.with_lists_as_on_github("a\nb:\n- c\n- d\n\n- e\n- f\n") == "a\nb:\n\n- c\n- d\n\n- e\n- f\n"


def test_bars_in_the_code_of_a_table_are_bars():
    text = "| `a\\|b` | c \\| d |\n\n```text\n| `a\\|b` |\n```\n"
    assert site.with_bars_in_code(text) == text.replace("`a\\|b` | c", "`a|b` | c")


def test_names_become_references():
    text = "## A\n\n<!-- python: dynatree_core -->\n`generate`, `stream`,\n`run`.\n\nMore.\n"
    directives = "::: dynatree_core.generate\n\n::: dynatree_core.stream\n\n::: dynatree_core.run\n\n"
    assert docs_reference.expanded(text) == f"## A\n\n{directives}\nMore.\n"
