"""Traces: what was told stands in the file, the file is checked, and nothing in it changes a generation."""

from __future__ import annotations

import copy
import errno
import io
import itertools
import json
import math
import os
import re
from pathlib import Path

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_observer import DRAFTER, PROMPT, TARGET, Fails, Recorder

from dynatree_core import (
    Engine,
    InputError,
    PrefixCache,
    Proposals,
    Session,
    generate,
    generate_batch,
    hookimpl,
    run,
    stream_batch,
)
from dynatree_core.drafters.base import Drafter, DraftState
from dynatree_core.drafters.union import UnionDrafter
from dynatree_core.engine.observer import Commit, Feedback, Level, Outcome, Pruning, Verification
from dynatree_core.errors import PolicyError
from dynatree_core.policy.stack import PolicyStack
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import greedy
from dynatree_core.trace import SequenceTrace, Trace, json_schema, print_iteration, read, record, tree_lines
from dynatree_core.trace.format import OUTCOMES, float_list, int_list

LENGTH = 14


def traced(path: Path, policy: object = "phase3", drafter: object = DRAFTER, **options: object) -> SequenceTrace:
    """The trace of one generation, whose output is the target's own."""
    options = {"max_new_tokens": LENGTH, "tau": 0.0, **options}
    result = generate(TARGET, drafter, PROMPT, policy=policy, trace=path, **options)
    (sequence,) = read(path).sequences
    assert sequence.token_ids == result.token_ids
    return sequence


# what is in it


def test_the_outcomes_are_those_of_the_observer():
    names = [outcome.name.lower() for outcome in Outcome]
    assert list(OUTCOMES) == ["verified", *names[1:], "pruned"]


def check_iteration(iteration, records: list[object]) -> None:
    """Hold an iteration of a trace against what another observer was told of it."""
    levels = [one for one in records if isinstance(one, Level)]
    (pruning,), (commit,) = ([one for one in records if isinstance(one, kind)] for kind in (Pruning, Commit))
    verification = [one for one in records if isinstance(one, Verification)][-1]
    verdict, drafted, nodes = commit.report.verdict, pruning.drafted, iteration.nodes
    assert (iteration.number, iteration.num_drafted) == (commit.report.iteration, drafted.num_drafted)
    for column, values in (
        ("token", drafted.token_ids), ("parent", drafted.parent), ("depth", drafted.depth),
        ("logprob", drafted.logprob), ("cum_logprob", drafted.cum_logprob),
    ):  # fmt: skip
        found = torch.tensor(nodes[column][: drafted.num_nodes], dtype=values.dtype)
        assert torch.equal(found, values), column
    assert (tuple(iteration.path), tuple(iteration.committed)) == (verdict.draft_path, verdict.token_ids)
    kept = set(pruning.kept.draft_index.tolist())
    assert {n for n in range(drafted.num_nodes) if iteration.outcome(n) == "verified"} == kept
    # every proposal, at its rank, with what became of it
    places = {(nodes["parent"][n], nodes["rank"][n]): n for n in range(1, len(nodes["token"]))}
    assert len(places) == len(nodes["token"]) - 1
    expected = {}
    for level, described in zip(levels, iteration.levels, strict=True):
        assert (described["end"], described["nodes_left"]) == (level.end, level.nodes_left)
        if level.proposals is None:
            continue
        for row, of_row in enumerate(level.outcomes.tolist()):
            for rank, outcome in enumerate(of_row):
                if outcome != Outcome.NO_TOKEN:
                    expected[level.tree.last_level.start + row, rank] = (
                        int(level.proposals.token_ids[row, rank]), float(level.proposals.logprobs[row, rank]), outcome
                    )  # fmt: skip
    assert set(places) == set(expected)
    for place, node in places.items():
        token, logprob, outcome = expected[place]
        assert nodes["token"][node] == token
        assert torch.tensor(nodes["logprob"][node], dtype=torch.float32) == torch.tensor(logprob)
        is_drafted = node <= drafted.num_drafted
        assert is_drafted == (outcome == Outcome.ADMITTED)
        assert is_drafted or nodes["outcome"][node] == outcome
        assert (iteration.refused_by(node) is None) == (node in kept) or outcome == Outcome.BEYOND_WIDTH
    logprobs = verification.logits.double().log_softmax(dim=-1)
    at = dict(zip(pruning.kept.draft_index.tolist(), range(pruning.kept.num_nodes), strict=True))
    wanted = iteration.record["wanted"]
    for node, (token, logprob) in enumerate(zip(wanted["token"], wanted["logprob"], strict=True)):
        if node not in at:
            assert (token, logprob) == (None, None)
            continue
        assert token == int(verification.logits[at[node]].float().argmax())
        assert logprob == pytest.approx(float(logprobs[at[node]].max()), rel=1e-6, abs=1e-6)  # of float32 numbers
    chosen = [logprobs[at[n], token] for n, token in zip([0, *iteration.path], iteration.committed, strict=False)]
    assert iteration.record["committed_logprob"] == pytest.approx([float(one) for one in chosen], rel=1e-6, abs=1e-6)


