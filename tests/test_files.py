"""Files are written whole, with the mode that the umask says, and never over what is somebody else's."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from dynatree_bench.run.records import INFO_FILE, LOCK_FILE, is_run
from dynatree_core.errors import InputError, ModelLoadError
from dynatree_core.files.outputs import check_out
from dynatree_core.files.tensors import load_tensors, save_tensors
from dynatree_core.files.writing import DRAFT, share, unreadable, whole_file, write_text
from dynatree_core.models.load import load_model
from dynatree_core.models.student import load_student, new_student, save_student
from dynatree_core.testing.models import tiny_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(file.stat().st_mode) for file in folder.rglob("*") if file.is_file()}


# ---- modes ---------------------------------------------------------------------------------------------------


def test_the_umask_decides_about_every_file_of_a_student(umask: int, tmp_path: Path) -> None:
    student = new_student(tiny_model("llama"), [0], torch.arange(8))
    save_student(student, tmp_path / "student", torch.float32, {"target": "tiny"})
    assert modes(tmp_path / "student") == {0o666 & ~umask}


def test_the_umask_decides_whatever_a_library_does(umask: int, tmp_path: Path) -> None:
    with whole_file(tmp_path / "mine") as draft:
        draft.unlink()
        draft.touch(mode=0o600)
        draft.write_text("x")
    save_tensors({"a": torch.ones(2)}, tmp_path / "tensors")
    write_text(tmp_path / "text", "x")
    assert modes(tmp_path) == {0o666 & ~umask}


def test_a_folder_can_be_given_the_modes_of_new_files(umask: int, tmp_path: Path) -> None:
    (tmp_path / "closed").touch(mode=0o600)
    (tmp_path / "open").touch(mode=0o666)
    share(tmp_path)
    assert modes(tmp_path) == {0o666 & ~umask}
    assert {file.name for file in tmp_path.iterdir()} == {"closed", "open"}


# ---- whole or not at all -------------------------------------------------------------------------------------


def full(draft: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_of_safetensors(draft: Path) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("fails", [full, full_of_safetensors])
def test_a_write_that_fails_leaves_the_old_file_and_names_it(fails: Callable[[Path], None], tmp_path: Path) -> None:
    file = tmp_path / "kept"
    file.write_text("old")

    def write() -> None:
        with whole_file(file) as draft:
            draft.write_text("new")
            fails(draft)

    with pytest.raises(OSError, match="No space left on device") as told:
        write()
    assert told.value.filename == str(file)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_what_torch_hides_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(self: Path, *args: Any, **options: Any) -> Any:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    def write() -> None:
        with whole_file(tmp_path / "checkpoint") as draft:
            draft.write_bytes(b"half")
            monkeypatch.setattr(Path, "open", no_room)
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    with pytest.raises(OSError, match="quota") as told:
        write()
    assert told.value.errno == errno.EDQUOT


def test_an_error_that_is_not_the_disks_stays(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "new"):
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "new"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").read_text() == "new"


def test_a_text_is_written_as_it_is(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "größe\r\n\n")
    assert (tmp_path / "text").read_bytes() == "größe\r\n\n".encode()


# ---- what may not be read ------------------------------------------------------------------------------------

CODE = """
import os, sys
from pathlib import Path
from dynatree_core.files.writing import unreadable
if os.geteuid() == 0:
    os.setgid(65534), os.setuid(65534)
print(unreadable(*map(Path, sys.argv[1:])))
"""


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that others may search, as those of pytest are not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def as_another_user(*paths: Path) -> str:
    """What `unreadable` says to a user who is neither root nor, where this is root, the owner."""
    done = subprocess.run([sys.executable, "-c", CODE, *map(str, paths)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_may_not_be_read_is_named(shared: Path) -> None:
    (shared / "open").touch()
    (shared / "open").chmod(0o644)
    assert as_another_user(shared) == "None"
    assert as_another_user(shared / "missing", shared / "open") == "None"
    (shared / "weights").touch(mode=0o000)
    assert as_another_user(shared) == f"{shared}/weights with mode ---------- of user {os.getuid()}"
    assert as_another_user(shared / "open") == "None"
    (shared / "weights").unlink()
    (shared / "locked").mkdir()
    (shared / "locked" / "inner").touch()
    (shared / "locked").chmod(0o000)
    assert f"{shared}/locked with mode d---------" in as_another_user(shared / "locked")
    assert "in a folder that this user may not search" in as_another_user(shared / "locked" / "inner")
    (shared / "locked").chmod(0o700)


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Called with a file: from then on this user may not read it, root or not."""

    def close(file: Path) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != file)

    return close


def test_a_model_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, closed: Any) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    closed(weights)
    weights.write_bytes(b"")  # what safetensors makes of it is an error like that of a file that is not there
    with pytest.raises(ModelLoadError, match=rf"may read, got {weights} with mode .*chmod -R a\+rX"):
        load_model(str(tmp_path / "model"))
    closed(tmp_path / "model" / "config.json")
    with pytest.raises(ModelLoadError, match=r"may read, got .*config\.json with mode"):
        load_model(str(tmp_path / "model"))


