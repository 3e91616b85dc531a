"""Teach: everything that the target is asked, in batches, each stored as a shard in a folder.

The folder is a run's memory: started again with the same request, it goes on with the batches that are missing.

Some passages and some of the target's own questions are kept apart, to measure on: they are in batches of their own,
and nothing of them is in any other.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

import attrs
import torch
from safetensors.torch import save
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynatree_bench.distill import prompts as asking
from dynatree_bench.distill.teacher import Shard, read_shard, score, write, write_shard
from dynatree_bench.run.machine import weights_sha256
from dynatree_core.cli.prompts import PromptPicks
from dynatree_core.errors import InputError
from dynatree_core.files.writing import write_text
from dynatree_core.models.architectures import max_positions
from dynatree_core.models.load import LoadedModel
from dynatree_core.text.columns import Prompt
from dynatree_core.text.prompt import encode_messages

TEACHING = "teaching"  # folder of the shards, in that of the work
REQUEST = "request.json"
NO_MATTER = {"_name_or_path", "dtype", "transformers_version"}  # settings that do not change what a model says

Text = TypeVar("Text", bound=Hashable)


@attrs.frozen
class Material:
    """The user's own files, read once and before any model is loaded."""

    passages: tuple[str, ...] = ()  # of the texts
    prompts: tuple[Prompt, ...] = ()
    is_text: bool = False  # the prompts are passages to go on with, not requests

    def fingerprint(self) -> str:
        """The same for the same words."""
        words = [self.passages, [prompt.messages for prompt in self.prompts]]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()

    def encoded(self, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
        """The prompts in tokens: requests through the chat template where there is one."""
        is_chat = False if self.is_text else None
        return [tuple(encode_messages(prompt.messages, tokenizer, is_chat)) for prompt in self.prompts]


@attrs.frozen
class TeachingPlan:
    """What a target is asked, and how much of it."""

    texts: tuple[Path, ...]  # files of text
    num_text_tokens: int  # tokens of plain text that the target reads and judges
    num_continued: int  # passages that it goes on with
    num_asked: int  # questions about passages
    num_self_prompts: int  # questions that it thinks up itself
    questions: tuple[str, ...]  # with {text} where the passage goes
    openings: tuple[str, ...]  # first words of the questions that it thinks up, in turn
    num_new: int  # tokens of an answer at most
    seed: int
    prompt_len: int = 96  # tokens of a passage to go on with
    longest_prompt: int | None = None  # tokens; longer ones are left out
    passage_len: int = 450  # characters of a passage in a question
    long_every: int = 8  # one batch in so many has passages of four times that length
    block_len: int = 768  # tokens of plain text judged in one pass, so that the drafter sees long contexts too
    batch: int = 96  # texts written at once
    sampled: float = 0.4  # share of the texts that is sampled; the others are greedy
    temperature: float = 0.8
    apart_every: int = 16  # one passage, one prompt, and one question of its own in so many is kept apart
    prompts: tuple[str, ...] = ()  # files of prompts of the user's
    picks: PromptPicks = attrs.field(factory=PromptPicks)  # of those prompts

    def read(self) -> Material:
        """The user's files.

        Raises:
            InputError: one that cannot be read, with file and line, or too little text.
        """
        passages = asking.read_passages(self.texts, 4 * self.passage_len) if self.texts else []
        files = [self.picks.read(place) for place in self.prompts]
        prompts = tuple(prompt for file in files for prompt in file.prompts)
        return Material(tuple(passages), prompts, any(file.is_text for file in files))

    def fingerprint(self, target: LoadedModel, material: Material) -> str:
        """The same for the same request to the same target: what a folder's shards belong to."""
        # under a target's name there may be another model tomorrow
        known = {"target": target.name, "config": _config_sha256(target), "weights": _weights_sha256(target)}
        asked = {name: value for name, value in attrs.asdict(self).items() if name not in ("texts", "prompts", "picks")}
        return json.dumps({**known, **asked, "material": material.fingerprint()}, indent=1)


@attrs.frozen
class Lesson:
    """One batch to ask: plain text to judge, or prompts to go on from."""

    name: str  # of its shard
    blocks: tuple[tuple[int, ...], ...] = ()
    prompts: tuple[asking.Prompt, ...] = ()
    is_apart: bool = False  # to measure on, not to learn from

    def file(self, folder: Path) -> Path:
        """Where its shard is."""
        return folder / f"{self.name}.safetensors"


@attrs.frozen
class Taught:
    """The shards' files, in the order of the lessons."""

    to_learn: tuple[Path, ...]
    apart: tuple[Path, ...]  # to measure on
    num_too_long: int = 0  # prompts of the user's that were left out, for which the target has no room


def teach(
    target: LoadedModel,
    plan: TeachingPlan,
    folder: Path,
    progress: Callable[[int, int, int], None],
    *,
    num_batches: int | None = None,
    material: Material | None = None,
) -> Taught:
    """Make the shards that the folder does not have yet.

    Args:
        target: the model, with its tokenizer.
        plan: what to ask.
        folder: where the shards go; made if need be.
        progress: called after each batch with (batches done, batches in all, tokens judged in this run).
        num_batches: do the first so many only; a later call may do more.
        material: what `plan.read()` gives, where that was read before.

    Raises:
        InputError: the folder belongs to another request, or a text cannot be read or is too short.
    """
    tokenizer = target.tokenizer
    if tokenizer is None:
        raise InputError(f"the target must come with a tokenizer, got '{target.name}' without one")
    material = plan.read() if material is None else material
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, plan.fingerprint(target, material))
    plan = _within(plan, max_positions(target.model))
    own = _own_questions(target, tokenizer, plan, folder)
    given = material.encoded(tokenizer)
    lessons = _lessons(tokenizer, plan, own, material.passages, given)[:num_batches]
    num_apart = sum(lesson.is_apart for lesson in lessons)
    if not 0 < num_apart < len(lessons):
        raise InputError(
            "there must be at least one batch to learn from and one that is kept apart, got "
            f"{len(lessons) - num_apart} and {num_apart}; raise --self-prompts, --ask or --read, or give more text or "
            "prompts"
        )
    num_judged = 0
    for done, lesson in enumerate(lessons):
        progress(done, len(lessons), num_judged)
        file = lesson.file(folder)
        if not file.exists():
            shard = _ask(target, tokenizer, plan, lesson)
            write_shard(shard, file)
            num_judged += shard.num_scored
    progress(len(lessons), len(lessons), num_judged)
    return Taught(
        to_learn=tuple(lesson.file(folder) for lesson in lessons if not lesson.is_apart),
        apart=tuple(lesson.file(folder) for lesson in lessons if lesson.is_apart),
        num_too_long=sum(len(ids) > (plan.longest_prompt or math.inf) for ids in given),
    )


