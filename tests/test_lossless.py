"""The product's heart: whatever the models, the drafter and the policies, the output is the target's own."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import settings

from dynatree_core import Session, generate, run, stream
from dynatree_core.testing import assert_lossless
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.conformance import POLICY_PROPERTIES
from dynatree_core.testing.models import CONTEXT, greedy, perturbed, tiny_model
from dynatree_core.testing.strategies import FAMILIES, HostilePolicy

EXAMPLES = settings().max_examples  # as the profile of conftest.py says


def check(target, drafter, prompt, policy, max_new_tokens, eos, **options):
    expected = greedy(target, prompt, max_new_tokens, eos)
    result = generate(
        target, drafter, prompt, policy=policy, max_new_tokens=max_new_tokens, eos_token_id=eos, **options
    )
    assert result.token_ids == expected
    stopped = bool(expected) and expected[-1] in eos
    assert result.stop_reason == ("eos" if stopped else "length")
    return result


@pytest.mark.parametrize("title", POLICY_PROPERTIES)
@pytest.mark.parametrize("stack", [*ours.policy_names(), *ours.presets()])
def test_every_registered_stack_keeps_to_the_contract(stack, title):
    POLICY_PROPERTIES[title](stack, EXAMPLES // 12)


def test_any_stack_any_drafter():
    assert_lossless(ours.stacks(), max_examples=EXAMPLES)


def test_hostile_policies():
    """Random widths, random cuts, random keep-masks: slow perhaps, never wrong."""
    assert_lossless(ours.hostile_policies, max_examples=EXAMPLES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_length_and_every_stop(family):
    """At each max_new_tokens, and with each token of the output as the end, wherever in a path it falls."""
    target, drafter, prompt = tiny_model(family), perturbed(family), [1, 2, 3]
    expected = greedy(target, prompt, 24)
    for length in range(25):
        check(target, drafter, prompt, "phase3", length, [])
    for eos in sorted(set(expected)):
        check(target, drafter, prompt, "fixed(depth=6)", 24, [eos])


@pytest.mark.parametrize("policy", ["linear", "fixed", "phase1", "phase2", "phase3", "phase3:plan"])
def test_identical_models_accept_their_whole_greedy_path(policy):
    """A drafter that is the target is right wherever its first choice is in the tree."""
    target, prompt = tiny_model("llama"), [4, 2]
    session = Session(target, target, prompt, policy=policy, max_new_tokens=40, tau=0.0)
    num_accepted = 0
    for report in run(session):
        parents = report.tree.parent.tolist()
        first_choices, node = [], 0
        while node in parents:  # siblings stand in descending probability: the first child is the first choice
            node = parents.index(node)
            first_choices.append(node)
        assert list(report.verdict.path) == first_choices
        num_accepted += len(first_choices)
    assert num_accepted >= 25  # most of the 40 tokens were drafted, so the loop above compared something


def test_the_end_of_the_context():
    target = tiny_model("gpt2")
    result = check(target, target, [1, 2, 3], "linear(depth=9)", CONTEXT - 3, [])
    assert len(result.token_ids) == CONTEXT - 3


def test_the_models_own_end_token_is_the_default():
    target, prompt = tiny_model("llama"), [1, 2, 3]
    expected = greedy(target, prompt, 20)
    target.generation_config.eos_token_id = expected[7]
    try:
        result = generate(target, target, prompt, max_new_tokens=20)
        assert result.token_ids == expected[: expected.index(expected[7]) + 1]
        assert generate(target, target, prompt, max_new_tokens=20, eos_token_id=[]).token_ids == expected
    finally:
        target.generation_config.eos_token_id = None


def test_stream_yields_the_same_tokens():
    target, drafter, prompt = tiny_model("gpt_neox"), perturbed("gpt_neox"), [5, 6]
    reports = list(stream(target, drafter, prompt, policy="phase2", max_new_tokens=20))
    assert [token for report in reports for token in report.token_ids] == greedy(target, prompt, 20)
    assert [report.iteration for report in reports] == list(range(len(reports)))


@pytest.mark.parametrize("drafter", [perturbed("llama", noise=0.02), "prompt_lookup", None])
def test_a_session_goes_on_after_a_break(drafter):
    target, prompt = tiny_model("llama"), [5, 6, 7]
    session = Session(target, drafter, prompt, policy="phase3", max_new_tokens=30)
    rounds = 0
    while session.stop_reason is None:
        rounds += 1
        for _ in run(session):
            break
    assert rounds > 5
    assert session.result().token_ids == greedy(target, prompt, 30)


def test_float32_equals_greedy():
    import copy

    target, drafter = (copy.deepcopy(model).float() for model in (tiny_model("llama"), perturbed("llama")))
    for prompt in ([1], [7, 7, 7, 7], list(range(12))):
        check(target, drafter, prompt, "phase3", 40, [])


def test_on_every_device(device):
    import copy

    target, drafter = (copy.deepcopy(model).to(device) for model in (tiny_model("llama"), perturbed("llama")))
    for source in (drafter, "prompt_lookup"):
        for policy in ("phase1", "phase3", [HostilePolicy(3)]):
            check(target, source, [3, 1, 4, 1, 5], policy, 32, [])


def test_threads_may_share_models():
    target, drafter = tiny_model("llama"), perturbed("llama")
    prompts = [[i, i + 1, i + 2] for i in range(8)]
    expected = [greedy(target, prompt, 30) for prompt in prompts]
    found: dict[int, list[int]] = {}

    def work(indices: range) -> None:
        for i in indices:
            found[i] = generate(target, drafter, prompts[i], policy="phase3", max_new_tokens=30).token_ids

    threads = [threading.Thread(target=work, args=(range(start, 8, 2),)) for start in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(8)] == expected


def test_sessions_share_no_state():
    """Two interleaved sessions of one stack string decide as each would alone."""
    target, drafter = tiny_model("llama"), perturbed("llama", noise=0.1)
    stack = "confidence+dynamic_depth+history(rule='window',history_window=5)"

    def trees_of(session: Session) -> list[tuple[int, ...]]:
        return [report.tree.level_sizes for report in run(session)]

    def new_session(prompt: list[int]) -> Session:
        return Session(target, drafter, prompt, policy=stack, max_new_tokens=30)

    alone = [trees_of(new_session(prompt)) for prompt in ([1, 2], [3, 4])]
    runs = [run(new_session(prompt)) for prompt in ([1, 2], [3, 4])]
    together: list[list[tuple[int, ...]]] = [[], []]
    for _ in range(30):
        for i, steps in enumerate(runs):
            report = next(steps, None)
            if report is not None:
                together[i].append(report.tree.level_sizes)
    assert together == alone


class _Counting(torch.nn.Module):
    """Records what goes through a model: every (position, token) with the text that it stands in."""

    def __init__(self, model):
        super().__init__()
        self.model, self.rows = model, 0
        self.hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.rows += kwargs["input_ids"].shape[1]


@pytest.mark.parametrize("policy", ["phase3", "fixed", "linear", "confidence"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_goes_through_a_model_twice(family, policy):
    """Rows through the target: the prompt but its last token, then the root and the drafted nodes of each step.

    Rows through the drafter: each committed token once, and each drafted node that was expanded or looked at once.
    """
    target, drafter, prompt = tiny_model(family), perturbed(family), [1, 2, 3, 4, 5]
    seen: list[tuple[int, ...]] = []  # the text that a drafter's row stands at the end of

    def record(module, args, kwargs):
        ids, mask = kwargs["input_ids"][0].tolist(), kwargs["attention_mask"]
        mask = next(iter(mask.values())) if isinstance(mask, dict) else mask
        for row, visible in enumerate(mask[0, 0].tolist()):
            slots[len(visible) - len(ids) + row :] = [ids[row]]
            seen.append(tuple(slots[slot] for slot, is_visible in enumerate(visible) if is_visible))

    slots: list[int] = []
    counted = _Counting(target)
    handle = drafter.register_forward_pre_hook(record, with_kwargs=True)
    try:
        session = Session(target, drafter, prompt, policy=policy, max_new_tokens=30)
        counted.rows = 0  # a target with a hook was asked before whether its rows are independent
        for report in run(session):
            kept = session.draft_state.cache.length
            del slots[kept:]
            slots[:] = [*prompt, *session.new_token_ids][:kept]
            assert session.cache.length == len(prompt) + len(session.new_token_ids) - 1
            assert report.tree.num_drafted == session.steps[-1].num_drafted
    finally:
        counted.hook.remove()
        handle.remove()
    assert counted.rows == len(prompt) - 1 + sum(1 + step.num_drafted for step in session.steps)
    # the whole text before a row names it: no such row is computed twice
    assert len(seen) == len(set(seen))
    text = (*prompt, *session.new_token_ids)
    assert {text[: i + 1] for i in range(session.draft_state.cache.length)} <= set(seen)