def test_a_student_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, closed: Any) -> None:
    target = tiny_model("llama")
    save_student(new_student(target, [0], torch.arange(8)), tmp_path / "student", torch.float32, {"target": "tiny"})
    closed(tmp_path / "student" / "student.safetensors")
    with pytest.raises(ModelLoadError, match=r"may read, got .*student\.safetensors with mode .*chmod -R a\+rX"):
        load_student(tmp_path / "student", target, torch.float32)
    assert unreadable(tmp_path / "student" / "student.json") is None


def test_damaged_tensors_say_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "shard.safetensors"
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(ModelLoadError, match=rf"{file} must hold tensors .* got SafetensorError .*; delete it"):
        load_tensors(file, advice="delete it")
    with pytest.raises(ModelLoadError, match="FileNotFoundError"):
        load_tensors(tmp_path / "missing", advice="delete it")


# ---- where results may go ------------------------------------------------------------------------------------


def nobodys(path: Path) -> bool:
    return False


def test_new_and_empty_folders_are_taken(tmp_path: Path) -> None:
    check_out(tmp_path / "new" / "deep", "`it`", nobodys)
    assert not (tmp_path / "new").exists()
    check_out(tmp_path, "`it`", nobodys)
    (tmp_path / "work" / "deeper").mkdir(parents=True)  # left by a run that was ended at once
    (tmp_path / "work" / f"{DRAFT}1-1-request.json").touch()
    check_out(tmp_path, "`it`", nobodys)


@pytest.mark.parametrize("held", ["README.md", ".git/config", "a/b/c"])
def test_a_folder_of_somebody_elses_is_refused(held: str, tmp_path: Path) -> None:
    (tmp_path / held).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / held).touch()
    top = held.partition("/")[0]
    with pytest.raises(InputError, match=rf"`it` writes must go to a folder .* got {tmp_path}, which holds {top}; "):
        check_out(tmp_path, "`it`", nobodys)
    check_out(tmp_path, "`it`", lambda path: path == tmp_path)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"goes to a folder, got .*file, which is none"):
        check_out(tmp_path / "file", "`it`", lambda path: True)
    with pytest.raises(InputError, match=r"goes to a folder, got .*link, a link to nothing"):
        check_out(tmp_path / "link", "`it`", nobodys)
    with pytest.raises(InputError, match=r"can be written, got .*inner, which .*file does not allow"):
        check_out(tmp_path / "file" / "inner", "`it`", nobodys)
    with pytest.raises(InputError, match=r"goes to a file, got .*, which is none"):
        check_out(tmp_path, "`it`", lambda path: True, is_file=True)


def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for place in (tmp_path, tmp_path / "new" / "deep"):
        with pytest.raises(InputError, match=f"which {tmp_path} does not allow; choose another"):
            check_out(place, "`it`", nobodys)


@pytest.mark.parametrize(
    ("files", "is_ours"),
    [
        ({LOCK_FILE: ""}, True),
        ({INFO_FILE: '{"experiment": "main", "methods": [], "target": {}}'}, True),
        ({INFO_FILE: '{"id": "of another tool"}'}, False),
        ({INFO_FILE: "[1]"}, False),
        ({INFO_FILE: "{"}, False),
        ({"records.jsonl": "my records"}, False),
        ({LOCK_FILE: "", "notes.txt": ""}, False),
    ],
)
def test_runs_are_known_by_what_they_hold(files: dict[str, str], is_ours: bool, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert is_run(tmp_path) == is_ours


def test_every_option_for_results_is_checked() -> None:
    """A new `--out` or `--output` has to go through `check_out`: each module that has one names a check."""
    checks = re.compile(r"\b(check_out|check_results)\(")
    checked_by = {"bench_cli.py": "run/measure.py", "distill_cli.py": "run.py", "profile_cli.py": "run/profile.py"}
    option = re.compile(r'"--(out|output|trace)"')
    found = []
    for path in sorted([*ROOT.glob("dynatree_bench/**/*.py"), *ROOT.glob("dynatree_core/*.py")]):
        text = path.read_text(encoding="utf-8")
        if option.search(text) and path.name != "cli.py":  # whose --output is read
            text += (path.parent / checked_by.get(path.name, path.name)).read_text(encoding="utf-8")
            assert checks.search(text), path
            found.append(path.name)
    assert {"bench_cli.py", "distill_cli.py", "profile_cli.py"} <= set(found)


def test_every_file_is_written_in_one_way() -> None:
    """Nothing else opens files to write, names aside where it is meant."""
    meant = {
        "writing.py": 2,  # the way itself, and a probe
        "streams.py": 1,  # the null device
        "records.py": 2,  # lines that are added to, and the torn one that is cut off
        "answers.py": 1,  # lines that are added to
        "tensors.py": 2,  # into a draft of `whole_file`
        "record.py": 1,  # a trace, which grows
        "memory.py": 1,  # a file of the kernel's
        "serve.py": 1,  # what a server that is measured prints
        "steps.py": 1,  # what a step in a process of its own prints
    }
    writes = re.compile(
        r"""\.write_(?:text|bytes)\(|open\(\s*["'](?:[wax]|r\+)|\.open\(["'](?:[wax]|r\+)|save_file\("""
    )
    for path in sorted([*ROOT.glob("dynatree_bench/**/*.py"), *ROOT.glob("dynatree_core/**/*.py")]):
        found = len(writes.findall(path.read_text(encoding="utf-8")))
        assert found <= meant.get(path.name, 0), path
