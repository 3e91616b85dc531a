"""Measuring: every prompt by every method, one after another in one process, each output written as it comes.

After a warm-up, all that is made of a prompt follows one another in an order that is shuffled anew for each prompt and
repeat, so that a drift of the machine favours no method and no point. A run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs
import psutil
import torch
from filelock import FileLock, Timeout

from dynatree_bench.data.turns import played
from dynatree_bench.data.workloads import (
    EncodedPrompt,
    Picks,
    digest,
    encode,
    load_workload,
    markov_prompts,
    random_prompts,
    some_of,
)
from dynatree_bench.run.bandwidth import memory_info
from dynatree_bench.run.experiments import (
    COMPILED,
    EXPERIMENTS,
    REFERENCE_AXES,
    Cell,
    Experiment,
    Form,
    Method,
    cells,
    chosen_methods,
)
from dynatree_bench.run.machine import (
    BUSY_PERCENT,
    LoadMeter,
    busy_percent,
    device_name,
    library_versions,
    source_commit,
)
from dynatree_bench.run.methods import Output, decode, replay
from dynatree_bench.run.pairs import MethodError, Pair, drafter_info, model_info
from dynatree_bench.run.progress import bar
from dynatree_bench.run.records import (
    INFO_FILE,
    LOCK_FILE,
    MethodInfo,
    OutputRecord,
    Replay,
    Results,
    RunInfo,
    append_record,
    drop_torn_line,
    is_run,
    read_info,
    read_records,
    read_results,
    record_key,
    run_warnings,
    write_info,
)
from dynatree_bench.run.runnable import runnable
from dynatree_core import DynaTreeError, InputError, build_stack
from dynatree_core.errors import nearest_match
from dynatree_core.files.outputs import check_out
from dynatree_core.models.architectures import vocab_size
from dynatree_core.models.kept import kept_of
from dynatree_core.runners.choice import runner_for

WARM_UP_TOKENS = 8
QUICK_SECONDS = 90.0  # the time limit of the quick form, for what comes after a first prompt of each kind
IDLE_CHECK_SECONDS = 2.0
NO_BANDWIDTH = "the memory's bandwidth was not measured: there is no room for a buffer larger than the caches"
# what must be the same for a run to go on
FIXED_FIELDS = (
    "experiment", "target", "drafter", "device", "device_name", "threads", "libraries", "seed", "is_synthetic",
    "ignore_eos", "methods", "axes", "settings",
)  # fmt: skip


@attrs.frozen
class Options:
    """What of an experiment is changed, and how it is measured; None: as the form has it."""

    quick: bool = False
    workloads: Sequence[str] | None = None  # see dynatree_bench.data.workloads
    num_prompts: int | str | None = None  # of each workload; "all"
    picks: Picks = attrs.field(factory=Picks)  # which prompts, and how files of them are read
    max_new_tokens: Sequence[int] | None = None
    prompt_tokens: Sequence[int] | None = None  # lengths to which prompts are cut
    drafters: Sequence[str] = ()  # names; of several, every method is measured with each
    models: Mapping[str, Any] = attrs.field(factory=dict)  # what was done to them, for the settings
    policies: Sequence[str] = ()  # in place of the experiment's own
    only: Sequence[str] = ()  # names of methods to which to keep
    with_compile: bool = False
    with_rivals: bool = False
    repeats: int = 1
    seed: int = 0  # of torch's generator; nothing here draws from it, but a policy or drafter may
    is_chat: bool | None = None  # None: as the workload is meant, where there is a template
    ignore_eos: bool = False
    with_replay: bool = False  # ask the drafter about each token of each output, after it was timed
    time_limit: float | None = None  # seconds; a prompt is not begun if it would probably end later

    def __attrs_post_init__(self) -> None:
        counts = {
            "num_prompts": None if self.num_prompts == "all" else self.num_prompts,
            "repeats": self.repeats,
            **{f"max_new_tokens[{i}]": value for i, value in enumerate(self.max_new_tokens or ())},
            **{f"prompt_tokens[{i}]": value for i, value in enumerate(self.prompt_tokens or ())},
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")


@attrs.frozen
class Task:
    """A prompt and all that is to be made of it."""

    prompt: EncodedPrompt
    cells: tuple[Cell, ...]
    repeat: int

    def shuffled(self) -> list[Cell]:
        """The cells in the order in which they are measured; the same one in a run that goes on."""
        seed = f"{self.prompt.workload} {self.prompt.prompt_id} {len(self.prompt.token_ids)} {self.repeat}"
        return random.Random(seed).sample(self.cells, len(self.cells))

    @property
    def kind(self) -> tuple[str, str, Any]:
        """What tells its prompt from prompts of other kinds: workload, category, and the length to which it is cut."""
        return self.prompt.workload, self.prompt.category, self.cells[0].axes.get("prompt_tokens")

    def key(self, cell: Cell) -> tuple[str, str, str, int]:
        """That of the output's record."""
        return record_key(cell.method.name, self.prompt.prompt_id, cell.axes, self.repeat)


