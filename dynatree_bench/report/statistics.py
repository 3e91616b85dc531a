"""The numbers of tables and figures, from records alone.

Speeds are compared prompt by prompt: the ratio of tokens per second of two methods that decoded the same prompt in the
same round, the median over the rounds where there are several. Over prompts a ratio is given as median, and mean with
standard deviation; its 95 % interval is that of the median, by the percentile bootstrap over prompts: the median of as
many prompts drawn with replacement, 4,000 times with a fixed seed, and the 2.5 and 97.5 percentiles of that.

A pooled speedup is the decoding time of all prompts by one method ÷ that by another, with the bootstrap over prompts
too. Prompts that take long weigh more in it.

Counts are pooled: tokens per iteration are all tokens over all iterations, and so are acceptances. An interval of a
share of trials is Wilson's (1927), which takes the trials as independent. Repeats of a prompt have the same trials, so
those of the first round count.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from dynatree_bench.run.experiments import REFERENCE_AXES
from dynatree_bench.run.records import OutputRecord, Results, Steps, Trials
from dynatree_core import parse_stack
from dynatree_core.engine.metrics import repetition

BASELINE = "autoregressive"  # on our own runtime
HF_BASELINE = "hf generate"
NUM_RESAMPLES = 4000
MIN_BIN = 10  # tokens of an output that are looked at together: in fewer, single iterations show
NGRAM = 4  # tokens that count as repeated if they come again
Z95 = 1.959964


@attrs.frozen
class Estimate:
    """A quantity that was measured on several prompts."""

    median: float
    mean: float
    sd: float | None  # None: of one prompt there is none
    low: float  # 95 % interval of the median
    high: float
    count: int


@attrs.frozen
class PooledRatio:
    """How many times as fast all prompts are decoded together."""

    value: float
    low: float  # 95 % interval
    high: float
    count: int  # of prompts


@attrs.frozen
class Share:
    """How many of some trials succeeded."""

    accepted: int
    trials: int

    @property
    def value(self) -> float | None:
        return self.accepted / self.trials if self.trials else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval."""
        if not self.trials:
            return None
        share, n = self.accepted / self.trials, self.trials
        centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
        return max(centre - half, 0.0), min(centre + half, 1.0)


@attrs.frozen
class Bin:
    """Drafted nodes to which the drafter gave about the same probability."""

    probability: float  # the mean of theirs
    share: Share


@attrs.frozen
class LengthBin:
    """The iterations that began at some place of their output."""

    start: int  # new tokens before them
    end: int
    num_iterations: int
    tokens_per_iteration: float
    path_acceptance: float | None  # of those that drafted anything
    repetition: float | None  # share of the 4-grams that begin here and were seen before in the same output


@attrs.frozen
class Summary:
    """A method at a point of the axes; whatever is not known is None."""

    method: str
    axes: dict[str, Any]
    num_outputs: int  # that did not fail
    num_failed: int
    error: str | None  # the first one
    num_compared: int  # outputs for which there is a greedy reference
    num_different: int  # of these, from the reference
    num_iterations: int | None
    tokens_per_iteration: float | None
    path_acceptance: float | None
    node_acceptance: float | None
    nodes_per_iteration: float | None
    depth: float | None  # mean, of iterations that drafted anything
    tokens_per_second: Estimate | None  # over prompts, the prefill apart
    speedup: Estimate | None  # over BASELINE
    hf_speedup: Estimate | None  # over HF_BASELINE
    repetition: float | None  # mean of the outputs
    iteration_seconds: float | None  # mean, of foreign methods too
    draft_ms: float | None  # of an iteration
    verify_ms: float | None
    rest_ms: float | None
    overhead_ms: float | None
    memory: Estimate | None  # ratio to BASELINE's peak
    load: float | None  # mean share of the CPU that other processes used
    num_bitwise: int | None  # outputs whose keys and values are the reference's; None where they are not compared
    drafted_share: float | None  # of the iterations that had a tree
    worst: float | None  # lowest speedup of a single prompt
    overhead_share: float | None  # overhead ÷ an iteration of BASELINE

    @property
    def is_different(self) -> bool:
        return self.num_different > 0

    @property
    def iteration_ms(self) -> float | None:
        parts = (self.draft_ms, self.verify_ms, self.rest_ms)
        return None if None in parts else sum(part for part in parts if part is not None)


