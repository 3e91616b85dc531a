"""Many sequences at once: each output is that of the sequence alone, and what goes wrong stays with its sequence."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from batch_cases import check_batch, random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor, StoppingCriteria

from dynatree_core import Engine, Observer, generate, generate_batch, hookimpl, stream_batch
from dynatree_core.engine.lane import Lane
from dynatree_core.errors import (
    BatchError,
    ContextLimitError,
    NonFiniteLogitsError,
    OutOfMemoryError,
    ParameterError,
    PolicyError,
    PromptError,
    QueueFullError,
)
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import greedy, perturbed, reference, tiny_model

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3], [2]]


def run_dry(engine: Engine) -> None:
    while engine.load.num_running or engine.load.num_waiting:
        engine.step()


def test_a_batch_gives_what_each_prompt_gives_alone():
    target, drafter = tiny_model("llama"), perturbed("llama")
    results = generate_batch(target, drafter, PROMPTS, max_new_tokens=12, eos_token_id=[])
    assert [result.token_ids for result in results] == [greedy(target, prompt, 12) for prompt in PROMPTS]
    assert {result.stop_reason for result in results} == {"length"}


def test_each_prompt_may_have_options_of_its_own():
    target = tiny_model("llama")
    each = [{"max_new_tokens": 3}, {"policy": "fixed"}, {"do_sample": True, "seed": 5}, {"repetition_penalty": 1.5}]
    results = generate_batch(target, "prompt_lookup", PROMPTS, each=each, max_new_tokens=9, eos_token_id=[])
    assert [result.token_ids for result in results] == [
        reference(target, PROMPTS[0], 3),
        reference(target, PROMPTS[1], 9),
        reference(target, PROMPTS[2], 9, do_sample=True, seed=5),
        reference(target, PROMPTS[3], 9, repetition_penalty=1.5),
    ]


def test_a_tokenizers_padded_prompts_are_taken_as_they_are():
    target = tiny_model("llama")
    padded = {
        "input_ids": torch.tensor([[0, 0, 9, 2, 6], [3, 1, 4, 1, 5]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    }
    results = generate_batch(target, None, padded, max_new_tokens=6, eos_token_id=[])
    assert [result.token_ids for result in results] == [greedy(target, prompt, 6) for prompt in ([9, 2, 6], PROMPTS[0])]


def test_a_stream_of_a_batch_tells_whose_tokens_they_are():
    target = tiny_model("llama")
    texts: dict[int, list[int]] = {place: [] for place in range(len(PROMPTS))}
    order = []
    for place, report in stream_batch(target, perturbed("llama"), PROMPTS, max_new_tokens=10, eos_token_id=[]):
        texts[place] += report.token_ids
        order.append(place)
    assert list(texts.values()) == [greedy(target, prompt, 10) for prompt in PROMPTS]
    assert order[: len(PROMPTS)] == [0, 1, 2, 3], "all take part in each iteration"


def test_no_prompts_give_no_results():
    assert generate_batch(tiny_model("llama"), None, []) == []
    assert list(stream_batch(tiny_model("llama"), None, [])) == []


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([[1], []], {}, PromptError, "prompt 1: "),
        ([[1]], {"each": []}, ParameterError, "a mapping of options for each of the 1 prompts, got 0"),
        ([[1]], {"each": [None]}, ParameterError, "prompt 0: its options must be a mapping, got a NoneType"),
        ([[1]], {"each": {"seed": 1}}, ParameterError, "of the 1 prompts, got a dict; give a list of mappings"),
        ([[1]], {"on_prefill": 5}, ParameterError, "prompt 0: on_prefill must be something to call"),
        ([[1]], {"each": [{"runner": "eager"}]}, ParameterError, "prompt 0: runner must be the same for all"),
        ([[1]], {"max_sequences": 0}, ParameterError, "max_sequences must be an integer of at least 1"),
        ("text", {}, PromptError, "prompts must be a list of prompts, got a str"),
        ({"input_ids": [[1]]}, {}, PromptError, "input_ids \\[prompts, tokens\\], got a list"),
        ([[1], [1] * 200], {}, ContextLimitError, "prompt 1: "),
    ],
)
def test_batches_that_cannot_be_used_are_refused_before_anything_runs(prompts, options, error, message, monkeypatch):
    monkeypatch.setattr(Engine, "step", pytest.fail)
    with pytest.raises(error, match=message):
        generate_batch(tiny_model("llama"), None, prompts, **options)


def test_requests_wait_in_their_order_and_the_line_has_an_end():
    engine = Engine(tiny_model("llama"), max_sequences=2, max_waiting=1)
    handles = [engine.submit(PROMPTS[0], max_new_tokens=4) for _ in range(3)]
    with pytest.raises(QueueFullError, match="room for 2 running and 1 waiting"):
        engine.submit(PROMPTS[0])
    assert [handle.status for handle in handles] == ["waiting"] * 3
    engine.step()
    assert [handle.status for handle in handles] == ["running", "running", "waiting"]
    assert (engine.load.num_running, engine.load.num_waiting) == (2, 1)
    run_dry(engine)
    assert [handle.status for handle in handles] == ["stopped"] * 3
    assert handles[2].started_at >= handles[0].ended_at
    assert engine.step() == []


def test_a_sequence_has_its_room_at_every_moment_until_it_ends(monkeypatch):
    """Others may submit from any thread while a step is made, so also while it starts a sequence."""
    moments = []

    def ask(moment):
        load = engine.load
        moments.append((moment, load.num_waiting + load.num_running))
        with pytest.raises(QueueFullError):
            engine.submit(PROMPTS[1])

    class Asking(Observer):
        def on_prefill(self, prefill):
            ask("prefill")

        def on_commit(self, commit):
            ask("commit")

        def on_end(self, end):
            ask("end")

    def starting(*arguments, **options):
        lane = Lane(*arguments, **options)
        ask("start")
        return lane

    monkeypatch.setattr("dynatree_core.engine.scheduler.Lane", starting)
    engine = Engine(tiny_model("llama"), "prompt_lookup", max_sequences=1, max_waiting=0)
    handle = engine.submit(PROMPTS[0], max_new_tokens=4, eos_token_id=[], observer=Asking())
    run_dry(engine)
    assert handle.result().token_ids == greedy(engine.target, PROMPTS[0], 4)
    assert {moment for moment, _ in moments} == {"start", "prefill", "commit", "end"}
    assert {number for _, number in moments} == {1}
    assert engine.submit(PROMPTS[1], max_new_tokens=1).result().token_ids == greedy(engine.target, PROMPTS[1], 1)


def test_a_request_that_found_no_room_may_be_submitted_later():
    engine = Engine(tiny_model("llama"), max_sequences=1, max_waiting=0)
    request = engine.request(PROMPTS[0], max_new_tokens=4, eos_token_id=[])
    engine.submit(PROMPTS[1], max_new_tokens=1)
    with pytest.raises(QueueFullError):
        engine.submit(request)
    run_dry(engine)
    assert engine.submit(request).result().token_ids == greedy(engine.target, PROMPTS[0], 4)
    with pytest.raises(ParameterError, match="submitted before"):
        engine.submit(request)


def test_of_several_requests_all_are_taken_or_none():
    engine = Engine(tiny_model("llama"), max_sequences=1, max_waiting=1)
    requests = [engine.request(prompt, max_new_tokens=4, eos_token_id=[]) for prompt in PROMPTS[:3]]
    with pytest.raises(QueueFullError, match="got 3 more where 2 fit"):
        engine.submit_all(requests)
    assert (engine.load.num_waiting, engine.load.num_running) == (0, 0)
    with pytest.raises(ParameterError, match="good for one sequence"):
        engine.submit_all([requests[0], requests[0]])
    with pytest.raises(ParameterError, match=r"must be made by Engine\.request, got list"):
        engine.submit_all([PROMPTS[0]])
    handles = engine.submit_all(requests[:2])
    with pytest.raises(ParameterError, match="submitted before"):
        engine.submit_all(requests[1:])
    assert [handle.result().token_ids for handle in handles] == [greedy(engine.target, p, 4) for p in PROMPTS[:2]]
    (last,) = engine.submit_all(requests[2:])
    assert (last.number, last.result().token_ids) == (2, greedy(engine.target, PROMPTS[2], 4))
    assert engine.submit_all([]) == []


def test_a_handle_says_when_what_came():
    ticks = iter(range(10**6))
    engine = Engine(tiny_model("llama"), "prompt_lookup", now=lambda: float(next(ticks)))
    heard = []
    handle = engine.submit(PROMPTS[0], max_new_tokens=5, eos_token_id=[], on_report=lambda *of: heard.append(of))
    assert (handle.stop_reason, handle.num_tokens, handle.first_token_at, handle.is_done) == (None, 0, None, False)
    assert handle.partial.token_ids == []
    kinds = [event.kind for event in engine.step()]
    assert kinds == ["started", "prefilled", "tokens"]
    taken = handle.new_tokens()
    assert taken == handle.token_ids == handle.partial.token_ids
    assert handle.new_tokens() == []
    result = handle.result()
    assert taken + handle.new_tokens() == result.token_ids == greedy(engine.target, PROMPTS[0], 5)
    assert handle.submitted_at < handle.started_at < handle.first_token_at <= handle.token_times[-1] < handle.ended_at
    assert len(handle.token_times) == 5
    assert [of[0] for of in heard] == [handle] * len(heard)
    assert [token for _, report in heard for token in report.token_ids] == result.token_ids


def test_reports_of_a_handle_have_the_engine_go_on():
    engine = Engine(tiny_model("llama"), "prompt_lookup")
    beside = engine.submit(PROMPTS[1], max_new_tokens=40, eos_token_id=[])
    handle = engine.submit(PROMPTS[0], max_new_tokens=9, eos_token_id=[])
    tokens = [token for report in handle.reports() for token in report.token_ids]
    assert tokens == greedy(engine.target, PROMPTS[0], 9)
    assert not beside.is_done
    assert beside.num_tokens > 0


def test_a_cancelled_sequence_is_gone_and_the_others_do_not_notice():
    engine = Engine(tiny_model("llama"), "prompt_lookup", max_sequences=2)
    running, other, waiting = (engine.submit(prompt, max_new_tokens=9, eos_token_id=[]) for prompt in PROMPTS[:3])
    engine.step()
    lane = running._lane
    engine.cancel(running)
    engine.cancel(waiting)
    assert (running.status, waiting.status, engine.load.num_running) == ("cancelled", "cancelled", 1)
    assert running.result().stop_reason == waiting.result().stop_reason == "cancelled"
    assert running.result().token_ids == greedy(engine.target, PROMPTS[0], 9)[: running.num_tokens]
    assert waiting.result().token_ids == []
    last = engine.submit(PROMPTS[3], max_new_tokens=9, eos_token_id=[])
    engine.step()
    assert last._lane.cache is lane.cache, "its memory is there for the next one"
    run_dry(engine)
    assert other.result().token_ids == greedy(engine.target, PROMPTS[1], 9)
    assert last.result().token_ids == greedy(engine.target, PROMPTS[3], 9)
    engine.cancel(other)
    assert other.status == "stopped"


def test_a_callback_may_cancel_but_not_make_a_step():
    engine = Engine(tiny_model("llama"), max_sequences=2)
    handle = engine.submit(PROMPTS[0], on_report=lambda handle, _: engine.cancel(handle))
    impatient = engine.submit(PROMPTS[1], on_report=lambda handle, _: handle.result())
    events = engine.step()
    assert [(event.handle.number, event.kind) for event in events][-3:] == [
        (1, "tokens"),
        (1, "failed"),
        (0, "cancelled"),
    ]
    assert handle.result().num_tokens == 1 if hasattr(handle.result(), "num_tokens") else handle.num_tokens == 1
    with pytest.raises(ParameterError, match="cannot be made inside of another one"):
        impatient.result()


class Raising:
    """A policy, a processor, a criterion and a callback that fail at their third call."""

    def __init__(self) -> None:
        self.calls = 0

    def fail(self) -> None:
        self.calls += 1
        if self.calls == 3:
            raise ZeroDivisionError("third call")


class RaisingPolicy(Raising):
    @hookimpl
    def branch_factor(self, frontier: object) -> int:
        self.fail()
        return 1


class RaisingProcessor(Raising, LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.fail()
        return scores


class RaisingCriterion(Raising, StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self.fail()
        return torch.tensor([False])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"policy": RaisingPolicy()}, PolicyError),
        ({"logits_processor": [RaisingProcessor()]}, ZeroDivisionError),
        ({"stopping_criteria": [RaisingCriterion()]}, ZeroDivisionError),
        ({"on_prefill": lambda *_: 1 / 0}, ZeroDivisionError),
    ],
)
def test_what_fails_ends_its_own_sequence_only(options, error):
    target = tiny_model("llama")
    each = [{}, options, {}, {}]
    with pytest.raises(BatchError, match="1 of 4 sequences failed, the first of them prompt 1") as caught:
        generate_batch(target, perturbed("llama"), PROMPTS, each=each, max_new_tokens=12, eos_token_id=[])
    assert {place: type(fault) for place, fault in caught.value.errors.items()} == {1: error}
    for place, (prompt, result) in enumerate(zip(PROMPTS, caught.value.results, strict=True)):
        expected = greedy(target, prompt, 12)
        assert result.token_ids == (expected[: len(result.token_ids)] if place == 1 else expected)
        assert result.stop_reason == ("error" if place == 1 else "length")
    for again in (pickle.loads(pickle.dumps(caught.value)), copy.deepcopy(caught.value)):  # as from a pool of processes
        assert str(again) == str(caught.value)
        assert again.errors.keys() == {1}
        assert [result.token_ids for result in again.results] == [one.token_ids for one in caught.value.results]


def test_processors_for_all_prompts_are_copied_for_each():
    class EveryOther(LogitsProcessor):
        """Wants token 7 at every other call."""

        calls = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            scores[:, 7] += 1000.0 * (self.calls % 2)
            return scores

    options = {"max_new_tokens": 8, "eos_token_id": []}
    target, given_to_all = tiny_model("llama"), EveryOther()
    results = generate_batch(target, "prompt_lookup", PROMPTS, logits_processor=[given_to_all], **options)
    assert given_to_all.calls == 0
    for prompt, result in zip(PROMPTS, results, strict=True):
        alone = generate(target, "prompt_lookup", prompt, logits_processor=[EveryOther()], **options)
        assert result.token_ids == alone.token_ids


def test_processors_that_cannot_be_copied_are_to_be_given_one_by_one():
    class Locked(LogitsProcessor):
        def __init__(self) -> None:
            self.lock = threading.Lock()

    with pytest.raises(ParameterError, match="prompt 0: logits_processor for all prompts must be copyable"):
        generate_batch(tiny_model("llama"), None, PROMPTS, logits_processor=[Locked()])


def test_sampling_without_a_seed_follows_torchs_generator_and_differs_between_prompts():
    options = {"do_sample": True, "max_new_tokens": 20, "eos_token_id": []}
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        results = generate_batch(tiny_model("llama"), None, [PROMPTS[0]] * 2, **options)
        texts.append([result.token_ids for result in results])
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_sampling_without_a_seed_is_as_if_each_had_its_own():
    """A step that one sequence has to do again takes back its own random numbers only."""
    options = {"do_sample": True, "max_new_tokens": 12, "eos_token_id": []}
    target = tiny_model("llama")
    torch.manual_seed(3)
    together = generate_batch(target, "prompt_lookup", PROMPTS, **options)
    torch.manual_seed(3)
    assert together[1].token_ids == generate_batch(target, None, PROMPTS, **options)[1].token_ids
    torch.manual_seed(3)
    first_two = generate_batch(target, None, PROMPTS[:2], **options)
    assert [result.token_ids for result in first_two] == [result.token_ids for result in together[:2]]


class Rows:
    """The rows of each pass of a model, by what calls it."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.hook = model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, model: Any, given: Any, named: Any) -> None:
        self.shapes.append(tuple(named["input_ids"].shape))


