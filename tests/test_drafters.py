"""What drafters propose, against plain computation."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from unittest import mock

import attrs
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import LlamaModel

from dynatree_core import (
    DraftPlan,
    Engine,
    Frontier,
    Proposals,
    Session,
    TokenTree,
    build_drafter,
    generate,
    hookimpl,
    run,
)
from dynatree_core.cache.sink_cache import SinkWindow
from dynatree_core.clock import StageClock
from dynatree_core.drafters import prompt_lookup
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.drafters.prompt_lookup import DRAFTED_EVIDENCE, LOOK_AHEAD, UNSEEN_WEIGHT
from dynatree_core.errors import DrafterError, ModelLoadError, ParameterError, PromptError, UnsupportedModelError
from dynatree_core.testing import assert_drafter_contract
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.conformance import DRAFTER_PROPERTIES
from dynatree_core.testing.models import VOCAB, greedy, perturbed, tiny_model

CPU = torch.device("cpu")


def plan(num_tokens: int = 120, max_nodes: int = 64, kept: SinkWindow | None = None) -> DraftPlan:
    return DraftPlan(VOCAB, num_tokens, max_nodes, CPU, StageClock(CPU), tiny_model("llama"), kept)


@pytest.mark.parametrize("family", ours.FAMILIES)
def test_model_proposals_are_those_of_a_plain_pass_over_the_path(family):
    """At every node of every level, over several iterations with commits between them."""
    target, drafter = tiny_model(family), perturbed(family, noise=0.02)
    checked = []

    class Checking:
        @hookimpl
        def branch_factor(self, frontier: Frontier) -> int:
            text = session.committed_ids[:-1].tolist()
            level = frontier.tree.last_level
            for row, node in enumerate(range(level.start, level.stop)):
                path = frontier.tree.token_ids[frontier.tree.ancestor_mask[node]].tolist()
                logits = drafter(input_ids=torch.tensor([text + path])).logits[0, -1].float()
                expected = logits.log_softmax(-1).topk(frontier.max_branch)
                torch.testing.assert_close(frontier.top_logprobs[row], expected.values, rtol=1e-5, atol=1e-6)
                assert frontier.top_token_ids[row].tolist() == expected.indices.tolist()
                checked.append(node)
            return 2

    Checking.__deepcopy__ = lambda self, memo: self
    session = Session(
        target, drafter, [1, 2, 3], policy=Checking(), max_new_tokens=24, max_depth=3, tau=0.02, max_nodes=20
    )
    for _ in run(session):
        pass
    assert session.result().token_ids == greedy(target, [1, 2, 3], 24)
    assert len(checked) > 40
    assert {bool(step.num_accepted) for step in session.steps} == {True, False}  # commits with and without a path


@given(tree=ours.trees(), data=st.data())
def test_a_model_may_be_asked_about_some_levels_only(tree, data):
    """It says the same of them, and of the next tree, as when it is asked about all."""
    drafter, text = ModelDrafter(perturbed("llama")), torch.tensor([3, 1, 4, 1, 5])
    states = [drafter.start(plan()) for _ in range(2)]
    asked = [depth for depth in range(tree.max_depth + 1) if data.draw(st.booleans())]
    path = data.draw(st.sampled_from([[], *(ancestors_of(tree, node) for node in range(1, tree.num_nodes))]))
    text[-1] = tree.token_ids[0]
    said: list[list[Proposals]] = [[], []]
    with torch.inference_mode():
        for state, depths, found in zip(states, (range(tree.max_depth + 1), asked), said, strict=True):
            state.prefill(text[:-1])
            for depth in depths:
                growing = tree.subtree(tree.depth <= depth)
                proposals = state.propose(text, growing, 4)
                if depth in asked:
                    found.append(proposals)
            state.commit(tuple(path))
            longer = torch.cat([text, tree.token_ids[path], torch.tensor([7])])
            found.append(state.propose(longer, TokenTree.root(longer[-1:]), 4))
    for all_levels, some in zip(*said, strict=True):
        torch.testing.assert_close(some.logprobs, all_levels.logprobs, rtol=1e-5, atol=1e-6)
        assert torch.equal(some.token_ids, all_levels.token_ids)


@pytest.mark.parametrize("kept", [None, SinkWindow(2, 5)])
@given(data=st.data())
def test_a_model_that_was_left_out_says_what_a_new_one_says(kept, data):
    """Over iterations in which it is asked about some levels or none, and which end in any way."""
    drafter, text = ModelDrafter(perturbed("llama")), [3, 1, 4, 1, 5]
    state = drafter.start(plan(kept=kept))
    with torch.inference_mode():
        state.prefill(torch.tensor(text[:-1]))
        for _ in range(data.draw(st.integers(1, 6))):
            tree = data.draw(ours.trees(max_depth=3, max_width=3))
            tree = attrs.evolve(tree, token_ids=torch.cat([torch.tensor(text[-1:]), tree.token_ids[1:]]))
            committed = torch.tensor(text)
            for depth in data.draw(st.lists(st.integers(0, tree.max_depth), unique=True).map(sorted)):
                growing = tree.subtree(tree.depth <= depth)
                said = state.propose(committed, growing, 4)
                if kept is None:  # where it drops tokens depends on when it was asked
                    check_like_new(drafter, committed, growing, said)
            match data.draw(st.sampled_from(["commit", "rollback", "break"])):
                case "commit":
                    path = data.draw(
                        st.sampled_from([[], *(ancestors_of(tree, node) for node in range(1, tree.num_nodes))])
                    )
                    state.commit(tuple(path))
                    text = [*text, *tree.token_ids[path].tolist(), data.draw(ours.token_ids)]
                case "rollback":
                    state.rollback()
                case _:  # the session goes on after a break
                    state.rollback()
                    state.prefill(torch.tensor(text[:-1]))
        last = torch.tensor(text)
        said = state.propose(last, TokenTree.root(last[-1:]), 4)
        assert bool(said.logprobs.isfinite().all())
        if kept is None:
            check_like_new(drafter, last, TokenTree.root(last[-1:]), said)


def check_like_new(drafter: ModelDrafter, committed: torch.Tensor, tree: TokenTree, said: Proposals) -> None:
    new = drafter.start(plan())
    new.prefill(committed[:-1])
    for depth in range(tree.max_depth + 1):
        expected = new.propose(committed, tree.subtree(tree.depth <= depth), 4)
    torch.testing.assert_close(said.logprobs, expected.logprobs, rtol=1e-5, atol=1e-6)
    assert torch.equal(said.token_ids, expected.token_ids)


def ancestors_of(tree: TokenTree, node: int) -> list[int]:
    """A drafted node's path below the root, itself included."""
    return [place for place in tree.ancestor_mask[node].nonzero().flatten().tolist() if place]


