"""Names of plugins: how they may be written, and which are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_package import package, run

from dynatree_core import build_stack
from dynatree_core.errors import PluginConflictError
from dynatree_core.plugins.registry import (
    POLICIES,
    load_plugin,
)

__all__ = ["package", "run"]  # fixtures


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
