"""The `dynatree` command: drafters, mistakes and help."""

from __future__ import annotations

import io
import os
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from command import Dynatree, dynatree, folders, generate, is_one_error_line

from dynatree_core.cli.group import COMMANDS

__all__ = ["dynatree", "folders", "generate"]  # fixtures


def test_a_model_as_drafter(generate: Dynatree, folders: SimpleNamespace) -> None:
    args = ("--policy", "linear(depth=3)", "--dtype", "float64", "--json", "--max-new-tokens", 12, "abc")
    document = generate("--drafter", folders.plain, *args).document
    assert document["node_acceptance"] == 1
    assert document["tokens_per_iteration"] == 4
    assert document["drafter"] == f"model(model='{folders.plain}')"


def test_a_registered_drafter_with_parameters(generate: Dynatree) -> None:
    assert generate("--drafter", "prompt_lookup(max_matches=2)", "--max-new-tokens", 2, "abc").code == 0
    ran = generate("--drafter", "prompt_lookup(max_match=2)", "abc")
    assert ran.code == 2
    assert is_one_error_line(ran, "max_match", "did you mean 'max_matches'")


def test_a_misspelt_drafter_is_told_before_anything_is_loaded(dynatree: Dynatree) -> None:
    ran = dynatree("generate", "--target", "/nowhere", "--drafter", "promptlookup", "abc")
    assert ran.code == 2
    assert is_one_error_line(ran, "did you mean 'prompt_lookup'", "known are: adapter_off, distilled, model")


def test_a_drafter_that_is_neither_registered_nor_a_model(
    generate: Dynatree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "xyz").mkdir()
    ran = generate("--drafter", "xyz", "abc")
    assert ran.code == 1
    assert is_one_error_line(ran, "cannot load 'xyz'", "or name an installed drafter: adapter_off, distilled, model")


def test_vocabularies_that_disagree(generate: Dynatree, folders: SimpleNamespace) -> None:
    ran = generate("--drafter", folders.other, "abc")
    assert (ran.code, ran.out) == (2, "")
    assert is_one_error_line(ran, "must give every token the same id", "other")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--policy", "phse3"], ["did you mean 'phase3'"]),
        (["--policy", "confidence(high=2)"], ["from 0 to 1"]),
        (["--policy", "confidence(hihg=0.5)"], ["did you mean 'high'"]),
        (["--policy", "confidence(high=)"], ["cannot read"]),
        (["--policy", ""], ["cannot read"]),
        (["--max-new-tokens", "-1"], ["--max-new-tokens", "dynatree generate --help"]),
        (["--max-new-tokens", "many"], ["--max-new-tokens"]),
        (["--max-new-tokens", "30000"], ["context of 20000"]),
        (["--max-depth", "-1"], ["--max-depth"]),
        (["--max-nodes", "1.5"], ["--max-nodes"]),
        (["--max-branch", "0"], ["--max-branch"]),
        (["--tau", "1.5"], ["--tau"]),
        (["--tau", "nan"], ["--tau", "nan is not a finite number"]),
        (["--max-time", "nan"], ["--max-time", "nan is not a finite number"]),
        (["--repetition-penalty", "inf"], ["--repetition-penalty", "inf is not a finite number"]),
        (["--stop", "x", "--stop", ""], ["--stop", "at least one character"]),
        (["--dtype", "int8"], ["--dtype", "float32"]),
        (["--on-error", "ignore"], ["--on-error"]),
        (["--cache", "sinks=4"], ["'sinks=4,window=1024'"]),
        (["--cache", "sinks=4,window=8", "--exact", "fixed_width"], ["exact='fixed_width'", "leave out"]),
        (["--chat"], ["--chat", "--raw"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["another prompt"], ["extra argument"]),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_code_2(generate: Dynatree, args: list[str], words: list[str]) -> None:
    ran = generate(*args, "abc")
    assert (ran.code, ran.out) == (2, "")
    assert is_one_error_line(ran, *words)


def test_a_share_that_is_no_number(dynatree: Dynatree) -> None:
    assert is_one_error_line(dynatree("chat", "--top-p", "nan"), "--top-p", "nan is not a finite number")


def test_an_empty_prompt(generate: Dynatree, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = generate("")
    assert ran.code == 2
    assert is_one_error_line(ran, "at least one character")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert generate("-").code == 2


def test_a_prompt_that_is_not_text(generate: Dynatree, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = generate(os.fsdecode(b"caf\xe9"))  # what Python makes of an argument in Latin-1
    assert ran.code == 2
    assert is_one_error_line(ran, "UTF-8")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert is_one_error_line(generate("-"), "UTF-8")


def test_no_command_is_help_and_a_wrong_one_is_a_mistake(dynatree: Dynatree) -> None:
    assert dynatree().out == dynatree("--help").out
    assert dynatree().code == 0
    ran = dynatree("generat")
    assert (ran.code, ran.out) == (2, "")
    assert is_one_error_line(ran, "generat", "dynatree --help")
    assert dynatree("generate").code == 2


@pytest.mark.parametrize(
    "command",
    [
        *([], ["generate"], ["policies"], ["drafters"], ["new-policy"], ["new-drafter"], ["models"]),
        *(["models", "install"], ["calibrate"], ["completion"]),
    ],
)
def test_help(dynatree: Dynatree, command: list[str]) -> None:
    ran = dynatree(*command, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert "Usage: dynatree" in ran.out
    if command in ([], ["generate"]):
        assert '\n    dynatree generate "' in ran.out, "examples keep their lines"


def test_version(dynatree: Dynatree) -> None:
    assert dynatree("--version").out.split()[0] == "dynatree"


def test_commands_of_other_packages(dynatree: Dynatree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "rotten.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    found = EntryPoints(
        [
            EntryPoint("plant", f"{__name__}:plant", COMMANDS),
            EntryPoint("felled", "no_such_module:felled", COMMANDS),
            EntryPoint("rotten", "rotten:command", COMMANDS),
            EntryPoint("stone", "os:sep", COMMANDS),
            EntryPoint("twice", "one:command", COMMANDS),
            EntryPoint("twice", "two:command", COMMANDS),
        ]
    )
    monkeypatch.setattr("dynatree_core.cli.group.entry_points", lambda **wanted: found.select(**wanted))
    ran = dynatree("plant", "--help")
    assert (ran.code, ran.err) == (0, "")
    assert "Plant a tree." in ran.out
    ran = dynatree("felled")
    assert is_one_error_line(ran, "felled", "no_such_module")
    assert is_one_error_line(dynatree("twice"), "one package")
    assert is_one_error_line(dynatree("rotten"), "ZeroDivisionError", "uninstall its package, rotten:command")
    assert is_one_error_line(dynatree("stone"), "must be a click command, got '/'")
    ran = dynatree("--help")
    assert ran.code == 0
    assert "Plant a tree." in ran.out
    assert "broken: ModuleNotFoundError: No module named" in ran.out


@click.command()
def plant() -> None:
    """Plant a tree."""
