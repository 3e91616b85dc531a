"""Ways to generate: our policies on our runtime, transformers' own, and those of other packages; each gives an Output.

Everybody decodes greedily, with the same end tokens and nothing else of the models' generation configs.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import attrs
import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from dynatree_bench.run import rivals
from dynatree_bench.run.experiments import COMPILED, Cell
from dynatree_bench.run.machine import now
from dynatree_bench.run.pairs import MethodError, Pair
from dynatree_bench.run.records import Replay, Steps, Trials
from dynatree_core import DraftPlan, GenerationReport, Session, StepReport, TokenTree, run
from dynatree_core.clock import StageClock
from dynatree_core.models.architectures import vocab_size
from dynatree_core.models.kept import kept_of
from dynatree_core.models.state import without_gradients
from dynatree_core.tree.frontier import Proposals

MAX_BRANCH = 16  # proposals that a replay looks at, the default of a session
DIGITS = 6  # of a probability in the results


@attrs.frozen(eq=False)
class Output:
    """What a method made of a prompt, and how long it took."""

    token_ids: tuple[int, ...]
    stop_reason: str
    prefill_seconds: float
    decode_seconds: float
    total_seconds: float
    report: GenerationReport | None = None  # of our own runtime
    steps: Steps | None = None
    trials: Trials | None = None
    cache_sha256: str | None = None


def decode(pair: Pair, cell: Cell, prompt_ids: Sequence[int], eos: Sequence[int]) -> Output:
    """Generate greedily by one method.

    Args:
        pair: the models.
        cell: the method and its point on the axes, which say how many tokens there are to be at most.
        prompt_ids: the prompt.
        eos: tokens that end the text; empty: none does.

    Raises:
        MethodError: the method cannot run on this pair.
        Exception: whatever a method raises, most of which is others' code.
    """
    return _DECODERS[cell.method.kind](pair.drafting_with(cell.method.drafter), cell, prompt_ids, eos)


def _by_dynatree(pair: Pair, cell: Cell, prompt_ids: Sequence[int], eos: Sequence[int]) -> Output:
    is_drafting = cell.method.is_drafting
    begin = _now(pair)
    session = Session(
        pair.target.model,
        pair.drafter if is_drafting else None,
        list(prompt_ids),
        policy=cell.policy,
        max_new_tokens=cell.max_new_tokens,
        eos_token_id=list(eos),
        inherit_settings=False,
        tokenizer=pair.target.tokenizer,
        observer=None if pair.trace is None else pair.trace.observer(),
        trust_model=pair.is_trusted,
        **cell.method.options,
    )
    reports = list(run(session))
    total = _now(pair) - begin
    result = session.result()
    columns = zip(*(attrs.astuple(step) for step in result.report.steps), strict=True)
    return Output(
        token_ids=tuple(result.token_ids),
        stop_reason=result.stop_reason,
        prefill_seconds=result.report.prefill_seconds,
        decode_seconds=result.report.decode_seconds,
        total_seconds=total,
        report=result.report,
        steps=Steps(*columns) if result.report.steps else None,
        trials=_trials(reports) if is_drafting else None,
        cache_sha256=_cache_sha256(session.cache, len(prompt_ids) + len(result.token_ids) - 1)
        if cell.method.is_bitwise
        else None,
    )


def _cache_sha256(cache: Any, num_rows: int) -> str:
    """Of the keys and values of a text's rows, in the order of the layers."""
    digest = hashlib.sha256()
    for buffer in (*cache.keys, *cache.values):  # each [1, heads, slots, dim]
        digest.update(buffer[:, :, :num_rows].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _trials(reports: Sequence[StepReport]) -> Trials:
    """Each drafted node whose parent was accepted, except below a token with which the generation stopped."""
    rows = []
    for report in reports:
        tree, path = report.tree, report.verdict.path
        is_cut = path and len(report.token_ids) == len(path)  # nobody asked what follows the last node
        judged, accepted = {0, *path[: -1 if is_cut else None]}, set(path)
        numbers = torch.stack([tree.parent, tree.depth, tree.rank]).tolist()
        columns = zip(*numbers, tree.logprob.exp().tolist(), strict=True)
        for node, (parent, depth, rank, probability) in enumerate(columns):
            if node and parent in judged:
                rows.append((depth, rank, round(probability, DIGITS), node in accepted))
    return Trials(*zip(*rows, strict=True)) if rows else Trials((), (), (), ())


def replay(pair: Pair, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> Replay:
    """What the drafter thinks of each token of an output, given the text before it.

    A union may leave out a drafter at one level and ask it at another: a token has the best rank that it could have.
    """
    ids = torch.tensor([*prompt_ids, *token_ids], device=pair.target.model.device)
    vocab = vocab_size(pair.target.model)
    target = pair.target
    plan = DraftPlan(
        vocab,
        ids.numel(),
        MAX_BRANCH,
        ids.device,
        StageClock(ids.device),
        target.model,
        tokenizer=target.tokenizer,
        store=kept_of(target.model),
    )
    state = pair.drafter.begin(plan)
    ranks, probabilities = [], []
    with without_gradients(target.model, *pair.drafter.models(target.model)):
        state.prefill(ids[: len(prompt_ids) - 1])
        for i, token in enumerate(token_ids, start=len(prompt_ids)):
            root = TokenTree.root(ids[i - 1 : i].clone())
            possible = state.possible_proposals(ids[:i], root, min(MAX_BRANCH, vocab))
            state.commit(())
            rank, probability = min((_place(proposals, token) for proposals in possible), key=lambda place: place[0])
            ranks.append(rank if probability > 0 else -1)
            probabilities.append(round(probability, DIGITS))
    return Replay(tuple(ranks), tuple(probabilities))


def _place(proposals: Proposals, token: int) -> tuple[int, float]:
    """A token's rank among what is proposed at a root, behind all of it where it is not, and its probability."""
    probs = torch.where(proposals.token_ids[0] == token, proposals.logprobs[0].exp(), 0.0)
    probability, rank = probs.max(dim=0)
    return (int(rank), float(probability)) if probability > 0 else (probs.numel(), 0.0)


def _by_transformers(pair: Pair, cell: Cell, prompt_ids: Sequence[int], eos: Sequence[int]) -> Output:
    model, options = pair.target.model, dict(cell.method.options)
    settings = options.pop("assistant", None)
    assistant = pair.drafter_model if settings is not None else None
    if settings is not None and assistant is None:
        raise MethodError(f"needs a drafter that is a plain transformers model, got {pair.drafter}")
    config = greedy_config(max_new_tokens=cell.max_new_tokens, eos_token_id=list(eos) or None, **options)
    if cell.method.name == COMPILED:
        config.compile_config = CompileConfig()
        config.compile_config._compile_all_devices = True  # else on a GPU only
    input_ids = torch.tensor([list(prompt_ids)], device=model.device)
    chunks = Chunks()
    # generate() moves settings of an assistant's while it runs, and keeps a compiled model on the target
    plain = kept_of(model).setdefault("transformers' generate", with_settings(model, greedy_config()))
    if assistant is not None:
        assistant = with_settings(assistant, greedy_config(**(settings or {})))
    # a hook would get in the way of a compiled model; without drafting each pass has one row
    is_drafting = assistant is not None or "prompt_lookup_num_tokens" in options
    with _counted_rows(model) if is_drafting else nullcontext() as rows:
        begin = _now(pair)
        output = plain.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            streamer=chunks,
            assistant_model=assistant,
        )
        end = _now(pair)
    token_ids = tuple(output[0, len(prompt_ids) :].tolist())
    prefill, decoding = _split(end - begin, chunks.seconds[1] - begin, chunks.sizes[1], len(token_ids))
    return Output(
        token_ids, _reason(token_ids, eos), prefill, decoding, end - begin,
        steps=_steps(chunks.sizes[1:], rows, len(prompt_ids)),
    )  # fmt: skip


def greedy_config(**options: Any) -> GenerationConfig:
    """Greedy decoding, and else what is named alone."""
    make: Any = GenerationConfig
    return cast(GenerationConfig, make(do_sample=False, pad_token_id=0, **options))


def with_settings(model: PreTrainedModel, config: GenerationConfig) -> Any:
    """A second model object around the same modules: its generate() fills what a call leaves open from this config."""
    twin = copy.copy(model)
    twin.generation_config = config
    return twin


@contextmanager
def _counted_rows(model: PreTrainedModel) -> Iterator[list[int]]:
    """The number of rows of each forward pass of the block."""
    rows: list[int] = []

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append(int((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1]))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


class Chunks(BaseStreamer):
    """When tokens came, and how many at a time; the first is the prompt."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.sizes: list[int] = []

    def put(self, value: Tensor) -> None:
        self.seconds.append(time.perf_counter())
        self.sizes.append(value.numel())

    def end(self) -> None:
        pass


def _split(total: float, first_seconds: float, num_first: int, num_tokens: int) -> tuple[float, float]:
    """Seconds of prefill and of decoding, where the first tokens come out of the pass over the prompt.

    Our own prefill leaves the first token to a decode step. So that tokens per second compare, decoding is what all
    tokens would take at the pace of those that came after the first ones; the rest is the prefill. Where all came at
    once, their pace is not known, and no time is counted as decoding.
    """
    if num_tokens <= num_first:
        return total, 0.0
    decoding = min((total - first_seconds) * num_tokens / (num_tokens - num_first), total)
    return total - decoding, decoding


def _steps(committed: Sequence[int], rows: list[int] | None, num_prompt_tokens: int) -> Steps | None:
    """Steps of a chain, from the tokens that each committed and from the rows of each pass of the target.

    None where they do not belong together, as when the target drafts for itself.
    """
    if rows is None:
        drafted = [0] * len(committed)
    elif len(rows) == len(committed) and rows:
        drafted = [rows[0] - num_prompt_tokens, *(count - 1 for count in rows[1:])]
    else:
        return None
    accepted = [count - 1 for count in committed]
    if any(not 0 <= a <= d for a, d in zip(accepted, drafted, strict=True)):
        return None
    return Steps(tuple(drafted), tuple(drafted), tuple(accepted), tuple(committed))


def _by_rival(pair: Pair, cell: Cell, prompt_ids: Sequence[int], eos: Sequence[int]) -> Output:
    """They do not tell when the first token came, so it is generated alone before, which shows what it takes."""
    generate = rivals.engine(cell.method.name, pair)
    seconds: list[float] = []
    for limit in (1, cell.max_new_tokens):
        begin = _now(pair)
        token_ids = tuple(generate(prompt_ids, limit, eos))
        seconds.append(_now(pair) - begin)
    prefill, decoding = _split(seconds[1], seconds[0], 1, len(token_ids))
    return Output(token_ids, _reason(token_ids, eos), prefill, decoding, seconds[1])


def _reason(token_ids: Sequence[int], eos: Sequence[int]) -> str:
    return "eos" if token_ids and token_ids[-1] in eos else "length"


def _now(pair: Pair) -> float:
    return now(pair.target.model.device)


_DECODERS = {"dynatree": _by_dynatree, "hf": _by_transformers, "rival": _by_rival}
