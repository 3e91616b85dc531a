"""What do several sequences at once bring, and up to how many of them do trees pay?

Question: tokens per second in total and of one sequence, with 1, 2, 4, 8 and 16 sequences at once: our own plain
decoding, policies, and transformers' two ways, `generate` on a batch padded at the left and its continuous batching.

Method: as a server does it. Four times as many prompts as lanes are submitted at once, those that find no free lane
wait in a line, and tokens are counted while all lanes are full: from where the first prompt is done to where a lane
stays empty. Prefill is included, of prompts that come when a lane is free. A batch that begins and ends together would
last as long as its slowest sequence: what the others gain by trees would not show. How fast it was from the first
prompt's submission to the last token is told beside it, and in which share of that time lanes were empty. `generate`
takes the same prompts in batches, one after the other. All methods and sizes take turns, in rotating order, several
times over in one process after a warm-up of all of it; medians are shown, with quartiles. The whole of continuous
batching is timed from where its first request runs, so that the start of its thread and the allocation of its cache,
which a server pays once, do not count. Every output is compared with plain decoding of its prompt alone. What the host
does besides is a step of the engine less the passes of both models, in steps in which nobody's prompt is filled in.

Output: tables of speed, speed relative to our plain decoding, trees, host time, rows that were computed for nothing,
and the pause of running sequences while a long prompt is filled in; a figure.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from dynatree_bench.report.series import Panel, lines_of
from dynatree_bench.report.tables import Spread, Table, simple
from dynatree_bench.run.machine import now
from dynatree_bench.run.methods import greedy_config, with_settings
from dynatree_bench.run.pairs import Pair
from dynatree_bench.run.progress import Job, in_rounds
from dynatree_bench.studies.study import Asked, Study
from dynatree_core import Engine, generate
from dynatree_core.models.architectures import max_positions
from dynatree_core.runners.around import RunnerAround
from dynatree_core.runners.base import Rows, Runner
from dynatree_core.runners.choice import made_runner
from dynatree_core.runners.eager import EagerRunner

PLAIN = "autoregressive"
POLICIES = (PLAIN, "phase3", "cost_aware", "phase3+governor")
PADDED, CONTINUOUS = "hf generate, padded", "hf continuous batching"
SIZES, QUICK_SIZES = (1, 2, 4, 8, 16), (1, 2)
LINE = 4  # prompts for each lane
NUM_PROMPTS = 16
WARM_UP_TOKENS = 3
LONG_TOKENS, PAUSED = 2048, 4  # of the prompt that comes between, and sequences that run meanwhile
PAGE = 256  # tokens of a block of continuous batching's cache, its own default

Numbers = dict[str, dict[str, list[float]]]  # method -> size -> one of each round


def measure(asked: Asked) -> dict[str, Any]:
    """{"total", "each": tokens/s, "host": ms, …: method -> size -> numbers; "pause", "same", "errors"}"""
    pair = asked.load()
    new_tokens = asked.new_tokens(full=64, quick=6)
    sizes = sorted(set(asked.batch_sizes)) or list(QUICK_SIZES if asked.is_quick else SIZES)
    by_category = asked.prompts(pair, full=NUM_PROMPTS, quick=4, max_text_tokens=256)
    in_turn = itertools.chain(*itertools.zip_longest(*by_category.values()))
    bench = Batches(pair, [prompt for prompt in in_turn if prompt is not None], new_tokens)
    methods = {policy: functools.partial(bench.ours, policy) for policy in asked.policies or POLICIES}
    methods = {
        PLAIN: functools.partial(bench.ours, PLAIN),
        **methods,
        PADDED: bench.padded,
        CONTINUOUS: bench.continuous,
    }
    jobs = [_job(bench, name, method, size) for (name, method), size in itertools.product(methods.items(), sizes)]
    rounds = asked.rounds(full=5, quick=1)
    in_rounds(jobs, rounds)
    limit = max_positions(pair.target.model)
    wanted = max(asked.prompt_tokens, default=64 if asked.is_quick else LONG_TOKENS)
    long_tokens = wanted if limit is None else min(wanted, limit - new_tokens - 1)
    said = {
        **pair.said(),
        "max_new_tokens": new_tokens,
        "sizes": sizes,
        "rounds": rounds,
        "num_prompts": len(bench.prompts),
    }
    return {"provenance": said, **bench.found, "pause": bench.pause(long_tokens)}


@attrs.frozen(eq=False)
class Batch:
    """What became of some prompts."""

    outputs: Sequence[Sequence[int]]  # new tokens of each
    seconds: float  # from the first to the last
    each: Sequence[float] = ()  # tokens/s of each sequence from where it began to run
    numbers: Mapping[str, float | None] = attrs.field(factory=dict)  # more of it, by name


Method = Callable[[Sequence[Sequence[int]], int, int], Batch]  # prompts, how many at once, new tokens of each


def while_full(
    size: int, begin: float, ends: Sequence[float], token_times: Iterable[Sequence[float]]
) -> dict[str, float | None]:
    """Tokens/s while so many lanes are full, and the share of the whole time in which they are not.

    Counted from where the first sequence is done: others are on their way then as they are when the line is empty.

    Args:
        begin: when the first one was submitted.
        ends: when each was done.
        token_times: of each sequence, when its tokens came.
    """
    in_order = sorted(ends)
    first, last = in_order[0], in_order[len(ends) - size]  # so many less one are still running then
    num_tokens = sum(first < at <= last for times in token_times for at in times)
    return {"total": num_tokens / (last - first), "partly": (in_order[-1] - last) / (in_order[-1] - begin)}


@attrs.define
class Meter:
    """What the passes of an engine take, and the rows of the target's."""

    target: nn.Module
    counter: Counter
    seconds: float = 0.0
    num_rows: int = 0  # that were asked for
    num_computed: int = 0  # with those of padding; 0 where they are not counted

    def runner(self, model: nn.Module, name: str) -> Runner:
        """A model's runner that is measured."""
        made = made_runner(model, name)
        # other runners refuse a model with a hook, and pad nothing but, with `packed`, some families
        counted = model if made.name == EagerRunner.name else None
        return RunnerAround(made, functools.partial(self.measured, model is self.target, counted))

    @contextmanager
    def measured(
        self, is_target: bool, counted: nn.Module | None, parts: Sequence[Rows], is_prompt: bool
    ) -> Iterator[None]:
        """Around a pass: keep its time, and the rows of the target's."""
        before, begin = self.counter.num_rows, time.perf_counter()
        try:
            with nullcontext() if counted is None else self.counter.counting(counted):
                yield
        finally:
            self.seconds += time.perf_counter() - begin
            if is_target:
                self.num_rows += sum(part.flat.num_rows for part in parts)
                self.num_computed += self.counter.num_rows - before


