"""What is generated from: prompts of a file, of a hub data set, of a known benchmark, or built in.

A workload is named by a string:

    built-in, built-in:KIND      a few prompts of dynatree_bench.data.prompts, or those of one kind
    built-in:text                the same as one running text
    wikitext-2, pg19, …          a known benchmark (KNOWN): from a local file, or else from the hub
    NAME=FILE                    a known benchmark from this file, or a file by a name of yours
    FILE, -, http://…            any file, folder, standard input or address, as dynatree_core.text reads it
    random, random:SEED          random tokens, for models without a tokenizer
    markov                       the text of a synthetic pair
    OWNER/NAME[:CONFIG[:SPLIT[:COLUMN]]]
                                 a data set on the hub, whose rows are read as those of a file
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs

from dynatree_bench.data.prompts import BUILT_IN
from dynatree_bench.data.synthetic import MarkovSource
from dynatree_core import InputError, LoadedModel
from dynatree_core.errors import nearest_match
from dynatree_core.files.folders import expanded
from dynatree_core.models.hub import unreachable_reason
from dynatree_core.text.columns import TEXT, Prompt
from dynatree_core.text.prompt import encode_messages, tokenizer_of
from dynatree_core.text.prompt_files import Prompts, prompts_of_rows, read_prompts
from dynatree_core.text.reading import STANDARD_INPUT, is_url
from dynatree_core.text.selection import of_categories, some_of
from dynatree_core.text.tables import rows_of_values

RANDOM_TOKENS = 64  # of a prompt without a language
MAX_ROWS = 5000  # that are read of a data set on the hub, which may have millions


@attrs.frozen
class Source:
    """Where a known benchmark is on the hub, and what its rows are."""

    path: str  # the data set's id
    config: str | None
    split: str
    column: str | None  # None: the first that holds prompts
    is_text: bool = False  # rows are pieces of running text, to be cut into passages; else each is a prompt
    files: str | None = None  # the address of a file that is read instead


# PG-19's own data set is a program, which `datasets` no longer runs: this is the same text as parquet files
KNOWN: dict[str, Source] = {
    "wikitext-2": Source("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text", is_text=True),
    "pg19": Source("emozilla/pg19", None, "test", "text", is_text=True),
    "spec-bench": Source(
        "hemingkx/Spec-Bench", None, "train", "turns",
        files="https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl",
    ),
    "humaneval": Source("openai/openai_humaneval", None, "test", "prompt"),
    "gsm8k": Source("openai/gsm8k", "main", "test", "question"),
}  # fmt: skip


@attrs.frozen
class Picks:
    """Which prompts of a workload are taken, and how they are read."""

    column: str | None = None
    categories: tuple[str, ...] = ()
    is_played: bool = False  # each turn of a conversation is a prompt
    seed: int | None = None  # takes them at random

    def settings(self) -> dict[str, Any]:
        """What a run's provenance says of them: those that are not the usual ones."""
        found = {
            "column": self.column, "categories": list(self.categories), "turns": self.is_played, "pick_seed": self.seed,
        }  # fmt: skip
        return {name: value for name, value in found.items() if value not in (None, [], False)}


@attrs.frozen
class Workload:
    """Prompts that belong together."""

    name: str
    prompts: tuple[Prompt, ...]
    is_chat: bool  # the prompts are requests to an assistant, not texts to go on with
    is_text: bool = False  # they are passages of one text, of which some are taken from all over it
    notes: tuple[str, ...] = ()  # what was left out and why


@attrs.frozen
class EncodedPrompt:
    """A prompt as a target sees it."""

    prompt_id: str
    category: str
    token_ids: tuple[int, ...]
    workload: str  # its workload's name


def load_workload(spec: str, num_prompts: int | None = None, picks: Picks | None = None) -> Workload:
    """The prompts that a string names.

    Args:
        spec: see the top of this file.
        num_prompts: how many, evenly over the categories or over the text; None: all.
        picks: which of them; None: any.

    Raises:
        InputError: nothing of that name, a file that cannot be read, or no connection to the hub; says what to do.
    """
    picks = picks or Picks()
    whole = _whole_workload(spec, picks)
    prompts = of_categories(whole.prompts, picks.categories, f"workload '{spec}'")
    return attrs.evolve(whole, prompts=some_of(prompts, num_prompts, is_text=whole.is_text, seed=picks.seed))


