"""A drafter that looks at text: it gets the target's tokenizer wherever a generation begins."""

from __future__ import annotations

import copy
import itertools
from importlib.metadata import EntryPoint

import attrs
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dynatree_bench.run.methods import replay
from dynatree_bench.run.pairs import Pair
from dynatree_core import (
    Drafter,
    DraftPlan,
    DraftState,
    Proposals,
    Session,
    TokenTree,
    generate,
    hf,
    hookimpl,
    run,
    stream,
)
from dynatree_core.cache.prefix_cache import PrefixCache
from dynatree_core.cli.group import main
from dynatree_core.conversation import Conversation
from dynatree_core.drafters.base import padded_proposals
from dynatree_core.drafters.union import UnionDrafter
from dynatree_core.engine import costs
from dynatree_core.errors import ParameterError
from dynatree_core.models.load import LoadedModel
from dynatree_core.plugins import registry as registry
from dynatree_core.testing import assert_drafter_contract
from dynatree_core.testing.models import VOCAB, tiny_model

WORDS = [f"w{number}" for number in range(VOCAB)]
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
OPTIONS = {"policy": "linear(depth=3)", "max_new_tokens": 12}
entry_points = registry.entry_points
started: list[object] = []  # the tokenizers that drafters were told of


@attrs.frozen(slots=False)
class Phrases(Drafter):
    """Proposes what follows a word in some phrases, which are text."""

    phrases: str = "w1 w2 w3 w1 w4"

    def __str__(self) -> str:
        return "phrases"

    def start(self, plan: DraftPlan) -> DraftState:
        if plan.tokenizer is None:
            raise ParameterError("phrases needs the target's tokenizer, got none; give it as tokenizer=...")
        started.append(plan.tokenizer)
        return PhraseState(plan.tokenizer(self.phrases, add_special_tokens=False).input_ids)


class PhraseState(DraftState):
    def __init__(self, token_ids: list[int]) -> None:
        self.next_ids = dict(itertools.pairwise(token_ids))

    def prefill(self, committed_ids: torch.Tensor) -> None:
        pass

    def propose(self, committed_ids: torch.Tensor, tree: TokenTree, k: int) -> Proposals:
        level = tree.token_ids[tree.last_level].tolist()
        token_ids = torch.tensor([[self.next_ids.get(token, 0)] for token in level])
        known = torch.tensor([[0.9 if token in self.next_ids else 0.0] for token in level])
        return padded_proposals(token_ids, known.log(), k)

    def commit(self, draft_path: tuple[int, ...]) -> None:
        pass

    def rollback(self) -> None:
        pass


class Prices:
    """Looks at what passes cost, for which the drafter is measured."""

    @hookimpl
    def should_expand(self, frontier):
        return frontier.costs.rest_seconds >= 0 and frontier.depth < 2


@pytest.fixture(scope="module")
def tokenizer():
    model = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="w0"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="w0", pad_token="w0")


@pytest.fixture(autouse=True)
def told():
    """The tokenizers that drafters were told of in the test."""
    started.clear()
    return started


@pytest.fixture
def phrases(tokenizer):
    """A drafter that knows what the target says after the prompt, as text."""
    target = tiny_model("llama")
    output = target.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False, max_new_tokens=12)
    return Phrases(tokenizer.decode(output[0, PROMPT.shape[1] - 1 :])), output


@pytest.fixture
def installed(monkeypatch):
    """`phrases` is the name of an installed drafter."""
    ours = EntryPoint("phrases", f"{__name__}:Phrases", registry.DRAFTERS)
    given = lambda *, group: [*entry_points(group=group), *([ours] if group == registry.DRAFTERS else [])]  # noqa: E731
    monkeypatch.setattr(registry, "entry_points", given)
    registry.plugin_table.cache_clear()
    yield
    registry.plugin_table.cache_clear()


