"""What is generated from: prompts of a file, of a hub data set, of a known benchmark, or built in.

A workload is named by a string:

    built-in, built-in:KIND      a few prompts of dynatree_bench.prompts, or those of one kind
    built-in:text                the same as one running text
    wikitext-2, pg19, …          a known benchmark (KNOWN): from a local file, or else from the hub
    NAME=FILE                    a known benchmark from this file, or a file by a name of yours
    FILE.jsonl                   JSON lines with "prompt", and "category" and "id" if there are any
    FILE                         any other file or folder of text files: plain text, cut into passages
    random, random:SEED          random tokens, for models without a tokenizer
    markov                       the text of a synthetic pair
    OWNER/NAME[:CONFIG[:SPLIT[:COLUMN]]]
                                 a data set on the hub; a column "text" is running text, any other has a prompt a row;
                                 a row's "category" is its prompt's
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs

from dynatree_bench.prompts import BUILT_IN, read_objects
from dynatree_bench.synthetic import MarkovSource
from dynatree_core import InputError, LoadedModel, cli_models
from dynatree_core.errors import nearest_match

__all__ = [
    "KNOWN",
    "EncodedPrompt",
    "Prompt",
    "Workload",
    "digest",
    "encode",
    "load_workload",
    "local_variable",
    "markov_prompts",
    "random_prompts",
    "some_of",
]

PASSAGE_CHARS = 2000
RANDOM_TOKENS = 64  # of a prompt without a language
MAX_ROWS = 5000  # that are read of a data set on the hub, which may have millions


@attrs.frozen
class Source:
    """Where a known benchmark is on the hub, and what its rows are."""

    path: str  # the data set's id, or the name of a builder of `datasets`
    config: str | None
    split: str
    column: str
    is_text: bool = False  # rows are pieces of running text, to be cut into passages; else each is a prompt
    files: str | None = None  # for a builder: the file to read


# PG-19's own data set is a program, which `datasets` no longer runs: this is the same text as parquet files
KNOWN: dict[str, Source] = {
    "wikitext-2": Source("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text", is_text=True),
    "pg19": Source("emozilla/pg19", None, "test", "text", is_text=True),
    "spec-bench": Source(
        "json", None, "train", "turns",
        files="https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl",
    ),
    "humaneval": Source("openai/openai_humaneval", None, "test", "prompt"),
    "gsm8k": Source("openai/gsm8k", "main", "test", "question"),
}  # fmt: skip


@attrs.frozen
class Prompt:
    """A text to generate from."""

    prompt_id: str
    category: str
    text: str


@attrs.frozen
class Workload:
    """Prompts that belong together."""

    name: str
    prompts: tuple[Prompt, ...]
    is_chat: bool  # the prompts are requests to an assistant, not texts to go on with
    is_text: bool = False  # they are passages of one text, of which some are taken from all over it


@attrs.frozen
class EncodedPrompt:
    """A prompt as a target sees it."""

    prompt_id: str
    category: str
    token_ids: tuple[int, ...]
    workload: str  # its workload's name


Some = TypeVar("Some", Prompt, EncodedPrompt)


def load_workload(spec: str, num_prompts: int | None = None) -> Workload:
    """The prompts that a string names.

    Args:
        spec: see the top of this file.
        num_prompts: how many, evenly over the categories or over the text; None: all.

    Raises:
        InputError: nothing of that name, a file that cannot be read, or no connection to the hub; says what to do.
    """
    name, is_given, file = spec.partition("=")
    if is_given and name and "/" not in name and not Path(spec).exists():
        return _from_file(Path(file).expanduser(), num_prompts, name)
    if name.partition(":")[0] == "built-in":
        return _built_in(name, num_prompts)
    if name in KNOWN:
        local = os.environ.get(local_variable(name))
        if local:
            return _from_file(Path(local).expanduser(), num_prompts, name)
        return _from_hub(name, KNOWN[name], num_prompts)
    path = Path(spec).expanduser()
    if path.exists():
        return _from_file(path, num_prompts, path.stem)
    if spec.count("/") != 1 or spec.startswith((".", "/", "~")):
        raise InputError(
            f"a workload must be a file, a data set on the hub (owner/name) or one of built-in, {', '.join(KNOWN)}, "
            f"got '{spec}'{nearest_match(spec, [*KNOWN, 'built-in'])}, which is none of them here"
        )
    path_on_hub, *rest = spec.split(":")
    config, split, column = (*rest, *("", "", "")[len(rest) :])
    source = Source(path_on_hub, config or None, split or "test", column or "text", is_text=column in ("", "text"))
    return _from_hub(spec, source, num_prompts)


def local_variable(name: str) -> str:
    """The environment variable that may name a local file of a known benchmark."""
    return "DYNATREE_BENCH_" + name.upper().replace("-", "_")


def _built_in(name: str, num_prompts: int | None) -> Workload:
    kind = name.partition(":")[2]
    if kind == "text":
        text = "\n\n".join(prompt for group in BUILT_IN.values() for prompt in group)
        # each passage is the whole text, which is short, from another place on
        starts = [i for i in range(len(text)) if text[i - 2 : i] == "\n\n"]
        passages = [text[start:] + "\n\n" + text[:start] for start in starts]
        return Workload(name, _numbered(name, passages[:num_prompts]), is_chat=False)
    if kind and kind not in BUILT_IN:
        raise InputError(f"built-in prompts must be of kind {', '.join(BUILT_IN)} or text, got '{kind}'")
    prompts = [
        Prompt(f"{category}-{i}", category, text)
        for category, texts in BUILT_IN.items()
        if kind in ("", category)
        for i, text in enumerate(texts)
    ]
    return Workload(name, _evenly(prompts, num_prompts), is_chat=True)


def _from_file(path: Path, num_prompts: int | None, name: str) -> Workload:
    source = KNOWN.get(name)
    if path.suffix == ".jsonl":
        prompts = [
            Prompt(str(record.get("id", f"{name}-{i:04d}")), str(record.get("category", name)), record["prompt"])
            for i, record in enumerate(read_objects(path, "prompt"))
        ]
        counts = Counter(prompt.prompt_id for prompt in prompts)
        if twice := [prompt_id for prompt_id, count in counts.items() if count > 1]:
            raise InputError(f'{path}: each "id" must be there once, got {twice[0]!r} {counts[twice[0]]} times')
        return Workload(
            name, _some(_evenly(prompts, num_prompts), str(path)), is_chat=source is None or not source.is_text
        )
    try:
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"a workload must be a .jsonl file or UTF-8 text, cannot read {path}: {error}") from error
    passages = _some(_numbered(name, _passages(text, num_prompts)), str(path))
    return Workload(name, passages, is_chat=False, is_text=True)


def _from_hub(name: str, source: Source, num_prompts: int | None) -> Workload:
    variable = local_variable(name)
    advice = (
        f"run it again with a connection, or with a local file: --workload {name}=FILE or {variable}=FILE, "
        'where FILE is text or JSON lines with "prompt"'
        if name in KNOWN
        else "check the name and the connection, or give a local file: --workload FILE"
    )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"workload '{name}' comes from the hub through datasets, which is not installed; run "
            f"pip install 'dynatree[bench]'; or {advice}"
        ) from error
    options = {"data_files": source.files} if source.files else {"name": source.config}
    try:
        rows = load_dataset(source.path, split=source.split, streaming=True, **options)  # reads what is needed only
        read = [
            (_text_of(row, source.column), str(row.get("category") or name)) for row in itertools.islice(rows, MAX_ROWS)
        ]
    except KeyError as error:
        raise InputError(
            f"workload '{name}': the data set has no column {error}; name it: OWNER/NAME:CONFIG:SPLIT:COLUMN"
        ) from error
    except Exception as error:  # datasets, its file systems and HTTP client each have their own
        came = " ".join(str(error).split())[:160] or "no message"
        raise InputError(f"workload '{name}' cannot be read ({type(error).__name__}: {came}); {advice}") from error
    if source.is_text:
        text = "".join(piece for piece, _ in read)
        passages = _some(_numbered(name, _passages(text, num_prompts)), name)
        return Workload(name, passages, is_chat=False, is_text=True)
    prompts = [Prompt(f"{name}-{i:04d}", category, text) for i, (text, category) in enumerate(read) if text.strip()]
    return Workload(name, _some(_evenly(prompts, num_prompts), name), is_chat=True)


def _text_of(row: dict[str, Any], column: str) -> str:
    """A row's prompt; of a conversation the first turn."""
    value = row[column]
    return str(value[0] if isinstance(value, list) else value)


