"""Does decoding slow down over the context more than attention itself does, and what do sinks and a window save?

Question: time of a pass, time per token and memory of the cache from a short context up to the default model's limit:
passes of DynaTree's runners beside the same model's bare forward pass over the same slots, autoregressive decoding
beside trees with `prompt_lookup`, a cache of all tokens beside `sinks=4,window=1024`.

Method: one long text, the source of Python's own argparse. Two caches are filled with it from context to context, and
everything is measured at each: passes of 1 and of 8 rows, then a few tokens by every way of decoding. All of it takes
turns, in rotating order, several times over in one process, at each context after a warm-up of all of it; medians are
shown, with the lowest and highest. Memory is that of the rows that were written: what is allocated and never touched
takes none. The machine is watched while it runs, because a busy one says nothing about speed.

Output: three tables, FOLDER/long-context.json with all that was measured, and FOLDER/long-context.svg drawn from it.

Command: python -m dynatree_bench.studies.long_context [--quick] [--contexts N,N,…] [--rounds N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dynatree_bench.run.machine import BUSY_PERCENT, LoadMeter, check_writable, idle_or_busy, provenance
from dynatree_core import InputError, LoadedModel, Session, TokenTree, load_model, run
from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.cli.exits import end_process
from dynatree_core.files.writing import whole_file, write_text
from dynatree_core.models import embedded
from dynatree_core.models.architectures import cache_argument
from dynatree_core.runners.runner import ModelRunner
from dynatree_core.tree.flatten import flatten

PROGRAM = "python -m dynatree_bench.studies.long_context"
DRAFTER = "prompt_lookup"
TREE_POLICY = "phase3"
WINDOW = "sinks=4,window=1024"
KEPT = {"all tokens": None, WINDOW: WINDOW}  # caches
# series of passes -> (rows, DynaTree's runner or None for the model's bare forward, cache)
PASSES = {
    "1 row, model alone": (1, None, "all tokens"),
    "1 row, eager": (1, "eager", "all tokens"),
    "1 row, packed": (1, "packed", "all tokens"),
    "8 rows, model alone": (8, None, "all tokens"),
    "8 rows, eager": (8, "eager", "all tokens"),
    "8 rows, packed": (8, "packed", "all tokens"),
    f"8 rows, packed, {WINDOW}": (8, "packed", WINDOW),
}
# series of generations -> (policy, cache)
GENERATIONS = {
    "autoregressive": ("autoregressive", "all tokens"),
    TREE_POLICY: (TREE_POLICY, "all tokens"),
    f"autoregressive, {WINDOW}": ("autoregressive", WINDOW),
    f"{TREE_POLICY}, {WINDOW}": (TREE_POLICY, WINDOW),
}


@attrs.frozen
class Plan:
    """How much is measured."""

    contexts: tuple[int, ...]  # tokens, ascending
    rounds: int
    max_new_tokens: int


Series = dict[str, dict[int, list[float]]]  # series -> tokens of context -> a number for each round


def _series() -> Series:
    return defaultdict(lambda: defaultdict(list))


@attrs.define(eq=False)
class Results:
    """What was measured."""

    provenance: dict[str, Any]
    passes: Series = attrs.field(factory=_series)  # ms per pass
    tokens: Series = attrs.field(factory=_series)  # ms per token
    accepted: Series = attrs.field(factory=_series)  # tokens per iteration
    overhead: Series = attrs.field(factory=_series)  # ms of an iteration outside the model's passes
    memory: Series = attrs.field(factory=_series)  # MiB of keys and values


def main() -> None:
    arguments = _parse_arguments()
    for name in ("long-context.svg", *(["long-context.json"] if arguments.source is None else [])):
        check_writable(arguments.out / name, PROGRAM)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if arguments.source is not None:
        results = Results(**json.loads(arguments.source.read_text(encoding="utf-8")))
    else:
        results = _measured(arguments)
        write_text(arguments.out / "long-context.json", json.dumps(attrs.asdict(results), indent=1))
    _show(results, console)
    draw(results, arguments.out / "long-context.svg")


def _measured(arguments: argparse.Namespace) -> Results:
    default = load_model(None, device="cpu", dtype="float32")
    limit: int = default.model.config.max_position_embeddings
    contexts = arguments.contexts or (512, 1024, 2048, 4096, 6144, limit)
    plan = Plan(_within(contexts, limit - arguments.max_new_tokens), arguments.rounds, arguments.max_new_tokens)
    if arguments.quick:
        plan = Plan((64, 256), rounds=1, max_new_tokens=4)
    meter = LoadMeter()
    results = measure(default, text_ids(default, max(plan.contexts)), plan)
    results.provenance |= {
        **provenance("dynatree_bench.studies.long_context", default.model.device),
        "machine": platform.machine(),
        "model": embedded.describe().name,
        "dtype": "float32",
        "plan": attrs.asdict(plan),
        "busy_percent": meter.meanwhile(),
    }
    return results


def _within(contexts: Sequence[int], longest: int) -> tuple[int, ...]:
    """Contexts behind which there is room to generate, each once.

    Raises:
        InputError: there is no such room.
    """
    if longest < 2:
        raise InputError(f"--max-new-tokens must leave 2 tokens of the context at least, got one that leaves {longest}")
    return tuple(dict.fromkeys(min(context, longest) for context in contexts))


def text_ids(default: LoadedModel, length: int) -> list[int]:
    """So many tokens of a text that is on every machine, repeated if it should not do."""
    assert default.tokenizer is not None, "the default model has a tokenizer"
    source = Path(argparse.__file__).read_text(encoding="utf-8")[: 8 * length]
    ids: list[int] = default.tokenizer(source, verbose=False).input_ids
    return (ids * (length // len(ids) + 1))[:length]


def measure(default: LoadedModel, text: list[int], plan: Plan) -> Results:
    """Everything at every context."""
    results = Results({})
    sources = {kept: _session(default, text, "autoregressive", option, plan) for kept, option in KEPT.items()}
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("measuring", total=len(plan.contexts) * (1 + plan.rounds))
        for context in plan.contexts:
            for kept, source in sources.items():
                _fill(source, text[: context - 1])
                results.memory[kept][context] = [_held(source)]
            for job in _jobs(default, text[:context], sources, plan, Results({})):  # warm-up: its numbers are dropped
                job()
            progress.advance(task)
            jobs = _jobs(default, text[:context], sources, plan, results)
            for i in range(plan.rounds):
                start = i * len(jobs) // plan.rounds
                for job in jobs[start:] + jobs[:start]:
                    job()
                progress.advance(task)
    return results


def _session(default: LoadedModel, text: list[int], policy: str, option: str | None, plan: Plan) -> Session:
    drafter = None if policy == "autoregressive" else DRAFTER
    return Session(
        default.model,
        drafter,
        text,
        policy=policy,
        cache=option,
        max_new_tokens=plan.max_new_tokens,
        eos_token_id=[],
        inherit_settings=False,
    )


@torch.inference_mode()
def _fill(source: Session, ids: list[int]) -> None:
    """Fill a session's cache up to there."""
    source.target.prefill(torch.tensor(ids[source.cache.length :]), source.cache)


