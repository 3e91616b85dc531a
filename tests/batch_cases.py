"""Random batches, cheap enough for thousands: requests come and go on one engine, each against the request alone."""

from __future__ import annotations

import functools
import random
from typing import Any

import attrs
import torch

from dynatree_core import Engine, hookimpl
from dynatree_core.cost_model import NOMINAL_COSTS
from dynatree_core.errors import DynaTreeError
from dynatree_core.testing.models import VOCAB, perturbed, reference, tiny_model
from dynatree_core.testing.strategies import HostileDrafter, HostilePolicy

__all__ = ["BatchCase", "check_batch", "random_batch"]

FAMILIES = ("llama", "gpt2", "mistral", "gpt_neox")
POLICIES = (
    "phase3", "fixed(depth=2,branch=2,tau=0.0)", "linear(depth=3)", "autoregressive", "cost_aware", "best_first",
    "phase3+governor", "hostile", "raising",
)  # fmt: skip
SETTINGS: tuple[dict[str, Any], ...] = (
    {}, {}, {}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}, {"do_sample": True, "seed": 3},
    {"do_sample": True, "seed": 8, "temperature": 0.7, "top_k": 9},
)  # fmt: skip


# few, since what `generate` says to each is computed once
_fixed = random.Random(0)
PROMPTS = tuple(tuple(_fixed.randrange(VOCAB) for _ in range(1 + place % 9)) for place in range(24))
ENDS: tuple[tuple[int, ...], ...] = ((), (), tuple(range(0, VOCAB, 6)))


@attrs.frozen
class Asked:
    """One request of a batch."""

    prompt: tuple[int, ...]
    num_tokens: int
    policy: str
    settings: dict[str, Any]
    eos: tuple[int, ...]
    arrives_at: int  # step
    cancelled_at: int | None
    max_nodes: int


@attrs.frozen
class BatchCase:
    """Requests, when they come and go, and the engine that they come to."""

    seed: int
    family: str
    drafter: str
    max_sequences: int
    put_back_at: tuple[int, ...]  # steps before which the youngest sequence is put back, as if memory were short
    asked: tuple[Asked, ...]


def random_batch(seed: int) -> BatchCase:
    draw = random.Random(seed)
    asked = tuple(
        Asked(
            prompt=draw.choice(PROMPTS),
            num_tokens=draw.choice([0, 1, 3, 6]),
            policy=draw.choice(POLICIES),
            settings=draw.choice(SETTINGS),
            eos=draw.choice(ENDS),
            arrives_at=draw.choice([0, 0, draw.randint(0, 5)]),
            cancelled_at=draw.choice([None] * 6 + [draw.randint(0, 8)]),
            max_nodes=draw.choice([3, 8, 40]),
        )
        for _ in range(draw.randint(1, 6))
    )
    return BatchCase(
        seed,
        draw.choice(FAMILIES),
        draw.choice(["near", "far", "self", "prompt_lookup", "union", "hostile", "none"]),
        draw.randint(1, 6),
        tuple(draw.choice([[], [], [draw.randint(1, 6)], [2, 3]])),
        asked,
    )


class Raising:
    """A policy that fails at its second level."""

    def __init__(self) -> None:
        self.calls = 0

    @hookimpl
    def branch_factor(self, frontier: object) -> int:
        self.calls += 1
        if self.calls == 2:
            raise ZeroDivisionError("second level")
        return 1


@functools.cache
def _drafter(kind: str, family: str) -> Any:
    if kind == "union":
        from dynatree_core.drafters.model import ModelDrafter
        from dynatree_core.drafters.prompt_lookup import PromptLookupDrafter
        from dynatree_core.drafters.union import UnionDrafter

        return UnionDrafter([ModelDrafter(perturbed(family)), PromptLookupDrafter()])
    found = {"prompt_lookup": "prompt_lookup", "hostile": HostileDrafter(5), "none": None}
    makers = {"near": perturbed, "far": lambda name: tiny_model(name, 3), "self": tiny_model}
    return makers[kind](family) if kind in makers else found[kind]


@functools.cache
def _alone(family: str, prompt: tuple[int, ...], num_tokens: int, eos: tuple[int, ...], settings: Any) -> list[int]:
    return reference(tiny_model(family), [*prompt], num_tokens, [*eos], **dict(settings))


def check_batch(case: BatchCase) -> None:
    """Run it, and compare each output with that of transformers' `generate` for the same request.

    Raises:
        AssertionError: with the case, where one differs.
    """
    drafter = _drafter(case.drafter, case.family)
    engine = Engine(tiny_model(case.family), drafter, max_sequences=case.max_sequences, costs=NOMINAL_COSTS)
    policies = {"hostile": lambda: HostilePolicy(case.seed), "raising": Raising}
    handles: dict[int, Any] = {}
    for step in range(400):
        for place, asked in enumerate(case.asked):
            if asked.arrives_at == step:
                handles[place] = engine.submit(
                    [*asked.prompt],
                    policy=policies[asked.policy]() if asked.policy in policies else asked.policy,
                    max_new_tokens=asked.num_tokens,
                    eos_token_id=[*asked.eos],
                    max_nodes=asked.max_nodes,
                    **asked.settings,
                )
            if asked.cancelled_at == step and place in handles:
                engine.cancel(handles[place])
        if step in case.put_back_at and engine.load.num_running > 1:
            engine._scheduler._put_back()
        engine.step()
        if step > 5 and all(handle.is_done for handle in handles.values()):
            break
    for place, asked in enumerate(case.asked):
        _check_one(case, asked, handles[place])
    load = engine.load
    assert (load.num_running, load.num_waiting) == (0, 0), f"{case} leaves {load}"


def _check_one(case: BatchCase, asked: Asked, handle: Any) -> None:
    expected = _alone(case.family, asked.prompt, asked.num_tokens, asked.eos, tuple(asked.settings.items()))
    found = handle.token_ids
    if handle.status == "stopped":
        assert found == handle.result().token_ids == expected, f"{case}: {asked} gives {found}, alone {expected}"
        return
    assert found == expected[: len(found)], f"{case}: {asked} gives {found}, alone it begins with {expected}"
    if handle.status == "cancelled":
        assert asked.cancelled_at is not None, f"{case}: {asked} was cancelled by nobody"
    else:
        assert asked.policy == "raising", f"{case}: {asked} failed with {handle.error!r}"
        assert isinstance(handle.error, DynaTreeError)
        assert "ZeroDivisionError" in str(handle.error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number in range(10_000):
        check_batch(random_batch(number))
