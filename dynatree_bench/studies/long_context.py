"""Does decoding slow down over the context more than attention itself does, and what do sinks and a window save?

Question: time of a pass, time per token and memory of the cache from a short context up to the default model's limit:
passes of DynaTree's runners beside the same model's bare forward pass over the same slots, autoregressive decoding
beside trees with `prompt_lookup`, a cache of all tokens beside `sinks=4,window=1024`.

Method: one long text, the source of Python's own argparse. Caches are filled with it from context to context, and
everything is measured at each: passes of 1 and of 8 rows, then a few tokens by every way of decoding. All of it takes
turns, in rotating order, several times over in one process, at each context after a warm-up of all of it; medians are
shown, with quartiles. Memory is that of the rows that were written: what is allocated and never touched takes none.

Output: tables of passes, decoding and memory over the context, and a figure.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dynatree_bench.report.series import Panel, lines_of
from dynatree_bench.report.tables import Spread, Table, simple
from dynatree_bench.run.passes import pass_seconds
from dynatree_bench.run.progress import Job, in_rounds
from dynatree_bench.studies.study import Asked, Study
from dynatree_core import InputError, LoadedModel, generate, load_model
from dynatree_core.cache.prefix_cache import PrefixCache
from dynatree_core.cache.sink_cache import SinkCache, SinkWindow
from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.clock import StageClock
from dynatree_core.models.architectures import cache_argument
from dynatree_core.runners.choice import made_runner
from dynatree_core.runners.packed import can_pack
from dynatree_core.runners.passes import Passes
from dynatree_core.text.prompt import tokenizer_of

DRAFTER = "prompt_lookup"
TREE_POLICY = "phase3"
ALL, WINDOW = "all tokens", "sinks=4,window=1024"  # what a cache keeps
ROWS = (1, 8)
CONTEXTS, QUICK_CONTEXTS = (512, 1024, 2048, 4096, 6144), (64, 256)  # and the model's limit
# what is measured, each: series -> tokens of context -> numbers
TITLES = {
    "passes": ("ms per pass", 0),
    "tokens": (f"ms per token, drafter {DRAFTER}", 0),
    "accepted": ("tokens per iteration", 2),
    "overhead": ("ms of an iteration outside the model", 1),
    "memory": ("MiB of keys and values", 0),
}
Found = dict[str, dict[str, dict[str, list[float]]]]


def measure(asked: Asked) -> dict[str, Any]:
    """{"passes": ms, "tokens": ms per token, "accepted": tokens per iteration, "overhead": ms, "memory": MiB}"""
    default = load_model(asked.models.target, device="cpu", dtype="float32")
    limit: int = default.model.config.max_position_embeddings
    new_tokens = asked.new_tokens(full=16, quick=4)
    usual = QUICK_CONTEXTS if asked.is_quick else (*CONTEXTS, limit)
    contexts = within(sorted(set(asked.prompt_tokens)) or usual, limit - new_tokens)
    rounds = asked.rounds(full=3, quick=1)
    text = text_ids(default, contexts[-1])
    caches = Caches(default, contexts[-1] + max(ROWS))
    found: Found = {name: defaultdict(lambda: defaultdict(list)) for name in TITLES}
    for context in contexts:
        caches.fill(text[: context - 1])
        for kept, mebibytes in caches.held().items():
            found["memory"][kept][str(context)].append(mebibytes)
        in_rounds(_jobs(default, caches, text[:context], new_tokens, found), rounds)
    plan = {"contexts": contexts, "rounds": rounds, "max_new_tokens": new_tokens}
    return {"provenance": {"model": default.name, "dtype": "float32", "plan": plan}, **found}


def within(contexts: Sequence[int], longest: int) -> tuple[int, ...]:
    """Contexts behind which there is room to generate, each once.

    Raises:
        InputError: there is no such room.
    """
    if longest < 2:
        raise InputError(f"--max-new-tokens must leave 2 tokens of the context at least, got one that leaves {longest}")
    return tuple(dict.fromkeys(min(context, longest) for context in contexts))


def text_ids(default: LoadedModel, length: int) -> list[int]:
    """So many tokens of a text that is on every machine, repeated if it should not do."""
    source = Path(argparse.__file__).read_text(encoding="utf-8")[: 8 * length]
    ids: list[int] = tokenizer_of(default)(source, verbose=False).input_ids
    return (ids * (length // len(ids) + 1))[:length]


class Caches:
    """The caches that are measured, all with the rows of the same text."""

    def __init__(self, default: LoadedModel, capacity: int) -> None:
        option = SinkWindow.parse(WINDOW)
        assert option is not None, "a window is named"
        self.model: Any = default.model
        clock = StageClock(torch.device("cpu"))
        names = ["eager", *(["packed"] if can_pack(self.model) else [])]
        self.runners = {name: Passes(made_runner(self.model, name), clock) for name in names}
        self.kept = {ALL: TreeCache(capacity), WINDOW: SinkCache(self.model, option, max_nodes=max(ROWS))}
        self.bare = TreeCache(capacity)  # of passes without a mask: no runner has prepared it for one

    @torch.inference_mode()
    def fill(self, ids: Sequence[int]) -> None:
        """Go on with a text up to there."""
        self.runners["eager"].prefill(torch.tensor(ids[self.kept[ALL].length :]), self.kept[ALL])
        self.runners["eager"].prefill(torch.tensor(ids[self.kept[WINDOW].length :]), self.kept[WINDOW])
        self.bare.load(*self.kept[ALL].copied(), self.kept[ALL].length)

    def held(self) -> dict[str, float]:
        """MiB of the rows that each has written so far; one that moves writes each of its rows at most."""
        row_bytes = self.kept[ALL].row_bytes
        return {kept: min(cache.length, cache.capacity) * row_bytes / 2**20 for kept, cache in self.kept.items()}

    @torch.inference_mode()
    def bare_pass(self, rows: int) -> float:
        """Seconds of the model's forward pass as anyone calls it: no mask and no tree, over the same rows."""
        positions = torch.arange(self.bare.length, self.bare.length + rows)[None]
        start = time.perf_counter()
        self.model(
            input_ids=torch.zeros_like(positions), position_ids=positions, **{cache_argument(self.model): self.bare}
        )
        seconds = time.perf_counter() - start
        self.bare.rollback()
        return seconds


