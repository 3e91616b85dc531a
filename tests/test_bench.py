"""The benchmarks: their prompts, what they print of results on paper, and that each runs, on a few tokens."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from rich.table import Table

from dynatree_bench.data.prompts import BUILT_IN, WARM_UP_TOKENS, in_turns, load_prompts
from dynatree_bench.run import machine
from dynatree_bench.studies import fixed_width, long_context, never_slower, runners, smoke
from dynatree_core import GenerationReport, GenerationResult, Session, StepStats, run
from dynatree_core.models import embedded
from dynatree_core.testing.models import tiny_model

PROVENANCE = {"command", "commit", "date", "versions", "device", "threads", "busy_percent", "dtype"}


def made(token_ids: list[int], steps: Sequence[StepStats], seconds: float) -> GenerationResult:
    """A generation on paper: a tenth of its time went into the drafter, a half into the target's passes."""
    shares = [step.num_accepted / step.depth for step in steps if step.depth]
    report = GenerationReport(
        policy="any",
        drafter="any",
        runner="eager",
        num_prompt_tokens=1,
        num_reused_tokens=0,
        num_new_tokens=len(token_ids),
        num_iterations=len(steps),
        num_drafted_nodes=sum(step.num_drafted for step in steps),
        num_accepted_tokens=sum(step.num_accepted for step in steps),
        tokens_per_iteration=None,
        path_acceptance=sum(shares) / len(shares) if shares else None,
        node_acceptance=None,
        tokens_per_second=None,
        repetition=0.25,
        prefill_seconds=0.0,
        decode_seconds=seconds,
        draft_seconds=0.1 * seconds,
        verify_seconds=0.5 * seconds,
        rest_seconds=0.4 * seconds,
        overhead_seconds=0.45 * seconds,
        steps=tuple(steps),
    )
    return GenerationResult(token_ids, "length", report)


PLAIN = [made([1, 2, 3, 4], [StepStats(0, 0, 0, 1)] * 4, 1.0), made([5, 6], [StepStats(0, 0, 0, 1)] * 2, 9.0)]
DRAFTED = [
    made([1, 2, 3, 4], [StepStats(6, 3, 2, 3), StepStats(0, 0, 0, 1)], 2.0),
    made([5, 7], [StepStats(4, 2, 1, 2)], 3.0),
]


def rows_of(table: Table) -> list[list[str]]:
    return [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]


def printed_rows(printed: str, *beginnings: str) -> dict[str, list[str]]:
    """What a printed table has behind each of these beginnings of its rows, on the row that it is found first."""
    lines = [line.strip() for line in printed.splitlines()]
    return {start: next(line[len(start) :].split() for line in lines if line.startswith(start)) for start in beginnings}


def console() -> Console:
    return Console(file=io.StringIO(), width=200, highlight=False)


def said(by: Console) -> str:
    return by.file.getvalue()


def test_five_built_in_prompts_of_each_kind():
    assert {kind: len(prompts) for kind, prompts in load_prompts(None, 5).items()} == dict.fromkeys(BUILT_IN, 5)
    assert len(load_prompts(None, 2)["prose"]) == 2


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    records = [{"category": kind, "prompt": f"{kind} {i}"} for i in range(3) for kind in ("a", "b")]
    path.write_text("\n".join(map(json.dumps, records)))
    assert load_prompts(path, 2) == {"a": ["a 0", "a 1"], "b": ["b 0", "b 1"]}


@pytest.mark.parametrize("line", ["{", "[]", '{"category": "a"}', '{"category": "a", "prompt": 7}'])
def test_a_line_that_is_no_prompt_is_named(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"category": "a", "prompt": "x"}\n' + line)
    with pytest.raises(ValueError, match=r"line 2(, column \d+)?: "):
        load_prompts(path, 5)


def test_prompts_are_decoded_in_turns():
    asked = []

    def decode(prompt, way, limit):
        asked.append((prompt, way, limit))
        return prompt + way

    found = list(in_turns(["p", "q"], "abc", decode, 5))
    assert found == [{"a": "pa", "b": "pb", "c": "pc"}, {"a": "qa", "b": "qb", "c": "qc"}]
    assert asked[:3] == [("p", way, WARM_UP_TOKENS) for way in "abc"]
    assert asked[3:] == [("p", "a", 5), ("p", "b", 5), ("p", "c", 5), ("q", "b", 5), ("q", "c", 5), ("q", "a", 5)]


