"""Packages as they are found: one that is broken costs itself only, and one that is odd works."""

from __future__ import annotations

import functools
import inspect
import json
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dynatree_core import Drafter, DraftPlan, DraftState, build_stack, generate, hookimpl
from dynatree_core.cli.group import main
from dynatree_core.errors import DrafterError, ParameterError, PluginConflictError, PluginLoadError, PolicyError
from dynatree_core.plugins import distributions, foreign
from dynatree_core.plugins.distributions import DistributionWarning, entry_points
from dynatree_core.plugins.registry import (
    POLICIES,
    load_plugin,
    plugin_parameters,
    plugin_table,
)
from dynatree_core.policy.registration import implemented_hooks
from dynatree_core.testing.models import tiny_model

ROOT = Path(__file__).parents[1]

SOUND = """
from dynatree_core import hookimpl

class P:
    "A sound policy."

    def __init__(self, width=2):
        self.width = width

    @hookimpl
    def branch_factor(self, frontier):
        return self.width
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Called with a name and code: a package of that name is installed. Returns the folder of its metadata."""
    modules = []

    def install(
        name: str, code: str = SOUND, *, metadata: str | bytes | None = "", entries: str | bytes | None = None
    ) -> Path:
        site = tmp_path / name
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"module_of_{name}.py").write_text(code)
        modules.append(f"module_of_{name}")
        for file, text in (
            ("METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n" if metadata == "" else metadata),
            ("entry_points.txt", entries or f"[dynatree.policies]\n{name} = module_of_{name}:P\n"),
        ):
            if text is not None:
                (info / file).write_bytes(text.encode() if isinstance(text, str) else text)
        monkeypatch.syspath_prepend(site)
        plugin_table.cache_clear()
        return info

    monkeypatch.setattr(distributions, "_told", set())
    yield install
    plugin_table.cache_clear()
    for name in modules:
        sys.modules.pop(name, None)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: its exit status, what it printed, and what it complained of."""

    def command(*args: str) -> tuple[int, str, str]:
        plugin_table.cache_clear()
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(args)
        said = capfd.readouterr()
        return ended.value.code, said.out, said.err

    return command


# ---- distributions -------------------------------------------------------------------------------------------

BROKEN: dict[str, dict[str, Any]] = {
    "no_metadata": {"metadata": None},
    "empty_metadata": {"metadata": "\n"},
    "metadata_of_bytes": {"metadata": b"Metadata-Version: 2.1\nName: caf\xe9\n"},
    "entries_of_bytes": {"entries": b"[dynatree.policies]\nx = caf\xe9:P\n"},
    "entries_without_value": {"entries": "[dynatree.policies]\nx\n"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_distribution_that_cannot_be_read_costs_itself_only(name: str, package: Any, run: Any) -> None:
    info = package(name, **BROKEN[name])
    package("sound")
    code, out, err = run("policies", "--json")
    assert code == 0
    names = [row["name"] for row in json.loads(out)]
    assert {"sound", "phase3", "fixed"} <= set(names)
    assert name not in names
    [line] = err.splitlines()
    assert line.startswith("dynatree: warning: an installed distribution must have a METADATA file")
    assert str(info) in line
    distributions._told.clear()
    code, out, err = run("--help")
    assert code == 0
    assert "generate" in out
    assert str(info) in err


@pytest.mark.parametrize("name", ["entries_of_bytes", "entries_without_value"])
def test_torch_is_imported_beside_entry_points_that_cannot_be_read(name: str, package: Any) -> None:
    """torch fails there by itself, so a process of its own has to show it."""
    info = package(name, **BROKEN[name])
    command = [sys.executable, "-c", "from dynatree_core.cli.group import main; main()", "drafters", "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(info.parent), str(ROOT)])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "prompt_lookup" in [row["name"] for row in json.loads(done.stdout)]
    assert str(info) in done.stderr


def test_entry_points_that_may_not_be_read_are_told(package: Any) -> None:
    info = package("hidden")
    (info / "entry_points.txt").unlink()
    (info / "entry_points.txt").mkdir()  # importlib passes over it as it does over a file without permission
    with pytest.warns(DistributionWarning, match=r"hidden-1\.0\.dist-info \(IsADirectoryError"):
        assert "fixed" in [entry.name for entry in entry_points(group=POLICIES)]


def test_others_troubles_are_not_told(package: Any) -> None:
    package("stranger", entries="[console_scripts]\nx\n")
    package("nameless", metadata=None, entries="[console_scripts]\nx = y:z\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "fixed" in [entry.name for entry in entry_points(group=POLICIES)]


def test_a_distribution_without_a_version_works(package: Any, run: Any) -> None:
    package("unversioned", metadata="Metadata-Version: 2.1\nName: unversioned\n")
    code, out, err = run("policies", "--json")
    assert (code, err) == (0, "")
    [row] = [row for row in json.loads(out) if row["name"] == "unversioned"]
    assert (row["package"], row["version"], row["error"]) == ("unversioned", "?", None)


def test_a_distribution_that_is_found_twice_is_one(package: Any, tmp_path: Path, monkeypatch: Any) -> None:
    package("twofold")
    (tmp_path / "lib64").symlink_to(tmp_path / "twofold")
    monkeypatch.syspath_prepend(tmp_path / "lib64")
    plugin_table.cache_clear()
    assert str(build_stack("twofold")) == "twofold"


# ---- modules -------------------------------------------------------------------------------------------------

RAISING = {
    "exit_with_0": ("import sys; sys.exit(0)", r"SystemExit: it called exit\(0\)"),
    "exit_with_nothing": ("exit()", r"SystemExit: it called exit\(\)"),
    "exit_with_words": ("raise SystemExit('no GPU')", r"it called exit\('no GPU'\)"),
    "base_exception": ("class Halt(BaseException): pass\nraise Halt('here')", "Halt: here"),
    "cancelled": ("import asyncio; raise asyncio.CancelledError", "CancelledError"),
}


@pytest.mark.parametrize("name", RAISING)
def test_a_module_that_raises_anything_is_named(name: str, package: Any, run: Any) -> None:
    code, message = RAISING[name]
    package(name, SOUND + code)
    with pytest.raises(PluginLoadError, match=f"'{name}' is installed but cannot be imported .*{message}"):
        build_stack(name)
    status, out, err = run("policies", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert (status, err) == (0, "")
    assert "cannot be imported" in rows[name]["error"]
    assert rows["fixed"]["error"] is None
    status, out, err = run("generate", "--policy", name, "Hi")
    assert (status, out) == (1, "")
    [line] = err.splitlines()
    assert name in line


def test_a_module_that_is_interrupted_is_no_fault_of_its_own(package: Any) -> None:
    package("interrupted", SOUND + "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        build_stack("interrupted")


def test_a_command_whose_module_exits(package: Any, run: Any) -> None:
    package("ends", "print('loading'); exit()", entries="[dynatree.commands]\nends = module_of_ends:command\n")
    code, out, err = run("--help")
    assert code == 0
    assert "broken: SystemExit: it called exit()" in out
    assert "policies" in out
    assert "loading" not in out
    assert err == "loading\n"
    assert run("ends")[0] == 1


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("def __init__(self): exit()", PluginLoadError),
        ("def __init__(self, width): self.width = width", ParameterError),
        ("def __init__(self): raise ValueError('no')", ParameterError),
    ],
)
def test_a_constructor_that_raises_anything(code: str, error: type[Exception], package: Any) -> None:
    package("unmakable", f"class P:\n    {code}\n")
    with pytest.raises(error, match="'unmakable'"):
        build_stack("unmakable")


def test_a_parameter_that_cannot_be_shown(package: Any, run: Any) -> None:
    code = "class Odd:\n    def __repr__(self): raise RuntimeError('no words')\n"
    package("wordless", code + SOUND.replace("width=2", "width=Odd()"))
    code, out, err = run("policies", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert (code, err) == (0, "")
    assert "no words" in rows["wordless"]["error"]
    assert run("policies")[0] == 0


# ---- hooks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raising", ["raise SystemExit(0)", "exit()", "raise BaseException('odd')"])
def test_a_hook_that_raises_anything_is_named(raising: str, package: Any) -> None:
    package("halting", SOUND.replace("return self.width", raising))
    target = tiny_model("llama")
    with pytest.raises(PolicyError, match=r"policy 'halting', hook branch_factor: raised (SystemExit|BaseException)"):
        generate(target, target, [1, 2, 3], policy="halting", max_new_tokens=4)


class Exiting(Drafter):
    """A drafter that ends the process."""

    def __str__(self) -> str:
        return "exiting"

    def start(self, plan: DraftPlan) -> DraftState:
        print("starting")
        raise SystemExit(0)


def test_a_drafter_that_raises_anything_is_named(capsys: Any) -> None:
    with pytest.raises(DrafterError, match=r"drafter 'exiting' raised SystemExit: it called exit\(0\)"):
        generate(tiny_model("llama"), Exiting(), [1, 2, 3], max_new_tokens=4)
    assert capsys.readouterr().out == "starting\n"
    with foreign.prints_aside(), pytest.raises(DrafterError):
        generate(tiny_model("llama"), Exiting(), [1, 2, 3], max_new_tokens=4)
    assert capsys.readouterr().out == ""


def test_a_caller_may_end_the_process() -> None:
    def leave(done: int, total: int) -> None:
        raise SystemExit(5)

    target = tiny_model("llama")
    with pytest.raises(SystemExit) as ended:
        generate(target, target, [1, 2, 3], max_new_tokens=4, on_prefill=leave)
    assert ended.value.code == 5


def test_what_others_print_goes_to_standard_error(package: Any, run: Any) -> None:
    package("chatty", "print('importing')\n" + SOUND.replace("self.width = width", "print('making')"))
    code, out, err = run("policies", "--json")
    assert code == 0
    assert "chatty" in [row["name"] for row in json.loads(out)]
    assert err == "importing\nmaking\n"


def test_what_a_hook_prints_goes_aside_only_where_that_is_asked_for(package: Any, capsys: Any) -> None:
    package("talking", SOUND.replace("return self.width", "print('asked'); return 1"))
    target = tiny_model("llama")
    with foreign.prints_aside():
        generate(target, target, [1, 2, 3], policy="talking", max_new_tokens=2)
    said = capsys.readouterr()
    assert said.out == ""
    assert "asked" in said.err
    generate(target, target, [1, 2, 3], policy="talking", max_new_tokens=2)  # in a program of one's own it stays
    assert "asked" in capsys.readouterr().out


# ---- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["wide-root", "wide_root", "wide.root", "wide-root ( width = 3 )"])
def test_dashes_and_dots_stand_for_an_underscore(written: str, package: Any) -> None:
    package("dashed", entries="[dynatree.policies]\nwide-root = module_of_dashed:P\n")
    assert build_stack(written).find("wide_root") is not None
    assert str(build_stack(written)).startswith("wide_root")
    assert load_plugin(POLICIES, "wide.root").__name__ == "P"


def test_two_spellings_of_one_name_are_a_conflict(package: Any) -> None:
    package("first", entries="[dynatree.policies]\nmy-policy = module_of_first:P\n")
    package("second", entries="[dynatree.policies]\nmy.policy = module_of_second:P\n")
    with pytest.raises(PluginConflictError, match=r"'my_policy' comes from (first|second) .* and "):
        build_stack("my_policy")


@pytest.mark.parametrize("name", ["9lives", "two words", "a:b", "größe!"])
def test_a_name_that_cannot_be_written_is_refused_with_the_reason(name: str, package: Any, run: Any) -> None:
    package("misnamed", entries=f"[dynatree.policies]\n{name} = module_of_misnamed:P\n")
    code, out, _ = run("policies", "--json")
    assert code == 0
    [row] = [row for row in json.loads(out) if row["package"] == "misnamed"]
    assert f"got '{name}' of misnamed; rename its entry point" in row["error"]


def test_every_name_that_is_listed_as_sound_can_be_written(package: Any, run: Any) -> None:
    package("letters", entries="[dynatree.policies]\nbreite-größe = module_of_letters:P\n_x = module_of_letters:P\n")
    _, out, _ = run("policies", "--json")
    sound = [row["name"] for row in json.loads(out) if row["error"] is None]
    assert {"breite_größe", "_x"} <= set(sound)
    for name in sound:
        build_stack(name)


# ---- compiled classes ----------------------------------------------------------------------------------------


class CompiledFunction:
    """As Cython makes functions: of a type of its own, which binds, takes attributes and has a signature."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        del self.__wrapped__
        self.function = function
        self.__signature__ = inspect.signature(function)

    def __get__(self, instance: object, owner: type) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.function(*args, **named)