def test_an_iteration_is_one_pass_of_the_target():
    target = copy.deepcopy(tiny_model("llama"))
    engine = Engine(target, "prompt_lookup", trust_model=True)
    handles = [engine.submit(prompt, max_new_tokens=9, eos_token_id=[]) for prompt in PROMPTS[:3]]
    engine.step()
    rows = Rows(target)
    engine.step()
    rows.hook.remove()
    assert [lanes for lanes, _ in rows.shapes] == [3]
    assert all(handle.num_tokens >= 2 for handle in handles)


def test_a_level_of_all_trees_is_one_pass():
    drafter = copy.deepcopy(perturbed("llama"))
    target = tiny_model("llama")
    engine = Engine(target, drafter, trust_model=True)
    options = {"policy": "linear(depth=3)", "max_new_tokens": 20, "eos_token_id": [], "tau": 0.0}
    handles = [engine.submit(prompt, **options) for prompt in PROMPTS[:3]]
    engine.step()
    rows = Rows(drafter)
    engine.step()
    rows.hook.remove()
    assert [lanes for lanes, _ in rows.shapes] == [3, 3, 3]
    run_dry(engine)
    assert [handle.result().token_ids for handle in handles] == [greedy(target, p, 20) for p in PROMPTS[:3]]


def test_passes_of_one_shape_are_not_shared():
    target = copy.deepcopy(tiny_model("llama"))
    engine = Engine(target, "prompt_lookup", trust_model=True)
    fixed = {"exact": "fixed_width", "max_nodes": 3}
    handles = [
        engine.submit(p, max_new_tokens=9, eos_token_id=[], **(fixed if p in PROMPTS[1:3] else {})) for p in PROMPTS
    ]
    engine.step()
    rows = Rows(target)
    engine.step()
    rows.hook.remove()
    assert rows.shapes.count((1, 4)) == 2
    assert [lanes for lanes, _ in rows.shapes if lanes > 1] == [2]
    run_dry(engine)
    assert [handle.result().token_ids for handle in handles] == [greedy(target, prompt, 9) for prompt in PROMPTS]


