"""The synthetic Markov pair: a target and a drafter of any architecture and size, without anybody's weights.

Both have random weights and do their whole forward pass. Then their logits are replaced, the target's by those of a
fixed random source, the drafter's by those of its perturbed copy, so that time is that of real models of this shape
while acceptance is known exactly:

- The target's text is a walk through the vocabulary in a fixed random order, which repeats nothing before all tokens
  have come.
- At each token the drafter has a confidence c of its own, drawn once: with probability c its first choice is the
  target's token, else the target's token is its choice of rank r ≥ 1 with probability (1 − b)·b^(r−1).
- The drafter's probabilities say just that, so they are calibrated: of the nodes to which it gives probability p, a
  share p is accepted.

The mean confidence a and the decay b set the acceptance by rank: a, (1 − a)(1 − b), (1 − a)(1 − b)b, … Draws at
different tokens do not depend on each other, so that the formulas of dynatree_bench.report.formulas hold exactly. The
text is meant for greedy decoding; a drafter that copies from the text before, such as prompt lookup, finds nothing in
it.
"""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dynatree_core.errors import InputError, nearest_match

TARGET_CONFIDENCE = 0.9  # what the target gives to its token: far from a tie in any dtype
MAX_CONFIDENCE = 0.9999  # of the drafter, so that a logarithm of the rest exists
CONCENTRATION = 1.0  # of the confidences' beta law: most are high or low, as those of language models are


@attrs.frozen
class Shape:
    """The architectures of a pair, as configurations of transformers."""

    target: dict[str, Any]  # "model_type" and whatever that configuration takes
    drafter: dict[str, Any]


def _neox(hidden_size: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "vocab_size": 50304,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "max_position_embeddings": 2048,
    }


def _llama(hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, **others: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "max_position_embeddings": 4096,
        **others,
    }


# the sizes of published models
SHAPES = {
    "pythia-2.8b+70m": Shape(_neox(2560, 32, 32), _neox(512, 6, 8)),
    "llama-7b+68m": Shape(_llama(4096, 11008, 32, 32), _llama(768, 3072, 2, 12)),
    "llama-8b+1b": Shape(
        _llama(4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=128256),
        _llama(2048, 8192, 16, 32, num_key_value_heads=8, vocab_size=128256),
    ),
    "tiny": Shape(_llama(32, 48, 2, 4, vocab_size=8192), _llama(16, 24, 1, 2, vocab_size=8192)),
}


def rank_acceptance(acceptance: float, decay: float, num_ranks: int) -> list[float]:
    """The acceptance of each of a drafter's first choices, from its mean confidence and the decay."""
    others = [(1 - acceptance) * (1 - decay) * decay**rank for rank in range(num_ranks - 1)]
    return [acceptance, *others][:num_ranks]


