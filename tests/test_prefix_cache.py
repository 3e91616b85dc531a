"""The prefix cache saves passes and changes nothing: outputs, rows, its bound, and what is never mixed."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from dynatree_core import Engine, PrefixCache, Session, generate, ops, run, stream
from dynatree_core.cache import TreeCache
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.errors import DrafterError, ForwardPassError, ParameterError
from dynatree_core.models.architectures import cache_argument
from dynatree_core.runners import passes
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import greedy, perturbed, reference, tiny_model

TARGET, DRAFTER = tiny_model("llama"), perturbed("llama")
PROMPT = [1, 2, 3, 4, 5]


def buffers_of(cache: PrefixCache) -> list[torch.Tensor]:
    return [buffer for entry in cache._entries for buffer in (entry.token_ids, *entry.keys, *entry.values)]


def storages(buffers) -> set[int]:
    return {buffer.untyped_storage().data_ptr() for buffer in buffers}


def check_rows(cache: PrefixCache) -> None:
    """What is kept is within the bound, and is what the model says about that text in one plain pass."""
    # held, since a cache forgets the rows of a model that is collected, in the middle of this too
    held = [(entry, model) for entry in cache._entries if (model := entry.model()) is not None]
    buffers = buffers_of(cache)
    assert len(storages(buffers)) == len(buffers)
    assert sum(buffer.untyped_storage().nbytes() for buffer in buffers) == cache.num_bytes <= cache.max_bytes
    for entry, model in held:
        plain = DynamicCache()
        with torch.inference_mode():
            model(input_ids=entry.token_ids[None], **{cache_argument(model): plain})
        for own, layer in zip(zip(entry.keys, entry.values, strict=True), plain.layers, strict=True):
            for ours_, theirs in zip(own, (layer.keys, layer.values), strict=True):
                assert ours_.shape == theirs.shape
                torch.testing.assert_close(ours_, theirs, rtol=1e-9, atol=1e-9)


def check_text_kept(cache: PrefixCache, *texts: list[int]) -> None:
    """Exactly these texts, in any order."""
    assert sorted(entry.token_ids.tolist() for entry in cache._entries) == sorted(texts)


class Interruption(contextlib.AbstractContextManager):
    """An error in one of the passes of a model, before or after its layers."""

    def __init__(self, model: torch.nn.Module, call: int, when: str, error: BaseException) -> None:
        self.calls_left, self.error = call, error
        register = model.register_forward_pre_hook if when == "before" else model.register_forward_hook
        self.handle = register(self.strike)

    def strike(self, *arguments: object) -> None:
        self.calls_left -= 1
        if self.calls_left == 0:
            raise self.error

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


@settings(max_examples=settings().max_examples * 2)
@given(data=st.data())
def test_turns_of_a_conversation(data):
    """Prompts that go on where another one or its output went, or leave it somewhere; some generations break off.

    Whatever is cut, evicted or broken: each output is that of generate(), and each row that is kept is right.
    """
    family, seed = data.draw(st.sampled_from(["llama", "gpt_neox", "gpt2", "mistral"])), data.draw(ours.model_seeds)
    target = tiny_model(family, seed)
    cache = PrefixCache(max_bytes=data.draw(st.sampled_from([0, 10_000, 60_000, 2**30])))
    texts = [data.draw(ours.prompts)]
    chunk = data.draw(st.sampled_from([2, 7, 256]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "PREFILL_CHUNK", chunk)
        for _ in range(data.draw(st.integers(2, 5))):
            before = data.draw(st.sampled_from(texts))
            prompt = before[: data.draw(st.integers(0, len(before)))] + data.draw(ours.prompts)
            asked = {"max_new_tokens": data.draw(st.integers(0, 12)), **data.draw(ours.settings)}
            expected = reference(target, prompt, **asked)
            drafter, policy = data.draw(ours.drafters(family, seed)), data.draw(ours.stacks())
            session = Session(target, drafter, prompt, policy=policy, prefix_cache=cache, eos_token_id=[], **asked)
            ending = data.draw(st.sampled_from(["end", "end", "leave", "error", "interrupt"]))
            if ending == "leave":
                for _ in itertools.islice(run(session), data.draw(st.integers(1, 4))):
                    pass
            elif ending in ("error", "interrupt"):
                error = OSError("gone") if ending == "error" else KeyboardInterrupt()
                call, when = data.draw(st.integers(1, 6)), data.draw(st.sampled_from(["before", "after"]))
                # where the target drafts for itself, the drafter may be blamed
                named = (ForwardPassError, DrafterError, KeyboardInterrupt)
                with Interruption(target, call, when, error), contextlib.suppress(*named):
                    list(run(session))
            check_rows(cache)
            assert session.new_token_ids == expected[: len(session.new_token_ids)]
            if ending == "end" or data.draw(st.booleans()):
                list(run(session))
                assert session.new_token_ids == expected
                check_rows(cache)
            assert session.num_reused_tokens <= len(prompt) - 1
            texts.append([*prompt, *expected])


@pytest.mark.parametrize("family", ours.FAMILIES)
@pytest.mark.parametrize("policy", ["phase3", "fixed", "autoregressive"])
def test_only_what_is_new_goes_through_the_models(family, policy):
    """The second turn prefills what the first one's prompt and output do not hold, in the target and in the drafter."""
    target, drafter = copy.deepcopy(tiny_model(family)), copy.deepcopy(perturbed(family))
    cache, rows = PrefixCache(), {target: 0, drafter: 0}

    def count(module, args, kwargs):
        rows[module] += kwargs["input_ids"].shape[1]

    for model in rows:
        model.register_forward_pre_hook(count, with_kwargs=True)
    first = generate(target, drafter, PROMPT, policy=policy, max_new_tokens=20, prefix_cache=cache)
    assert first.report.num_reused_tokens == 0
    known = [*PROMPT, *first.token_ids]
    prompt = [*known, 7, 8, 9]
    drafter_rows = next((e.token_ids.numel() for e in cache._entries if e.model() is drafter), 0)
    # it lacks the last token, and perhaps the one before; where nobody asks it, all
    assert len(known) - drafter_rows in ((1, 2) if policy != "autoregressive" else (len(known),))
    rows.update({target: 0, drafter: 0})
    second = Session(target, drafter, prompt, policy=policy, max_new_tokens=20, prefix_cache=cache)
    next(run(second))
    # the last committed token of the first turn is the only one that has no row; then the new ones, less the root
    assert second.num_reused_tokens == len(known) - 1
    assert rows[target] == 1 + 3 - 1 + 1 + second.steps[0].num_drafted
    if policy == "autoregressive":
        assert rows[drafter] == 0
    list(run(second))
    assert second.new_token_ids == greedy(target, prompt, 20)