@attrs.define
class Counter:
    """Rows that have gone through an embedding."""

    num_rows: int = 0

    @contextmanager
    def counting(self, model: nn.Module) -> Iterator[None]:
        """Count those of a model meanwhile."""

        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.num_rows += args[0].numel()

        handle = cast(Any, model).get_input_embeddings().register_forward_pre_hook(note)
        try:
            yield
        finally:
            handle.remove()


class Batches:
    """The models, the prompts, and what was found about batches of them.

    Args:
        pair: the models.
        prompts: in the target's tokens; they are taken again where a batch is larger.
        new_tokens: of an output at most.
    """

    def __init__(self, pair: Pair, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        self.pair = pair
        self.prompts = [list(prompt) for prompt in prompts]
        self.new_tokens = new_tokens
        self.found: dict[str, Any] = {
            **{name: defaultdict(lambda: defaultdict(list)) for name in ("total", "each", *MORE)},
            "same": defaultdict(lambda: [0, 0]),  # method -> outputs that are plain decoding's, and all
            "errors": {},
        }
        self._counter = Counter()
        self._engines: dict[tuple[str, int], tuple[Engine, Meter]] = {}
        self._plain: dict[tuple[int, ...], list[int]] = {}

    def line(self, size: int) -> list[list[int]]:
        """The prompts that a round decodes with so many lanes."""
        return list(itertools.islice(itertools.cycle(self.prompts), LINE * size))

    def plain(self, prompt: Sequence[int]) -> list[int]:
        """What plain decoding makes of a prompt alone."""
        key = tuple(prompt)
        if key not in self._plain:
            result = generate(
                self.pair.target.model, None, list(prompt), policy=PLAIN, max_new_tokens=self.new_tokens,
                eos_token_id=self.pair.end_token_ids, inherit_settings=False,
            )  # fmt: skip
            self._plain[key] = result.token_ids
        return self._plain[key]

    def note(self, name: str, size: int, prompts: Sequence[Sequence[int]], found: Batch) -> None:
        """Keep what one method did with the prompts of one size in a round."""
        whole = sum(map(len, found.outputs)) / found.seconds
        numbers: dict[str, float | None] = {
            "total": whole,  # unless lanes were empty in the end
            "whole": whole,
            "each": statistics.fmean(found.each),
            **found.numbers,
        }
        for key, value in numbers.items():
            if value is not None:
                self.found[key][name][str(size)].append(value)
        same = self.found["same"][name]
        for prompt, output in zip(prompts, found.outputs, strict=True):
            same[0] += list(output) == self.plain(prompt)
            same[1] += 1

    # ways to decode prompts, so many at once

    def ours(self, policy: str, prompts: Sequence[Sequence[int]], size: int, new_tokens: int) -> Batch:
        """By an engine of ours."""
        engine, meter = self._engine(policy, size)
        rows, computed = meter.num_rows, meter.num_computed
        host: list[float] = []
        requests = [
            engine.request(
                list(prompt), policy=policy, max_new_tokens=new_tokens, eos_token_id=self.pair.end_token_ids,
                inherit_settings=False,
            )
            for prompt in prompts
        ]  # fmt: skip
        handles = engine.submit_all(requests)
        while not all(handle.is_done for handle in handles):
            in_passes, step_begin = meter.seconds, time.perf_counter()
            kinds = [event.kind for event in engine.step()]
            spent = time.perf_counter() - step_begin - (meter.seconds - in_passes)
            if kinds == ["tokens"] * size:  # everybody, and nothing else
                host.append(spent)
        ends = [cast(float, handle.ended_at) for handle in handles]
        results = [handle.result() for handle in handles]
        reports = [result.report for result in results]
        num_iterations = sum(report.num_iterations for report in reports)
        rows, computed = meter.num_rows - rows, meter.num_computed - computed
        return Batch(
            [result.token_ids for result in results],
            max(ends) - handles[0].submitted_at,
            [len(result.token_ids) / (end - cast(float, handle.started_at))
             for result, handle, end in zip(results, handles, ends, strict=True)],
            {
                **while_full(size, handles[0].submitted_at, ends, [handle.token_times for handle in handles]),
                # a GPU's passes are only begun in their calls, so nothing tells the two apart there
                "host": 1000 * statistics.median(host) if host and engine.device.type == "cpu" else None,
                "drafted": sum(report.num_drafted_nodes for report in reports) / num_iterations,
                "committed": sum(report.num_new_tokens for report in reports) / num_iterations,
                "padding": 1 - rows / computed if computed else None,
            },
        )  # fmt: skip

    def _engine(self, policy: str, size: int) -> tuple[Engine, Meter]:
        if (policy, size) not in self._engines:
            meter = Meter(self.pair.target.model, self._counter)
            engine = Engine(
                self.pair.target.model,
                None if policy == PLAIN else self.pair.drafter,
                tokenizer=self.pair.target.tokenizer,
                max_sequences=size,
                max_waiting=len(self.line(size)),
                make_runner=meter.runner,
            )
            self._engines[policy, size] = engine, meter
        return self._engines[policy, size]

    def padded(self, prompts: Sequence[Sequence[int]], size: int, new_tokens: int) -> Batch:
        """By transformers' `generate`, batch after batch, on prompts that are padded at the left."""
        device: Any = self.pair.target.model.device
        outputs: list[list[int]] = []
        each: list[float] = []
        before, seconds = self._counter.num_rows, 0.0
        for batch in (prompts[start : start + size] for start in range(0, len(prompts), size)):
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in batch], device=device)
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch], device=device)
            begin = now(device)
            with self._counter.counting(self.pair.target.model):
                config = self._config(new_tokens)
                output = self._plain_model().generate(ids, attention_mask=mask, generation_config=config)
            took = now(device) - begin
            seconds += took
            of_batch = [self._until_end(row) for row in output[:, longest:].tolist()]
            outputs += of_batch
            # a row that has ended is computed on with the others, and its tokens come when all are done
            each += [len(one) / took for one in of_batch]
        wasted = self._wasted(prompts, outputs, self._counter.num_rows - before)
        return Batch(outputs, seconds, each, {"padding": wasted})

    def continuous(self, prompts: Sequence[Sequence[int]], size: int, new_tokens: int) -> Batch:
        """By transformers' continuous batching, with a cache of just the size that is needed."""
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        blocks = size * -(-(max(map(len, prompts)) + new_tokens) // PAGE)
        # its own defaults fill a share of the memory, which takes most of a minute on a CPU
        settings = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=blocks + 2, max_batch_tokens=max(PAGE, size) * 2, max_requests_per_batch=size
        )
        before = self._counter.num_rows
        with self._counter.counting(self.pair.target.model):
            found = self._plain_model().generate_batch(
                [list(prompt) for prompt in prompts], generation_config=self._config(new_tokens),
                continuous_batching_config=settings, record_timestamps=True,
            )  # fmt: skip
        in_order = [found[name] for name in sorted(found, key=lambda name: int(name.rpartition("_")[2]))]
        if len(in_order) != len(prompts) or any(one.error for one in in_order):
            raise RuntimeError(next((one.error for one in in_order if one.error), "an output is missing"))
        outputs = [self._until_end(one.generated_tokens) for one in in_order]
        begin, ends = min(one.lifespan[0] for one in in_order), [one.lifespan[1] for one in in_order]
        return Batch(
            outputs,
            max(ends) - begin,
            [len(output) / (one.lifespan[1] - one.lifespan[0]) for output, one in zip(outputs, in_order, strict=True)],
            {
                **while_full(size, begin, ends, [one.timestamps for one in in_order]),
                "padding": self._wasted(prompts, outputs, self._counter.num_rows - before),
            },
        )

    def _plain_model(self) -> Any:
        """The target, whose own generation config fills nothing in."""
        return with_settings(self.pair.target.model, greedy_config())

    def _config(self, new_tokens: int) -> GenerationConfig:
        return greedy_config(max_new_tokens=new_tokens, eos_token_id=self.pair.end_token_ids or None)

    def _until_end(self, token_ids: Sequence[int]) -> list[int]:
        """An output with its end token, without what fills it up."""
        ends = self.pair.end_token_ids
        length = next((place + 1 for place, token in enumerate(token_ids) if token in ends), len(token_ids))
        return list(token_ids[:length])

    def _wasted(self, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], computed: int) -> float:
        """Share of the rows that no output needed: the last token of each is never sent through the model."""
        needed = sum(map(len, prompts)) + sum(map(len, outputs)) - len(outputs)
        return 1 - needed / computed

    def pause(self, long_tokens: int) -> dict[str, float]:
        """How long running sequences wait between two tokens, while a long prompt is filled in and before.

        Returns:
            Milliseconds: the usual and the longest pause before it, likewise meanwhile, and what it takes alone.
        """
        text = list(itertools.islice(itertools.cycle(itertools.chain(*self.prompts)), long_tokens))
        engine = Engine(self.pair.target.model, None, max_sequences=PAUSED + 1)
        options = {"policy": PLAIN, "eos_token_id": [], "inherit_settings": False}
        lone = generate(self.pair.target.model, None, text, max_new_tokens=1, **options)
        running = [
            engine.submit(prompt, max_new_tokens=16 + 2 * (long_tokens // 256), **options)
            for prompt in itertools.islice(itertools.cycle(self.prompts), PAUSED)
        ]
        while min(handle.num_tokens for handle in running) < 6:
            engine.step()
        guest = engine.submit(text, max_new_tokens=1, **options)
        guest.advance_until_done()
        begin, end = guest.submitted_at, cast(float, guest.first_token_at)
        before, meanwhile = [], []
        for handle in running:
            for earlier, later in itertools.pairwise(handle.token_times):
                if later <= begin:
                    before.append(1000 * (later - earlier))
                elif earlier <= end:
                    meanwhile.append(1000 * (later - earlier))
            engine.cancel(handle)
        return {
            "num_running": PAUSED, "prompt_tokens": long_tokens,
            "usual": statistics.median(before), "longest_before": max(before),
            "usual_meanwhile": statistics.median(meanwhile), "longest": max(meanwhile),
            "prefill_alone": 1000 * lone.report.prefill_seconds, "prefill_beside": 1000 * (end - begin),
        }  # fmt: skip


def _job(bench: Batches, name: str, method: Method, size: int) -> Job:
    """One method on the prompts of one size."""

    def job(turn: int) -> None:
        prompts = bench.line(size)
        if name in bench.found["errors"]:
            return
        try:
            if not turn:
                method(prompts[: 2 * size], size, WARM_UP_TOKENS)
                return
            found = method(prompts, size, bench.new_tokens)
        except Exception as error:
            if name not in (PADDED, CONTINUOUS):
                raise
            bench.found["errors"][name] = f"{type(error).__name__}: {error}"  # a result, too
            return
        bench.note(name, size, prompts, found)

    return job


# what is told beside the speed: its title, and the digits that are shown
MORE = {
    "whole": ("Tokens/s in total from the first prompt to the last token", 1),
    "partly": ("Time of that in which a lane stayed empty, as a share", 2),
    "host": ("Host time of an iteration outside passes, ms", 2),
    "drafted": ("Drafted nodes of a sequence's iteration", 1),
    "committed": ("Tokens of a sequence's iteration", 2),
    "padding": ("Rows that were computed for nothing, as a share", 2),
}


def relative(found: Mapping[str, Any], method: str, size: str) -> Spread | None:
    """Tokens/s in total relative to our plain decoding in the same round."""
    mine, plain = found["total"].get(method, {}).get(size), found["total"][PLAIN].get(size)
    if not mine or not plain:
        return None
    return Spread.of([one / other for one, other in zip(mine, plain, strict=True)])


def growth(found: Mapping[str, Any], method: str) -> float | None:
    """Host time that one more sequence adds to an iteration, ms: from the smallest size to the largest."""
    known = {int(size): statistics.median(values) for size, values in found["host"].get(method, {}).items() if values}
    if len(known) < 2:
        return None
    least, most = min(known), max(known)
    return (known[most] - known[least]) / (most - least)


def _rows(found: Mapping[str, Any], name: str, digits: int) -> list[list[Any]]:
    sizes = list(map(str, found["provenance"]["sizes"]))
    return [
        [method, *(Spread.of(by_size[size], digits=digits) if by_size.get(size) else None for size in sizes)]
        for method, by_size in found[name].items()
    ]


def tables(found: Mapping[str, Any]) -> Sequence[Table | None]:
    sizes = list(map(str, found["provenance"]["sizes"]))
    header = ("sequences at once", *sizes)
    note = "Median and quartiles of the rounds; with prefill."
    ratios = [[method, *(relative(found, method, size) for size in sizes)] for method in found["total"]]
    pause = found["pause"]
    waits = [
        (name.replace("_", " "), float(value))
        for name, value in pause.items()
        if not name.startswith(("num", "prompt"))
    ]
    host = [[*row, growth(found, row[0])] for row in _rows(found, "host", MORE["host"][1])]
    return [
        simple("total", "Tokens/s in total", f"While all lanes are full. {note}", header, _rows(found, "total", 1)),
        simple("each", "Tokens/s of a sequence", note, header, _rows(found, "each", 1)),
        simple("relative", "In total, relative to our plain decoding", "In the same round.", header, ratios),
        *(
            simple(name, MORE[name][0], "", header, _rows(found, name, MORE[name][1]))
            for name in ("whole", "partly", "drafted", "committed", "padding")
        ),
        simple("host", MORE["host"][0], "", (*header, "for each further sequence"), host),
        simple(
            "pause",
            f"Pause between two tokens of {pause['num_running']} running sequences, ms",
            f"While a prompt of {pause['prompt_tokens']:,} tokens is filled in beside them; plain decoding.",
            ("", "ms"), waits, digits=0,
        ),
    ]  # fmt: skip


def panels(found: Mapping[str, Any]) -> Sequence[Panel]:
    ratios = {
        method: {int(size): spread for size in by_size if (spread := relative(found, method, size)) is not None}
        for method, by_size in found["total"].items()
        if method not in (PADDED, CONTINUOUS)
    }
    return [
        Panel("in total", "sequences at once", "tokens/s", lines_of(found["total"]), is_doubling=True),
        Panel("of a sequence", "sequences at once", "tokens/s", lines_of(found["each"]), is_doubling=True),
        Panel("what trees are worth", "sequences at once", "1 = our plain decoding", ratios, is_doubling=True),
    ]


def sentences(found: Mapping[str, Any]) -> Sequence[str]:
    said = []
    for method, (num_same, num_all) in found["same"].items():
        if num_same < num_all:
            said.append(f"{method}: {num_all - num_same} of {num_all} outputs are not those of plain decoding alone")
    ours = [method for method in found["same"] if method not in (PADDED, CONTINUOUS)]
    if all(found["same"][method][0] == found["same"][method][1] for method in ours):
        said.append(
            f"all {sum(found['same'][method][1] for method in ours)} outputs of ours are those of each sequence alone"
        )
    said += [f"{method} does not run here: {error}" for method, error in found["errors"].items()]
    for method in ours:
        if method != PLAIN:
            known = {int(size): relative(found, method, size) for size in found["total"][method]}
            paying = [size for size, spread in known.items() if spread is not None and spread.median >= 1]
            said.append(
                f"{method} pays with {', '.join(map(str, paying))} at once" if paying else f"{method} pays at no size"
            )
    return said


STUDY = Study(
    (*("target", "drafters", "synthetic", "device", "dtype", "layers", "policies", "workloads", "num_prompts"),
     *("picks", "max_new_tokens", "prompt_tokens", "repeats", "is_chat", "batch_sizes")),
    measure,
    tables,
    panels,
    sentences,
)  # fmt: skip
