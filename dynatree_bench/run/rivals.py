"""Other packages that decode speculatively on transformers models, each behind one small adapter.

They are no dependencies: `pip install 'dynatree[rivals]'` fetches what installs here. What is missing, crashes or gives
other tokens is said so in the results. Each drafts with the pair's own drafter model where it takes one, and else by
its own prompt lookup.
"""

from __future__ import annotations

import functools
import importlib
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dynatree_bench.run.pairs import MethodError, Pair
from dynatree_core.advice import pip_install

Engine = Callable[[Sequence[int], int, Sequence[int]], list[int]]  # prompt ids, new tokens at most, end tokens

NUM_DRAFTED = 4  # tokens a step, the default of flashspec and (a cycle of 5) near that of economize
NODE_BUDGET = 8  # the default of dejavuu


@functools.cache
def engine(name: str, pair: Pair) -> Engine:
    """What generates with a rival, made once for a pair.

    Raises:
        MethodError: the package is not installed, or cannot work with the pair.
    """
    return {"flashspec": _flashspec, "economize": _economize, "dejavuu": _dejavuu}[name](pair)


def _imported(package: str, *modules: str) -> list[Any]:
    try:
        return [importlib.import_module(f"{package}.{module}" if module else package) for module in modules]
    except ImportError as error:
        missing = error.name or "?"
        raise MethodError(
            f"{package} is not installed: {_advice(package)}"
            if missing.partition(".")[0] == package
            else f"{package} cannot be imported: {error}"
        ) from error


def _advice(package: str) -> str:
    """dejavuu is for Python 3.13 and newer, so that the extra leaves it out elsewhere."""
    if package == "dejavuu" and sys.version_info < (3, 13):
        return f"it needs Python 3.13 or newer, got {platform.python_version()}; leave --rivals out, or use a newer one"
    return pip_install("dynatree[rivals]")


def _flashspec(pair: Pair) -> Engine:
    """Chains, by its n-gram drafter or the pair's drafter model."""
    flashspec, drafting, ngram, verifying = _imported(
        "flashspec", "", "engine.hf_drafter", "engine.ngram", "engine.verifier"
    )
    target, small = pair.target.model, pair.drafter_model
    device, dtype = target.device, target.dtype
    if small is None:
        drafter = ngram.NgramDrafter()
    else:
        drafter = drafting.HuggingFaceDrafter("drafter", device, dtype, temperature=0.0, model=small)
    config = flashspec.FlashSpecConfig(
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        sampling=flashspec.SamplingConfig(temperature=0.0, gamma=NUM_DRAFTED),
        bandit=flashspec.BanditConfig(n_arms=1),
        drafter_strategy="bandit",  # of one arm: this drafter alone
    )
    decoder = flashspec.SpeculativeEngine(
        config, [drafter], verifying.TargetModel("target", device, dtype, model=target)
    )

    def generate(prompt_ids: Sequence[int], max_new_tokens: int, eos: Sequence[int]) -> list[int]:
        ids = torch.tensor([list(prompt_ids)], device=device)
        output = decoder.generate(ids, max_new_tokens=max_new_tokens, eos_token_ids=list(eos))
        return [token for token in output.output_ids[0].tolist() if token >= 0]  # -1 fills up behind an end token

    return generate


def _economize(pair: Pair) -> Engine:
    """Chains, by its prompt lookup or by a drafter model, which it loads for itself."""
    economize, lookup, drafting = _imported("economize", "", "techniques.lookup", "techniques.draft_model")
    small = pair.drafter_model
    path = str(small.config.name_or_path) if small is not None else ""
    technique = drafting.DraftModelConfig(model=path) if path else lookup.LookupConfig()
    model = economize.apply(pair.target.model, technique, decoding=economize.DecodeConfig(cycle_length=NUM_DRAFTED + 1))

    def generate(prompt_ids: Sequence[int], max_new_tokens: int, eos: Sequence[int]) -> list[int]:
        ids = torch.tensor(list(prompt_ids), device=pair.target.model.device)
        return list(model.decode(ids, max_new_tokens, stop=list(eos) or None).tokens.tolist())

    return generate


def _dejavuu(pair: Pair) -> Engine:
    """Trees, by its prompt lookup; it has no drafter models. Its chains crash with transformers 5."""
    _, engines, backend, drafters = _imported("dejavuu", "", "core.engine", "decoders.hf", "drafters")
    target = pair.target.model
    path = str(target.config.name_or_path)
    if not path:
        raise MethodError("dejavuu loads the target for itself, and this one has no folder or hub id to load it from")
    model = backend.HFBackend(
        path, str(target.device), str(target.dtype).removeprefix("torch."), "sdpa", emit_hidden=False
    )

    def generate(prompt_ids: Sequence[int], max_new_tokens: int, eos: Sequence[int]) -> list[int]:
        if len(eos) > 1:
            raise MethodError(f"dejavuu stops at one end token at most, got {len(eos)}")
        drafter = drafters.make_drafter("pld")
        end = eos[0] if eos else None
        return list(
            engines.generate(model, list(prompt_ids), max_new_tokens, drafter, NODE_BUDGET, end, tree=True).tokens
        )

    return generate
