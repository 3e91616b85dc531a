"""Everything public is described: names, commands, options, extras, environment variables; and versions agree."""

from __future__ import annotations

import importlib
import re
import tomllib

import click
import docs_reference
import notebook
import pytest
import release
from test_docs import DOCS, PAGES, ROOT, code_words, expected_outputs, first_words, prose, snippets, table

import dynatree_core
from dynatree_core import errors
from dynatree_core.cli.group import _dynatree

PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "module", ["dynatree_core", "dynatree_core.errors", "dynatree_core.testing", "dynatree_core.trace"]
)
def test_every_public_name_stands_in_the_reference_once(module):
    public = set(importlib.import_module(module).__all__)
    if module == "dynatree_core.errors":
        public = {name for name in public if isinstance(getattr(errors, name), type)} - {"DynaTreeError", "InputError"}
    listed = docs_reference.referenced_names((DOCS / "python-reference.md").read_text(encoding="utf-8"), module)
    assert len(listed) == len(set(listed))
    assert set(listed) == public


def test_every_public_function_and_class_has_a_docstring():
    found = {name: getattr(dynatree_core, name) for name in dynatree_core.__all__}
    assert [name for name, value in found.items() if callable(value) and not (value.__doc__ or "").strip()] == []


COMMANDS = {context.command_path: context for context in docs_reference.all_commands(_dynatree)}


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_and_option_says_what_it_does(path):
    command = COMMANDS[path].command
    assert (command.help or "").strip()
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert [option.opts for option in options if not option.hidden and not (option.help or "").strip()] == []


def test_the_command_reference_has_every_option():
    section = docs_reference.section(COMMANDS["dynatree generate"])
    usage = "```text\ndynatree generate [OPTIONS] PROMPT|-\n```"
    assert section.startswith(f"### dynatree generate\n\n{usage}\n\nAnswer PROMPT, or what stands")
    assert 'Examples:\n\n```text\ndynatree generate "Why is' in section
    for parameter in COMMANDS["dynatree generate"].command.params:
        for name in parameter.opts if isinstance(parameter, click.Option) else ():
            assert re.search(rf"^\| `[^`]*{name}\b", section, re.M), name


def test_prose_in_a_table_stays_prose():
    assert docs_reference._escaped("<b> a|b *c* `d_e`") == "&#60;b&#62; a\\|b &#42;c&#42; `d_e`"


def test_every_extra_is_described():
    extras = tomllib.loads(PROJECT)["project"]["optional-dependencies"]
    assert sorted(first_words(table(DOCS / "environment.md", "extra", "for"))) == sorted(extras)


def environment_variables() -> set[str]:
    """The variables of ours, and of Triton, that any program of the repository reads or sets."""
    from dynatree_bench.data.workloads import KNOWN, local_variable

    files = [file for name in ("dynatree_core", "dynatree_bench", "dynatree_policies", ".ci", "tests")
             for file in (ROOT / name).rglob("*.py")]  # fmt: skip
    texts = [file.read_text(encoding="utf-8") for file in [*files, ROOT / "Makefile"]]
    named = {
        name for text in texts for name in re.findall(r"\b(?:_?DYNATREE_[A-Z0-9_]*[A-Z0-9]|TRITON_INTERPRET)\b", text)
    }
    named = {name for name in named if not name.startswith(("DYNATREE_BENCH", "DYNATREE_SERVE"))}
    return named | {local_variable(name) for name in KNOWN} | {"DYNATREE_SERVE_*"}  # docs/serve.md lists them


def test_every_environment_variable_is_described():
    rows = table(DOCS / "environment.md", "variable", "meaning")
    listed = [name for row in rows for name in code_words(row["variable"])]
    assert sorted(listed) == sorted(environment_variables())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_images_have_texts(page):
    assert re.findall(r"!\[\s*\]\([^)]*\)", prose(page)) == []


# notebooks


@pytest.mark.parametrize("page", sorted(notebook.FOLDER.glob("*.md")), ids=lambda page: page.name)
def test_a_notebook_is_its_page(page):
    text = page.read_text(encoding="utf-8")
    assert page.with_suffix(".ipynb").read_text(encoding="utf-8") == notebook.rendered(text), "python .ci/notebook.py"
    cells = notebook.notebook(text)["cells"]
    code = ["".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code"]
    assert code == [block.text for block in snippets(page)]
    shown = [cell["outputs"][0]["text"] for cell in cells if cell.get("outputs")]
    assert ["".join(lines) + "\n" for lines in shown] == [block.text for block in expected_outputs(page).values()]
    assert len({cell["id"] for cell in cells}) == len(cells)


# the release


def test_versions_agree():
    citation, changes = (ROOT / "CITATION.cff").read_text("utf-8"), (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert release.disagreements(PROJECT, citation, changes) == []
    version = release.version_of(PROJECT)
    later = PROJECT.replace('version = "', 'version = "9')
    assert release.disagreements(later, citation, changes) == [
        f"CITATION.cff must say 'version: 9{version}', got {version}",
        f"CHANGELOG.md must have a section '## 9{version}'",
    ]
