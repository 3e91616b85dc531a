"""Measuring on tiny models: exact outputs, complete records, and an order that favours nobody."""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import time
from collections import Counter

import attrs
import pytest
import torch
from bench_runs import OURS, PLAIN, SMALL, by_method, run, tiny_pair

from dynatree_bench.report import oracle
from dynatree_bench.report.statistics import summaries
from dynatree_bench.run import measure, methods
from dynatree_bench.run.experiments import EXPERIMENTS, REFERENCE, cells, chosen_methods
from dynatree_bench.run.machine import LoadMeter
from dynatree_bench.run.measure import Options
from dynatree_bench.run.methods import Output
from dynatree_bench.run.pairs import Pair
from dynatree_bench.run.records import RECORDS_FILE
from dynatree_core.drafters.base import Drafter, DraftState, padded_proposals
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.drafters.union import UnionDrafter
from dynatree_core.testing.models import greedy
from dynatree_core.tree.token_tree import TokenTree
from dynatree_core.tree.verdict import StepReport, Verdict


@pytest.fixture(scope="module")
def pair():
    return tiny_pair()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_makes_each_output_once_and_exactly(name, pair, tmp_path):
    options = attrs.evolve(SMALL, num_prompts=2)
    if name == "prompt-length":
        options = attrs.evolve(options, prompt_tokens=[5, 9])
    if name == "scalability":
        options = attrs.evolve(options, max_new_tokens=[3, 6])
    results = run(name, pair, tmp_path / "run", options)  # reading it checks the schema
    info, records = results.info, results.records
    assert (info.experiment, info.target.name, info.is_synthetic) == (name, "tiny", False)
    form = attrs.evolve(EXPERIMENTS[name].quick, max_new_tokens=tuple(options.max_new_tokens))
    num_lengths = {"prompt-length": 2, "datasets": 3}.get(name, 1)  # or workloads: as many groups of prompts
    num_cells = len(list(cells(chosen_methods(EXPERIMENTS[name]), form, {})))
    assert len(records) == 2 * num_lengths * num_cells
    assert {axis: set(map(str, values)) for axis, values in info.axes.items()} == {
        axis: {str(record.axes[axis]) for record in records if axis in record.axes} for axis in info.axes
    }
    for record in records:
        assert record.error is None, record
        assert record.is_identical, record
        assert len(record.token_ids) == record.axes["max_new_tokens"]
        assert record.total_seconds >= record.decode_seconds > 0
        if record.method in OURS:
            parts = record.draft_seconds + record.verify_seconds + record.rest_seconds
            assert parts == pytest.approx(record.decode_seconds)
        else:
            assert record.draft_seconds is record.verify_seconds is record.overhead_seconds is None
            assert record.trials is None
        assert record.steps is not None
        assert (record.trials is not None) == (record.method in OURS - PLAIN)


def test_records_hold_what_a_generation_says(pair, tmp_path):
    results = run("main", pair, tmp_path / "run", attrs.evolve(SMALL, max_new_tokens=[12], with_replay=True))
    prompts = {p.prompt_id: list(p.token_ids) for p in measure.random_prompts("random:0", 3, None, 37)}
    for record in results.records:
        prompt = prompts[record.prompt_id]
        assert list(record.token_ids) == greedy(pair.target.model, prompt, 12)
        assert record.num_prompt_tokens == len(prompt)
        assert record.stop_reason == "length"
        if record.trials is not None:
            trials, steps = record.trials, record.steps
            assert sum(trials.is_accepted) == sum(steps.num_accepted)
            at_root = [rank for rank, depth in zip(trials.rank, trials.depth, strict=True) if depth == 1]
            assert at_root.count(0) == sum(depth > 0 for depth in steps.depth)
            assert len(trials.rank) <= sum(steps.num_drafted)
            assert attrs.asdict(record.replay) == expected_replay(pair, prompt, record.token_ids)
        else:
            assert record.replay is None
    chains = by_method(results)
    for name in ("linear", "hf assisted constant", "hf assisted heuristic"):
        assert any(max(record.steps.num_committed) > 1 for record in chains[name])
        assert all(record.steps.depth == record.steps.num_drafted for record in chains[name])
    assert all(set(record.steps.num_drafted) == {0} for record in chains["hf generate"] + chains["autoregressive"])
    # with the same chain length transformers and our own chain accept the same tokens
    first = Counter(record.steps.num_committed[0] for record in chains["hf assisted constant"])
    assert first == Counter(min(record.steps.num_committed[0], 6) for record in chains["linear"])


