"""The oracle tree, against trying every tree that policies could grow."""

from __future__ import annotations

import itertools

import attrs
import pytest
from test_bench_formulas import all_trees
from test_bench_records import RECORD

from dynatree_bench.report.oracle import (
    CostTable,
    cost_table,
    oracle_accepted,
    oracle_accepted_at_cost,
    oracle_tokens_per_iteration,
    score,
)
from dynatree_bench.run.records import Replay, Steps

COSTS = CostTable(0.5, (1, 2, 4), (1.0, 1.5, 1.5))


def accepted_of(tree: frozenset[tuple[int, ...]], ranks: tuple[int, ...]) -> int:
    """How far a tree, given as its nodes' paths of ranks, follows the text."""
    return max((n for n in range(1, len(ranks) + 1) if ranks[:n] in tree), default=0)


@pytest.mark.parametrize("ranks", list(itertools.product((-1, 0, 1, 2), repeat=3)))
def test_no_tree_of_as_many_nodes_has_more_accepted(ranks):
    for num_nodes in range(6):
        trees = all_trees(num_nodes, 3, 3)
        assert trees or num_nodes > 3
        expected = max(accepted_of(tree, ranks) for tree in trees)
        assert oracle_accepted(ranks, num_nodes) == expected


@pytest.mark.parametrize("ranks", list(itertools.product((-1, 0, 1), repeat=3)))
@pytest.mark.parametrize("seconds", [0.9, 1.0, 2.0, 2.5, 3.0, 3.6])
def test_no_tree_of_the_same_cost_has_more_accepted(ranks, seconds):
    trees = [frozenset[tuple[int, ...]](), *itertools.chain(*(all_trees(n, 2, 3) for n in range(1, 7)))]
    affordable = [tree for tree in trees if COSTS.seconds(max(map(len, tree), default=0), len(tree)) <= seconds]
    expected = max((accepted_of(tree, ranks) for tree in affordable), default=0)
    assert oracle_accepted_at_cost(ranks, seconds, COSTS) == expected


def test_costs_between_and_beyond_the_table_s_rows():
    costs = CostTable(0.5, (1, 3, 5), (1.0, 2.0, 6.0))
    assert costs.seconds(0, 0) == 1.0
    assert costs.seconds(0, 1) == 1.5
    assert costs.seconds(2, 2) == 3.0
    assert costs.seconds(0, 6) == 10.0  # two rows more, two seconds each
    assert CostTable(0.5, (1,), (1.0,)).seconds(1, 7) == 1.5


# two iterations: 4 nodes, one token and the bonus token; then a chain of 2, both accepted and the bonus token
STEPS = Steps((4, 2), (2, 2), (1, 2), (2, 3))


def output(ranks, steps=STEPS, stop_reason="length"):
    return attrs.evolve(
        RECORD,
        token_ids=tuple(range(len(ranks))),
        steps=steps,
        trials=None,
        replay=Replay(tuple(ranks), (0.5,) * len(ranks)),
        stop_reason=stop_reason,
    )


def test_a_record_by_hand():
    # the first starts at token 0 with ranks 1, 0, 0, 0 before the last: 2 + 1 + 1 nodes are 3 tokens
    # the second starts at token 2 with 0, 0 left before the last: 2 tokens
    found = score([output([1, 0, 0, 0, 0])])
    assert found is not None
    assert (found.num_iterations, found.num_nodes, found.accepted, found.oracle_accepted) == (2, 6, 3, 5)
    assert found.share == 3 / 5
    assert found.oracle_tokens == 3.5


def test_a_token_that_was_not_proposed_ends_the_oracle_s_path():
    found = score([output([1, -1, 0, 0, 0])])
    assert found is not None
    assert found.oracle_accepted == 1 + 2


def test_an_output_that_an_end_token_stops_may_be_accepted_whole():
    steps = Steps((4, 3), (2, 3), (1, 3), (2, 3))
    assert score([output([0] * 5, steps, "eos")]).share == 4 / 7
    assert score([output([0] * 5, steps, "length")]).share == 4 / 6


def test_the_same_cost_by_hand():
    # the first tree takes 2·0.5 + 1.5 (5 rows, flat beyond 4) = 2.5 s, the second 2·0.5 + 1.5 = 2.5 s;
    # for that a chain of 2 is had, and no level more
    found = score([output([0] * 5)], COSTS)
    assert found is not None
    assert found.oracle_accepted == 4
    assert found.share == 3 / 4


def test_iterations_that_drafted_nothing_do_not_count():
    steps = Steps((0, 2, 0), (0, 2, 0), (0, 1, 0), (1, 2, 1))
    found = score([output([0] * 4, steps)])
    assert found is not None
    assert (found.num_iterations, found.accepted, found.oracle_accepted) == (1, 1, 2)
    nothing = Steps((0, 0), (0, 0), (0, 0), (1, 1))
    assert score([output([0, 0], nothing)]) is None
    assert score([attrs.evolve(output([0] * 5), replay=None)]) is None


def test_a_policy_that_is_as_good_as_can_be():
    found = score([output([0, 0, 0], Steps((2,), (2,), (2,), (3,)))])
    assert found is not None
    assert found.share == 1
    assert score([output([-1], Steps((2,), (2,), (0,), (1,)))]).share is None


def test_costs_are_estimated_from_what_was_timed():
    plain = attrs.evolve(
        RECORD, method="autoregressive", steps=Steps((0,) * 4, (0,) * 4, (0,) * 4, (1,) * 4), replay=None,
        verify_seconds=4.0, draft_seconds=0.0,
    )  # fmt: skip
    drafted = attrs.evolve(
        RECORD, method="fixed", verify_seconds=3.0, draft_seconds=2.0
    )  # 4 nodes, 4 levels in 2 steps
    costs = cost_table([plain, drafted, attrs.evolve(RECORD, steps=None)])
    assert costs == CostTable(0.5, (1.0, 3.0), (1.0, 1.5))
    slower = attrs.evolve(plain, verify_seconds=8.0)
    assert cost_table([slower, drafted]) == CostTable(0.5, (1.0, 3.0), (1.75, 1.75))  # not descending
    assert cost_table([attrs.evolve(RECORD, steps=None)]) is None


def test_decoding_by_oracle_trees_alone_by_hand():
    record = output([0, 1, 0, -1, 0, 0, 0], None)
    assert oracle_tokens_per_iteration([record], 0) == 1
    assert oracle_tokens_per_iteration([record], 1) == 7 / 4  # ends after tokens 2, 4, 6 and 7
    assert oracle_tokens_per_iteration([record], 3) == 7 / 3  # after 3, 4 and 7
    assert oracle_tokens_per_iteration([record], 4) == 7 / 2  # after 4 and 7
    assert oracle_tokens_per_iteration([attrs.evolve(record, replay=None)], 1) is None
