"""A model's folder that decodes by trees wherever transformers loads it: what `dynatree hf-folder` writes.

It holds the target's own files, and `custom_generate/generate.py` with the drafter and the policy that were chosen. The
weights are copied byte for byte, or linked to. A record beside the program lists what was written, so that a later run
replaces that and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from dynatree_core.errors import InputError
from dynatree_core.files.outputs import check_out
from dynatree_core.files.writing import whole_file, write_text
from dynatree_core.hf.custom_generate import FOLDER

__all__ = ["Chosen", "check_place", "program", "write_folder"]

MADE_BY = "`dynatree hf-folder`"
LOOP = Path("custom_generate", "generate.py")
RECORD = Path("custom_generate", "dynatree.json")
NOTHING_CHOSEN = "DEFAULTS: dict[str, Any] = {}"  # the line of the built-in folder's program

_WEIGHTS = (".safetensors", ".bin")
# not the target's: its card speaks of other ways to load it, and its programs would be run in the place of ours
_LEFT_OUT = ("README.md", "dynatree_manifest.json")


@attrs.frozen
class Chosen:
    """What the folder's `model.generate` does where a call says nothing else."""

    drafter: str
    policy: str
    options: Mapping[str, Any] = attrs.field(factory=dict)


def check_place(out: Path, source: Path | None) -> None:
    """Refuse a folder that holds what is somebody else's, before anything is loaded.

    Args:
        out: where the folder is to be.
        source: the target's folder, if it is one.

    Raises:
        InputError: it is the target's own folder, or holds what was not made here.
    """
    if source is not None and source.exists() and out.exists() and out.samefile(source):
        raise InputError(
            f"what {MADE_BY} writes must go to another folder than the target's, got {out}; choose another"
        )
    check_out(out, MADE_BY, lambda folder: _written(folder) is not None)


def write_folder(out: Path, source: Path, target: str, chosen: Chosen, *, is_linked: bool = False) -> None:
    """Write the folder.

    Args:
        out: a folder that `check_place` allows.
        source: the target's files.
        target: what the target is called, for the README.
        chosen: drafter, policy and options.
        is_linked: link to the weights instead of copying them.

    Raises:
        OSError: naming the file that could not be written.
    """
    files = _files(source)
    (out / LOOP).parent.mkdir(parents=True, exist_ok=True)
    names = [*(file.name for file in files), "README.md", LOOP.as_posix(), RECORD.as_posix()]
    earlier = _written(out) or []
    record = {"made_by": MADE_BY, "target": target, **attrs.asdict(chosen), "files": sorted({*names, *earlier})}
    write_text(out / RECORD, json.dumps(record, indent=2) + "\n")  # first: what follows is known to be ours
    for name in earlier:
        old = out / name
        if name != RECORD.as_posix() and (old.is_symlink() or old.is_file()):
            old.unlink()  # a link is not written through
    for file in files:
        _take(file, out / file.name, is_linked=is_linked and file.suffix in _WEIGHTS)
    write_text(out / LOOP, program(chosen))
    write_text(out / "README.md", _readme(target, chosen, is_linked))
    write_text(out / RECORD, json.dumps({**record, "files": names}, indent=2) + "\n")


def program(chosen: Chosen) -> str:
    """The built-in folder's program, with other defaults."""
    text = Path(FOLDER, LOOP).read_text(encoding="utf-8")
    assert NOTHING_CHOSEN in text, f"{LOOP} must have the line {NOTHING_CHOSEN}"
    return text.replace(NOTHING_CHOSEN, NOTHING_CHOSEN.replace("{}", repr(attrs.asdict(chosen))))


def _written(folder: Path) -> list[str] | None:
    """The files that an earlier run has written there, relative to the folder; None where there was none."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("made_by") != MADE_BY:
        return None
    # a record that somebody has changed must not reach beyond the folder
    names = [Path(name) for name in record.get("files", ()) if isinstance(name, str)]
    return [name.as_posix() for name in names if not name.is_absolute() and ".." not in name.parts]


def _files(source: Path) -> list[Path]:
    """What belongs to the target: its top-level files but those that are left out."""
    return sorted(
        file
        for file in source.iterdir()
        if file.is_file() and file.suffix != ".py" and not file.name.startswith(".") and file.name not in _LEFT_OUT
    )


def _take(file: Path, place: Path, *, is_linked: bool) -> None:
    if is_linked:
        place.symlink_to(os.path.realpath(file))
        return
    if file.name.endswith("config.json"):
        settings = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(settings, dict) and settings.pop("auto_map", None) is not None:
            # with trust_remote_code transformers would load the model's own program, which is not the one checked here
            write_text(place, json.dumps(settings, indent=2) + "\n")
            return
    with whole_file(place) as draft:
        shutil.copyfile(file, draft)


def _readme(target: str, chosen: Chosen, is_linked: bool) -> str:
    options = ", ".join(f"`{name}={value!r}`" for name, value in chosen.options.items()) or "none"
    weights = "links to those of the target, which must stay where they are" if is_linked else "those of the target"
    return f"""# {target}, decoded by trees

The files of `{target}`, and in `custom_generate/` a program by which transformers decodes with DynaTree.
`model.generate` returns the tokens that it returns for `{target}` itself, in fewer passes of the model.

| | |
| --- | --- |
| drafter | `{chosen.drafter}` |
| policy | `{chosen.policy}` |
| options | {options} |
| weights | {weights} |

It needs the package `dynatree` in the environment:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
model.generate(**tokenizer("The sky is", return_tensors="pt"), max_new_tokens=20)
```

FOLDER is this folder. A call may choose otherwise: `model.generate(..., drafter="prompt_lookup", policy="fixed")`.
Without `trust_remote_code=True` the model is loaded without trees. `dynatree hf-folder` has written these files, and
replaces them when it writes here again.
"""