@attrs.frozen
class Successors(Drafter, DraftState):
    """Proposes what it was told of a node's token with this share; its state is itself, since it remembers nothing."""

    known: dict[int, int]
    share: float
    can_skip_levels: bool = False

    def start(self, plan):
        return self

    def propose(self, committed_ids, tree, k):
        level = tree.token_ids[tree.last_level].tolist()
        ids = torch.tensor([[self.known.get(token, 0)] for token in level])
        shares = torch.tensor([[self.share * (token in self.known)] for token in level])
        return padded_proposals(ids, shares.log(), k)

    def prefill(self, committed_ids):
        pass

    def commit(self, draft_path):
        pass

    def rollback(self):
        pass


def test_no_tree_has_more_accepted_than_the_oracle_tree_where_a_union_skips_its_model(pair, tmp_path):
    """The model is skipped at a level where all nodes' successors are known, and else asked about them too."""
    texts = [greedy(pair.target.model, list(p.token_ids), 60) for p in measure.random_prompts("random:0", 6, None, 37)]
    known = {token: after for text in texts for token, after in itertools.pairwise(text) if token % 2}
    union = Pair(pair.target, UnionDrafter([pair.drafter, Successors(known, 0.36)]))  # 0.64 < 0.7 is left over
    options = attrs.evolve(SMALL, num_prompts=6, max_new_tokens=[60], with_replay=True)
    num_accepted = 0
    for record in run("scalability", union, tmp_path / "run", options).records:
        for _, drafted, accepted, ranks in oracle._iterations(record):
            assert accepted <= oracle.oracle_accepted(ranks, drafted)
            num_accepted += accepted
    assert num_accepted > 100


def test_a_token_s_replay_is_its_best_rank_with_and_without_what_a_union_may_skip(pair):
    """What stands for the model is sure of token 1, the other drafter thinks of token 2; where both speak, 1 is first.

    Of 0.25, 0.75 > 0.7 is left over, so the model is always asked; of 0.36 it is not where no other node needs it.
    """
    model = Successors({6: 1}, 0.99, can_skip_levels=True)
    for share, expected in ((0.25, (0, 1, -1)), (0.36, (0, 0, -1))):
        union = Pair(pair.target, UnionDrafter([model, Successors({6: 2}, share)]))
        ranks = tuple(methods.replay(union, [5, 6], [token]).rank[0] for token in (1, 2, 3))
        assert ranks == expected


def expected_replay(pair, prompt, token_ids):
    """From one forward pass of the drafter over everything."""
    with torch.no_grad():
        logits = pair.drafter.model(torch.tensor([[*prompt, *token_ids]])).logits[0, len(prompt) - 1 : -1]
    order = logits.argsort(dim=-1, descending=True).tolist()
    ranks = [row.index(token) for row, token in zip(order, token_ids, strict=True)]
    probs = logits.softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0].tolist()
    seen = [rank < methods.MAX_BRANCH for rank in ranks]
    return {
        "rank": tuple(rank if is_seen else -1 for rank, is_seen in zip(ranks, seen, strict=True)),
        "probability": tuple(
            pytest.approx(p, abs=1e-5) if is_seen else 0.0 for p, is_seen in zip(probs, seen, strict=True)
        ),
    }


