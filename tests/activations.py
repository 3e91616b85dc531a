"""How far does the default model move when its activations are rounded to 8 bits?

Texts that the model did not write are read by it with full activations and with rounded ones, as published weights
multiply them. Printed are, over all tokens behind the first of each text, the mean absolute difference of the logarithm
of the probability that the text's own next token has, its mean itself in both cases, and how often the most probable
token is the same.

    python tests/activations.py FILE...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.models.load import load_model
from dynatree_core.runners.choice import make_runner
from dynatree_core.tree.flatten import flatten_chain

MOST_TOKENS = 512  # of a text


def logprobs(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """[tokens, vocab] of a text's tokens, each behind those before it."""
    cache = TreeCache(ids.numel())
    with torch.inference_mode():
        flat = cache.prepare(flatten_chain(ids, 0))
        return make_runner(model, "native").forward(flat, cache).logits[0].log_softmax(-1)


def main(files: list[str]) -> None:
    models = {
        name: load_model(None, device="cpu", weights="stored", activations=name)  # type: ignore[arg-type]
        for name in ("full", "int8")
    }
    tokenizer = models["full"].tokenizer
    assert tokenizer is not None, "the default model has one"
    differences: list[Tensor] = []
    equal: list[Tensor] = []
    own: dict[str, list[Tensor]] = {name: [] for name in models}
    for file in files:
        ids = torch.tensor(tokenizer(Path(file).read_text(encoding="utf-8"))["input_ids"][:MOST_TOKENS])
        found = {name: logprobs(loaded.model, ids)[:-1] for name, loaded in models.items()}
        said = {name: one.gather(1, ids[1:, None])[:, 0] for name, one in found.items()}
        differences.append((said["int8"] - said["full"]).abs())
        equal.append(found["int8"].argmax(-1) == found["full"].argmax(-1))
        for name, one in said.items():
            own[name].append(one)
    print(f"tokens: {torch.cat(equal).numel()}")
    for name, some in own.items():
        print(f"mean log-probability of the text's tokens, activations {name}: {torch.cat(some).mean():.4f}")
    print(f"mean absolute difference: {torch.cat(differences).mean():.4f}")
    print(f"most probable token the same: {torch.cat(equal).float().mean():.1%}")


if __name__ == "__main__":
    main(sys.argv[1:])
