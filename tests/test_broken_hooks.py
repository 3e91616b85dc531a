"""Hooks and drafters of packages that raise anything or print, while a generation runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_package import SOUND, package, run

from dynatree_core import Drafter, DraftPlan, DraftState, generate
from dynatree_core.errors import DrafterError, PolicyError
from dynatree_core.plugins import foreign
from dynatree_core.testing.models import tiny_model

__all__ = ["package", "run"]  # fixtures


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