@pytest.mark.parametrize("title", DRAFTER_PROPERTIES)
@pytest.mark.parametrize("name", ["prompt_lookup", "prompt_lookup(max_ngram=2,max_matches=3)"])
def test_prompt_lookup_keeps_to_the_contract(name, title):
    DRAFTER_PROPERTIES[title](name, 20)


@pytest.mark.parametrize("family", ours.FAMILIES)
def test_model_drafters_keep_to_the_contract(family):
    assert_drafter_contract(perturbed(family), max_examples=20)


def naive_lookup(text: list[int], path: list[int], max_ngram: int, max_matches: int) -> dict[int, float]:
    """The drafter's formula by counting: what follows each earlier occurrence of the suffix, after the path."""
    last = len(text) - 1
    occurrences = []
    for end in range(last):
        length = 0
        while length < min(max_ngram, end + 1) and text[end - length] == text[last - length]:
            length += 1
        occurrences.append((length, end))
    followed = sorted(occurrences, reverse=True)[:max_matches]
    votes: defaultdict[int, float] = defaultdict(float)
    total = UNSEEN_WEIGHT
    for length, end in followed:
        period = last - end
        continuation = [text[end + 1 + d % period] for d in range(len(path) + 1)]
        if length and continuation[: len(path)] == path:
            weight = (length + DRAFTED_EVIDENCE * len(path)) ** 2
            votes[continuation[len(path)]] += weight
            total += weight
    return {token: vote / total for token, vote in votes.items()}


