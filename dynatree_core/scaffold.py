"""`dynatree new-policy`: an installable package with a policy, its tests and a README, to start from.

The files in `templates/new_policy` are a complete package for a policy called `my_policy`; a new one is a copy of
them in which that name is replaced.
"""

from __future__ import annotations

import importlib.util
import keyword
import re
import shlex
import shutil
from pathlib import Path

import dynatree_core
from dynatree_core.errors import InputError
from dynatree_core.files import write_text
from dynatree_core.plugins import POLICIES, PRESETS, plugin_table

__all__ = ["next_steps", "policy_files", "write_policy"]

TEMPLATES = Path(__file__).parent / "templates" / "new_policy"
FILES = ("pyproject.toml", "README.md", "dynatree_my_policy.py", "tests/test_my_policy.py")


def write_policy(name: str, parent: Path) -> Path:
    """Write the package for a policy into a new folder.

    Args:
        name: the policy's name in stack strings; `-` stands for `_`.
        parent: an existing folder; the package's own is made in it.

    Returns:
        The package's folder, `dynatree-NAME`.

    Raises:
        InputError: the name cannot be used, or the folder cannot be made, as when there is one already.
    """
    name = _checked_name(name)
    folder = parent / f"dynatree-{_dashed(name)}"
    files = policy_files(name)
    try:
        folder.mkdir()
    except FileExistsError as error:
        raise InputError(
            f"a new policy needs a new folder, but '{folder}' is there already; choose another name or another --dir"
        ) from error
    except OSError as error:
        raise InputError(f"a new policy needs a new folder, but '{folder}' cannot be made: {error.strerror}") from error
    try:
        for file, text in files.items():
            path = folder / file
            path.parent.mkdir(exist_ok=True)
            write_text(path, text)
    except BaseException:  # a half package would be in the way of the next try
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def next_steps(folder: Path) -> str:
    """What to do with a package that was just written."""
    name = folder.name.removeprefix("dynatree-").replace("-", "_")
    return f"""{folder} is a package with the policy {name}. Install it, test it, see it listed, use it:

  cd {shlex.quote(str(folder))}
  python -m pip install -e ".[test]"
  python -m pytest
  dynatree policies
  dynatree generate --compare --policy "{name}+dynamic_depth" "Why is the sky blue?"

The rule is in dynatree_{name}.py: make it yours."""


def policy_files(name: str) -> dict[str, str]:
    """The files of the package for a policy of that name: path in its folder -> text."""
    spellings = {"my_policy": name, "my-policy": _dashed(name), "MyPolicy": _class_name(name)}

    def named(text: str) -> str:
        return re.sub("|".join(spellings), lambda found: spellings[found[0]], text)

    return {named(file): named((TEMPLATES / file).read_text(encoding="utf-8")) for file in FILES}


def _checked_name(name: str) -> str:
    """The policy's name in snake case.

    Raises:
        InputError: it is no snake-case identifier, or a policy, preset, module or class has it already.
    """
    name = name.replace("-", "_")
    if not re.fullmatch("[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise InputError(
            "a policy's name must be lower-case words of ASCII letters and digits joined by '_', such as 'wide_root', "
            f"and no keyword of Python; got '{name}'"
        )
    for kind, group in (("policy", POLICIES), ("preset", PRESETS)):
        if name in plugin_table(group):
            raise InputError(f"a policy's name must be new, but an installed {kind} is called '{name}'; choose another")
    if importlib.util.find_spec(f"dynatree_{name}") is not None:
        raise InputError(
            f"the policy's module would be 'dynatree_{name}', but there is one already; choose another name"
        )
    if _class_name(name) in [*dynatree_core.__all__, *keyword.kwlist]:
        raise InputError(f"the policy's class would be '{_class_name(name)}', which is taken; choose another name")
    return name


def _class_name(name: str) -> str:
    return "".join(map(str.capitalize, name.split("_")))


def _dashed(name: str) -> str:
    """As package indexes spell names."""
    return name.replace("_", "-")
