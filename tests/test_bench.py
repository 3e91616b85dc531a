"""The benchmarks: their prompts, and that each measures and prints what it says, on a few tokens."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from dynatree_bench import fixed_width, long_context, never_slower, runners, smoke
from dynatree_bench.prompts import BUILT_IN, load_prompts
from dynatree_core import embedded


def test_five_built_in_prompts_of_each_kind():
    assert {kind: len(prompts) for kind, prompts in load_prompts(None, 5).items()} == dict.fromkeys(BUILT_IN, 5)
    assert len(load_prompts(None, 2)["prose"]) == 2


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    records = [{"category": kind, "prompt": f"{kind} {i}"} for i in range(3) for kind in ("a", "b")]
    path.write_text("\n".join(map(json.dumps, records)))
    assert load_prompts(path, 2) == {"a": ["a 0", "a 1"], "b": ["b 0", "b 1"]}


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": "x"}'])
def test_a_line_that_is_no_prompt_is_named(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"category": "a", "prompt": "x"}\n' + line)
    with pytest.raises(ValueError, match='line 2: must be a JSON object with "prompt" and "category"'):
        load_prompts(path, 5)


@pytest.mark.real_model
@pytest.mark.skipif(not embedded.is_installed(), reason="the default model is missing: dynatree models install")
def test_the_smoke_benchmark_on_a_few_tokens(monkeypatch, capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"category": "mine", "prompt": "a b c a b c a b c"}))
    arguments = ["--prompts", str(path), "--max-new-tokens", "6", "--no-memory"]
    monkeypatch.setattr(sys, "argv", ["smoke", *arguments])
    assert smoke.main() == 0
    printed = capsys.readouterr().out
    for expected in ("mine: 1 prompts", *smoke.METHODS, *smoke.COLUMNS, "overhead of phase3", "differ"):
        assert expected in printed


@pytest.mark.real_model
@pytest.mark.skipif(not embedded.is_installed(), reason="the default model is missing: dynatree models install")
def test_the_fixed_width_benchmark_on_a_few_tokens(monkeypatch, capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"category": "mine", "prompt": "a b c a b c a b c"}))
    monkeypatch.setattr(sys, "argv", ["fixed_width", "--prompts", str(path), "--max-new-tokens", "6"])
    fixed_width.main()
    printed = capsys.readouterr().out
    for expected in (
        "1 prompts, 6 new tokens",
        *map(str, fixed_width.WAYS),
        *fixed_width.COLUMNS,
        "1/1",
        "the machine was",
    ):
        assert expected in printed


@pytest.mark.real_model
@pytest.mark.skipif(not embedded.is_installed(), reason="the default model is missing: dynatree models install")
def test_the_never_slower_benchmark_on_a_few_tokens(monkeypatch, capsys, tmp_path):
    path, output = tmp_path / "prompts.jsonl", tmp_path / "result.json"
    path.write_text(json.dumps({"category": "mine", "prompt": "a b c a b c a b c"}))
    arguments = ["--quick", "--prompts", str(path), "--max-new-tokens", "6", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["never_slower", *arguments])
    assert never_slower.main() in (0, 2)  # six tokens are too few for a speed
    printed = capsys.readouterr().out
    for expected in (
        "mine: 1 prompts",
        *never_slower.POLICIES,
        *never_slower.COLUMNS,
        "random",
        "noise",
        "decoding: 0 of",
    ):
        assert expected in printed
    runs = json.loads(output.read_text())["runs"]
    assert {(run["drafter"], run["num_identical"]) for run in runs} == {
        ("prompt_lookup", 1),
        ("random", 1),
        ("noise", 1),
    }


def test_ratios_are_of_all_prompts_together():
    def pair(plain, seconds):
        def result(s):
            return SimpleNamespace(report=SimpleNamespace(decode_seconds=s), token_ids=[1])

        return never_slower.Pair(result(plain), result(seconds))

    pairs = [pair(1.0, 2.0), pair(9.0, 3.0)]
    assert never_slower.ratio(pairs) == 2.0
    assert never_slower.interval(pairs) == (0.5, 3.0)
    assert never_slower.interval(pairs[:1]) == (0.5, 0.5)


def test_of_repetitions_the_median_counts_and_a_difference_is_kept(monkeypatch):
    def generated(model, drafter, ids, *, policy, max_new_tokens):
        token_ids = [1, 2] if policy != "odd" or max_new_tokens == 8 else [1, 3]
        time = 0.0 if max_new_tokens == 8 else next(seconds)
        return SimpleNamespace(report=SimpleNamespace(decode_seconds=time), token_ids=token_ids)

    monkeypatch.setattr(never_slower, "generate", generated)
    monkeypatch.setattr(never_slower, "chat_ids", lambda target, prompt: [1])
    for policy, is_identical in (("even", True), ("odd", False)):
        seconds = iter([5.0, 2.0, 9.0, 4.0, 3.0, 1.0])  # plain and drafted in turning order, the warm-up apart
        method = never_slower.Method(policy, "none")
        found = never_slower.measure(SimpleNamespace(model=None), {"none": None}, {"a": ["b"]}, [method], 4, repeats=3)
        [pair] = found["a", method]
        assert pair.is_identical == is_identical
        assert pair.plain.report.decode_seconds == 4.0  # of 5, 4 and 3
        assert not is_identical or pair.result.report.decode_seconds == 2.0  # of 2, 9 and 1


@pytest.mark.real_model
@pytest.mark.skipif(not embedded.is_installed(), reason="the default model is missing: dynatree models install")
def test_the_long_context_benchmark_on_two_short_contexts(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["long_context", "--quick", "--out", str(tmp_path)])
    long_context.main()
    printed = capsys.readouterr().out
    for expected in (
        *long_context.PASSES,
        *long_context.GENERATIONS,
        *long_context.KEPT,
        "64",
        "256",
        "the machine was",
    ):
        assert expected in printed
    results = json.loads((tmp_path / "long-context.json").read_text())
    assert set(results["passes"]) == set(long_context.PASSES)
    assert all(len(rounds) == 1 for by_context in results["tokens"].values() for rounds in by_context.values())
    drawn = (tmp_path / "long-context.svg").read_bytes()
    # the same figure from the file alone
    again = tmp_path / "again"
    again.mkdir()
    source = str(tmp_path / "long-context.json")
    monkeypatch.setattr(sys, "argv", ["long_context", "--from", source, "--out", str(again)])
    long_context.main()
    assert (again / "long-context.svg").read_bytes() == drawn
    assert capsys.readouterr().out == printed


@pytest.mark.real_model
@pytest.mark.skipif(not embedded.is_installed(), reason="the default model is missing: dynatree models install")
def test_the_benchmark_of_runners(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["runners", "--quick", "--out", str(tmp_path)])
    runners.main()
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "runners.json").read_text())
    for expected in (*results["seconds"], "rows", "the machine was"):
        assert expected in printed
    assert {runners.PLAIN, "bfloat16 eager"} <= set(results["seconds"]) <= set(runners.STYLES)
    assert all(len(rounds) == 1 for by_rows in results["seconds"].values() for rounds in by_rows.values())
    drawn = (tmp_path / "runners.svg").read_bytes()
    again = tmp_path / "again"
    again.mkdir()
    monkeypatch.setattr(sys, "argv", ["runners", "--from", str(tmp_path / "runners.json"), "--out", str(again)])
    runners.main()
    assert (again / "runners.svg").read_bytes() == drawn
    assert capsys.readouterr().out == printed


def test_a_pass_relative_to_the_plain_one_of_its_round():
    results = runners.Results({}, {runners.PLAIN: {"1": [1.0, 2.0, 4.0]}, "other": {"8": [2.0, 4.0, 8.0]}})
    assert runners.relative(results, "other", "8") == (2.0, 2.0, 2.0)
    results.seconds["other"]["8"] = [1.0, 4.0, 12.0]
    assert runners.relative(results, "other", "8")[0] == 2.0


def test_a_table_shows_median_and_range():
    table = long_context._table("times", {"way": {64: [3.0, 1.0, 2.0], 256: [4.0]}}, 1)
    assert [column.header for column in table.columns] == ["tokens of context", "64", "256"]
    assert [list(column.cells) for column in table.columns] == [["way"], ["2.0 (1.0–3.0)"], ["4.0"]]