def test_trials_of_a_tree_made_by_hand():
    """Root 0; children 1 and 2; 1 has 3 and 4, 2 has 5. The target accepts 2, then 5."""
    tree = TokenTree.root(torch.tensor([7]))
    tree = tree.grow(torch.tensor([0, 0]), torch.tensor([1, 2]), torch.tensor([0.5, 0.25]).log())
    tree = tree.grow(torch.tensor([1, 1, 2]), torch.tensor([3, 4, 5]), torch.tensor([0.5, 0.5, 1.0]).log())
    whole = StepReport(0, tree, Verdict((2, 5), (2, 5), (2, 5, 9)))
    expected = methods.Trials((1, 1, 2), (0, 1, 0), (0.5, 0.25, 1.0), (False, True, True))
    assert methods._trials([whole]) == expected
    # a node that was cut leaves its sibling the rank that it was drafted with
    pruned = tree.subtree(torch.tensor([True, False, True, False, False, True]))
    rest = StepReport(0, pruned, Verdict((1, 2), (2, 5), (2, 5, 9)))
    assert methods._trials([rest]) == methods.Trials((1, 2), (1, 0), (0.25, 1.0), (True, True))
    # stopped with node 2: nobody asked what follows it
    cut = StepReport(0, tree, Verdict((2,), (2,), (2,), "eos"))
    assert methods._trials([cut]) == methods.Trials((1, 1), (0, 1), (0.5, 0.25), (False, True))
    assert methods._trials([]) == methods.Trials((), (), (), ())


def test_seconds_of_decoding_are_those_of_all_tokens():
    # 1 s for a prompt and its first token, 4 s for 4 more: a token takes 1 s, and 5 take 5
    assert methods._split(5.0, 1.0, 1, 5) == (0.0, 5.0)
    assert methods._split(7.0, 3.0, 1, 5) == (2.0, 5.0)
    assert methods._split(3.0, 3.0, 2, 2) == (3.0, 0.0)  # at what pace is not known


def test_methods_are_interleaved_in_an_order_that_is_shuffled_for_each_prompt_and_repeat(pair, tmp_path):
    options = attrs.evolve(SMALL, repeats=2)
    results = run("scalability", pair, tmp_path / "run", options)
    groups = [list(results.records[i : i + 3]) for i in range(0, len(results.records), 3)]
    assert len(groups) == 6
    for group in groups:
        assert len({(record.prompt_id, record.repeat) for record in group}) == 1
        assert sorted(record.order for record in group) == [0, 1, 2]
    orders = orders_of(results)
    assert len(set(orders.values())) > 1
    assert orders_of(run("scalability", pair, tmp_path / "again", options)) == orders
    cut_off = attrs.evolve(options, time_limit=1e-6)
    run("scalability", pair, tmp_path / "cut", cut_off)
    assert orders_of(run("scalability", pair, tmp_path / "cut", options)) == orders


def orders_of(results):
    """(prompt, repeat) -> the methods in the order in which they decoded it."""
    found = {}
    for record in sorted(results.records, key=lambda record: record.order):
        found.setdefault((record.prompt_id, record.repeat), []).append(record.method)
    return {key: tuple(names) for key, names in found.items()}


def test_a_machine_that_slows_down_favours_no_point_of_the_axes(pair, tmp_path, monkeypatch):
    """Every output takes 0.2 % more than the one before. In the order of the table depth 8 would be a sixth slower than
    depth 3; of 32 shuffled places a depth's mean has a standard error of 1 %.
    """
    made = []

    def decode(pair, cell, prompt_ids, eos):
        made.append(cell)
        seconds = 1 + 0.002 * len(made)
        return Output(tuple(range(4)), "length", 0.1, seconds, seconds + 0.1)

    monkeypatch.setattr(measure, "decode", decode)
    results = run("tree-search", pair, tmp_path / "run", Options(num_prompts=2, max_new_tokens=[4]))
    depths = [one for one in summaries(results.records) if one.method == "fixed"]
    mean = statistics.fmean(one.speedup.median for one in depths)
    for depth in (3, 4, 5, 6, 7, 8):
        own = statistics.fmean(one.speedup.median for one in depths if one.axes["depth"] == depth)
        assert own == pytest.approx(mean, rel=0.04)