@pytest.mark.parametrize(("share", "state"), [(0.02, "idle"), (0.03, "busy, so the ratios are not to be believed")])
def test_the_machine_is_judged_by_the_whole_run(monkeypatch, share, state):
    """A percent of four cores' time is four percent of one core."""
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(machine.LoadMeter, "share", lambda meter: share)
    others = machine.LoadMeter().meanwhile()
    sentence = f"the machine was {state}: others used {400 * share:.0f} % of a core meanwhile"
    assert machine.idle_or_busy(others, what="ratios") == sentence


def test_the_machine_is_judged_by_its_busiest_moment():
    others = {"before": 11.0, "after": 1.0}
    expected = "the machine was busy, so the times are not to be believed: "
    assert machine.idle_or_busy(others) == expected + "others used 11 % of a core before, 1 % of a core after"


def test_the_smoke_table():
    runs = [smoke.Run(DRAFTED[0], 0.5, True), smoke.Run(DRAFTED[1], 3.0, False)]
    table = smoke._table("mine", {"autoregressive": [smoke.Run(PLAIN[0], 1.0, True)], "fixed": runs})
    assert [column.header for column in table.columns] == ["method", *smoke.COLUMNS]
    plain, fixed = rows_of(table)
    assert plain[:5] == ["autoregressive", "1.00", "-", "-", "0.0"]
    assert fixed == [
        "fixed", "2.00", "0.58", "0.30", "3.3", "166.7", "833.3", "666.7", "750.0", "1.75", "0.50–3.00", "0.25", "1/2",
    ]  # fmt: skip


def test_overhead_is_relative_to_an_autoregressive_step():
    runs = {("mine", method): [smoke.Run(PLAIN[0], 1.0, True)] for method in smoke.METHODS}
    runs["mine", "phase3"] = [smoke.Run(result, 1.0, True) for result in DRAFTED]
    to = console()
    smoke._print_overhead(to, runs)
    last = said(to).splitlines()[-1]
    assert last == "overhead of phase3: 750.00 ms an iteration, 300.0 % of an autoregressive step of 250.0 ms"


def test_peak_memory_is_that_of_one_generation(monkeypatch):
    def decode(default, prompt, method, max_new_tokens):
        block = b"x" * (2**28 if method == "phase3" else 1)
        return len(block)

    monkeypatch.setattr(smoke, "load_model", lambda name, device: None)
    monkeypatch.setattr(smoke, "decode", decode)
    tree, plain = smoke.peak_memory("phase3", 4), smoke.peak_memory("autoregressive", 4)
    if plain == 0:
        pytest.skip("this system does not tell a process its peak")
    assert tree - plain == pytest.approx(2**28, rel=0.1)


def test_peaks_are_relative_to_autoregressive_decoding(monkeypatch):
    asked = []

    def called(command, *, env, **options):
        asked.append((command[-1], env.get("MKL_DISABLE_FAST_MM")))
        return SimpleNamespace(stdout=f"{peaks[command[-1]]}\n")

    monkeypatch.setattr(smoke.subprocess, "run", called)
    monkeypatch.delenv("MKL_DISABLE_FAST_MM", raising=False)
    peaks, to = {"autoregressive": 2**20, "fixed": 2**20, "phase3": 3 * 2**19}, console()
    smoke._print_memory(to, 4)
    assert "peak memory as it comes, phase3: 1.5 MiB, +50.00 % against autoregressive" in said(to).splitlines()
    assert asked == [(method, setting) for setting in (None, "1") for method in smoke.METHODS]
    peaks, to = dict.fromkeys(smoke.METHODS, 0), console()
    smoke._print_memory(to, 4)
    assert said(to) == "peak memory: not measured, this system does not tell a process its peak\n"


