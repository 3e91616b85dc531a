"""What does tree decoding gain on this GPU, and does all of it work there?

Question: does what was meant for GPUs run on one, where does an iteration wait and spend its time, and how far is it
from the goals: bandwidth's share, a tree's iteration ÷ a plain step, speedups over `generate` and over plain decoding.

Method: steps (`dynatree_bench.studies.on_gpu.steps`), each in a process of its own with a bound on its time, so that a
step that hangs or leaves the device in disorder costs itself only. A step that is done is not done again; its file in
the folder `steps` is its result, with provenance. Models have random weights of published shapes (synthetic: their text
and acceptance are set) but in the step for the default model. `--quick` is a dry run at tiny sizes, on a CPU too.

Output: a table of the steps, one of the goals beside what was measured, tables of each step, and a figure of
attention: milliseconds of a call at a length that is new.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from dynatree_bench.report.series import Panel
from dynatree_bench.report.tables import Spread, Table, simple
from dynatree_bench.run.machine import device_name
from dynatree_bench.run.progress import bar
from dynatree_bench.studies import roofline
from dynatree_bench.studies.on_gpu import recording, steps
from dynatree_bench.studies.on_gpu.embedded import HF
from dynatree_bench.studies.on_gpu.given import TREE, Given
from dynatree_bench.studies.study import Asked, Study
from dynatree_core import InputError
from dynatree_core.models.load import resolve_device

SHAPES = {
    "roofline": "Pythia-2.8B shape", "llama": "Llama-8B shape", "triton": "Pythia-2.8B shape by `triton`"
}  # fmt: skip
OF_PYTHIA = "60 % (H200), 75 % (H100)"
SHARES = {"roofline": OF_PYTHIA, "llama": "80 %", "triton": OF_PYTHIA}  # of bandwidth, for plain decoding, at least
AGAINST_PLAIN = {6.6: 3.5, 4.5: 2.5, 3.0: 1.7}  # tokens an iteration -> speedup over our own plain decoding, at least


def plan(asked: Asked) -> Sequence[str]:
    """What would run."""
    return steps.plan(asked.steps, is_dry=asked.is_quick)


def measure(asked: Asked) -> dict[str, Any]:
    """Run the steps that are not done yet, and read what all have left."""
    names = steps.checked_steps(asked.steps)
    device = resolve_device(asked.models.device)
    if device.type != "cuda" and not asked.is_quick:
        raise InputError(
            f"`dynatree bench gpu` needs a CUDA GPU with some 40 GiB of memory and a torch with CUDA, got {device}; "
            "take --quick for a dry run here, or --plan to see what it would do"
        )
    folder = asked.out / "steps"
    given = Given(str(device), asked.is_quick, asked.seed, str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    with bar("measuring", len(names)) as advance:
        for name in names:
            advance(note=name)
            file = folder / f"{name}.json"
            if not steps.is_done(file, given):
                found[name] = steps.run_step(name, given, command="dynatree bench gpu")
                steps.write_step(file, found[name])
            advance()
    left_out = []
    for name in steps.STEPS:
        file = folder / f"{name}.json"
        if name not in found and file.exists():
            result = steps.read_step(file, given)
            if isinstance(result, str):
                left_out.append(f"steps/{file.name}: {result}")
            else:
                found[name] = result
    said = {"device": device_name(device), "is_dry": asked.is_quick, "left_out": left_out}
    return {"provenance": said, "steps": {name: found[name] for name in steps.STEPS if name in found}}


def _found(found: Mapping[str, Any], name: str) -> Any:
    """What a step has found; None where it is not done."""
    result = found["steps"].get(name)
    return result["found"] if result is not None and result["state"] == steps.DONE else None


def sentences(found: Mapping[str, Any]) -> Sequence[str]:
    results = found["steps"].values()
    states = [f"{result['step']} {result['state']}" for result in results if result["state"] != steps.DONE]
    said = ["the models have random weights (synthetic), but in the step default-model"]
    if found["provenance"]["is_dry"]:
        said.append("this is a dry run: its numbers mean nothing")
    if states:
        said.append(f"not all steps are done: {', '.join(states)}")
    said += [f"left out: {line}" for line in found["provenance"].get("left_out", ())]
    said += [f"{name}: {line}" for name, lines in _faults(found).items() for line in lines]
    suite = _found(found, "tests")
    if suite is not None and not suite["pytest"]:
        said.append("no tests here: they are in a checkout of the source, and this is none")
    if suite is not None and not suite["wrong"]:
        said.append(f"0 of {suite['num_texts']} texts are not those of `generate`")
    return said


def _faults(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """Step -> why what it has found is bad, of those that are done and have such."""
    done = {name: result for name, result in found["steps"].items() if result["state"] == steps.DONE}
    lines = {name: steps.faults(result) for name, result in done.items()}
    return {name: some for name, some in lines.items() if some}


def tables(found: Mapping[str, Any]) -> Sequence[Table | None]:
    made = [_steps_table(found), _goals_table(found), _attention_table(found), _waits_table(found)]
    made += [_profile_table(found), _recording_table(found), _default_table(found), _batches_table(found)]
    for name, shape in SHAPES.items():
        results = _found(found, name)
        for table in roofline.tables(results) if results is not None else ():
            if table is not None:
                title = f"{table.title}, {shape}, random weights"
                made.append(attrs.evolve(table, name=f"{name}-{table.name}", title=title))
    return made


def _steps_table(found: Mapping[str, Any]) -> Table | None:
    bad = _faults(found)
    rows = [
        (
            name, "done, with faults" if name in bad else result["state"], result["seconds"],
            str(result["limit_seconds"]), " ".join(bad.get(name, result["last_lines"])[-1:]),
        )
        for name, result in found["steps"].items()
    ]  # fmt: skip
    header = ("step", "state", "seconds", "at most", "said last")
    return simple("steps", "Steps", "", header, rows, digits=0)


def _goals_table(found: Mapping[str, Any]) -> Table | None:
    rows = [*_speed_goals(found), *_iteration_goals(found)]
    return simple("goals", "Goals", "Random weights of these shapes.", ("goal", "wanted", "measured"), rows)


def _speed_goals(found: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    rows = []
    for name, shape in SHAPES.items():
        document = _found(found, name)
        if document is None:
            continue
        results = roofline.Results.of(document)
        runners = results.provenance["runners"]
        seconds = {runner: results.seconds(roofline.Way(runner)) for runner in runners}
        plain = min(seconds.values())
        share = 100 * results.bandwidth_share(plain)
        rows.append((f"plain decoding, % of bandwidth, {shape}", f"at least {SHARES[name]}", share))
        hf = results.seconds(roofline.Way(None))
        for tokens, wanted in AGAINST_PLAIN.items():
            ways = [roofline.Way(runner, tokens) for runner in runners]
            speeds = [statistics.fmean(results.decoding[str(way)]["tokens"]) / results.seconds(way) for way in ways]
            best = max(speeds)
            if tokens == 6.6:
                rows.append((f"× eager hf generate, {tokens} tokens an iteration, {shape}", "at least 10", best * hf))
            what = f"× our own plain decoding, {tokens} tokens an iteration, {shape}"
            rows.append((what, f"at least {wanted}", best * plain))
    return rows


def _iteration_goals(found: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    rows = []
    profiled = _found(found, "profile")
    if profiled is not None:
        for runner in dict.fromkeys(one["asked"] for one in profiled["profiles"]):
            ms = {one["policy"]: one["ms"] for one in profiled["profiles"] if one["asked"] == runner}
            what = f"iteration (16 nodes, 5 levels, 70M drafter) ÷ plain step, {runner}"
            rows.append((what, "at most 1.6", ms[TREE] / ms["autoregressive"]))
    waited = _found(found, "waits")
    if waited is not None and waited["is_counted"]:
        rows += [
            (f"waits of an iteration, {one['stack']} with {one['drafter']}", "1", one["waits"])
            for one in waited["stacks"]
        ]
    recorded = _found(found, "recording")
    if recorded is not None:
        some = recorded["generations"]
        what = f"passes recorded in {len(some)} generations, target and drafter"
        rows.append((what, f"at most {recording.MOST_RECORDED}", some[-1]["num_recorded"]))
        grown = recording.growth(some)
        if grown is not None:
            rows.append((f"MiB that memory grows after generation {recording.SETTLED}", "at most 0", grown / 2**20))
    return rows


def _attention_table(found: Mapping[str, Any]) -> Table | None:
    probed = _found(found, "probe")
    rows = [] if probed is None else [
        (
            f"{one['size']}, {one['rows']} rows, {one['way']}", Spread.of(one["first_ms"]), one["later_ms"],
            " ".join(one["kernels"][:2])[:60],
        )
        for one in probed["attention"]
    ]  # fmt: skip
    note = "The first call at each of several lengths, and later ones. 32 heads, 8 of keys."
    return simple("attention", "Attention, ms", note, ("size of a head", "new length", "later", "kernels"), rows)


def _waits_table(found: Mapping[str, Any]) -> Table | None:
    waited = _found(found, "waits")
    if waited is None or not waited["is_counted"]:
        return None
    rows = [
        (one["stack"], one["drafter"], one["waits"], ", ".join(f"{line} {number:.1f}" for line, number in lines))
        for one in waited["stacks"]
        for lines in [list(one["lines"].items())[:6]]
    ]
    return simple("waits", "Waits of an iteration", "", ("stack", "drafter", "waits", "lines"), rows)


def _profile_table(found: Mapping[str, Any]) -> Table | None:
    profiled = _found(found, "profile")
    rows = [] if profiled is None else [
        (f"{one['policy']}, {one['asked']}", *one["stages"].values(), one["ms"]) for one in profiled["profiles"]
    ]  # fmt: skip
    stages = list(profiled["profiles"][0]["stages"]) if rows else []
    return simple("profile", "An iteration, ms", "", ("stack, runner", *stages, "in all"), rows)


def _recording_table(found: Mapping[str, Any]) -> Table | None:
    recorded = _found(found, "recording")
    if recorded is None:
        return None
    some = recorded["generations"]
    rows = [
        (
            str(turn + 1), some[turn]["runner"], some[turn]["seconds"], str(some[turn]["num_recorded"]),
            some[turn]["recording_seconds"], None if some[turn]["bytes"] is None else some[turn]["bytes"] / 2**20,
        )
        for turn in sorted({0, 1, 2, len(some) - 1})
    ]  # fmt: skip
    header = ("generation", "runner", "seconds", "recorded so far", "seconds of it", "MiB")
    return simple("recording", "Generations on one engine", "256 tokens of `phase3`.", header, rows)


def _default_table(found: Mapping[str, Any]) -> Table | None:
    decoded = _found(found, "default-model")
    if decoded is None:
        return None
    outputs = decoded["outputs"]
    rows = []
    for category in dict.fromkeys(one["category"] for one in outputs):
        own = [one for one in outputs if one["category"] == category]
        speeds = {
            name: sum(one["num_tokens"] for one in of) / sum(one["seconds"] for one in of)
            for name in dict.fromkeys(one["method"] for one in own)
            for of in [[one for one in own if one["method"] == name]]
        }
        differ = sum(not one["is_plain"] for one in own if one["method"] != HF)
        rows.append((category, speeds[HF], *(speed / speeds[HF] for speed in list(speeds.values())[1:]), str(differ)))
    ways = [name for name in dict.fromkeys(one["method"] for one in outputs) if name != HF]
    header = ("category", f"{HF}, tokens/s", *(f"{name}, × hf" for name in ways), "other texts than plain")
    return simple("default-model", f"The default model: {decoded['model']}", "With prefill.", header, rows)


def _batches_table(found: Mapping[str, Any]) -> Table | None:
    decoded = _found(found, "default-model")
    rows = [] if decoded is None else [
        (str(one["sequences"]), one["num_tokens"] / one["seconds"]) for one in decoded["batches"]
    ]  # fmt: skip
    return simple("batches", "Several sequences at once", "`phase3`.", ("sequences", "tokens/s of all"), rows)


def panels(found: Mapping[str, Any]) -> Sequence[Panel]:
    """Attention at a length that is new, by rows."""
    probed = _found(found, "probe")
    if probed is None:
        return []
    made = []
    for size in dict.fromkeys(one["size"] for one in probed["attention"]):
        lines: dict[str, dict[int, Spread]] = {}
        for one in probed["attention"]:
            if one["size"] == size:
                lines.setdefault(one["way"], {})[one["rows"]] = Spread.of(one["first_ms"])
        made.append(Panel(f"heads of size {size}", "rows of a pass", "first call at a length (ms)", lines, True, True))
    return made


def is_bad(found: Mapping[str, Any]) -> bool:
    """Whether a step failed, or has found what is bad."""
    return any(result["state"] != steps.DONE for result in found["steps"].values()) or bool(_faults(found))


STUDY = Study(("steps", "is_plan", "device"), measure, tables, panels, sentences, plan, is_bad)
