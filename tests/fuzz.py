"""How many random generations can be tried without finding one that differs from `generate`?

Method: every case is a random tiny float64 model of any supported architecture, a random stack of registered policies
(at times with a hostile one), a drafter from perfect to hostile, random prompts, lengths, end tokens and limits, and
plain greedy decoding, logits processors, or sampling by seed. Its output is compared with that of transformers' own
`generate`, token for token. Cases come in rounds of 100, each with a seed of its own, so that a run can be repeated.

Then random batches (`tests/batch_cases.py`): requests that come, go, fail and are put back on one engine, each against
the same request alone.

Output: how many cases there were of what kind, and how many rounds found a failure; each failure shrunk and printed.
Exit code 1 if there was any.

Command: make fuzz, or python tests/fuzz.py [--cases N] [--batches N] [--seed N]
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections import Counter

import torch
from batch_cases import check_batch, random_batch
from hypothesis import given, seed
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers.utils import logging

from dynatree_core.models.architectures import EXACT_FAMILIES
from dynatree_core.request.arguments import HONOURED_SETTINGS
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.conformance import Case, cases, check_case, without_database

ROUND = 100
FIXED_WIDTH = st.fixed_dictionaries({"exact": st.just("fixed_width"), "max_nodes": st.integers(0, 40)})
ANY_CASE = cases(
    ours.stacks().flatmap(ours.compositions),
    limits=ours.limits | ours.tight_limits | FIXED_WIDTH,
    families=st.sampled_from(sorted(EXACT_FAMILIES)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=2000, help="at least so many, in rounds of 100 (default: 2000)")
    parser.add_argument("--batches", type=int, default=10_000, help="batches to try (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first round (default: 0)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # tiny matrices: threads only wait for each other
    warnings.filterwarnings("ignore", message="Unfeasible length constraints|.*generation flags are not valid")
    logging.set_verbosity_error()
    console = Console(highlight=False)
    counts: Counter[tuple[str, str]] = Counter()
    num_failures, start = 0, time.perf_counter()
    seeds = range(arguments.seed, arguments.seed + max(1, -(-arguments.cases // ROUND)))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for number in progress.track(seeds, description="fuzzing"):
            try:
                one_round(number, counts)
            except Exception:  # noqa: BLE001  # whatever it is: it is what is looked for, and is printed
                num_failures += 1
                console.print(f"[red]round {number}:[/]")
                console.print(traceback.format_exc(), markup=False)
    console.print(table(counts))
    num_cases = sum(count for (aspect, _), count in counts.items() if aspect == "architecture")
    took = time.perf_counter() - start
    console.print(
        f"{num_cases} cases in {len(seeds)} rounds, seeds {seeds[0]} to {seeds[-1]}, {took:.0f} s: "
        f"{num_failures} rounds with a failure"
    )
    return 1 if num_failures + batch_failures(arguments.seed, arguments.batches, console) else 0


def batch_failures(first: int, num_batches: int, console: Console) -> int:
    """Try so many batches; how many of them had a fault, each of which is printed."""
    num_failures, start = 0, time.perf_counter()
    kinds: Counter[tuple[str, str]] = Counter()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for number in progress.track(range(first, first + num_batches), description="batches"):
            case = random_batch(number)
            kinds.update(
                [("sequences", str(len(case.asked))), ("drafter", case.drafter), ("architecture", case.family)]
                + [("policy", asked.policy.partition("(")[0]) for asked in case.asked]
            )
            try:
                check_batch(case)
            except Exception:  # noqa: BLE001  # whatever it is: it is what is looked for, and is printed
                num_failures += 1
                console.print(f"[red]batch {number}:[/]")
                console.print(traceback.format_exc(), markup=False)
    console.print(table(kinds))
    console.print(f"{num_batches} batches, {time.perf_counter() - start:.0f} s: {num_failures} with a failure")
    return num_failures


def one_round(number: int, counts: Counter[tuple[str, str]]) -> None:
    """Try a hundred cases; the first failure is shrunk and raised."""

    @seed(number)
    @without_database(ROUND)
    @given(case=ANY_CASE)
    def lossless(case: Case) -> None:
        counts.update(aspects(case))
        check_case(case)

    lossless()


def aspects(case: Case) -> list[tuple[str, str]]:
    """What the case is one of."""
    options = case.options
    drafter = case.drafter
    is_model = isinstance(drafter, torch.nn.Module)
    own = "the target itself" if drafter is case.target else "a model"
    has_processors = bool(set(options) & set(HONOURED_SETTINGS))
    return [
        ("architecture", case.target.config.model_type),
        ("drafter", own if is_model else str(drafter).partition("(")[0]),
        ("way", "sampling" if options.get("do_sample") else "processors" if has_processors else "plain"),
        ("width", options.get("exact", "as it comes")),
        ("policies", str(len(options["policy"]))),
        ("end tokens", str(len(options["eos_token_id"]))),
    ]


def table(counts: Counter[tuple[str, str]]) -> Table:
    """How many cases there were of what."""
    found = Table(title="cases", title_justify="left")
    found.add_column("by")
    found.add_column("how many of which")
    for aspect in dict.fromkeys(aspect for aspect, _ in counts):
        kinds = sorted((kind, count) for (of, kind), count in counts.items() if of == aspect)
        found.add_row(aspect, ", ".join(f"{kind} {count}" for kind, count in kinds))
    return found


if __name__ == "__main__":
    sys.exit(main())
