"""Tables (Markdown and CSV) and figures from the results of a run alone.

    from dynatree_bench.report.page import report
    report(Path("bench-results/main"))

docs/benchmarks.md says how to read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from dynatree_bench.data.published import published
from dynatree_bench.report.formulas import best_chain, best_tree_speedup, chain_tokens
from dynatree_bench.report.memory_share import memory_sentence, memory_share
from dynatree_bench.report.oracle import CostTable, cost_table, score
from dynatree_bench.report.shapes import compared
from dynatree_bench.report.statistics import (
    BASELINE,
    HF_BASELINE,
    MIN_BIN,
    Estimate,
    Share,
    Summary,
    acceptance_by_depth,
    acceptance_by_rank,
    by_method,
    calibration,
    groups,
    in_order,
    is_drafting,
    over_length,
    pooled_ratio,
    rank_shares,
    replayed_texts,
    summaries,
)
from dynatree_bench.report.tables import Table, interval, shown, simple, write_lines, write_tables
from dynatree_bench.run.records import (
    INFO_FILE,
    OutputRecord,
    Results,
    ResultsError,
    is_run,
    read_results,
    run_warnings,
)
from dynatree_core import InputError, parse_stack
from dynatree_core.files.outputs import check_out
from dynatree_policies.fixed import Fixed
from dynatree_policies.linear import Linear

PAGE = "report.md"
HEADING = "# Benchmark results"  # how a page begins, by which a later report knows that it may replace it
DAGGER = "†"
ENOUGH_PROMPTS = 10  # for a bootstrap over them
MAX_RANKS = 6  # that a table shows
# names of all tables that a report may have
TABLES = (
    "pooled", "summary", "categories", "formulas", "worth", "oracle", "acceptance-by-rank", "acceptance-by-depth",
    "shapes", "calibration", "over-length",
)  # fmt: skip


@attrs.frozen
class _Column:
    """A quantity of a summary: its heading, and how it is shown and stored."""

    heading: str
    show: Callable[[Summary], str]
    data: tuple[tuple[str, Callable[[Summary], Any]], ...]


def report(folder: Path, out: Path | None = None) -> Path:
    """Write the tables and figures of a run, or of each run in a folder of runs.

    Args:
        folder: results of `dynatree bench`.
        out: where the report goes; None: a folder `report` beside the results.

    Returns:
        The page `report.md`; figures and CSV files are in folders beside it.

    Raises:
        ResultsError: there are no results, or they are not as the schema has them; the message names file and line.
        InputError: matplotlib is not installed.
    """
    out = out or folder / "report"
    check_out(out, "`dynatree bench report`", is_report)
    if (folder / INFO_FILE).exists() or not folder.is_dir():
        results = read_results(folder)
        if not results.records:
            raise ResultsError(f"a report needs outputs, and {folder} has none yet")
        return _report_run(results, out)
    runs = sorted(path.parent for path in folder.glob(f"*/{INFO_FILE}"))
    if not runs:
        raise ResultsError(f"there must be results in {folder} or in its folders, and there are none")
    found = [read_results(run) for run in runs]
    if not any(results.records for results in found):
        raise ResultsError(f"a report needs outputs, and the runs in {folder} have none yet")
    lines: list[str] = []
    write_lines(out / PAGE, [HEADING])  # first: the folder is known by it, should this be interrupted
    for results in found:
        name = results.folder.name
        if results.records:
            page = _report_run(results, out / name)
            lines.append(f"- [{name}]({page.relative_to(out).as_posix()})")
        else:
            lines.append(f"- {name} has no outputs yet")
    return write_lines(out / PAGE, [HEADING, "", *lines])


def is_report(folder: Path) -> bool:
    """Whether a folder holds a report or results, to which a report may be added."""
    page = folder / PAGE
    if page.is_file():
        with page.open("rb") as file:
            return file.read(len(HEADING)) == HEADING.encode()
    return any(map(is_run, (folder, *(child for child in folder.iterdir() if child.is_dir()))))


def _report_run(results: Results, out: Path) -> Path:
    try:
        from dynatree_bench.report.figures import FIGURES, draw, provenance
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise InputError("a report needs matplotlib, which is not installed: pip install 'dynatree[bench]'") from error
    results = attrs.evolve(results, records=in_order(results))
    write_lines(out / PAGE, [_title(results)])  # first: the folder is known by it, should this be interrupted
    (out / "figures").mkdir(exist_ok=True)
    ours = [*(f"figures/{plot.name}.png" for plot in FIGURES), *(f"tables/{name}.csv" for name in TABLES)]
    for name in ours:
        (out / name).unlink(missing_ok=True)  # of an earlier report
    lines = [_title(results), "", *_warnings(results), *_worth(results), provenance(results), ""]
    lines += [*write_tables(_tables(results), out), "## Figures", ""]
    for plot in FIGURES:
        path = out / "figures" / f"{plot.name}.png"
        if draw(plot, results, path):
            lines += [f"![{plot.name}](figures/{path.name})", "", plot.caption, ""]
    return write_lines(out / PAGE, lines)


def _title(results: Results) -> str:
    synthetic = ", synthetic pair" if results.info.is_synthetic else ""
    return f"{HEADING}: {results.info.experiment}{synthetic}"


def _warnings(results: Results) -> list[str]:
    """What somebody should know before believing the numbers, a list item each."""
    info, found = results.info, summaries(results.records)
    items = []
    if info.is_synthetic:
        items.append(
            "**Synthetic**: models of random weights, whose text and acceptance are those of a random source. Times "
            "are those of models of this shape; acceptance is what was asked for."
        )
    if info.ignore_eos:
        items.append("End tokens were ignored (`--ignore-eos`), so texts go on past their end.")
    different = _count_by_method(found, lambda one: one.num_different)
    if different:
        items.append(f"{DAGGER} Outputs that differ from greedy decoding: {different}.")
    if failed := _count_by_method(found, lambda one: one.num_failed):
        first = next(f"{one.method}: {one.error}" for one in found if one.error is not None)
        items.append(f"Outputs that failed: {failed}. The first: {first}")
    if not any(one.method == BASELINE for one in found):
        items.append(f"There are no outputs of `{BASELINE}`, so there are no speedups.")
    num_prompts = len({record.prompt_id for record in results.records})
    if num_prompts < ENOUGH_PROMPTS:
        items.append(
            f"The prompts are few ({num_prompts}): intervals of fewer than about {ENOUGH_PROMPTS} are too narrow, and "
            "methods that come near each other cannot be told apart."
        )
    items += [note[:1].upper() + note[1:] + "." for note in (*info.notes, *run_warnings(results))]
    return [*(f"- {item}" for item in items), ""] if items else []


def _worth(results: Results) -> list[str]:
    """How near to the memory's bandwidth the baselines come."""
    sentence = memory_sentence(results)
    return [f"**What a ratio is worth**: {sentence}.", ""] if sentence is not None else []


