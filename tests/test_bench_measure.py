"""Measuring: every experiment on tiny models, what a record says, and that a run that was killed goes on."""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import attrs
import pytest
import torch
from students import tiny_student
from test_cli import byte_level_tokenizer, for_transformers

from dynatree_bench.data.workloads import Picks
from dynatree_bench.report import oracle
from dynatree_bench.report.statistics import summaries
from dynatree_bench.run import bandwidth, measure, methods, rivals, runnable
from dynatree_bench.run.bandwidth import ReadSpeed, step_reads
from dynatree_bench.run.experiments import EXPERIMENTS, REFERENCE, Form, Method, cells, chosen_methods
from dynatree_bench.run.machine import LoadMeter, source_commit, weights_sha256
from dynatree_bench.run.measure import Options, run_experiment
from dynatree_bench.run.methods import Output
from dynatree_bench.run.pairs import MethodError, Pair
from dynatree_bench.run.records import RECORDS_FILE, MemoryInfo, read_records, read_results
from dynatree_core import InputError, LoadedModel, build_drafter, hookimpl
from dynatree_core.drafters.base import Drafter, padded_proposals
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.drafters.union import UnionDrafter
from dynatree_core.errors import PolicyError
from dynatree_core.models.student import save_student
from dynatree_core.testing.models import greedy, perturbed, tiny_model
from dynatree_core.tree.token_tree import TokenTree
from dynatree_core.tree.verdict import StepReport, Verdict

ROOT = Path(__file__).parents[1]
SMALL = Options(quick=True, num_prompts=3, max_new_tokens=[6])
PLAIN = {"autoregressive", "autoregressive eager", "autoregressive sinks"}
OURS = {method.name for method in chosen_methods(EXPERIMENTS["main"]) if method.kind == "dynatree"}
LONG = {"max_position_embeddings": 2048}  # room for sinks and a window


class IdleMeter:
    """A machine on which nothing else runs, whatever does."""

    def share(self):
        return 0.0


@pytest.fixture(autouse=True)
def _idle(monkeypatch):
    monkeypatch.setattr(measure, "LoadMeter", IdleMeter)


@pytest.fixture(scope="module")
def pair():
    return Pair(LoadedModel(tiny_model("llama", **LONG), None, "tiny"), ModelDrafter(perturbed("llama")))


def run(name, pair, out, options=SMALL, **settings):
    return run_experiment(name, pair, out, options, **{"idle_check_seconds": 0, "with_bandwidth": False, **settings})


def by_method(results):
    return {method.name: [r for r in results.records if r.method == method.name] for method in results.info.methods}


# every experiment, end to end


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
class Successors(Drafter):
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


# interleaving


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


# going on