class Everything(Recorder):
    """Keeps logits, too, which the next pass may overwrite."""

    def on_verify(self, verification: Verification) -> None:
        super().on_verify(attrs.evolve(verification, logits=verification.logits.clone()))

    def on_feedback(self, feedback: Feedback) -> None:
        self.records.append(feedback)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.data(),
    ours.prompts,
    st.one_of(ours.stacks(), ours.stacks().flatmap(ours.compositions)),
    ours.limits,
)
def test_what_was_told_stands_in_it(tmp_path, data, prompt, policy, limits):
    """Over random drafters, policies and limits; and the tokens are those without a trace."""
    recorder, drafter = Everything(), data.draw(ours.drafters("llama", 0))
    with Trace(tmp_path / "run.jsonl") as trace:
        session = Session(
            TARGET, drafter, prompt, policy=policy, max_new_tokens=12, observer=[recorder, trace.observer()], **limits
        )
        reports = list(run(session))
    assert session.new_token_ids == greedy(TARGET, prompt, 12)
    (sequence,) = read(trace.path).sequences
    assert sequence.begin["prompt"] == list(prompt)
    assert sequence.begin["limits"] == attrs.asdict(session.limits)
    assert sequence.token_ids == session.new_token_ids
    assert len(sequence.iterations) == len(reports)
    start = len(prompt)
    for iteration, report in zip(sequence.iterations, reports, strict=True):
        assert iteration.start == start
        start += len(report.token_ids)
        assert iteration.seconds["iteration"] == report.seconds
        numbers = {Commit: "report", Feedback: "report"}
        mine = [
            one for one in recorder.records
            if isinstance(one, Level | Pruning | Verification | Commit | Feedback)
            and (getattr(one, numbers[type(one)]) if type(one) in numbers else one).iteration == report.iteration
        ]  # fmt: skip
        check_iteration(iteration, mine)
    assert sequence.end["stop_reason"] == session.stop_reason


def test_who_refused(tmp_path):
    sequence = traced(
        tmp_path / "run.jsonl", "best_first(nodes=4)+fixed(depth=3,tau=0.03)+confidence+dynamic_depth", max_nodes=5
    )
    found = {(one.outcome(n), one.refused_by(n)) for one in sequence.iterations for n in range(len(one.nodes["token"]))}
    assert found >= {
        ("verified", None),
        ("pruned", "best_first"),
        ("beyond_width", "confidence"),
        ("below_tau", "tau"),
        ("over_budget", "max_nodes"),
    }
    assert sequence.begin["limits_by"]["tau"] == ["fixed"]
    ends = {(level["end"], level["end_by"]) for one in sequence.iterations for level in one.levels}
    assert ("nodes", "max_nodes") in ends
    assert ("depth", "length") in ends


def test_thresholds_before_and_after(tmp_path):
    sequence = traced(tmp_path / "run.jsonl", "confidence(high=0.5)+fixed(depth=3)+history")
    state = sequence.begin["policies"]
    assert (state["confidence"]["high"], state["history"]["recent"]) == (0.5, [])
    for iteration in sequence.iterations:
        for policy, changes in iteration.record["policies"].items():
            for field, (before, after) in changes.items():
                assert state[policy][field] == before != after
                state[policy][field] = after
    assert len(state["history"]["recent"]) == sum(1 for one in sequence.iterations if one.num_drafted)


def test_which_drafter_of_a_union_has_said_it(tmp_path):
    union = UnionDrafter("prompt_lookup+prompt_lookup(max_matches=1)")
    sequence = traced(tmp_path / "one.jsonl", "fixed(depth=2)", union)
    assert {name for one in sequence.iterations for name in one.record["sources"] or ()} <= set(str(union).split("+"))
    sources = {source for one in sequence.iterations for source in one.nodes.get("source", [-1])[1:]}
    assert sources
    assert "sources" not in traced(tmp_path / "two.jsonl", "fixed(depth=2)").iterations[0].nodes


def test_faults(tmp_path):
    with pytest.warns(RuntimeWarning, match="drafting is off"):
        sequence = traced(tmp_path / "run.jsonl", "fixed", Fails(), on_error="fallback")
    (fault,) = sequence.faults
    assert (fault["error"], fault["then"], fault["iteration"]) == ("DrafterError", "fallback", 0)
    assert {level["end_by"] for one in sequence.iterations for level in one.levels} == {"no_drafter"}


def test_a_trace_tells_a_target_that_was_rounded(tmp_path, monkeypatch):
    for name, rounded in (("as it is", None), ("rounded", "weights int4")):
        monkeypatch.setattr("dynatree_core.engine.lane.rounding_of", lambda target, said=rounded: said)
        generate(TARGET, None, PROMPT, trace=tmp_path / name, max_new_tokens=2)
        (sequence,) = read(tmp_path / name).sequences
        assert sequence.begin["settings"]["rounded"] == rounded


