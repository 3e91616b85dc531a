"""`dynatree new-policy`, `new-drafter`: what they write installs, passes its own tests, composes; what they refuse."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packages import ROOT, in_subprocess, install, run_tests_of

from dynatree_core.cli.group import main
from dynatree_core.cli.scaffold import DRAFTER, POLICY, TEMPLATES, Kind, package_files, write_package
from dynatree_core.errors import InputError

KINDS = pytest.mark.parametrize("kind", [POLICY, DRAFTER], ids=lambda kind: kind.word)
NAMES = ["x", "prob_mass", "width_by_nucleus_of_the_draft"]  # one word, several, and lines that grow long


def dynatree(*args: object) -> object:
    """Run the command in this process and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    return ended.value.code


@KINDS
@pytest.mark.parametrize(
    ("given", "name", "class_name", "folder"),
    [
        ("prob-mass", "prob_mass", "ProbMass", "dynatree-prob-mass"),
        ("prob_mass", "prob_mass", "ProbMass", "dynatree-prob-mass"),
        ("top2", "top2", "Top2", "dynatree-top2"),
        ("my_policy", "my_policy", "MyPolicy", "dynatree-my-policy"),
        ("my_drafter", "my_drafter", "MyDrafter", "dynatree-my-drafter"),
        ("my_policy_my_drafter", "my_policy_my_drafter", "MyPolicyMyDrafter", "dynatree-my-policy-my-drafter"),
    ],
)
def test_names(kind, given, name, class_name, folder, tmp_path):
    written = write_package(kind, given, tmp_path)
    assert written == tmp_path / folder
    assert f'{name} = "dynatree_{name}:{class_name}"' in (written / "pyproject.toml").read_text("utf-8")
    assert re.search(rf"^class {class_name}\b", (written / f"dynatree_{name}.py").read_text("utf-8"), re.M)
    assert sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()) == sorted(
        ["pyproject.toml", "README.md", f"dynatree_{name}.py", f"tests/test_{name}.py"]
    )