def test_prompts_of_several_data_sets_come_in_turn(pair, tmp_path):
    results = run("datasets", pair, tmp_path / "run")
    names = list(dict.fromkeys((record.axes["dataset"], record.prompt_id) for record in results.records))
    assert [name for name, _ in names] == ["random:0", "random:1", "random:2"] * 3


def test_a_method_that_differs_is_marked(pair, tmp_path, monkeypatch):
    def decode(pair, cell, prompt_ids, eos):
        output = methods.decode(pair, cell, prompt_ids, eos)
        if cell.method.name == "hf generate":
            output = attrs.evolve(output, token_ids=(*output.token_ids[:-1], (output.token_ids[-1] + 1) % 37))
        return output

    monkeypatch.setattr(measure, "decode", decode)
    results = run("main", pair, tmp_path / "run", attrs.evolve(SMALL, only=["hf generate", "fixed"]))
    found = {name: [record.is_identical for record in records] for name, records in by_method(results).items()}
    assert found == {"autoregressive": [True] * 3, "hf generate": [False] * 3, "fixed": [True] * 3}


def test_a_repeat_of_the_reference_is_compared_with_the_first_one(pair, tmp_path, monkeypatch):
    """A target that is not deterministic: autoregressive decoding gives another text each time."""
    made = []

    def decode(pair, cell, prompt_ids, eos):
        made.append(cell)
        tokens = (len(made),) if cell.method == REFERENCE else (1,)
        return Output(tokens, "length", 0.1, 1.0, 1.1)

    monkeypatch.setattr(measure, "decode", decode)
    options = attrs.evolve(SMALL, num_prompts=1, repeats=3, only=["fixed"])
    found = by_method(run("main", pair, tmp_path / "run", options))
    first = found["autoregressive"][0].token_ids
    assert [record.is_identical for record in found["autoregressive"]] == [True, False, False]
    assert [record.is_identical for record in found["fixed"]] == [
        record.token_ids == first for record in found["fixed"]
    ]

    def again(pair, cell, prompt_ids, eos):
        return Output(first, "length", 0.1, 1.0, 1.1)

    # the same where the run goes on: what it compares with is in the file
    path = tmp_path / "run" / RECORDS_FILE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))  # two repeats
    monkeypatch.setattr(measure, "decode", again)
    assert all(r.is_identical for r in run("main", pair, tmp_path / "run", options).records if r.repeat == 2)


def test_beyond_their_window_outputs_with_sinks_are_compared_with_their_own_reference(pair, tmp_path):
    long = Pair(pair.target, ModelDrafter(pair.target.model))  # with room for the prompts
    options = attrs.evolve(SMALL, num_prompts=2, prompt_tokens=[1100], only=["phase3 sinks"])
    found = by_method(run("main", long, tmp_path / "run", options))
    assert list(found) == ["autoregressive", "autoregressive sinks", "phase3 sinks"]
    assert all(record.is_identical for records in found.values() for record in records)
    plain, sinks = ({r.token_ids for r in found[name]} for name in ("autoregressive", "phase3 sinks"))
    assert plain != sinks


def test_load_is_the_share_that_others_use():
    assert LoadMeter().share() is None  # no time has passed
    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        busy, end = 0.0, time.monotonic() + 60
        while busy <= 0.3 / (os.cpu_count() or 1) and time.monotonic() < end:  # the other process takes time to start
            meter = LoadMeter()
            time.sleep(0.6)
            busy = meter.share() or 0.0
    finally:
        spinning.kill()
        spinning.wait()
    assert 0.3 / (os.cpu_count() or 1) < busy <= 1.0
    meter, end = LoadMeter(), time.perf_counter() + 0.3
    while time.perf_counter() < end:
        pass
    assert 0.0 <= meter.share() <= 1.0
