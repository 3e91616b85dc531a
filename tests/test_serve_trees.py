"""The trees of an answer: in the stream of who has asked for them, and nowhere else."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving import events, expected_text, gated, new_engine, new_service, running

from dynatree_core import generate
from dynatree_core.serve.service import Service
from dynatree_core.trace import Trace, live, read, record
from dynatree_core.trace.summary import run_of

PROMPT = "the cat sat on the mat. the cat"
BODY = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "stream": True}


def streamed(server: Any, **own: Any) -> list[dict[str, Any]]:
    with server.http() as http, http.stream("POST", "/v1/completions", json={**BODY, **own}) as answer:
        assert answer.status_code == 200, answer.read()
        return list(events(answer.iter_lines()))


def test_the_trees_are_those_of_a_trace(tmp_path: Path) -> None:
    engine = new_engine()
    with running(new_service({"prompt_lookup": engine})) as server:
        records = streamed(server, dynatree={"trees": True})
        tokenizer = engine.tokenizer
        trace = tmp_path / "run.jsonl"
        generate(
            engine.target, "prompt_lookup", tokenizer(PROMPT).input_ids, policy="fixed(depth=3)", max_new_tokens=40,
            tokenizer=tokenizer, trace=trace,
        )  # fmt: skip
    assert "".join(record["choices"][0]["text"] for record in records) == expected_text(PROMPT, 40)
    steps = [step for record in records for step in record.get("dynatree", {}).get("trees", ())]
    run, ((*details,),) = run_of("run", read(trace))
    [sequence] = run["sequences"]
    assert [step["iteration"] for step in steps] == sequence["iteration"]
    assert [step["accepted"] for step in steps] == sequence["accepted"]
    assert [step["ended"] for step in steps] == [sequence["endings"][place] for place in sequence["ended"]]
    assert any(sequence["accepted"])
    reasons, texts = [], {}
    for step, detail in zip(steps, details, strict=True):
        reasons += step["reasons"]
        assert not texts.keys() & step["texts"].keys(), "each is told once"
        texts |= step["texts"]
        for column in ("token", "parent", "rank", "logprob", "path", "votes"):
            assert list(step["detail"][column]) == list(detail[column]), column
        found = [None if at < 0 else reasons[at] for at in step["detail"]["reason"]]
        assert found == [None if at < 0 else run["reasons"][at] for at in detail["reason"]]
        assert {str(token) for token in step["detail"]["token"]} <= texts.keys()
    assert {token: tuple(text) for token, text in texts.items()}.items() <= {
        token: tuple(text) for token, text in run["texts"].items()
    }.items()


def test_requests_that_are_computed_together_are_sequences_of_one_trace(tmp_path: Path) -> None:
    """What `serve --trace` records, in steps that each compute both."""
    prompts = {PROMPT: 20, "a man": 12}
    with Trace(tmp_path / "run.jsonl", tokenizer=new_engine().tokenizer) as trace:
        plain = new_service()
        observers = {name: trace.observer() for name in plain.loop.engines}
        service = Service(plain.loop.engines, plain.settings, None, observers)
        with gated(service) as (server, gate), ThreadPoolExecutor() as pool:
            body = {**BODY, "stream": False}
            answers = [
                pool.submit(server.post, "/v1/completions", {**body, "prompt": prompt, "max_tokens": length})
                for prompt, length in prompts.items()
            ]
            for _ in prompts:
                gate.next_handle()  # both have come before the first step
            gate.open()
            texts = [answer.result().json()["choices"][0]["text"] for answer in answers]
    assert texts == [expected_text(prompt, length) for prompt, length in prompts.items()]
    lines = [json.loads(line) for line in trace.path.read_text().splitlines()]
    turns = [line["sequence"] for line in lines if line["kind"] == "iteration"]
    assert turns[:4] in ([0, 1, 0, 1], [1, 0, 1, 0]), "both were in each step"
    found = {one.begin["prompt_text"]: one for one in read(trace.path).sequences}
    assert found.keys() == prompts.keys()
    for text, (prompt, length) in zip(texts, prompts.items(), strict=True):
        assert len(found[prompt].token_ids) == length
        told = "".join(one.record["text"] for one in found[prompt].iterations) + found[prompt].end["text"]
        assert told == text


def test_who_does_not_ask_has_none_and_each_choice_has_its_own() -> None:
    with running(new_service()) as server:
        assert all("dynatree" not in record for record in streamed(server))
        assert all("trees" not in record["dynatree"] for record in streamed(server, dynatree={"steps": True}))
        records = streamed(server, n=2, temperature=1.0, seed=5, dynatree={"trees": True, "steps": True})
    for index in (0, 1):
        mine = [record for record in records if record["choices"][0]["index"] == index]
        said = [record["dynatree"] for record in mine if "dynatree" in record]
        steps = [step for one in said for step in one["trees"]]
        assert [step["iteration"] for step in steps] == [*range(len(steps))]
        assert sum(step["accepted"] for step in steps) == sum(one["accepted"] for one in said)


def test_who_is_late_gets_the_latest_and_is_told_how_many_were_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MOST_WAITING", 5)
    engine, trees, all_of_them = new_engine(), live.LiveTrees(), []
    parsed: list[str] = []
    monkeypatch.setattr(record, "json", SimpleNamespace(loads=parsed.append))
    watching = [trees.observer, Trace(None, is_private=True, on_line=all_of_them.append).observer()]
    ids = engine.tokenizer(PROMPT).input_ids
    generate(engine.target, "prompt_lookup", ids, policy="autoregressive", max_new_tokens=12, observer=watching)
    assert not parsed, "lines are read where trees are wanted, not where they are computed"
    assert [line for line in all_of_them if '"kind":"begin"' in line]
    told = trees.record(str)
    assert [step["iteration"] for step in told["trees"]] == [7, 8, 9, 10, 11]
    assert told["trees_dropped"] == 7
    assert trees.record(str) == {"trees": []}


@pytest.mark.parametrize(
    ("name", "shows_trees", "stream", "message"),
    [
        ("trees", True, False, "set 'stream' to true"),
        ("trees", False, True, "--no-trees"),
        ("steps", True, False, "set 'stream' to true"),
    ],
)
def test_what_no_chunk_can_carry_is_refused(name: str, shows_trees: bool, stream: bool, message: str) -> None:
    with running(new_service(shows_trees=shows_trees)) as server:
        answer = server.post("/v1/completions", {**BODY, "stream": stream, "dynatree": {name: True}})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == f"dynatree.{name}"
    assert message in answer.json()["error"]["message"]
