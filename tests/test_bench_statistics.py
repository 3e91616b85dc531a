"""The arithmetic of the reports, on records made by hand."""

from __future__ import annotations

import math
import statistics

import attrs
import numpy as np
import pytest
from test_bench_records import INFO, RECORD

from dynatree_bench.report.statistics import (
    Share,
    acceptance_by_depth,
    acceptance_by_rank,
    accepted_depths,
    calibration,
    estimate,
    over_length,
    pooled_ratio,
    rank_shares,
    ratios,
    summaries,
    tokens_per_second,
)
from dynatree_bench.run.records import Replay, Results, Steps, Trials, run_warnings


def output(method="fixed", prompt_id="a", *, seconds=2.0, tokens=(5, 6, 7, 8), **changes):
    plain = {"method": method, "prompt_id": prompt_id, "token_ids": tokens, "decode_seconds": seconds}
    nothing = {"steps": None, "trials": None, "replay": None}
    return attrs.evolve(RECORD, **{**plain, **nothing, **changes})


def test_an_estimate_by_hand():
    found = estimate([1.0, 2.0, 4.0, 9.0])
    assert (found.median, found.mean, found.count) == (3.0, 4.0, 4)
    assert found.sd == pytest.approx(statistics.stdev([1.0, 2.0, 4.0, 9.0]))
    assert 1.0 <= found.low < found.median < found.high <= 9.0
    assert estimate([1.0, 2.0, 4.0, 9.0]) == found  # the seed is fixed
    assert estimate([]) is None


def test_an_estimate_of_one_prompt_has_no_spread():
    found = estimate([2.0])
    assert (found.median, found.sd, found.low, found.high) == (2.0, None, 2.0, 2.0)


def test_the_interval_covers_the_median():
    """The true median is in the interval for 95 of 100 samples; fewer than 88 come by chance once in 1,000 times."""
    rng = np.random.default_rng(1)
    covered = sum(found.low <= 0 <= found.high for found in (estimate(list(rng.normal(size=25))) for _ in range(100)))
    assert covered >= 88


def test_wilson_s_interval_by_its_definition():
    """The limits are the shares p at which the observed one is 1.96 standard errors away."""
    share = Share(8, 10)
    for limit in share.interval:
        assert abs(0.8 - limit) == pytest.approx(1.959964 * math.sqrt(limit * (1 - limit) / 10), rel=1e-5)
    assert Share(0, 0).value is None
    assert Share(0, 0).interval is None
    assert Share(0, 5).interval[0] == pytest.approx(0)
    assert Share(5, 5).interval[1] == pytest.approx(1)


def test_speed_is_without_the_prefill_and_without_failures():
    assert tokens_per_second(output(seconds=2.0)) == 2.0
    assert tokens_per_second(output(seconds=0.0)) is None
    assert tokens_per_second(output(error="it broke")) is None


def test_ratios_are_by_prompt_and_repeat():
    base = [output("autoregressive", "a", seconds=4.0), output("autoregressive", "b", seconds=1.0)]
    base += [output("autoregressive", "a", seconds=40.0, repeat=1)]
    fast = [output("fixed", "a", seconds=2.0), output("fixed", "a", seconds=10.0, repeat=1)]
    fast += [output("fixed", "b", seconds=2.0), output("fixed", "c", seconds=2.0)]
    assert ratios(fast, base) == {"a": 3.0, "b": 0.5}  # the median of 2 and 4; "c" has no baseline


def test_ratios_of_outputs_of_different_lengths_are_those_of_their_speeds():
    assert ratios([output(seconds=2.0, tokens=(1, 2))], [output(seconds=2.0)]) == {"a": 0.5}


