"""What a shell is offered: commands, options, and plugins by name, also within a stack that has begun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import attrs
import pytest
from click.shell_completion import ShellComplete
from command import run_command

from dynatree_core.cli.group import _dynatree
from dynatree_core.plugins import registry as registry
from dynatree_core.plugins.registry import DRAFTERS, POLICIES, PRESETS, plugin_table

ROOT = Path(__file__).parents[1]


def offered(*words: str) -> list[tuple[str, str]]:
    """Kind and value of each item for the last of the words."""
    complete = ShellComplete(_dynatree, {}, "dynatree", "_DYNATREE_COMPLETE")
    *before, incomplete = words
    return [(item.type, item.value) for item in complete.get_completions(before, incomplete)]


def names(*words: str) -> list[str]:
    """What is offered besides folders."""
    return [value for kind, value in offered(*words) if kind == "plain"]


def test_commands() -> None:
    found = names("")
    assert set(found) >= {"generate", "policies", "bench", "distill", "profile", "completion"}
    assert found == sorted(found)
    assert names("pol") == ["policies"]
    assert "--version" in names("--")
    assert names("bench", "abl") == ["ablation"]


@pytest.mark.parametrize("command", ["generate", "chat", "audit", "profile", "bench main"])
def test_policies_and_presets_are_offered(command: str) -> None:
    assert set(names(*command.split(), "--policy", "")) == {*plugin_table(POLICIES), *plugin_table(PRESETS)}
    assert names(*command.split(), "--policy", "ph") == ["phase1", "phase2", "phase3"]


def test_a_stack_that_has_begun() -> None:
    assert names("generate", "--policy", "fixed(depth=3)+dyn") == ["fixed(depth=3)+dynamic_depth"]
    behind = names("generate", "--policy", "confidence+history+")
    assert "confidence+history+fixed" in behind
    assert not {"confidence+history+confidence", "confidence+history+history"} & set(behind)
    assert names("generate", "--policy", "fixed(dep") == []
    assert names("generate", "--policy", "confidence:plan+confid") == []


@pytest.mark.parametrize("command", ["generate", "chat", "calibrate", "bench main"])
def test_drafters_and_folders_are_offered(command: str) -> None:
    found = offered(*command.split(), "--drafter", "")
    assert found[0] == ("dir", ""), "bash forgets what stands before it"
    assert {value for _, value in found[1:]} == set(plugin_table(DRAFTERS))
    assert names(*command.split(), "--drafter", "distilled+pro") == ["distilled+prompt_lookup"]
    assert offered(*command.split(), "--target", "def") == [("dir", "def"), ("plain", "default")]


def test_settings_with_few_values_are_offered() -> None:
    assert names("generate", "--runner", "pa") == ["packed"]
    assert names("completion", "") == ["bash", "zsh", "fish"]


def test_what_is_installed_later_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("zelkova", "nowhere:Zelkova", POLICIES)
    found = plugin_table(POLICIES) | {"zelkova": [entry]}
    monkeypatch.setattr("dynatree_core.cli.completion.plugin_table", lambda group: found if group == POLICIES else {})
    assert names("generate", "--policy", "z") == ["zelkova"]
    assert "zelkova" not in registry.plugin_table(POLICIES)


def script(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[object, str, str]:
    return attrs.astuple(run_command(capsys, "completion", *args))


def test_the_shell_in_use_is_the_default(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    assert script(capsys) == script(capsys, "fish")
    assert "fish_complete" in script(capsys)[1]
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    code, out, err = script(capsys)
    assert (code, out) == (2, "")
    assert "one of bash, zsh, fish, got 'tcsh'" in err
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed here")
def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script as bash runs it, with a `dynatree` on the path that is this one."""
    program = tmp_path / "dynatree"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m dynatree_core "$@"\n')
    program.chmod(0o755)
    words = "COMP_WORDS=(dynatree generate --policy phase3+gov); COMP_CWORD=3"
    asked = f"{words}; _dynatree_completion dynatree; echo ${{COMPREPLY[@]}}"
    bash = ["bash", "--norc", "-c", f"{script(capsys, 'bash')[1]}\n{asked}"]
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(bash, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["phase3+governor"]


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dynatree_core", "--version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.startswith("dynatree ")