def _held(source: Session) -> float:
    """MiB of the rows that a cache has written so far; a cache that moves writes each of its rows at most."""
    config = source.target.model.config
    per_row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * source.target.dtype.itemsize
    return float(min(source.cache.length, source.cache.capacity) * per_row) / 2**20


def _jobs(
    default: LoadedModel, text: list[int], sources: dict[str, Session], plan: Plan, results: Results
) -> list[Callable[[], None]]:
    """What there is to measure at one context; each job adds one number to its series."""
    context = len(text)

    def pass_job(series: str, rows: int, runner: str | None, kept: str) -> None:
        source = sources[kept]
        seconds = _bare_pass(default, source, rows) if runner is None else _our_pass(default, source, rows, runner)
        results.passes[series][context].append(1000 * seconds)

    def generation_job(series: str, policy: str, kept: str) -> None:
        report = _generation(default, text, sources[kept], policy, KEPT[kept], plan).report
        results.tokens[series][context].append(1000 * report.decode_seconds / report.num_new_tokens)
        results.overhead[series][context].append(1000 * report.overhead_seconds / report.num_iterations)
        results.accepted[series][context].append(report.num_new_tokens / report.num_iterations)

    passes = [lambda s=series, v=values: pass_job(s, *v) for series, values in PASSES.items()]
    generations = [lambda s=series, v=values: generation_job(s, *v) for series, values in GENERATIONS.items()]
    return [*passes, *generations]


