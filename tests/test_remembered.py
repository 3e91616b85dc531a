"""What is remembered of installed packages, when it is read anew, and what lists need not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from dynatree_core.cli.catalogue import PluginRow, plugin_rows
from dynatree_core.cli.group import main
from dynatree_core.errors import DefaultModelError
from dynatree_core.models import embedded
from dynatree_core.plugins import registry as registry
from dynatree_core.plugins.registry import DRAFTERS, POLICIES, PRESETS
from dynatree_core.plugins.remembered import Memory

POLICY = '''
from dynatree_core import hookimpl

print("read")

class Shoot:
    """{doc}"""
    def __init__(self, size: int = {size}) -> None:
        self.size = size

    @hookimpl
    def branch_factor(self, frontier):
        return self.size
'''


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what is remembered, empty."""
    folder = tmp_path / "cache" / "plugins"
    monkeypatch.setattr("dynatree_core.plugins.remembered.folder", lambda: folder)
    return folder


Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Writes modules and the metadata of a distribution; what was imported of it before is forgotten."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(site)
    written: set[str] = set()

    def forget() -> None:
        registry.plugin_table.cache_clear()
        for name in written:
            sys.modules.pop(name, None)

    def write(
        files: dict[str, str], entry_points: dict[str, str] | None = None, *, name: str = "garden", version: str = "1"
    ) -> None:
        if entry_points is not None:
            metadata = site / f"{name}.dist-info"
            metadata.mkdir(parents=True, exist_ok=True)
            (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            text = "\n".join(f"[{group}]\n{entry}" for group, entry in entry_points.items())
            (metadata / "entry_points.txt").write_text(text)
        for file, text in files.items():
            path = site / file
            path.parent.mkdir(parents=True, exist_ok=True)
            date = path.stat().st_mtime_ns + 10**9 if path.exists() else None
            path.write_text(text)
            if date is not None:  # as a later edit has it, however fast this test is
                os.utime(path, ns=(date, date))
            written.add(path.stem)
        forget()

    yield write
    forget()


def row(name: str, *groups: str) -> PluginRow:
    """A plugin's row, its modules imported anew if they are imported at all."""
    for module in ("shoot", "root", "seeds", "moss"):
        sys.modules.pop(module, None)
    registry.plugin_table.cache_clear()
    [found] = [row for row in plugin_rows(*(groups or (POLICIES,))) if row.name == name]
    return found


def is_read(name: str, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether a look at its row imports the module of POLICY."""
    capsys.readouterr()
    row(name)
    return "read" in capsys.readouterr().out


SHOOT = {POLICIES: "shoot = shoot:Shoot"}


def test_a_plugin_is_read_once(memory: Path, install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install({"shoot.py": POLICY.format(doc="A shoot.", size=3)}, SHOOT)
    assert is_read("shoot", capsys)
    assert not is_read("shoot", capsys)
    known = row("shoot")
    assert (known.package, known.version, known.description) == ("garden", "1", "A shoot.")
    assert (known.parameters, known.hooks) == ({"size": 3}, ["branch_factor"])
    assert [path.suffix for path in memory.iterdir()] == [".json"], "nothing else is left"


def test_rows_read_and_rows_remembered_are_the_same(memory: Path) -> None:
    groups = (PRESETS, POLICIES, DRAFTERS)
    fresh = plugin_rows(*groups)
    [file] = memory.iterdir()
    assert len(json.loads(file.read_text())["known"]) == len([row for row in fresh if row.error is None])
    assert list(map(attrs.asdict, plugin_rows(*groups))) == list(map(attrs.asdict, fresh))


def test_an_edited_module_is_read_again(memory: Path, install: Install) -> None:
    install({"shoot.py": POLICY.format(doc="A shoot.", size=3)}, SHOOT)
    assert row("shoot").description == "A shoot."
    install({"shoot.py": POLICY.format(doc="A sprig.", size=4)})
    assert (row("shoot").description, row("shoot").parameters) == ("A sprig.", {"size": 4})


def test_another_version_is_read_again(memory: Path, install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"shoot.py": POLICY.format(doc="A shoot.", size=3)}
    install(files, SHOOT)
    assert is_read("shoot", capsys)
    install({}, SHOOT, version="2")
    assert is_read("shoot", capsys)
    assert row("shoot").version == "2"


def test_an_edited_base_class_of_another_package_is_read_again(memory: Path, install: Install) -> None:
    below = 'from root import Shoot as Base\n\nclass Shoot(Base):\n    """On a root."""\n'
    install({"root.py": POLICY.format(doc="", size=3), "shoot.py": below}, SHOOT)
    assert row("shoot").parameters == {"size": 3}
    install({"root.py": POLICY.format(doc="", size=44)})
    assert row("shoot").parameters == {"size": 44}


def test_a_preset_follows_the_presets_that_it_names(memory: Path, install: Install) -> None:
    install({"seeds.py": "SEED = 'moss+history'"}, {PRESETS: "seed = seeds:SEED"})
    install({"moss.py": "MOSS = 'linear'"}, {PRESETS: "moss = moss:MOSS"}, name="bog")
    assert row("seed", PRESETS).expands_to == "linear+history"
    install({"moss.py": "MOSS = 'fixed'"})
    assert row("seed", PRESETS).expands_to == "fixed+history"


def test_what_is_broken_is_not_remembered(memory: Path, install: Install) -> None:
    below = 'from root import Shoot as Base\n\nclass Shoot(Base):\n    """On a root."""\n'
    install({"shoot.py": below}, SHOOT)
    assert "root" in (row("shoot").error or "")
    install({"root.py": POLICY.format(doc="", size=3)})
    assert row("shoot").error is None


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        '"a"',
        "[" * 100_000,
        '{"format_version": 0, "known": {}}',
        '{"format_version": 1, "known": 3}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_file_is_as_good_as_none(
    memory: Path, install: Install, damage: str | bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    install({"shoot.py": POLICY.format(doc="A shoot.", size=3)}, SHOOT)
    row("shoot")
    [file] = memory.iterdir()
    file.write_bytes(damage.encode() if isinstance(damage, str) else damage)
    assert row("shoot").description == "A shoot."
    assert not is_read("shoot", capsys), "it was written anew"


@pytest.mark.parametrize(
    "change",
    [
        {"facts": None},
        {"facts": {"hooks": 3}},
        {"facts": {"hooks": [3]}},
        {"facts": {"variants": {"a": 3}}},
        {"facts": {"description": 3}},
        {"facts": {"other": 3}},
        {"files": None},
        {"files": [3]},
        {"stamp": None},
    ],
)
def test_facts_of_another_shape_are_read_again(memory: Path, install: Install, change: dict[str, object]) -> None:
    install({"shoot.py": POLICY.format(doc="A shoot.", size=3)}, SHOOT)
    expected = row("shoot")
    [file] = memory.iterdir()
    document = json.loads(file.read_text())
    for kept in document["known"].values():
        kept |= change
    file.write_text(json.dumps(document))
    assert row("shoot") == expected


def test_a_folder_that_cannot_be_written_is_left_alone(
    memory: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    memory.parent.mkdir()
    memory.write_text("a file")
    install({"shoot.py": POLICY.format(doc="A shoot.", size=3)}, SHOOT)
    assert is_read("shoot", capsys)
    assert is_read("shoot", capsys)
    assert memory.read_text() == "a file"


def test_defaults_that_json_changes_are_not_remembered(
    memory: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install({"shoot.py": POLICY.format(doc="A shoot.", size="(1, 2)")}, SHOOT)
    assert is_read("shoot", capsys)
    assert is_read("shoot", capsys)
    assert row("shoot").parameters == {"size": (1, 2)}


def test_environments_are_kept_apart(memory: Path) -> None:
    assert Memory("one").path != Memory("two").path
    assert Memory("one").path == Memory("one").path


COMMAND = '''
import click

print("read")

@click.command()
def water():
    """Water the garden."""
'''


def test_the_help_of_added_commands_is_remembered(
    memory: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    def listed() -> str:
        sys.modules.pop("hose", None)
        with pytest.raises(SystemExit):
            main(["--help"])
        said = capsys.readouterr()
        return said.out + said.err  # to which prints of others go

    install({"hose.py": COMMAND}, {"dynatree.commands": "water = hose:water"})
    assert "read\n" in listed()
    again = listed()
    assert "read\n" not in again
    assert "Water the garden." in again
    install({"hose.py": COMMAND.replace("garden", "lawn")})
    assert "Water the lawn." in listed()
    install({"hose.py": "1 / 0"})
    assert "broken: ZeroDivisionError" in listed()
    install({"hose.py": COMMAND})
    assert "Water the garden." in listed(), "what is broken is not remembered"
    install({}, {"dynatree.commands": "water = pump:water"}, name="pumps")
    assert "broken: it must come from one package" in listed()


# ---- what the commands import --------------------------------------------------------------------------------

COUNT = """
import contextlib, io, json, sys

from dynatree_core.cli.group import main

heavy = {"torch", "transformers", "numpy", "datasets", "matplotlib", "huggingface_hub", "gguf", "tokenizers"}
found = {}
for line in json.loads(sys.argv[1]):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(line.split())
    found[line] = sorted(heavy & set(sys.modules))
    assert not found[line], found
print(json.dumps(found))
"""


def test_lists_and_help_import_no_libraries_that_compute(memory: Path, tmp_path: Path) -> None:
    """From the second call on: the first is made in this process, which has them anyway."""
    plugin_rows(PRESETS, POLICIES, DRAFTERS)
    lines = [
        "--version", "--help", "policies", "policies --json", "drafters", "models", "completion bash",
        "generate --help", "chat --help", "audit --help", "bench --help", "bench list", "bench main --help",
        "distill --help", "profile --help", "new-policy --help",
        f"new-policy --dir {tmp_path} wide_root", "no-such-command", "generate", "generate --tau 2 abc",
    ]  # fmt: skip
    environment = os.environ | {"DYNATREE_CACHE": str(memory.parent)}
    command = [sys.executable, "-c", COUNT, json.dumps(lines)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {line: [] for line in lines}


def test_the_package_is_imported_lazily() -> None:
    program = "import dynatree_core, sys; print(*({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_default_model_is_hashed_beside_the_imports_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNATREE_CACHE", str(tmp_path))
    threads, found = [], ["one byte is wrong", None]

    def look(folder: Path, source_sha256: str, *, is_thorough: bool = True) -> str | None:
        threads.append(threading.current_thread().name)
        return found[0]

    monkeypatch.setattr(embedded, "_find_damage", look)
    monkeypatch.setattr(embedded, "_find_source", lambda: None)
    embedded.check_early()
    embedded.check_early()
    with pytest.raises(DefaultModelError):
        embedded.path()
    assert threads == ["hash"], "what was found in the thread counts, good or bad"
    found[0] = None
    assert embedded.path().is_relative_to(tmp_path)
    assert len(threads) == 2, "the next look is a new one"
    assert threads[1] != "hash"


def test_a_generation_begins_with_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    monkeypatch.setattr(embedded, "check_early", lambda **which: begun.append(1))
    monkeypatch.setattr("dynatree_core.models.load.load_model", lambda *args, **options: 1 / 0)
    for args, times in ((["generate", "text"], 1), (["generate", "--target", "default", "text"], 2), (["chat"], 3)):
        with pytest.raises(SystemExit):
            main(args)
        assert len(begun) == times
    with pytest.raises(SystemExit):
        main(["generate", "--target", "./elsewhere", "text"])
    assert len(begun) == 3
