"""How near to what memory bandwidth allows are autoregressive steps and tree iterations on a GPU?

Question: time of an autoregressive step relative to reading the weights once, time of a tree iteration relative to an
autoregressive step, tokens per second beside transformers' own `generate`, time outside forward passes, and peak
memory, for each runner that there is on the device.

Method: a synthetic pair, random weights of a published shape with an acceptance that is set so that a tree yields 3,
4.5 and 6.6 tokens an iteration in expectation. A tree has a root and 63 drafted nodes in 5 levels, the same in each
iteration; more than 6 tokens need more levels, so that one has 8. Every way of decoding, passes over 1 to
64 rows, reads of a large buffer and a large matrix product take turns, in rotating order, several times over in one
process after a warm-up round. Of a generation's iterations, transformers' own too, the median counts, the first ones
left out, in which CUDA graphs are recorded; over the rounds medians are shown, with quartiles. The bandwidth is that
of the fastest of a round's reads. What weights take up, and what of them a step reads, is that of
`dynatree_bench.run.bandwidth`; keys and values are not counted.

Output: tables of decoding and passes, and what was measured ÷ what is wanted: at least 0.8 of what bandwidth allows, at
most 1.6 steps for an iteration of 5 levels. The quick form is of a tiny pair; its numbers mean nothing.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import nn

from dynatree_bench.data.synthetic import MarkovSource, let_follow, rank_acceptance
from dynatree_bench.report.formulas import RankTree, best_tree, tree_tokens
from dynatree_bench.report.series import Panel
from dynatree_bench.report.tables import Spread, Table, simple
from dynatree_bench.run.bandwidth import share_of_bandwidth, step_reads
from dynatree_bench.run.limits import least_seconds, limit_jobs
from dynatree_bench.run.machine import device_name
from dynatree_bench.run.methods import Chunks, greedy_config
from dynatree_bench.run.pairs import Pair
from dynatree_bench.run.passes import CONTEXT, ROWS, filled, pass_seconds
from dynatree_bench.run.progress import Job, in_rounds
from dynatree_bench.studies.study import Asked, Study
from dynatree_core import Session, run
from dynatree_core.runners.cudagraph import can_capture
from dynatree_core.runners.packed import can_pack
from dynatree_policies.sequoia import Sequoia

SHAPE, DRY = "pythia-2.8b+70m", "tiny"
PROMPT_TOKENS = 128
DECAY = 0.6  # of the acceptance by rank
NUM_RANKS = 8
DRAFTED = 63  # nodes of a tree; with the root a pass has 64 rows
LEVELS = {3.0: 5, 4.5: 5, 6.6: 8}  # tokens an iteration -> levels of the tree
PLANNED = {5: 0.75, 8: 0.93}  # levels -> the acceptance for which the tree is the best one, so that it has as many
SKIPPED = 8  # first iterations of a generation, in which passes are recorded
WARM_UPS = 3  # passes of each number of rows before any counts: one plain, one recorded, one replayed
WANTED_SHARE = 0.8  # of what bandwidth allows, at least
WANTED_STEPS = 1.6  # time of an iteration of 5 levels, at most
HF = "hf generate"


@attrs.frozen
class Way:
    """A way to decode."""

    runner: str | None  # None: transformers' own generate
    tokens: float | None = None  # an iteration, expected of its tree; None: autoregressive

    def __str__(self) -> str:
        if self.runner is None:
            return HF
        what = (
            "autoregressive" if self.tokens is None else f"tree of {self.tokens:g} tokens, {LEVELS[self.tokens]} levels"
        )
        return f"{what}, {self.runner}"


@attrs.define(eq=False)
class Results:
    """What was measured; a number for each round."""

    provenance: dict[str, Any]
    bandwidth: list[float] = attrs.field(factory=list)  # bytes/s that are read of a buffer
    flops: list[float] = attrs.field(factory=list)  # of a large matrix product, operations/s
    # runner -> rows -> seconds of a pass
    passes: dict[str, dict[str, list[float]]] = attrs.field(factory=lambda: defaultdict(lambda: defaultdict(list)))
    # way -> quantity -> of a generation: median seconds of an iteration, tokens an iteration, seconds of an iteration
    # outside forward passes, bytes that CUDA's allocator gave out at most
    decoding: dict[str, dict[str, list[float]]] = attrs.field(factory=lambda: defaultdict(lambda: defaultdict(list)))

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Results:
        """Those of a file."""
        return cls(**{field.name: found[field.name] for field in attrs.fields(cls)})

    @property
    def weight_seconds(self) -> float:
        """What reading the weights once takes."""
        return float(self.provenance["weight_bytes"]) / statistics.median(self.bandwidth)

    def bandwidth_share(self, seconds: float) -> float:
        """What a step that takes so long reaches of the bandwidth."""
        num_bytes = float(self.provenance["weight_bytes"])
        return share_of_bandwidth(num_bytes, seconds, statistics.median(self.bandwidth))

    def pass_seconds(self, rows: int) -> float:
        """What a pass takes at least: reading the weights, or multiplying with them."""
        num_bytes, num_weights = (float(self.provenance[name]) for name in ("weight_bytes", "num_weights"))
        bandwidth, flops = statistics.median(self.bandwidth), statistics.median(self.flops)
        return least_seconds(num_bytes, num_weights, rows, bandwidth=bandwidth, flops=flops)

    def seconds(self, way: Way) -> float:
        """Median of an iteration."""
        return statistics.median(self.decoding[str(way)]["seconds"])


def measure(asked: Asked, *, runners: Sequence[str] = ()) -> dict[str, Any]:
    """What Results has, of the runners that are named; where none is, of those that `_runners` finds."""
    shape = asked.models.synthetic or (DRY if asked.is_quick else SHAPE)
    pair = attrs.evolve(asked.models, synthetic=shape).load(seed=asked.seed)
    model, is_dry = pair.target.model, shape == DRY
    rounds, tokens = asked.repeats or (2 if is_dry else 7), max(asked.max_new_tokens, default=32 if is_dry else 256)
    reads = step_reads(model)
    results = Results(
        {
            "device": device_name(model.device),
            "model": pair.target.name,
            "is_synthetic": True,
            "dtype": str(model.dtype).removeprefix("torch."),
            "runners": list(runners) or _runners(model),
            "num_weights": reads.num_weights,
            "weight_bytes": reads.num_bytes,
            "prompt_tokens": PROMPT_TOKENS,
            "context": CONTEXT,
            "tokens": tokens,
            "rounds": rounds,
            "acceptance": {str(wanted): acceptance_for(wanted) for wanted in LEVELS},
        }
    )
    of_device = limit_jobs(model.device, model.dtype, results.bandwidth, results.flops)
    in_rounds([*of_device, *_pass_jobs(pair, results), *_decoding_jobs(pair, results, tokens)], rounds)
    return attrs.asdict(results)


def _runners(model: nn.Module) -> list[str]:
    """Those that there are on the model's device."""
    there = {"eager": True, "cudagraph": can_capture(model), "packed": can_pack(model)}
    return [name for name, is_there in there.items() if is_there]