@torch.inference_mode()
def _our_pass(default: LoadedModel, source: Session, rows: int, name: str) -> float:
    """Seconds of a verification pass over a tree of so many nodes, with its mask; nothing is committed."""
    tree, runner = _tree(rows), ModelRunner(default.model, source.clock, name=name)
    start = time.perf_counter()
    runner.forward(flatten([tree], [source.cache.next_place]), source.cache, stage="verify")
    seconds = time.perf_counter() - start
    source.cache.rollback()
    return seconds


@torch.inference_mode()
def _bare_pass(default: LoadedModel, source: Session, rows: int) -> float:
    """Seconds of the model's forward pass as anyone calls it: no mask and no tree, over the same rows of the cache."""
    assert isinstance(source.cache, TreeCache), "a cache that moves is not asked"
    first = source.cache.length
    source.cache.min_slots = 0  # of the mask of an earlier pass; here the model makes its own
    positions = torch.arange(first, first + rows)[None]
    start = time.perf_counter()
    default.model(
        input_ids=torch.zeros_like(positions), position_ids=positions, **{cache_argument(default.model): source.cache}
    )
    seconds = time.perf_counter() - start
    source.cache.rollback()
    return seconds


def _tree(nodes: int) -> TokenTree:
    """A root and below it two branches, as far as the nodes go."""
    tree = TokenTree.root(torch.zeros(1, dtype=torch.int64))
    while tree.num_nodes < nodes:
        parents = torch.arange(tree.last_level.start, tree.last_level.stop)
        parents = parents.repeat_interleave(2)[: min(2, nodes - tree.num_nodes)]
        tree = tree.grow(parents, torch.arange(parents.numel()), torch.zeros(parents.numel()))
    return tree


def _generation(
    default: LoadedModel, text: list[int], source: Session, policy: str, option: str | None, plan: Plan
) -> Any:
    """A few tokens behind a text whose rows are there already; the rows of the cache stay as they were."""
    session = _session(default, text, policy, option, plan)
    length = source.cache.length
    # a cache that keeps everything forgets the new rows again; one that moves is copied
    session.cache = source.cache if option is None else copy.deepcopy(source.cache)
    for _ in run(session):
        pass
    if option is None:
        source.cache.truncate(length)
    return session.result()


def _show(results: Results, console: Console) -> None:
    said = results.provenance
    versions = ", ".join(f"{name} {number}" for name, number in said["versions"].items())
    console.print(f"{versions}, {said['machine']}, {said['threads']} threads, {said['model']}, {said['dtype']}")
    tables = {
        "ms per pass": (results.passes, 0),
        f"ms per token, drafter {DRAFTER}": (results.tokens, 0),
        "tokens per iteration": (results.accepted, 2),
        "ms of an iteration outside the model": (results.overhead, 1),
        "MiB of keys and values": (results.memory, 0),
    }
    for title, (found, digits) in tables.items():
        console.print(_table(title, found, digits))
    console.print(idle_or_busy(said["busy_percent"]))


