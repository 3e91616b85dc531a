"""The prompts of a run: which are taken, and what is said of them."""

from __future__ import annotations

import json

import attrs
import pytest
from bench_runs import LONG, SMALL, run, tiny_pair
from command import byte_level_tokenizer, for_transformers

from dynatree_bench.data.workloads import Picks
from dynatree_bench.run import measure
from dynatree_bench.run.experiments import EXPERIMENTS
from dynatree_bench.run.measure import Options
from dynatree_bench.run.pairs import Pair
from dynatree_core import InputError, LoadedModel
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.testing.models import tiny_model


@pytest.fixture(scope="module")
def pair():
    return tiny_pair()


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
