"""`adapter_off`: the target without its adapters drafts for the target with them, from one copy of the weights."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from dynatree_core import PrefixCache, Session, build_drafter, generate, hf, run
from dynatree_core.errors import DrafterError, ForwardPassError, ParameterError
from dynatree_core.models.adapters import without_adapters
from dynatree_core.runners.choice import make_runner
from dynatree_core.runners.eager import EagerRunner
from dynatree_core.runners.passes import Passes
from dynatree_core.testing import assert_drafter_contract
from dynatree_core.testing.models import tiny_model

peft = pytest.importorskip("peft", reason="peft is not installed; `make test` brings it")
from peft_models import ADAPTERS, ASKED, PROJECTIONS, PROMPT, TREES, shake, tokens, wrapped  # noqa: E402

# PEFT calls what torch and transformers will take away
pytestmark = [pytest.mark.filterwarnings("default::FutureWarning", "default::DeprecationWarning")]

MORE_ADAPTERS = {
    "saved modules": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=PROJECTIONS, modules_to_save=["lm_head", "input_layernorm"]
    ),
    "trained tokens": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=PROJECTIONS, trainable_token_indices=[1, 2, 3]
    ),
}
KINDS = {**ADAPTERS, **MORE_ADAPTERS}
OPTIONS = {"policy": "fixed(depth=3,branch=2,tau=0.0)", "max_new_tokens": 16}


def logits(model):
    with torch.no_grad():
        return model(PROMPT).logits


def flags(model):
    """Everything by which PEFT tells an adapter that is on from one that is off."""
    return [
        (name, part._disable_adapters, list(part.active_adapters), list(getattr(part, "merged_adapters", ())))
        for name, part in model.named_modules()
        if hasattr(part, "_disable_adapters")
    ]


def session_to_its_end(session):
    for _ in run(session):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_is_the_model_with_its_adapters_off(kind):
    model = wrapped(KINDS[kind]())
    base, with_adapters = model.get_base_model(), logits(model)
    twin = without_adapters(base)
    with model.disable_adapter():
        off = logits(model)
    assert torch.equal(logits(twin), off)
    assert not torch.equal(off, with_adapters)
    assert torch.equal(logits(model), with_adapters)
    own = {id(tensor) for tensor in (*base.parameters(), *base.buffers())}
    assert all(id(tensor) in own for tensor in (*twin.parameters(), *twin.buffers()))
    assert not {id(part) for part in twin.modules()} & {id(part) for part in base.modules()}
    assert not any(type(part).__module__.startswith("peft") for part in twin.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_it_drafts_for_its_own_adapted_target(kind):
    model = wrapped(KINDS[kind]())
    before, expected = flags(model), tokens(model.generate(**ASKED))
    for target in (model, model.get_base_model()):
        result = generate(target, "adapter_off", PROMPT, **OPTIONS)
        assert result.token_ids == expected
        assert result.report.drafter == "adapter_off"
        assert result.report.num_drafted_nodes > 0
    assert tokens(model.generate(**ASKED, **TREES, drafter="adapter_off")) == expected
    assert tokens(hf.generate_with(model, **ASKED, policy="fixed", drafter="adapter_off")) == expected
    assert flags(model) == before
    with model.disable_adapter():
        off = tokens(model.generate(**ASKED))
        result = generate(model, "adapter_off", PROMPT, **OPTIONS)
        assert result.token_ids == off
        assert result.report.path_acceptance == 1.0  # it is the target then
    assert tokens(model.generate(**ASKED)) == expected


def test_beside_another_drafter_and_by_its_rules():
    model = wrapped(KINDS["LoRA"]())
    expected = tokens(model.generate(**ASKED))
    for drafter in ("adapter_off+prompt_lookup", build_drafter("adapter_off")):
        assert generate(model, drafter, PROMPT, **OPTIONS).token_ids == expected
    target = model.get_base_model()
    assert_drafter_contract("adapter_off", vocab_size=target.config.vocab_size, target=target, max_examples=10)


def test_it_follows_adapters_that_are_switched_trained_added_and_moved():
    model = wrapped(ADAPTERS["LoRA"](), "a")
    model.add_adapter("b", ADAPTERS["LoRA"]())
    shake(model)
    model.double().eval()
    seen = set()

    def check():
        expected = tokens(model.generate(**ASKED))
        assert generate(model, "adapter_off", PROMPT, **OPTIONS).token_ids == expected
        with model.disable_adapter():
            assert torch.equal(logits(without_adapters(model.get_base_model())), logits(model))
        seen.add(tuple(expected))

    check()
    model.set_adapter("b")
    check()
    shake(model)
    check()
    model.get_base_model().model.embed_tokens.weight.data += 0.1
    check()
    model.float()  # new buffers, in the same parameters
    check()
    assert len(seen) >= 4


@pytest.mark.parametrize("stage", ["verify", "draft_forward"])
@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
def test_adapters_stay_on_when_a_pass_fails(monkeypatch, stage, fault):
    model = wrapped(ADAPTERS["LoRA"]())
    before, expected = flags(model), tokens(model.generate(**ASKED))
    forward, num_passes = Passes.forward, 0

    def failing(self, flat, cache, *, stage: str, last_row_only=False):
        nonlocal num_passes
        num_passes += stage == failing.stage
        output = forward(self, flat, cache, stage=stage, last_row_only=last_row_only)
        if stage == failing.stage and num_passes == 3:
            raise ForwardPassError("no") if fault is RuntimeError else fault
        return output

    failing.stage = stage
    monkeypatch.setattr(Passes, "forward", failing)
    session = Session(model, "adapter_off", PROMPT, **OPTIONS)
    with pytest.raises((KeyboardInterrupt, ForwardPassError, DrafterError)):
        session_to_its_end(session)
    assert flags(model) == before
    session_to_its_end(session)  # it goes on where it was
    assert session.result().token_ids == expected
    assert tokens(model.generate(**ASKED)) == expected


def test_threads_on_one_model():
    """Generations with and without this drafter, and plain passes, at the same time on one model object."""
    model = wrapped(ADAPTERS["LoRA"]())
    expected, exact = tokens(model.generate(**ASKED)), logits(model)
    ready, faults = threading.Barrier(4), []

    def work(drafter):
        ready.wait()
        for _ in range(4):
            if drafter == "plain":
                if not torch.equal(logits(model), exact):
                    faults.append("a pass saw adapters off")
            elif generate(model, drafter, PROMPT, **OPTIONS).token_ids != expected:
                faults.append(f"other tokens with {drafter}")

    drafters = ["adapter_off", "adapter_off", "prompt_lookup", "plain"]
    threads = [threading.Thread(target=work, args=(drafter,)) for drafter in drafters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_a_prefix_cache_keeps_rows_with_and_without_adapters_apart():
    model, cache = wrapped(ADAPTERS["LoRA"]()), PrefixCache()
    expected = tokens(model.generate(**ASKED))
    for _ in range(3):
        for drafter in ("adapter_off", None, "adapter_off"):
            result = generate(model, drafter, PROMPT, prefix_cache=cache, **OPTIONS)
            assert result.token_ids == expected
    assert result.report.num_reused_tokens > 0
    with model.disable_adapter():
        off = tokens(model.generate(**ASKED))
        assert generate(model, "adapter_off", PROMPT, prefix_cache=cache, **OPTIONS).token_ids == off


@pytest.mark.parametrize("runner", ["auto", "eager", "packed"])
def test_every_runner_has_one_copy_of_the_drafters_weights(runner, monkeypatch):
    model = wrapped(ADAPTERS["LoRA"]()).float()
    expected = tokens(model.generate(**ASKED))
    made = []

    def noting(given, *args, **kwargs):
        made.append((given, make_runner(given, *args, **kwargs)))
        return made[-1][1]

    monkeypatch.setattr("dynatree_core.runners.choice.make_runner", noting)
    assert generate(model, "adapter_off", PROMPT, runner=runner, **OPTIONS).token_ids == expected
    twin = without_adapters(model.get_base_model())
    [used] = [used for given, used in made if given is twin]
    assert isinstance(used, EagerRunner)
    assert used.model is twin
    assert {id(given) for given, _ in made} == {id(twin), id(model.get_base_model())}


def test_the_twin_goes_with_its_model():
    model = wrapped(ADAPTERS["LoRA"]())
    twin = weakref.ref(without_adapters(model.get_base_model()))
    assert twin() is not None
    del model
    gc.collect()
    assert twin() is None


def test_targets_without_adapters_are_refused():
    plain, model = tiny_model("llama"), wrapped(ADAPTERS["LoRA"]())
    for target in (plain, copy.deepcopy(model).merge_and_unload(), copy.deepcopy(model).unload()):
        with pytest.raises(ParameterError, match="must have PEFT adapters that can be taken off, got LlamaForCausalLM"):
            generate(target, "adapter_off", PROMPT, **OPTIONS)
    model.merge_adapter()
    with pytest.raises(ParameterError, match=r"must not be merged.*first being model\.layers\.0.*unmerge_adapter"):
        generate(model, "adapter_off", PROMPT, **OPTIONS)
    model.unmerge_adapter()
    assert generate(model, "adapter_off", PROMPT, **OPTIONS).token_ids == tokens(model.generate(**ASKED))


def test_what_cannot_be_taken_off_is_refused():
    model = wrapped(ADAPTERS["LoRA"]())
    base = model.get_base_model()
    base.model.layers[0].mlp.note = (one for one in ())
    with pytest.raises(ParameterError, match=r"making it failed: TypeError: cannot pickle 'generator'.*take that off"):
        generate(base, "adapter_off", PROMPT, **OPTIONS)
    del base.model.layers[0].mlp.note

    class Wrapping(nn.Module):
        __module__ = "peft.tuners.of_tomorrow"

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, rows):
            return self.inner(rows)

    base.model.layers[0].mlp.up_proj = Wrapping(base.model.layers[0].mlp.up_proj)
    with pytest.raises(ParameterError, match=r"each wrap a layer of the model, got Wrapping at model\.layers\.0\.mlp"):
        generate(base, "adapter_off", PROMPT, trust_model=True, **OPTIONS)
