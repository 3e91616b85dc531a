"""`dynatree bench`: the experiments as commands.

What needs torch is imported when an experiment runs, so that help and `list` come at once.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from dynatree_bench.run.experiments import EXPERIMENTS, REFERENCE, Experiment, Form
from dynatree_core.advice import pip_install
from dynatree_core.cli import console
from dynatree_core.cli.checks import check_names
from dynatree_core.cli.completion import complete_drafter, complete_model, complete_policy
from dynatree_core.cli.model_options import USUAL_DRAFTERS
from dynatree_core.cli.prompt_options import CountOrAll
from dynatree_core.errors import InputError, PluginLoadError

if TYPE_CHECKING:
    from dynatree_bench.run.measure import Options
    from dynatree_bench.run.pairs import Pair
    from dynatree_bench.run.records import Results

__all__ = ["bench"]

DEFAULT_OUT = Path("bench-results")


class _Counts(click.ParamType):
    """Numbers of at least 1, separated by commas."""

    name = "counts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        numbers = [part.strip() for part in str(value).split(",")]
        if not all(number.isdecimal() and int(number) >= 1 for number in numbers):
            self.fail(f"must be numbers of at least 1 separated by commas, got {value!r}", param, ctx)
        return tuple(map(int, numbers))


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def bench(context: click.Context) -> None:
    """Measure speed and acceptance: the published experiments, each one command.

    \b
    Examples:
      dynatree bench list
      dynatree bench main --quick
      dynatree bench main --target ./big --drafter ./small --workload prompts.jsonl --max-new-tokens 200
      dynatree bench ablation --out results/ablation
      dynatree bench report results/ablation
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


_OPTIONS = [
    click.option(
        "--target",
        metavar="ID|PATH",
        shell_complete=complete_model,
        help="Model that is measured.  [default: the embedded one]",
    ),
    click.option(
        "--drafter",
        metavar="NAME|ID|PATH",
        shell_complete=complete_drafter,
        show_default=USUAL_DRAFTERS,
        help="A registered drafter (see `dynatree drafters`) or a model with the target's tokens.",
    ),
    click.option(
        "--synthetic",
        metavar="SHAPE[:A[:B]]",
        help="Instead, random models of this shape with a random text: a share A of first drafts is right.",
    ),
    click.option("--device", help="cpu, cuda or cuda:N.  [default: CUDA where there is any]"),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float64", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="auto: float32 on the CPU, the checkpoint's own on CUDA.",
    ),
    click.option(
        "--policy",
        "policies",
        metavar="STACK",
        shell_complete=complete_policy,
        multiple=True,
        help="Measured in place of the experiment's own; may be repeated. Axes in braces: fixed(depth={base_depth}).",
    ),
    click.option("--only", metavar="METHOD", multiple=True, help="Keep to this method; may be repeated."),
    click.option("--rivals", "with_rivals", is_flag=True, help="Run flashspec, economize and dejavuu too."),
    click.option("--compile", "with_compile", is_flag=True, help="Run transformers' compiled static cache too."),
    click.option(
        "--workload",
        "workloads",
        metavar="NAME|FILE|ID",
        multiple=True,
        help="built-in, a file or folder of any kind (docs/files.md), wikitext-2, pg19, spec-bench, humaneval, gsm8k, "
        "NAME=FILE, or a data set on the hub; may be repeated.",
    ),
    click.option("--num-prompts", type=CountOrAll(), metavar="N|all", help="Prompts of each workload."),
    click.option("--column", metavar="NAME", help="Column of the prompts, where a workload has several."),
    click.option(
        "--category", "categories", metavar="NAME", multiple=True, help="Prompts of it only; may be repeated."
    ),
    click.option(
        "--turns", "is_played", is_flag=True, help="Play conversations: each of the user's turns is a prompt."
    ),
    click.option("--max-new-tokens", type=_Counts(), metavar="N[,N…]", help="Tokens to generate at most."),
    click.option("--prompt-tokens", type=_Counts(), metavar="N[,N…]", help="Cut prompts to so many tokens."),
    click.option("--repeats", type=click.IntRange(min=1), default=1, show_default=True, help="Of each prompt."),
    click.option(
        "--seed",
        type=int,
        help="Picks the prompts at random, and is that of torch's generator.  [default: 0, and the first prompts]",
    ),
    click.option(
        "--chat/--raw",
        "is_chat",
        default=None,
        help="Wrap prompts in the chat template, or not.  [default: requests, where there is one]",
    ),
    click.option("--ignore-eos", is_flag=True, help="Do not stop where the model would."),
    click.option("--replay", "with_replay", is_flag=True, help="Ask the drafter about each token of the outputs too."),
    click.option(
        "--time-limit",
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        help="Begin no prompt that would probably end later.  [default: with --quick 90, after one of each kind]",
    ),
    click.option(
        "--quick", is_flag=True, help="Small sizes, prompts of three kinds: a minute or two on the default model."
    ),
    click.option(
        "--report/--no-report",
        "with_report",
        default=True,
        help="Write tables and figures when it has ended.  [default]",
    ),
    click.option(
        "--out",
        type=click.Path(file_okay=False, path_type=Path),
        help=f"Folder of the results; a run that was cut off goes on there.  [default: {DEFAULT_OUT}/NAME]",
    ),
]


