"""Methods: which are chosen, which cannot run, which fail, and their provenance."""

from __future__ import annotations

import json
import sys

import attrs
import pytest
import torch
from bench_runs import LONG, SMALL, by_method, run, tiny_pair
from command import byte_level_tokenizer, for_transformers
from students import tiny_student

from dynatree_bench.run import measure, methods, rivals, runnable
from dynatree_bench.run.experiments import EXPERIMENTS, REFERENCE, Form, Method, cells, chosen_methods
from dynatree_bench.run.machine import source_commit, weights_sha256
from dynatree_bench.run.pairs import MethodError, Pair
from dynatree_bench.run.records import read_results
from dynatree_core import InputError, LoadedModel, build_drafter, hookimpl
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.errors import PolicyError
from dynatree_core.models.student import save_student
from dynatree_core.testing.models import perturbed, tiny_model


@pytest.fixture(scope="module")
def pair():
    return tiny_pair()


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