def test_whoever_is_called_back_waits_for_nothing(tmp_path):
    lines: list[str] = []
    session = Session(TARGET, DRAFTER, PROMPT, max_new_tokens=6, observer=Trace(None, on_line=lines.append).observer())
    for num_steps, _ in enumerate(run(session), 1):
        assert sum(json.loads(line)["kind"] == "iteration" for line in lines) == num_steps


def test_sampling_and_processors(tmp_path):
    options = {"do_sample": True, "seed": 3, "temperature": 1.5, "repetition_penalty": 1.3, "max_new_tokens": LENGTH}
    plain = generate(TARGET, DRAFTER, PROMPT, **options)
    assert generate(TARGET, DRAFTER, PROMPT, trace=tmp_path / "run.jsonl", **options).token_ids == plain.token_ids
    (sequence,) = read(tmp_path / "run.jsonl").sequences
    assert sequence.token_ids == plain.token_ids
    assert "RepetitionPenaltyLogitsProcessor" in sequence.begin["settings"]["logits_processors"]
    assert (sequence.begin["settings"]["do_sample"], sequence.begin["settings"]["seed"]) == (True, 3)


def test_a_batch_in_one_file(tmp_path):
    prompts = [PROMPT, [9, 3], [1, 2, 3, 4]]
    results = generate_batch(TARGET, DRAFTER, prompts, max_new_tokens=LENGTH, trace=tmp_path / "run.jsonl.gz")
    sequences = read(tmp_path / "run.jsonl.gz").sequences
    assert [one.number for one in sequences] == [0, 1, 2]
    for sequence, prompt, result in zip(sequences, prompts, results, strict=True):
        assert (sequence.prompt, sequence.token_ids) == (prompt, result.token_ids)
        assert sequence.end["stop_reason"] == result.stop_reason == "length"
    places = [place for place, _ in stream_batch(TARGET, None, prompts, max_new_tokens=3, trace=tmp_path / "two.jsonl")]
    assert len(places) == sum(len(one.iterations) for one in read(tmp_path / "two.jsonl").sequences) == 9


def test_a_full_disk_ends_the_one_whose_trace_it_is(tmp_path, monkeypatch):
    """In a batch the others go on."""
    engine = Engine(TARGET, DRAFTER)
    trace = Trace(tmp_path / "run.jsonl")
    traced_one = engine.submit(engine.request(PROMPT, max_new_tokens=LENGTH, observer=trace.observer()))
    other = engine.submit(engine.request(PROMPT, max_new_tokens=LENGTH))
    engine.step()
    fill_disk(trace, monkeypatch)
    assert other.result().token_ids == greedy(TARGET, PROMPT, LENGTH)
    assert traced_one.status == "failed"
    with pytest.raises(OSError, match=r"run\.jsonl") as raised:
        traced_one.result()
    assert raised.value.errno == errno.ENOSPC


class Breaks:
    """A policy that raises in its third iteration."""

    @hookimpl
    def branch_factor(self, frontier):
        if frontier.iteration == 2:
            raise RuntimeError("a bug")


def test_a_fault_that_a_full_disk_cannot_take_ends_no_other(tmp_path, monkeypatch):
    """The sequence ends with its own error, which has the disk's as a note."""
    engine = Engine(TARGET, DRAFTER)
    trace = Trace(tmp_path / "run.jsonl")
    broken = engine.submit(
        engine.request(
            PROMPT, max_new_tokens=LENGTH, policy=PolicyStack({"breaks": Breaks()}, "breaks"), max_depth=1,
            on_error="raise", observer=trace.observer(),
        )
    )  # fmt: skip
    other = engine.submit(engine.request(PROMPT, max_new_tokens=LENGTH))
    engine.step()
    fill_disk(trace, monkeypatch)
    assert other.result().token_ids == greedy(TARGET, PROMPT, LENGTH)
    with pytest.raises(PolicyError, match="a bug") as raised:
        broken.result()
    assert re.search(r"has failed: OSError: .*No space left on device.*run\.jsonl", "".join(raised.value.__notes__))
    assert raised.value.partial.token_ids == greedy(TARGET, PROMPT, len(raised.value.partial.token_ids))


def fill_disk(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the trace's file takes nothing more."""

    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trace, "_file", Full())


# the terminal


def drawn(sequence: SequenceTrace, texts: dict[int, str], width: int = 100, **options: bool) -> list[str]:
    """The first iteration's lines."""
    return [line.plain for line in tree_lines(sequence.iterations[0], texts, width=width, **options)]