def _whole_workload(spec: str, picks: Picks) -> Workload:
    name, is_given, file = spec.partition("=")
    if is_given and name and "/" not in name and not Path(spec).exists():
        return _from_file(file, name, picks)
    if name.partition(":")[0] == "built-in":
        return _built_in(name)
    if name in KNOWN:
        local = os.environ.get(local_variable(name))
        return _from_file(local, name, picks) if local else _from_hub(name, KNOWN[name], picks)
    if spec == STANDARD_INPUT or is_url(spec) or expanded(spec).exists():
        return _from_file(spec, None, picks)
    if spec.count("/") != 1 or spec.startswith((".", "/", "~")):
        raise InputError(
            f"a workload must be a file, a data set on the hub (owner/name) or one of built-in, {', '.join(KNOWN)}, "
            f"got '{spec}'{nearest_match(spec, [*KNOWN, 'built-in'])}, which is none of them here"
        )
    path_on_hub, *rest = spec.split(":")
    config, split, column = (*rest, *("", "", "")[len(rest) :])
    source = Source(path_on_hub, config or None, split or "test", column or None, is_text=column == TEXT)
    return _from_hub(spec, source, picks)


def local_variable(name: str) -> str:
    """The environment variable that may name a local file of a known benchmark."""
    return "DYNATREE_BENCH_" + name.upper().replace("-", "_")


def _built_in(name: str) -> Workload:
    kind = name.partition(":")[2]
    if kind == "text":
        text = "\n\n".join(prompt for group in BUILT_IN.values() for prompt in group)
        # each passage is the whole text, which is short, from another place on
        starts = [i for i in range(len(text)) if text[i - 2 : i] == "\n\n"]
        passages = [text[start:] + "\n\n" + text[:start] for start in starts]
        prompts = [Prompt(f"{name}-{i:04d}", name, passage) for i, passage in enumerate(passages)]
        return Workload(name, tuple(prompts), is_chat=False)
    if kind and kind not in BUILT_IN:
        raise InputError(f"built-in prompts must be of kind {', '.join(BUILT_IN)} or text, got '{kind}'")
    prompts = [
        Prompt(f"{category}-{i}", category, text)
        for category, texts in BUILT_IN.items()
        if kind in ("", category)
        for i, text in enumerate(texts)
    ]
    return Workload(name, tuple(prompts), is_chat=True)


def _from_file(place: str, name: str | None, picks: Picks) -> Workload:
    source = KNOWN.get(name or "")
    is_text = source is not None and source.is_text
    read = read_prompts(place, name=name, column=picks.column, is_played=picks.is_played, is_joined=is_text)
    return _workload(read, place, is_chat=not (read.is_text or is_text))


def _workload(read: Prompts, where: str, *, is_chat: bool) -> Workload:
    first: dict[str, Prompt] = {}
    for prompt in read.prompts:
        before = first.setdefault(prompt.prompt_id, prompt)
        if before is not prompt:
            count = Counter(other.prompt_id for other in read.prompts)[prompt.prompt_id]
            raise InputError(
                f'{where}: each "id" must be there once, got {prompt.prompt_id!r} {count} times, first at '
                f"{before.where} and {prompt.where}"
            )
    return Workload(read.name, read.prompts, is_chat=is_chat, is_text=read.is_text, notes=read.notes)


def _from_hub(name: str, source: Source, picks: Picks) -> Workload:
    variable = local_variable(name)
    advice = (
        f"run it again with a connection, or with a local file: --workload {name}=FILE or {variable}=FILE"
        if name in KNOWN
        else "check the name and the connection, or give a local file: --workload FILE"
    )
    if source.files is not None:
        try:
            return _from_file(source.files, name, picks)
        except InputError as error:
            raise InputError(f"workload '{name}' cannot be read ({error}); {advice}") from error
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"workload '{name}' comes from the hub through datasets, which is not installed; run "
            f"pip install 'dynatree[bench]'; or {advice}"
        ) from error
    unreachable = unreachable_reason()
    if unreachable is not None:
        raise InputError(f"workload '{name}' cannot be read ({unreachable}); {advice}")
    try:
        # streaming reads what is needed only
        rows = iter(load_dataset(source.path, split=source.split, streaming=True, name=source.config))
        values = list(itertools.islice(rows, MAX_ROWS))
        has_more = next(rows, None) is not None
    except Exception as error:  # datasets, its file systems and HTTP client each have their own
        came = " ".join(str(error).split())[:160] or "no message"
        raise InputError(f"workload '{name}' cannot be read ({type(error).__name__}: {came}); {advice}") from error
    read = prompts_of_rows(
        rows_of_values(values, name), name, name, column=picks.column or source.column, is_played=picks.is_played,
        is_joined=source.is_text, is_lenient=True,
    )  # fmt: skip
    if not read.prompts:
        raise InputError(f"a workload must have at least one prompt, got none in {name}")
    if has_more:
        read = attrs.evolve(read, notes=(*read.notes, f"'{name}': the first {MAX_ROWS:,} rows are read, and no more"))
    return _workload(read, name, is_chat=not read.is_text)


