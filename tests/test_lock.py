"""constraints.txt: it pins all that `make` installs, and what is installed by `make` is what it says.

The second half is checked where DYNATREE_LOCKED=1 says that the environment was made from the file, as in `make test`.
Elsewhere, such as in `make test-matrix` or with a user's own versions, other versions are no fault.
"""

from __future__ import annotations

import os
import platform
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version

import lock
import pytest
from packaging.requirements import Requirement

PROJECT = tomllib.loads((lock.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINNED = lock.read(lock.LOCK.read_text(encoding="utf-8"))

locked = pytest.mark.skipif(
    os.environ.get("DYNATREE_LOCKED") != "1", reason="DYNATREE_LOCKED=1 is not set: not an environment that make made"
)


def requirements_of_ours(extra: str) -> list[Requirement]:
    """What the package requires here with an extra, from pyproject.toml: the installed metadata may be older."""
    optional = PROJECT["project"]["optional-dependencies"]
    found = [Requirement(text) for text in [*PROJECT["project"]["dependencies"], *optional[extra]]]
    nested = [own for one in found if one.name == "dynatree" for own in one.extras]
    found += [one for own in nested for one in requirements_of_ours(own)]
    return [one for one in found if one.name != "dynatree" and (one.marker is None or one.marker.evaluate())]


def needed() -> dict[str, list[Requirement]]:
    """Name -> what is required of it, of all that the extra `dev` needs here, by what the installed packages say."""
    found: dict[str, list[Requirement]] = {}
    waiting, seen = requirements_of_ours("dev"), set()
    while waiting:
        one = waiting.pop()
        name = lock.canonical(one.name)
        if lock.comes_with_torch(name):
            continue
        found.setdefault(name, []).append(one)
        for extra in {"", *one.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            for text in requires(name) or []:
                further = Requirement(text)
                if further.marker is None or further.marker.evaluate({"extra": extra}):
                    waiting.append(further)
    return found


def test_each_requirement_is_pinned_within_its_range():
    build = [Requirement(text) for text in PROJECT["build-system"]["requires"]]
    wanted = [*requirements_of_ours("dev"), *build]
    assert {one.name for one in wanted} >= {"torch", "transformers", "matplotlib", "pytest", "mypy", "setuptools"}
    wrong = [str(one) for one in wanted if not one.specifier.contains(PINNED.get(lock.canonical(one.name), "0"))]
    assert wrong == [], "constraints.txt must pin these within their ranges: make lock"


@locked
def test_what_is_installed_is_what_the_lock_says():
    found = {}
    for name in needed():
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = "not installed"
    wrong = {
        name: f"{here} instead of {PINNED[name]}" for name, here in found.items() if PINNED.get(name, here) != here
    }
    assert wrong == {}, "the environment must be that of constraints.txt: rm .venv/installed, then make test"


@locked
@pytest.mark.skipif(
    f"{sys.version_info.major}.{sys.version_info.minor} on {platform.system()} {platform.machine()}" != lock.MADE_ON,
    reason=f"the lock is of Python {lock.MADE_ON}; elsewhere some packages need others",
)
def test_the_lock_has_what_is_needed_and_nothing_else():
    assert sorted(needed()) == sorted(PINNED), "constraints.txt must pin what the extra dev needs: make lock"


def test_the_lock_is_as_it_is_written():
    text = lock.LOCK.read_text(encoding="utf-8")
    assert lock.render(PINNED, lock.held(text)) == text
    assert "://" not in text
    assert set(lock.held(text)) == {"torch"}


def test_what_is_held_stays_and_what_only_cuda_needs_is_left_out():
    text = "# a comment\nsome_thing==1.0\n\ntorch==2.0  # held: as it was measured\n"
    assert lock.read(text) == {"some-thing": "1.0", "torch": "2.0"}
    assert lock.held(text) == {"torch": "as it was measured"}

    def item(name: str, version: str, **origin: object) -> dict[str, object]:
        return {"metadata": {"name": name, "version": version}, "download_info": {"url": "", **origin}}

    install = [
        item("torch", "2.0+cpu", archive_info={}), item("Some_Thing", "1.1"), item("dynatree", "0.1.0", dir_info={}),
        item("nvidia-cublas-cu12", "12.8"), item("cuda-bindings", "12.9"), item("triton", "3.7"),
    ]  # fmt: skip
    assert lock.resolved({"install": install}) == {"torch": "2.0", "some-thing": "1.1"}


@pytest.mark.parametrize("line", ["torch>=2.0", "torch", "torch==2.0 # keep"])
def test_a_line_that_pins_nothing_is_refused(line):
    with pytest.raises(ValueError, match=r"must be NAME==VERSION \[# held: REASON\], got '" + line):
        lock.read(f"attrs==1\n{line}\n")