def run_experiment(
    name: str,
    pair: Pair,
    out: Path,
    options: Options | None = None,
    *,
    command: str | None = None,
    idle_check_seconds: float = IDLE_CHECK_SECONDS,
    with_bandwidth: bool = True,
    meter: Callable[[], LoadMeter] = LoadMeter,
    say: Callable[[str], None] | None = None,
) -> Results:
    """Run one of EXPERIMENTS, or go on with a run that was cut off.

    Args:
        name: the experiment.
        pair: the models, from `load_pair`.
        out: the results' folder: `run.json` and `records.jsonl` (`dynatree_bench.run.records`). If it holds a run of
            the same settings, what is there is kept and only the rest is done.
        options: what differs from the experiment's own settings.
        command: how this was started, for the provenance; None: this call.
        idle_check_seconds: how long to look whether the machine is idle before it begins; 0: do not look.
        with_bandwidth: whether to measure how fast the device's memory is read before it begins.
        meter: made before each output, tells how much others used the processor meanwhile.
        say: called with a sentence for what somebody should know; None: silent.

    Returns:
        All outputs that the folder holds now.

    Raises:
        InputError: an unknown experiment, settings that cannot be used, or a folder with a run of other settings.
        DynaTreeError: a policy or drafter that cannot even warm up. What fails later, and whatever fails in others'
            code, is a record with an error.
    """
    options, say = options or Options(), say or (lambda message: None)
    methods, left_out = runnable(checked_methods(name, options), pair, only=options.only)
    check_results(out)
    experiment = EXPERIMENTS[name]
    form = _form(experiment, pair, options)
    tasks, about_prompts = _tasks(experiment, pair, form, methods, options)
    notes = (*left_out, *about_prompts)
    infos = tuple(_method_info(method, pair, tasks[0].cells) for method in methods)
    info = _run_info(name, pair, infos, tasks, options, command or f"run_experiment({name!r}, ...)", notes)
    with _locked(out):
        before = _run_before(info, out)
        records = read_records(out)
        reference_names = {method.name: method.reference for method in methods}
        run = _Run(
            name, pair, options, out, {record.key for record in records}, reference_names,
            _references(records, reference_names), meter,
        )  # fmt: skip
        if run.missing(tasks):
            for note in notes:
                say(note)
            info = _begun(info, before, out)
            if idle_check_seconds and (idle_note := _idle_note(idle_check_seconds)) is not None:
                say(idle_note)
                info = attrs.evolve(info, notes=(*info.notes, idle_note))
            if with_bandwidth:
                info = attrs.evolve(info, memory=memory_info(pair.target.model, info.memory))
                if info.memory is None:
                    say(NO_BANDWIDTH)
                    info = attrs.evolve(info, notes=(*info.notes, NO_BANDWIDTH))
            write_info(out, info)
            torch.manual_seed(options.seed)
            run.warm_up(tasks)
            run.measure(tasks)
            for warning in run_warnings(read_results(out)):
                say(warning)
        return read_results(out)


def checked_methods(name: str, options: Options) -> tuple[Method, ...]:
    """The methods that an experiment asks for; finds what is wrong with them before anything is loaded.

    Raises:
        InputError: there is no such experiment or method, or a stack that cannot be built.
    """
    if name not in EXPERIMENTS:
        raise InputError(
            f"'{name}' is not an experiment{nearest_match(name, EXPERIMENTS)}; they are: {', '.join(EXPERIMENTS)}"
        )
    experiment = EXPERIMENTS[name]
    methods = chosen_methods(
        experiment, policies=options.policies, only=options.only, with_compile=options.with_compile,
        with_rivals=options.with_rivals, drafters=options.drafters,
    )  # fmt: skip
    for cell in cells(methods, experiment.quick if options.quick else experiment.full, {}):
        if cell.method.kind == "dynatree":
            build_stack(cell.policy)
    return methods