def _count_by_method(found: Iterable[Summary], count: Callable[[Summary], int]) -> str:
    totals: dict[str, list[int]] = {}
    for one in found:
        total = totals.setdefault(one.method, [0, 0])
        total[0] += count(one)
        total[1] += one.num_outputs + one.num_failed
    return ", ".join(f"{name} {number} of {of}" for name, (number, of) in totals.items() if number)


# tables


def _tables(results: Results) -> list[Table]:
    made = [
        _pooled_table(results),
        _main_table(results),
        _category_table(results),
        _formula_table(results),
        _worth_table(results),
        _oracle_table(results),
        _acceptance_table(results, "rank", acceptance_by_rank, first=0),
        _acceptance_table(results, "depth", acceptance_by_depth, first=1),
        _shape_table(results),
        _calibration_table(results),
        _length_table(results),
    ]
    return [table for table in made if table is not None]


def _pooled_table(results: Results) -> Table | None:
    """What a method is worth over all prompts together, and over those of each category."""
    found = summaries(results.records)
    varied = _varied_axes(found)
    baselines = {name: by_method(results.records).get(name, []) for name in (BASELINE, HF_BASELINE)}
    categories = list(dict.fromkeys(record.category for record in results.records))
    categories = categories if len(categories) > 1 else []
    rows, data = [], []
    for one, group in zip(found, groups(results.records), strict=True):
        overall = [pooled_ratio(group, baseline) for baseline in baselines.values()]
        parts = [pooled_ratio((r for r in group if r.category == name), baselines[BASELINE]) for name in categories]
        by_category = [part.value if part is not None else None for part in parts]
        points = [one.axes.get(axis) for axis in varied]
        tokens = one.tokens_per_iteration
        name = f"{one.method} {DAGGER}" if one.is_different else one.method
        rows.append(tuple(map(shown, (name, *points, *overall, tokens, *by_category))))
        numbers = [attrs.astuple(ratio) if ratio is not None else (None,) * 4 for ratio in overall]
        data.append((one.method, *points, *numbers[0], *numbers[1], tokens, *by_category))
    if all(row[len(varied) + 1] == "–" for row in rows):
        return None
    header = ("method", *varied, f"against {BASELINE}", f"against {HF_BASELINE}", "tokens/iteration", *categories)
    fields = [f"{name}{part}" for name in ("speedup", "hf_speedup") for part in ("", "_low", "_high", "_count")]
    data_header = ("method", *varied, *fields, "tokens_per_iteration", *(f"speedup {name}" for name in categories))
    note = (
        "against: decoding time of all prompts by that method ÷ by this one, the prefill apart, and its bootstrap "
        "95 % interval over prompts. A prompt takes the median time over its repeats, of two the shorter one. "
        f"{DAGGER}: some outputs differ from greedy decoding. tokens/iteration: committed tokens per target pass."
    )
    if categories:
        note += f" The last columns are against {BASELINE}, over the prompts of a category."
    return Table("pooled", "Speedup over all prompts", note, *_known(header, rows), data_header, tuple(data))


