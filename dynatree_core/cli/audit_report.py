"""What `dynatree audit` does and shows, once models are loaded and texts are read."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from dynatree_core.audit import AUTOREGRESSIVE, AuditReport, Difference, Rounding, audit_generation, audit_output
from dynatree_core.cli.questions import Question
from dynatree_core.drafters.base import Drafter
from dynatree_core.report import GenerationResult

__all__ = ["Audit", "Case", "audit_cases", "document", "show"]

WIDTH = 110  # where stdout is no terminal


@attrs.frozen
class Case:
    """What is to be audited: a question to answer, or an output that is there already."""

    question: Question
    token_ids: list[int] | None = None  # of the output


@attrs.frozen
class Audit:
    """A case that was audited."""

    case: Case
    token_ids: list[int]
    report: AuditReport
    result: GenerationResult | None = None  # of a generation of ours


def audit_cases(
    target: nn.Module,
    drafter: nn.Module | Drafter | None,
    cases: Iterable[Case],
    options: Mapping[str, Any],
    precise: nn.Module | None,
    *,
    num_cases: int,
) -> list[Audit]:
    """Audit case by case; an interrupt keeps those that are done, if any is.

    All of them are judged by what was measured on them together, since a maximum over more positions is surer.

    Args:
        cases: a case may come only after the one before has been answered, as the turns of a conversation do.
        options: of a generation; of those only `exact`, `max_nodes`, `eos_token_id` and `runner` matter for an output.
        precise: the target in a higher precision, or None.
    """
    audits: list[Audit] = []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        try:
            for case in progress.track(cases, total=num_cases, description="auditing"):
                audits.append(_audit(target, drafter, case, options, precise))
                case.question.answered(audits[-1].token_ids)
        except KeyboardInterrupt:
            if not audits:
                raise
    together = Rounding.of_all(audit.report.rounding for audit in audits)
    return [attrs.evolve(audit, report=attrs.evolve(audit.report, rounding=together)) for audit in audits]


def _audit(
    target: nn.Module,
    drafter: nn.Module | Drafter | None,
    case: Case,
    options: Mapping[str, Any],
    precise: nn.Module | None,
) -> Audit:
    prompt_ids = case.question.prompt_ids
    if case.token_ids is None:
        result, report = audit_generation(target, drafter, prompt_ids, precise=precise, **options)
        return Audit(case, result.token_ids, report, result)
    names = ("exact", "max_nodes", "eos_token_id", "runner")
    kept = {name: options[name] for name in names if name in options}
    return Audit(case, case.token_ids, audit_output(target, prompt_ids, case.token_ids, precise=precise, **kept))


def document(audits: Sequence[Audit]) -> dict[str, Any]:
    """What --json prints."""
    rounding = audits[0].report.rounding
    return {
        **_summary(audits),
        "bound": rounding.bound,
        "rounding": attrs.asdict(rounding),
        "audits": [
            {
                **audit.case.question.about,
                "verdict": audit.report.verdict,
                "faults": list(audit.report.faults),
                "num_tokens": audit.report.num_tokens,
                "num_close": audit.report.num_close,
                "differences": [
                    {
                        "position": one.position,
                        "expected_id": one.expected_id,
                        "token_id": one.token_id,
                        "deviation": one.deviation,
                        "verdict": _verdict(audit.report, one),
                        "logits": {
                            pair.way: {"expected": pair.expected, "got": pair.got, "gap": pair.gap}
                            for pair in one.pairs
                        },
                    }
                    for one in audit.report.differences
                ],
                "deviations": audit.report.deviations,
                "prompt_ids": audit.case.question.prompt_ids,
                "token_ids": audit.token_ids,
            }
            for audit in audits
        ],
    }


def _summary(audits: Sequence[Audit]) -> dict[str, Any]:
    """Counts over all cases; a number of nothing is None."""
    reports = [audit.report for audit in audits]
    verdicts = [report.verdict for report in reports]
    first = [one for report in reports if (one := report.first_difference) is not None]
    runs = [audit.result.report for audit in audits if audit.result is not None]
    iterations = sum(run.num_iterations for run in runs)
    ways = reports[0].deviations
    return {
        "verdict": next(verdict for verdict in ("bug", "tie", "identical") if verdict in verdicts),
        "num_outputs": len(reports),
        "num_identical": sum(report.first_difference is None for report in reports),
        "num_differing": len(first),
        "num_bugs": verdicts.count("bug"),
        "num_differences": sum(len(report.differences) for report in reports),
        "smallest_gap": min((_gap(one) for one in first), default=None),
        "largest_gap": max((_gap(one) for one in first), default=None),
        "largest_deviation": {way: max(report.deviations[way] for report in reports) for way in ways},
        "num_positions": sum(report.num_tokens for report in reports),
        "num_close": sum(report.num_close for report in reports),
        "tokens_per_iteration": sum(run.num_new_tokens for run in runs) / iterations if iterations else None,
        "dtype": reports[0].dtype,
        "num_rows": reports[0].num_rows,
    }


def show(audits: Sequence[Audit], tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Print each difference, or the first of each case where there are several, and what they amount to."""
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDTH)
    for number, audit in enumerate(audits):
        lead = f"{audit.case.question.title or f'output {number + 1}'}: " if len(audits) > 1 else ""
        first = audit.report.first_difference
        if first is None and len(audits) == 1 and not audit.report.faults:
            console.print(f"identical to {_reference(audit.report)} ({audit.report.num_tokens} tokens)")
        if first is not None:
            console.print(
                f"{lead}first difference at token {first.position} of {audit.report.num_tokens}: "
                f"{_verdict(audit.report, first)}"
            )
            console.print(_logit_table(first, tokenizer))
        for fault in audit.report.faults:
            console.print(f"{lead}bug: {fault}", style="red")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for label, value in _lines(audits):
        table.add_row(label, value)
    console.print(table)


