"""Traces: what was told stands in the file, the file is checked, and nothing in it changes a generation."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_observer import DRAFTER, PROMPT, TARGET, Fails, Recorder

from dynatree_core import Engine, Session, generate, generate_batch, run, stream_batch
from dynatree_core.drafters.union import UnionDrafter
from dynatree_core.engine.observer import Commit, Feedback, Level, Outcome, Pruning, Verification
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import greedy
from dynatree_core.trace import SequenceTrace, Trace, read
from dynatree_core.trace.format import OUTCOMES

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
    logprobs = verification.logits.float().log_softmax(dim=-1)
    at = dict(zip(pruning.kept.draft_index.tolist(), range(pruning.kept.num_nodes), strict=True))
    wanted = iteration.record["wanted"]
    for node, (token, logprob) in enumerate(zip(wanted["token"], wanted["logprob"], strict=True)):
        if node not in at:
            assert (token, logprob) == (None, None)
            continue
        assert token == int(logprobs[at[node]].argmax())
        assert logprob == pytest.approx(float(logprobs[at[node]].max()), rel=1e-6)
    chosen = [logprobs[at[n], token] for n, token in zip([0, *iteration.path], iteration.committed, strict=False)]
    assert iteration.record["committed_logprob"] == pytest.approx([float(one) for one in chosen], rel=1e-6)


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


def fill_disk(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the trace's file takes nothing more."""

    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trace, "_file", Full())