def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def _add_experiment(experiment: Experiment) -> None:
    @bench.command(experiment.name, help=f"{experiment.question}\n\nFull form: {_sizes(experiment.full)}.")
    @_with_options
    def command(**given: Any) -> int:
        return _run([experiment.name], **given)


@bench.command("all")
@_with_options
def run_all(**given: Any) -> int:
    """Run every experiment, one after another; --out is the folder of their folders."""
    return _run(list(EXPERIMENTS), **given)


@bench.command("report")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Where it goes.  [default: FOLDER/report]"
)
def write_report(folder: Path, out: Path | None) -> int:
    """Write tables and figures of a run, or of all runs in a folder."""
    from dynatree_bench.report.page import report

    with console.spinner("drawing"):
        page = report(folder, out)
    click.echo(page)
    return 0


@bench.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of a table.")
def list_experiments(as_json: bool) -> None:
    """List the experiments with their sizes."""
    if as_json:
        click.echo(json.dumps([_described(experiment) for experiment in EXPERIMENTS.values()], indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("name", no_wrap=True)
    table.add_column("what it asks, and of what", overflow="fold")
    for experiment in EXPERIMENTS.values():
        methods = ", ".join(method.policy or method.name for method in experiment.methods)
        lines = [experiment.question, methods, f"full: {_sizes(experiment.full)}", f"quick: {_sizes(experiment.quick)}"]
        table.add_row(experiment.name, "\n".join(lines), end_section=True)
    Console(highlight=False, markup=False).print(table)


def _described(experiment: Experiment) -> dict[str, Any]:
    return {
        "name": experiment.name,
        "question": experiment.question,
        "methods": [
            {"name": method.name, "kind": method.kind, "policy": method.policy} for method in experiment.methods
        ],
        "full": _sizes(experiment.full),
        "quick": _sizes(experiment.quick),
    }


def _sizes(form: Form) -> str:
    parts = [f"{form.num_prompts or 'all'} prompts of {' and '.join(form.workloads)}"]
    if form.prompt_tokens != (None,):
        parts.append(f"cut to {_listed(form.prompt_tokens)} tokens")
    if form.points != ({},):
        parts.append(f"{len(form.points)} points of {', '.join(form.points[0])}")
    parts.append(f"{_listed(form.max_new_tokens)} new tokens")
    return ", ".join(parts)


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join(map(str, values))


def _run(
    names: list[str],
    *,
    out: Path | None,
    target: str | None,
    drafter: str | None,
    device: str | None,
    dtype: str,
    synthetic: str | None,
    with_report: bool,
    **given: Any,
) -> int:
    check_names(drafter=drafter)
    try:
        from dynatree_bench.data.workloads import Picks
        from dynatree_bench.run.measure import Options, check_results, run_experiment

        if with_report:
            import dynatree_bench.report.figures  # noqa: F401  # needs matplotlib: better missed now than after the run
    except ModuleNotFoundError as error:
        raise PluginLoadError(
            f"`dynatree bench` needs {error.name}, which is not installed: {pip_install('dynatree[bench]')}"
        ) from error

    given = {name: value or None if isinstance(value, tuple) else value for name, value in given.items()}
    given["picks"] = Picks(given.pop("column"), given.pop("categories") or (), given.pop("is_played"), given["seed"])
    options = Options(**{name: value for name, value in given.items() if value is not None})
    command = shlex.join(["dynatree", *sys.argv[1:]])
    _check(names, options)
    is_bad = False
    for name in names:
        check_results(_folder(out, name, names, options))
    with console.warnings_in_one_line():
        pair = _load(target, drafter, synthetic, device, dtype, options.seed)
        for name in names:
            folder = _folder(out, name, names, options)
            try:
                results = run_experiment(
                    name, pair, folder, options, command=command, say=lambda message: console.complain("note", message)
                )
            except KeyboardInterrupt:
                console.complain("note", f"what is done is in {folder}; the same command goes on from there")
                raise
            except InputError as error:
                if len(names) == 1:
                    raise
                console.complain("error", f"{name}: {error}")  # such as a data set that is not here
                is_bad = True
                continue
            is_bad |= _summarise(results)
            _report(results, with_report=with_report)
    return 1 if is_bad else 0


def _check(names: list[str], options: Options) -> None:
    """Find before a model is loaded what is wrong with the methods; of several experiments one may go without."""
    from dynatree_bench.run.measure import checked_methods

    errors = []
    for name in names:
        try:
            checked_methods(name, options)
        except InputError as error:
            errors.append(error)
    if len(errors) == len(names):
        raise errors[0]


def _folder(out: Path | None, name: str, names: list[str], options: Options) -> Path:
    if out is not None:
        return out / name if len(names) > 1 else out
    return DEFAULT_OUT / (f"{name}-quick" if options.quick else name)


def _load(
    target: str | None, drafter: str | None, synthetic: str | None, device: str | None, dtype: str, seed: int
) -> Pair:
    from dynatree_bench.run.pairs import load_pair, load_synthetic

    logging.getLogger("transformers").setLevel(logging.ERROR)  # its notices would stand between ours
    if synthetic is not None and target is not None:
        raise click.UsageError("give either --target or --synthetic", click.get_current_context())
    with console.spinner("loading the models") as progress:
        if synthetic is not None:
            return load_synthetic(synthetic, device=device, dtype=dtype, seed=seed)
        return load_pair(target, drafter, device=device, dtype=dtype, progress=progress)


def _summarise(results: Results) -> bool:
    """Say what there is now, on stdout; whether an output of ours is wrong or missing."""
    from dynatree_bench.report.memory_share import memory_sentence

    own = {method.name for method in results.info.methods if method.kind == "dynatree"}
    is_bad = False
    for method in results.info.methods:
        records = [record for record in results.records if record.method == method.name]
        different = sum(record.is_identical is False for record in records)
        failed = [record.error for record in records if record.error is not None]
        if different:
            click.echo(f"{method.name}: {different} of {len(records)} outputs differ from {REFERENCE.name} decoding")
        if failed:
            click.echo(f"{method.name}: {len(failed)} of {len(records)} outputs failed: {failed[0]}")
        is_bad |= method.name in own and bool(different or failed)
    if (sentence := memory_sentence(results)) is not None:
        click.echo(sentence)
    click.echo(f"{results.info.experiment}: {len(results.records)} outputs in {results.folder}")
    return is_bad


def _report(results: Results, *, with_report: bool) -> None:
    """Write tables and figures, or say how."""
    if not results.records:
        return
    if not with_report:
        again = shlex.join(["dynatree", "bench", "report", str(results.folder)])
        click.echo(f"tables and figures of them: {again}")
        return
    from dynatree_bench.report.page import report

    with console.spinner("drawing"):
        page = report(results.folder)
    click.echo(f"tables and figures of them: {page}")


for _experiment in EXPERIMENTS.values():
    _add_experiment(_experiment)