@pytest.mark.parametrize("num_common", [0, 1, 3, 5])
def test_a_prompt_that_goes_another_way(num_common):
    cache = PrefixCache()
    generate(TARGET, None, PROMPT, max_new_tokens=1, prefix_cache=cache)
    prompt = [*PROMPT[:num_common], 30, 31, 32]
    result = generate(TARGET, None, prompt, max_new_tokens=9, prefix_cache=cache)
    assert result.report.num_reused_tokens == num_common
    assert result.token_ids == greedy(TARGET, prompt, 9)


def test_the_same_prompt_again_leaves_its_last_token_to_do():
    cache = PrefixCache()
    generate(TARGET, None, PROMPT, max_new_tokens=9, prefix_cache=cache)
    result = generate(TARGET, None, PROMPT, max_new_tokens=9, prefix_cache=cache)
    assert result.report.num_reused_tokens == len(PROMPT) - 1
    assert result.token_ids == greedy(TARGET, PROMPT, 9)


def test_the_longest_common_prefix_is_taken():
    cache = PrefixCache()
    for prompt in ([1, 2, 3, 9, 9], [1, 2, 3, 4, 9, 9], [1, 8, 8, 8, 8, 8, 8]):
        generate(TARGET, None, prompt, max_new_tokens=1, prefix_cache=cache)
    assert generate(TARGET, None, [*PROMPT, 5], max_new_tokens=1, prefix_cache=cache).report.num_reused_tokens == 4