def estimate(values: Sequence[float]) -> Estimate | None:
    """Median, mean, standard deviation (n − 1) and bootstrap interval of one value per prompt; None of nothing."""
    if not values:
        return None
    return _estimate(tuple(values))


@functools.lru_cache(maxsize=4096)  # a report asks for the same ones in many tables and figures
def _estimate(values: tuple[float, ...]) -> Estimate:
    array = np.asarray(values, dtype=float)
    picks = np.random.default_rng(0).integers(0, array.size, (NUM_RESAMPLES, array.size))
    low, high = np.percentile(np.median(array[picks], axis=1), [2.5, 97.5])
    sd = float(array.std(ddof=1)) if array.size > 1 else None
    return Estimate(float(np.median(array)), float(array.mean()), sd, float(low), float(high), array.size)


def tokens_per_second(record: OutputRecord) -> float | None:
    """New tokens ÷ decoding time, the prefill apart; None of an output that failed or took no time."""
    return len(record.token_ids) / record.decode_seconds if record.error is None and record.decode_seconds else None


def iteration_seconds(records: Iterable[OutputRecord]) -> float | None:
    """The mean time of an iteration; None where the iterations are not known, or took no time."""
    known = [(r.decode_seconds, len(r.steps.depth)) for r in records if r.steps is not None and r.decode_seconds]
    num_iterations = sum(count for _, count in known)
    return sum(seconds for seconds, _ in known) / num_iterations if num_iterations else None


def peak_memory(record: OutputRecord) -> float | None:
    """Bytes, of an output that did not fail."""
    return None if record.error is not None else record.peak_memory_bytes


def ratios(
    records: Iterable[OutputRecord], others: Iterable[OutputRecord], quantity: Any = tokens_per_second
) -> dict[str, float]:
    """A quantity of some outputs relative to that of others of the same prompts.

    Args:
        records: of one method at one point of the axes.
        others: of the baseline. One belongs to a record when prompt and repeat are its own and all of its axes are the
            record's; it need not have all the record's axes, as methods that an axis does not concern have it not.
        quantity: what is compared, by default tokens per second.

    Returns:
        Prompt -> ratio, the median over repeats; prompts without a baseline are left out.
    """
    by_prompt: defaultdict[tuple[str, int], list[OutputRecord]] = defaultdict(list)
    for other in others:
        by_prompt[other.prompt_id, other.repeat].append(other)
    found: defaultdict[str, list[float]] = defaultdict(list)
    for record in records:
        own = quantity(record)
        for other in by_prompt[record.prompt_id, record.repeat]:
            theirs = quantity(other)
            if other.axes.items() <= record.axes.items() and own is not None and theirs:
                found[record.prompt_id].append(own / theirs)
                break
    return {prompt: float(np.median(values)) for prompt, values in found.items()}


def pooled_ratio(records: Iterable[OutputRecord], others: Iterable[OutputRecord]) -> PooledRatio | None:
    """Decoding time of all prompts by the others ÷ that by a method.

    A prompt takes the median time over its repeats, of two the shorter one. A method that ends a text elsewhere counts
    with the time of as many tokens as the others have.

    Args:
        records: of one method at one point of the axes.
        others: of the baseline; those whose axes are not among the records' are left out, as in `ratios`.

    Returns:
        None where no prompt was decoded by both.
    """
    own = [record for record in records if tokens_per_second(record) is not None]
    theirs = [
        other for other in others
        if own and other.axes.items() <= own[0].axes.items() and tokens_per_second(other) is not None
    ]  # fmt: skip
    num_tokens = {other.prompt_id: len(other.token_ids) for other in theirs}
    seconds, other_seconds = _seconds_per_token(own), _seconds_per_token(theirs)
    prompts = [prompt for prompt in seconds if prompt in num_tokens]
    if not prompts:
        return None
    times = [[num_tokens[prompt] * by[prompt] for prompt in prompts] for by in (other_seconds, seconds)]
    return ratio_of_sums(*times)