class Secretive(type):
    """A type that tells no signature, as extension types do."""

    @property
    def __signature__(cls) -> inspect.Signature:
        raise ValueError(f"no signature found for builtin type {cls}")


def compiled(base: type = type) -> type:
    @hookimpl
    @CompiledFunction
    def branch_factor(self: Any, frontier: Any) -> int:
        return int(self.width)

    @hookimpl
    def on_iteration_end(self: Any, report: Any) -> None:
        self.num_reports += 1

    def make(self: Any, width: int = 2) -> None:
        self.width, self.num_reports = width, 0

    return base("P", (), {"__init__": make, "branch_factor": branch_factor, "on_iteration_end": on_iteration_end})


@pytest.mark.parametrize("base", [type, Secretive])
def test_a_compiled_class_works(base: type, package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = compiled(base)
    package("compiled")
    monkeypatch.setattr(load_plugin(POLICIES, "compiled").__module__ + ".P", policy)
    assert set(implemented_hooks(policy())) == {"branch_factor", "on_iteration_end"}
    stack = build_stack("compiled(width=3)")
    target = tiny_model("llama")
    result = generate(target, target, [1, 2, 3], policy="compiled(width=3)", max_new_tokens=6)
    assert result.token_ids == generate(target, None, [1, 2, 3], policy="autoregressive", max_new_tokens=6).token_ids
    assert result.report.num_drafted_nodes > 0
    assert stack.find("compiled").width == 3
    assert plugin_parameters(policy) == ({"width": 2} if base is type else {})
    with pytest.raises(ParameterError, match="compiled"):
        build_stack("compiled(wdith=3)")


def test_a_compiled_hook_is_held_to_its_contract() -> None:
    def with_hook(function: Callable[..., Any]) -> object:
        return type("P", (), {function.__name__: hookimpl(CompiledFunction(function))})()

    def branch_factor(self: Any, frontier: Any, tree: Any) -> int:
        return 1

    with pytest.raises(PolicyError, match="tree"):
        implemented_hooks(with_hook(branch_factor))

    def keep_nodes(self: Any, tree: Any = None) -> None:
        return None

    with pytest.raises(PolicyError, match="no default values"):
        implemented_hooks(with_hook(keep_nodes))