@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=24),
    max_ngram=st.integers(1, 5),
    max_matches=st.integers(1, 8),
    k=st.integers(1, 6),
    is_long=st.booleans(),
    tabulates=st.booleans(),
)
@example(
    text=[1, 2, 1, 3, 2] * 40, max_ngram=3, max_matches=150, k=3, is_long=False, tabulates=True
)  # more matches than are looked ahead of together
def test_prompt_lookup_counts_as_the_formula_says(text, max_ngram, max_matches, k, is_long, tabulates):
    with (
        mock.patch.object(prompt_lookup, "LONG", 1 if is_long else 2048),
        mock.patch.object(prompt_lookup, "tabulates", return_value=tabulates),  # as on a GPU
    ):
        check_lookup(text, max_ngram, max_matches, k)


def check_lookup(text: list[int], max_ngram: int, max_matches: int, k: int) -> None:
    drafter = build_drafter(f"prompt_lookup(max_ngram={max_ngram},max_matches={max_matches})")
    state, tree = drafter.start(plan()), TokenTree.root(torch.tensor(text[-1:]))
    committed = torch.tensor(text)
    for _ in range(LOOK_AHEAD + 2):
        proposals = state.propose(committed, tree, k)
        assert proposals.logprobs.shape == proposals.token_ids.shape == (tree.level_sizes[-1], k)
        children = []
        for row, node in enumerate(range(tree.last_level.start, tree.last_level.stop)):
            path = tree.token_ids[tree.ancestor_mask[node]].tolist()[1:]
            expected = naive_lookup(text, path, max_ngram, max_matches)
            logprobs = proposals.logprobs[row].tolist()
            found = {
                token: math.exp(logprob)
                for token, logprob in zip(proposals.token_ids[row].tolist(), logprobs, strict=True)
                if logprob > -math.inf
            }
            assert len(found) == min(k, len(expected))
            assert all(found[token] == pytest.approx(expected[token], rel=1e-5) for token in found)
            assert sorted(found.values()) == pytest.approx(sorted(expected.values())[-len(found) :] if found else [])
            assert logprobs == sorted(logprobs, reverse=True)
            children += [(node, token, logprob) for token, logprob in zip(
                proposals.token_ids[row].tolist(), logprobs, strict=True) if logprob > -math.inf]  # fmt: skip
        children.append((tree.num_nodes - 1, 9, -1.0))  # as another drafter has proposed it: nothing goes on there
        parents, tokens, logprobs = map(list, zip(*children, strict=True))
        tree = tree.grow(torch.tensor(parents), torch.tensor(tokens), torch.tensor(logprobs))


def test_prompt_lookup_branches_where_the_text_did():
    text = [1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2, 3]
    state = build_drafter("prompt_lookup").start(plan())
    proposals = state.propose(torch.tensor(text), TokenTree.root(torch.tensor([3])), 4)
    assert set(proposals.token_ids[0, :2].tolist()) == {4, 5}
    assert proposals.logprobs[0, 2:].tolist() == [-math.inf] * 2
    # the later occurrence matches "9 1 2 3", the earlier "1 2 3": 16 and 9 against 4 for neither
    assert proposals.token_ids[0, 0] == 5
    assert proposals.logprobs[0, :2].exp().tolist() == pytest.approx([16 / 29, 9 / 29])


def test_a_text_of_one_token_has_nothing_to_say_about_any_level():
    state, root = build_drafter("prompt_lookup").start(plan()), TokenTree.root(torch.tensor([5]))
    tree = root.grow(torch.tensor([0, 0]), torch.tensor([1, 2]), torch.zeros(2))  # as another drafter has grown it
    for grown in (root, tree):
        proposals = state.propose(torch.tensor([5]), grown, 3)
        assert proposals.token_ids.shape == (grown.level_sizes[-1], 3)
        assert bool((proposals.logprobs == -math.inf).all())


