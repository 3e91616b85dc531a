"""What the target says: its own continuations and its distributions, computed once and stored.

A shard holds one batch of texts. It is written under another name and then renamed, so that an interrupted run
leaves whole shards only; a run that is started again makes those that are missing. What is in a shard depends on its
prompts, its seed and the target, not on the shards before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from dynatree_bench.distill.prompts import Prompt
from dynatree_core.errors import ModelLoadError
from dynatree_core.files.tensors import load_tensors, save_tensors
from dynatree_core.models.architectures import cache_argument

TOP_K = 32  # log-probabilities kept a token; the rest of the distribution is one number, the tail's mass
MIN_ALIVE = 0.4  # a batch ends when fewer of its texts still go on: the others would wait for the few


@attrs.frozen(eq=False)
class Shard:
    """Texts laid end to end, and what the target thinks comes after each token."""

    token_ids: Tensor  # [tokens] int32
    ends: Tensor  # [texts] int64: where each text ends in `token_ids`
    is_scored: Tensor  # [tokens] bool: whether the target was asked what comes after this token
    top_ids: Tensor  # [tokens, k] int32, most probable first; 0 where it was not asked
    top_logprobs: Tensor  # [tokens, k] float16

    @property
    def num_texts(self) -> int:
        return self.ends.numel()

    @property
    def num_scored(self) -> int:
        return int(self.is_scored.sum())

    def text(self, index: int) -> slice:
        """Where one text stands."""
        start = int(self.ends[index - 1]) if index else 0
        return slice(start, int(self.ends[index]))


@torch.inference_mode()
def score(model: PreTrainedModel, token_ids: Tensor) -> Shard:
    """What the target thinks of given texts [texts, tokens]."""
    # text by text: all logits at once would be gigabytes
    tops = [_top(model(text[None], use_cache=False).logits[0]) for text in token_ids]
    num_texts, length = token_ids.shape
    return Shard(
        token_ids.flatten().int().cpu(),
        torch.arange(1, num_texts + 1) * length,
        torch.ones(num_texts * length, dtype=torch.bool),
        torch.cat([ids for ids, _ in tops]).cpu(),
        torch.cat([logprobs for _, logprobs in tops]).cpu(),
    )


@torch.inference_mode()
def write(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    *,
    num_new: int,
    end_ids: Sequence[int],
    pad_id: int,
    seed: int,
    min_alive: float = MIN_ALIVE,
) -> Shard:
    """Let the target go on from each prompt, all in one batch, up to its end or `num_new` tokens.

    Args:
        model: the target.
        prompts: what it goes on from, greedily or drawing tokens.
        num_new: tokens of a continuation at most.
        end_ids: tokens that end it.
        pad_id: any token, for the room before shorter prompts.
        seed: of the draws.
        min_alive: the batch ends early when a smaller share of its texts still goes on; a text that is cut so is as
            good to learn from.
    """
    device = model.device
    batch, width = len(prompts), max(len(prompt.token_ids) for prompt in prompts)
    padding = torch.tensor([width - len(prompt.token_ids) for prompt in prompts], device=device)
    rows = [[pad_id] * (width - len(prompt.token_ids)) + list(prompt.token_ids) for prompt in prompts]
    next_ids = torch.tensor(rows, device=device)  # [batch, rows of this pass]
    temperature = torch.tensor([prompt.temperature for prompt in prompts], device=device)
    ends = torch.tensor(list(end_ids), device=device)
    generator = torch.Generator(device).manual_seed(seed)
    cache = StaticCache(config=model.config, max_cache_len=width + num_new)
    # 1 where a slot holds a token of a text; slots that come later are hidden by position
    mask = (torch.arange(width + num_new, device=device)[None] >= padding[:, None]).long()
    is_alive = torch.ones(batch, dtype=torch.bool, device=device)
    num_seen, said, tops, alive = 0, [], [], []
    while len(said) < num_new and is_alive.any() and is_alive.float().mean() >= min_alive:
        slots = torch.arange(num_seen, num_seen + next_ids.shape[1], device=device)
        logits = model(
            next_ids,
            attention_mask=mask[:, : int(slots[-1]) + 1],
            position_ids=(slots[None] - padding[:, None]).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(model): cache},
        ).logits[:, -1]
        num_seen += next_ids.shape[1]
        top = _top(logits)
        chosen = _choose(top, temperature, generator)
        tops.append(top)
        said.append(chosen)
        alive.append(is_alive)
        is_alive = is_alive & ~torch.isin(chosen, ends)
        next_ids = chosen[:, None]
    return _assemble(prompts, torch.stack(said, 1), torch.stack(alive, 1), tops)


def write_shard(shard: Shard, file: Path) -> None:
    """Store a shard; the file is there whole or not at all."""
    save_tensors({field.name: getattr(shard, field.name) for field in attrs.fields(Shard)}, file)


def read_shard(file: Path) -> Shard:
    """What was stored.

    Raises:
        ModelLoadError: the file is damaged; the message says that it is asked for again once it is deleted.
    """
    advice = "delete it, and the same command asks the target for it again"
    tensors = load_tensors(file, advice=advice)
    names = {field.name for field in attrs.fields(Shard)}
    if set(tensors) != names:
        raise ModelLoadError(f"{file} must hold {', '.join(sorted(names))}, got {', '.join(sorted(tensors))}; {advice}")
    return Shard(**tensors)


def _top(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The k best ids and their log-probabilities of logits [rows, vocab]."""
    logits = logits.float()
    top = logits.topk(min(TOP_K, logits.shape[-1]), dim=-1)
    logprobs = top.values - logits.logsumexp(dim=-1, keepdim=True)
    return top.indices.int(), logprobs.half()


