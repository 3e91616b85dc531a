"""Sinks and a window: what the written definition says, token by token, and the same text with and without trees."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Cache

from dynatree_core import Session, generate, hf, run
from dynatree_core.audit import audit_generation
from dynatree_core.cache import sink_cache
from dynatree_core.cache.sink_cache import ROTARY_FAMILIES, SinkCache, SinkWindow
from dynatree_core.clock import StageClock
from dynatree_core.engine.resources import in_blocks
from dynatree_core.errors import (
    CacheError,
    ContextLimitError,
    OutOfMemoryError,
    ParameterError,
    UnsupportedModelError,
)
from dynatree_core.models.architectures import cache_argument
from dynatree_core.runners import passes
from dynatree_core.runners.base import PassOutput
from dynatree_core.runners.eager import EagerRunner
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import CONTEXT, ROPES, perturbed, tiny_model
from dynatree_core.testing.strategies import HostileDrafter, HostilePolicy
from dynatree_core.tree.flatten import flatten_chain

EXAMPLES = settings().max_examples  # as the profile of conftest.py says
PROMPT = [5, 6, 7, 5, 6, 8, 1]
# families with a window of their own, without it
OPTIONS: dict[str, dict[str, Any]] = {
    family: {"sliding_window": None} for family in ("mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2")
}


class NaiveCache(Cache):
    """The definition, literally: whenever a token leaves the window, all behind it move one place to the front."""

    def __init__(self, model: Any, sinks: int, window: int) -> None:
        super().__init__(layers=[])
        self.sinks, self.window = sinks, window
        self.one_place = torch.polar(torch.tensor(1.0).double(), -model.base_model.rotary_emb.inv_freq.double())
        self.kept: list[list[torch.Tensor]] = []  # per layer, keys and values

    def make_room(self) -> int:
        """Let a token leave if the cache is full. The next token's place."""
        if self.kept and self.kept[0][0].shape[2] == self.sinks + self.window:
            for layer in self.kept:
                layer[:] = [
                    torch.cat([rows[:, :, : self.sinks], moved[:, :, self.sinks + 1 :]], dim=2)
                    for rows, moved in zip(layer, (self.moved(layer[0]), layer[1]), strict=True)
                ]
        return self.kept[0][0].shape[2] if self.kept else 0

    def moved(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys as they are one place further to the front: pairs of numbers are turned, as complex numbers."""
        half = self.one_place.numel()
        turned = torch.complex(keys[..., :half], keys[..., half : 2 * half]) * self.one_place
        return torch.cat([turned.real, turned.imag, keys[..., 2 * half :]], dim=-1)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: object, **options: object) -> Any:
        if layer == len(self.kept):
            self.kept.append([keys, values])
        else:
            self.kept[layer] = [torch.cat([old, new], 2) for old, new in zip(self.kept[layer], (keys, values))]  # noqa: B905
        return tuple(self.kept[layer])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.kept[0][0].shape[2] if self.kept else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


@torch.inference_mode()
def naive(model: Any, prompt: list[int], length: int, option: SinkWindow) -> tuple[list[int], torch.Tensor]:
    """The greedy output and its logits [length, vocab], by passes over one token each."""
    cache, text, logits = NaiveCache(model, option.sinks, option.window), list(prompt), []
    for i in range(len(prompt) + length - 1):
        place = torch.tensor([[cache.make_room()]])
        last = model(input_ids=torch.tensor([[text[i]]]), position_ids=place, **{cache_argument(model): cache}).logits[
            0, -1
        ]
        if i >= len(prompt) - 1:
            logits.append(last)
            text.append(int(last.float().argmax()))
    return text[len(prompt) :], torch.stack(logits)


def autoregressive(model: Any, prompt: list[int], length: int, option: SinkWindow) -> tuple[list[int], torch.Tensor]:
    """The same by a session without a drafter."""
    session = Session(model, None, prompt, max_new_tokens=length, cache=str(option), eos_token_id=[])
    seen = []
    forward = session.target.forward

    def record(*args: Any, stage: str, **options: Any) -> PassOutput:
        output = forward(*args, stage=stage, **options)
        if stage == "verify":
            seen.append(output.logits[0, 0])
        return output

    session.target.forward = record
    for _ in run(session):
        pass
    return session.new_token_ids, torch.stack(seen)


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_every_family_follows_the_definition(family):
    """A text many times the window, its prompt alone longer than that."""
    model = tiny_model(family, **OPTIONS.get(family, {}))
    option = SinkWindow(3, 9)
    expected, expected_logits = naive(model, PROMPT * 3, 60, option)
    found, logits = autoregressive(model, PROMPT * 3, 60, option)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert found == expected


cache_options = st.builds(SinkWindow, st.integers(0, 4), st.integers(1, 9))


@st.composite
def generations(draw: st.DrawFn) -> dict[str, Any]:
    """A text of at least five times what the cache keeps, beyond the models' own context limit at times."""
    option = draw(cache_options)
    prompt = draw(st.lists(ours.token_ids, min_size=1, max_size=3 * option.num_tokens))
    length = max(5 * option.num_tokens - len(prompt), 1) + draw(st.integers(0, 20))
    return {"prompt": prompt, "length": length, "option": option}


def check(model: Any, drafter: Any, policy: Any, prompt: list[int], length: int, option: SinkWindow, **options) -> None:
    """Trees give what autoregressive decoding with the same cache gives."""
    expected, _ = autoregressive(model, prompt, length, option)
    options = {"policy": policy, "max_new_tokens": length, "cache": str(option), "eos_token_id": [], **options}
    session = Session(model, drafter, prompt, **options)
    for _ in run(session):
        pass
    assert session.new_token_ids == expected


@settings(max_examples=EXAMPLES // 2)
@given(
    st.sampled_from(["llama", "gpt_neox", "phi3"]),
    st.sampled_from(["itself", "noisy", "prompt_lookup", "gpt2"]),
    ours.stacks(),
    generations(),
    ours.limits,
    st.sampled_from([5, 256]),
)
def test_trees_equal_autoregressive_decoding(family, drafter, policy, generation, limits, chunk):
    """Any policy and drafter; of models as drafters also one whose positions are a table."""
    model = tiny_model(family, **OPTIONS.get(family, {}))
    drafters = {"itself": model, "noisy": perturbed("llama"), "gpt2": tiny_model("gpt2")}
    limits = {**limits, "max_nodes": min(limits.get("max_nodes", 40), 40)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "PREFILL_CHUNK", chunk)
        check(model, drafters.get(drafter, drafter), policy, **generation, **limits)


@settings(max_examples=EXAMPLES // 2)
@given(st.sampled_from(["llama", "gpt_neox"]), st.integers(0, 99), generations())
def test_hostile_policies_and_drafters(family, seed, generation):
    check(tiny_model(family), HostileDrafter(seed), HostilePolicy(seed), **generation, tau=0.0, max_depth=20)


@pytest.mark.parametrize("rope", ROPES)
def test_every_rotary_scaling(rope):
    """Yarn and longrope scale what they rotate, which a second turn must not do again."""
    model = tiny_model.__wrapped__("llama", rope_parameters={"rope_type": rope, **ROPES[rope]})
    option = SinkWindow(3, 9)
    expected, expected_logits = naive(model, PROMPT, 2 * CONTEXT, option)
    found, logits = autoregressive(model, PROMPT, 2 * CONTEXT, option)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert found == expected


@pytest.mark.parametrize(
    ("family", "option"), [("gpt_neox", SinkWindow(4, 24)), ("llama", SinkWindow(0, 20)), ("llama", SinkWindow(2, 60))]
)
def test_a_text_beyond_the_models_context(family, option):
    """Five windows long and more, and longer than the model has positions; the drafter's model has no more of them."""
    model, prompt = tiny_model(family), (PROMPT * 40)[: CONTEXT + 3]
    length = 5 * option.num_tokens
    with pytest.raises(ContextLimitError, match=f"context of {CONTEXT} tokens"):
        generate(model, None, prompt, max_new_tokens=length)
    expected, _ = naive(model, prompt, length, option)
    for drafter in (perturbed(family, noise=0.02), tiny_model("gpt2"), "prompt_lookup", None):
        session = Session(
            model, drafter, prompt, policy="fixed(tau=0.0)", max_new_tokens=length, cache=str(option), max_nodes=20
        )
        for _ in run(session):
            pass
        assert session.new_token_ids == expected
        if drafter == perturbed(family, noise=0.02):
            assert session.num_iterations < 0.7 * length  # it follows well enough to be of use


def test_a_text_that_the_cache_holds_is_that_of_generate():
    model = tiny_model("llama")
    plain = generate(model, None, PROMPT, max_new_tokens=40)
    assert generate(model, model, PROMPT, max_new_tokens=40, cache="sinks=4,window=43").token_ids == plain.token_ids
    assert generate(model, model, PROMPT, max_new_tokens=40, cache="sinks=4,window=9").token_ids != plain.token_ids


@pytest.mark.parametrize("drafter", ["llama", "prompt_lookup"])
def test_memory_and_passes_do_not_grow_with_the_text(drafter, monkeypatch):
    """Buffers keep their size, and no pass sees more slots than sinks for each place, window and tree."""
    model, option, max_nodes = tiny_model("llama"), SinkWindow(4, 20), 12
    session = Session(
        model,
        perturbed("llama") if drafter == "llama" else drafter,
        PROMPT * 50,
        policy="fixed(depth=4,tau=0.0)",
        max_new_tokens=300,
        max_nodes=max_nodes,
        cache=str(option),
    )
    slots = []
    update = SinkCache.update

    def note(self, *arguments, **options):
        keys, values = update(self, *arguments, **options)
        slots.append((keys.shape[2], keys.untyped_storage().nbytes() + values.untyped_storage().nbytes()))
        return keys, values

    monkeypatch.setattr(SinkCache, "update", note)
    for report in run(session):
        assert session.cache.length == len(session.prompt_ids) + len(session.new_token_ids) - 1
        assert report.tree.max_depth <= 4
    assert len({bytes_ for _, bytes_ in slots}) == 1
    prefill_slots = 20 * option.sinks + option.window - 1 + 20  # up to a step's rows in one pass
    assert max(found for found, _ in slots) == prefill_slots
    tree_slots = 5 * option.sinks + option.window - 1 + 1 + max_nodes
    assert max(found for found, _ in slots[-100:]) <= tree_slots
    assert session.cache.capacity == 20 * option.sinks + option.num_tokens + 20 + max_nodes
    if drafter == "llama":
        assert session.draft_state.cache.capacity == in_blocks(option.num_tokens + 2 * max_nodes)


@settings(max_examples=EXAMPLES // 4)
@given(st.integers(0, 99), generations(), ours.stacks())
def test_sampling_is_that_of_autoregressive_sampling(seed, generation, policy):
    model, length = tiny_model("llama"), generation["length"]
    options = {"do_sample": True, "temperature": 0.7, "seed": seed, "cache": str(generation["option"])}
    expected = generate(model, None, generation["prompt"], max_new_tokens=length, **options)
    drafter = perturbed("llama", noise=0.02)
    found = generate(
        model, drafter, generation["prompt"], policy=policy, max_new_tokens=length, max_nodes=40, **options
    )
    assert found.token_ids == expected.token_ids


def test_half_precision():
    """Keys are turned in float32: the text is that of the same weights in float64 for longer than a window."""
    model, option = copy.deepcopy(tiny_model("llama")).to(torch.bfloat16), SinkWindow(4, 16)
    cache = SinkCache(model, option, 8)
    seen = run_chain(model, cache, PROMPT * 9)
    wide, precise = copy.deepcopy(model).double(), SinkCache(tiny_model("llama"), option, 8)
    expected = run_chain(wide, precise, PROMPT * 9)
    assert seen.dtype == torch.bfloat16
    assert (seen.double() - expected).abs().max() < 0.1 * expected.abs().max()


def run_chain(model: Any, cache: SinkCache, text: list[int]) -> torch.Tensor:
    """The logits of the last token of a text, through the cache."""
    target = passes.Passes(EagerRunner(model), StageClock(torch.device("cpu")))
    with torch.inference_mode():
        target.prefill(torch.tensor(text[:-1]), cache)
        flat = flatten_chain(torch.tensor(text[-1:]), cache.next_place)
        return target.forward(flat, cache, stage="verify").logits[0, 0]


def test_through_model_generate():
    model = tiny_model("llama")
    expected, _ = naive(model, PROMPT, 60, SinkWindow(2, 10))
    asked = {"max_new_tokens": 60, "options": {"cache": "sinks=2,window=10"}, "do_sample": False}
    inputs = torch.tensor([PROMPT])
    found = model.generate(inputs, custom_generate=hf.generate, drafter=model, policy="fixed", **asked)
    assert found[0, len(PROMPT) :].tolist() == expected
    assert hf.generate_with(model, inputs, drafter=model, **asked)[0, len(PROMPT) :].tolist() == expected


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        ("sinks=4", "is written 'sinks=4,window=1024', two numbers, got 'sinks=4'"),
        ("", "got ''"),
        (7, "got 7"),
        ("sinks=4,window=-1", "got 'sinks=4,window=-1'"),
        ("sinks=4,window=1,window=2", "two numbers"),
        ("sinks=4,windows=1", "two numbers"),
        ("sinks=4,window=0", "the window must be at least 1"),
        ("sinks=4,window=150", f"must leave 64 of the target's {CONTEXT} positions free, .* got 4 \\+ 150"),
    ],
)
def test_a_cache_that_cannot_be(cache, words):
    with pytest.raises(ParameterError, match=words):
        Session(tiny_model("llama"), None, PROMPT, cache=cache)


def test_order_and_spaces_do_not_matter():
    assert SinkWindow.parse(" window = 9, sinks = 0 ") == SinkWindow(0, 9)
    assert SinkWindow.parse(str(SinkWindow(4, 1024))) == SinkWindow(4, 1024)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "its positions are not known to move with the cache"),
        ("gptj", "its positions are not known to move with the cache"),
        ("smollm3", "its positions are not known to move with the cache"),
        ("mistral", "it has a sliding window of its own"),
    ],
)
def test_models_that_are_refused(family, reason):
    with pytest.raises(UnsupportedModelError, match=f"cannot be decoded with sinks and a window: {reason}"):
        Session(tiny_model(family), None, PROMPT, cache="sinks=2,window=8")