def test_prompt_lookup_follows_a_loop_beyond_the_text():
    """In a loop the copied text runs into itself, so trees may be deeper than the loop is long."""
    target = tiny_model("llama")
    loop = [5, 6, 7] * 6
    state, tree = build_drafter("prompt_lookup").start(plan()), TokenTree.root(torch.tensor([7]))
    tokens = []
    for _ in range(8):
        proposals = state.propose(torch.tensor(loop), tree, 1)
        tokens.append(int(proposals.token_ids[0, 0]))
        tree = tree.grow(torch.tensor([tree.num_nodes - 1]), proposals.token_ids[0, :1], proposals.logprobs[0, :1])
    assert tokens == [5, 6, 7, 5, 6, 7, 5, 6]
    assert generate(target, "prompt_lookup", loop, max_new_tokens=20).token_ids == greedy(target, loop, 20)


def test_prompt_lookup_on_every_device(device):
    text = torch.tensor([1, 2, 3, 1, 2], device=device)
    proposals = build_drafter("prompt_lookup").start(plan()).propose(text, TokenTree.root(text[-1:]), 3)
    assert proposals.token_ids.device == device
    assert proposals.token_ids[0, 0] == 3


def test_model_drafter_loads_by_folder(tmp_path):
    target = tiny_model("llama")
    target.save_pretrained(tmp_path / "drafter")
    drafter = build_drafter(f"model(model={str(tmp_path / 'drafter')!r})")
    result = generate(target, drafter, [1, 2, 3], policy="linear(depth=4)", max_new_tokens=20)
    assert result.token_ids == greedy(target, [1, 2, 3], 20)
    assert result.report.path_acceptance > 0.5
    with pytest.raises(ModelLoadError):
        build_drafter(f"model(model={str(tmp_path / 'nothing')!r})")


def test_unusable_drafter_models():
    with pytest.raises(UnsupportedModelError, match="the drafter"):
        ModelDrafter(LlamaModel(tiny_model("llama").config).eval())
    with pytest.raises(ParameterError, match="must be a model, a folder or a hub id, got 3"):
        generate(tiny_model("llama"), "model(model=3)", [1])


def with_a_larger_head(more: int, seed: int = 0) -> torch.nn.Module:
    """A model that can say more tokens than it can read, as where a head alone is padded."""
    model = copy.deepcopy(tiny_model("llama", seed, vocab_size=200))
    head = torch.nn.Linear(32, 200 + more, bias=False).double()
    with torch.no_grad():
        head.weight[:200] = model.lm_head.weight
        head.weight[200:] = 0.01 if seed == 0 else 3 * model.lm_head.weight[:more]  # never said, and often
    model.lm_head = head
    return model


class Unreadable(ModelDrafter):
    """Says a token that the target can say, but not read."""

    def start(self, plan):
        state = super().start(plan)
        state.num_outputs, state.token_of = 200, torch.full((200,), 201)
        return state


@pytest.mark.parametrize("pads_trees", [False, True])
def test_a_drafter_that_says_what_the_target_cannot_read_is_to_blame(pads_trees):
    engine = Engine(with_a_larger_head(3), Unreadable(tiny_model("llama", 1, vocab_size=200)), pads_trees=pads_trees)
    with pytest.raises(DrafterError, match="token ids must be from 0 to 199"):
        engine.submit([3, 1, 4, 1, 5, 9], policy="fixed(depth=2,tau=0.0)", max_new_tokens=8).result()


def test_no_token_is_drafted_that_the_target_cannot_read():
    target, drafter, prompt = with_a_larger_head(3), with_a_larger_head(3, seed=1), [3, 1, 4, 1, 5, 9]
    text = torch.tensor([prompt])
    assert (drafter(text).logits[0].argmax(dim=-1) >= 200).any()
    for policy in ("fixed(depth=4,tau=0.0)", "phase3"):
        result = generate(target, drafter, prompt, policy=policy, max_new_tokens=16)
        assert result.token_ids == greedy(target, prompt, 16)
    with pytest.raises(PromptError, match="prompt tokens must be from 0 to 199"):
        generate(target, drafter, [3, 201])
