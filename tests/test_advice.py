"""The advice in messages, tried by following it."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from dynatree_bench.run import rivals
from dynatree_core import Session, generate
from dynatree_core.advice import pip_install
from dynatree_core.errors import ContextLimitError
from dynatree_core.testing.models import tiny_model


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Programs that a shell finds, by name."""
    programs: dict[str, str] = {}
    monkeypatch.setattr(shutil, "which", programs.get)
    return programs


def test_pip_installs_into_this_environment(found: dict[str, str]) -> None:
    wanted = shlex.quote("dynatree[bench]")
    assert pip_install("dynatree[bench]") == f"{shlex.quote(sys.executable)} -m pip install {wanted}"
    found["python"] = "/somewhere/else/python"
    assert pip_install("dynatree[bench]") == f"{shlex.quote(sys.executable)} -m pip install {wanted}"
    found["python"] = str(Path(sys.executable).with_name("python"))
    assert pip_install("dynatree[bench]") == f"python -m pip install {wanted}"
    assert pip_install("--no-deps", "a==1") == "python -m pip install --no-deps a==1"


def test_an_environment_without_pip(found: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    python = shlex.quote(sys.executable)
    assert pip_install("a") == f"{python} -m ensurepip && {python} -m pip install a"
    found["uv"] = "/usr/bin/uv"
    assert pip_install("a") == f"uv pip install --python {python} a"


def test_a_rival_that_this_python_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "pip install 'dynatree[rivals]'" in rivals._advice("flashspec")
    monkeypatch.setattr(sys, "version_info", (3, 12, 9))
    assert "it needs Python 3.13 or newer" in rivals._advice("dejavuu")
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    assert "pip install 'dynatree[rivals]'" in rivals._advice("dejavuu")


def advised(prompt: list[int], **options: object) -> str:
    with pytest.raises(ContextLimitError) as told:
        Session(tiny_model("llama"), None, prompt, policy="autoregressive", **options)  # type: ignore[arg-type]
    return str(told.value)


def test_a_text_that_is_too_long_is_made_to_fit() -> None:
    target = tiny_model("llama")
    limit = int(target.config.max_position_embeddings)
    [num] = map(int, re.findall("max_new_tokens to at most ([0-9]+)", advised([1] * (limit - 3), max_new_tokens=9)))
    assert num == 3
    result = generate(target, None, [1] * (limit - 3), policy="autoregressive", max_new_tokens=num, eos_token_id=[])
    assert len(result.token_ids) == 3


@pytest.mark.parametrize("extra", [0, 20])
def test_a_prompt_that_leaves_no_room_is_made_to_fit(extra: int) -> None:
    target = tiny_model("llama")
    limit = int(target.config.max_position_embeddings)
    told = advised([1] * (limit + extra), max_new_tokens=1)
    assert "at most 0" not in told
    [num] = map(int, re.findall("the prompt to at most ([0-9]+)", told))
    shorter = generate(target, None, [1] * num, policy="autoregressive", max_new_tokens=1, eos_token_id=[])
    assert len(shorter.token_ids) == 1
    [cache] = re.findall("cache='([^']+)'", told)
    kept = generate(
        target, None, [1] * (limit + extra), policy="autoregressive", max_new_tokens=2, eos_token_id=[], cache=cache
    )
    assert len(kept.token_ids) == 2