def _choose(top: tuple[Tensor, Tensor], temperature: Tensor, generator: torch.Generator) -> Tensor:
    """[batch]: the best token, or one drawn from the k best where there is a temperature."""
    ids, logprobs = top
    weights = (logprobs.float() / temperature.clamp(min=0.01)[:, None]).softmax(dim=-1)
    drawn = torch.multinomial(weights, 1, generator=generator)
    rank = torch.where(temperature[:, None] > 0, drawn, 0)
    return ids.gather(1, rank)[:, 0].long()


def _assemble(
    prompts: Sequence[Prompt], said: Tensor, is_alive: Tensor, tops: Sequence[tuple[Tensor, Tensor]]
) -> Shard:
    """The texts of a batch, each with its prompt; what is behind a text's end is left out."""
    top_ids = torch.stack([ids for ids, _ in tops], 1).cpu()  # [batch, new, k]
    top_logprobs = torch.stack([logprobs for _, logprobs in tops], 1).cpu()
    said, lengths = said.int().cpu(), is_alive.sum(dim=1).tolist()
    k = top_ids.shape[-1]
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for row, prompt in enumerate(prompts):
        num_new, num_prompt = lengths[row], len(prompt.token_ids)
        # the prompt's last token is the first that the target was asked about, the text's last token is not
        unasked = num_prompt - 1
        token_ids = torch.cat([torch.tensor(prompt.token_ids, dtype=torch.int32), said[row, :num_new]])
        asked = torch.zeros(num_prompt + num_new, dtype=torch.bool)
        asked[unasked:-1] = True
        ids = torch.nn.functional.pad(top_ids[row, :num_new], (0, 0, unasked, 1))
        logprobs = torch.nn.functional.pad(top_logprobs[row, :num_new], (0, 0, unasked, 1))
        assert ids.shape == (token_ids.numel(), k), (ids.shape, token_ids.shape)
        parts.append((token_ids, asked, ids, logprobs))
    ends = torch.tensor([part[0].numel() for part in parts]).cumsum(0)
    token_ids, asked, ids, logprobs = (torch.cat([part[i] for part in parts]) for i in range(4))
    return Shard(token_ids, ends, asked, ids, logprobs)