def test_generations_in_python(tokenizer, phrases, told):
    drafter, output = phrases
    target, expected = tiny_model("llama"), output[0, PROMPT.shape[1] :].tolist()
    for given in (drafter, UnionDrafter([drafter, Phrases("w1 w2")])):
        result = generate(target, given, PROMPT, tokenizer=tokenizer, **OPTIONS)
        assert result.token_ids == expected
        assert result.report.num_drafted_nodes > 0
    assert result.report.num_accepted_tokens > 0  # it knew what comes
    steps = stream(target, drafter, PROMPT, tokenizer=tokenizer, **OPTIONS)
    assert [token for report in steps for token in report.token_ids] == expected
    assert [*run(Session(target, drafter, PROMPT, tokenizer=tokenizer, **OPTIONS))]
    assert len(told) == 5
    assert all(one is tokenizer for one in told)


def test_through_transformers(tokenizer, phrases, told):
    drafter, output = phrases
    target = tiny_model("llama")
    asked = {"attention_mask": torch.ones_like(PROMPT), "drafter": drafter, **OPTIONS}
    assert torch.equal(hf.generate_with(target, PROMPT, tokenizer=tokenizer, **asked), output)
    for given in ({"options": {"tokenizer": tokenizer}}, {"tokenizer": tokenizer}):
        assert torch.equal(target.generate(PROMPT, custom_generate=hf.generate, **given, **asked), output)
    assert all(one is tokenizer for one in told)
    assert len(told) == 3
    with pytest.raises(ParameterError, match="phrases needs the target's tokenizer, got none"):
        target.generate(PROMPT, custom_generate=hf.generate, **asked)


def test_without_a_tokenizer_it_refuses(phrases):
    with pytest.raises(ParameterError, match="phrases needs the target's tokenizer, got none; give it as"):
        generate(tiny_model("llama"), phrases[0], PROMPT, **OPTIONS)


def test_a_drafter_is_measured_with_it(tokenizer, phrases, told, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "folder", lambda: tmp_path)
    drafter, output = phrases
    options = {"policy": [Prices()], "max_new_tokens": 4, "tokenizer": tokenizer}
    assert (
        generate(copy.deepcopy(tiny_model("llama")), drafter, PROMPT, **options).token_ids == output[0, 8:12].tolist()
    )
    assert len(told) > 1
    assert all(one is tokenizer for one in told)


def test_chats_and_benches(tokenizer, phrases, told):
    drafter, output = phrases
    loaded = LoadedModel(tiny_model("llama"), tokenizer, "tiny")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    chat = Conversation(
        target=loaded, tokenizer=tokenizer, drafter=drafter, drafter_name="phrases", policy="linear(depth=2)",
        max_new_tokens=4, prefix_cache=PrefixCache(),
    )  # fmt: skip
    assert [*run(chat.ask("w1 w2 w3"))]
    found = replay(Pair(loaded, drafter), PROMPT[0].tolist(), output[0, 8:].tolist())
    assert 0 in found.rank
    assert len(told) == 2
    assert all(one is tokenizer for one in told)


def test_commands(installed, tokenizer, told, tmp_path):
    copy.deepcopy(tiny_model("llama")).float().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    models = ["--target", str(tmp_path), "--drafter", "phrases"]
    for command in (
        ["generate", "--compare", "--policy", "linear(depth=2)", "--max-new-tokens", "6", *models, "w1 w2 w3"],
        ["audit", "--policy", "linear(depth=2)", "--max-new-tokens", "6", *models, "w1 w2 w3"],
    ):
        told.clear()
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 0
        assert told
        assert all(one.get_vocab() == tokenizer.get_vocab() for one in told)


def test_the_conformance_kit(tokenizer):
    assert_drafter_contract(Phrases("w1 w2 w3 w1 w4"), tokenizer=tokenizer, max_examples=10)
    with pytest.raises(ParameterError, match="needs the target's tokenizer"):
        assert_drafter_contract(Phrases(), max_examples=1)