@KINDS
def test_nothing_is_left_of_the_template(kind):
    """In no spelling, and nothing of the other kind's."""
    for file, text in package_files(kind, "prob_mass").items():
        assert not re.search("my[-_ ]?(policy|drafter)", f"{file}\n{text}", re.I), file
        other = {"policy": "new-drafter", "drafter": "new-policy"}[kind.word]
        assert other not in text


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (POLICY, "linear", "an installed policy is called 'linear'"),
        (POLICY, "dynamic-depth", "an installed policy is called 'dynamic_depth'"),
        (POLICY, "phase1", "an installed preset is called 'phase1'"),
        (DRAFTER, "prompt-lookup", "an installed drafter is called 'prompt_lookup'"),
        *(
            (kind, name, "lower-case words")
            for kind in (POLICY, DRAFTER)
            for name in ("", "Wide", "2wide", "wide_", "a__b", "a b", "../a", "größe", "if")
        ),
        (POLICY, "core", "module would be 'dynatree_core'"),
        (DRAFTER, "bench", "module would be 'dynatree_bench'"),
        (POLICY, "frontier", "class would be 'Frontier'"),
        (POLICY, "none", "class would be 'None'"),
        (DRAFTER, "drafter", "class would be 'Drafter'"),
        (DRAFTER, "draft", "class would be 'DraftState'"),
    ],
)
def test_a_name_that_cannot_be_used(kind, name, words, tmp_path):
    with pytest.raises(InputError, match=words):
        write_package(kind, name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "dynatree-wide").mkdir()
    with pytest.raises(InputError, match="is there already"):
        write_package(POLICY, "wide", tmp_path)
    assert list((tmp_path / "dynatree-wide").iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    with pytest.raises(InputError, match="cannot be made"):
        write_package(POLICY, "wide", tmp_path / "absent")


@KINDS
def test_the_command_says_what_comes_next(kind, tmp_path, capsys):
    assert dynatree(f"new-{kind.word}", "prob-mass", "--dir", tmp_path) == 0
    said = capsys.readouterr().out
    assert str(tmp_path / "dynatree-prob-mass") in said
    there, *commands = re.findall(r"^  (.*)$", said, re.M)
    assert there == f"cd {tmp_path / 'dynatree-prob-mass'}"
    assert commands == readme_commands(kind, "prob_mass")


def test_the_command_in_the_folder_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dynatree("new-policy", "wide") == 0
    assert (tmp_path / "dynatree-wide" / "README.md").exists()


@pytest.mark.parametrize("args", [["phase1"], ["wide"], ["narrow", "--dir", "absent"], []])
def test_mistakes_are_one_line_and_exit_code_2(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dynatree-wide").mkdir()
    assert dynatree("new-policy", *args) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1


@KINDS
def test_every_template_is_written(kind):
    files = {str(path.relative_to(kind.folder)) for path in kind.folder.rglob("*") if path.is_file()}
    assert {file for file in files if "__pycache__" not in file} == set(package_files(kind, f"my_{kind.word}"))


def test_every_template_belongs_to_a_command():
    assert {folder.name for folder in TEMPLATES.iterdir()} == {POLICY.folder.name, DRAFTER.folder.name}


def readme_commands(kind: Kind, name: str) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", package_files(kind, name)["README.md"], re.M | re.S)
    return [line.partition("  #")[0].rstrip() for line in "".join(blocks).splitlines()]


USE_IT = """
import sys
from pathlib import Path

from dynatree_core.testing.models import greedy, perturbed, tiny_model

from dynatree_core import build_stack, generate
from dynatree_core.plugins.registry import POLICIES, load_plugin, plugin_parameters, plugin_table

site, readme = map(Path, sys.argv[1:])
[entry] = plugin_table(POLICIES)["prob_mass"]
assert (entry.dist.name, entry.value) == ("dynatree-prob-mass", "dynatree_prob_mass:ProbMass"), entry
policy = load_plugin(POLICIES, "prob_mass")
assert Path(sys.modules[policy.__module__].__file__).is_relative_to(site)
for name, default in plugin_parameters(policy).items():
    assert f"| `{name}` | {default!r} |" in readme.read_text("utf-8"), name

target, drafter, prompt = tiny_model("llama"), perturbed("llama"), [3, 1, 4, 1, 5, 9, 2, 6]
sizes = {}
for text in ("prob_mass(mass=0.3)+dynamic_depth", "confidence+prob_mass(mass=0.95)+dynamic_depth+history"):
    result = generate(target, drafter, prompt, policy=text, max_new_tokens=40)
    assert result.token_ids == greedy(target, prompt, 40)
    assert result.report.policy == text
    sizes[text] = result.report.num_drafted_nodes / result.report.num_iterations
narrow, wide = sizes.values()
assert narrow < wide, sizes
"""


DRAFT_WITH_IT = """
import sys
from pathlib import Path

from dynatree_core.testing.models import greedy, tiny_model

from dynatree_core import generate
from dynatree_core.plugins.registry import DRAFTERS, load_plugin, plugin_parameters, plugin_table

site, readme = map(Path, sys.argv[1:])
[entry] = plugin_table(DRAFTERS)["prob_mass"]
assert (entry.dist.name, entry.value) == ("dynatree-prob-mass", "dynatree_prob_mass:ProbMass"), entry
drafter = load_plugin(DRAFTERS, "prob_mass")
assert Path(sys.modules[drafter.__module__].__file__).is_relative_to(site)
for name, default in plugin_parameters(drafter).items():
    assert f"| `{name}` | {default!r} |" in readme.read_text("utf-8"), name

target, prompt = tiny_model("llama"), [3, 1, 4, 1, 5, 9, 2, 6, 3, 1]
for text in ("prob_mass", "prob_mass(unseen=3)", "prompt_lookup+prob_mass"):
    result = generate(target, text, prompt, policy="fixed(depth=3,tau=0.0)", max_new_tokens=40)
    assert result.token_ids == greedy(target, prompt, 40)
    assert result.report.num_drafted_nodes > 0
"""

PROGRAMS = {POLICY: USE_IT, DRAFTER: DRAFT_WITH_IT}
LISTS = {POLICY: "policies", DRAFTER: "drafters"}


@pytest.fixture(scope="module", params=[POLICY, DRAFTER], ids=lambda kind: kind.word)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(scope="module")
def package(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a package as it was written."""
    return write_package(kind, "prob_mass", tmp_path_factory.mktemp("written"))


@pytest.fixture(scope="module")
def site(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that it was installed into."""
    return install(package, tmp_path_factory.mktemp("installed"))


@pytest.mark.slow
def test_it_is_found_composed_and_lossless(kind, site, package):
    in_subprocess([sys.executable, "-c", PROGRAMS[kind], str(site), str(package / "README.md")], site)


@pytest.mark.slow
def test_it_is_listed(kind, site, tmp_path, monkeypatch):
    monkeypatch.setenv("DYNATREE_CACHE", str(tmp_path))
    listed = in_subprocess([sys.executable, "-m", "dynatree_core", LISTS[kind]], site)
    assert "prob_mass" in listed
    assert "dynatree-prob-mass" in listed


@pytest.mark.slow
def test_its_own_tests_pass(site):
    run_tests_of(site)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_is_clean_under_this_projects_linter(kind, name, tmp_path):
    folder, settings = write_package(kind, name, tmp_path), str(ROOT / "pyproject.toml")
    for command in (["check"], ["format", "--check"]):
        in_subprocess([sys.executable, "-m", "ruff", *command, "--no-cache", "--config", settings, "."], cwd=folder)


@pytest.mark.slow
def test_they_are_clean_under_this_projects_type_checker(tmp_path):
    """One run for all names: the first reads the types of torch, which takes half a minute; two at once would both."""
    names = [(kind, f"{kind.word}-{name}") for kind in (POLICY, DRAFTER) for name in NAMES]
    folders = [write_package(kind, name, tmp_path) for kind, name in names]
    files = [str(path) for folder in folders for path in sorted(folder.rglob("*.py"))]
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    assert f"no issues found in {len(files)} source files" in in_subprocess([*command, *files], *folders)


@pytest.mark.slow
def test_the_change_that_the_tutorial_makes_passes_all_tests(tmp_path):
    """Its new rule in the place of the generated one, and its new test behind the generated ones."""
    snippets = re.findall(r"\n```python\n(.*?)^```", (ROOT / "docs" / "tutorial.md").read_text("utf-8"), re.M | re.S)
    [rule] = [text for text in snippets if "reached" in text]
    [test] = [text for text in snippets if "def children" in text]
    package = write_package(POLICY, "nucleus", tmp_path)
    module, tests = package / "dynatree_nucleus.py", package / "tests" / "test_nucleus.py"
    head = module.read_text("utf-8").partition("@attrs.define")[0]
    policy = rule[rule.index("@attrs.define") : rule.index("\n\n\nmeasure(")]
    module.write_text(f"{head}{policy}\n", "utf-8")
    tests.write_text(f"{tests.read_text('utf-8')}\n\n{test}", "utf-8")
    run_tests_of(install(package, tmp_path))
