"""What `make` says while it sets up, and which releases of transformers `make test-matrix` takes and what it tells."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import clients
import lock
import matrix
import pytest
import set_up

PIP_SAYS = """\
Looking in indexes: some
Obtaining file:///somewhere
Collecting torch==2.13.0
  Downloading torch-2.13.0-cp311.whl (190 MB)
Collecting numpy>=1.17
  Using cached numpy-2.4.6.whl (15 MB)
Collecting numpy>=1.26
Installing collected packages: numpy, torch
Successfully installed numpy-2.4.6
"""


def test_progress_counts_packages_and_says_what_is_fetched():
    assert list(set_up.progress(PIP_SAYS.splitlines(), 80)) == [
        "1 of 80: torch",
        "1 of 80: torch-2.13.0-cp311.whl (190 MB)",
        "2 of 80: numpy",
        "2 of 80: numpy",
        "all are here: unpacking them, which takes a minute or two without a line",
    ]


def test_a_single_package_needs_no_word_about_unpacking():
    assert list(set_up.progress(["Collecting setuptools", "Installing collected packages: setuptools"], 1)) == [
        "1 of 1: setuptools"
    ]


def test_a_terminal_has_one_line_that_is_gone_in_the_end(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    set_up.show(["1 of 2: a", "2 of 2: " + "b" * 200])
    said = capsys.readouterr().out
    assert "\n" not in said
    assert said.endswith("\r\x1b[K")
    assert max(map(len, said.split("\r\x1b[K"))) <= 102


def test_elsewhere_there_are_few_lines_and_the_last(monkeypatch, capsys):
    monkeypatch.setattr(set_up, "QUIET_SECONDS", 1000.0)
    set_up.show(f"{number} of 80: a" for number in range(80))
    assert capsys.readouterr().out == "  79 of 80: a\n"


def test_a_set_up_that_fails_ends_with_the_reason(monkeypatch, tmp_path):
    def fail(folder: Path) -> None:
        raise subprocess.CalledProcessError(7, ["pip"])

    monkeypatch.setattr(set_up, "set_up", fail)
    assert "ended with 7" in str(set_up.main([str(tmp_path)]))
    assert "one folder must be named" in str(set_up.main([]))


def test_pip_that_fails_is_an_error():
    with pytest.raises(subprocess.CalledProcessError):
        set_up.pip_install(Path(sys.executable), "--no-such-option", num_packages=1)


@pytest.mark.parametrize(
    ("requirement", "release"),
    [("transformers>=5.17", "5.17.0"), ("transformers<7,>=5.17.2", "5.17.2"), ("transformers>=6", "6.0.0")],
)
def test_the_oldest_release_is_the_lower_bound(requirement, release):
    assert matrix.oldest(["torch>=2.7", requirement]) == release


def test_no_lower_bound_is_an_error():
    with pytest.raises(ValueError, match="must have a lower bound transformers>=VERSION"):
        matrix.oldest(["transformers<6", "torch>=2.7"])


def test_releases_are_the_oldest_one_between_and_the_newest(monkeypatch):
    monkeypatch.setattr(matrix, "newest", lambda: "5.100.0")
    assert matrix.releases() == ["5.17.0", "5.23.0", "5.100.0"]
    monkeypatch.setattr(matrix, "newest", lambda: "5.23.0")
    assert matrix.releases() == ["5.17.0", "5.23.0"]


def test_every_file_of_the_matrix_is_there():
    assert [name for name in matrix.PART if not (lock.ROOT / "tests" / f"{name}.py").exists()] == []


def test_what_a_release_needs_in_another_version_is_found(tmp_path):
    info = tmp_path / "transformers-5.0.dist-info"
    info.mkdir()
    needs = [f"pluggy=={metadata.version('pluggy')}", "attrs<1.0", "no-such-package", "numpy<0.1; extra == 'more'"]
    lines = ["Metadata-Version: 2.1", "Name: transformers", "Version: 5.0", "Provides-Extra: more"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {need}" for need in needs)]), "utf-8")
    assert matrix.unmet(tmp_path) == ["attrs<1.0", "no-such-package"]


def test_a_failure_on_one_release_fails_the_matrix(monkeypatch, tmp_path, capsys):
    said = {"5.17.0": "== 3 passed in 1.50s ==", "5.23.0": "FAILED tests/a.py::b\n1 failed, 2 passed in 70s (0:01:10)"}

    def pytest_stands_in(command: list[str], *, stdout, env, **_: object) -> SimpleNamespace:
        release = Path(env["PYTHONPATH"].split(":")[0]).name
        stdout.write(said[release] + "\n")
        return SimpleNamespace(returncode=int("FAILED" in said[release]))

    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    monkeypatch.setattr(matrix, "install", lambda release: tmp_path / release)
    monkeypatch.setattr(matrix, "releases", lambda: list(said))
    monkeypatch.setattr(matrix.subprocess, "run", pytest_stands_in)
    monkeypatch.setattr(sys, "argv", ["matrix"])
    assert matrix.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAILED tests/a.py::b" in lines
    assert [line.rsplit(maxsplit=1)[0].rstrip() for line in lines[-2:]] == [
        "5.17.0        3 passed",
        "5.23.0        FAILED: 1 failed, 2 passed",
    ]
    monkeypatch.setattr(matrix, "releases", lambda: ["5.17.0"])
    assert matrix.main() == 0


def test_the_readme_names_the_releases_that_are_tested():
    readme, pinned = (lock.ROOT / "README.md").read_text("utf-8"), lock.read(lock.LOCK.read_text("utf-8"))
    assert f"`make test` runs with torch {pinned['torch']} and transformers {pinned['transformers']}." in readme
    assert [release for release in matrix.BETWEEN if release not in readme] == []


def test_the_clients_leave_torch_and_transformers_as_they_are():
    assert any(one.startswith("lm-eval") for one in clients.requirements())
    assert [line.partition("==")[0] for line in clients.kept().splitlines()] == ["torch", "transformers"]


def test_clients_that_cannot_be_installed_end_with_the_reason(monkeypatch, capsys):
    def failing():
        raise subprocess.CalledProcessError(3, "pip")

    monkeypatch.setattr(clients, "install", failing)
    assert clients.main([]) == 2
    assert "must be installed by pip, which ended with 3" in capsys.readouterr().out