def test_a_text_is_kept_once():
    """The turns of a conversation continue each other: the last one stands for all, whichever came first."""
    cache = PrefixCache()
    first = generate(TARGET, None, PROMPT, max_new_tokens=6, prefix_cache=cache).token_ids
    check_text_kept(cache, [*PROMPT, *first[:-1]])
    second = generate(TARGET, None, [*PROMPT, *first, 7], max_new_tokens=6, prefix_cache=cache).token_ids
    whole = [*PROMPT, *first, 7, *second[:-1]]
    check_text_kept(cache, whole)
    generate(TARGET, None, PROMPT, max_new_tokens=6, prefix_cache=cache)
    check_text_kept(cache, whole)
    generate(TARGET, None, [*PROMPT, 30], max_new_tokens=1, prefix_cache=cache)
    check_text_kept(cache, whole, [*PROMPT, 30])


def test_drafting_with_the_target_itself_keeps_one_copy():
    cache = PrefixCache()
    result = generate(TARGET, TARGET, PROMPT, policy="linear", max_new_tokens=9, prefix_cache=cache)
    check_text_kept(cache, [*PROMPT, *result.token_ids[:-1]])


# the bound


def size_of(prompt: list[int]) -> int:
    """What one text of the target takes up."""
    cache = PrefixCache()
    generate(TARGET, None, prompt, max_new_tokens=1, prefix_cache=cache)
    return cache.num_bytes


def test_the_least_recently_used_text_goes():
    texts = [[n, n, n, n, 1] for n in range(5)]
    cache = PrefixCache(max_bytes=3 * size_of(texts[0]) + 1)
    for text in (*texts[:3], texts[0], texts[3]):  # the first one comes again
        generate(TARGET, None, text, max_new_tokens=1, prefix_cache=cache)
    check_text_kept(cache, texts[0], texts[2], texts[3])
    branch = [2, 2, 2, 2, 30]  # begins with rows of the oldest one
    generate(TARGET, None, branch, max_new_tokens=1, prefix_cache=cache)
    check_text_kept(cache, texts[2], texts[3], branch)
    longest = [4] * 13  # takes the place of all
    generate(TARGET, None, longest, max_new_tokens=1, prefix_cache=cache)
    check_text_kept(cache, longest)


def test_a_text_that_does_not_fit_is_not_kept_and_drives_nobody_out():
    cache = PrefixCache(max_bytes=size_of(PROMPT))
    generate(TARGET, None, PROMPT, max_new_tokens=1, prefix_cache=cache)
    assert cache.num_bytes == cache.max_bytes
    generate(TARGET, None, [9] * 6, max_new_tokens=1, prefix_cache=cache)
    check_text_kept(cache, PROMPT)


def test_the_targets_rows_matter_more_than_the_drafters():
    cache = PrefixCache(max_bytes=size_of(PROMPT))
    generate(TARGET, DRAFTER, PROMPT, max_new_tokens=1, prefix_cache=cache)
    [entry] = cache._entries
    assert entry.model() is TARGET


def test_no_room_is_kept_for_tokens_to_come():
    """A session's buffers have room for a long output and a tree; what is kept has the rows alone."""
    cache = PrefixCache()
    generate(TARGET, None, PROMPT, max_new_tokens=1, prefix_cache=cache)
    short = cache.num_bytes
    cache.clear()
    assert cache.num_bytes == 0
    session = Session(TARGET, None, PROMPT, max_new_tokens=100, prefix_cache=cache)
    next(run(session))
    row = sum(buffer[0, :, 0].numel() for buffer in (*session.cache.keys, *session.cache.values)) * 8 + 8  # and its id
    assert cache.num_bytes == short == len(PROMPT) * row


def test_a_model_is_not_kept_alive():
    cache, model = PrefixCache(), copy.deepcopy(TARGET)
    generate(model, None, PROMPT, max_new_tokens=3, prefix_cache=cache)
    generate(TARGET, None, PROMPT, max_new_tokens=3, prefix_cache=cache)
    assert len(cache._entries) == 2
    del model
    gc.collect()
    [entry] = cache._entries
    assert entry.model() is TARGET


def test_a_drafter_that_has_failed_is_not_held():
    """It may have found no memory, which then goes with its cache."""

    class Failing(ModelDrafter):
        def start(self, plan):
            state = super().start(plan)
            state.commit = lambda draft_path: 1 / 0
            return state

    session = Session(
        TARGET, Failing(DRAFTER), PROMPT, max_new_tokens=9, prefix_cache=PrefixCache(), on_error="fallback"
    )
    held = weakref.ref(session.draft_state.cache)
    with pytest.warns(RuntimeWarning, match="drafting is off"):
        [*_] = run(session)
    gc.collect()
    assert held() is None
    assert session.new_token_ids == greedy(TARGET, PROMPT, 9)


