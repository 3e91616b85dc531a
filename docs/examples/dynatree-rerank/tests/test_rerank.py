"""The rule on hand-made trees, and a generation from start to end."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from dynatree_rerank import Rerank
from transformers import LlamaConfig, LlamaForCausalLM

from dynatree_core import StepReport, TokenTree, build_stack, generate, hookimpl
from dynatree_core.testing import assert_hook_contract, assert_lossless

# parent and draft probability of node 1, 2, …; breadth first. Powers of two, so that ties are exact
NODES = [(0, 0.5), (0, 0.25), (1, 0.5), (1, 0.25), (2, 0.5), (3, 1.0), (4, 1.0), (5, 0.5)]
# path probabilities: 1/2      1/4       1/4       1/8        1/8       1/4       1/8       1/16


def tree_of(nodes: list[tuple[int, float]]) -> TokenTree:
    """The tree with these nodes, each a parent and a probability."""
    tree = TokenTree.root(torch.tensor([7]))
    depths = [0]
    for parent, _ in nodes:
        depths.append(depths[parent] + 1)
    for depth in range(1, max(depths) + 1):
        level = [node for node, at in zip(nodes, depths[1:], strict=True) if at == depth]
        parents, probs = zip(*level, strict=True)
        tree = tree.grow(torch.tensor(parents), torch.arange(len(level)), torch.tensor(probs).log())
    return tree


def kept(nodes: int) -> list[int]:
    keep = Rerank(nodes=nodes).keep_nodes(tree_of(NODES))
    return [node for node in range(1, len(NODES) + 1) if keep is None or keep[node]]


def test_keeps_the_most_probable_paths() -> None:
    assert kept(1) == [1]
    assert kept(4) == [1, 2, 3, 6]
    assert kept(7) == [1, 2, 3, 4, 5, 6, 7]


def test_of_equals_the_shallower_is_kept() -> None:
    # 2, 3 and 6 tie, and 6 is a child of 3; 4, 5 and 7 tie, and 7 is a child of 4
    assert kept(2) == [1, 2]
    assert kept(3) == [1, 2, 3]
    assert kept(6) == [1, 2, 3, 4, 5, 6]


def test_has_no_opinion_on_a_small_tree() -> None:
    assert Rerank(nodes=len(NODES)).keep_nodes(tree_of(NODES)) is None


@pytest.mark.parametrize("nodes", range(1, len(NODES)))
def test_no_subtree_of_that_size_is_more_probable(nodes: int) -> None:
    tree = tree_of(NODES)
    keep = Rerank(nodes=nodes).keep_nodes(tree)
    assert keep is not None
    keep[0] = True
    assert torch.equal(tree.close_under_ancestors(keep), keep)
    probs = tree.cum_logprob.exp()
    sums = []
    for chosen in itertools.combinations(range(1, tree.num_nodes), nodes):
        mask = torch.zeros_like(keep)
        mask[[0, *chosen]] = True
        if torch.equal(tree.close_under_ancestors(mask), mask):
            sums.append(probs[mask].sum().item())
    assert math.isclose(probs[keep].sum().item(), max(sums), rel_tol=1e-6)


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("drafter_seed", [0, 1])  # the target itself, and a stranger
@pytest.mark.parametrize("nodes", [1, 12])
def test_generation_equals_greedy(nodes: int, drafter_seed: int) -> None:
    sizes = []

    class Recorder:
        @hookimpl
        def on_iteration_end(self, report: StepReport) -> None:
            sizes.append(report.tree.num_drafted)

    target, drafter = tiny_llama(0), tiny_llama(drafter_seed)
    prompt = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    stack = [f"confidence+dynamic_depth+rerank(nodes={nodes})", Recorder()]
    result = generate(target, drafter, prompt, policy=stack, max_new_tokens=32, tau=0.0)
    greedy = target.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=32)
    assert result.token_ids == greedy[0, prompt.shape[1] :].tolist()
    assert max(sizes) == nodes  # there was more to verify, and it was cut


def test_is_composed_by_name() -> None:
    stack = build_stack("confidence+dynamic_depth+rerank(nodes=12)")
    assert stack.find("rerank") == Rerank(nodes=12)
    assert str(stack) == "confidence+dynamic_depth+rerank(nodes=12)"


@pytest.mark.parametrize("nodes", [1, 5])
def test_it_conforms(nodes: int) -> None:
    assert_hook_contract(f"rerank(nodes={nodes})")
    assert_lossless(f"rerank(nodes={nodes})")