@pytest.mark.real_model
@pytest.mark.skipif(not embedded.is_installed(), reason="the default model is missing: dynatree models install")
def test_the_smoke_benchmark_on_a_few_tokens(monkeypatch, capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"category": "mine", "prompt": "a b c a b c a b c"}))
    arguments = ["--prompts", str(path), "--max-new-tokens", "6", "--no-memory"]
    monkeypatch.setattr(sys, "argv", ["smoke", *arguments])
    assert smoke.main() == 0
    printed = capsys.readouterr().out
    for expected in ("mine: 1 prompts", "overhead of phase3", "the machine was", "decoding: 0 of 3"):
        assert expected in printed
    rows = printed_rows(printed, *smoke.METHODS)
    assert all(len(cells) == len(smoke.COLUMNS) and cells[-1] == "1/1" for cells in rows.values())


def test_the_fixed_width_table():
    runs = {
        way: [fixed_width.Run(PLAIN[0], True, True), fixed_width.Run(PLAIN[1], True, True)] for way in fixed_width.WAYS
    }
    way = fixed_width.WAYS[1]
    runs[way] = [fixed_width.Run(DRAFTED[0], True, False), fixed_width.Run(DRAFTED[1], False, True)]
    table = fixed_width._table(runs)
    assert [column.header for column in table.columns] == ["way", *fixed_width.COLUMNS]
    assert rows_of(table)[0] == [str(fixed_width.WAYS[0]), "1.00", "1666.7", "1.00", "1.00–1.00", "2/2", "2/2"]
    assert rows_of(table)[1] == ["phase3, as it comes", "2.00", "1666.7", "1.17", "0.33–2.00", "1/2", "0/2"]


def test_generations_are_compared_by_tokens_and_by_the_cache():
    def session(*prompt: int) -> Session:
        made = Session(tiny_model("llama"), None, prompt, policy="autoregressive", max_new_tokens=6)
        for _ in run(made):
            pass
        return made

    one, same, other = session(1, 2, 3), session(1, 2, 3), session(1, 2, 4)
    found = fixed_width.compare(one, same)
    assert (found.is_same, found.is_bitwise) == (True, True)
    assert found.result.token_ids == one.new_token_ids
    with torch.inference_mode():
        same.cache.values[-1][0, 0, 0, 0] += 1e-9
    assert (fixed_width.compare(one, same).is_same, fixed_width.compare(one, same).is_bitwise) == (True, False)
    assert one.new_token_ids != other.new_token_ids
    assert (fixed_width.compare(one, other).is_same, fixed_width.compare(one, other).is_bitwise) == (False, False)


@pytest.mark.real_model
@pytest.mark.skipif(not embedded.is_installed(), reason="the default model is missing: dynatree models install")
def test_the_fixed_width_benchmark_on_a_few_tokens(monkeypatch, capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"category": "mine", "prompt": "a b c a b c a b c"}))
    monkeypatch.setattr(sys, "argv", ["fixed_width", "--prompts", str(path), "--max-new-tokens", "6"])
    fixed_width.main()
    printed = capsys.readouterr().out
    for expected in ("1 prompts, 6 new tokens", "the machine was"):
        assert expected in printed
    rows = printed_rows(printed, *map(str, fixed_width.WAYS))
    assert all(len(cells) == len(fixed_width.COLUMNS) for cells in rows.values())
    assert rows["autoregressive, as it comes"][-2:] == rows["phase3, fixed_width"][-2:] == ["1/1", "1/1"]


@pytest.mark.real_model
@pytest.mark.skipif(not embedded.is_installed(), reason="the default model is missing: dynatree models install")
def test_the_never_slower_benchmark_on_a_few_tokens(monkeypatch, capsys, tmp_path):
    path, output = tmp_path / "prompts.jsonl", tmp_path / "result.json"
    path.write_text(json.dumps({"category": "mine", "prompt": "a b c a b c a b c"}))
    arguments = ["--quick", "--prompts", str(path), "--max-new-tokens", "6", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["never_slower", *arguments])
    assert never_slower.main() in (0, 2)  # six tokens are too few for a speed
    printed = capsys.readouterr().out
    for expected in ("mine: 1 prompts", "the machine was", "decoding: 0 of 12"):
        assert expected in printed
    rows = [line.split() for line in printed.splitlines() if line.rstrip().endswith(" 1/1")]
    drafters = ("prompt_lookup", "random", "noise")
    methods = [(drafter, policy) for drafter in drafters for policy in never_slower.POLICIES]
    assert [tuple(row[:2]) for row in rows] == methods
    assert {len(row) for row in rows} == {2 + len(never_slower.COLUMNS)}
    found = json.loads(output.read_text())
    assert set(found) >= PROVENANCE | {"target"}
    assert found["max_new_tokens"] == 6
    assert [(run["drafter"], run["policy"]) for run in found["runs"]] == methods
    assert {run["num_identical"] for run in found["runs"]} == {1}


