"""Does exact="fixed_width" make coarse arithmetic equal to autoregressive decoding, and what does it cost?

Question: how many outputs of tree decoding equal those of autoregressive decoding, with passes as they come and with
passes of one fixed shape, and what is the decoding time of the four relative to plain autoregressive decoding?

Method: every prompt is decoded in all four ways one after another, in rotating order, in one process after a warm-up;
a time is the ratio of two runs of the same prompt, and its median and range are shown. A tree is compared with
autoregressive decoding of the same width. Meanwhile the machine is watched.

Output: a row for each way.

Command: python -m dynatree_bench.studies.fixed_width [--dtype T] [--quantise NAME] [--layers N] [--prompts FILE.jsonl]
[--per-kind N] [--max-new-tokens N]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections import defaultdict

import attrs
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dynatree_bench.data.prompts import chat_ids, in_turns, load_prompts, parsed_arguments
from dynatree_bench.run.machine import LoadMeter, idle_or_busy, runtime
from dynatree_bench.run.quantised import QUANTISERS, quantise
from dynatree_core import GenerationResult, LoadedModel, Session, load_model, run
from dynatree_core.cli.exits import end_process

DRAFTER = "prompt_lookup"
# column -> what it stands for
COLUMNS = {
    "tok/it": "committed tokens per iteration",
    "ms/it": "decoding time of an iteration",
    "time": "median of the prompts' ratios of decoding time to autoregressive decoding with passes as they come",
    "range": "lowest and highest of them",
    "same": "outputs equal to autoregressive ones of the same width",
    "bits": "those with cached keys and values equal bit by bit as well",
}


@attrs.frozen(eq=False)
class Run:
    """One generation, compared with autoregressive decoding of the same width."""

    result: GenerationResult
    is_same: bool  # tokens
    is_bitwise: bool  # cached keys and values of the tokens that both have


@attrs.frozen
class Way:
    """A way to decode."""

    policy: str
    exact: str | None

    def __str__(self) -> str:
        return f"{self.policy}, {self.exact or 'as it comes'}"

    @property
    def reference(self) -> Way:
        """Autoregressive decoding of the same width."""
        return attrs.evolve(self, policy="autoregressive")


WAYS = tuple(Way(policy, exact) for exact in (None, "fixed_width") for policy in ("autoregressive", "phase3"))


def main() -> None:
    arguments = _parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    kinds = load_prompts(arguments.prompts, arguments.per_kind)
    prompts = [prompt for group in kinds.values() for prompt in group]
    default = load_model(None, device="cpu", dtype=arguments.dtype)
    if arguments.layers is not None:
        default.model.model.layers = default.model.model.layers[: arguments.layers]
    if arguments.quantise:
        quantise(default.model, arguments.quantise)
    console.print(runtime())
    console.print(
        f"{arguments.dtype}, {arguments.quantise or 'not quantised'}, {arguments.layers or 'all'} layers, drafter "
        f"{DRAFTER}, {len(prompts)} prompts, {arguments.max_new_tokens} new tokens at most"
    )
    meter = LoadMeter()
    runs = measure(default, prompts, arguments.max_new_tokens)
    others = meter.meanwhile()
    console.print(_table(runs))
    console.print("; ".join(f"{heading}: {meaning}" for heading, meaning in COLUMNS.items()) + "\n")
    console.print(idle_or_busy(others))


def measure(default: LoadedModel, prompts: list[str], max_new_tokens: int) -> dict[Way, list[Run]]:
    """Every prompt in every way, interleaved: way -> runs, in the order of the prompts."""
    runs: defaultdict[Way, list[Run]] = defaultdict(list)
    for sessions in in_turns(prompts, WAYS, functools.partial(decode, default), max_new_tokens):
        for way, session in sessions.items():
            runs[way].append(compare(session, sessions[way.reference]))
    return dict(runs)


def decode(default: LoadedModel, prompt: str, way: Way, max_new_tokens: int) -> Session:
    """One prompt through the chat template and in one way, to its end."""
    ids = chat_ids(default, prompt)
    drafter = None if way.policy == "autoregressive" else DRAFTER
    session = Session(default.model, drafter, ids, policy=way.policy, exact=way.exact, max_new_tokens=max_new_tokens)
    for _ in run(session):
        pass
    return session


def compare(session: Session, reference: Session) -> Run:
    """A generation beside the reference of its width."""
    rows = min(session.cache.length, reference.cache.length)
    buffers = zip(
        (*session.cache.keys, *session.cache.values), (*reference.cache.keys, *reference.cache.values), strict=True
    )
    is_bitwise = all(torch.equal(one[:, :, :rows], other[:, :, :rows]) for one, other in buffers)
    return Run(session.result(), session.new_token_ids == reference.new_token_ids, is_bitwise)


def _table(runs: dict[Way, list[Run]]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("way", no_wrap=True)
    for heading in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    plain = [one.result.report.decode_seconds for one in runs[WAYS[0]]]
    for way in WAYS:
        reports = [one.result.report for one in runs[way]]
        iterations = sum(report.num_iterations for report in reports)
        ratios = [report.decode_seconds / seconds for report, seconds in zip(reports, plain, strict=True)]
        table.add_row(
            str(way),
            f"{sum(report.num_new_tokens for report in reports) / iterations:.2f}",
            f"{1000 * sum(report.decode_seconds for report in reports) / iterations:.1f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f}–{max(ratios):.2f}",
            f"{sum(one.is_same for one in runs[way])}/{len(reports)}",
            f"{sum(one.is_same and one.is_bitwise for one in runs[way])}/{len(reports)}",
        )
    return table


def _parse_arguments() -> argparse.Namespace:
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m dynatree_bench.studies.fixed_width", description=description)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--layers", type=int, help="only the first layers, for quantisation that is slow here")
    parser.add_argument("--quantise", choices=sorted(QUANTISERS), help="quantise the model by this library and method")
    return parsed_arguments(parser, max_new_tokens=32)


if __name__ == "__main__":
    end_process(main)
