"""What is a drafter worth to each policy, on given prompts?

Question: how often does a drafter's first choice agree with the target, and how many tokens an iteration commits, by
category of prompts, drafter and policy.

Method: the target answers every prompt once, greedily, in batches, and what it says is stored. Then each drafter and
policy is run over these answers by the ordinary runtime, with a stand-in for the target that says at every position
what the target said there. Since acceptance depends on nothing else, the numbers are those of a real run, which costs
the drafter's time only. Speeds are not measured: `dynatree bench` does.

Output: agreement by category, and tokens per iteration by category, drafter and policy.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from dynatree_bench.distill.evaluate import Agreement, agreement
from dynatree_bench.distill.prompts import Prompt
from dynatree_bench.distill.teach import end_ids
from dynatree_bench.distill.teacher import Shard, read_shard, write, write_shard
from dynatree_bench.report.tables import Table, simple
from dynatree_bench.run.known import Text, known_session
from dynatree_bench.run.machine import weights_sha256
from dynatree_bench.run.pairs import Pair
from dynatree_bench.run.progress import bar
from dynatree_bench.studies.study import Asked, Study
from dynatree_core import Session, run
from dynatree_core.drafters.base import Drafter
from dynatree_core.models.student import is_student, load_student
from dynatree_core.text.prompt import tokenizer_of

DRAFTERS = ("distilled", "prompt_lookup", "distilled+prompt_lookup")
POLICIES = ("linear", "fixed", "phase1", "phase2", "phase3")
BATCH = 12  # prompts of similar length that are answered at once
NUM_REPLAYED = 20  # answers of a category that are drafted again
RAW_TOKENS = 96  # of a piece of running text, which is gone on with and not answered


@attrs.frozen
class Row:
    """One policy with one drafter over the answers of one category."""

    category: str
    drafter: str
    policy: str
    num_tokens: int
    num_iterations: int
    num_drafted: int


def measure(asked: Asked) -> dict[str, Any]:
    """{"agreement": drafter -> category -> Agreement, "rows": of Row}"""
    models = attrs.evolve(asked.models, drafters=asked.models.drafters or DRAFTERS, device="cpu")
    pair, limit = models.load(seed=asked.seed), asked.new_tokens(full=128, quick=16)
    prompts = asked.prompts(pair, full=240, max_text_tokens=RAW_TOKENS)
    answers = _answers(pair, prompts, limit, asked.out / "answers")
    policies = asked.policies or POLICIES
    said = {
        "target": pair.target.name,
        "dtype": str(pair.target.model.dtype).removeprefix("torch."),
        "max_new_tokens": limit,
        "prompts": {category: len(found) for category, found in prompts.items()},
        "replays": NUM_REPLAYED,
    }
    found = {
        name: {category: attrs.asdict(one) for category, one in by_category.items()}
        for name, by_category in _agreements(pair, answers).items()
    }
    return {
        "provenance": said,
        "agreement": found,
        "rows": [attrs.asdict(row) for row in _replayed(pair, policies, answers)],
    }


def _answers(
    pair: Pair, prompts: Mapping[str, Sequence[Sequence[int]]], max_new_tokens: int, folder: Path
) -> dict[str, list[Shard]]:
    """What the target says to each prompt, greedily; kept in files, so that another run need not ask again."""
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = pair.target.model, tokenizer_of(pair.target)
    ends, weights = end_ids(model, tokenizer), weights_sha256(str(model.config.name_or_path))
    answers: dict[str, list[Shard]] = {}
    with bar("the target answers", sum(map(len, prompts.values()))) as advance:
        for category, of_category in prompts.items():
            ordered = sorted(map(list, of_category), key=len)
            for some in (ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)):
                key = some, max_new_tokens, model.config.to_dict(), weights, ends
                digest = hashlib.sha256(repr(key).encode()).hexdigest()
                file = folder / f"{digest[:16]}.safetensors"  # no category, which may be no name for a file
                if not file.exists():
                    asked = [Prompt(tuple(ids), 0.0) for ids in some]
                    shard = write(
                        model, asked, num_new=max_new_tokens, end_ids=ends, pad_id=tokenizer.pad_token_id or 0,
                        seed=0, min_alive=0.0,
                    )  # fmt: skip
                    write_shard(shard, file)
                answers.setdefault(category, []).append(read_shard(file))
                advance(advance=len(some))
    return answers


def _agreements(pair: Pair, answers: Mapping[str, list[Shard]]) -> dict[str, dict[str, Agreement]]:
    """For drafters that are students, or have one: its agreement with the target, by category and over all."""
    everything = {**answers, "all": [shard for shards in answers.values() for shard in shards]}
    model = pair.target.model
    weights = [own for drafter in pair.drafters.values() for own in drafter.own_weights(model.device)]
    found = {}
    for name, folder in {own.drafter: own.folder for own in weights}.items():
        if is_student(folder):
            student = load_student(folder, model, torch.float32)
            found[name] = {key: agreement(student, shards, torch.bfloat16) for key, shards in everything.items()}
    return found


def _replayed(pair: Pair, policies: Sequence[str], answers: Mapping[str, list[Shard]]) -> list[Row]:
    """Every drafter and policy over every answer."""
    rows = []
    with bar("drafting", len(pair.drafters) * len(policies) * len(answers)) as advance:
        for (name, drafter), policy, (category, shards) in itertools.product(
            pair.drafters.items(), policies, answers.items()
        ):
            sessions = [
                replayed(shard, index, pair.target.model, drafter, policy)
                for shard, index in evenly(shards, NUM_REPLAYED)
            ]
            num_tokens = sum(len(session.new_token_ids) for session in sessions)
            num_drafted = sum(step.num_drafted for session in sessions for step in session.steps)
            num_iterations = sum(session.num_iterations for session in sessions)
            rows.append(Row(category, name, policy, num_tokens, num_iterations, num_drafted))
            advance()
    return rows


def evenly(shards: Sequence[Shard], num_texts: int) -> list[tuple[Shard, int]]:
    """So many of the texts, from the whole range of lengths; they are in the order of their prompts' lengths."""
    texts = [(shard, index) for shard in shards for index in range(shard.num_texts)]
    num_texts = min(num_texts, len(texts))
    return [texts[place * len(texts) // num_texts] for place in range(num_texts)]


def replayed(shard: Shard, index: int, target: nn.Module, drafter: Drafter, policy: str) -> Session:
    """A finished session over one stored answer of the target.

    Raises:
        AssertionError: the session said anything else than the answer.
    """
    ids = shard.token_ids[shard.text(index)].tolist()
    prompt_len = int(shard.is_scored[shard.text(index)].nonzero()[0]) + 1
    text = Text("answer", tuple(ids[:prompt_len]), tuple(ids[prompt_len:]), len(ids) - prompt_len)
    session = known_session(target, drafter, text, policy)
    for _ in run(session):
        pass
    assert tuple(session.new_token_ids) == text.new_ids, "a replay must say what the target said"
    return session


def tables(found: Mapping[str, Any]) -> Sequence[Table | None]:
    made = []
    for name, by_category in found["agreement"].items():
        lines = [
            (category, *(one[key] for key in ("top1", "top3", "covered"))) for category, one in by_category.items()
        ]
        header = ("category", "top-1", "top-3", "covered")
        title = f"Agreement of `{name}` with the target"
        made.append(simple(f"agreement-{name}", title, "", header, lines, digits=3))
    rows = [Row(**row) for row in found["rows"]]
    policies, categories = (
        list(dict.fromkeys(getattr(row, field) for row in rows)) for field in ("policy", "category")
    )
    for name in dict.fromkeys(row.drafter for row in rows):
        lines = []
        for category in (*categories, "all"):
            cells = []
            for policy in policies:
                mine = [r for r in rows if (r.drafter, r.policy) == (name, policy) and category in (r.category, "all")]
                cells.append(sum(r.num_tokens for r in mine) / sum(r.num_iterations for r in mine))
            lines.append((category, *cells))
        made.append(simple(f"tokens-{name}", f"Tokens per iteration with `{name}`", "", ("category", *policies), lines))
    return made


STUDY = Study(
    ("target", "drafters", "policies", "workloads", "num_prompts", "picks", "max_new_tokens", "is_chat"),
    measure,
    tables,
)