def planned_ranks(levels: int) -> list[float]:
    """The acceptances of ranks for which the tree of so many levels is the best one."""
    return rank_acceptance(PLANNED[levels], DECAY, NUM_RANKS)


def shape_for(tokens: float) -> RankTree:
    """The tree that is to yield so many tokens."""
    levels = LEVELS[tokens]
    return best_tree(planned_ranks(levels), DRAFTED, max_depth=levels)


def acceptance_for(tokens: float) -> float:
    """The acceptance of first choices with which the tree yields so many tokens an iteration, by bisection."""
    shape = shape_for(tokens)
    low, high = (1 - DECAY) / (2 - DECAY), 1.0  # below it second choices would be better
    for _ in range(30):
        middle = (low + high) / 2
        if tree_tokens(shape, rank_acceptance(middle, DECAY, NUM_RANKS)) < tokens:
            low = middle
        else:
            high = middle
    return high


def _pass_jobs(pair: Pair, results: Results) -> list[Job]:
    ways = {name: filled(pair.target.model, name) for name in results.provenance["runners"]}

    def job(name: str, rows: int, turn: int) -> None:
        for _ in range(1 if turn else WARM_UPS):
            seconds = pass_seconds(*ways[name], rows, device=pair.target.model.device)
        numbers = results.passes[name][str(rows)]
        if turn:
            numbers.append(seconds)

    return [functools.partial(job, name, rows) for rows in ROWS for name in ways]


