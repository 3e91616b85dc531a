"""The benchmark against the roofline: its trees yield what they are meant to, and its dry run measures everything."""

from __future__ import annotations

import pytest

from dynatree_bench.data.synthetic import rank_acceptance
from dynatree_bench.report.formulas import tree_tokens
from dynatree_bench.run import limits
from dynatree_bench.run.bandwidth import ReadSpeed
from dynatree_bench.run.pairs import Models
from dynatree_bench.run.passes import ROWS
from dynatree_bench.studies import roofline
from dynatree_bench.studies.roofline import DECAY, DRAFTED, LEVELS, NUM_RANKS, Results, Way, acceptance_for, shape_for
from dynatree_bench.studies.study import Asked, run_study
from dynatree_core import InputError
from dynatree_core.testing.models import tiny_model


@pytest.mark.parametrize(("tokens", "levels"), LEVELS.items())
def test_trees_yield_what_is_wanted(tokens, levels):
    tree = shape_for(tokens)
    assert (tree.num_nodes, tree.depth) == (DRAFTED, levels)
    ranks = rank_acceptance(acceptance_for(tokens), DECAY, NUM_RANKS)
    assert tree_tokens(tree, ranks) == pytest.approx(tokens, abs=1e-6)


def test_what_is_allowed_and_what_is_wanted():
    results = Results({"num_weights": 50, "weight_bytes": 100, "runners": ["eager"]}, [10.0, 20.0, 50.0], [500.0])
    assert results.weight_seconds == 5
    assert results.bandwidth_share(20.0) == 0.25
    assert (results.pass_seconds(1), results.pass_seconds(64)) == (5, 12.8)
    for way, seconds in ((Way("eager"), 10.0), (Way("eager", 3.0), 32.0), (Way("eager", 4.5), 16.0)):
        results.decoding[str(way)]["seconds"] = [seconds]
    assert roofline.verdicts(results) == [
        "autoregressive, eager: 0.50 of what bandwidth allows ÷ at least 0.8 wanted = 0.62",
        "tree of 3 tokens, 5 levels, eager: 3.20 steps ÷ at most 1.6 wanted = 2.00",
        "tree of 4.5 tokens, 5 levels, eager: 1.60 steps ÷ at most 1.6 wanted = 1.00",
    ]


def test_of_a_generation_the_median_counts_without_its_first_steps():
    first = [9.0] * roofline.SKIPPED
    assert roofline._steady([*first, 1.0, 2.0, 4.0]) == 2
    assert roofline._steady(first[:3]) == 9, "a short one has no others"


def test_steps_of_transformers_lie_between_tokens(monkeypatch):
    times = iter([0.0, 5.0, 6.0, 8.0, 8.5])  # the prompt, the first token, three more
    monkeypatch.setattr("dynatree_bench.run.methods.time.perf_counter", lambda: next(times))
    assert roofline._transformers_seconds(tiny_model("llama"), [1, 2, 3], 4) == [1.0, 2.0, 0.5]


def test_the_dry_run(monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "read_speed", lambda device: ReadSpeed(12.5e9, None))
    asked = Asked(Models(device="cpu"), tmp_path, is_quick=True, repeats=1, max_new_tokens=(12,))
    result = run_study("roofline", asked, command="the command")
    found = result.found
    assert found["provenance"]["is_synthetic"]
    assert found["bandwidth"] == [12.5e9], "of one round; the first one warms up"
    assert found["provenance"]["runners"][0] == "eager"
    assert set(found["decoding"]) == {str(way) for way in roofline.ways(Results(found["provenance"]))}
    for way, numbers in found["decoding"].items():
        assert all(value > 0 for values in numbers.values() for value in values), way
    said = "\n".join(result.sentences)
    wanted = ("synthetic: random weights", "÷ at least 0.8 wanted", "÷ at most 1.6 wanted", "a dry run", "12.5 GB/s")
    assert all(words in said for words in wanted)
    decoding, passes = result.tables
    assert [row[0] for row in decoding.rows] == list(map(str, roofline.ways(Results(found["provenance"]))))
    assert [row[0] for row in passes.rows] == list(map(str, ROWS))


def test_without_room_for_a_buffer_there_is_no_bandwidth_and_no_run(monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "read_speed", lambda device: None)
    with pytest.raises(InputError, match="room for a buffer larger than its caches"):
        run_study("roofline", Asked(Models(device="cpu"), tmp_path, is_quick=True), command="the command")
    assert not list(tmp_path.iterdir())