def test_a_tree_in_the_terminal(tmp_path):
    sequence = traced(tmp_path / "run.jsonl", "best_first(nodes=3)+fixed(depth=2)+confidence", max_branch=4)
    texts = {token: f"w{token}" for token in range(37)}
    texts[sequence.iterations[0].nodes["token"][1]] = "\x1b[31m\u202e\ud800\n"
    lines = drawn(sequence, texts)
    nodes = sequence.iterations[0].nodes
    assert lines[0].startswith("iteration 0, ")
    assert "target: " in "\n".join(lines)
    shown = [line for line in lines[2:] if "not drafted" not in line]
    assert len(shown) == sequence.iterations[0].num_drafted
    assert sum("pruned by best_first" in line for line in shown) == len(
        sequence.iterations[0].record["pruned"]["best_first"]
    )
    assert sum("✓" in line for line in shown) == len(sequence.iterations[0].path)
    assert r"\x1b[31m\u202e\ud800\n" in "\n".join(lines)
    assert all(line.isprintable() for line in lines)
    assert all(line.isascii() for line in drawn(sequence, texts, is_ascii=True))
    # each node stands below its parent, two columns further to the right
    depths = [nodes["depth"][n] for n in range(1, sequence.iterations[0].num_drafted + 1)]
    assert sorted(re.search(r"[✓✗✂]", line).start() // 2 for line in shown) == sorted(depths)


def test_narrow_terminals(tmp_path):
    sequence = traced(tmp_path / "run.jsonl", "linear(depth=12)", max_new_tokens=20)
    for width in (10, 40, 200):
        console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None, legacy_windows=False)
        print_iteration(sequence.iterations[0], {}, console)
        lines = console.file.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        assert len([line for line in lines if re.search("[✓✗]", line)]) == sequence.iterations[0].num_drafted


# the file


def test_the_reader_checks_what_the_schema_says(tmp_path):
    """Every keyword that the schema uses is one that the reader knows; each breach is named by line and field."""
    known = {"$schema", "$id", "$defs", "$ref", "title", "description", "oneOf", "type", "const", "enum", "minimum"}
    known |= {"properties", "required", "additionalProperties", "propertyNames", "pattern", "items"}

    def keywords(schema: object) -> set[str]:
        if not isinstance(schema, dict):
            return set()
        inner = [*schema.get("properties", {}).values(), *schema.get("$defs", {}).values()]
        inner += [schema.get(name) for name in ("items", "additionalProperties", "propertyNames")]
        return set(schema).union(*map(keywords, inner))

    assert keywords(json_schema()) <= known
    path = tmp_path / "run.jsonl"
    traced(path)
    lines = path.read_text().splitlines()
    for place, breach, message in [
        (0, {"schema": "dynatree-trace/9"}, "must be a trace of version 1, got version 9"),
        (0, {"schema": "other"}, "must begin with the header"),
        (1, {"num_prompt_tokens": "5"}, "line 2: num_prompt_tokens must be integer, got '5'"),
        (1, {"kind": "beginning"}, "line 2: must be an object whose kind is one of header, begin"),
        (3, {"start": -1}, "line 4: start must be at least 0, got -1"),
        (3, {"start": True}, "line 4: start must be integer, got True"),
        (3, {"sequence": 7}, "line 4: must follow the beginning of its sequence, got sequence 7"),
        (3, {"path": [9000]}, "line 4: path must lead from parent to child"),
        (3, {"wanted": {"token": [], "logprob": []}}, "line 4: wanted.token must have"),
        (3, {"texts": {"x": "a"}}, "line 4: a key of texts must match"),
        (3, {"levels": [{"first": 0}]}, r"line 4: levels\[0\] must have width"),
    ]:
        broken = [*lines]
        broken[place] = json.dumps(json.loads(lines[place]) | breach)
        path.write_text("\n".join(broken) + "\n")
        with pytest.raises(InputError, match=message):
            read(path)
    broken = json.loads(lines[3])
    broken["nodes"]["token"] = broken["nodes"]["token"][:-1]
    path.write_text("\n".join([*lines[:3], json.dumps(broken)]) + "\n")
    with pytest.raises(InputError, match="the columns of nodes must be of one length"):
        read(path)
    path.write_text("\n".join(lines[:3]) + "\nno json\n")
    with pytest.raises(InputError, match="must have a JSON object in line 4"):
        read(path)
    path.write_text("")
    with pytest.raises(InputError, match="got a file without a line"):
        read(path)