def is_wrapped(workload: Workload, loaded: LoadedModel, is_chat: bool | None) -> bool:
    """Whether prompts go through the chat template: where there is one and the workload's are requests, or as asked.

    Raises:
        InputError: no tokenizer, or no chat template where one is asked for.
    """
    if loaded.tokenizer is None:
        raise InputError(f"the target must come with a tokenizer to read prompts, got none with '{loaded.name}'")
    has_template = loaded.tokenizer.chat_template is not None
    if is_chat and not has_template:
        raise InputError("--chat needs a target whose tokenizer has a chat template, got one without; use --raw")
    return has_template and workload.is_chat if is_chat is None else is_chat


def encode(
    workload: Workload, loaded: LoadedModel, *, is_chat: bool | None = None, num_tokens: int | None = None
) -> list[EncodedPrompt]:
    """A workload's prompts in the target's tokens.

    Args:
        workload: the prompts.
        loaded: the target, with its tokenizer.
        is_chat: wrap them in the chat template or not; None: where there is one and the workload's are requests.
        num_tokens: the first so many tokens of each; shorter prompts are left out. They stay raw text then.

    Raises:
        InputError: no tokenizer, no chat template where one is asked for, or no prompt that is long enough.
    """
    is_chat = is_wrapped(workload, loaded, False if is_chat is None and num_tokens is not None else is_chat)
    tokenizer = tokenizer_of(loaded)
    encoded = [
        EncodedPrompt(
            prompt.prompt_id, prompt.category,
            tuple(encode_messages(prompt.messages, tokenizer, is_chat)), workload.name,
        )
        for prompt in workload.prompts
    ]  # fmt: skip
    if num_tokens is None:
        return encoded
    long_enough = [
        attrs.evolve(p, token_ids=p.token_ids[:num_tokens]) for p in encoded if len(p.token_ids) >= num_tokens
    ]
    if not long_enough:
        longest = max(len(p.token_ids) for p in encoded)
        raise InputError(
            f"prompts cut to {num_tokens} tokens must have so many, but the longest of '{workload.name}' has "
            f"{longest}; give shorter lengths (--prompt-tokens) or a workload of longer texts"
        )
    return long_enough


def random_prompts(spec: str, num_prompts: int, num_tokens: int | None, vocab_size: int) -> list[EncodedPrompt]:
    """Prompts of random tokens, for models without a language; the same for the same arguments.

    Raises:
        InputError: the spec is not "random" or "random:SEED".
    """
    seed = spec.partition(":")[2] or "0"
    if not seed.isdecimal():
        raise InputError(f"random prompts are 'random' or 'random:SEED' with a number, got '{spec}'")
    num_tokens = RANDOM_TOKENS if num_tokens is None else num_tokens
    source = random.Random(int(seed))
    return [
        EncodedPrompt(f"{spec}-{i:04d}", "random", tuple(source.choices(range(vocab_size), k=num_tokens)), spec)
        for i in range(num_prompts)
    ]


def markov_prompts(source: MarkovSource, num_prompts: int, num_tokens: int | None) -> list[EncodedPrompt]:
    """Pieces of the text of a synthetic pair."""
    pieces = source.prompts(num_prompts, RANDOM_TOKENS if num_tokens is None else num_tokens)
    return [EncodedPrompt(f"markov-{i:04d}", "markov", tuple(piece), "markov") for i, piece in enumerate(pieces)]


def digest(prompts: Iterable[EncodedPrompt]) -> str:
    """SHA-256 of the prompts' names and tokens: what tells whether two runs had the same."""
    text = json.dumps([[prompt.prompt_id, prompt.token_ids] for prompt in prompts])
    return hashlib.sha256(text.encode()).hexdigest()