def test_the_never_slower_table():
    pairs = [never_slower.Pair(plain, drafted) for plain, drafted in zip(PLAIN, DRAFTED, strict=True)]
    table = never_slower._table("mine", {never_slower.Method("phase3", "noise"): pairs})
    assert [column.header for column in table.columns] == ["drafter", "policy", *never_slower.COLUMNS]
    expected = ["noise", "phase3", "2.00", "3.3", "0.67", "2.000", "0.500–3.000", "0.500", "1/2"]
    assert rows_of(table) == [expected]


@pytest.mark.parametrize(
    ("policy", "seconds", "drafted_ids", "code"),
    [
        ("governor", 1.0, [1, 2], 0),
        ("phase3+governor", 1.1, [1, 2], 2),
        ("cost_aware", 1.1, [1, 3], 1),  # a wrong output is worse than a slow one
        ("phase3", 1.1, [1, 2], 0),  # nothing was promised of it
        ("phase3", 1.0, [1, 3], 1),
    ],
)
def test_what_never_slower_concludes(policy, seconds, drafted_ids, code):
    step, to = [StepStats(0, 0, 0, 1)], console()
    pair = never_slower.Pair(made([1, 2], step, 1.0), made(drafted_ids, step, seconds))
    assert never_slower._conclude(to, {("mine", never_slower.Method(policy, "noise")): [pair]}) == code
    assert f"decoding: {int(code == 1)} of 1" in said(to)
    assert (f"{1 / seconds:.3f} ({policy}, noise, mine)" in said(to)) == (policy != "phase3")


def test_ratios_are_of_all_prompts_together():
    pairs = [never_slower.Pair(plain, drafted) for plain, drafted in zip(PLAIN, DRAFTED, strict=True)]
    assert never_slower.ratio(pairs) == 2.0
    assert never_slower.interval(pairs) == (0.5, 3.0)
    assert never_slower.interval(pairs[:1]) == (0.5, 0.5)


def test_of_repetitions_the_median_counts_and_a_difference_is_kept(monkeypatch):
    def generated(model, drafter, ids, *, policy, max_new_tokens):
        is_warm_up = max_new_tokens == WARM_UP_TOKENS
        return made([1, 3] if policy == "odd" else [1, 2], [], 0.0 if is_warm_up else next(seconds))

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
    generations, real = [], long_context._generation
    monkeypatch.setattr(long_context, "_generation", lambda *asked: generations.append(1) or real(*asked))
    monkeypatch.setattr(sys, "argv", ["long_context", "--quick", "--out", str(tmp_path)])
    long_context.main()
    assert len(generations) == 2 * 2 * len(long_context.GENERATIONS), "at each context a warm-up and a round"
    printed = capsys.readouterr().out
    assert "the machine was" in printed
    results = json.loads((tmp_path / "long-context.json").read_text())
    assert set(results["provenance"]) >= PROVENANCE | {"model", "plan"}
    measured = {"passes": long_context.PASSES, "tokens": long_context.GENERATIONS, "memory": long_context.KEPT}
    for name, series in measured.items():
        assert set(results[name]) == set(series)
        for by_context in results[name].values():
            assert {context: len(rounds) for context, rounds in by_context.items()} == {"64": 1, "256": 1}
    heads = [line.split()[3:] for line in printed.splitlines() if line.strip().startswith("tokens of context")]
    assert heads == [["64", "256"]] * 5
    memory = {context: f"{rounds[0]:.0f}" for context, rounds in results["memory"]["all tokens"].items()}
    assert printed_rows(printed, "all tokens")["all tokens"] == list(memory.values()) == ["3", "11"]
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
    assert "the machine was" in printed
    heading = next(line for line in printed.splitlines() if line.strip().startswith("rows"))
    assert all(way in heading for way in results["seconds"])
    assert set(printed_rows(printed, *map(str, runners.ROWS[:3]))) == set(results["seconds"][runners.PLAIN])
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
