"""`dynatree new-policy` and `dynatree new-drafter`: an installable package with tests and a README, to start from.

The files in `templates/new_policy` are a complete package for a policy called `my_policy`, those in
`templates/new_drafter` one for a drafter called `my_drafter`. A new one is a copy in which that name is replaced.
"""

from __future__ import annotations

import importlib.util
import keyword
import re
import shlex
import shutil
from pathlib import Path

import attrs
import click

import dynatree_core
from dynatree_core.errors import InputError
from dynatree_core.files.writing import write_text
from dynatree_core.plugins.registry import DRAFTERS, POLICIES, PRESETS, plugin_table

__all__ = ["DRAFTER", "POLICY", "Kind", "new_drafter", "new_policy", "next_steps", "package_files", "write_package"]

TEMPLATES = Path(__file__).parents[1] / "templates"


@attrs.frozen(eq=False)
class Kind:
    """What a package is for."""

    word: str  # "policy" or "drafter"; the template's folder, files and names have it
    example: str  # a name
    groups: dict[str, str]  # entry-point groups in which the name must be new, and what is in them
    classes: tuple[str, ...]  # the template's classes, as endings of the plugin's own name
    commands: str  # how it is listed and used; {name} stands for the name

    @property
    def folder(self) -> Path:
        return TEMPLATES / f"new_{self.word}"

    @property
    def files(self) -> tuple[str, ...]:
        own = f"my_{self.word}"
        return ("pyproject.toml", "README.md", f"dynatree_{own}.py", f"tests/test_{own}.py")


POLICY = Kind(
    word="policy",
    example="wide_root",
    groups={POLICIES: "policy", PRESETS: "preset"},
    classes=("",),
    commands="""dynatree policies
  dynatree generate --compare --policy "{name}+dynamic_depth" "Why is the sky blue?\"""",
)
DRAFTER = Kind(
    word="drafter",
    example="last_words",
    groups={DRAFTERS: "drafter"},
    classes=("", "State"),
    commands="""dynatree drafters
  dynatree generate --compare --drafter {name} --policy "fixed(depth=3)" "Say ten times: I am a tree.\"""",
)


NAME = click.argument("name")
PARENT = click.option(
    "--dir",
    "parent",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=".",
    help="Where the package's folder is made.  [default: here]",
)


@click.command("new-policy")
@NAME
@PARENT
def new_policy(name: str, parent: Path) -> None:
    """Write an installable package dynatree-NAME with a policy NAME, its tests and a README.

    \b
    Examples:
      dynatree new-policy wide_root
      dynatree new-policy --dir ~/policies wide_root
    """
    click.echo(next_steps(POLICY, write_package(POLICY, name, parent)))


@click.command("new-drafter")
@NAME
@PARENT
def new_drafter(name: str, parent: Path) -> None:
    """Write an installable package dynatree-NAME with a drafter NAME, its tests and a README.

    \b
    Examples:
      dynatree new-drafter last_words
      dynatree new-drafter --dir ~/drafters last_words
    """
    click.echo(next_steps(DRAFTER, write_package(DRAFTER, name, parent)))


def write_package(kind: Kind, name: str, parent: Path) -> Path:
    """Write the package for a plugin into a new folder.

    Args:
        kind: POLICY or DRAFTER.
        name: the plugin's name in stack strings or for --drafter; `-` stands for `_`.
        parent: an existing folder; the package's own is made in it.

    Returns:
        The package's folder, `dynatree-NAME`.

    Raises:
        InputError: the name cannot be used, or the folder cannot be made, as when there is one already.
    """
    name = _checked_name(kind, name)
    folder = parent / f"dynatree-{_dashed(name)}"
    files = package_files(kind, name)
    try:
        folder.mkdir()
    except FileExistsError as error:
        raise InputError(
            f"a new {kind.word} needs a new folder, but '{folder}' is there already; choose another name or another "
            "--dir"
        ) from error
    except OSError as error:
        raise InputError(
            f"a new {kind.word} needs a new folder, but '{folder}' cannot be made: {error.strerror}"
        ) from error
    try:
        for file, text in files.items():
            path = folder / file
            path.parent.mkdir(exist_ok=True)
            write_text(path, text)
    except BaseException:  # a half package would be in the way of the next try
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def next_steps(kind: Kind, folder: Path) -> str:
    """What to do with a package that was just written."""
    name = folder.name.removeprefix("dynatree-").replace("-", "_")
    return f"""{folder} is a package with the {kind.word} {name}. Install it, test it, see it listed, use it:

  cd {shlex.quote(str(folder))}
  python -m pip install -e ".[test]"
  python -m pytest
  {kind.commands.format(name=name)}

The rule is in dynatree_{name}.py: make it yours."""


def package_files(kind: Kind, name: str) -> dict[str, str]:
    """The files of the package for a plugin of that name: path in its folder -> text."""
    own = f"my_{kind.word}"
    spellings = {own: name, _dashed(own): _dashed(name), _class_name(own): _class_name(name)}

    def named(text: str) -> str:
        return re.sub("|".join(spellings), lambda found: spellings[found[0]], text)

    return {named(file): named((kind.folder / file).read_text(encoding="utf-8")) for file in kind.files}


def _checked_name(kind: Kind, name: str) -> str:
    """The plugin's name in snake case.

    Raises:
        InputError: it is no snake-case identifier, or a plugin, module or class has it already.
    """
    name = name.replace("-", "_")
    if not re.fullmatch("[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise InputError(
            f"a {kind.word}'s name must be lower-case words of ASCII letters and digits joined by '_', such as "
            f"'{kind.example}', and no keyword of Python; got '{name}'"
        )
    for group, word in kind.groups.items():
        if name in plugin_table(group):
            raise InputError(
                f"a {kind.word}'s name must be new, but an installed {word} is called '{name}'; choose another"
            )
    if importlib.util.find_spec(f"dynatree_{name}") is not None:
        raise InputError(
            f"the {kind.word}'s module would be 'dynatree_{name}', but there is one already; choose another name"
        )
    for ending in kind.classes:
        taken = _class_name(name) + ending
        if taken in [*dynatree_core.__all__, *keyword.kwlist]:
            raise InputError(f"the {kind.word}'s class would be '{taken}', which is taken; choose another name")
    return name


def _class_name(name: str) -> str:
    return "".join(map(str.capitalize, name.split("_")))


def _dashed(name: str) -> str:
    """As package indexes spell names."""
    return name.replace("_", "-")