def _decoding_jobs(pair: Pair, results: Results, tokens: int) -> list[Job]:
    """A generation by each way, of another prompt in each round."""
    assert pair.source is not None, "the pair is synthetic"
    prompts = pair.source.prompts(results.provenance["rounds"] + 1, PROMPT_TOKENS)
    acceptances = results.provenance["acceptance"]
    sources = {
        wanted: MarkovSource.draw(pair.source.vocab_size, acceptance=acceptances[str(wanted)], decay=DECAY)
        for wanted in LEVELS
    }

    def job(way: Way, turn: int) -> None:
        if way.tokens is not None:
            let_follow(sources[way.tokens], pair.target.model, pair.drafter.model)  # type: ignore[attr-defined]
        device = pair.target.model.device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        found = _decoded(pair, way, prompts[turn], tokens)
        if device.type == "cuda":
            found["peak"] = torch.cuda.max_memory_allocated(device)
        for name, value in found.items():
            if turn:
                results.decoding[str(way)][name].append(value)

    return [functools.partial(job, way) for way in ways(results)]


def ways(results: Results) -> list[Way]:
    """What is compared."""
    runners = results.provenance["runners"]
    return [Way(None), *(Way(name, tokens) for tokens in (None, *LEVELS) for name in runners)]


def _decoded(pair: Pair, way: Way, prompt: list[int], tokens: int) -> dict[str, float]:
    """What a generation took: see Results.decoding."""
    if way.runner is None:
        return {"seconds": _steady(_transformers_seconds(pair.target.model, prompt, tokens)), "tokens": 1.0}
    policy: Any = "autoregressive"
    if way.tokens is not None:
        levels = LEVELS[way.tokens]
        ranks = ",".join(f"{rank:.6f}" for rank in planned_ranks(levels))
        policy = Sequoia(nodes=DRAFTED, depth=levels, branch=NUM_RANKS, size="full", acceptance=ranks)
    session = Session(
        pair.target.model,
        None if way.tokens is None else pair.drafter,
        prompt,
        policy=policy,
        max_new_tokens=tokens,
        eos_token_id=[],
        inherit_settings=False,
        runner=way.runner,
        tokenizer=pair.target.tokenizer,
    )
    seconds = [step.seconds for step in run(session)]
    report = session.result().report
    return {
        "seconds": _steady(seconds),
        "tokens": report.num_new_tokens / report.num_iterations,
        "outside": report.overhead_seconds / report.num_iterations,
    }


def _steady(seconds: list[float]) -> float:
    """Median of a generation's steps, the first ones left out where there are others."""
    return statistics.median(seconds[SKIPPED:] or seconds)


def _transformers_seconds(model: Any, prompt: list[int], tokens: int) -> list[float]:
    """Of each step of transformers' own generate; the first token comes out of the pass over the prompt."""
    chunks, input_ids = Chunks(), torch.tensor([prompt], device=model.device)
    model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=greedy_config(max_new_tokens=tokens),
        streamer=chunks,
    )
    return [later - earlier for earlier, later in itertools.pairwise(chunks.seconds[1:])]


