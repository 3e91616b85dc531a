"""A package's drafter with a model of its own gets what the built-in drafter with that model gets."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dynatree_bench.run.known import Text
from dynatree_bench.run.methods import replay
from dynatree_bench.run.pairs import Pair, drafter_info
from dynatree_bench.studies.rehearse import rehearse
from dynatree_core import (
    Drafter,
    DraftPlan,
    LoadedModel,
    PrefixCache,
    StepFunction,
    TokenTree,
    build_drafter,
    generate,
)
from dynatree_core.clock import StageClock
from dynatree_core.conversation import Conversation
from dynatree_core.cost_model import CostModel
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.drafters.union import UnionDrafter
from dynatree_core.engine import costs
from dynatree_core.engine.costs import measured_costs
from dynatree_core.errors import ContextLimitError, ParameterError, VocabularyMismatchError
from dynatree_core.plugins.registry import plugin_table
from dynatree_core.testing import assert_drafter_contract, assert_lossless
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import VOCAB, greedy, perturbed, tiny_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
LOOP = [7, 3, 5] * 4
PACKAGE = '''
"""Two drafters with models of their own: one of transformers, one that is a plain module."""

import torch

from dynatree_core import Drafter, DraftState, ModelDraftState, Proposals, load_model


class Small(Drafter):
    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.model = load_model(folder).model

    def __str__(self) -> str:
        return f"small(folder={self.folder!r})"

    def models(self, target):
        return (self.model,)

    def start(self, plan):
        return ModelDraftState(self.model, plan)


class Table(torch.nn.Module):
    def __init__(self, vocab: int, seed: int) -> None:
        super().__init__()
        numbers = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed))
        self.weight = torch.nn.Parameter(numbers.log_softmax(dim=-1))
        self.modes = []

    def forward(self, token_ids):
        self.modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return self.weight[token_ids]


class Bigram(Drafter):
    def __init__(self, vocab: int = 37, seed: int = 0, limit: int = 150) -> None:
        self.table, self.limit = Table(vocab, seed), limit

    def __str__(self) -> str:
        return "bigram"

    def models(self, target):
        return [self.table]

    def context_limit(self, target):
        return self.limit

    def start(self, plan):
        return BigramState(self.table)


class BigramState(DraftState):
    def __init__(self, table) -> None:
        self.table = table

    def prefill(self, committed_ids):
        pass

    def propose(self, committed_ids, tree, k):
        top = self.table(tree.token_ids[tree.last_level]).topk(k, dim=-1)
        return Proposals(top.indices, top.values)

    def commit(self, draft_path):
        pass

    def rollback(self):
        pass
'''


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The package is installed: a module and its metadata in a folder that is searched."""
    site = tmp_path_factory.mktemp("site")
    info = site / "own_models-1.0.dist-info"
    info.mkdir()
    (site / "own_models.py").write_text(PACKAGE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own_models\nVersion: 1.0\n")
    entries = "[dynatree.drafters]\nsmall = own_models:Small\nbigram = own_models:Bigram\n"
    (info / "entry_points.txt").write_text(entries)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        plugin_table.cache_clear()
        yield
    plugin_table.cache_clear()
    sys.modules.pop("own_models", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the model that `small` drafts with: one that is often right."""
    path = tmp_path_factory.mktemp("small")
    perturbed("llama", noise=0.02).save_pretrained(path)
    return path


@pytest.fixture
def small(folder: Path) -> Any:
    return build_drafter(f"small(folder={str(folder)!r})")


class Passes:
    """Notes the rows of each pass of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: list[int] = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, arguments: Any, named: Any) -> None:
        self.rows.append(named["input_ids"].shape[1])


def as_built_in(small: Any) -> ModelDrafter:
    return ModelDrafter(copy.deepcopy(small.model))


def passes_of(drafter: Any, prompt: list[int], *, times: int = 1, **options: Any) -> list[int]:
    """The rows of each pass of the drafter's model in some generations, all of which must be right."""
    target = tiny_model("llama")
    [model] = drafter.models(target)
    passes = Passes(model)
    for _ in range(times):
        result = generate(target, drafter, prompt, max_new_tokens=20, **options)
        assert (
            result.token_ids == generate(target, None, prompt, max_new_tokens=20, cache=options.get("cache")).token_ids
        )
    return passes.rows


@pytest.mark.parametrize("policy", ["phase3", "fixed(depth=3)", "linear(depth=5)"])
@pytest.mark.parametrize("cache", [None, "sinks=2,window=6"])
def test_it_makes_the_same_passes(small, policy, cache):
    rows = passes_of(small, PROMPT, policy=policy, cache=cache)
    assert rows == passes_of(as_built_in(small), PROMPT, policy=policy, cache=cache)
    assert len(rows) > 3


def test_a_prefix_is_reused(small):
    options = {"times": 2, "policy": "fixed(depth=3)"}
    rows = passes_of(small, PROMPT, prefix_cache=PrefixCache(), **options)
    assert rows == passes_of(as_built_in(small), PROMPT, prefix_cache=PrefixCache(), **options)
    assert rows.count(len(PROMPT)) == 1, "the prompt goes through it once"
    assert passes_of(small, PROMPT, **options).count(len(PROMPT)) == 2


def test_rows_of_other_weights_are_not_reused(small):
    cache = PrefixCache()
    options = {"policy": "fixed(depth=3)", "prefix_cache": cache}
    assert passes_of(small, PROMPT, **options)[0] == len(PROMPT)
    with torch.no_grad():
        small.model.lm_head.weight.mul_(1.0)
    assert passes_of(small, PROMPT, **options)[0] == len(PROMPT)


def test_a_long_prompt_is_read_in_chunks_with_progress(small, monkeypatch):
    monkeypatch.setattr("dynatree_core.runners.passes.PREFILL_CHUNK", 4)
    told: list[list[tuple[int, int]]] = []
    for drafter in (small, as_built_in(small)):
        told.append([])
        passes_of(drafter, [*PROMPT, *PROMPT], on_prefill=lambda done, of: told[-1].append((done, of)))
    assert told[0] == told[1]
    assert told[0].count((4, 15)) == 1, "for the target; the drafter reads it when it is asked"


def test_its_levels_are_skipped_where_the_lookup_knows_enough(small):
    rows = []
    for drafter in (small, as_built_in(small)):
        union = UnionDrafter([drafter, build_drafter("prompt_lookup")])
        rows.append(passes_of(union, LOOP, policy="linear(depth=3)"))
    assert rows[0] == rows[1]
    assert len(rows[0]) < len(passes_of(small, LOOP, policy="linear(depth=3)"))


def test_a_level_is_free_only_if_no_drafter_with_a_model_was_asked(small):
    """Also where that drafter's levels may not be skipped."""
    target, text = tiny_model("llama"), torch.tensor(LOOP)
    cpu = text.device
    lookup, bigram = build_drafter("prompt_lookup"), build_drafter("bigram")
    found = []
    for parts in ([small, lookup], [lookup, small, lookup], [bigram, small, lookup], [bigram, lookup]):
        state = UnionDrafter(parts).begin(DraftPlan(VOCAB, 40, 16, cpu, StageClock(cpu), target))
        with torch.inference_mode():
            state.prefill(text[:-1])
            found.append(state.propose(text, TokenTree.root(text[-1:]), 2).is_free)
    assert found == [True, True, False, False]


@pytest.mark.parametrize("can_infer", [True, False])
def test_its_model_runs_without_gradients(can_infer, monkeypatch):
    """In inference mode if its weights can be used in it."""
    target, drafter = tiny_model("llama"), build_drafter("bigram")
    monkeypatch.setattr("dynatree_core.engine.resources.can_infer", lambda model: can_infer or model is target)
    result = generate(target, drafter, PROMPT, policy="fixed(depth=3,tau=0.0)", max_new_tokens=12)
    assert result.token_ids == greedy(target, PROMPT, 12)
    assert set(drafter.table.modes) == {(can_infer, False)}


def test_a_text_that_is_too_long_for_it_is_refused_before_anything_runs(small, monkeypatch):
    # which looks once at the rows of a target that was changed, and here a hook is added
    monkeypatch.setattr("dynatree_core.engine.resources.refuse_dependent_rows", lambda *models, **shape: None)
    target, bigram = copy.deepcopy(tiny_model("llama")), build_drafter("bigram(limit=20)")
    target.config.max_position_embeddings = 1000
    small.model.config.max_position_embeddings = 20
    ran = Passes(target).rows
    for drafter in (small, bigram, UnionDrafter([bigram, build_drafter("prompt_lookup")])):
        with pytest.raises(
            ContextLimitError, match="position for each of the 21 tokens of prompt and output, but has 20"
        ):
            generate(target, drafter, PROMPT, max_new_tokens=13)
        assert not ran
        assert generate(target, drafter, PROMPT, max_new_tokens=12).token_ids == greedy(target, PROMPT, 12)
        ran.clear()


def test_another_vocabulary_is_refused(folder):
    drafter = build_drafter(f"small(folder={str(folder)!r})")
    drafter.model.resize_token_embeddings(VOCAB + 600)
    with pytest.raises(VocabularyMismatchError, match=f"the target has {VOCAB} token ids, the drafter {VOCAB + 600}"):
        generate(tiny_model("llama"), drafter, PROMPT)


def test_costs_are_kept_by_its_model(small, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "folder", lambda: tmp_path)

    def measured(drafter: Drafter, family: str = "llama") -> list[dict[str, Any]]:
        for file in tmp_path.iterdir():
            file.unlink()
        measured_costs(tiny_model(family), drafter, rounds=1, patience=0.0)
        found = [json.loads(file.read_text()) for file in tmp_path.iterdir()]
        return [one["of"] for one in found if "draft" in one]

    [of_small] = measured(small)
    assert (of_small["model"], of_small["drafter"]) == ("LlamaForCausalLM", str(small))
    assert [of_small] == measured(small, "gpt2"), "whatever the target is"
    [of_built_in] = measured(as_built_in(small))
    assert of_small | {"drafter": "model"} == of_built_in
    [of_bigram], [of_another] = measured(build_drafter("bigram")), measured(build_drafter(f"bigram(vocab={VOCAB + 1})"))
    assert (of_bigram["model"], of_bigram["drafter"]) == ("Table", "bigram")
    assert of_bigram["shape"] != of_another["shape"]
    [of_union] = measured(UnionDrafter([small, build_drafter("bigram")]))
    assert of_union["drafter"] == f"{small}+bigram"
    assert of_union["shape"] == of_small["shape"]
    assert [one["shape"] for one in of_union["beside"]] == [of_bigram["shape"]]


def test_the_conformance_kit(small):
    assert_drafter_contract(small, max_examples=10)
    assert_lossless(ours.stacks(), drafter=small, max_examples=5)
    assert_drafter_contract("bigram", max_examples=10)


@pytest.mark.parametrize(
    ("method", "answer", "said"),
    [
        ("models", "small", "return a sequence of modules from models, got 'small'"),
        ("models", ["small"], "return a sequence of modules from models"),
        ("context_limit", 0, "return None or a positive int from context_limit, got 0"),
        ("runs_on", "cpu", "return a torch.device or None from runs_on, got 'cpu'"),
        ("price_class", None, "return a string from price_class, got None"),
    ],
)
def test_the_conformance_kit_checks_what_a_drafter_says_of_itself(method, answer, said):
    drafter = build_drafter("bigram")
    setattr(drafter, method, lambda *target: answer)
    with pytest.raises(AssertionError, match=f"drafter 'bigram' must {said}"):
        assert_drafter_contract(drafter, max_examples=1)


def test_the_conformance_kit_needs_a_drafter():
    with pytest.raises(ParameterError, match="needs a drafter, got None"):
        assert_drafter_contract(None)  # type: ignore[arg-type]


def test_benches_and_chats(small, folder):
    target = tiny_model("llama")
    pair = Pair(LoadedModel(target, None, "tiny"), small)
    info = drafter_info(pair)
    assert info is not None
    assert (info.name, info.num_parameters) == (str(small), sum(one.numel() for one in small.model.parameters()))
    assert drafter_info(Pair(pair.target, build_drafter("bigram"))) is None, "it has no configuration to be named by"
    assert pair.drafter_model is None, "only a drafter of the class 'model' is one that transformers could draft with"
    output = greedy(target, PROMPT, 12)
    as_model = Pair(pair.target, as_built_in(small))
    assert replay(pair, PROMPT, output) == replay(as_model, PROMPT, output)

    prices = CostModel(StepFunction((1, 64), (1.0, 2.0)), StepFunction((1, 64), (0.1, 0.2)), 0.0)
    text = Text("any", tuple(PROMPT), tuple(output), len(output))
    policy = "fixed(depth=3)"
    mine, theirs = (rehearse(target, one.drafter, text, policy, prices) for one in (pair, as_model))
    assert mine == theirs
    assert mine.num_passes > 0

    small.model.config.max_position_embeddings = 70
    chat = Conversation(pair.target, None, small, str(small), policy, 9, PrefixCache())  # type: ignore[arg-type]
    assert chat.context_limit == 70
    assert Conversation(pair.target, None, None, "none", policy, 9, PrefixCache()).context_limit == 160  # type: ignore[arg-type]