@attrs.frozen(eq=False)
class MarkovSource:
    """The text of the target, and what the drafter says of it."""

    acceptance: float  # a: the mean confidence of the drafter, and its share of right first choices
    decay: float  # b
    order: Tensor  # [vocab] int64: the tokens in the order of the text, which goes round
    next_ids: Tensor  # [vocab] int64: the target's token behind each token
    confidence: Tensor  # [vocab] float32: the drafter's behind each token
    rank: Tensor  # [vocab] int64: of the target's token among the drafter's choices behind each token

    @classmethod
    def draw(cls, vocab_size: int, *, acceptance: float = 0.65, decay: float = 0.6, seed: int = 0) -> MarkovSource:
        """The source of these numbers, the same for the same seed.

        Raises:
            InputError: an acceptance or a decay with which the first choice would not be the drafter's best.
        """
        if not 0 < decay < 1:
            raise InputError(f"the decay must be above 0 and below 1, got {decay}")
        # the first choice is the best one while c > (1 − c)(1 − b)
        lowest = (1 - decay) / (2 - decay)
        if not lowest < acceptance < MAX_CONFIDENCE:
            raise InputError(
                f"the acceptance must be above {lowest:.3f}, where with a decay of {decay} a second choice would be as "
                f"good as the first, and below {MAX_CONFIDENCE}, got {acceptance}"
            )
        rng = np.random.default_rng(seed)
        order = rng.permutation(vocab_size)
        next_ids = np.empty_like(order)
        next_ids[order] = np.roll(order, -1)
        mean = (acceptance - lowest) / (MAX_CONFIDENCE - lowest)
        spread = rng.beta(CONCENTRATION * mean, CONCENTRATION * (1 - mean), vocab_size)
        confidence = lowest + (MAX_CONFIDENCE - lowest) * spread
        is_first = rng.random(vocab_size) < confidence
        rank = np.where(is_first, 0, rng.geometric(1 - decay, vocab_size))
        return cls(
            acceptance,
            decay,
            torch.from_numpy(order),
            torch.from_numpy(next_ids),
            torch.from_numpy(confidence.astype(np.float32)),
            torch.from_numpy(rank),
        )

    @property
    def vocab_size(self) -> int:
        return self.order.numel()

    def text(self, start: int, num_tokens: int) -> list[int]:
        """Tokens of the target's text from a place on."""
        places = (start + torch.arange(num_tokens)) % self.vocab_size
        return self.order[places].tolist()

    def prompts(self, num_prompts: int, num_tokens: int) -> list[list[int]]:
        """Pieces of the text, as far from each other as can be."""
        return [self.text(i * self.vocab_size // num_prompts, num_tokens) for i in range(num_prompts)]


class MarkovHead(nn.Module):
    """What takes the place of a model's logits: log-probabilities that follow from the last token alone.

    The first choices have the source's probabilities, all other tokens share the rest. They are looked up in tables of
    the vocabulary's length, which are small beside any model, without a transfer to the host.
    """

    is_replayable = True  # it only tells the device what to do (dynatree_core.runners.cudagraph)
    next_ids: Tensor  # [vocab] int64
    rank: Tensor  # [vocab] int64
    choice_logits: Tensor  # [vocab, choices] float32
    rest_logits: Tensor  # [vocab] float32, of each of the other tokens

    def __init__(self, source: MarkovSource, confidence: Tensor, rank: Tensor, num_choices: int) -> None:
        super().__init__()
        place = torch.arange(num_choices, dtype=torch.float64)
        wrong = (1 - confidence.double()).log()  # [vocab]
        later = wrong[:, None] + np.log1p(-source.decay) + (place - 1) * np.log(source.decay)
        choice_logits = torch.where(place == 0, confidence.double().log()[:, None], later)
        # what is left once the choices have theirs; with one choice that is all but the first
        rest = wrong + (num_choices - 1) * np.log(source.decay) - np.log(source.vocab_size - num_choices)
        tables = {
            "next_ids": source.next_ids,
            "rank": rank.clamp(max=num_choices),
            "choice_logits": choice_logits.float(),
            "rest_logits": rest.float(),
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def forward(self, token_ids: Tensor, logits: Tensor) -> Tensor:
        """Overwrite logits [batch, rows, vocab] with those behind these tokens [batch, rows]."""
        next_ids, rank = self.next_ids[token_ids][..., None], self.rank[token_ids][..., None]
        place = torch.arange(self.choice_logits.shape[1], device=logits.device)
        # the tokens behind the target's, as numbers, are the wrong choices: all different, and different from it
        offset = torch.where(place < rank, place + 1, torch.where(place == rank, 0, place))
        choices = (next_ids + offset) % logits.shape[-1]  # [batch, rows, choices]
        # times 0 rather than overwritten: NaN stays NaN, and no compiler may leave out what computed them
        logits.mul_(0).add_(self.rest_logits[token_ids][..., None].to(logits.dtype))
        return logits.scatter_(-1, choices, self.choice_logits[token_ids].to(logits.dtype))


@attrs.frozen(eq=False)
class SyntheticPair:
    """Two models that may be used as any others, and the source of their text."""

    name: str
    target: nn.Module
    drafter: nn.Module
    source: MarkovSource


def synthetic_pair(
    shape: str | Shape = "tiny",
    *,
    acceptance: float = 0.65,
    decay: float = 0.6,
    seed: int = 0,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    num_choices: int = 64,
) -> SyntheticPair:
    """A pair of models with random weights and the text of a random source.

    Args:
        shape: one of SHAPES, or two configurations with one vocabulary size.
        acceptance: the share of the drafter's first choices that are the target's token.
        decay: how fast acceptance falls from its second choice on, each relative to the one before.
        seed: of weights and text.
        dtype: of the weights.
        device: where they are made.
        num_choices: children that the drafter tells apart; the rest of the vocabulary shares the rest.

    Raises:
        InputError: a shape that is not known, or numbers that make no source.
    """
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise InputError(
                f"the shape must be one of {', '.join(SHAPES)}, got '{shape}'{nearest_match(shape, SHAPES)}"
            )
        name, shape = f"synthetic {shape}", SHAPES[shape]
    else:
        name = f"synthetic {shape.target['model_type']}+{shape.drafter['model_type']}"
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    target = _random_model(shape.target, seed, dtype, torch.device(device), f"{name}, target")
    drafter = _random_model(shape.drafter, seed + 1, dtype, torch.device(device), f"{name}, drafter")
    sizes = [int(model.get_output_embeddings().weight.shape[0]) for model in (target, drafter)]
    if len(set(sizes)) > 1 or sizes[0] <= 2 * num_choices:
        raise InputError(
            f"the models must have one vocabulary of more than twice the {num_choices} choices, got {sizes[0]} and "
            f"{sizes[1]} tokens"
        )
    source = MarkovSource.draw(sizes[0], acceptance=acceptance, decay=decay, seed=seed)
    for model, head in zip((target, drafter), _heads(source, num_choices), strict=True):
        _replace_logits(model, head)
    return SyntheticPair(name, target, drafter, source)


def let_follow(source: MarkovSource, target: Any, drafter: Any) -> None:
    """Let the models of a synthetic pair say from now on what another source of the same vocabulary size says.

    The tables are overwritten where they are: a recorded pass goes on reading them (dynatree_core.runners.cudagraph).
    """
    num_choices = drafter.markov_head.choice_logits.shape[1]
    for model, head in zip((target, drafter), _heads(source, num_choices), strict=True):
        for ours, new in zip(model.markov_head.buffers(), head.buffers(), strict=True):
            ours.copy_(new)


def _heads(source: MarkovSource, num_choices: int) -> tuple[MarkovHead, MarkovHead]:
    """The target's and the drafter's."""
    certain = torch.full_like(source.confidence, TARGET_CONFIDENCE)
    target = MarkovHead(source, certain, torch.zeros_like(source.rank), 1)
    return target, MarkovHead(source, source.confidence, source.rank, num_choices)


def _random_model(settings: dict[str, Any], seed: int, dtype: torch.dtype, device: torch.device, name: str) -> Any:
    own = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **settings}
    config = AutoConfig.for_model(**own)
    build: Any = AutoModelForCausalLM.from_config
    with torch.random.fork_rng(), torch.device(device):  # weights are drawn where they are to be
        torch.manual_seed(seed)
        model = build(config, dtype=dtype).eval()
    model.config.name_or_path = name
    return model


def _replace_logits(model: Any, head: MarkovHead) -> None:
    """Let the model's forward end with the head, whoever calls the model."""
    model.markov_head = head.to(model.device)
    model.register_forward_hook(_markov_logits, with_kwargs=True)


@torch.no_grad()
def _markov_logits(model: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    token_ids = named.get("input_ids", arguments[0] if arguments else None)
    if token_ids is None:
        raise InputError("a synthetic model must be given input_ids, from which its text follows, got none")
    output.logits = model.markov_head(token_ids[:, -output.logits.shape[1] :], output.logits)
    return output


_markov_logits.is_replayable = True  # type: ignore[attr-defined]
