"""The worth of drafters, on a tiny target and on paper."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
import torch

from dynatree_bench.distill.evaluate import Agreement
from dynatree_bench.distill.teacher import Shard
from dynatree_bench.run.pairs import Models, load_pair
from dynatree_bench.studies import drafter_value
from dynatree_bench.studies.drafter_value import Row, evenly
from dynatree_bench.studies.study import Asked, run_study
from dynatree_core import generate


def shard(num_texts: int) -> Shard:
    ends = torch.arange(1, num_texts + 1)
    return Shard(ends, ends, ends > 0, ends[:, None], ends[:, None])


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    records = [("qa", "what is a cat"), ("wikitext", "the cat sat " * 20), ("qa", "a b"), ("qa", "not this one")]
    file.write_text("\n".join(json.dumps({"category": name, "prompt": prompt}) for name, prompt in records))
    return file


def test_texts_are_taken_from_the_whole_range():
    one, other = shard(3), shard(2)
    assert evenly([one, other], 2) == [(one, 0), (one, 2)]
    assert evenly([one, other], 3) == [(one, 0), (one, 1), (other, 0)]
    assert evenly([one, other], 9) == [(one, 0), (one, 1), (one, 2), (other, 0), (other, 1)]


def test_plain_text_is_gone_on_with_and_all_else_answered(character_target, prompts, tmp_path):
    pair, text = load_pair(str(character_target), "prompt_lookup"), tmp_path / "text.txt"
    text.write_text("the cat sat on a mat. " * 40)
    asked = Asked(Models(), tmp_path, workloads=(str(prompts), str(text)), num_prompts=2)
    found = asked.prompts(pair, full=None, max_text_tokens=96)
    decode = pair.target.tokenizer.decode
    assert [decode(ids).replace(" ", "") for ids in found["qa"]] == ["<u>whatisacat</s><a>"]
    assert {len(ids) for ids in found["text"]} == {96}
    assert decode(found["text"][0]).replace(" ", "")[:9] in "thecatsatonamat.thecatsat" * 2


def test_answers_are_kept_for_the_same_weights_only(character_target, tmp_path, monkeypatch):
    pair, written, real = load_pair(str(character_target), "prompt_lookup"), [], drafter_value.write
    monkeypatch.setattr(drafter_value, "write", lambda *asked, **named: written.append(1) or real(*asked, **named))
    model = pair.target.model

    def answers() -> list[int]:
        found = drafter_value._answers(pair, {"q/a": [[5, 6, 7]]}, 6, tmp_path)
        return found["q/a"][0].token_ids.tolist()

    first = answers()
    assert first[:3] == [5, 6, 7]
    assert first[3:] == generate(model, None, [5, 6, 7], policy="autoregressive", max_new_tokens=6).token_ids
    assert answers() == first
    assert len(written) == 1
    monkeypatch.setattr(drafter_value, "weights_sha256", lambda path: "of other weights")
    assert answers() == first
    assert len(written) == 2
    model.generation_config.eos_token_id = [30, first[3]]
    assert answers() == first[:4] != first, "it ends where generate() would"
    assert len(written) == 3


def test_the_tables_of_drafters():
    found = Agreement(10, 0.5, 0.75, 0.9, (0.5,), (0.5,), (0.5,), (10,), 0.0)
    rows = [
        Row("qa", "lookup", "linear", 30, 10, 0), Row("text", "lookup", "linear", 10, 10, 0),
        Row("qa", "lookup", "fixed", 30, 20, 0), Row("text", "lookup", "fixed", 30, 10, 0),
    ]  # fmt: skip
    agreed, tokens = drafter_value.tables(
        {"agreement": {"student": {"qa": attrs.asdict(found)}}, "rows": [attrs.asdict(row) for row in rows]}
    )
    assert (agreed.title, agreed.header) == (
        "Agreement of `student` with the target", ("category", "top-1", "top-3", "covered"),
    )  # fmt: skip
    assert agreed.rows == (("qa", "0.500", "0.750", "0.900"),)
    assert (tokens.title, tokens.header) == ("Tokens per iteration with `lookup`", ("category", "linear", "fixed"))
    assert tokens.rows == (
        ("qa", "3.00", "1.50"), ("text", "1.00", "3.00"), ("all", "2.00", "2.00"),  # of all tokens and iterations
    )  # fmt: skip


def test_the_worth_of_drafters_on_a_tiny_target(character_target, prompts, tmp_path):
    asked = Asked(
        Models(str(character_target), ("prompt_lookup",)), tmp_path / "out", policies=("linear", "fixed"),
        workloads=(str(prompts),), num_prompts=3, max_new_tokens=(8,),
    )  # fmt: skip
    result = run_study("drafter-value", asked, command="the command")
    assert (result.said["target"], result.said["dtype"]) == (str(character_target), "float32")
    assert result.said["prompts"] == {"qa": 2, "wikitext": 1}
    rows = [Row(**row) for row in result.found["rows"]]
    policies, categories = ("linear", "fixed"), ("qa", "wikitext")
    assert [(row.policy, row.category) for row in rows] == [(p, c) for p in policies for c in categories]
    assert rows[0].num_tokens == rows[2].num_tokens, "every policy says what the target said"
    assert all(0 < row.num_iterations <= row.num_tokens for row in rows)
    assert any(row.num_drafted for row in rows)
    again = run_study("drafter-value", asked, command="the command")
    assert again.found["rows"] == result.found["rows"]