def test_nan_in_one_lane_stays_there():
    """A token that overflows the target's embedding: whose prompt has it ends, and nobody else notices."""
    target = copy.deepcopy(tiny_model("llama"))
    with torch.no_grad():
        target.model.embed_tokens.weight[30] = torch.nan
    prompts = [PROMPTS[0], [30, 2, 6], PROMPTS[2]]
    with pytest.raises(BatchError) as caught:
        generate_batch(target, "prompt_lookup", prompts, max_new_tokens=9, eos_token_id=[], trust_model=True)
    assert {place: type(fault) for place, fault in caught.value.errors.items()} == {1: NonFiniteLogitsError}
    expected = [greedy(target, prompt, 9) for prompt in (PROMPTS[0], PROMPTS[2])]
    assert [caught.value.results[place].token_ids for place in (0, 2)] == expected


def test_observers_hear_whose_iteration_it_is():
    class Noting(Observer):
        def __init__(self) -> None:
            self.heard: list[tuple[str, int]] = []

        def on_commit(self, commit: Any) -> None:
            self.heard.append(("commit", commit.sequence))

        def on_level(self, level: Any) -> None:
            self.heard.append(("level", level.sequence))

    observer = Noting()
    generate_batch(tiny_model("llama"), "prompt_lookup", PROMPTS[:3], max_new_tokens=4, observer=observer)
    for kind in ("commit", "level"):
        assert {sequence for heard, sequence in observer.heard if heard == kind} == {0, 1, 2}


