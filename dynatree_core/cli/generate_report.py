"""The numbers of a generation, as a table and as `--json` prints them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import attrs
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dynatree_core.report import GenerationReport, GenerationResult
from dynatree_core.text.stream import decode_text

if TYPE_CHECKING:
    from dynatree_core.cli.setup import Setup
    from dynatree_core.engine.session import Session
    from dynatree_core.models.load import LoadedModel
    from dynatree_core.request.request import Request

__all__ = ["Comparison", "document", "made_with", "report_table", "show_report"]

_CUT_SHORT = {"interrupted", "error"}  # stop reasons


@attrs.frozen
class Comparison:
    """A generation, and the autoregressive one of the same prompt if there was one."""

    result: GenerationResult
    baseline: GenerationResult | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it was cut short before the first token."""
        return not self.result.token_ids and self.result.stop_reason in _CUT_SHORT

    @property
    def is_identical(self) -> bool | None:
        """Whether both chose the same tokens; None unless both came to their end."""
        if self.baseline is None or {self.result.stop_reason, self.baseline.stop_reason} & _CUT_SHORT:
            return None
        return self.result.token_ids == self.baseline.token_ids

    @property
    def speedup(self) -> float | None:
        """Tokens per second ÷ the baseline's; None unless both came to their end and decoded anything."""
        if self.is_identical is None or self.baseline is None:
            return None
        ours, theirs = self.result.report.tokens_per_second, self.baseline.report.tokens_per_second
        return ours / theirs if ours and theirs else None


def show_report(compared: Comparison, *, has_legend: bool, set_up: str | None = None) -> None:
    """Print the numbers of a generation to stderr, with what the colours of its answer mean.

    Args:
        compared: what was generated.
        has_legend: whether the colours are explained.
        set_up: what makes the target another model than the published one; None: nothing does.
    """
    console = Console(stderr=True, highlight=False)
    if has_legend and console.is_terminal:
        legend = Text.assemble("\n", ("green", "green"), ": drafted and accepted; the rest: the target's own tokens")
        console.print(legend)
    console.print(report_table(compared, set_up))


def report_table(compared: Comparison, set_up: str | None = None) -> Table:
    """The metrics of a generation, beside those of the autoregressive one if there was one."""
    results = [result for result in (compared.result, compared.baseline) if result is not None]
    table = Table(box=box.SIMPLE_HEAD, show_header=len(results) > 1)
    both = "both decoded" if len(results) > 1 else "decoded"
    captions = [f"{both} with {set_up}"] if set_up is not None else []
    for header in ("", "with drafting", "autoregressive")[: len(results) + 1]:
        table.add_column(header, justify="right" if header else "left")
    for cells in zip(*map(_report_cells, results), strict=True):
        table.add_row(cells[0][0], *(value for _, value in cells))
    if compared.is_identical is not None:
        table.add_section()
        table.add_row("identical", _identical(*(result.token_ids for result in results)))
    if compared.speedup is not None:
        table.add_row("speedup", f"{compared.speedup:.2f}×")
        captions.append("one run each: the speedup is only an indication")
    table.caption = "\n".join(captions) or None
    return table


def _report_cells(result: GenerationResult) -> list[tuple[str, str]]:
    """Rows of label and value."""
    report = result.report
    return [
        ("tokens / iteration", _number(report.tokens_per_iteration)),
        ("path acceptance", _percent(report.path_acceptance)),
        ("node acceptance", _percent(report.node_acceptance)),
        ("drafted nodes", str(report.num_drafted_nodes)),
        ("tokens / s", _number(report.tokens_per_second)),
        ("drafting", _share(report, report.draft_seconds)),
        ("verification", _share(report, report.verify_seconds)),
        ("the rest", _share(report, report.rest_seconds)),
        ("decoding in all", f"{report.decode_seconds:.2f} s"),
        ("prefill", f"{report.prefill_seconds:.2f} s"),
        ("runner", report.runner),
        ("new tokens", str(report.num_new_tokens)),
        ("stop reason", result.stop_reason),
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _share(report: GenerationReport, seconds: float) -> str:
    share = seconds / report.decode_seconds if report.decode_seconds else None
    return f"({_percent(share)}) {seconds:.2f} s"


def _identical(token_ids: Sequence[int], baseline_ids: Sequence[int]) -> str:
    if token_ids == baseline_ids:
        return "yes"
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(token_ids, baseline_ids, strict=False))
    return f"no, from token {len(list(same))} on"


def document(
    setup: Setup, session: Session | Request | None, compared: Comparison | None, stop_reason: str
) -> dict[str, Any]:
    """What --json prints; None stands for what the generation never came to."""
    options = setup.options
    found = {
        **_outcome(setup, compared.result if compared is not None else None, stop_reason),
        "prompt_ids": list(session.prompt_ids) if session is not None else None,
        "target": setup.target_name or "default",
        "expanded_policy": setup.expanded_policy,
        "exact": options.get("exact"),
        "max_nodes": options.get("max_nodes"),
        "ignore_eos": "eos_token_id" in options,
        "cache": options.get("cache"),
        "logits_processors": [type(one).__name__ for one in session.logits_processors] if session is not None else [],
        **made_with(setup.target),
    }
    if setup.is_compared:
        baseline = compared.baseline if compared is not None else None
        found |= {
            "identical": compared.is_identical if compared is not None else None,
            "speedup": compared.speedup if compared is not None else None,
            "autoregressive": _outcome(setup, baseline, stop_reason) if baseline is not None else None,
        }
    return found


def _outcome(setup: Setup, result: GenerationResult | None, stop_reason: str) -> dict[str, Any]:
    """A generation's text, tokens and metrics."""
    asked = {"policy": setup.policy, "drafter": setup.drafter_name}
    names = [field.name for field in attrs.fields(GenerationReport) if field.name != "steps"]
    if result is None or setup.tokenizer is None:
        return {"text": "", "token_ids": [], "stop_reason": stop_reason, **dict.fromkeys(names), **asked}
    return {
        "text": decode_text(setup.tokenizer, result.token_ids),
        "token_ids": result.token_ids,
        "stop_reason": result.stop_reason,
        **{name: getattr(result.report, name) for name in names},
    }


def made_with(target: LoadedModel | None) -> dict[str, Any]:
    """Device, dtype, what is rounded, and versions, for a JSON document; None where no model was loaded."""
    return {
        "device": str(target.model.device) if target is not None else None,
        "dtype": str(target.model.dtype).removeprefix("torch.") if target is not None else None,
        "rounded": target.rounded if target is not None else None,
        "versions": {name: version(name) for name in ("dynatree", "torch", "transformers")},
    }