def test_a_pooled_ratio_by_hand():
    base = [output("autoregressive", "a", seconds=6.0), output("autoregressive", "b", seconds=2.0)]
    fast = [output("fixed", "a", seconds=1.0), output("fixed", "b", seconds=1.0), output("fixed", "c", seconds=9.0)]
    found = pooled_ratio(fast, base)
    # "c" has no baseline; a quarter of the resamples are "a" twice, and a quarter "b"
    assert (found.value, found.low, found.high, found.count) == (4.0, 2.0, 6.0, 2)
    assert pooled_ratio(fast[:1], base) == attrs.evolve(found, value=6.0, low=6.0, high=6.0, count=1)
    assert pooled_ratio(fast, []) is pooled_ratio([], base) is None
    assert pooled_ratio([output("fixed", "a", error="it broke")], base) is None


def test_a_pooled_ratio_takes_the_median_repeat_and_of_two_the_faster():
    base = [output("autoregressive", seconds=seconds, repeat=i) for i, seconds in enumerate((4.0, 40.0))]
    fast = [output("fixed", seconds=seconds, repeat=i) for i, seconds in enumerate((9.0, 2.0, 1.0))]
    assert pooled_ratio(fast, base).value == 2.0


def test_a_pooled_ratio_is_that_of_speeds_where_a_text_ends_elsewhere():
    assert pooled_ratio([output(seconds=2.0, tokens=(1, 2))], [output(seconds=2.0)]).value == 0.5


def test_a_pooled_ratio_takes_the_baseline_of_its_axes():
    base = [output("autoregressive", seconds=float(n), axes={"max_new_tokens": n}) for n in (4, 8)]
    assert pooled_ratio([output(seconds=2.0, axes={"max_new_tokens": 4, "base_depth": 5})], base).value == 2.0


def test_a_baseline_need_not_have_all_axes_but_none_that_differs():
    base = [output("autoregressive", seconds=1.0, axes={"max_new_tokens": 8})]
    base += [output("autoregressive", seconds=4.0, axes={"max_new_tokens": 4})]
    record = output(seconds=2.0, axes={"max_new_tokens": 4, "base_depth": 5})
    assert ratios([record], base) == {"a": 2.0}
    assert ratios([output(axes={"base_depth": 5})], base) == {}


def test_a_summary_by_hand():
    base = [output("autoregressive", prompt, seconds=4.0, peak_memory_bytes=100) for prompt in "ab"]
    hf = [output("hf generate", prompt, seconds=8.0) for prompt in "ab"]
    first = output("fixed", "a", seconds=2.0, steps=Steps((3, 1), (3, 1), (1, 1), (2, 2)), peak_memory_bytes=110)
    second = output(
        "fixed", "b", seconds=4.0, steps=Steps((4, 0), (2, 0), (2, 0), (3, 1)), is_identical=False, load=0.4
    )
    failed = output("fixed", "c", error="out of memory", tokens=(), is_identical=None)
    one, other, found = summaries([*base, *hf, first, second, failed])
    assert (one.method, other.method, found.method) == ("autoregressive", "hf generate", "fixed")
    assert (found.num_outputs, found.num_failed, found.error) == (2, 1, "out of memory")
    assert (found.num_compared, found.num_different, found.is_different) == (2, 1, True)
    assert (found.num_iterations, found.tokens_per_iteration) == (4, 2.0)
    assert found.path_acceptance == pytest.approx((1 / 3 + 1 + 1) / 3)
    assert found.node_acceptance == 4 / 8
    assert (found.nodes_per_iteration, found.depth) == (2.0, 2.0)
    assert (found.tokens_per_second.median, found.tokens_per_second.mean) == (1.5, 1.5)
    assert (found.speedup.median, found.speedup.count) == (1.5, 2)
    assert found.hf_speedup.median == 3.0
    assert (found.memory.median, found.memory.count) == (1.1, 1)
    assert (found.draft_ms, found.verify_ms, found.rest_ms, found.overhead_ms) == (250, 500, 250, 300)
    assert found.iteration_ms == 1000
    assert found.load == pytest.approx(0.21)
    assert found.repetition == 0
    assert one.speedup.median == 1
    assert (other.tokens_per_iteration, other.iteration_ms, one.is_different) == (None, None, False)