def check_results(out: Path) -> None:
    """Refuse a folder for results that holds something else.

    Raises:
        InputError: it does, or it cannot be written.
    """
    check_out(out, "`dynatree bench`", is_run)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep the folder of the results to this run: of two at once, each would add what the other one has.

    Raises:
        InputError: another run has it, or it cannot be written.
    """
    lock = FileLock(out / LOCK_FILE)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)  # the system frees it however its holder ends
    except Timeout as error:
        raise InputError(
            f"a results' folder must have one run at a time, and another one is writing to {out}; wait until it has "
            "ended, or give another --out"
        ) from error
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        yield
    finally:
        lock.release()


def _form(experiment: Experiment, pair: Pair, options: Options) -> Form:
    form = experiment.quick if options.quick else experiment.full
    workloads: Sequence[str] = form.workloads
    if pair.target.tokenizer is None:  # nothing to read a text with
        is_one = pair.source is not None and len(workloads) == 1
        workloads = ["markov"] if is_one else [f"random:{seed}" for seed in range(len(workloads))]
    return attrs.evolve(
        form,
        workloads=tuple(options.workloads or workloads),
        num_prompts=None if options.num_prompts == "all" else options.num_prompts or form.num_prompts,
        # each length once: what is given twice would wait for a second output of the same name
        max_new_tokens=tuple(dict.fromkeys(options.max_new_tokens or form.max_new_tokens)),
        prompt_tokens=tuple(dict.fromkeys(options.prompt_tokens or form.prompt_tokens)),
    )


def _tasks(
    experiment: Experiment, pair: Pair, form: Form, methods: Sequence[Method], options: Options
) -> tuple[tuple[Task, ...], tuple[str, ...]]:
    """Every prompt in every length, as often as it is repeated, and what somebody should know about them.

    Those of all workloads and lengths come in turn.
    """
    groups: list[list[Task]] = []
    notes = []
    names_of: dict[str, str] = {}  # workload's name -> what was given
    has_datasets = experiment.name == "datasets" or len(form.workloads) > 1
    for workload in form.workloads:
        prompts, said = _prompts(pair, workload, form, options)
        notes += said
        name = prompts[0].workload
        if name in names_of:
            raise InputError(
                f"each workload must have a name of its own, got '{names_of[name]}' and '{workload}', which are both "
                f"called '{name}'; name one of them: --workload NAME=FILE"
            )
        names_of[name] = workload
        if form.num_prompts is not None and len(prompts) < form.num_prompts:
            lengths = [length for length in form.prompt_tokens if length is not None]
            which = f" of {max(lengths)} tokens or more" if lengths else ""
            notes.append(f"'{name}' has {len(prompts)} of the {form.num_prompts} prompts{which} that are asked for")
        for num_tokens in form.prompt_tokens:
            base: dict[str, Any] = {"dataset": name} if has_datasets else {}
            base |= {"prompt_tokens": num_tokens} if num_tokens is not None else {}
            own_cells = tuple(cells(methods, form, base))
            groups.append([Task(_cut(prompt, num_tokens), own_cells, 0) for prompt in prompts])
    tasks = [task for turn in itertools.zip_longest(*groups) for task in turn if task is not None]
    names = Counter((task.prompt.prompt_id, str(task.cells[0].axes.get("prompt_tokens"))) for task in tasks)
    if twice := [prompt_id for (prompt_id, _), count in names.items() if count > 1]:
        raise InputError(f"prompts of different workloads must have different ids, got {twice[0]!r} in two of them")
    repeated = (attrs.evolve(task, repeat=repeat) for repeat in range(options.repeats) for task in tasks)
    return tuple(repeated), tuple(notes)


def _prompts(
    pair: Pair, workload: str, form: Form, options: Options
) -> tuple[Sequence[EncodedPrompt], tuple[str, ...]]:
    """A workload's prompts, and what was left out of it.

    All lengths to which they are cut have the same ones, those that reach the longest.
    """
    longest = max((length for length in form.prompt_tokens if length is not None), default=None)
    picks, count = options.picks, form.num_prompts
    if workload.partition(":")[0] in ("markov", "random") and (pair.source is not None or workload != "markov"):
        if count is None:
            raise InputError(f"'{workload}' has prompts without end, so --num-prompts must be a number, got 'all'")
        if workload == "markov" and pair.source is not None:
            return markov_prompts(pair.source, count, longest), ()
        return random_prompts(workload, count, longest, vocab_size(pair.target.model)), ()
    if picks.is_played:
        if longest is not None:
            raise InputError("--turns plays whole conversations, which --prompt-tokens would cut; give one of them")
        loaded = load_workload(workload, count, picks)
        return played(loaded, pair.target, max(form.max_new_tokens), options.is_chat), loaded.notes
    if longest is None:
        loaded = load_workload(workload, count, picks)
        return encode(loaded, pair.target, is_chat=options.is_chat), loaded.notes
    loaded = load_workload(workload, picks=picks)
    encoded = encode(loaded, pair.target, is_chat=options.is_chat, num_tokens=longest)
    return some_of(encoded, count, is_text=loaded.is_text, seed=picks.seed), loaded.notes


def _cut(prompt: EncodedPrompt, num_tokens: int | None) -> EncodedPrompt:
    return attrs.evolve(prompt, token_ids=prompt.token_ids[:num_tokens])


def _method_info(method: Method, pair: Pair, own_cells: Iterable[Cell]) -> MethodInfo:
    """A method as the provenance has it, with the canonical spelling of its stack."""
    policy = method.policy
    if method.kind == "dynatree":
        stacks = (cell.policy for cell in own_cells if cell.method == method)
        policy = method.policy if method.axes else str(build_stack(next(stacks)))
    is_drafting = method.is_drafting or "assistant" in method.options
    drafter = pair.drafting_with(method.drafter).drafter
    return MethodInfo(method.name, method.kind, policy, str(drafter) if is_drafting else None, dict(method.options))


def _run_info(
    name: str,
    pair: Pair,
    methods: tuple[MethodInfo, ...],
    tasks: Sequence[Task],
    options: Options,
    command: str,
    notes: tuple[str, ...],
) -> RunInfo:
    axes: dict[str, list[Any]] = {}
    for task in tasks:
        for cell in task.cells:
            for axis, value in cell.axes.items():
                values = axes.setdefault(axis, [])
                if value not in values:
                    values.append(value)
    model, source = pair.target.model, pair.source
    return RunInfo(
        experiment=name,
        command=command,
        version=version("dynatree"),
        commit=source_commit(),
        started=_date(),
        target=model_info(model, pair.target.name),
        drafter=drafter_info(pair),
        device=str(model.device),
        device_name=device_name(model.device),
        threads=torch.get_num_threads(),
        libraries=library_versions(),
        seed=options.seed,
        is_synthetic=source is not None,
        ignore_eos=options.ignore_eos,
        methods=methods,
        axes=axes,
        settings={
            "quick": options.quick,
            "workloads": sorted({task.prompt.workload for task in tasks}),
            "prompts": len({task.prompt.prompt_id for task in tasks}),
            "outputs": sum(len(task.cells) for task in tasks),
            "prompts_sha256": digest(task.prompt for task in tasks if task.repeat == 0),
            "repeats": options.repeats,
            "chat": options.is_chat,
            **options.picks.settings(),
            **options.models,
            "replay": options.with_replay,
            "cores": psutil.cpu_count() or 1,
            "runner": runner_for(model, "auto", kept=kept_of(model)),
            **({} if source is None else {"acceptance": source.acceptance, "decay": source.decay}),
        },
        notes=notes,
    )


def _run_before(info: RunInfo, out: Path) -> RunInfo | None:
    """The run that is in the folder and may go on, if there is one.

    Raises:
        InputError: it is a run with other settings.
    """
    if not (out / INFO_FILE).exists():
        return None
    before = read_info(out)
    different = [
        f"{label}: {_shown(old)} there, {_shown(new)} now"
        for field in FIXED_FIELDS
        for label, old, new in _differences(field, getattr(before, field), getattr(info, field))
    ]
    if different:
        raise InputError(
            f"{out} holds a run with other settings ({'; '.join(different)}); give the same settings to go on with it, "
            "or another --out"
        )
    return before


def _begun(info: RunInfo, before: RunInfo | None, out: Path) -> RunInfo:
    """Write `run.json`: this run's, or that of the run that goes on, with one more date.

    Raises:
        InputError: the folder cannot be written.
    """
    if before is not None:
        changed = [f"went on at commit {info.commit}"] if info.commit != before.commit else []
        changed += [f"went on with dynatree {info.version}"] if info.version != before.version else []
        dates, notes = (*before.continued, info.started), (*before.notes, *changed)
        info = attrs.evolve(before, continued=dates, notes=notes)
    try:
        write_info(out, info)
        drop_torn_line(out)
    except OSError as error:
        raise _unwritable(out, error) from error
    return info


def _unwritable(out: Path, error: OSError) -> InputError:
    return InputError(f"the results' folder must be one that can be written, cannot use {out}: {error}")


def _differences(label: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """Where two values differ: (name, old, new), looking into mappings and records."""
    if attrs.has(type(old)) and attrs.has(type(new)):
        old, new = attrs.asdict(old), attrs.asdict(new)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = dict.fromkeys([*old, *new])
        return [d for name in names for d in _differences(f"{label} {name}", old.get(name), new.get(name))]
    return [] if old == new else [(label, old, new)]


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], MethodInfo):
        return ", ".join(method.name if method.policy is None else method.policy for method in value)
    return str(value)[:80]


def _idle_note(seconds: float) -> str | None:
    percent = busy_percent(seconds=seconds)
    if percent <= BUSY_PERCENT:
        return None
    return (
        f"the machine was busy before the run: others used {percent:.0f} % of a core, so times are not to be believed"
    )


def _references(
    records: Iterable[OutputRecord], reference_names: Mapping[str, str]
) -> dict[tuple[Any, ...], OutputRecord]:
    """The outputs that others are compared with, by what they depend on; the first ones, where there are repeats."""
    names, found = set(reference_names.values()), {}
    for record in records:
        if record.method in names and record.error is None:
            found.setdefault(_reference_key(record.method, record), record)
    return found


def _reference_key(reference: str, record: OutputRecord) -> tuple[Any, ...]:
    return (reference, record.prompt_id, *(record.axes.get(name) for name in REFERENCE_AXES))


@attrs.define(eq=False)
class _Run:
    """What has been done, and what does the rest."""

    experiment: str
    pair: Pair
    options: Options
    out: Path
    done: set[tuple[str, str, str, int]]  # keys of the records that there are
    reference_names: Mapping[str, str]  # method -> the one that it is compared with
    references: dict[tuple[Any, ...], OutputRecord]
    meter: Callable[[], LoadMeter]
    replays: dict[tuple[Any, ...], Replay] = attrs.field(factory=dict, init=False)  # of the present prompt

    @property
    def eos(self) -> list[int]:
        return [] if self.options.ignore_eos else self.pair.end_token_ids

    def missing(self, tasks: Iterable[Task]) -> list[Task]:
        """Those of which something is to be made yet."""
        return [task for task in tasks if any(task.key(cell) not in self.done for cell in task.cells)]

    def warm_up(self, tasks: Sequence[Task]) -> None:
        """A few tokens by each method, of the longest prompt: first passes allocate, and choose or compile kernels."""
        by_length = sorted(tasks, key=lambda task: len(task.prompt.token_ids))
        shortest, longest = by_length[0], by_length[-1]
        for cell in {cell.method.name: cell for cell in longest.cells}.values():
            # a static cache is compiled for its size, which is that of prompt and output
            limit = cell.max_new_tokens if cell.method.name == COMPILED else min(WARM_UP_TOKENS, cell.max_new_tokens)
            short = attrs.evolve(cell, axes={**cell.axes, "max_new_tokens": limit})
            pair = attrs.evolve(self.pair, trace=None)
            _, error = _attempt(pair, short, longest.prompt, self.eos)
            # a foreign method will fail again, and be recorded; of ours, the prompt may have been too long
            if error is not None and cell.method.kind == "dynatree":
                decode(pair, short, shortest.prompt.token_ids, self.eos)

    def measure(self, tasks: Sequence[Task]) -> None:
        """All that is missing, within the time limit. That of the quick form lets a first prompt of each kind pass."""
        begin = time.perf_counter()
        todo = self.missing(tasks)
        limit, kinds = self.options.time_limit, {task.kind for task in todo}
        if limit is None and self.options.quick:
            limit, kinds = QUICK_SECONDS, {task.kind for task in tasks if task not in todo}
        with bar(self.experiment, sum(len(task.cells) for task in todo)) as advance:
            slowest = 0.0
            for task in todo:
                start = time.perf_counter()
                if limit is not None and task.kind in kinds and start - begin + slowest > limit:
                    continue
                kinds.add(task.kind)
                self._measure_prompt(task, advance)
                slowest = max(slowest, time.perf_counter() - start)

    def _measure_prompt(self, task: Task, advance: Callable[[], None]) -> None:
        """One prompt by all methods. An output is written as soon as the one to compare it with is there."""
        held: list[OutputRecord] = []
        self.replays.clear()
        for order, cell in enumerate(task.shuffled()):
            if task.key(cell) not in self.done:
                held.append(self._measure_cell(cell, task, order))
                held = [record for record in held if not self._write(record, is_last=False)]
            advance()
        for record in held:
            self._write(record, is_last=True)

    def _measure_cell(self, cell: Cell, task: Task, order: int) -> OutputRecord:
        device = self.pair.target.model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        meter = self.meter()
        output, error = _attempt(self.pair, cell, task.prompt, self.eos)
        load = meter.share()
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" and error is None else None
        record = self._record(cell, task, order, output, error, load, peak)
        self.references = _references([record], self.reference_names) | self.references
        if self.options.with_replay and cell.method.is_drafting and error is None:
            pair = self.pair.drafting_with(cell.method.drafter)
            known = (cell.method.drafter, task.prompt.prompt_id, record.token_ids)
            if known not in self.replays:
                self.replays[known] = replay(pair, task.prompt.token_ids, record.token_ids)
            record = attrs.evolve(record, replay=self.replays[known])
        return record

    def _write(self, record: OutputRecord, *, is_last: bool) -> bool:
        """Append a record if its reference is there, or there will be none; whether it was."""
        reference = self.references.get(_reference_key(self.reference_names[record.method], record))
        if reference is None and not is_last:
            return False
        if reference is not None and record.error is None:
            is_identical = record.token_ids == reference.token_ids
            digests = record.cache_sha256, reference.cache_sha256
            is_bitwise = None if None in digests else is_identical and digests[0] == digests[1]
            record = attrs.evolve(record, is_identical=is_identical, is_bitwise=is_bitwise)
        append_record(self.out, record)
        self.done.add(record.key)
        return True

    def _record(
        self, cell: Cell, task: Task, order: int, output: Output, error: str | None,
        load: float | None, peak: int | None,
    ) -> OutputRecord:  # fmt: skip
        report = output.report

        def of_report(name: str) -> float | None:  # not below 0, where two clocks round
            return max(float(getattr(report, name)), 0.0) if report is not None else None

        return OutputRecord(
            experiment=self.experiment,
            method=cell.method.name,
            prompt_id=task.prompt.prompt_id,
            category=task.prompt.category,
            axes=dict(cell.axes),
            repeat=task.repeat,
            order=order,
            num_prompt_tokens=len(task.prompt.token_ids),
            token_ids=output.token_ids,
            stop_reason=output.stop_reason,
            prefill_seconds=output.prefill_seconds,
            decode_seconds=output.decode_seconds,
            total_seconds=output.total_seconds,
            draft_seconds=of_report("draft_seconds"),
            verify_seconds=of_report("verify_seconds"),
            rest_seconds=of_report("rest_seconds"),
            overhead_seconds=of_report("overhead_seconds"),
            peak_memory_bytes=peak,
            is_identical=None,
            error=error,
            load=load,
            steps=output.steps,
            trials=output.trials,
            replay=None,
            cache_sha256=output.cache_sha256,
        )


FAILED = Output((), "error", 0.0, 0.0, 0.0)


def _attempt(pair: Pair, cell: Cell, prompt: EncodedPrompt, eos: Sequence[int]) -> tuple[Output, str | None]:
    """An output, or FAILED and why in one line. Others' code may raise anything; of ours, what is foreseen."""
    try:
        return decode(pair, cell, prompt.token_ids, eos), None
    except DynaTreeError as error:
        return FAILED, _one_line(error)
    except Exception as error:
        if cell.method.kind == "dynatree":
            raise
        return FAILED, _one_line(error)


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split())[:300]
    return message if isinstance(error, DynaTreeError | MethodError) else f"{type(error).__name__}: {message}"


def _date() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