def test_what_does_not_go_with_it():
    model, cache = tiny_model("llama"), "sinks=2,window=8"
    for options, words in (({"exact": "fixed_width"}, "exact='fixed_width'"), ({"position_ids": range(1, 8)}, "posit")):
        with pytest.raises(ParameterError, match=f"tokens have places of their own, .* got {words}"):
            Session(model, None, PROMPT, cache=cache, **options)
    Session(model, None, PROMPT, cache=cache, position_ids=range(7))  # no others than its own
    with pytest.raises(ParameterError, match="an audit compares with the model's own cache"):
        audit_generation(model, None, PROMPT, cache=cache)
    with pytest.raises(ContextLimitError, match="162 tokens of the target's cache and a tree"):
        Session(model, tiny_model("gpt2"), PROMPT, cache="sinks=2,window=32", max_nodes=128, max_new_tokens=400)


def test_a_pass_that_crosses_a_turning_point_is_refused():
    cache = SinkCache(tiny_model("llama"), SinkWindow(2, 8), 8)
    assert cache.max_places == 10
    with pytest.raises(CacheError, match="may stand at 10 places here, got 11"):
        cache.prepare(flatten_chain(torch.arange(11), 0))


def test_models_may_use_it_without_positions_and_masks():
    """Until the window moves it is a cache like any other."""
    model, cache = tiny_model("llama"), SinkCache(tiny_model("llama"), SinkWindow(2, 8), 8)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1, 2, 3]]), **{cache_argument(model): cache})
        cache.commit([[0, 1, 2]])
        logits = model(input_ids=torch.tensor([[4, 5]]), **{cache_argument(model): cache}).logits[0, -1]
        expected = model(input_ids=torch.tensor([[1, 2, 3, 4, 5]])).logits[0, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_a_turn_that_is_broken_off_is_done_again(monkeypatch):
    """Memory ends while the window's keys are turned back: rows are computed anew, and the text is what it was."""
    model, option = tiny_model("llama"), SinkWindow(2, 10)
    expected, _ = naive(model, PROMPT, 60, option)
    session = Session(model, model, PROMPT, policy="fixed", max_new_tokens=60, cache=str(option))
    turned, calls = sink_cache._turned, []

    def fail_once(keys, cos, sin):
        is_back = keys.dim() == 4
        calls.extend([keys] * is_back)
        if is_back and len(calls) == 4:  # the second layer of the second time
            raise MemoryError("no memory")
        return turned(keys, cos, sin)

    monkeypatch.setattr(sink_cache, "_turned", fail_once)
    with pytest.raises(OutOfMemoryError):
        list(run(session))
    assert session.cache.length == 0
    list(run(session))
    assert session.new_token_ids == expected
