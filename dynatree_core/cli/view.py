"""`dynatree view`: traces in a page for the browser. It imports nothing that computes, so it answers at once."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import click
from rich.console import Console

from dynatree_core.errors import DynaTreeError, InputError
from dynatree_core.files.outputs import check_out
from dynatree_core.files.writing import write_text
from dynatree_core.trace.reading import read
from dynatree_core.trace.show import print_trace
from dynatree_core.trace.view import is_page, page_of

__all__ = ["view"]

MADE_BY = "`dynatree view`"
STDOUT = Path("-")


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("file2", required=False, type=click.Path(path_type=Path))
@click.option(
    "--out",
    metavar="PAGE",
    type=click.Path(path_type=Path),
    help="The page; '-' prints it.  [default: FILE with .html for its ending]",
)
@click.option("--open", "is_opened", is_flag=True, help="Open the page in a browser.")
@click.option("--terminal", "in_terminal", is_flag=True, help="Draw the trees in the terminal instead.")
def view(file: Path, file2: Path | None, out: Path | None, is_opened: bool, in_terminal: bool) -> None:
    """Write a page that shows a trace in a browser, or two of them side by side.

    FILE is what `--trace FILE` has written; with FILE2 the page says where the two runs part and compares their
    figures. The page is one file that loads nothing, so it can be kept and sent (docs/viewer.md).

    \b
    Examples:
      dynatree generate --trace run.jsonl "Why is the sky blue?"
      dynatree view run.jsonl --open
      dynatree view phase3.jsonl fixed.jsonl --out both.html
      dynatree view run.jsonl --terminal
    """
    if in_terminal:
        if file2 is not None or out is not None or is_opened:
            raise InputError("--terminal draws one trace, got FILE2, --out or --open besides; leave them out")
        console = Console(highlight=False)
        with console.capture() as drawn:  # rich would end the process where the output is a closed pipe
            print_trace(read(file), console)
        click.echo(drawn.get(), nl=False)
        return
    files = [file] if file2 is None else [file, file2]
    out = out or _page_of(file)
    if out == STDOUT and is_opened:
        raise InputError("--open must have a page in a file, got --out -; leave one of them out")
    if out != STDOUT:
        check_out(out, MADE_BY, is_page, is_file=True)
    text = page_of(*files)
    if out == STDOUT:
        click.echo(text, nl=False)
        return
    write_text(out, text)
    click.echo(str(out))
    if is_opened and not webbrowser.open(out.absolute().as_uri()):
        raise DynaTreeError(f"--open must have a browser, and none was found; the page is there: open {out} in one")


def _page_of(file: Path) -> Path:
    """The trace's name with another ending, in its folder."""
    plain = file.with_suffix("") if file.suffix == ".gz" else file
    return plain.with_suffix(".html")