KILLED_RUN = """
import sys
from pathlib import Path
from dynatree_bench.run.measure import Options, run_experiment
from dynatree_bench.run.pairs import Pair
from dynatree_core import LoadedModel
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.testing.models import perturbed, tiny_model
import torch

torch.set_num_threads(1)
pair = Pair(LoadedModel(tiny_model("llama"), None, "tiny"), ModelDrafter(perturbed("llama")))
run_experiment(
    "ablation", pair, Path(sys.argv[1]), Options(quick=True, num_prompts=12, max_new_tokens=[12]), idle_check_seconds=0
)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_and_redoes_nothing(pair, tmp_path, monkeypatch):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", KILLED_RUN, str(out)], cwd=ROOT)
    wait_for_records(out / RECORDS_FILE, 10, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with (out / RECORDS_FILE).open("ab") as file:  # and the machine with it, in the middle of a line
        file.write(b'{"experiment":"abla')
    before = read_records(out)
    assert len(before) >= 10

    made = []
    monkeypatch.setattr(measure, "decode", counting(made))
    options = Options(quick=True, num_prompts=12, max_new_tokens=[12])
    monkeypatch.setattr(measure, "QUICK_SECONDS", 600.0)
    results = run("ablation", pair, out, options)
    assert results.records[: len(before)] == before
    assert len(results.records) == 12 * 13  # reading refuses a key that is there twice
    num_warm_ups = 5
    assert len(made) - num_warm_ups == len(results.records) - len(before)
    assert len(results.info.continued) == 1
    assert all(record.is_identical for record in results.records)

    made.clear()
    assert run("ablation", pair, out, options).records == results.records
    assert made == []  # no warm-up either


def wait_for_records(path, count, process):
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def counting(made):
    def decode(pair, cell, prompt_ids, eos):
        made.append(cell)
        return methods.decode(pair, cell, prompt_ids, eos)

    return decode


def test_an_interrupted_prompt_is_finished(pair, tmp_path, monkeypatch):
    out, made = tmp_path / "run", []

    def decode(pair, cell, prompt_ids, eos):
        made.append(cell)
        if len(made) == 3 + 5:  # after the warm-up of three methods: the second output of the second prompt
            raise KeyboardInterrupt
        return methods.decode(pair, cell, prompt_ids, eos)

    def autoregressive_last(task):
        return [*task.cells[1:], task.cells[0]]

    monkeypatch.setattr(measure, "decode", decode)
    monkeypatch.setattr(measure.Task, "shuffled", autoregressive_last)
    with pytest.raises(KeyboardInterrupt):
        run("scalability", pair, out)
    # the output before it waited for the greedy one, which had not come
    assert [record.method for record in read_records(out)] == ["fixed", "phase3", "autoregressive"]
    results = run("scalability", pair, out)
    assert len(results.records) == 9
    assert all(record.is_identical for record in results.records)


def test_other_settings_in_the_same_folder_are_refused(pair, tmp_path):
    out = tmp_path / "run"
    run("scalability", pair, out)
    kept = (out / "run.json").read_bytes()
    for changed, said in (
        ({"max_new_tokens": [7]}, "axes max_new_tokens: [6] there, [7] now"),
        ({"ignore_eos": True}, "ignore_eos: False there, True now"),
        ({"num_prompts": 4}, "settings prompts: 3 there, 4 now"),
        ({"policies": ["linear"]}, "methods: autoregressive, fixed, phase3 there, autoregressive, linear now"),
    ):
        with pytest.raises(InputError, match="give the same settings") as caught:
            run("scalability", pair, out, attrs.evolve(SMALL, **changed))
        assert said in str(caught.value)
    other = Pair(pair.target, build_drafter("prompt_lookup"))
    with pytest.raises(InputError, match="holds a run with other settings"):
        run("scalability", other, out)
    with pytest.raises(InputError, match="experiment: scalability there, ablation now"):
        run("ablation", pair, out)
    assert (out / "run.json").read_bytes() == kept


def test_two_runs_in_one_folder_at_once_are_refused(pair, tmp_path, monkeypatch):
    out, said = tmp_path / "run", []

    def decode(pair, cell, prompt_ids, eos):
        if not said:
            with pytest.raises(InputError, match="have one run at a time, and another one is writing to") as caught:
                run("scalability", pair, out)
            said.append(str(caught.value))
        return methods.decode(pair, cell, prompt_ids, eos)

    monkeypatch.setattr(measure, "decode", decode)
    assert len(run("scalability", pair, out).records) == 9
    assert "give another --out" in said[0]
    assert len(run("scalability", pair, out).records) == 9  # the folder is free again


def test_a_run_that_goes_on_with_another_version_says_so(pair, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(measure, "version", lambda name: "0.0.9")
    run("scalability", pair, out, attrs.evolve(SMALL, time_limit=1e-6))
    monkeypatch.undo()
    assert f"went on with dynatree {measure.version('dynatree')}" in run("scalability", pair, out).info.notes


def test_a_length_that_is_given_twice_counts_once(pair, tmp_path):
    said = []
    options = attrs.evolve(SMALL, max_new_tokens=[6, 6], prompt_tokens=[9, 5, 9])
    results = run("scalability", pair, tmp_path / "run", options, say=said.append)
    assert results.info.axes == {"prompt_tokens": [9, 5], "max_new_tokens": [6]}
    assert results.info.settings["outputs"] == len(results.records) == 3 * 3 * 2
    assert said == []


def test_a_folder_that_is_a_file_is_refused(pair, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="goes to a folder, got"):
        run("scalability", pair, tmp_path / "file")


def test_a_folder_of_somebody_elses_is_refused(pair, tmp_path):
    (tmp_path / RECORDS_FILE).write_text("a record of mine, without an end")
    with pytest.raises(InputError, match="`dynatree bench` writes must go to a folder that is new, empty"):
        run("scalability", pair, tmp_path)
    assert (tmp_path / RECORDS_FILE).read_text() == "a record of mine, without an end"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_time_limit_leaves_whole_prompts_for_later(pair, tmp_path):
    said = []
    results = run("scalability", pair, tmp_path / "run", attrs.evolve(SMALL, time_limit=1e-6), say=said.append)
    left = 9 - len(results.records)
    assert left in (6, 9)
    assert f"{left} of 9 outputs are missing; the same command goes on" in said
    said.clear()
    results = run("scalability", pair, tmp_path / "run", SMALL, say=said.append)
    assert len(results.records) == 9
    assert results.info.notes == ()
    assert not any("missing" in sentence for sentence in said)


def test_the_quick_form_lets_a_first_prompt_of_each_kind_pass_its_limit(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "QUICK_SECONDS", 0.0)
    pair, _ = reader
    options = Options(quick=True, workloads=["built-in"], num_prompts=6, max_new_tokens=[2])
    results = run("scalability", pair, tmp_path / "run", options)
    assert {record.prompt_id for record in results.records} == {"prose-0", "code-0", "copying-0"}
    cut = attrs.evolve(options, prompt_tokens=[8, 12])
    results = run("scalability", pair, tmp_path / "cut", cut)
    assert {(r.prompt_id, r.axes["prompt_tokens"]) for r in results.records} == {
        (f"{kind}-0", length) for kind in ("prose", "code", "copying") for length in (8, 12)
    }
    given = run("scalability", pair, tmp_path / "given", attrs.evolve(options, time_limit=0.0))
    assert len({record.prompt_id for record in given.records}) <= 1, "a limit that was asked for has no exception"


def test_quick_forms_have_three_prompts_of_different_kinds(reader):
    for name, experiment in EXPERIMENTS.items():
        form = experiment.quick
        if form.workloads == ("built-in:text",):
            assert form.num_prompts == 3, "long ones, each from another place of one text"
            continue
        groups = [measure._prompts(reader[0], workload, form, Options())[0] for workload in form.workloads]
        kinds = [prompt.category for prompts in groups for prompt in prompts]
        assert sorted(kinds) == ["code", "copying", "prose"], name


def test_a_run_says_how_fast_the_memory_was_read_before_it_began(pair, tmp_path, monkeypatch):
    order, speeds = [], iter([2e9, 1e9])
    monkeypatch.setattr(measure, "busy_percent", lambda seconds: order.append("load") or 50.0)
    monkeypatch.setattr(bandwidth, "read_speed", lambda device: order.append("memory") or ReadSpeed(next(speeds), 4096))
    settings = {"idle_check_seconds": 0.1, "with_bandwidth": True}
    monkeypatch.setattr(measure, "decode", lambda *args: order.append("decoding") or methods.decode(*args))
    info = run("scalability", pair, tmp_path / "run", **settings).info
    assert order[:3] == ["load", "memory", "decoding"]
    assert order.count("memory") == 1
    assert info.memory == MemoryInfo(2e9, 4096, step_reads(pair.target.model).num_bytes)
    assert any("was busy before the run" in note for note in info.notes)
    order.clear()
    run("scalability", pair, tmp_path / "run", **settings)
    assert order == [], "nothing is left to do"
    (tmp_path / "run" / RECORDS_FILE).unlink()
    assert run("scalability", pair, tmp_path / "run", **settings).info.memory == info.memory, "the faster one"
    assert order.count("memory") == 1


def test_a_bandwidth_that_cannot_be_measured_is_said(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(bandwidth, "read_speed", lambda device: None)
    said = []
    info = run("scalability", pair, tmp_path / "run", with_bandwidth=True, say=said.append).info
    assert info.memory is None
    note = "the memory's bandwidth was not measured: there is no room for a buffer larger than the caches"
    assert note in said
    assert note in info.notes


def test_a_busy_machine_is_said_of_outputs_made_before_an_interruption_too(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(measure.LoadMeter, "share", lambda meter: 0.5)
    run("scalability", pair, tmp_path / "run", attrs.evolve(SMALL, time_limit=600))
    lines = (tmp_path / "run" / RECORDS_FILE).read_text().splitlines(keepends=True)
    (tmp_path / "run" / RECORDS_FILE).write_text("".join(lines[:4]))
    said = []
    monkeypatch.setattr(measure.LoadMeter, "share", lambda meter: 0.0)
    run("scalability", pair, tmp_path / "run", SMALL, say=said.append)
    [sentence] = said
    assert sentence.startswith("the machine was busy during 4 of 9 outputs: others used more than 10 % of a core")


# what is wrong is said, not dropped


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


def test_a_prompt_that_is_too_long_is_recorded_and_the_rest_goes_on(tmp_path):
    tokenizer = for_transformers(byte_level_tokenizer())
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=64)
    drafter = tiny_model("llama", 1, vocab_size=len(tokenizer), max_position_embeddings=64)
    pair = Pair(LoadedModel(model, tokenizer, "tiny"), ModelDrafter(drafter))
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x" * length}) + "\n" for length in (10, 100, 20)))
    options = attrs.evolve(SMALL, workloads=[str(path)])
    found = by_method(run("scalability", pair, tmp_path / "run", options))
    for records in found.values():
        errors = {record.prompt_id: record.error for record in records}
        assert len(errors) == 3
        assert "64" in errors.pop("prompts-0001")
        assert set(errors.values()) == {None}


def test_beyond_their_window_outputs_with_sinks_are_compared_with_their_own_reference(pair, tmp_path):
    long = Pair(pair.target, ModelDrafter(pair.target.model))  # with room for the prompts
    options = attrs.evolve(SMALL, num_prompts=2, prompt_tokens=[1100], only=["phase3 sinks"])
    found = by_method(run("main", long, tmp_path / "run", options))
    assert list(found) == ["autoregressive", "autoregressive sinks", "phase3 sinks"]
    assert all(record.is_identical for records in found.values() for record in records)
    plain, sinks = ({r.token_ids for r in found[name]} for name in ("autoregressive", "phase3 sinks"))
    assert plain != sinks


def test_a_foreign_method_that_fails_is_recorded_and_the_rest_goes_on(pair, tmp_path, monkeypatch):
    def crash(name, pair):
        raise RuntimeError("boom\nand more")

    monkeypatch.setattr(rivals, "engine", crash)
    monkeypatch.setattr(runnable, "find_spec", lambda name: object())  # whether or not it is installed
    options = attrs.evolve(SMALL, only=["flashspec", "fixed"])
    found = by_method(run("main", pair, tmp_path / "run", options))
    assert {record.error for record in found["flashspec"]} == {"RuntimeError: boom and more"}
    for record in found["flashspec"]:
        assert (record.token_ids, record.stop_reason, record.is_identical) == ((), "error", None)
    assert all(record.is_identical for record in found["fixed"])


ASSISTED = ["hf assisted heuristic", "hf assisted constant", "hf assisted dynamic"]


def test_what_cannot_run_with_the_drafter_is_left_out_with_one_line_before_the_run(pair, tmp_path, monkeypatch):
    lookup, said = Pair(pair.target, build_drafter("prompt_lookup")), []
    monkeypatch.setattr(measure, "decode", lambda *args: said.append("decoding") or methods.decode(*args))
    results = run("main", lookup, tmp_path / "run", attrs.evolve(SMALL, num_prompts=1), say=said.append)
    note = (
        f"left out: {', '.join(ASSISTED)}: the drafter must be a plain transformers model (--drafter ID|PATH), "
        "got prompt_lookup"
    )
    assert said[:2] == [note, "decoding"]
    assert results.info.notes == (note,)
    assert not {*ASSISTED} & {method.name for method in results.info.methods}
    assert all(record.error is None for record in results.records)
    with pytest.raises(InputError, match="'hf assisted dynamic' cannot run here: the drafter must be a plain"):
        run("main", lookup, tmp_path / "other", attrs.evolve(SMALL, only=["hf assisted dynamic"]))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("gpt2", {}, "model type 'gpt2') cannot be decoded with sinks and a window: its positions are not known to"),
        ("llama", {"max_position_embeddings": 512}, "sinks and window must leave 64 of the target's 512 positions"),
    ],
)
def test_a_target_without_room_for_sinks_is_measured_without_them(family, config, reason, tmp_path):
    target = tiny_model(family, **config)
    small = Pair(LoadedModel(target, None, family), ModelDrafter(target))
    options, said = attrs.evolve(SMALL, num_prompts=1), []
    found = by_method(run("main", small, tmp_path / "run", options, say=said.append))
    assert said[0].startswith("left out: autoregressive sinks, phase3 sinks: ")
    assert reason in said[0]
    assert "phase3" in found
    assert not [name for name in found if "sinks" in name]


def test_rivals_that_are_not_installed_are_left_out(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(runnable, "find_spec", lambda name: None)
    options, said = attrs.evolve(SMALL, num_prompts=1, with_rivals=True), []
    found = by_method(run("scalability", pair, tmp_path / "run", options, say=said.append))
    assert said[0] == "left out: flashspec, economize, dejavuu: not installed; run pip install 'dynatree[rivals]'"
    assert list(found) == ["autoregressive", "fixed", "phase3"]


def test_an_error_of_a_policy_ends_the_run_before_it_begins_and_later_is_recorded(pair, tmp_path, monkeypatch):
    class Grumpy:
        num_calls = 0

        @hookimpl
        def branch_factor(self, frontier):
            Grumpy.num_calls += 1
            if Grumpy.num_calls > Grumpy.patience:
                raise RuntimeError("enough")
            return 1

        @hookimpl
        def should_expand(self, frontier):
            return frontier.depth < 1

    real = methods.Session
    monkeypatch.setattr(
        methods,
        "Session",
        lambda *args, policy, **options: real(*args, policy=Grumpy() if policy == "fixed" else policy, **options),
    )
    options = attrs.evolve(SMALL, only=["fixed"])
    Grumpy.patience = 0
    with pytest.raises(PolicyError, match="enough"):
        run("scalability", pair, tmp_path / "run", options)
    Grumpy.num_calls, Grumpy.patience = 0, 11  # at most five in the warm-up, and five in each output
    found = by_method(run("scalability", pair, tmp_path / "run", options))["fixed"]
    assert found[-1].error == "policy 'grumpy', hook branch_factor: raised RuntimeError: enough"
    assert found[0].error is None


def test_rivals_that_are_not_there_say_how_to_get_them(pair, tmp_path, monkeypatch):
    for name in ("flashspec", "economize", "dejavuu"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
        advice = r"pip install .*dynatree\[rivals\]|needs Python 3\.13 or newer"
        with pytest.raises(MethodError, match=rf"{name} (cannot be imported|is not installed).*({advice})"):
            rivals.engine.__wrapped__(name, pair)


# end tokens


def test_end_tokens_are_honoured_unless_told_otherwise(tmp_path):
    model = tiny_model.__wrapped__("llama", **LONG)
    free = run("main", Pair(LoadedModel(model, None, "t"), ModelDrafter(model)), tmp_path / "free")
    ends = {record.prompt_id: record.token_ids[3] for record in free.records if record.method == "autoregressive"}
    model.generation_config.eos_token_id = sorted(set(ends.values()))
    pair = Pair(LoadedModel(model, None, "t"), ModelDrafter(perturbed("llama")))
    stopped = run("main", pair, tmp_path / "stopped")
    assert {record.stop_reason for record in stopped.records} == {"eos"}
    assert all(record.is_identical and len(record.token_ids) <= 4 for record in stopped.records)
    assert not stopped.info.ignore_eos
    ignored = run("main", pair, tmp_path / "ignored", attrs.evolve(SMALL, ignore_eos=True))
    assert {(r.stop_reason, len(r.token_ids)) for r in ignored.records} == {("length", 6)}
    assert ignored.info.ignore_eos
    assert model.generation_config.eos_token_id == sorted(set(ends.values()))


# prompts


@pytest.fixture
def reader(tmp_path):
    """A pair that reads text, and a function that writes prompts of these lengths in tokens, with their categories."""
    tokenizer = for_transformers(byte_level_tokenizer())
    models = [tiny_model("llama", seed, vocab_size=len(tokenizer), **LONG) for seed in (0, 1)]

    def write(name, **lengths):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        prompts = [{"category": kind, "prompt": "x" * n} for kind, numbers in lengths.items() for n in numbers]
        path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
        return str(path)

    return Pair(LoadedModel(models[0], tokenizer, "tiny"), ModelDrafter(models[1])), write


def test_all_lengths_have_the_same_prompts_those_that_reach_the_longest(reader, tmp_path):
    """Two prompts are asked for. The first ones of the file are too short for 30 tokens, and one of them for 10 too."""
    pair, write = reader
    said = []
    path = write("p.jsonl", a=(5, 20, 30, 40), b=(20, 50))
    options = attrs.evolve(SMALL, workloads=[path], num_prompts=2, prompt_tokens=[10, 30])
    results = run("scalability", pair, tmp_path / "run", options, say=said.append)
    names = {(r.axes["prompt_tokens"], r.num_prompt_tokens, r.prompt_id, r.category) for r in results.records}
    assert names == {(n, n, *prompt) for n in (10, 30) for prompt in (("p-0002", "a"), ("p-0005", "b"))}
    assert said == []


@pytest.mark.parametrize(("lengths", "which"), [(None, ""), ([10, 30], " of 30 tokens or more")])
def test_fewer_prompts_than_were_asked_for_are_said(reader, tmp_path, lengths, which):
    pair, write = reader
    said = []
    path = write("p.jsonl", a=(5, 20) if lengths else (), b=(30, 30))
    options = attrs.evolve(SMALL, workloads=[path], prompt_tokens=lengths)
    note = f"'p' has 2 of the 3 prompts{which} that are asked for"
    assert run("scalability", pair, tmp_path / "run", options, say=said.append).info.notes == (note,)
    assert said == [note]


def test_two_workloads_of_one_name_are_refused_and_can_be_named(reader, tmp_path):
    pair, write = reader
    one, two = write("one/p.jsonl", a=(5,)), write("two/p.jsonl", a=(6,))
    options = attrs.evolve(SMALL, num_prompts=1, workloads=[one, two])
    with pytest.raises(InputError, match="name one of them: --workload NAME=FILE") as caught:
        run("scalability", pair, tmp_path / "run", options)
    assert f"got '{one}' and '{two}', which are both called 'p'" in str(caught.value)
    assert not (tmp_path / "run").exists()
    options = attrs.evolve(options, workloads=[one, f"other={two}"])
    assert run("scalability", pair, tmp_path / "run", options).info.axes["dataset"] == ["p", "other"]


def test_prompts_are_picked_and_the_run_says_how(reader, tmp_path):
    """A run goes on with the same picks only; one without any has the settings that it had before there were picks."""
    pair, write = reader
    path = write("p.jsonl", a=(5, 6), b=(7,), c=(8,))
    options = attrs.evolve(SMALL, workloads=[path], num_prompts="all", picks=Picks(categories=("a", "b")))
    results = run("scalability", pair, tmp_path / "run", options)
    assert {record.prompt_id for record in results.records} == {"p-0000", "p-0001", "p-0002"}
    assert results.info.settings["categories"] == ["a", "b"]
    assert run("scalability", pair, tmp_path / "run", options).info.continued == ()
    with pytest.raises(InputError, match=r"settings categories: \['a', 'b'\] there, \['c'\] now"):
        run("scalability", pair, tmp_path / "run", attrs.evolve(options, picks=Picks(categories=("c",))))
    plain = run("scalability", pair, tmp_path / "plain", attrs.evolve(options, picks=Picks()))
    assert not {"column", "categories", "turns", "pick_seed"} & {*plain.info.settings}


def test_each_turn_of_a_conversation_is_measured(reader, tmp_path):
    pair, _ = reader
    (tmp_path / "q.jsonl").write_text('{"id": "q", "turns": ["ab", "cd"]}\n')
    options = attrs.evolve(SMALL, workloads=[str(tmp_path / "q.jsonl")], num_prompts=1, picks=Picks(is_played=True))
    results = run("scalability", pair, tmp_path / "run", options)
    assert {record.prompt_id for record in results.records} == {"q", "q/turn-2"}
    with pytest.raises(InputError, match="--turns plays whole conversations"):
        run("scalability", pair, tmp_path / "other", attrs.evolve(options, prompt_tokens=[2]))


def test_random_prompts_have_no_end(pair, tmp_path):
    with pytest.raises(InputError, match="prompts without end, so --num-prompts must be a number, got 'all'"):
        run("scalability", pair, tmp_path / "run", attrs.evolve(SMALL, num_prompts="all"))


# tables and settings


def test_methods_are_chosen_by_name_and_policies_replace_ours():
    main = EXPERIMENTS["main"]
    names = [method.name for method in chosen_methods(main)]
    assert "hf static compiled" not in names
    assert "flashspec" not in names
    assert "flashspec" in [m.name for m in chosen_methods(main, with_rivals=True)]
    assert "hf static compiled" in [m.name for m in chosen_methods(main, with_compile=True)]
    own = chosen_methods(main, policies=["fixed(depth=2)", "autoregressive", "fixed(depth=2)"])
    assert [m.name for m in own if m.kind == "dynatree"] == ["autoregressive", "fixed(depth=2)"]
    assert [m.name for m in chosen_methods(main, only=["linear"])] == ["autoregressive", "linear"]
    sinks = [m.name for m in chosen_methods(main, only=["phase3 sinks"])]
    assert sinks == ["autoregressive", "autoregressive sinks", "phase3 sinks"]
    short = chosen_methods(EXPERIMENTS["scalability"], only=["hf generate", "fixed"])
    assert [m.name for m in short] == ["autoregressive", "fixed", "hf generate"]
    with pytest.raises(InputError, match=r"'fxed' is not among the methods of main \(did you mean 'fixed'\?\)"):
        chosen_methods(main, only=["fxed"])


def test_a_method_without_axes_comes_once_and_one_with_them_at_every_point():
    form = Form(("w",), 1, (5, 6), points=({"depth": 1}, {"depth": 2}))
    wide = Method("wide", policy="fixed(depth={depth})")
    made = list(cells((REFERENCE, wide), form, {"dataset": "d"}))
    assert [(cell.method.name, cell.policy, dict(cell.axes)) for cell in made[:3]] == [
        ("autoregressive", "autoregressive", {"dataset": "d", "max_new_tokens": 5}),
        ("wide", "fixed(depth=1)", {"dataset": "d", "depth": 1, "max_new_tokens": 5}),
        ("wide", "fixed(depth=2)", {"dataset": "d", "depth": 2, "max_new_tokens": 5}),
    ]
    assert len(made) == 6
    with pytest.raises(InputError, match="got branch"):
        list(cells((Method("x", policy="fixed(branch={branch})"),), form, {}))


def test_full_forms_have_the_published_settings():
    published = {
        "main": (1000,),
        "ablation": (500,),
        "sensitivity": (500,),
        "scalability": (100, 200, 300, 500, 750, 1000),
    }
    assert {name: EXPERIMENTS[name].full.max_new_tokens for name in published} == published
    assert [point["base_depth"] for point in EXPERIMENTS["ablation"].full.points] == [4, 5, 6]
    points = EXPERIMENTS["sensitivity"].full.points
    ranges = [(p["min_branch"], p["max_branch"]) for p in points if p["high"] == 0.9]
    assert ranges == [(1, 2), (1, 3), (1, 4), (2, 4)]
    tuned = [(p["high"], p["low"]) for p in points if (p["min_branch"], p["max_branch"]) == (1, 3)]
    assert tuned == [(0.7, 0.2), (0.8, 0.3), (0.9, 0.4)]
    assert EXPERIMENTS["datasets"].full.workloads == ("wikitext-2", "pg19")


def test_settings_that_cannot_be_used_are_refused_before_anything_runs(pair, tmp_path):
    with pytest.raises(InputError, match=r"'mian' is not an experiment \(did you mean 'main'\?\)"):
        run("mian", pair, tmp_path / "run")
    with pytest.raises(InputError, match="did you mean 'confidence'"):
        run("main", pair, tmp_path / "run", attrs.evolve(SMALL, policies=["confidense"], workloads=["not/there"]))
    for name in ("repeats", "num_prompts"):
        with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
            attrs.evolve(SMALL, **{name: 0})
    with pytest.raises(InputError, match=r"max_new_tokens\[1\] must be at least 1, got 0"):
        attrs.evolve(SMALL, max_new_tokens=[4, 0])
    assert not (tmp_path / "run").exists()


# the machine


def test_load_is_the_share_that_others_use():
    assert LoadMeter().share() is None  # no time has passed
    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        meter = LoadMeter()
        time.sleep(0.6)
        busy = meter.share()
    finally:
        spinning.kill()
        spinning.wait()
    assert 0.3 / (os.cpu_count() or 1) < busy <= 1.0
    meter, end = LoadMeter(), time.perf_counter() + 0.3
    while time.perf_counter() < end:
        pass
    assert 0.0 <= meter.share() <= 1.0


def test_the_source_and_the_weights_are_named(tmp_path):
    commit = source_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 40
    assert weights_sha256(str(tmp_path)) is None
    assert weights_sha256("no model, but a name") is None
    tiny_model("llama").save_pretrained(tmp_path / "a")
    tiny_model("llama", 1).save_pretrained(tmp_path / "b")
    hashes = [weights_sha256(str(tmp_path / name)) for name in "aba"]
    assert hashes[0] == hashes[2] != hashes[1]
    assert all(len(sha256) == 64 for sha256 in hashes)


def test_a_student_drafts_and_is_named_in_the_provenance(pair, tmp_path):
    model = pair.target.model
    student = tiny_student(model)
    save_student(student, tmp_path / "student", torch.float32, {"target": "tiny"})
    text = f"distilled(path='{tmp_path / 'student'}',dtype='float64')"
    taught = Pair(pair.target, build_drafter(f"{text}+prompt_lookup"))
    options = attrs.evolve(SMALL, only=["fixed"], with_replay=True)
    results = run("main", taught, tmp_path / "run", options)
    found = by_method(results)
    assert all(record.is_identical and record.replay is not None for record in found["fixed"])
    info = results.info.drafter
    assert (info.name, info.dtype) == (text, "float64")
    assert info.sha256 == weights_sha256(str(tmp_path / "student"))
    assert info.num_parameters == sum(weight.numel() for weight in student.state_dict().values())
    assert Pair(pair.target, ModelDrafter(student)).drafter_model is None


def test_provenance_is_complete(pair, tmp_path):
    info = read_results(run("scalability", pair, tmp_path / "run", command="dynatree bench x").folder).info
    assert info.command == "dynatree bench x"
    assert {"python", "torch", "transformers"} <= set(info.libraries)
    assert info.threads == torch.get_num_threads()
    assert info.drafter is not None
    assert info.target.num_parameters == sum(p.numel() for p in pair.target.model.parameters())
    assert [method.policy for method in info.methods] == ["autoregressive", "fixed", "phase3"]
    assert info.methods[0].drafter is None
    assert info.methods[1].drafter == str(pair.drafter)
    assert info.settings["workloads"] == ["random:0"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["schema"] == 1