def test_no_memory_to_keep_rows_is_no_error(monkeypatch):
    cache = PrefixCache()

    def fail(self):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(TreeCache, "copied", fail)
    result = generate(TARGET, None, PROMPT, max_new_tokens=9, prefix_cache=cache)
    assert result.token_ids == greedy(TARGET, PROMPT, 9)
    assert cache.num_bytes == 0


@pytest.mark.parametrize("max_bytes", [-1, 2.5, "1 GB", None, True])
def test_bad_bounds(max_bytes):
    with pytest.raises(ParameterError, match="max_bytes must be an integer of at least 0"):
        PrefixCache(max_bytes=max_bytes)


def test_what_is_no_prefix_cache():
    with pytest.raises(ParameterError, match="prefix_cache must be a PrefixCache, got True"):
        generate(TARGET, None, PROMPT, prefix_cache=True)


# what is never mixed


def warm(model=TARGET, **options) -> PrefixCache:
    """A prefix cache that knows the prompt."""
    cache = PrefixCache()
    generate(model, None, PROMPT, max_new_tokens=9, prefix_cache=cache, **options)
    assert cache.num_bytes > 0
    return cache


def num_reused(cache: PrefixCache, model=TARGET, **options) -> int:
    return generate(model, None, PROMPT, max_new_tokens=4, prefix_cache=cache, **options).report.num_reused_tokens


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy], ids=["deep", "shallow"])
def test_models_are_told_apart(copied):
    """Also by a model object that has the very same modules: rows belong to the object that has computed them."""
    cache = warm()
    assert num_reused(cache, copied(TARGET)) == 0
    assert num_reused(cache) == len(PROMPT) - 1


def test_a_model_that_was_changed_in_place():
    model = copy.deepcopy(TARGET)
    cache = warm(model)
    model.float()
    assert num_reused(cache, model) == 0
    model.double()
    assert num_reused(cache, model) == 0  # its weights are rounded now
    model.set_attn_implementation("eager")
    assert num_reused(cache, model) == 0
    model.set_attn_implementation("sdpa")
    assert num_reused(cache, model) == len(PROMPT) - 1