def test_who_is_put_back_when_memory_is_short_goes_on_later_as_if_nothing_had_been(monkeypatch):
    monkeypatch.setattr("dynatree_core.engine.resources.SLOT_BLOCK", 8)
    target = tiny_model("llama")
    row_bytes = 2 * 2 * 2 * 8 * 8  # layers, keys and values, heads, head_dim, float64
    logits = 5 * 40 * 8
    engine = Engine(target, perturbed("llama"), max_bytes=150 * row_bytes + 2 * logits, max_sequences=4)
    options = {"max_new_tokens": 30, "eos_token_id": [], "max_nodes": 4}
    handles = [engine.submit(prompt, **options) for prompt in PROMPTS]
    sampled = engine.submit(PROMPTS[2], do_sample=True, seed=4, **options)
    most, events = 0, []
    while not all(handle.is_done for handle in (*handles, sampled)):
        events += engine.step()
        assert all(handle.partial.token_ids == handle.token_ids for handle in handles), "nothing is generated twice"
        most = max(most, sum(one.lane.cache.num_bytes for one in engine._scheduler._running))
    assert [handle.result().token_ids for handle in handles] == [greedy(target, prompt, 30) for prompt in PROMPTS]
    assert sampled.result().token_ids == reference(target, PROMPTS[2], 30, do_sample=True, seed=4)
    preempted = [event.handle.number for event in events if event.kind == "preempted"]
    assert engine.load.num_preempted == len(preempted) > 0
    assert 0 not in preempted, "the oldest goes on"
    assert most <= engine.max_bytes