def test_a_method_is_summarised_at_each_point():
    records = [output(axes={"depth": depth}, seconds=float(depth)) for depth in (1, 2)]
    assert [one.axes for one in summaries(records)] == [{"depth": 1}, {"depth": 2}]
    assert [one.tokens_per_second.median for one in summaries(records)] == [4.0, 2.0]


def test_what_is_wrong_with_a_run_follows_from_its_records(tmp_path):
    records = tuple(output(prompt_id=str(i), load=load) for i, load in enumerate((None, 0.004, 0.006, 0.4)))
    run = Results(tmp_path, attrs.evolve(INFO, settings={"cores": 20, "outputs": 6}), records)
    busy, missing = run_warnings(run)  # a tenth of one of 20 cores is 0.005 of all
    assert busy.startswith("the machine was busy during 2 of 3 outputs")
    assert missing == "2 of 6 outputs are missing; the same command goes on"
    [busy] = run_warnings(attrs.evolve(run, info=attrs.evolve(INFO, settings={"cores": 1, "outputs": 4})))
    assert busy.startswith("the machine was busy during 1 of 3 outputs")
    assert run_warnings(attrs.evolve(run, info=INFO)) == []  # which does not say how many there are


# two children of the root, the second accepted; then its only child, accepted; then two children of that, neither
TRIALS = Trials((1, 1, 2, 3, 3), (0, 1, 0, 0, 1), (0.6, 0.3, 0.95, 0.5, 0.35), (False, True, True, False, False))


def test_acceptance_by_rank_and_depth_by_hand():
    records = [output(trials=TRIALS), output("fixed", "b", trials=Trials((1,), (0,), (1.0,), (True,)))]
    assert acceptance_by_rank(records) == [Share(2, 4), Share(1, 2)]
    assert acceptance_by_depth(records) == [Share(2, 2), Share(1, 1), Share(0, 1)]
    assert acceptance_by_rank([output()]) == acceptance_by_depth([output()]) == []


def test_trials_of_repeats_count_once():
    records = [output(trials=TRIALS, repeat=repeat) for repeat in range(3)]
    for count in (acceptance_by_rank, acceptance_by_depth, calibration):
        assert count(records) == count(records[:1]) != []


def test_ranks_of_all_tokens_come_from_replays():
    records = [output(replay=Replay((0, 2, -1, 0), (0.5, 0.1, 0.0, 0.9)))]
    assert rank_shares(records) == [Share(2, 4), Share(0, 4), Share(1, 4)]


def test_calibration_by_hand():
    records = [output(trials=TRIALS), output("fixed", "b", trials=Trials((1,), (0,), (1.0,), (True,)))]
    bins = calibration(records, num_bins=4)
    assert [one.share for one in bins] == [Share(1, 2), Share(0, 2), Share(2, 2)]
    assert [one.probability for one in bins] == pytest.approx([0.325, 0.55, 0.975])


def test_accepted_depths_by_hand():
    steps = Steps((2, 0, 2, 2), (2, 0, 2, 2), (2, 0, 0, 0), (3, 1, 1, 1))
    assert accepted_depths([output(tokens=(1, 2, 3, 4, 5, 6), steps=steps)]) == [2, 0, 1]
    assert accepted_depths([output()]) == []


def test_acceptance_over_length_by_hand():
    steps = Steps((2, 2, 0, 2), (2, 2, 0, 2), (2, 1, 0, 1), (3, 2, 1, 2))  # begin at 0, 3, 5, 6
    record = output(tokens=(1, 2, 1, 2, 1, 2, 1, 2), steps=steps)
    first, second = over_length([record], num_bins=2)
    assert (first.start, first.end, first.num_iterations, first.tokens_per_iteration) == (0, 4, 2, 2.5)
    assert (second.start, second.end, second.num_iterations, second.tokens_per_iteration) == (4, 8, 2, 1.5)
    assert (first.path_acceptance, second.path_acceptance) == (0.75, 0.5)
    assert (first.repetition, second.repetition) == (0.5, 1.0)  # 1212 at 0, 2, 4 and 2121 at 1, 3
    assert over_length([output()]) == []
