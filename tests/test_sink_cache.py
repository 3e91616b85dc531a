"""Sinks and a window: what the written definition says, token by token, and the same text with and without trees."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Cache

from dynatree_core import Session, generate, hf, hookimpl, run, runner, sink_cache
from dynatree_core.audit import audit_generation
from dynatree_core.errors import CacheError, ContextLimitError, ParameterError, UnsupportedModelError
from dynatree_core.flatten import flatten_chain
from dynatree_core.sink_cache import ROTARY_FAMILIES, SinkCache, SinkWindow
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import CONTEXT, ROPES, VOCAB, perturbed, tiny_model
from dynatree_core.testing.strategies import HostileDrafter, HostilePolicy

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
        last = model(input_ids=torch.tensor([[text[i]]]), position_ids=place, past_key_values=cache).logits[0, -1]
        if i >= len(prompt) - 1:
            logits.append(last)
            text.append(int(last.float().argmax()))
    return text[len(prompt) :], torch.stack(logits)


def autoregressive(model: Any, prompt: list[int], length: int, option: SinkWindow) -> tuple[list[int], torch.Tensor]:
    """The same by a session without a drafter."""
    session = Session(model, None, prompt, max_new_tokens=length, cache=str(option), eos_token_id=[])
    seen = []
    forward = session.target.forward

    def record(*args: Any, stage: str, **options: Any) -> torch.Tensor:
        logits = forward(*args, stage=stage, **options)
        if stage == "verify":
            seen.append(logits[0, 0])
        return logits

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


cache_options = st.builds(SinkWindow, st.integers(0, 5), st.integers(1, 12))


@st.composite
def generations(draw: st.DrawFn) -> dict[str, Any]:
    """A text of at least five times what the cache keeps, beyond the models' own context limit at times."""
    option = draw(cache_options)
    prompt = draw(st.lists(ours.token_ids, min_size=1, max_size=3 * option.num_tokens))
    length = max(5 * option.num_tokens - len(prompt), 1) + draw(st.integers(0, 30))
    return {"prompt": prompt, "length": length, "option": option}


def check(model: Any, drafter: Any, policy: Any, prompt: list[int], length: int, option: SinkWindow, **options) -> None:
    """Trees give what autoregressive decoding with the same cache gives."""
    expected, _ = autoregressive(model, prompt, length, option)
    options = {"policy": policy, "max_new_tokens": length, "cache": str(option), "eos_token_id": [], **options}
    session = Session(model, drafter, prompt, **options)
    for _ in run(session):
        pass
    assert session.new_token_ids == expected


@settings(max_examples=80)
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
        patch.setattr(runner, "PREFILL_CHUNK", chunk)
        check(model, drafters.get(drafter, drafter), policy, **generation, **limits)


@settings(max_examples=80)
@given(st.sampled_from(["llama", "gpt_neox"]), st.integers(0, 99), generations())
def test_hostile_policies_and_drafters(family, seed, generation):
    check(tiny_model(family), HostileDrafter(seed), HostilePolicy(seed), **generation, tau=0.0, max_depth=20)