def test_a_sequence_that_does_not_fit_alone_fails_and_the_next_runs(monkeypatch):
    monkeypatch.setattr("dynatree_core.engine.resources.SLOT_BLOCK", 8)
    engine = Engine(tiny_model("llama"), None, max_bytes=40 * 512 + 320)  # 40 rows, and logits of one
    long = engine.submit([1] * 60, max_new_tokens=4, max_nodes=0)
    short = engine.submit(PROMPTS[0], max_new_tokens=4, max_nodes=0, eos_token_id=[])
    assert short.result().token_ids == greedy(engine.target, PROMPTS[0], 4)
    with pytest.raises(OutOfMemoryError, match="must fit into max_bytes=20800"):
        long.result()


def test_out_of_memory_ends_the_step_and_not_the_engine():
    """No memory for passes of more than two rows: one sequence after the other has to wait."""
    target = copy.deepcopy(tiny_model("llama"))
    engine = Engine(target, None, trust_model=True)
    handles = [engine.submit(prompt, max_new_tokens=8, eos_token_id=[]) for prompt in PROMPTS]
    engine.step()
    state = {"is_short": True}

    def allocate(_: Any, given: Any, named: Any) -> None:
        if state["is_short"] and named["input_ids"].numel() <= 4:
            raise torch.OutOfMemoryError("of a test")

    target.register_forward_pre_hook(allocate, with_kwargs=True)
    kinds = [event.kind for event in engine.step()]
    assert kinds == ["preempted"]
    state["is_short"] = False
    run_dry(engine)
    assert [handle.result().token_ids for handle in handles] == [greedy(target, prompt, 8) for prompt in PROMPTS]


