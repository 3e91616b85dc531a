"""Teach: everything that the target is asked, in batches, each stored as a shard in a folder.

The folder is a run's memory: started again with the same request, it goes on with the batches that are missing.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs
import torch
from transformers import PreTrainedTokenizerBase

from dynatree_bench.distill import prompts as asking
from dynatree_bench.distill.teacher import Shard, read_shard, score, write, write_shard
from dynatree_core.errors import InputError
from dynatree_core.models import LoadedModel

__all__ = ["Lesson", "TeachingPlan", "teach"]

REQUEST = "request.json"


@attrs.frozen
class TeachingPlan:
    """What a target is asked, and how much of it."""

    texts: tuple[Path, ...]  # plain text files
    num_text_tokens: int  # tokens of plain text that the target reads and judges
    num_continued: int  # passages that it goes on with
    num_asked: int  # questions about passages
    num_self_prompts: int  # questions that it thinks up itself
    questions: tuple[str, ...]  # with {text} where the passage goes
    openings: tuple[str, ...]  # first words of the questions that it thinks up, in turn
    num_new: int  # tokens of an answer at most
    seed: int
    prompt_len: int = 96  # tokens of a passage to go on with
    passage_len: int = 450  # characters of a passage in a question
    long_every: int = 8  # one batch in so many has passages of four times that length
    block_len: int = 768  # tokens of plain text judged in one pass, so that the drafter sees long contexts too
    batch: int = 96  # texts written at once
    sampled: float = 0.4  # share of the texts that is sampled; the others are greedy
    temperature: float = 0.8

    def fingerprint(self, target: str) -> str:
        """The same for the same request to the same target: what a folder's shards belong to."""
        fields = attrs.asdict(
            self, value_serializer=lambda _, __, value: str(value) if isinstance(value, Path) else value
        )
        return json.dumps({"target": target, **fields}, indent=1)


@attrs.frozen
class Lesson:
    """One batch to ask: plain text to judge, or prompts to go on from."""

    name: str  # of its shard
    blocks: tuple[tuple[int, ...], ...] = ()
    prompts: tuple[asking.Prompt, ...] = ()


def teach(
    target: LoadedModel,
    plan: TeachingPlan,
    folder: Path,
    progress: Callable[[int, int, int], None],
    *,
    num_batches: int | None = None,
) -> list[Path]:
    """Make the shards that the folder does not have yet.

    Args:
        target: the model, with its tokenizer.
        plan: what to ask.
        folder: where the shards go; made if need be.
        progress: called after each batch with (batches done, batches in all, tokens judged in this run).
        num_batches: do the first so many only; a later call may do more.

    Returns:
        The shards' files, in the order of the lessons.

    Raises:
        InputError: the folder belongs to another request, or the request has too little text.
    """
    tokenizer = target.tokenizer
    if tokenizer is None:
        raise InputError(f"the target must come with a tokenizer, got '{target.name}' without one")
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, plan.fingerprint(target.name))
    own = _own_questions(target, tokenizer, plan, folder)
    lessons = list(_lessons(tokenizer, plan, own))[:num_batches]
    num_judged = 0
    for done, lesson in enumerate(lessons):
        progress(done, len(lessons), num_judged)
        file = folder / f"{lesson.name}.safetensors"
        if not file.exists():
            shard = _ask(target, tokenizer, plan, lesson)
            write_shard(shard, file)
            num_judged += shard.num_scored
    progress(len(lessons), len(lessons), num_judged)
    return [folder / f"{lesson.name}.safetensors" for lesson in lessons]


def _claim(folder: Path, request: str) -> None:
    """Keep the request beside the shards, and refuse to mix those of two."""
    file = folder / REQUEST
    if not file.exists():
        file.write_text(request, encoding="utf-8")
    elif file.read_text(encoding="utf-8") != request:
        raise InputError(
            f"{folder} holds what was said to another request (see {file}); repeat that one, or choose another folder"
        )