def sentences(found: Mapping[str, Any]) -> Sequence[str]:
    results = Results.of(found)
    said, bandwidth, flops = results.provenance, statistics.median(results.bandwidth), statistics.median(results.flops)
    return [
        f"{said['model']} (synthetic: random weights, and a text whose acceptance was set), {said['dtype']}, on "
        f"{said['device']}",
        f"memory is read at {bandwidth / 1e9:.1f} GB/s, so {said['weight_bytes'] / 1e9:.4g} GB of weights take "
        f"{1000 * results.weight_seconds:.4g} ms; a matrix product does {flops / 1e12:.3g} Tflop/s",
        *verdicts(results),
        *(["this is a dry run: its numbers mean nothing"] if said["model"].endswith(DRY) else []),
    ]


def verdicts(results: Results) -> list[str]:
    """What was measured ÷ what is wanted, for each runner."""
    lines = []
    for name in results.provenance["runners"]:
        step = Way(name)
        share = results.bandwidth_share(results.seconds(step))
        lines.append(
            f"{step}: {share:.2f} of what bandwidth allows ÷ at least {WANTED_SHARE} wanted = "
            f"{share / WANTED_SHARE:.2f}"
        )
        for tokens in (wanted for wanted, levels in LEVELS.items() if levels == 5):
            way = Way(name, tokens)
            steps = results.seconds(way) / results.seconds(step)
            lines.append(f"{way}: {steps:.2f} steps ÷ at most {WANTED_STEPS} wanted = {steps / WANTED_STEPS:.2f}")
    return lines


def tables(found: Mapping[str, Any]) -> Sequence[Table | None]:
    results = Results.of(found)
    return [_decoding_table(results), _pass_table(results)]


def _decoding_table(results: Results) -> Table | None:
    plain = min(results.seconds(Way(name)) for name in results.provenance["runners"])
    rows = []
    for way in ways(results):
        numbers, median = results.decoding[str(way)], results.seconds(way)
        tokens = statistics.fmean(numbers["tokens"])
        outside = statistics.median(numbers["outside"]) if "outside" in numbers else None
        speeds = (tokens / median * seconds for seconds in (1.0, results.seconds(Way(None)), plain))
        rows.append(
            (
                str(way), Spread.of(numbers["seconds"], scale=1000), tokens, *speeds,
                100 * results.bandwidth_share(median) if way.tokens is None else None,
                1e6 * outside if outside is not None else None,
                100 * outside / median if outside is not None else None,
                statistics.median(numbers["peak"]) / 2**20 if "peak" in numbers else None,
            )
        )  # fmt: skip
    note = (
        "Medians and quartiles. × hf, × own: relative to transformers' generate, and to our fastest autoregressive "
        "decoding; of bandwidth: time to read the weights ÷ time of a step; outside: of an iteration, outside forward "
        "passes; MiB: peak."
    )
    header = (
        "way", "ms/iteration", "tokens", "tok/s", "× hf", "× own", "of bandwidth (%)", "outside (µs)", "outside (%)",
        "MiB",
    )  # fmt: skip
    return simple("decoding", "Decoding", note, header, rows)


def _pass_table(results: Results) -> Table | None:
    rows = [
        (
            rows, 1000 * results.pass_seconds(int(rows)),
            *(Spread.of(by_rows[rows], scale=1000) for by_rows in results.passes.values()),
        )
        for rows in map(str, ROWS)
    ]  # fmt: skip
    return simple("passes", "ms per pass of the target", "", ("rows", "roofline", *results.passes), rows)


def panels(found: Mapping[str, Any]) -> Sequence[Panel]:
    """Time of a pass over its rows, beside what bandwidth and multiplication allow."""
    results = Results.of(found)
    lines = {
        name: {rows: Spread.of(by_rows[str(rows)], scale=1000) for rows in ROWS}
        for name, by_rows in results.passes.items()
    }
    lines["bytes ÷ bandwidth, or flops"] = {rows: Spread.of([results.pass_seconds(rows)], scale=1000) for rows in ROWS}
    title = "synthetic: random weights" + (", a dry run" if results.provenance["model"].endswith(DRY) else "")
    return [
        Panel(title, "rows of a pass (drafted nodes and the root)", "time of a pass (ms)", lines, True, True),
    ]


STUDY = Study(("synthetic", "device", "dtype", "repeats", "max_new_tokens"), measure, tables, panels, sentences)