def test_a_sequence_may_be_cancelled_while_it_waits_again(monkeypatch):
    engine = Engine(tiny_model("llama"), None)
    handles = [engine.submit(prompt, max_new_tokens=8, eos_token_id=[]) for prompt in PROMPTS[:2]]
    engine.step()
    engine._scheduler._put_back()
    assert (engine.load.num_waiting, engine.load.num_running) == (1, 1)
    assert handles[1].partial.token_ids == handles[1].token_ids
    engine.cancel(handles[1])
    assert handles[1].result().token_ids == greedy(engine.target, PROMPTS[1], 8)[:1]
    assert handles[0].result().token_ids == greedy(engine.target, PROMPTS[0], 8)


def test_a_request_is_good_for_one_sequence():
    engine = Engine(tiny_model("llama"))
    request = engine.request(PROMPTS[0], max_new_tokens=3, eos_token_id=[])
    assert engine.submit(request).result().token_ids == greedy(engine.target, PROMPTS[0], 3)
    with pytest.raises(ParameterError, match="good for one sequence"):
        engine.submit(request)
    with pytest.raises(ParameterError, match="a request says everything already, got max_new_tokens beside it"):
        engine.submit(engine.request(PROMPTS[0]), max_new_tokens=3)


def test_a_long_prompt_does_not_stop_the_others(monkeypatch):
    monkeypatch.setattr("dynatree_core.runners.passes.PREFILL_CHUNK", 4)
    monkeypatch.setattr("dynatree_core.engine.scheduler.PREFILL_CHUNK", 4)
    engine = Engine(tiny_model("llama"))
    short = engine.submit(PROMPTS[1], max_new_tokens=20, eos_token_id=[])
    engine.step()
    prompt = [i % 37 for i in range(30)]
    long = engine.submit(prompt, max_new_tokens=2, eos_token_id=[])
    while long.num_tokens == 0:
        before = short.num_tokens
        events = engine.step()
        assert sum(event.num_tokens for event in events if event.kind == "prefilled") <= 4
        assert short.num_tokens == before + 1
    assert engine.load.longest_pause_seconds > 0
    assert long.result().token_ids == greedy(engine.target, prompt, 2)


