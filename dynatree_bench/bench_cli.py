"""`dynatree bench`: experiments and studies as commands, with the same options.

What needs torch is imported when something runs, so that help and `list` come at once; a study's own help imports it.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click
from rich import box
from rich.console import Console
from rich.table import Table

from dynatree_bench.run.experiments import EXPERIMENTS, REFERENCE, USELESS, Experiment, Form
from dynatree_bench.studies.names import studies
from dynatree_core.advice import pip_install
from dynatree_core.cli import console
from dynatree_core.cli.checks import check_names
from dynatree_core.cli.completion import complete_drafter, complete_model, complete_policy
from dynatree_core.cli.loading import USUAL_DRAFTERS
from dynatree_core.cli.option_types import CountOrAll
from dynatree_core.cli.recorded import Recorded
from dynatree_core.errors import InputError, PluginLoadError

if TYPE_CHECKING:
    from dynatree_bench.run.measure import Options
    from dynatree_bench.run.pairs import Models, Pair
    from dynatree_bench.run.records import Results
    from dynatree_bench.studies.study import Found

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


class _Group(click.Group):
    """Experiments and studies by name; a study is imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *studies()]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        found = super().get_command(ctx, name)
        return found if found is not None or name not in studies() else _study_command(name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own = [(name, command.get_short_help_str(100)) for name, command in sorted(self.commands.items())]
        for title, rows in (("Commands", own), ("Studies, with a measurement of their own", [*studies().items()])):
            with formatter.section(title):
                formatter.write_dl(rows)


@click.group(cls=_Group, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def bench(context: click.Context) -> None:
    """Measure speed and acceptance: the published experiments and other studies, each one command.

    \b
    Examples:
      dynatree bench list
      dynatree bench main --quick
      dynatree bench main --target ./big --drafter ./small --workload prompts.jsonl --max-new-tokens 200
      dynatree bench rehearse --policy phase1 --policy cost_aware
      dynatree bench ablation --out results/ablation
      dynatree bench report results/ablation
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


_MODELS = ("target", "drafters", "synthetic", "device", "dtype", "layers", "quantise")
_OPTIONS = [
    click.Option(
        ["--target"],
        metavar="ID|PATH",
        shell_complete=complete_model,
        help="Model that is measured.  [default: the embedded one]",
    ),
    click.Option(
        ["--drafter", "drafters"],
        metavar="NAME|ID|PATH",
        shell_complete=complete_drafter,
        multiple=True,
        help="A registered drafter (see `dynatree drafters`), a model with the target's tokens, or `noise` or "
        f"`random`, which are never right; may be repeated.  [default: {USUAL_DRAFTERS}]",
    ),
    click.Option(
        ["--synthetic"],
        metavar="SHAPE[:A[:B]]",
        help="Instead, random models of this shape with a random text: a share A of first drafts is right.",
    ),
    click.Option(["--device"], help="cpu, cuda or cuda:N.  [default: CUDA where there is any]"),
    click.Option(
        ["--dtype"],
        type=click.Choice(["auto", "float64", "float32", "bfloat16", "float16"]),
        help="auto: float32 on the CPU, the checkpoint's own on CUDA.  [default: auto, of fixed-width bfloat16]",
    ),
    click.Option(["--layers"], type=click.IntRange(min=1), metavar="N", help="Only the target's first layers."),
    click.Option(["--quantise"], metavar="NAME", help="Quantise the target by this library and method."),
    click.Option(["--threads"], type=click.IntRange(min=1), metavar="N", help="Of the CPU.  [default: all]"),
    click.Option(
        ["--policy", "policies"],
        metavar="STACK",
        shell_complete=complete_policy,
        multiple=True,
        help="Measured in place of the experiment's own; may be repeated. Axes in braces: fixed(depth={base_depth}).",
    ),
    click.Option(["--only"], metavar="METHOD", multiple=True, help="Keep to this method; may be repeated."),
    click.Option(["--rivals", "with_rivals"], is_flag=True, help="Run flashspec, economize and dejavuu too."),
    click.Option(["--compile", "with_compile"], is_flag=True, help="Run transformers' compiled static cache too."),
    click.Option(
        ["--workload", "workloads"],
        metavar="NAME|FILE|ID",
        multiple=True,
        help="built-in, a file or folder of any kind (docs/files.md), wikitext-2, pg19, spec-bench, humaneval, gsm8k, "
        "NAME=FILE, or a data set on the hub; may be repeated.",
    ),
    click.Option(["--num-prompts"], type=CountOrAll(), metavar="N|all", help="Prompts of each workload."),
    click.Option(["--column"], metavar="NAME", help="Column of the prompts, where a workload has several."),
    click.Option(
        ["--category", "categories"], metavar="NAME", multiple=True, help="Prompts of it only; may be repeated."
    ),
    click.Option(
        ["--turns", "is_played"], is_flag=True, help="Play conversations: each of the user's turns is a prompt."
    ),
    click.Option(["--max-new-tokens"], type=_Counts(), metavar="N[,N…]", help="Tokens to generate at most."),
    click.Option(["--prompt-tokens"], type=_Counts(), metavar="N[,N…]", help="Cut prompts to so many tokens."),
    click.Option(["--repeats"], type=click.IntRange(min=1), help="Of each prompt, or of each pass."),
    click.Option(
        ["--seed"],
        type=int,
        help="Picks the prompts at random, and is that of torch's generator.  [default: 0, and the first prompts]",
    ),
    click.Option(
        ["--chat/--raw", "is_chat"],
        default=None,
        help="Wrap prompts in the chat template, or not.  [default: requests, where there is one]",
    ),
    click.Option(["--ignore-eos"], is_flag=True, help="Do not stop where the model would."),
    click.Option(
        ["--replay", "with_replay"], is_flag=True, help="Ask the drafter about each token of the outputs too."
    ),
    click.Option(
        ["--trace", "trace_file"],
        type=click.Path(dir_okay=False),
        metavar="FILE",
        help="Record every iteration of DynaTree's generations in FILE (docs/trace.md).",
    ),
    click.Option(["--trace-private", "is_trace_private"], is_flag=True, help="Leave the prompts out of the trace."),
    click.Option(
        ["--time-limit"],
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        help="Begin no prompt that would probably end later.  [default: with --quick 90, after one of each kind]",
    ),
    click.Option(
        ["--quick", "is_quick"],
        is_flag=True,
        help="Small sizes, prompts of three kinds: a minute or two on the default model.",
    ),
    click.Option(
        ["--report/--no-report", "with_report"],
        default=True,
        help="Write tables and figures when it has ended.  [default]",
    ),
    click.Option(
        ["--out"],
        type=click.Path(file_okay=False, path_type=Path),
        help=f"Folder of the results; a run that was cut off goes on there.  [default: {DEFAULT_OUT}/NAME]",
    ),
]


_OF_STUDIES = [  # no experiment has them
    click.Option(
        ["--steps"],
        metavar="NAME[,NAME…]",
        callback=lambda context, option, given: given and tuple(name.strip() for name in given.split(",")),
        help="Run these steps.  [default: all]",
    ),
    click.Option(["--plan", "is_plan"], is_flag=True, help="Print the steps with their bounds of time, and run none."),
    click.Option(
        ["--batch-size", "batch_sizes"], type=_Counts(), metavar="N[,N…]", help="Sequences that are decoded at once."
    ),
]

# those that every study understands
_ALWAYS = ("is_quick", "threads", "seed", "with_report", "out")
_PARTS = {"picks": ("column", "categories", "is_played")}  # an option of a study that is several here


def _command(name: str, text: str, options: Iterable[click.Option], run: Callable[..., int]) -> click.Command:
    return click.Command(name, callback=run, help=text, params=list(options))


def _experiment_command(experiment: Experiment) -> click.Command:
    text = f"{experiment.question}\n\nFull form: {_sizes(experiment.full)}."
    return _command(experiment.name, text, _OPTIONS, lambda **given: _run([experiment.name], **given))


def _study_command(name: str) -> click.Command:
    _need_libraries()
    from dynatree_bench.studies.study import find_study

    names = {part for option in find_study(name).options for part in _PARTS.get(option, (option,))} | {*_ALWAYS}
    options = [option for option in (*_OPTIONS, *_OF_STUDIES) if option.name in names]
    return _command(name, studies()[name], options, lambda **given: _run_study(name, **given))


def _run_study(name: str, *, out: Path | None, with_report: bool, threads: int | None, **given: Any) -> int:
    from dynatree_bench.data.workloads import Picks
    from dynatree_bench.run.pairs import Models
    from dynatree_bench.studies.study import Asked, find_study, run_study

    if threads is not None:
        _set_threads(threads)
    known = {key: value for key, value in given.items() if value not in (None, ())}
    models = Models(**{field: known.pop(field) for field in _MODELS if field in known})
    _check_drafters(models.drafters)
    picks = Picks(known.pop("column", None), known.pop("categories", ()), known.pop("is_played", False), given["seed"])
    out = out or DEFAULT_OUT / (f"{name}-quick" if given["is_quick"] else name)
    asked = Asked(models, out, picks=picks, **known)
    study = find_study(name)
    if asked.is_plan and study.plan is not None:
        click.echo("\n".join(study.plan(asked)))
        return 0
    with console.warnings_in_one_line():
        found = run_study(name, asked, command=_typed())
    _show(found)
    if with_report:
        from dynatree_bench.studies.study import write_report as write

        click.echo(f"tables and figures of it: {write(found, out / 'report')}")
    return 1 if study.is_bad(found.found) else 0


def _show(found: Found) -> None:
    """Print the tables of a study."""
    from dynatree_bench.report.tables import for_terminal

    printed = Console(width=None if sys.stdout.isatty() else 150, highlight=False, markup=False)
    for table in found.tables:
        printed.print(for_terminal(table))
        if table.note:
            printed.print(table.note + "\n")
    for sentence in found.sentences:
        click.echo(sentence)


def _typed() -> str:
    return shlex.join(["dynatree", *sys.argv[1:]])


def _set_threads(number: int) -> None:
    import torch

    torch.set_num_threads(number)


def _run_all(**given: Any) -> int:
    return _run(list(EXPERIMENTS), **given)


@bench.command("report")
@click.argument("place", metavar="FOLDER|FILE", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Where it goes.  [default: FOLDER/report]"
)
def write_report(place: Path, out: Path | None) -> int:
    """Write tables and figures of a run or a study, or of all runs in a folder."""
    from dynatree_bench.report.page import report
    from dynatree_bench.studies import study

    with console.spinner("drawing"):
        if place.is_file() or (place / study.RESULTS).exists():
            found = study.read_found(place)
            page = study.write_report(found, out or (place.parent if place.is_file() else place) / "report")
        else:
            page = report(place, out)
    click.echo(page)
    return 0


@bench.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of a table.")
def list_experiments(as_json: bool) -> None:
    """List the experiments with their sizes, and the studies with their questions."""
    if as_json:
        found = [_described(experiment) for experiment in EXPERIMENTS.values()]
        found += [{"name": name, "question": question} for name, question in studies().items()]
        click.echo(json.dumps(found, indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("name", no_wrap=True)
    table.add_column("what it asks, and of what", overflow="fold")
    for experiment in EXPERIMENTS.values():
        methods = ", ".join(method.policy or method.name for method in experiment.methods)
        lines = [experiment.question, methods, f"full: {_sizes(experiment.full)}", f"quick: {_sizes(experiment.quick)}"]
        table.add_row(experiment.name, "\n".join(lines), end_section=True)
    for name, question in studies().items():
        table.add_row(name, question, end_section=True)
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
    threads: int | None,
    is_quick: bool,
    with_report: bool,
    trace_file: str | None,
    is_trace_private: bool,
    **given: Any,
) -> int:
    recorded = Recorded(trace_file, is_trace_private)
    _check_drafters(given["drafters"])
    _need_libraries(with_report=with_report)
    from dynatree_bench.data.workloads import Picks
    from dynatree_bench.run.measure import Options, check_results, run_experiment
    from dynatree_bench.run.pairs import Models

    if threads is not None:
        _set_threads(threads)
    if given["synthetic"] is not None and given["target"] is not None:
        raise click.UsageError("give either --target or --synthetic", click.get_current_context())
    asked = {field: given.pop(field) for field in _MODELS}
    given = {name: value or None if isinstance(value, tuple) else value for name, value in given.items()}
    given["picks"] = Picks(given.pop("column"), given.pop("categories") or (), given.pop("is_played"), given["seed"])
    known = {name: value for name, value in given.items() if value is not None}

    def of_models(name: str) -> Models:
        experiment = EXPERIMENTS[name]
        usual = {"drafters": experiment.drafters if asked["synthetic"] is None else (), "dtype": experiment.dtype}
        return Models(**{field: value or usual.get(field) for field, value in asked.items()})

    def of_options(name: str) -> Options:
        models = of_models(name)
        return Options(quick=is_quick, models=models.settings(), drafters=models.drafters, **known)

    _check({name: of_options(name) for name in names})
    is_bad = False
    for name in names:
        check_results(_folder(out, name, names, is_quick))
    recorded.check()
    pairs: dict[Models, Pair] = {}
    with recorded, console.warnings_in_one_line():
        for name in names:
            folder, models, options = _folder(out, name, names, is_quick), of_models(name), of_options(name)
            if models not in pairs:
                pairs = {models: _load(models, options.seed)}  # one at a time is kept
                trace = recorded.open(pairs[models].target.tokenizer)
                pairs[models] = attrs.evolve(pairs[models], trace=trace)
            try:
                results = run_experiment(
                    name, pairs[models], folder, options, command=_typed(),
                    say=lambda message: console.complain("note", message),
                )  # fmt: skip
            except KeyboardInterrupt:
                console.complain("note", f"what is done is in {folder}; the same command goes on from there")
                raise
            except InputError as error:
                if len(names) == 1:
                    raise
                console.complain("error", f"{name}: {error}")  # such as a data set that is not here
                is_bad = True
                continue
            is_bad |= _summarise(results, is_quick=is_quick)
            _report(results, with_report=with_report)
    return 1 if is_bad else 0


def _need_libraries(*, with_report: bool = True) -> None:
    """Refuse to begin without what would be missed after the run.

    Raises:
        PluginLoadError: a library is not installed.
    """
    try:
        import dynatree_bench.run.measure

        if with_report:
            import dynatree_bench.report.figures  # noqa: F401  # needs matplotlib
    except ModuleNotFoundError as error:
        raise PluginLoadError(
            f"`dynatree bench` needs {error.name}, which is not installed: {pip_install('dynatree[bench]')}"
        ) from error


def _check_drafters(names: Iterable[str]) -> None:
    for name in names:
        if name not in USELESS:
            check_names(drafter=name)


def _check(options: dict[str, Options]) -> None:
    """Find before a model is loaded what is wrong with the methods; of several experiments one may go without."""
    from dynatree_bench.run.measure import checked_methods

    errors = []
    for name, own in options.items():
        try:
            checked_methods(name, own)
        except InputError as error:
            errors.append(error)
    if len(errors) == len(options):
        raise errors[0]


def _folder(out: Path | None, name: str, names: list[str], is_quick: bool) -> Path:
    if out is not None:
        return out / name if len(names) > 1 else out
    return DEFAULT_OUT / (f"{name}-quick" if is_quick else name)


def _load(models: Models, seed: int) -> Pair:
    logging.getLogger("transformers").setLevel(logging.ERROR)  # its notices would stand between ours
    with console.spinner("loading the models") as progress:
        return models.load(seed=seed, progress=progress)


def _summarise(results: Results, *, is_quick: bool) -> bool:
    """Say what there is now, on stdout; whether an output of ours is wrong or missing."""
    from dynatree_bench.report.memory_share import memory_sentence
    from dynatree_bench.report.statistics import lowest_speedup

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
    claim = EXPERIMENTS[results.info.experiment].claim
    if claim is not None and (lowest := lowest_speedup(results, claim.policies)) is not None:
        click.echo(
            f"lowest speedup of a stack with {' or '.join(sorted(claim.policies))}: {lowest[0]:.3f} ({lowest[1]}, "
            f"{lowest[2]}); at least {claim.least} is to be shown"
        )
        is_bad |= lowest[0] < claim.least and not is_quick  # a quick form measures too little to judge
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
    bench.add_command(_experiment_command(_experiment))
_ALL = "Run every experiment, one after another; --out is the folder of their folders."
bench.add_command(_command("all", _ALL, _OPTIONS, _run_all))