def _jobs(default: LoadedModel, caches: Caches, text: list[int], new_tokens: int, found: Found) -> list[Job]:
    """What there is to measure at one context; each job adds one number to its series."""
    context, kept = str(len(text)), PrefixCache()

    def add(name: str, series: str, turn: int, value: float) -> None:
        values = found[name][series][context]
        if turn:
            values.append(value)

    def bare(rows: int, turn: int) -> None:
        add("passes", _rows(rows, "model alone"), turn, 1000 * caches.bare_pass(rows))

    def ours(rows: int, runner: str, cache: str, turn: int) -> None:
        series = _rows(rows, runner if cache == ALL else f"{runner}, {cache}")
        add("passes", series, turn, 1000 * pass_seconds(caches.runners[runner], caches.kept[cache], rows))

    def decode(policy: str, cache: str, turn: int) -> None:
        drafter = None if policy == "autoregressive" else DRAFTER
        report = generate(
            default.model, drafter, text, policy=policy, cache=None if cache == ALL else cache, prefix_cache=kept,
            max_new_tokens=new_tokens, eos_token_id=[], inherit_settings=False,
        ).report  # fmt: skip
        series = policy if cache == ALL else f"{policy}, {cache}"
        add("tokens", series, turn, 1000 * report.decode_seconds / report.num_new_tokens)
        add("overhead", series, turn, 1000 * report.overhead_seconds / report.num_iterations)
        add("accepted", series, turn, report.num_new_tokens / report.num_iterations)

    jobs: list[Job] = []
    for rows in ROWS:
        jobs += [functools.partial(bare, rows), *(functools.partial(ours, rows, name, ALL) for name in caches.runners)]
    jobs.append(functools.partial(ours, max(ROWS), list(caches.runners)[-1], WINDOW))
    return jobs + [
        functools.partial(decode, policy, cache)
        for cache in (ALL, WINDOW)
        for policy in ("autoregressive", TREE_POLICY)
    ]


def _rows(rows: int, what: str) -> str:
    return f"{rows} row{'s' if rows > 1 else ''}, {what}"


def tables(found: Mapping[str, Any]) -> Sequence[Table | None]:
    made = []
    for name, (title, digits) in TITLES.items():
        contexts = list(next(iter(found[name].values())))
        rows = [
            (series, *(Spread.of(values, digits=digits) for values in by_context.values()))
            for series, by_context in found[name].items()
        ]
        made.append(simple(name, title, "", ("tokens of context", *contexts), rows))
    return made


def panels(found: Mapping[str, Any]) -> Sequence[Panel]:
    titles = {"passes": "One verification pass", "tokens": f"Decoding, drafter {DRAFTER}", "memory": "Cache"}
    return [Panel(title, "context (tokens)", TITLES[name][0], lines_of(found[name])) for name, title in titles.items()]


STUDY = Study(("target", "prompt_tokens", "max_new_tokens", "repeats"), measure, tables, panels)