def _config_sha256(target: LoadedModel) -> str:
    """Of the model's settings."""
    settings = target.model.config.to_dict()
    told = {name: value for name, value in settings.items() if name not in NO_MATTER}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _weights_sha256(target: LoadedModel) -> str:
    """Of the files, whatever dtype they are loaded in; where there are none, of the weights in memory."""
    place = target.model.config.name_or_path  # empty where a model was not loaded, which would mean this folder
    of_files = weights_sha256(place) if place else None
    if of_files is not None:
        return of_files
    digest = hashlib.sha256()
    for name, weight in target.model.state_dict().items():
        digest.update(save({name: weight.contiguous()}))
    return digest.hexdigest()


def _within(plan: TeachingPlan, limit: int | None) -> TeachingPlan:
    """A plan for a target that has so many positions: a prompt takes half of them at most."""
    if limit is None:
        return plan
    return attrs.evolve(
        plan,
        prompt_len=min(plan.prompt_len, limit // 2),
        longest_prompt=limit // 2,
        block_len=min(plan.block_len, limit),
    )


def is_request(folder: Path) -> bool:
    """Whether a folder holds what a target said to some request."""
    return (folder / REQUEST).is_file()


def _claim(folder: Path, request: str) -> None:
    """Keep the request beside the shards, and refuse to mix those of two."""
    file = folder / REQUEST
    if not file.exists():
        write_text(file, request)
    elif file.read_text(encoding="utf-8") != request:
        raise InputError(
            f"{folder} holds what was said to another request, or to one of another version (see {file}); repeat that "
            "request, delete the folder, or choose another"
        )


def _lessons(
    tokenizer: PreTrainedTokenizerBase,
    plan: TeachingPlan,
    own: Sequence[tuple[int, ...]],
    passages: Sequence[str] = (),
    given: Sequence[tuple[int, ...]] = (),
) -> list[Lesson]:
    """Every batch, the kinds and the two sides mixed, so that a run that is cut short has some of each."""
    dice = random.Random(plan.seed)
    passages = [*passages]
    dice.shuffle(passages)
    given = random.Random(plan.seed).sample(given, len(given))
    own = dice.sample(own, len(own))  # its openings are in turn, and so would be those that are kept apart
    placed: list[tuple[float, Lesson]] = []
    for is_apart, first in ((True, 0.0), (False, 0.5)):
        lessons = _lessons_about(
            _side(passages, plan, is_apart), _side(own, plan, is_apart), tokenizer, _share(plan, is_apart)
        )
        lessons += _writing("given", _side(given, plan, is_apart), plan, plan.batch)
        if is_apart:
            lessons = [attrs.evolve(lesson, name=f"apart-{lesson.name}", is_apart=True) for lesson in lessons]
        dice.shuffle(lessons)
        placed += [((first + index) / len(lessons), lesson) for index, lesson in enumerate(lessons)]
    return [lesson for _, lesson in sorted(placed, key=itemgetter(0))]


def _side(texts: Sequence[Text], plan: TeachingPlan, is_apart: bool) -> list[Text]:
    """The texts that are kept apart, or the others; equal ones are on one side."""
    apart = set(list(dict.fromkeys(texts))[:: plan.apart_every])
    return [text for text in texts if (text in apart) == is_apart]


def _share(plan: TeachingPlan, is_apart: bool) -> TeachingPlan:
    """How much of the plan is for one side."""

    def part(count: int) -> int:
        num_apart = math.ceil(count / plan.apart_every)
        return num_apart if is_apart else count - num_apart

    return attrs.evolve(
        plan,
        num_text_tokens=part(plan.num_text_tokens),
        num_continued=part(plan.num_continued),
        num_asked=part(plan.num_asked),
    )


def _lessons_about(
    passages: Sequence[str], own: Sequence[tuple[int, ...]], tokenizer: PreTrainedTokenizerBase, plan: TeachingPlan
) -> list[Lesson]:
    """The batches about these passages and these questions of its own, kind by kind."""
    lessons = _writing("own", own, plan, plan.batch)
    if passages:
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
    return lessons


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
    longest = math.inf if plan.longest_prompt is None else plan.longest_prompt
    token_ids = [ids for ids in token_ids if len(ids) <= longest]
    prompts = asking.mixed(token_ids, plan.sampled, plan.temperature, plan.seed)
    return [
        Lesson(f"{kind}-{index // batch:04d}", prompts=tuple(prompts[index : index + batch]))
        for index in range(0, len(prompts), batch)
    ]


def _ask(target: LoadedModel, tokenizer: PreTrainedTokenizerBase, plan: TeachingPlan, lesson: Lesson) -> Shard:
    if lesson.blocks:
        return score(target.model, torch.tensor(lesson.blocks, device=target.model.device))
    return _written(target, tokenizer, lesson.prompts, plan.num_new, _seed(plan.seed, lesson.name))


def _written(
    target: LoadedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[asking.Prompt], num_new: int, seed: int
) -> Shard:
    """What the target writes behind these prompts, as far as it has positions."""
    limit = max_positions(target.model)
    if limit is not None:
        num_new = min(num_new, limit - max(len(prompt.token_ids) for prompt in prompts))
    return write(
        target.model,
        prompts,
        num_new=num_new,
        end_ids=end_ids(target.model, tokenizer),
        pad_id=tokenizer.pad_token_id or 0,
        seed=seed,
    )


def _own_questions(
    target: LoadedModel, tokenizer: PreTrainedTokenizerBase, plan: TeachingPlan, folder: Path
) -> list[tuple[int, ...]]:
    """Let the target write the user's words itself, then put the answer's beginning behind them."""
    if plan.num_self_prompts == 0:
        return []
    before, behind = asking.chat_prefix(tokenizer)
    openings = [list(tokenizer(words, add_special_tokens=False).input_ids) if words else [] for words in plan.openings]
    longest = max(len(before) + len(words) for words in openings)
    if plan.longest_prompt is not None and longest > plan.longest_prompt:
        raise InputError(
            f"a target's own questions need half its positions for the chat template and an opening, got {longest} "
            f"tokens for {plan.longest_prompt}; use --self-prompts 0 and --text, or shorter openings"
        )
    ends = end_ids(target.model, tokenizer)
    questions = []
    for start in range(0, plan.num_self_prompts, plan.batch):
        file = folder / f"questions-{start // plan.batch:04d}.safetensors"
        if not file.exists():
            rows = range(start, min(start + plan.batch, plan.num_self_prompts))
            prefixes = [asking.Prompt((*before, *openings[row % len(openings)]), 1.0) for row in rows]
            write_shard(_written(target, tokenizer, prefixes, 48, _seed(plan.seed, file.name)), file)
        shard = read_shard(file)
        for index in range(shard.num_texts):
            words = shard.token_ids[shard.text(index)].tolist()
            questions.append((*(words[:-1] if words[-1] in ends else words), *behind))
    return questions


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: those of the model's generation config, else the tokenizer's."""
    config = model.generation_config
    ends = config.eos_token_id if config is not None and config.eos_token_id is not None else tokenizer.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])


def _seed(seed: int, name: str) -> int:
    """A seed of its own for each shard, so that no shard depends on which were made before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")