def ratio_of_sums(numbers: Sequence[float], others: Sequence[float]) -> PooledRatio:
    """The sum of some numbers ÷ that of others, with the percentile bootstrap over the pairs of them.

    Args:
        numbers: one for each prompt, at least one.
        others: of the same prompts.
    """
    pairs = np.array([numbers, others])
    picks = np.random.default_rng(0).integers(0, len(numbers), (NUM_RESAMPLES, len(numbers)))
    above, below = pairs[:, picks].sum(axis=-1)  # each [resamples]
    low, high = np.percentile(above / below, [2.5, 97.5])
    return PooledRatio(float(pairs[0].sum() / pairs[1].sum()), float(low), float(high), len(numbers))


def _seconds_per_token(records: Iterable[OutputRecord]) -> dict[str, float]:
    """Of each prompt, the lower median over repeats."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for record in records:
        found[record.prompt_id].append(record.decode_seconds / len(record.token_ids))
    return {prompt: statistics.median_low(values) for prompt, values in found.items()}


def summaries(records: Iterable[OutputRecord]) -> list[Summary]:
    """Each method at each point of the axes, in the order in which they first come."""
    records = list(records)
    baselines = {name: by_method(records).get(name, []) for name in (BASELINE, HF_BASELINE)}
    return [_summary(group, baselines) for group in groups(records)]


def lowest_speedup(results: Results, policies: Collection[str]) -> tuple[float, str, str] | None:
    """The lowest pooled speedup over BASELINE, and its method and category of prompts.

    Args:
        results: a run.
        policies: only stacks with one of these count.

    Returns:
        None where there is no such stack.
    """
    stacks = {method.name: method.policy for method in results.info.methods if method.kind == "dynatree"}
    names = [name for name, stack in stacks.items() if stack and any(s.name in policies for s in parse_stack(stack))]
    by_category: defaultdict[str, list[OutputRecord]] = defaultdict(list)
    for record in results.records:
        by_category[record.category].append(record)
    found = []
    for category, records in by_category.items():
        baseline = by_method(records).get(BASELINE, [])
        for group in groups(record for record in records if record.method in names):
            if (pooled := pooled_ratio(group, baseline)) is not None:
                found.append((pooled.value, group[0].method, category))
    return min(found, default=None)


def differ_only_in(axes: Iterable[str], found: Sequence[Summary]) -> bool:
    """Whether a method has one summary for each value of these axes, so that a figure can have a point for each."""
    names = tuple(axes)
    return len({(one.method, *(one.axes.get(name) for name in names)) for one in found}) == len(found)


def by_method(records: Iterable[OutputRecord]) -> dict[str, list[OutputRecord]]:
    """The records of each method, in the order in which they first come."""
    found: defaultdict[str, list[OutputRecord]] = defaultdict(list)
    for record in records:
        found[record.method].append(record)
    return dict(found)


def in_order(results: Results) -> tuple[OutputRecord, ...]:
    """The records by length, method and point as the run lists them, whatever the order in which they were measured."""
    names = [method.name for method in results.info.methods]
    points = [axis for axis in results.info.axes if axis not in REFERENCE_AXES]

    def places(record: OutputRecord, axes: Iterable[str]) -> list[int]:
        pairs = ((results.info.axes.get(axis, ()), record.axes.get(axis)) for axis in axes)
        return [values.index(value) if value in values else -1 for values, value in pairs]

    def key(record: OutputRecord) -> tuple[list[int], int, list[int]]:
        method = names.index(record.method) if record.method in names else len(names)
        return places(record, REFERENCE_AXES), method, places(record, points)

    return tuple(sorted(results.records, key=key))


def groups(records: Iterable[OutputRecord]) -> list[list[OutputRecord]]:
    """The records of each method at each point of the axes, in the order in which they first come."""
    found: defaultdict[tuple[str, str], list[OutputRecord]] = defaultdict(list)
    for record in records:
        found[record.method, json.dumps(record.axes, sort_keys=True)].append(record)
    return list(found.values())


def _summary(group: Sequence[OutputRecord], baselines: Mapping[str, Sequence[OutputRecord]]) -> Summary:
    errors = [record.error for record in group if record.error is not None]
    good = [record for record in group if record.error is None]
    steps = [record.steps for record in good if record.steps is not None]
    iterations = sum(len(one.depth) for one in steps)
    nodes, accepted, committed = (
        sum(sum(getattr(one, name)) for one in steps) for name in ("num_drafted", "num_accepted", "num_committed")
    )
    depths = [depth for one in steps for depth in one.depth if depth]
    repetitions = [share for record in good if (share := repetition(record.token_ids)) is not None]
    loads = [record.load for record in good if record.load is not None]
    bitwise = [record.is_bitwise for record in good if record.is_bitwise is not None]
    speedups, hf_speedups, memory = (
        list(ratios(good, baselines[name], quantity).values())
        for name, quantity in ((BASELINE, tokens_per_second), (HF_BASELINE, tokens_per_second), (BASELINE, peak_memory))
    )
    axes, overhead_ms = group[0].axes.items(), _milliseconds(good, "overhead_seconds")
    step = iteration_seconds(record for record in baselines[BASELINE] if record.axes.items() <= axes)
    return Summary(
        method=group[0].method,
        axes=group[0].axes,
        num_outputs=len(good),
        num_failed=len(errors),
        error=errors[0] if errors else None,
        num_compared=sum(record.is_identical is not None for record in good),
        num_different=sum(record.is_identical is False for record in good),
        num_iterations=iterations or None,
        tokens_per_iteration=committed / iterations if iterations else None,
        path_acceptance=_path_acceptance(steps),
        node_acceptance=accepted / nodes if nodes else None,
        nodes_per_iteration=nodes / iterations if iterations else None,
        depth=_mean(depths),
        tokens_per_second=estimate(list(_per_prompt(good).values())),
        speedup=estimate(speedups),
        hf_speedup=estimate(hf_speedups),
        repetition=_mean(repetitions),
        iteration_seconds=iteration_seconds(good),
        draft_ms=_milliseconds(good, "draft_seconds"),
        verify_ms=_milliseconds(good, "verify_seconds"),
        rest_ms=_milliseconds(good, "rest_seconds"),
        overhead_ms=overhead_ms,
        memory=estimate(memory),
        num_bitwise=sum(bitwise) if bitwise else None,
        drafted_share=_mean([drafted > 0 for one in steps for drafted in one.num_drafted]),
        worst=min(speedups, default=None),
        overhead_share=overhead_ms / (1000 * step) if overhead_ms is not None and step else None,
        load=_mean(loads),
    )


def _per_prompt(records: Iterable[OutputRecord]) -> dict[str, float]:
    """Tokens per second of each prompt, the median over repeats."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for record in records:
        if (speed := tokens_per_second(record)) is not None:
            found[record.prompt_id].append(speed)
    return {prompt: float(np.median(values)) for prompt, values in found.items()}


