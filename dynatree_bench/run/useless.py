"""Drafters that are never right: what a policy does with one shows whether it is ever slower than no drafting.

`random` is a model of two small layers with random weights; `noise` proposes random tokens at no cost and says that it
is sure of them.
"""

from __future__ import annotations

import attrs
import torch
import transformers
from torch import Tensor, nn

from dynatree_core import Drafter, DraftPlan, DraftState, LoadedModel, Proposals, TokenTree
from dynatree_core.drafters.model import ModelDrafter


def useless_drafter(name: str, target: LoadedModel) -> Drafter:
    """One of USELESS."""
    return Noise() if name == "noise" else ModelDrafter(random_model(target))


@attrs.frozen(slots=False)
class Noise(Drafter):
    """Proposes random tokens and claims that the first of them is all but certain."""

    seed: int = 0

    def __str__(self) -> str:
        return "noise"

    def start(self, plan: DraftPlan) -> NoiseState:
        return NoiseState(plan, self.seed)


class NoiseState(DraftState):
    """A generator of its own, so that a run can be repeated."""

    def __init__(self, plan: DraftPlan, seed: int) -> None:
        self.plan = plan
        self.generator = torch.Generator(plan.device).manual_seed(seed)

    def prefill(self, committed_ids: Tensor) -> None:
        pass

    def propose(self, committed_ids: Tensor, tree: TokenTree, k: int) -> Proposals:
        shape = (tree.level_sizes[-1], k)
        device = self.plan.device
        ids = torch.randint(self.plan.vocab_size, shape, generator=self.generator, device=device)
        probs = torch.full(shape, 0.02 / k, device=device)
        probs[:, 0] = 0.97
        return Proposals(ids, probs.log())

    def commit(self, draft_path: tuple[int, ...]) -> None:
        pass

    def rollback(self) -> None:
        pass


def random_model(target: LoadedModel) -> nn.Module:
    """Two small layers with random weights and the target's vocabulary."""
    config = transformers.LlamaConfig(
        vocab_size=target.model.config.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=8192,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    return model.to(target.model.device, target.model.dtype).eval()