def _lessons(tokenizer: PreTrainedTokenizerBase, plan: TeachingPlan, own: Sequence[Sequence[int]]) -> Iterator[Lesson]:
    """Every batch, the kinds mixed, so that a run that is cut short has some of each."""
    dice = random.Random(plan.seed)
    lessons = []
    if plan.texts:
        passages = asking.read_passages(plan.texts, 4 * plan.passage_len)
        dice.shuffle(passages)
        lessons += _reading(passages, tokenizer, plan)
        asked_of = [passages[i % len(passages)] for i in range(plan.num_asked)]
        continued = [passages[-1 - i % len(passages)] for i in range(plan.num_continued)]
        num_long = plan.num_asked // plan.long_every
        short = asking.ask_prompts(asked_of[num_long:], plan.questions, tokenizer, plan.passage_len)
        long = asking.ask_prompts(asked_of[:num_long], plan.questions, tokenizer, 4 * plan.passage_len)
        lessons += _writing("asked", short, plan, plan.batch)
        lessons += _writing("asked-long", long, plan, max(plan.batch // 3, 1))
        lessons += _writing(
            "continued", asking.continue_prompts(continued, tokenizer, plan.prompt_len), plan, plan.batch
        )
    lessons += _writing("own", own, plan, plan.batch)
    dice.shuffle(lessons)
    yield from lessons


def _reading(passages: Sequence[str], tokenizer: PreTrainedTokenizerBase, plan: TeachingPlan) -> list[Lesson]:
    """Plain text, end to end, cut into blocks of one length; four blocks a batch."""
    token_ids: list[int] = []
    for passage in passages:
        if len(token_ids) >= plan.num_text_tokens:
            break
        token_ids += tokenizer(passage).input_ids
    starts = range(0, min(len(token_ids), plan.num_text_tokens) - plan.block_len + 1, plan.block_len)
    blocks = [tuple(token_ids[start : start + plan.block_len]) for start in starts]
    return [
        Lesson(f"read-{index // 4:04d}", blocks=tuple(blocks[index : index + 4])) for index in range(0, len(blocks), 4)
    ]


def _writing(kind: str, token_ids: Sequence[Sequence[int]], plan: TeachingPlan, batch: int) -> list[Lesson]:
    prompts = asking.mixed(token_ids, plan.sampled, plan.temperature, plan.seed)
    return [
        Lesson(f"{kind}-{index // batch:04d}", prompts=tuple(prompts[index : index + batch]))
        for index in range(0, len(prompts), batch)
    ]


def _ask(target: LoadedModel, tokenizer: PreTrainedTokenizerBase, plan: TeachingPlan, lesson: Lesson) -> Shard:
    if lesson.blocks:
        return score(target.model, torch.tensor(lesson.blocks, device=target.model.device))
    return write(
        target.model,
        lesson.prompts,
        num_new=plan.num_new,
        end_ids=_end_ids(target, tokenizer),
        pad_id=tokenizer.pad_token_id or 0,
        seed=_seed(plan.seed, lesson.name),
    )


def _own_questions(
    target: LoadedModel, tokenizer: PreTrainedTokenizerBase, plan: TeachingPlan, folder: Path
) -> list[list[int]]:
    """Let the target write the user's words itself, then put the answer's beginning behind them."""
    if plan.num_self_prompts == 0:
        return []
    before, behind = asking.chat_prefix(tokenizer)
    openings = [list(tokenizer(words, add_special_tokens=False).input_ids) if words else [] for words in plan.openings]
    end_ids = _end_ids(target, tokenizer)
    questions = []
    for start in range(0, plan.num_self_prompts, plan.batch):
        file = folder / f"questions-{start // plan.batch:04d}.safetensors"
        if not file.exists():
            rows = range(start, min(start + plan.batch, plan.num_self_prompts))
            prefixes = [asking.Prompt((*before, *openings[row % len(openings)]), 1.0) for row in rows]
            shard = write(
                target.model, prefixes, num_new=48, end_ids=end_ids, pad_id=tokenizer.pad_token_id or 0,
                seed=_seed(plan.seed, file.name),
            )  # fmt: skip
            write_shard(shard, file)
        shard = read_shard(file)
        for index in range(shard.num_texts):
            words = shard.token_ids[shard.text(index)].tolist()
            questions.append([*(words[:-1] if words[-1] in end_ids else words), *behind])
    return questions


def _end_ids(target: LoadedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    config = target.model.generation_config
    ends = config.eos_token_id if config is not None and config.eos_token_id is not None else tokenizer.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])


def _seed(seed: int, name: str) -> int:
    """A seed of its own for each shard, so that no shard depends on which were made before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")