def test_autocast():
    model = copy.deepcopy(TARGET).float()
    cache = warm(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert num_reused(cache, model) == 0
        assert num_reused(cache, model) == len(PROMPT) - 1
    cache.clear()
    with torch.autocast("cpu", torch.bfloat16):
        warm(model)
    assert num_reused(cache, model) == 0


@pytest.mark.parametrize(
    "option", [{"position_ids": [0, 1, 2, 9, 10]}, {"exact": "fixed_width"}, {"exact": "fixed_width", "max_nodes": 3}]
)
def test_rows_that_a_plain_prefill_would_not_make(option):
    """At other positions, or in passes of another shape: nothing is taken and nothing is left."""
    cache = warm()
    kept = cache.num_bytes
    assert num_reused(cache, **option) == 0
    assert cache.num_bytes == kept
    empty = PrefixCache()
    num_reused(empty, **option)
    assert empty.num_bytes == 0


def test_padding_is_not_part_of_a_text():
    cache = warm()
    padded, mask = [0, 0, *PROMPT], [0, 0, *([1] * len(PROMPT))]
    result = generate(TARGET, None, padded, attention_mask=mask, max_new_tokens=9, prefix_cache=cache)
    assert result.report.num_reused_tokens == len(PROMPT) - 1
    assert result.token_ids == greedy(TARGET, padded, 9, attention_mask=torch.tensor([mask]))


def test_a_drafter_that_lacks_ids_of_the_target():
    """Its rows stand for the target's ids, of which it takes the last ones for one and the same."""
    target, drafter = tiny_model("llama", 1, vocab_size=304), tiny_model("llama", 2, vocab_size=300)
    cache = PrefixCache()
    prompt = [1, 303, 2, 302, 5]
    for text in (prompt, [1, 303, 2, 301, 5, 6], [1, 303, 2, 302, 5, 6]):
        result = generate(target, drafter, text, policy="fixed", tau=0.0, max_new_tokens=9, prefix_cache=cache)
        assert result.token_ids == greedy(target, text, 9)
        for entry in cache._entries:
            if entry.model() is drafter:
                plain = DynamicCache()
                with torch.inference_mode():
                    drafter(input_ids=entry.token_ids[None].clamp(max=299), **{cache_argument(drafter): plain})
                torch.testing.assert_close(entry.keys[1], plain.layers[1].keys, rtol=1e-9, atol=1e-9)


# several sessions


def test_no_two_sessions_share_buffers():
    cache = warm()
    prompt = [*PROMPT, 7, 8]
    sessions = [Session(TARGET, TARGET, prompt, max_new_tokens=9, prefix_cache=cache) for _ in range(2)]
    runs = [run(session) for session in sessions]
    for steps in runs:
        next(steps)
    assert all(session.num_reused_tokens >= len(PROMPT) for session in sessions)
    check_owners(cache, sessions)
    for session, steps in zip(sessions, runs, strict=True):
        list(steps)
        assert session.new_token_ids == greedy(TARGET, prompt, 9)
        check_owners(cache, sessions)
    check_rows(cache)


def check_owners(cache: PrefixCache, sessions: list[Session]) -> None:
    """No buffer belongs to two caches."""
    caches = [owner for session in sessions for owner in (session.cache, session.draft_state.cache)]
    owned = [storages([*owner.keys, *owner.values]) for owner in caches] + [storages(buffers_of(cache))]
    assert sum(map(len, owned)) == len(set().union(*owned)) > 0


def test_threads():
    cache = PrefixCache(max_bytes=4 * size_of([1] * 20))
    prompts = [[1, 2, 3, *([i % 4] * (i % 7)), i] for i in range(24)]
    found = {}

    def work(numbers):
        for i in numbers:
            found[i] = generate(TARGET, DRAFTER, prompts[i], max_new_tokens=9, prefix_cache=cache).token_ids

    threads = [threading.Thread(target=work, args=(range(start, 24, 3),)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(24)] == [greedy(TARGET, prompt, 9) for prompt in prompts]
    check_rows(cache)


def test_a_stream_that_nobody_listens_to_any_more():
    cache = PrefixCache()
    reports = stream(TARGET, None, PROMPT, max_new_tokens=9, prefix_cache=cache)
    next(reports)
    next(reports)
    del reports
    check_text_kept(cache, [*PROMPT, *greedy(TARGET, PROMPT, 1)])
    check_rows(cache)


def test_on_every_device(device):
    model, drafter = (copy.deepcopy(each).to(device) for each in (TARGET, DRAFTER))
    cache, prompt = PrefixCache(), PROMPT
    for _ in range(3):
        result = generate(model, drafter, prompt, max_new_tokens=9, prefix_cache=cache)
        assert result.token_ids == greedy(model, prompt, 9)
        assert result.report.num_reused_tokens == (len(prompt) - 2 if prompt != PROMPT else 0)
        prompt = [*prompt, *result.token_ids, 7]


# progress of the prefill


def test_progress(monkeypatch):
    monkeypatch.setattr(passes, "PREFILL_CHUNK", 4)
    told = []
    cache = PrefixCache()
    prompt = list(range(12))

    def note(*progress):
        told.append(progress)

    generate(TARGET, DRAFTER, prompt, max_new_tokens=1, on_prefill=note, prefix_cache=cache)
    assert told == [(4, 11), (8, 11), (11, 11)], "the target's part: a drafter reads it when it is asked"
    told.clear()
    generate(TARGET, None, [*prompt[:9], *prompt], max_new_tokens=1, on_prefill=note, prefix_cache=cache)
    assert told == [(13, 20), (17, 20), (20, 20)], "what is reused is done"
    told.clear()
    generate(TARGET, None, [1], max_new_tokens=1, on_prefill=note)
    assert told == []


def test_a_drafter_that_catches_up_is_no_prefill(monkeypatch):
    """In a cache that moves a drafter begins anew from time to time, amid the answer."""
    monkeypatch.setattr(passes, "PREFILL_CHUNK", 4)
    monkeypatch.setattr("dynatree_core.drafters.model.PREFILL_CHUNK", 4)
    told, stages, forward = [], [], passes.Passes.forward

    def noted(self, *arguments, stage, **options):
        stages.append(stage)
        return forward(self, *arguments, stage=stage, **options)

    monkeypatch.setattr(passes.Passes, "forward", noted)
    generate(
        TARGET,
        DRAFTER,
        PROMPT,
        max_new_tokens=40,
        cache="sinks=2,window=14",
        on_prefill=lambda *progress: told.append(progress),
    )
    begins = stages.index("verify")
    assert stages[:begins].count("prefill_forward") == len(told) > 0
    assert "prefill_forward" not in stages[begins:]
    assert stages[begins:].count("draft_forward") > 0


def test_an_interrupt_of_the_prefill_keeps_the_chunks_that_were_done(monkeypatch):
    monkeypatch.setattr(passes, "PREFILL_CHUNK", 4)
    cache, prompt = PrefixCache(), list(range(12))

    def interrupt(done, num_tokens):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(TARGET, DRAFTER, prompt, max_new_tokens=9, on_prefill=interrupt, prefix_cache=cache)
    check_text_kept(cache, prompt[:8])
    result = generate(TARGET, DRAFTER, prompt, max_new_tokens=9, prefix_cache=cache)
    assert result.report.num_reused_tokens == 8
    assert result.token_ids == greedy(TARGET, prompt, 9)


@pytest.mark.parametrize("on_error", ["raise", "fallback"])
def test_what_a_callback_raises_is_nobody_elses_fault(monkeypatch, on_error):
    monkeypatch.setattr(passes, "PREFILL_CHUNK", 4)

    class Cancelled(Exception):
        pass

    told = []

    def cancel(done, num_tokens):
        told.append(done)
        if len(told) == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        generate(TARGET, DRAFTER, list(range(12)), max_new_tokens=9, on_prefill=cancel, on_error=on_error)
    assert told == [4, 8]


# sequences that run beside each other


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_sequence_that_starts_copies_rows_of_one_that_runs(family):
    target = tiny_model(family)
    engine = Engine(target, None, prefix_cache=PrefixCache())
    options = {"max_new_tokens": 12, "eos_token_id": []}
    first = engine.submit([*PROMPT, 30, 31], **options)
    engine.step()
    second, other = engine.submit([*PROMPT, 7, 8], **options), engine.submit([29, *PROMPT], **options)
    engine.step()
    assert not first.is_done
    reused = [handle.partial.report.num_reused_tokens for handle in (first, second, other)]
    assert reused == [0, len(PROMPT), 0]
    for handle, prompt in ((first, [*PROMPT, 30, 31]), (second, [*PROMPT, 7, 8]), (other, [29, *PROMPT])):
        assert handle.result().token_ids == greedy(target, prompt, 12)


def test_requests_that_come_together_read_what_they_have_in_common_once():
    target, rows = copy.deepcopy(TARGET), []
    engine = Engine(target, None, prefix_cache=PrefixCache(), trust_model=True)
    target.register_forward_pre_hook(lambda _, given, named: rows.append(named["input_ids"].numel()), with_kwargs=True)
    prompts = [[*range(20), last, 3] for last in range(30, 34)]
    handles = [engine.submit(prompt, max_new_tokens=1, eos_token_id=[]) for prompt in prompts]
    engine.step()
    assert [handle.result().token_ids for handle in handles] == [greedy(TARGET, prompt, 1) for prompt in prompts]
    assert rows[:4] == [21, 1, 1, 1]


@pytest.mark.skipif(ops.reason_unavailable() is not None, reason="the operators are not compiled")
def test_rows_of_one_that_runs_have_the_bits_that_they_have_alone():
    target = copy.deepcopy(TARGET).float()
    engine = Engine(target, None, runner="native", prefix_cache=PrefixCache())
    options = {"max_new_tokens": 9, "eos_token_id": []}
    engine.submit([*PROMPT, 30, 31], **options)
    engine.step()
    second = engine.submit([*PROMPT, 7, 8], **options)
    engine.step()
    found = second._lane.cache.copied()
    assert second.partial.report.num_reused_tokens == len(PROMPT)
    alone = Session(target, None, [*PROMPT, 7, 8], runner="native", **options)
    next(run(alone))
    for shared, expected in zip(found, alone.cache.copied(), strict=True):
        assert all(map(torch.equal, shared, expected))