def test_ctrl_c_leaves_an_engine_that_goes_on():
    engine = Engine(tiny_model("llama"), "prompt_lookup")
    times = iter([False, True])

    def interrupt(*_: object) -> None:
        if next(times, False):
            raise KeyboardInterrupt

    handles = [engine.submit(p, max_new_tokens=12, eos_token_id=[], on_report=interrupt) for p in PROMPTS[:2]]
    with pytest.raises(KeyboardInterrupt):
        run_dry(engine)
    run_dry(engine)
    assert [handle.result().token_ids for handle in handles] == [greedy(engine.target, p, 12) for p in PROMPTS[:2]]


def test_ctrl_c_within_a_step_leaves_an_engine_that_goes_on():
    """It comes when the target has been asked, so that rows are in the caches that nobody has decided about."""

    class Interrupting(Observer):
        calls = 0

        def on_verify(self, verification: Any) -> None:
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt

    engine = Engine(tiny_model("llama"), perturbed("llama"))
    options = {"max_new_tokens": 12, "eos_token_id": []}
    handles = [engine.submit(PROMPTS[0], **options), engine.submit(PROMPTS[1], observer=Interrupting(), **options)]
    with pytest.raises(KeyboardInterrupt):
        run_dry(engine)
    run_dry(engine)
    assert [handle.result().token_ids for handle in handles] == [greedy(engine.target, p, 12) for p in PROMPTS[:2]]


def test_other_threads_submit_wait_and_cancel_while_one_makes_the_steps():
    engine = Engine(tiny_model("llama"), "prompt_lookup", max_sequences=3)
    is_over = threading.Event()

    def drive() -> None:
        while not is_over.is_set() or engine.load.num_running or engine.load.num_waiting:
            engine.step()

    found: dict[int, list[int]] = {}

    def ask(place: int) -> None:
        handle = engine.submit(PROMPTS[place % 4], max_new_tokens=8 + place, eos_token_id=[])
        if place == 5:
            engine.cancel(handle)
        assert handle.wait(60)
        found[place] = handle.result().token_ids

    driver = threading.Thread(target=drive)
    askers = [threading.Thread(target=ask, args=(place,)) for place in range(8)]
    for thread in (driver, *askers):
        thread.start()
    for thread in askers:
        thread.join()
    is_over.set()
    driver.join()
    for place in set(range(8)) - {5}:
        assert found[place] == greedy(engine.target, PROMPTS[place % 4], 8 + place)
    assert found[5] == greedy(engine.target, PROMPTS[1], 13)[: len(found[5])]


@pytest.mark.parametrize("seed", range(12))
def test_random_batches_that_make_fuzz_tries_too(seed):
    check_batch(random_batch(seed))


requests = st.tuples(ours.prompts, st.integers(0, 12), ours.stacks(), st.integers(0, 6))


@settings(max_examples=25)
@given(st.data(), st.lists(requests, min_size=1, max_size=6), ours.families, ours.model_seeds, st.integers(1, 4))
def test_whenever_they_come_and_go_each_output_is_that_of_the_prompt_alone(data, asked, family, seed, max_sequences):
    target = tiny_model(family, seed)
    engine = Engine(target, data.draw(ours.drafters(family, seed)), max_sequences=max_sequences)
    cancelled_at = data.draw(st.dictionaries(st.integers(0, 5), st.integers(0, 12), max_size=2))
    handles = {}
    for step in range(200):
        for place, (prompt, num_tokens, policy, arrives_at) in enumerate(asked):
            if arrives_at == step:
                handles[place] = engine.submit(prompt, policy=policy, max_new_tokens=num_tokens, eos_token_id=[])
            if cancelled_at.get(place) == step and place in handles:
                engine.cancel(handles[place])
        engine.step()
        if step > 6 and all(handle.is_done for handle in handles.values()):
            break
    for place, (prompt, num_tokens, _, _) in enumerate(asked):
        result, expected = handles[place].result(), greedy(target, prompt, num_tokens)
        if result.stop_reason == "cancelled":
            assert place in cancelled_at
            expected = expected[: len(result.token_ids)]
        assert result.token_ids == expected
    assert (engine.load.num_running, engine.load.num_waiting) == (0, 0)