def _table(title: str, found: dict[str, dict[int, list[float]]], digits: int) -> Table:
    """A row for each series, a column for each context: median, and the range where there is one."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("tokens of context", no_wrap=True)
    for context in next(iter(found.values())):
        table.add_column(str(context), justify="right", no_wrap=True)
    for series, by_context in found.items():
        cells = []
        for values in by_context.values():
            cell = f"{statistics.median(values):.{digits}f}"
            if len(values) > 1:
                cell += f" ({min(values):.{digits}f}–{max(values):.{digits}f})"
            cells.append(cell)
        table.add_row(series, *cells)
    return table


# colours that people tell apart however they see colours (Okabe and Ito), and marks for print
STYLES = {
    "1 row, model alone": ("#56B4E9", "o", "--"),
    "1 row, eager": ("#0072B2", "o", ":"),
    "1 row, packed": ("#0072B2", "o", "-"),
    "8 rows, model alone": ("#E69F00", "s", "--"),
    "8 rows, eager": ("#D55E00", "s", ":"),
    "8 rows, packed": ("#D55E00", "s", "-"),
    f"8 rows, packed, {WINDOW}": ("#009E73", "v", "-"),
    "autoregressive": ("#0072B2", "o", "-"),
    TREE_POLICY: ("#D55E00", "s", "-"),
    f"autoregressive, {WINDOW}": ("#56B4E9", "o", "--"),
    f"{TREE_POLICY}, {WINDOW}": ("#009E73", "v", "--"),
    "all tokens": ("#D55E00", "s", "-"),
    WINDOW: ("#009E73", "v", "-"),
}


def draw(results: Results, path: Path) -> None:
    """Three panels over the context: passes, decoding, memory. Medians, with bars from lowest to highest."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "long_context"  # the same file for the same numbers
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 5.2), layout="constrained")
    panels = (
        (results.passes, "One verification pass", "time (ms)"),
        (results.tokens, f"Decoding, drafter {DRAFTER}", "time per token (ms)"),
        (results.memory, "Cache", "keys and values (MiB)"),
    )
    for axis, (found, title, unit) in zip(axes, panels, strict=True):
        for series, by_context in found.items():
            colour, mark, line = STYLES[series]
            contexts = [int(context) for context in by_context]
            middle = [statistics.median(values) for values in by_context.values()]
            below = [m - min(values) for m, values in zip(middle, by_context.values(), strict=True)]
            above = [max(values) - m for m, values in zip(middle, by_context.values(), strict=True)]
            axis.errorbar(
                contexts, middle, yerr=[below, above], label=series, color=colour, marker=mark, linestyle=line,
                markersize=5, linewidth=1.6, capsize=2, elinewidth=0.9,
            )  # fmt: skip
        axis.set(title=title, xlabel="context (tokens)", ylabel=unit, ylim=(0, None))
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=9)
    said = results.provenance
    busy = max(said["busy_percent"].values()) > BUSY_PERCENT
    figure.suptitle(
        f"{said['model']}, {said['dtype']}, {said['machine']} CPU, {said['threads']} threads, torch "
        f"{said['versions']['torch']}, transformers {said['versions']['transformers']}, {said['date']}"
        + (" (on a busy machine: provisional)" if busy else ""),
        fontsize=10,
    )
    with whole_file(path) as draft:
        figure.savefig(draft, metadata={"Date": None, "Description": PROGRAM})
    pyplot.close(figure)


def _parse_arguments() -> argparse.Namespace:
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m dynatree_bench.studies.long_context", description=description)
    parser.add_argument("--quick", action="store_true", help="two short contexts, once: to see that it runs")
    parser.add_argument(
        "--contexts",
        type=_ascending,
        metavar="N,N,…",
        help="tokens of context, ascending (default: 512, 1024, 2048, 4096, 6144 and the model's limit)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="times that everything is measured (default: 3)")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="default: 16")
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="FOLDER", help="where the results go (default: here)"
    )
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE.json", help="show and draw these results, measure nothing"
    )
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.max_new_tokens) < 1:
        parser.error("--rounds and --max-new-tokens must be at least 1")
    return arguments


def _ascending(text: str) -> tuple[int, ...]:
    contexts = tuple(map(int, text.split(",")))
    if contexts != tuple(sorted(set(contexts))) or contexts[0] < 2:
        raise ValueError(text)
    return contexts


if __name__ == "__main__":
    end_process(main)