def _logit_table(difference: Difference, tokenizer: PreTrainedTokenizerBase | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("logits", no_wrap=True)
    for name, token_id in (("expected", difference.expected_id), ("output", difference.token_id)):
        text = f" {tokenizer.decode([token_id])!r}" if tokenizer is not None else ""
        table.add_column(f"{name} {token_id}{text}", justify="right", no_wrap=True)
    table.add_column("gap", justify="right", no_wrap=True)
    for pair in difference.pairs:
        table.add_row(pair.way, f"{pair.expected:.5g}", f"{pair.got:.5g}", f"{pair.gap:+.4g}")
    return table


def _lines(audits: Sequence[Audit]) -> Iterator[tuple[str, str]]:
    """Label and value of what the cases amount to."""
    found, report = _summary(audits), audits[0].report
    rounding = report.rounding
    if len(audits) > 1:
        yield "outputs", str(found["num_outputs"])
        yield "identical", f"{found['num_identical']} to {_reference(report)}"
        yield "differing", f"{found['num_differing']}, at {found['num_differences']} positions in all"
        yield "bugs", str(found["num_bugs"])
        if found["num_differing"]:
            yield "gaps there", f"{found['smallest_gap']:.4g} to {found['largest_gap']:.4g} at the first difference"
    yield "bound", f"{rounding.bound:.4g}, from rounding in {report.dtype} at {rounding.num_positions} positions:"
    yield (
        "",
        f"changes of a gap up to {rounding.deviation:.4g}, standard deviation {rounding.spread:.4g}, spacing "
        f"{rounding.spacing:.4g}",
    )
    yield "within the bound", f"{found['num_close']} of {found['num_positions']} positions"
    for way, deviation in found["largest_deviation"].items():
        yield way, f"up to {deviation:.4g} away from transformers' own of one row"
    if found["tokens_per_iteration"] is not None:
        yield "tokens / iteration", f"{found['tokens_per_iteration']:.2f}"


def _reference(report: AuditReport) -> str:
    width = f" with {report.num_rows} rows a pass" if report.num_rows > 1 else ""
    return f"autoregressive decoding{width}"


def _verdict(report: AuditReport, difference: Difference) -> str:
    return "tie" if report.is_tie(difference) else "bug"


def _gap(difference: Difference) -> float:
    """By how much autoregressive decoding prefers its token."""
    return next(pair.gap for pair in difference.pairs if pair.way == AUTOREGRESSIVE)
