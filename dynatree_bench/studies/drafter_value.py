"""What is a drafter worth to each policy, on given prompts?

Question: how often does a drafter's first choice agree with the target, and how many tokens an iteration commits, by
category of prompts, drafter and policy.

Method: the target answers every prompt once, greedily, in batches, and what it says is stored. Then each drafter and
policy is run over these answers by the ordinary runtime, with a stand-in for the target that says at every position
what the target said there. Since acceptance depends on nothing else, the numbers are those of a real run, which costs
the drafter's time only. Speeds are not measured: `dynatree bench` does.

Output: tables by category (Markdown), and all numbers as JSON in --out.

Command: python -m dynatree_bench.studies.drafter_value --prompts FILE.jsonl [--drafter NAME]... [--policy STACK]...
    --out DIR
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from torch import nn
from transformers import PreTrainedModel

from dynatree_bench.distill.evaluate import Agreement, agreement
from dynatree_bench.distill.prompts import Prompt
from dynatree_bench.distill.teach import end_ids
from dynatree_bench.distill.teacher import Shard, read_shard, write, write_shard
from dynatree_bench.run.machine import check_writable, provenance, weights_sha256
from dynatree_bench.studies.rehearse import Text, known_session
from dynatree_core import Session, load_model, run
from dynatree_core.cli.exits import end_process
from dynatree_core.cli.model_options import encode_messages, tokenizer_of
from dynatree_core.drafters.base import Drafter
from dynatree_core.drafters.build import build_drafter
from dynatree_core.drafters.distilled import DistilledDrafter
from dynatree_core.files.writing import write_text
from dynatree_core.models.student import load_student
from dynatree_core.text.prompt_files import read_prompts

DRAFTERS = ("distilled", "prompt_lookup", "distilled+prompt_lookup")
POLICIES = ("linear", "fixed", "phase1", "phase2", "phase3")
RESULTS = "drafter_value.json"
BATCH = 12  # prompts of similar length that are answered at once
RAW = ("wikitext", "wikitext2", "books", "pg19")  # categories of plain text: to be gone on with, not answered


@attrs.frozen
class Row:
    """One policy with one drafter over the answers of one category."""

    category: str
    drafter: str
    policy: str
    num_tokens: int
    num_iterations: int
    num_drafted: int


def main() -> int:
    arguments = _parse_arguments()
    for name in (RESULTS, "drafter_value.md"):
        check_writable(arguments.out / name, "python -m dynatree_bench.studies.drafter_value")
    console = Console(stderr=True, highlight=False)
    loaded = load_model(arguments.target, device="cpu")
    tokenizer = tokenizer_of(loaded)
    texts = _prompts(arguments, tokenizer)
    with Progress(console=console) as progress:
        answers = _answers(loaded.model, tokenizer, texts, arguments, progress)
        agreements = _agreements(loaded.model, arguments.drafter, answers)
        rows = _replayed(loaded.model, arguments, answers, progress)
    numbers = {
        **provenance("dynatree_bench.studies.drafter_value", loaded.model.device),
        "target": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "max_new_tokens": arguments.max_new_tokens,
        "prompts": {category: len(found) for category, found in texts.items()},
        "replays": arguments.replays,
        "agreement": {
            drafter: {category: attrs.asdict(found) for category, found in by_category.items()}
            for drafter, by_category in agreements.items()
        },
        "rows": [attrs.asdict(row) for row in rows],
    }
    write_text(arguments.out / RESULTS, json.dumps(numbers, indent=1) + "\n")
    Console().print(Markdown(tables(agreements, rows)))
    write_text(arguments.out / "drafter_value.md", tables(agreements, rows))
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target")
    parser.add_argument(
        "--prompts", type=Path, action="append", required=True, help="a file of prompts with categories"
    )
    parser.add_argument("--per-category", type=int, default=40)
    parser.add_argument("--replays", type=int, default=20, help="answers of a category that are drafted again")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--drafter", action="append", help=f"default: {', '.join(DRAFTERS)}")
    parser.add_argument("--policy", action="append", help=f"default: {', '.join(POLICIES)}")
    parser.add_argument("--out", type=Path, required=True, help="answers are kept here, and the results")
    arguments = parser.parse_args()
    arguments.drafter = arguments.drafter or list(DRAFTERS)
    arguments.policy = arguments.policy or list(POLICIES)
    return arguments


def _prompts(arguments: argparse.Namespace, tokenizer: Any) -> dict[str, list[list[int]]]:
    """Prompts by category, as token ids: plain text as it is (its first 96 tokens), all else in the chat template."""
    texts: defaultdict[str, list[list[int]]] = defaultdict(list)
    for file in arguments.prompts:
        for prompt in read_prompts(file).prompts:
            found = texts[prompt.category]
            if len(found) < arguments.per_category:
                is_raw = prompt.category in RAW
                found.append(
                    tokenizer(prompt.text).input_ids[:96] if is_raw else encode_messages(prompt.messages, tokenizer)
                )
    return dict(texts)


def _answers(
    model: PreTrainedModel, tokenizer: Any, texts: dict[str, list[list[int]]], arguments: Any, progress: Progress
) -> dict[str, list[Shard]]:
    """What the target says to each prompt, greedily; kept in files, so that another run need not ask again."""
    folder = arguments.out / "answers"
    folder.mkdir(exist_ok=True)
    weights = weights_sha256(str(model.config.name_or_path))
    ends = end_ids(model, tokenizer)
    task = progress.add_task("the target answers", total=sum(map(len, texts.values())))
    answers: dict[str, list[Shard]] = {}
    for category, prompts in texts.items():
        ordered = sorted(prompts, key=len)
        answers[category] = []
        for start in range(0, len(ordered), BATCH):
            some = ordered[start : start + BATCH]
            key = some, arguments.max_new_tokens, model.config.to_dict(), weights, ends
            digest = hashlib.sha256(repr(key).encode()).hexdigest()
            file = folder / f"{digest[:16]}.safetensors"  # no category, which may be no name for a file
            if not file.exists():
                asked = [Prompt(tuple(ids), 0.0) for ids in some]
                shard = write(
                    model, asked, num_new=arguments.max_new_tokens, end_ids=ends,
                    pad_id=tokenizer.pad_token_id or 0, seed=0, min_alive=0.0,
                )  # fmt: skip
                write_shard(shard, file)
            answers[category].append(read_shard(file))
            progress.advance(task, len(some))
    return answers


def _agreements(
    model: PreTrainedModel, drafters: Sequence[str], answers: dict[str, list[Shard]]
) -> dict[str, dict[str, Agreement]]:
    """For drafters that are students, or have one: its agreement with the target, by category and over all."""
    found = {}
    for name in drafters:
        student = build_drafter(name)
        if isinstance(student, DistilledDrafter):
            loaded = load_student(student.folder, model, torch.float32)
            by_category = {category: agreement(loaded, shards, torch.bfloat16) for category, shards in answers.items()}
            everything = [shard for shards in answers.values() for shard in shards]
            found[name] = by_category | {"all": agreement(loaded, everything, torch.bfloat16)}
    return found


def _replayed(model: PreTrainedModel, arguments: Any, answers: dict[str, list[Shard]], progress: Progress) -> list[Row]:
    """Every drafter and policy over every answer."""
    num_texts = sum(len(evenly(shards, arguments.replays)) for shards in answers.values())
    task = progress.add_task("drafting", total=num_texts * len(arguments.drafter) * len(arguments.policy))
    rows = []
    for name in arguments.drafter:
        drafter = build_drafter(name)
        for policy in arguments.policy:
            for category, shards in answers.items():
                num_tokens = num_iterations = num_drafted = 0
                for shard, index in evenly(shards, arguments.replays):
                    session = replayed(shard, index, model, drafter, policy)
                    num_tokens += len(session.new_token_ids)
                    num_iterations += session.num_iterations
                    num_drafted += sum(step.num_drafted for step in session.steps)
                    progress.advance(task)
                rows.append(Row(category, name, policy, num_tokens, num_iterations, num_drafted))
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


def tables(agreements: dict[str, dict[str, Agreement]], rows: Sequence[Row]) -> str:
    """Markdown: agreement by category, and tokens per iteration by category, drafter and policy."""
    lines = []
    for name, by_category in agreements.items():
        lines += [f"Agreement of `{name}` with the target:", "", "| category | top-1 | top-3 | covered |"]
        lines.append("| --- | --- | --- | --- |")
        for category, found in by_category.items():
            lines.append(f"| {category} | {found.top1:.3f} | {found.top3:.3f} | {found.covered:.3f} |")
        lines.append("")
    policies = list(dict.fromkeys(row.policy for row in rows))
    categories = list(dict.fromkeys(row.category for row in rows))
    for name in dict.fromkeys(row.drafter for row in rows):
        lines += [f"Tokens per iteration with `{name}`:", "", f"| category | {' | '.join(policies)} |"]
        lines.append("| --- |" + " --- |" * len(policies))
        for category in [*categories, "all"]:
            cells = []
            for policy in policies:
                mine = [r for r in rows if (r.drafter, r.policy) == (name, policy) and category in (r.category, "all")]
                cells.append(f"{sum(r.num_tokens for r in mine) / sum(r.num_iterations for r in mine):.2f}")
            lines.append(f"| {category} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    end_process(main)