def _path_acceptance(steps: Iterable[Steps]) -> float | None:
    return _mean([accepted / depth for one in steps for _, depth, accepted, _ in one.rows() if depth])


def _milliseconds(records: Iterable[OutputRecord], name: str) -> float | None:
    """The mean time of an iteration in a stage."""
    timed = [(getattr(r, name), len(r.steps.depth)) for r in records if r.steps is not None]
    timed = [(seconds, count) for seconds, count in timed if seconds is not None and count]
    return 1000 * sum(seconds for seconds, _ in timed) / sum(count for _, count in timed) if timed else None


# acceptance


def acceptance_by_rank(records: Iterable[OutputRecord]) -> list[Share]:
    """For each rank, the share of drafted nodes of this rank under an accepted parent that were accepted."""
    return _shares(
        (rank, is_accepted)
        for trials in _trials(records)
        for rank, is_accepted in zip(trials.rank, trials.is_accepted, strict=True)
    )


def rank_shares(records: Iterable[OutputRecord]) -> list[Share]:
    """For each rank, the share of all new tokens that the drafter has there, whatever was drafted; from replays."""
    ranks = [rank for record in records if record.replay is not None for rank in record.replay.rank]
    return [Share(ranks.count(rank), len(ranks)) for rank in range(max(ranks, default=-1) + 1)]


def replayed_texts(records: Iterable[OutputRecord]) -> list[OutputRecord]:
    """The outputs with a replay, each text once: methods that agree have the same."""
    return list({(r.prompt_id, r.token_ids): r for r in records if r.replay is not None}.values())