def _some(prompts: tuple[Prompt, ...], where: str) -> tuple[Prompt, ...]:
    if not prompts:
        raise InputError(f"a workload must have at least one prompt, got none in {where}")
    return prompts


def _numbered(name: str, texts: Iterable[str]) -> tuple[Prompt, ...]:
    return tuple(Prompt(f"{name}-{i:04d}", name, text) for i, text in enumerate(texts))


def some_of(prompts: Sequence[Some], num_prompts: int, *, is_text: bool) -> tuple[Some, ...]:
    """So many of a workload's prompts, or all where there are no more: over its text, or the categories in turn."""
    return tuple(_spread(prompts, num_prompts)) if is_text else _evenly(prompts, num_prompts)


def _evenly(prompts: Sequence[Some], num_prompts: int | None) -> tuple[Some, ...]:
    """So many prompts, the categories in turn."""
    by_category: defaultdict[str, list[Some]] = defaultdict(list)
    for prompt in prompts:
        by_category[prompt.category].append(prompt)
    rounds = itertools.zip_longest(*by_category.values())
    return tuple(itertools.islice((p for turn in rounds for p in turn if p is not None), num_prompts))


def _passages(text: str, num_passages: int | None) -> list[str]:
    """So many pieces of PASSAGE_CHARS characters, spread over the text; each begins with a paragraph."""
    return _spread(list(_cut(text)), num_passages)


def _spread(passages: Sequence[Any], num_passages: int | None) -> list[Any]:
    if num_passages is None or num_passages >= len(passages):
        return list(passages)
    return [passages[i * len(passages) // num_passages] for i in range(num_passages)]


def _cut(text: str) -> Iterator[str]:
    """Consecutive passages; a last one that is too short is left out, unless it is the only one."""
    paragraphs = [paragraph for paragraph in text.split("\n") if paragraph.strip()]
    passage, is_first = "", True
    for paragraph in paragraphs:
        passage += ("\n" if passage else "") + paragraph.strip()
        if len(passage) >= PASSAGE_CHARS:
            yield passage[:PASSAGE_CHARS]
            passage, is_first = "", False
    if passage and is_first:
        yield passage


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
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise InputError(f"the target must come with a tokenizer to read prompts, got none with '{loaded.name}'")
    has_template = tokenizer.chat_template is not None
    if is_chat and not has_template:
        raise InputError("--chat needs a target whose tokenizer has a chat template, got one without; use --raw")
    if is_chat is None:
        is_chat = has_template and workload.is_chat and num_tokens is None
    encoded = []
    for prompt in workload.prompts:
        if is_chat:
            ids = cli_models.chat_ids([{"role": "user", "content": prompt.text}], tokenizer)
        else:
            ids = tokenizer(prompt.text).input_ids
        encoded.append(EncodedPrompt(prompt.prompt_id, prompt.category, tuple(ids), workload.name))
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
