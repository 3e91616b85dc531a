"""`dynatree hf-folder`: what is wrong in its arguments is found before a model is loaded."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from dynatree_core.cli.checks import CHECKED, check_names, check_settings, checkable
from dynatree_core.cli.completion import complete_drafter
from dynatree_core.cli.loading import USUAL_DRAFTERS, load, usual_drafter
from dynatree_core.cli.options import POLICY, TARGET
from dynatree_core.errors import InputError, ParameterError, nearest_match
from dynatree_core.files.folders import expanded
from dynatree_core.models import embedded
from dynatree_core.plugins.registry import check_runner_name
from dynatree_core.plugins.spec import format_stack, parse_stack

if TYPE_CHECKING:
    from dynatree_core.drafters.base import Drafter

__all__ = ["hf_folder"]

OPTIONS = (*CHECKED, "on_error")  # of a session, those that can be written down


@click.command("hf-folder")
@click.argument("out", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@TARGET
@click.option(
    "--drafter",
    metavar="NAME",
    shell_complete=complete_drafter,
    show_default=USUAL_DRAFTERS,
    help="Registered drafters joined by '+' (see `dynatree drafters`).",
)
@POLICY
@click.option(
    "--option",
    "options",
    metavar="NAME=VALUE",
    multiple=True,
    help=f"Of every generation: {', '.join(OPTIONS)}; may be repeated.",
)
@click.option("--link", "is_linked", is_flag=True, help="Link to the target's weights instead of copying them.")
def hf_folder(
    out: Path, target: str | None, drafter: str | None, policy: str, options: tuple[str, ...], is_linked: bool
) -> None:
    """Write a model's folder that decodes by trees wherever transformers loads it with trust_remote_code.

    DIR gets the target's files and a program that stands in for `model.generate`, with the drafter and the policy
    chosen here. So pipelines, `transformers serve`, lm-eval and others use trees without a line of code
    (docs/use-it-from.md).

    \b
    Examples:
      dynatree hf-folder smollm2-trees
      dynatree hf-folder trees --target ./model --policy "fixed(depth=4)" --link
      dynatree hf-folder trees --target ./model --drafter "distilled(path='drafter')" --option on_error=fallback
    """
    drafter = drafter or usual_drafter(target)
    check_names(policy=policy, drafter=drafter)
    chosen_options = dict(map(_option, options))
    is_embedded = target in (None, "default")
    if is_embedded:
        embedded.check_early()
    from dynatree_core.engine.session import Session
    from dynatree_core.hf.export import Chosen, check_place, write_folder
    from dynatree_core.models.load import model_folder

    check_place(out, None if target is None else expanded(target))
    settings = checkable(chosen_options)
    source = check_settings(target=target, drafter=drafter, policy=policy, device="cpu", **settings)
    chosen = Chosen(_spelt_out(drafter, source), policy, chosen_options)
    loaded = load(target, "cpu", "auto")
    # a model or a drafter that does not fit is refused here, and not when the folder is used
    Session(loaded.model, chosen.drafter, [0], policy=policy, max_new_tokens=1, **chosen_options)
    name = embedded.describe().name if is_embedded else str(target)
    write_folder(out, model_folder(target), name, chosen, is_linked=is_linked)
    click.echo(f"{out} holds {name} with drafter {chosen.drafter} and policy {policy}; load it with")
    click.echo(f"  AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)")


def _option(text: str) -> tuple[str, Any]:
    """NAME=VALUE, where the value is a number, None or a text."""
    name, equals, value = text.partition("=")
    if name not in OPTIONS:
        raise ParameterError(
            f"an --option must be one of {', '.join(OPTIONS)}, got '{name}'{nearest_match(name, OPTIONS)}"
        )
    if not equals:
        raise ParameterError(f"an --option must be written NAME=VALUE, got '{text}'")
    try:
        read: Any = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        read = value  # a word, such as fallback
    if name == "runner":
        check_runner_name(read)
    if name == "on_error" and read not in ("raise", "fallback"):
        raise ParameterError(f"on_error must be one of raise, fallback, got '{value}'")
    return name, read


def _spelt_out(drafter: str, source: Drafter | None) -> str:
    """The drafter as it can be named from any folder.

    Raises:
        InputError: a model, which no name in a stack stands for.
    """
    if source is None:
        raise InputError(
            f"the folder's drafter must be a registered one or a folder made by `dynatree distill`, got the model "
            f"'{drafter}'; choose one, and hand the model over in a call: model.generate(..., drafter=MODEL)"
        )
    import torch

    folder = expanded(drafter)
    if any(own.folder == folder for own in source.own_weights(torch.device("cpu"))):  # a student's, named by it alone
        return f"distilled(path={str(folder.absolute())!r})"
    specs = [
        attrs.evolve(spec, parameters={**spec.parameters, "path": str(expanded(path).absolute())})
        if isinstance(path := spec.parameters.get("path"), str)
        else spec
        for spec in parse_stack(drafter)
    ]
    return format_stack(specs)
