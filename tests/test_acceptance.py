"""The acceptance estimator: the drafter's word without data, the truth with enough of it."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from dynatree_core import AcceptanceEstimator, StepReport, TokenTree, Verdict
from dynatree_core.errors import InputError
from dynatree_core.policy.acceptance import KEPT


def predict(estimator: AcceptanceEstimator, prob: float, rank: int = 0, depth: int = 1) -> float:
    return estimator.predict(torch.tensor([prob]).log(), torch.tensor([rank]), depth).item()


def level(probs: list[float]) -> TokenTree:
    """A root and its children."""
    root = TokenTree.root(torch.tensor([0]))
    return root.grow(torch.zeros(len(probs), dtype=torch.int64), torch.arange(len(probs)), torch.tensor(probs).log())


def judge(estimator: AcceptanceEstimator, tree: TokenTree, path: tuple[int, ...], stop: str | None = None) -> None:
    estimator.observe(StepReport(0, tree, Verdict(path, path, (0,) * (len(path) + 1), stop)))


@pytest.mark.parametrize("prob", [0.0, 0.004, 0.3, 0.77, 1.0])
def test_without_data_the_drafter_is_believed(prob):
    estimator = AcceptanceEstimator()
    assert predict(estimator, prob) == pytest.approx(prob)
    assert predict(estimator, prob, rank=7, depth=30) == pytest.approx(prob)


def test_it_converges_to_the_truth():
    """A drafter that is too sure: what it gives p is accepted with p², its second choice with a third of that.

    Each cell that is compared has seen n nodes; the estimate is within 4 standard errors of the truth, which all 12
    are with a probability above 0.999, besides what is left of the prior.
    """
    source = random.Random(5)
    estimator = AcceptanceEstimator()
    probs = [0.15, 0.3, 0.45, 0.6, 0.75, 0.95]
    counts = dict.fromkeys(probs, 0)
    for _ in range(6000):
        prob = source.choice(probs)
        counts[prob] += 1
        second = min(prob, 1 - prob)
        first_is_right = source.random() < prob**2
        second_is_right = not first_is_right and source.random() < second**2 / 3 / (1 - prob**2)
        judge(estimator, level([prob, second]), (1,) if first_is_right else (2,) if second_is_right else ())
    for prob, n in counts.items():
        error = 4 * math.sqrt(prob**2 * (1 - prob**2) / n) + 8 / n
        assert predict(estimator, prob) == pytest.approx(prob**2, abs=error)
    assert predict(estimator, 0.45, rank=1) == pytest.approx(0.45**2 / 3, abs=0.04)


def test_a_rank_that_was_never_seen_takes_after_nodes_of_like_probability():
    estimator = AcceptanceEstimator()
    for _ in range(200):
        judge(estimator, level([0.4]), ())
    assert predict(estimator, 0.4) < 0.001
    assert predict(estimator, 0.4, rank=2) < 0.02  # one step has seen it
    assert predict(estimator, 0.4, depth=9) < 0.01
    assert predict(estimator, 0.05, rank=2) == pytest.approx(0.05)  # nothing like it was seen


def test_the_priors_weigh_as_much_as_they_say():
    estimator = AcceptanceEstimator(weights=(8.0, 2.0, 5.0))
    judge(estimator, level([0.4]), (1,))
    once = (8 * 0.4 + 1) / 9  # by probability; then by rank, then by depth, each with the one before as its prior
    twice = (2 * once + 1) / 3
    assert predict(estimator, 0.4) == pytest.approx((5 * twice + 1) / 6)
    assert predict(estimator, 0.4, rank=1) == pytest.approx(once)
    assert predict(estimator, 0.4, depth=2) == pytest.approx(twice)


def test_only_children_of_accepted_nodes_are_judged():
    tree = level([0.4, 0.3])  # nodes 1 and 2
    tree = tree.grow(torch.tensor([1, 2]), torch.arange(2), torch.tensor([0.9, 0.06]).log())  # nodes 3 and 4
    estimator = AcceptanceEstimator()
    judge(estimator, tree, (2,))
    assert estimator.counts[0].sum(dim=1).tolist() == [1, 3]
    assert predict(estimator, 0.9) == pytest.approx(0.9)  # node 3 has a rejected parent
    assert predict(estimator, 0.06) < 0.06  # node 4 was rejected
    before = [counts.clone() for counts in estimator.counts]
    judge(estimator, tree, (2,), "eos")
    judge(estimator, TokenTree.root(torch.tensor([0])), ())
    assert all(map(torch.equal, before, estimator.counts))


def test_a_child_has_the_rank_that_it_was_drafted_with():
    estimator, tree = AcceptanceEstimator(), level([0.42, 0.4])
    for _ in range(50):
        judge(estimator, tree.subtree(torch.tensor([True, False, True])), (1,))
    assert predict(estimator, 0.41, rank=1) > predict(estimator, 0.41, rank=0)


def test_what_cannot_be_is_not_accepted():
    estimator = AcceptanceEstimator()
    for _ in range(9):
        judge(estimator, level([0.001]), (1,))
    assert predict(estimator, 0.001) > 0.5
    assert predict(estimator, 0.0) == 0.0  # not drafted at all


def test_what_was_learnt_can_be_kept(tmp_path):
    estimator, file = AcceptanceEstimator(), tmp_path / "acceptance.json"
    for accepted in (True, False, True):
        judge(estimator, level([0.4, 0.3]), (1,) if accepted else ())
    estimator.save(file)
    again = AcceptanceEstimator()
    again.load(file)
    assert predict(again, 0.4) == pytest.approx(predict(estimator, 0.4)) != pytest.approx(0.4)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_old_observations_give_way_to_new_ones(tmp_path):
    estimator, file = AcceptanceEstimator(), tmp_path / "acceptance.json"
    for _ in range(1000):
        judge(estimator, level([0.4]), (1,))
    estimator.save(file)
    estimator.load(file)
    assert estimator.counts[-1].sum(dim=(1, 2, 3)).tolist() == [KEPT, KEPT]
    assert predict(estimator, 0.4) > 0.95
    for _ in range(int(KEPT)):
        judge(estimator, level([0.4]), ())
    assert predict(estimator, 0.4) == pytest.approx(0.5, abs=0.06)


def kept(outcomes: int, value: float) -> str:
    """What `save` might have written, with one value everywhere."""
    counts = [torch.full((outcomes, *shape), value).tolist() for shape in ((11,), (11, 4), (11, 4, 4))]
    return json.dumps({"format": 1, "counts": counts})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": 1}',
        '{"format": 1, "counts": [[[1]], [[2]], 3]}',
        kept(2, 3.0).replace('"format": 1', '"format": 2'),
        kept(2, -1.0),
        kept(1, 3.0),
    ],
)
def test_another_file_is_refused(tmp_path, text):
    file = tmp_path / "acceptance.json"
    file.write_text(text)
    with pytest.raises(InputError, match="must hold acceptance counts"):
        AcceptanceEstimator().load(file)


def test_the_weights_of_priors_may_be_a_list():
    given, usual = AcceptanceEstimator(weights=[8.0, 16.0, 16.0]), AcceptanceEstimator()
    logprob = torch.tensor([-0.5, -2.0, -torch.inf])
    assert torch.equal(given.predict(logprob, None, 1), usual.predict(logprob, None, 1))