def _known(header: Sequence[str], rows: Iterable[Sequence[str]]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Header and rows without the columns that no row knows."""
    columns = [column for column in zip(header, *rows, strict=True) if any(cell != "–" for cell in column[1:])]
    header, *rows = zip(*columns, strict=True)
    return tuple(header), tuple(rows)


def _category_table(results: Results) -> Table | None:
    """The same for the prompts of each category."""
    if len({record.category for record in results.records}) < 2:
        return None
    records = [attrs.evolve(record, axes={"category": record.category, **record.axes}) for record in results.records]
    table = _main_table(attrs.evolve(results, records=tuple(sorted(records, key=lambda record: record.category))))
    return attrs.evolve(table, name="categories", title="Methods by category", note="")


def _main_table(results: Results) -> Table:
    found = summaries(results.records)
    varied = _varied_axes(found)

    def bandwidth(one: Summary) -> float | None:
        return memory_share(results.info.memory, one.iteration_seconds)

    columns = [
        _Column("method", lambda one: one.method, (("method", lambda one: one.method),)),
        *(_axis_column(axis) for axis in varied),
        _Column(
            "greedy",
            lambda one: f"{one.num_compared - one.num_different}/{one.num_compared}" + DAGGER * one.is_different,
            (
                ("outputs", lambda one: one.num_outputs),
                ("failed", lambda one: one.num_failed),
                ("compared", lambda one: one.num_compared),
                ("different", lambda one: one.num_different),
            ),
        ),
        _Column("bits", _bits, (("bitwise", lambda one: one.num_bitwise),)),
        _estimate_column("tokens/s", "tokens_per_second", lambda e: f"{_mean(e, '.1f')}"),
        _estimate_column("speedup", "speedup", lambda e: f"{e.median:.2f}{interval(e)}"),
        _Column("mean ± sd", lambda one: _mean(one.speedup, ".2f") if one.speedup else "–", ()),
        _number_column("worst", "worst", ".2f"),
        _estimate_column("÷ HF", "hf_speedup", lambda e: f"{e.median:.2f}"),
        _number_column("tok/it", "tokens_per_iteration", ".2f"),
        _number_column("path", "path_acceptance", ".1%"),
        _number_column("node", "node_acceptance", ".1%"),
        _number_column("nodes/it", "nodes_per_iteration", ".1f"),
        _number_column("drafted", "drafted_share", ".0%"),
        _number_column("mean depth", "depth", ".1f", "mean_depth"),  # an axis may be called depth
        _number_column("repetition", "repetition", ".1%"),
        _number_column("draft ms", "draft_ms", ".2f"),
        _number_column("verify ms", "verify_ms", ".2f"),
        _number_column("rest ms", "rest_ms", ".2f"),
        _number_column("overhead ms", "overhead_ms", ".2f"),
        _number_column("of a step", "overhead_share", ".1%"),
        _Column("bandwidth", lambda one: _whole_percent(bandwidth(one)), (("bandwidth_share", bandwidth),)),
        _estimate_column("memory", "memory", lambda e: f"{e.median - 1:+.1%}"),
        _number_column("load", "load", ".0%"),
    ]
    note = (
        f"greedy: outputs equal to greedy decoding, of those that were compared ({DAGGER}: some differ). bits: "
        "those whose cached keys and values are equal bit by bit too. tokens/s: mean ± standard deviation over "
        f"prompts, the prefill apart. speedup: over `{BASELINE}` on the same runtime, prompt by prompt: median and "
        f"its bootstrap 95 % interval; worst: of a single prompt. ÷ HF: the median over `{HF_BASELINE}`. tok/it: "
        "committed tokens per target pass. path, node: accepted drafted tokens ÷ depth of the tree, ÷ drafted "
        "nodes. drafted: iterations that had a tree. repetition: 4-grams seen earlier in the output. Times are "
        "those of an iteration; overhead is what is outside both models' passes, of a step: as a share of an "
        "autoregressive one. bandwidth: time in which the memory's bandwidth lets the target's weights be read "
        "once ÷ time of an iteration. memory: peak over that of autoregressive decoding. load: the CPU's share "
        "that others used."
    )
    data = [(name, get) for column in columns for name, get in column.data]
    return Table(
        "summary",
        "Methods",
        note,
        *_known([column.heading for column in columns], [[column.show(one) for column in columns] for one in found]),
        tuple(name for name, _ in data),
        tuple(tuple(get(one) for _, get in data) for one in found),
    )


def _bits(one: Summary) -> str:
    return "–" if one.num_bitwise is None else f"{one.num_bitwise}/{one.num_compared}"


def _whole_percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _varied_axes(found: Sequence[Summary]) -> list[str]:
    axes = dict.fromkeys(axis for one in found for axis in one.axes)
    return [axis for axis in axes if len({str(one.axes.get(axis)) for one in found}) > 1]


def _axis_column(axis: str) -> _Column:
    return _Column(axis, lambda one: str(one.axes.get(axis, "–")), ((axis, lambda one: one.axes.get(axis)),))


def _number_column(heading: str, name: str, style: str, stored: str | None = None) -> _Column:
    """A number of a summary by its name there, which is its name in the CSV file too unless another is given."""

    def show(one: Summary) -> str:
        value = getattr(one, name)
        return "–" if value is None else format(value, style).replace("%", " %")

    return _Column(heading, show, ((stored or name, lambda one: getattr(one, name)),))


def _estimate_column(heading: str, name: str, style: Callable[[Estimate], str]) -> _Column:
    def show(one: Summary) -> str:
        value = getattr(one, name)
        return "–" if value is None else style(value).replace("%", " %")

    def part(field: str) -> Callable[[Summary], Any]:
        return lambda one: getattr(getattr(one, name), field, None)

    return _Column(heading, show, tuple((f"{name}_{field.name}", part(field.name)) for field in attrs.fields(Estimate)))


def _mean(value: Estimate, style: str) -> str:
    return format(value.mean, style) + (f" ± {value.sd:{style}}" if value.sd is not None else "")


def _formula_table(results: Results) -> Table | None:
    """Chains and fixed trees: what their own acceptances let expect, beside what was measured."""
    policies = {method.name: method.policy for method in results.info.methods if method.policy}
    rows = []
    for group in groups(results.records):
        one = summaries(group)[0]
        shape = _full_tree(policies.get(one.method, ""), one.axes)
        levels = acceptance_by_depth(group)
        if shape is None or not levels or one.tokens_per_iteration is None:
            continue
        depth, branch = shape
        pooled = Share(sum(level.accepted for level in levels), sum(level.trials for level in levels)).value or 0.0
        rows.append((_point(one), depth, branch, pooled, chain_tokens(pooled, depth), one.tokens_per_iteration))
    note = (
        "expected: (1 − p^(D+1)) ÷ (1 − p) with p the share of levels passed, at any depth (Leviathan et al. 2023, "
        "equation 1, where a level of a tree stands for a token of a chain). The formula does not know that hard "
        "tokens come together, nor trees that the threshold or the end of an output cut short."
    )
    header = ("method", "depth", "branch", "levels passed", "expected tok/it", "measured tok/it")
    return simple("formulas", "Measured and expected tokens per iteration", note, header, rows)


def _full_tree(policy: str, axes: dict[str, Any]) -> tuple[int, int] | None:
    """Depth and branch factor of a stack that is a chain or a fixed tree; None for any other."""
    try:
        stack = parse_stack(policy.format(**axes))
    except (InputError, KeyError):  # another version's spelling, or a template that this point does not fill
        return None
    if len(stack) != 1:
        return None
    parameters: dict[str, Any] = dict(stack[0].parameters)
    if stack[0].name == "linear":
        return Linear(**parameters).depth, 1
    if stack[0].name == "fixed":
        fixed = Fixed(**parameters)
        return fixed.depth, fixed.branch
    return None


def _costs(results: Results) -> CostTable | None:
    """What passes cost with the runner of the run; methods with options may have another one."""
    plain = {method.name for method in results.info.methods if method.kind == "dynatree" and not method.options}
    return cost_table(record for record in results.records if record.method in plain)


def _worth_table(results: Results) -> Table | None:
    """The best chain and tree for the costs and acceptances of this run."""
    costs = _costs(results)
    baseline = by_method(results.records).get(BASELINE)
    step = summaries(baseline)[0].iteration_ms if baseline else None
    acceptance = sorted((share.value or 0.0 for share in rank_shares(replayed_texts(results.records))), reverse=True)
    if costs is None or step is None or len(costs.rows) < 2 or not acceptance:
        return None
    level_cost = 1000 * costs.level_seconds / step
    rows_added = costs.rows[-1] - costs.rows[0]
    node_cost = 1000 * (costs.verify_seconds[-1] - costs.verify_seconds[0]) / rows_added / step
    rows = []
    for name, worth in (
        ("chain", best_chain(acceptance[0], level_cost=level_cost, node_cost=node_cost)),
        ("tree", best_tree_speedup(acceptance, level_cost=level_cost, node_cost=node_cost)),
    ):
        rows.append((name, worth.tree.num_nodes, worth.tree.depth, worth.speedup))
    shares = ", ".join(f"{share:.2f}" for share in acceptance[:MAX_RANKS])
    note = (
        f"For ranks that are accepted independently, with the shares {shares} that they have of all tokens; a level "
        f"drafted in {level_cost:.3f} and a row verified in {node_cost:.3f} autoregressive steps (mean costs of this "
        "run's methods, a straight line between the fewest and the most rows)."
    )
    return simple("worth", "What the formulas say is best", note, ("shape", "nodes", "depth", "speedup"), rows)


def _oracle_table(results: Results) -> Table | None:
    costs = _costs(results)
    rows = []
    for group in groups(results.records):
        same_nodes = score(group)
        if same_nodes is None:
            continue
        same_cost = score(group, costs) if costs is not None else None
        rows.append(
            (
                _point(summaries(group)[0]),
                same_nodes.num_nodes / same_nodes.num_iterations,
                1 + same_nodes.accepted / same_nodes.num_iterations,
                same_nodes.oracle_tokens,
                _percent(same_nodes.share),
                same_cost.oracle_tokens if same_cost else None,
                _percent(same_cost.share) if same_cost else None,
            )
        )
    note = (
        "Of the iterations that drafted anything. The oracle tree knows what the target will say: its nodes have the "
        "drafter's first choices as children, and it expands the right one only. share: accepted tokens of the "
        "policy's trees ÷ those of oracle trees from the same places, with as many nodes, or taking as long. It is the "
        "distance to what the drafter's proposals allow: who knew the text would have 100 %."
    )
    header = ("method", "nodes/it", "tok/it", "oracle tok/it", "share %", "same cost tok/it", "same cost share %")
    return simple("oracle", "Distance to the oracle tree", note, header, rows)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _acceptance_table(
    results: Results, what: str, count: Callable[[Iterable[OutputRecord]], list[Share]], *, first: int
) -> Table | None:
    found = {name: shares for name, own in by_method(results.records).items() if (shares := count(own))}
    if not found:
        return None
    number = max(map(len, found.values()))
    num_shown = min(number, MAX_RANKS if what == "rank" else 2 * MAX_RANKS)
    header = ("method", *(f"{what} {first + i}" for i in range(num_shown)))
    rows = tuple(
        (name, *(_share(shares[i]) if i < len(shares) else "–" for i in range(num_shown)))
        for name, shares in found.items()
    )
    data = tuple(
        (name, first + i, share.accepted, share.trials, share.value, *(share.interval or (None, None)))
        for name, shares in found.items()
        for i, share in enumerate(shares)
    )
    note = {
        "rank": "Of the drafted nodes under an accepted parent that were the drafter's choice of this rank (0: its "
        "first), the share that was accepted. What policies do not draft does not count.",
        "depth": "Of the accepted nodes one level above that got children, the share with an accepted child.",
    }[what]
    data_header = ("method", what, "accepted", "trials", "share", "low", "high")
    return Table(f"acceptance-by-{what}", f"Acceptance by {what}", note, header, rows, data_header, data)


def _share(share: Share) -> str:
    return "–" if share.value is None else f"{100 * share.value:.1f} % of {share.trials}"


def _shape_table(results: Results) -> Table | None:
    pair = compared(results)
    if pair is None:
        return None
    rows = [
        (method, tick, pair.ours[method].get(tick), pair.theirs[method].get(tick))
        for method in pair.theirs
        for tick in pair.ticks
        if tick in pair.ours[method] or tick in pair.theirs[method]
    ]
    note = (
        f"Tokens per second relative to {pair.reference}, each side to its own. Published: {published()['source']}. "
        "Another machine and other models: only the order and the ratios can be compared."
    )
    title = "Shapes beside the published ones"
    if pair.label == "method":  # each stands at its own name
        return simple("shapes", title, note, ("method", "this run", "published"), [(row[0], *row[2:]) for row in rows])
    return simple("shapes", title, note, ("method", pair.label, "this run", "published"), rows)


def _calibration_table(results: Results) -> Table | None:
    found = {
        (name, f"{tenth / 10:.1f}–{(tenth + 1) / 10:.1f}"): one
        for name, own in by_method(results.records).items()
        for one in calibration(own)
        for tenth in [min(int(10 * one.probability), 9)]
    }
    note = (
        "Drafted nodes under accepted parents in tenths of the drafter's probability: the share that was accepted. The "
        "CSV file has the mean probabilities, and Wilson's 95 % intervals."
    )
    data = [
        (name, one.probability, one.share.value, *(one.share.interval or (None, None)), one.share.trials)
        for (name, _), one in found.items()
    ]
    cells = {place: _share(one.share) for place, one in found.items()}
    data_header = ("method", "probability", "accepted", "low", "high", "nodes")
    headings = sorted({heading for _, heading in cells})
    return _rows_of_methods("calibration", "Calibration", note, headings, cells, data_header, data)


def _length_table(results: Results) -> Table | None:
    found = {
        (name, (one.start, one.end)): one
        for name, own in by_method(results.records).items()
        if is_drafting(own)
        for one in over_length(own, num_bins=5, min_width=MIN_BIN)
    }
    note = (
        "Tokens per iteration by the place in the output at which the iterations begin. The CSV file has their path "
        "acceptance too, and the repetition there."
    )
    data = [
        (name, one.start, one.end, one.num_iterations, one.tokens_per_iteration, one.path_acceptance, one.repetition)
        for (name, _), one in found.items()
    ]
    names = {place: f"from token {place[0]} to {place[1]}" for place in sorted({place for _, place in found})}
    cells = {(name, names[place]): f"{one.tokens_per_iteration:.2f}" for (name, place), one in found.items()}
    data_header = ("method", "from token", "to", "iterations", "tok/it", "path acceptance", "repetition")
    return _rows_of_methods("over-length", "Along the output", note, list(names.values()), cells, data_header, data)


def _rows_of_methods(
    name: str,
    title: str,
    note: str,
    headings: Sequence[str],
    cells: Mapping[tuple[str, str], str],
    data_header: tuple[str, ...],
    data: Sequence[tuple[Any, ...]],
) -> Table | None:
    """A table with a row for each method and a column for each heading, of (method, heading) -> cell; None of nothing.

    The CSV file has a line for each cell.
    """
    if not cells:
        return None
    methods = dict.fromkeys(method for method, _ in cells)
    rows = tuple((method, *(cells.get((method, heading), "–") for heading in headings)) for method in methods)
    return Table(name, title, note, ("method", *headings), rows, data_header, tuple(data))


def _point(one: Summary) -> str:
    """A method with its axes, but for the length of outputs."""
    axes = [f"{axis}={value}" for axis, value in one.axes.items() if axis != "max_new_tokens"]
    lengths = [f"{one.axes['max_new_tokens']} tokens"] if "max_new_tokens" in one.axes else []
    return f"{one.method} ({', '.join([*axes, *lengths])})" if axes or lengths else one.method