@pytest.mark.parametrize("name", ["run.jsonl", "run.jsonl.gz"])
def test_a_trace_that_breaks_off_is_read_up_to_there(tmp_path, name):
    path = tmp_path / name
    whole = traced(path, "linear(depth=2)", max_new_tokens=30)
    data = path.read_bytes()
    found = set()
    ends = [at + 1 for at, byte in enumerate(data) if byte == 10][-2:-1] if path.suffix != ".gz" else []
    for size in [*ends, *range(len(data) // 2, len(data), max(len(data) // 16, 1)), len(data) - 1]:
        path.write_bytes(data[:size])
        part = read(path)
        found.add(part.is_truncated)
        assert part.is_truncated or part.sequences[0].end is None
        assert part.sequences[0].token_ids == whole.token_ids[: len(part.sequences[0].token_ids)]
    assert True in found
    assert found == ({True} if path.suffix == ".gz" else {True, False})  # False: between two lines
    path.write_bytes(b"\x1f\x8bno gzip at all")
    with pytest.raises(InputError, match="must be packed as gzip does"):
        read(path)


def test_private(tmp_path):
    with Trace(tmp_path / "run.jsonl", tokenizer=Spelling(), is_private=True) as trace:
        generate(TARGET, None, PROMPT, max_new_tokens=4, trace=trace)
    begin = read(trace.path).sequences[0].begin
    assert (begin["prompt"], begin["prompt_text"], begin["texts"], begin["num_prompt_tokens"]) == (None, None, None, 5)
    assert read(trace.path).header["is_private"] is True
    assert "<5>" not in trace.path.read_text().splitlines()[1]


class Spelling:
    """Stands in for a tokenizer whose texts are hostile: controls, tags, half of a surrogate pair."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0]

    def decode(self, token_ids: list[int], **_: object) -> str:
        return "".join(f"<{token}>\x00\u2028</script>\ud83d" for token in token_ids)

    def batch_decode(self, sequences: list[list[int]], **_: object) -> list[str]:
        return [self.decode(one) for one in sequences]


def test_hostile_texts_are_data(tmp_path):
    with Trace(tmp_path / "run.jsonl", tokenizer=Spelling()) as trace:
        generate(TARGET, None, PROMPT, max_new_tokens=4, trace=trace)
    found = read(trace.path)
    (sequence,) = found.sequences
    assert trace.path.read_bytes().isascii()
    assert len(trace.path.read_bytes().splitlines()) == 3 + 4 + 1
    text = "".join(iteration.record["text"] for iteration in sequence.iterations) + sequence.end["text"]
    assert text == Spelling().decode(sequence.token_ids)
    assert sequence.begin["prompt_text"] == Spelling().decode(PROMPT)
    assert all(found.texts[token] == Spelling().decode([token]) for token in {*PROMPT, *sequence.token_ids})
    assert len(json.dumps([*map(str, found.texts)])) > 2
    told = [token for line in trace.path.read_text().splitlines() for token in json.loads(line).get("texts") or {}]
    assert len(told) == len(set(told))  # each once


def test_what_was_held_back_comes_at_the_end(tmp_path):
    class Unfinished(Spelling):
        def decode(self, token_ids: list[int], **_: object) -> str:
            return "".join(f"<{token}>" for token in token_ids) + "\ufffd"

    with Trace(tmp_path / "run.jsonl", tokenizer=Unfinished()) as trace:
        generate(TARGET, None, PROMPT, max_new_tokens=4, trace=trace)
    (sequence,) = read(trace.path).sequences
    texts = [iteration.record["text"] for iteration in sequence.iterations]
    assert texts == [f"<{token}>" for token in sequence.token_ids]
    assert sequence.end["text"] == "\ufffd"


def test_a_decoder_that_takes_spaces_away_is_asked_behind_another_token(tmp_path):
    class Stripping(Spelling):
        def decode(self, token_ids: list[int], **_: object) -> str:
            return "".join(f" {token}" for token in token_ids).lstrip()

    with Trace(tmp_path / "run.jsonl", tokenizer=Stripping()) as trace:
        generate(TARGET, None, PROMPT, max_new_tokens=4, trace=trace)
    assert set(read(trace.path).texts.values()) <= {f" {token}" for token in range(37)}


def test_where_a_trace_may_go(tmp_path):
    other, folder = tmp_path / "notes.txt", tmp_path / "closed"
    other.write_text("mine")
    folder.mkdir()
    for path, message in [(other, "which holds something else"), (folder, "goes to a file"), (other / "x", "does not")]:
        with pytest.raises(InputError, match=message):
            generate(TARGET, None, PROMPT, trace=path)
    assert other.read_text() == "mine"
    with pytest.raises(InputError, match=r"trace must be a path or a dynatree_core.trace.Trace, got 7"):
        generate(TARGET, None, PROMPT, trace=7)
    with pytest.raises(InputError, match="tau"):
        generate(TARGET, None, PROMPT, tau=2, trace=tmp_path / "new.jsonl")
    assert not (tmp_path / "new.jsonl").exists()  # nothing was run
    for _ in range(2):  # an earlier trace is replaced
        traced(tmp_path / "run.jsonl")
    generate(TARGET, None, PROMPT, max_new_tokens=0, trace=tmp_path / "empty.jsonl")
    assert read(tmp_path / "empty.jsonl").sequences == []


def test_a_full_disk_ends_the_generation(tmp_path, monkeypatch):
    trace = Trace(tmp_path / "run.jsonl")
    session = Session(TARGET, DRAFTER, PROMPT, max_new_tokens=LENGTH, observer=trace.observer())
    steps = run(session)
    next(steps)
    fill_disk(trace, monkeypatch)
    with pytest.raises(OSError, match=r"No space left on device.*run\.jsonl"):
        list(steps)
    assert session.new_token_ids == greedy(TARGET, PROMPT, LENGTH)[: len(session.new_token_ids)]
    assert session.new_token_ids
    trace.close()  # it was told once


def test_iterations_wait_for_others(tmp_path, monkeypatch):
    """Sixty-four at most, a second at most; `flush` and `close` write them, and with `on_record` none waits."""
    trace, told = Trace(tmp_path / "run.jsonl"), []
    steps = run(Session(TARGET, None, PROMPT, max_new_tokens=90, observer=trace.observer()))
    now = [0.0]
    monkeypatch.setattr(record.time, "monotonic", lambda: now[0])
    written = []
    for _ in itertools.islice(steps, 68):
        written.append(len(read(trace.path).sequences[0].iterations))
    assert written == [0] * 63 + [64] * 5
    trace.flush()
    assert len(read(trace.path).sequences[0].iterations) == 68
    next(steps)
    now[0] = 1.0
    assert len(read(trace.path).sequences[0].iterations) == 68
    next(steps)
    assert len(read(trace.path).sequences[0].iterations) == 70
    next(steps)
    trace.close()
    assert len(read(trace.path).sequences[0].iterations) == 71
    list(steps)
    assert len(read(trace.path).sequences[0].iterations) == 71
    with Trace(None, on_record=told.append) as trace:
        for report in run(Session(TARGET, None, PROMPT, max_new_tokens=4, observer=trace.observer())):
            assert told[-1]["iteration"] == report.iteration


class Rewriting:
    """A policy whose answers and one trace of itself stand in the same memory every time."""

    def __init__(self) -> None:
        self.expands, self.widths = torch.ones(64, dtype=torch.bool), torch.zeros(64, dtype=torch.int64)
        self.keeps, self.asked = torch.ones(64, dtype=torch.bool), []

    @hookimpl
    def should_expand(self, frontier):
        self.expands[: frontier.width] = (torch.arange(frontier.width) + frontier.depth) % 3 != 1
        return self.expands[: frontier.width]

    @hookimpl
    def branch_factor(self, frontier):
        self.asked.append(frontier.iteration)
        self.asked[:-3] = []
        self.widths[: frontier.width] = 1 + (torch.arange(frontier.width) + frontier.iteration) % 3
        return self.widths[: frontier.width]

    @hookimpl
    def keep_nodes(self, tree):
        self.keeps[: tree.num_nodes] = torch.arange(tree.num_nodes) % 5 != self.asked[-1] % 5
        return self.keeps[: tree.num_nodes]


class InOneBuffer(Drafter):
    """Proposes what the target's neighbour would, in the same memory every time."""

    def __str__(self) -> str:
        return "in_one_buffer"

    def start(self, plan):
        class State(DraftState):
            prefill = commit = rollback = lambda *_: None

            def __init__(self) -> None:
                self.token_ids = torch.empty(64, 16, dtype=torch.int64)
                self.logprobs = torch.log_softmax(-torch.arange(16.0), dim=0).repeat(64, 1)

            def propose(self, committed_ids, tree, k):
                width, last = tree.level_sizes[-1], tree.token_ids[tree.last_level]
                self.token_ids[:width, :k] = (last[:, None] + torch.arange(k) + len(committed_ids)) % 37
                self.logprobs[:width] -= 0.01
                return Proposals(self.token_ids[:width, :k], self.logprobs[:width, :k])

        return State()


def test_who_writes_into_its_own_tensors_again_is_told_as_it_was(tmp_path):
    """What was proposed and voted stands in the trace, and not what the same memory has later."""

    class Copies(Everything):
        def on_level(self, level: Level) -> None:
            super().on_level(copy.deepcopy(level))
            self.records[-1].outcomes  # noqa: B018  # computed now

        def on_prune(self, pruning: Pruning) -> None:
            super().on_prune(copy.deepcopy(pruning))

    copies = Copies()
    with Trace(tmp_path / "run.jsonl") as trace:
        session = Session(
            TARGET, InOneBuffer(), PROMPT, policy=PolicyStack({"rewriting": Rewriting()}, "rewriting"), tau=0.0,
            max_depth=3, max_new_tokens=LENGTH, observer=[copies, trace.observer()],
        )  # fmt: skip
        list(run(session))
    (sequence,) = read(trace.path).sequences
    assert sequence.token_ids == greedy(TARGET, PROMPT, LENGTH)
    levels, prunings = copies.of(Level), copies.of(Pruning)
    for iteration in sequence.iterations:
        own = [one for one in levels if one.iteration == iteration.number]
        for level, described in zip(own, iteration.levels, strict=True):
            votes = None if level.branch is None else level.branch.votes["rewriting"].tolist()
            assert (described["branch"] or {}).get("rewriting") == votes
            votes = None if level.expand is None else level.expand.votes["rewriting"].tolist()
            assert (described["expand"] or {}).get("rewriting") == votes
        check_iteration(iteration, [*own, *(one for one in copies.records if number_of(one) == iteration.number)])
    assert any(one.kept is not one.drafted for one in prunings)
    asked = {
        one.number: one.record["policies"]["rewriting"]["asked"][1] for one in sequence.iterations if one.num_drafted
    }
    assert all(numbers[-1] == iteration for iteration, numbers in asked.items())


def number_of(one: object) -> int | None:
    """The iteration of a record, but of levels."""
    if isinstance(one, Pruning | Verification):
        return one.iteration
    return one.report.iteration if isinstance(one, Commit) else None


def break_lines(monkeypatch: pytest.MonkeyPatch, *iterations: int) -> None:
    """These iterations of the sequence 0 cannot be written."""

    def dumps(value):
        is_first = isinstance(value, dict) and (value["kind"], value.get("sequence")) == ("iteration", 0)
        if is_first and value["iteration"] in iterations:
            raise ValueError("out of range")
        return format_dumps(value)

    format_dumps = record.dumps
    monkeypatch.setattr(record, "dumps", dumps)


def test_what_cannot_be_written_loses_nothing_else(tmp_path, monkeypatch):
    """The others that waited are in the file, and the error says which one is not."""
    break_lines(monkeypatch, 3, 5)
    trace = Trace(tmp_path / "run.jsonl", tokenizer=Spelling())
    steps = run(Session(TARGET, None, PROMPT, max_new_tokens=20, observer=trace.observer()))
    for _ in itertools.islice(steps, 8):
        pass
    told = r"iteration 3 of sequence 0 cannot be written and is missing: ValueError: out of range; iteration 5 of"
    with pytest.raises(ValueError, match=told):
        trace.flush()
    trace.close()
    found = read(trace.path)
    assert [one.number for one in found.sequences[0].iterations] == [0, 1, 2, 4, 6, 7]
    assert all(set(one.committed) <= set(found.texts) for one in found.sequences[0].iterations)


def test_what_cannot_be_written_ends_its_own_sequence(tmp_path, monkeypatch):
    """Whoever has it written."""
    break_lines(monkeypatch, 3)
    monkeypatch.setattr(record.time, "monotonic", lambda: 0.0)
    engine, trace = Engine(TARGET), Trace(tmp_path / "run.jsonl")
    requests = [engine.request(PROMPT, max_new_tokens=40, observer=trace.observer()) for _ in range(2)]
    broken, other = [engine.submit(one) for one in requests]
    assert other.result().token_ids == greedy(TARGET, PROMPT, 40)
    with pytest.raises(ValueError, match=r"^iteration 3 of sequence 0 cannot be written") as raised:
        broken.result()
    assert "sequence 1" not in str(raised.value)
    assert broken.num_tokens < 40  # the 64th that waits is the other's 32nd
    trace.close()
    first, second = read(trace.path).sequences
    assert second.token_ids == other.result().token_ids
    assert [one.number for one in first.iterations] == [0, 1, 2, *range(4, broken.num_tokens)]
    assert (first.end["stop_reason"], second.end["stop_reason"]) == ("error", "length")


def test_what_nobody_was_told_of_is_said_at_the_end(tmp_path, monkeypatch):
    break_lines(monkeypatch, 3)
    trace = Trace(tmp_path / "run.jsonl")
    steps = run(Session(TARGET, None, PROMPT, max_new_tokens=20, observer=trace.observer()))
    for _ in itertools.islice(steps, 5):
        pass
    result = generate(TARGET, None, PROMPT, max_new_tokens=5, trace=trace)
    assert result.token_ids == greedy(TARGET, PROMPT, 5)
    with pytest.raises(ValueError, match=r"^iteration 3 of sequence 0 cannot be written"):
        trace.close()
    trace.close()  # it was told once


def test_a_text_is_told_in_a_line_that_is_written(tmp_path, monkeypatch):
    """Also where the token came first in a line that could not be."""
    whole = traced(tmp_path / "whole.jsonl", drafter=None, max_new_tokens=20)
    first = next(  # whose token comes again, and was not in the prompt
        place
        for place, token in enumerate(whole.token_ids)
        if token not in (*PROMPT, *whole.token_ids[:place]) and token in whole.token_ids[place + 1 :]
    )
    break_lines(monkeypatch, first)
    trace = Trace(tmp_path / "run.jsonl", tokenizer=Spelling())
    steps = run(Session(TARGET, None, PROMPT, max_new_tokens=20, observer=trace.observer()))
    for _ in itertools.islice(steps, 19):
        pass
    with pytest.raises(ValueError, match=f"iteration {first} of sequence 0"):
        trace.flush()
    trace.close()
    assert whole.token_ids[first] in read(trace.path).texts


@attrs.define(eq=False, slots=False)
class Keeping:
    """A policy that keeps lists of its own, and has a field only after its first iteration."""

    rows: list[list[int]] = attrs.field(factory=lambda: [[]])
    long: list[int] = attrs.field(factory=lambda: [0] * 65)
    last: int = attrs.field(init=False)

    @hookimpl
    def on_iteration_end(self, report, stack):
        self.last = report.iteration
        self.rows[-1].append(report.iteration)
        if report.iteration == 2:
            del self.long[3:]


def test_fields_are_written_as_they_were(tmp_path):
    """Though they change while the iteration waits: lists in lists, and one that becomes short enough to be written."""
    policy = PolicyStack({"keeping": Keeping()}, "keeping")
    with Trace(tmp_path / "run.jsonl") as trace:
        generate(TARGET, None, PROMPT, policy=policy, max_new_tokens=4, trace=trace)
    (sequence,) = read(trace.path).sequences
    assert sequence.begin["policies"]["keeping"] == {"rows": [[]], "last": None}
    changes = [one.record["policies"]["keeping"] for one in sequence.iterations]
    assert [one["rows"] for one in changes] == [[[[*range(n)]], [[*range(n + 1)]]] for n in range(4)]
    assert [one["last"] for one in changes] == [[None, 0], [0, 1], [1, 2], [2, 3]]
    assert [one.get("long") for one in changes] == [None, None, [None, [0] * 3], None]


def test_what_a_full_disk_has_lost_is_said(tmp_path, monkeypatch):
    trace = Trace(tmp_path / "run.jsonl")
    steps = run(Session(TARGET, None, PROMPT, max_new_tokens=20, observer=trace.observer()))
    for _ in itertools.islice(steps, 4):
        pass
    fill_disk(trace, monkeypatch)
    with pytest.raises(OSError, match=r"iterations 0 to 3 of sequence 0 had still to be written") as raised:
        trace.flush()
    assert raised.value.errno == errno.ENOSPC


def test_generations_that_alternate_are_written_in_their_order(tmp_path):
    with Trace(tmp_path / "run.jsonl") as trace:
        pair = [
            run(Session(TARGET, DRAFTER, one, max_new_tokens=LENGTH, observer=trace.observer()))
            for one in (PROMPT, [9])
        ]
        for _ in zip(*pair, strict=False):
            pass
        for steps in pair:
            list(steps)
    for sequence, prompt in zip(read(trace.path).sequences, (PROMPT, [9]), strict=True):
        assert sequence.token_ids == greedy(TARGET, prompt, LENGTH)


def test_an_interrupted_generation_goes_on_in_its_sequence(tmp_path):
    with Trace(tmp_path / "run.jsonl") as trace:
        observer = trace.observer()
        session = Session(TARGET, DRAFTER, PROMPT, max_new_tokens=LENGTH, observer=observer)
        steps = run(session)
        next(steps)
        steps.close()
        assert read(trace.path).sequences[0].end["stop_reason"] == "interrupted"
        list(run(session))
        generate(TARGET, DRAFTER, PROMPT, max_new_tokens=3, observer=observer)
    first, second = read(trace.path).sequences
    assert first.token_ids == greedy(TARGET, PROMPT, LENGTH)
    assert [one.number for one in first.iterations] == [*range(len(first.iterations))]
    assert (first.end["stop_reason"], len(first.prefills), second.token_ids) == ("length", 2, first.token_ids[:3])


def test_tokens_from_the_prefix_cache(tmp_path):
    cache = PrefixCache()
    generate(TARGET, None, PROMPT, max_new_tokens=3, prefix_cache=cache)
    sequence = traced(tmp_path / "run.jsonl", prefix_cache=cache)
    assert sequence.prefills[0]["num_reused_tokens"] == sequence.end["report"]["num_reused_tokens"] == 4


@given(st.lists(st.floats(width=32)))
def test_float32_numbers_are_exact(values):
    for value, found in zip(values, json.loads(float_list(values)), strict=True):
        assert (found is None) == (not math.isfinite(value))
        assert found is None or torch.tensor(found, dtype=torch.float32) == torch.tensor(value)


@given(st.lists(st.integers()))
def test_whole_numbers_are_written_as_json_writes_them(values):
    assert int_list(values) == json.dumps(values, separators=(",", ":"))


def test_sequences_of_an_engine_may_share_an_observer(tmp_path):
    prompts = [PROMPT, [9, 3], [1, 2, 3, 4]]
    engine = Engine(TARGET, DRAFTER, max_sequences=2)
    engine.submit(engine.request(PROMPT, max_new_tokens=1)).result()  # not watched, so the numbers differ
    with Trace(tmp_path / "run.jsonl") as trace:
        observer = trace.observer()
        handles = [engine.submit(engine.request(one, max_new_tokens=6, observer=observer)) for one in prompts]
        results = [handle.result() for handle in handles]
        generate(TARGET, DRAFTER, PROMPT, max_new_tokens=2, observer=observer)
    *sequences, last = read(trace.path).sequences
    assert [one.number for one in sequences] == [0, 1, 2]
    assert [one.prompt for one in sequences] == prompts
    assert [one.token_ids for one in sequences] == [one.token_ids for one in results]
    assert last.token_ids == results[0].token_ids[:2]


def test_sequences_of_an_engine_are_forgotten_however_they_end(tmp_path, monkeypatch):
    """By an error, by a cancellation, and where the last line cannot be written."""
    break_lines(monkeypatch, 0)
    engine, observer = Engine(TARGET, DRAFTER), Trace(tmp_path / "run.jsonl").observer()
    engine.submit(engine.request(PROMPT, max_new_tokens=1)).result()  # its number is that of sessions
    breaks, left = PolicyStack({"breaks": Breaks()}, "breaks"), []
    for options in ({"max_new_tokens": 1}, {"policy": breaks, "max_depth": 1, "on_error": "raise"}, {}):
        handle = engine.submit(engine.request(PROMPT, observer=observer, **{"max_new_tokens": LENGTH, **options}))
        engine.step()
        if not options:
            engine.cancel(handle)
        while not handle.is_done:
            engine.step()
        assert handle.status == ("failed" if options else "cancelled")
        left.append([*observer._generations])
    assert left == [[], [], []]