def acceptance_by_depth(records: Iterable[OutputRecord]) -> list[Share]:
    """For depths 1, 2, …: of the accepted nodes one level above that got children, the share with an accepted child.

    A node that got children has one of rank 0, so these are counted.
    """
    reached: defaultdict[int, int] = defaultdict(int)
    accepted: defaultdict[int, int] = defaultdict(int)
    for trials in _trials(records):
        for depth, rank, is_accepted in zip(trials.depth, trials.rank, trials.is_accepted, strict=True):
            reached[depth] += rank == 0
            accepted[depth] += is_accepted
    return [Share(accepted[depth], reached[depth]) for depth in range(1, max(reached, default=0) + 1)]


def calibration(records: Iterable[OutputRecord], *, num_bins: int = 10) -> list[Bin]:
    """Drafted nodes under accepted parents by the drafter's probability, in bins of equal width that are not empty."""
    groups: list[list[tuple[float, bool]]] = [[] for _ in range(num_bins)]
    for trials in _trials(records):
        for probability, is_accepted in zip(trials.probability, trials.is_accepted, strict=True):
            groups[min(int(probability * num_bins), num_bins - 1)].append((probability, is_accepted))
    return [
        Bin(sum(p for p, _ in group) / len(group), Share(sum(is_accepted for _, is_accepted in group), len(group)))
        for group in groups
        if group
    ]


def accepted_depths(records: Iterable[OutputRecord]) -> list[int]:
    """How many iterations that drafted anything had 0, 1, 2, … tokens accepted."""
    accepted = [n for r in records if r.steps for drafted, _, n, _ in r.steps.rows() if drafted]
    return [accepted.count(n) for n in range(max(accepted, default=-1) + 1)]


def is_drafting(records: Iterable[OutputRecord]) -> bool:
    """Whether any of these outputs drafted anything; of foreign ones as far as it can be seen."""
    return any(any(record.steps.num_drafted) for record in records if record.steps is not None)


def over_length(records: Iterable[OutputRecord], *, num_bins: int = 10, min_width: int = 1) -> list[LengthBin]:
    """Acceptance and repetition along the outputs, in bins of equal width; bins in which none begins are left out.

    Args:
        records: of one method.
        num_bins: at most.
        min_width: of a bin, in tokens.
    """
    good = [record for record in records if record.steps is not None and record.token_ids]
    longest = max((len(record.token_ids) for record in good), default=0)
    width = max(math.ceil(longest / num_bins), min_width)
    rows: defaultdict[int, list[tuple[int, int, int]]] = defaultdict(list)
    repeated: defaultdict[int, list[bool]] = defaultdict(list)
    for record in good:
        assert record.steps is not None
        start = 0
        for _, depth, accepted, committed in record.steps.rows():
            rows[start // width].append((depth, accepted, committed))
            start += committed
        for place, is_repeated in enumerate(_repeated_ngrams(record.token_ids)):
            repeated[place // width].append(is_repeated)
    return [
        LengthBin(
            start=place * width,
            end=(place + 1) * width,
            num_iterations=len(rows[place]),
            tokens_per_iteration=sum(committed for _, _, committed in rows[place]) / len(rows[place]),
            path_acceptance=_mean([accepted / depth for depth, accepted, _ in rows[place] if depth]),
            repetition=_mean(repeated[place]),
        )
        for place in sorted(rows)
    ]


def _repeated_ngrams(token_ids: Sequence[int]) -> list[bool]:
    """Of each place where an n-gram begins, whether the same one began earlier."""
    seen: set[tuple[int, ...]] = set()
    found = []
    for start in range(len(token_ids) - NGRAM + 1):
        ngram = tuple(token_ids[start : start + NGRAM])
        found.append(ngram in seen)
        seen.add(ngram)
    return found


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _trials(records: Iterable[OutputRecord]) -> Iterator[Trials]:
    """Those of the first round: greedy decoding repeats them, which is no further evidence."""
    return (record.trials for record in records if record.trials is not None and record.repeat == 0)


def _shares(trials: Iterable[tuple[int, bool]]) -> list[Share]:
    counts: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0])
    for place, is_accepted in trials:
        counts[place][0] += is_accepted
        counts[place][1] += 1
    return [Share(*counts[place]) for place in range(max(counts, default=-1) + 1)]
