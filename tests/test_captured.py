"""The cudagraph runner. On the CPU all but the recording itself: what is replayed there is a trace of the pass.

A trace has the tensors of the pass it was made from and every number that Python had computed then, as a graph has.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_architectures import bushy_tree
from test_packed import check_the_same_up_to_a_tie, single
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from dynatree_bench.data.synthetic import Shape, synthetic_pair
from dynatree_core import Engine, Session, generate, run
from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.clock import StageClock
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.engine.fused import level_writer
from dynatree_core.errors import CacheError, ParameterError
from dynatree_core.models.architectures import EXACT_FAMILIES
from dynatree_core.models.state import is_replayable
from dynatree_core.runners import cudagraph as captured
from dynatree_core.runners.base import PassOutput
from dynatree_core.runners.choice import drafters_runner, make_runner, runner_for
from dynatree_core.runners.cudagraph import MAX_ROWS, CudaGraphRunner, rounded_rows, rounded_slots
from dynatree_core.runners.eager import EagerRunner
from dynatree_core.runners.passes import Passes
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import CONTEXT, greedy, perturbed, tiny_model, tiny_variant
from dynatree_core.tree.flatten import flatten
from dynatree_core.tree.padded import WIDTHS
from dynatree_core.tree.token_tree import TokenTree

CPU = torch.device("cpu")
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
SLOTS = 16  # the smallest number of slots in these tests, so that short texts come to several
Run = Callable[[], PassOutput]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


class Count:
    """How often passes were recorded and replayed."""

    recorded = 0
    replayed = 0


def traced(run: Run) -> Run:
    """The pass as torch's tracer sees it, with all that Python computes fixed, and one output for all replays."""
    trace: Any = make_fx(lambda: tensors(run()), tracing_mode="real")()
    return into_one_output(lambda: PassOutput(*trace()), run())


def repeated(run: Run) -> Run:
    """The pass computed anew each time, into one output: much sooner made than a trace."""
    return into_one_output(run, run())


def tensors(output: PassOutput) -> list[Tensor]:
    return [tensor for tensor in (output.logits, output.hidden) if tensor is not None]


def into_one_output(run: Run, like: PassOutput) -> Run:
    """The function, which returns the same tensors each time."""
    output = PassOutput(*map(torch.zeros_like, tensors(like)))

    def replay() -> PassOutput:
        for own, new in zip(tensors(output), tensors(run()), strict=True):
            own.copy_(new)
        return output

    return replay


@contextlib.contextmanager
def on_the_cpu(record: Callable[[Run], Run] = repeated) -> Iterator[Count]:
    """Let models on the CPU have the runner, with this in place of a CUDA graph."""
    count = Count()

    def recorded(self: object, run: Run, device: torch.device) -> Run:
        replay = record(run)
        count.recorded += 1

        def counted() -> PassOutput:
            count.replayed += 1
            return replay()

        return counted

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        patch.setattr(captured, "can_capture", lambda model: True)
        patch.setattr(captured.Recorder, "recorded", recorded)
        patch.setattr(captured, "MIN_SLOTS", SLOTS)
        yield count


class Both:
    """The same passes by two runners, each with a cache of its own."""

    def __init__(self, model: nn.Module, capacity: int = 96, device: torch.device = CPU) -> None:
        self.runners = [make_runner(model, name) for name in ("eager", "cudagraph")]
        self.passes = [Passes(runner, StageClock(device)) for runner in self.runners]
        self.caches = [TreeCache(capacity), TreeCache(capacity)]

    @torch.inference_mode()
    def prefill(self, token_ids: list[int], device: torch.device = CPU) -> None:
        for one, cache in zip(self.passes, self.caches, strict=True):
            one.prefill(torch.tensor(token_ids, device=device), cache)

    @torch.inference_mode()
    def check_pass(
        self, tree: TokenTree, *, last_row_only: bool = False, hidden: bool = False, tolerance: float = 1e-9
    ) -> None:
        """The same logits and hidden states up to rounding, and the same rows in the caches."""
        options = {"stage": "verify", "last_row_only": last_row_only, "hidden": hidden}
        plain, ours = (
            one.forward(flatten([tree], [cache.length]), cache, **options)
            for one, cache in zip(self.passes, self.caches, strict=True)
        )
        assert (ours.hidden is not None) == (plain.hidden is not None) == hidden
        torch.testing.assert_close(tensors(ours), tensors(plain), rtol=tolerance, atol=tolerance)
        self.check_caches(tolerance)

    def check_caches(self, tolerance: float = 1e-9) -> None:
        plain, ours = self.caches
        assert (ours.lengths, ours._block_lens) == (plain.lengths, plain._block_lens)
        end = plain.length + plain.block_len
        for a, b in zip((*ours.keys, *ours.values), (*plain.keys, *plain.values), strict=True):
            torch.testing.assert_close(a[:, :, :end], b[:, :, :end], rtol=tolerance, atol=tolerance)

    def commit(self, path: list[int]) -> None:
        for cache in self.caches:
            cache.commit([path])


def test_rows_and_slots_are_rounded_up():
    assert [rounded_rows(rows) for rows in (1, 2, 16, 17, 64, 65, 128)] == [1, 16, 16, 64, 64, 128, 128]
    asked = (1, 1024, 1025, 8191, 8192, 8193, 16_384, 16_385, 100_000)
    assert [rounded_slots(slots, 10**6) for slots in asked] == [
        1024, 1024, 2048, 8192, 8192, 10_240, 16_384, 20_480, 114_688,
    ]  # fmt: skip
    assert rounded_slots(257, 300) == 300, "there are no more"


def test_a_generation_records_few_passes_and_the_next_one_none():
    """Graphs of target and drafter belong to the engine: 256 tokens of `phase3`."""
    llama = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    llama |= {"vocab_size": 400, "max_position_embeddings": 512, "num_hidden_layers": 1}
    pair = synthetic_pair(Shape(llama, llama), acceptance=0.75, num_choices=16)
    with on_the_cpu() as count, pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured, "MIN_SLOTS", 1024)
        engine = Engine(pair.target, ModelDrafter(pair.drafter), runner="cudagraph", trust_model=True)
        recorded = []
        for start in (0, 50, 100):
            asked = {"policy": "phase3", "max_new_tokens": 256, "eos_token_id": [], "inherit_settings": False}
            found = engine.submit(pair.source.text(start, 60), **asked).result()
            assert found.token_ids == pair.source.text(start + 60, 256)
            assert found.report.runner == "cudagraph"
            recorded.append(count.recorded)
    assert 4 <= recorded[0] <= recorded[1] <= 8, "rows of target and drafter, of one number of slots"
    assert recorded[1] - recorded[0] <= 1, "what came only once in the first generation comes for the second time"
    assert recorded[2] == recorded[1]


def test_what_a_text_has_left_is_not_shown_to_the_next_one():
    """Where an earlier generation ended with NaN in its rows, a mask would not hide it from the next one's graph."""
    with on_the_cpu():
        both = Both(tiny_model("llama"))
        both.prefill(PROMPT * 3)
        for turn in range(2):
            both.check_pass(TokenTree.root(torch.tensor([7])))
            both.commit([0])
            for cache in both.caches:
                if not turn:
                    for buffer in (*cache.keys, *cache.values):
                        buffer[:, :, :] = float("nan")
                    cache.truncate(0)
            if not turn:
                both.prefill(PROMPT)


# mixtures of experts ask the device which experts they need, in the implementation that takes float64
ASKING = ("deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


@pytest.mark.parametrize("name", [*(family for family in EXACT_FAMILIES if family not in ASKING), "qwen2, window"])
def test_a_trace_of_a_pass_does_what_the_pass_does(name):
    """Passes of one shape at several lengths: one plain, one recorded, then replays. So nothing fixed may matter."""
    model, tree = tiny_variant(name), bushy_tree()
    tolerance = 1e-4 if model.config._attn_implementation == "eager" else 1e-9  # which rounds its softmax to float32
    with on_the_cpu(traced) as count:
        both = Both(model)
        both.prefill(PROMPT)
        for turn in range(5):
            kept = torch.arange(tree.num_nodes) < tree.num_nodes - turn % 3
            both.check_pass(tree.subtree(kept), tolerance=tolerance)
            both.commit([0, 2])
    assert (count.recorded, count.replayed) == (1, 4)


passes = st.lists(
    st.tuples(ours.trees(max_depth=4, max_width=4), st.booleans(), st.booleans(), st.integers(0, 30)), max_size=12
)


@settings(max_examples=20)
@given(family=st.sampled_from(["llama", "gpt2", "mistral"]), prompt=ours.prompts, passes=passes)
def test_any_passes_are_the_plain_ones(family, prompt, passes):
    """Random trees, paths and rollbacks, over the borders of rows and slots."""
    with on_the_cpu():
        both = Both(tiny_model(family), capacity=200)
        both.prefill(prompt)
        for tree, last_row_only, hidden, place in passes:
            for _ in range(3):  # plain, recorded and, if it was the first of its shape, replayed
                both.check_pass(tree, last_row_only=last_row_only, hidden=hidden)
                for cache in both.caches:
                    cache.rollback()
            both.check_pass(tree, last_row_only=last_row_only, hidden=hidden)
            both.commit(tree.ancestor_mask[place % tree.num_nodes].nonzero().flatten().tolist())
            both.check_caches()


def test_a_cache_that_was_cut_shows_no_more_than_it_has():
    """As that of a drafter that begins anew: an earlier pass of the shape saw more."""
    with on_the_cpu() as count:
        both = Both(tiny_model("llama"))
        both.prefill(PROMPT * 3)
        tree = TokenTree.root(torch.tensor([7]))
        for _ in range(3):
            both.check_pass(tree)
            for cache in both.caches:
                cache.rollback()
        for cache in both.caches:
            cache.truncate(18)
        both.check_pass(tree)
    assert (count.recorded, count.replayed) == (1, 3)


def test_the_last_slot_can_be_filled():
    """Padding rows need none of their own: five rows, rounded to eight, into the last five slots."""
    tree = TokenTree.root(torch.tensor([1])).grow(torch.zeros(4, dtype=torch.int64), torch.arange(4), torch.zeros(4))
    with on_the_cpu() as count:
        both = Both(tiny_model("llama"), capacity=len(PROMPT) + 5)
        both.prefill(PROMPT)
        for _ in range(4):
            both.check_pass(tree)
            for cache in both.caches:
                cache.rollback()
        with pytest.raises(CacheError, match="room for 15 rows, got 10 committed, 0 undecided and 27 new ones"):
            both.check_pass(bushy_tree())
    assert (count.recorded, count.replayed) == (1, 3)


def test_logits_stay_when_the_next_pass_comes():
    with on_the_cpu():
        both = Both(tiny_model("llama"))
        both.prefill(PROMPT)
        ours_, cache = both.passes[1], both.caches[1]
        seen = []
        for token in range(5):
            flat = flatten([TokenTree.root(torch.tensor([token]))], [cache.length])
            with torch.inference_mode():
                logits = ours_.forward(flat, cache, stage="verify").logits
            seen.append((logits, logits.clone()))
            cache.commit([[0]])
        assert all(torch.equal(logits, then) for logits, then in seen)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_generations_are_greedy(family):
    """Up to the end of the context, with a drafter whose passes are recorded too."""
    model, limit = tiny_model(family), CONTEXT - len(PROMPT)
    expected = greedy(model, PROMPT, limit)
    with on_the_cpu() as count:
        for drafter, policy in ((perturbed(family), "phase1"), (None, "autoregressive")):
            before = count.replayed
            found = generate(model, drafter, PROMPT, policy=policy, max_new_tokens=limit, runner="cudagraph")
            assert found.report.runner == "cudagraph"
            assert found.token_ids == expected
            assert count.replayed > before + 10


def test_a_drafters_levels_are_replayed():
    """Two drafters that differ in their runner alone propose the same."""
    drafter, found = perturbed("llama"), []
    for name in ("eager", "cudagraph"):
        with on_the_cpu() as count:
            one = generate(
                tiny_model("llama"), drafter, PROMPT, policy="fixed(depth=4,branch=2,tau=0.0)", max_new_tokens=40,
                runner=name,
            )  # fmt: skip
        found.append((one.token_ids, one.report.steps))
    assert found[0] == found[1]
    assert count.recorded > 4, "roots, levels, trees"


def test_other_caches_and_modes_run_as_they_are():
    passes, tree = CudaGraphRunner(EagerRunner(tiny_model("llama"))), TokenTree.root(torch.tensor([1]))
    with on_the_cpu() as count:
        moving = [
            generate(tiny_model("llama"), None, PROMPT, max_new_tokens=30, runner=name, cache="sinks=2,window=8")
            for name in ("eager", "cudagraph")
        ]
        assert moving[0].token_ids == moving[1].token_ids
        assert count.recorded == 0
    cache, two = TreeCache(200), TreeCache(200, lanes=2)
    flat = flatten([tree], [0])
    assert not passes.takes(flat, cache), "the first pass makes the buffers"
    with torch.inference_mode():
        for one, trees in ((cache, [tree]), (two, [tree, tree])):
            make_runner(tiny_model("llama"), "eager").forward(one.prepare(flatten(trees, one.lengths)), one)
            assert not passes.takes(flat, one), "there may be layers without buffers"
            one.commit([[0] for _ in trees])
    assert passes.takes(flat, cache)
    assert not passes.takes(flatten([tree, tree], [0, 0]), two)
    assert not passes.takes(flatten([tree], [0], min_rows=MAX_ROWS + 1), cache)
    with torch.autocast("cpu"):
        assert not passes.takes(flat, cache)


def test_a_generation_that_gets_a_cache_replays_its_graphs():
    """Until the model is another, or the cache is gone."""
    model, kept, caches, tree = (
        copy.deepcopy(tiny_model("llama")),
        {},
        [TreeCache(64)],
        TokenTree.root(torch.tensor([7])),
    )

    def generation(passes: int) -> tuple[int, int]:
        [cache] = caches
        cache.truncate(0)
        runner = make_runner(model, "cudagraph", kept=kept)
        plain, other = make_runner(model, "eager"), TreeCache(64)
        with torch.inference_mode():
            for one, rows in ((runner, cache), (plain, other)):
                Passes(one, StageClock(CPU)).prefill(torch.tensor(PROMPT), rows)
            for _ in range(passes):
                found, expected = (
                    one.forward(rows.prepare(flatten([tree], [rows.length])), rows).logits
                    for one, rows in ((runner, cache), (plain, other))
                )
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
                cache.commit([[0]])
                other.commit([[0]])
        return count.recorded, count.replayed

    with on_the_cpu() as count:
        assert generation(3) == (1, 2), "plain, recorded and compared with a replay, replayed"
        assert generation(3) == (1, 5)
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
        assert generation(3) == (2, 7)
        _, recorded = kept["cudagraph"]
        graphs = recorded._by_cache
        assert len(graphs) == 1
        caches.clear()
        gc.collect()
        assert len(graphs) == 0


def test_positions_of_a_prompt_are_an_input_of_the_graph():
    positions, tree = torch.tensor([0, 0, 1, 5, 6, 7, 8, 20, 21, 22, 23]), TokenTree.root(torch.tensor([7]))
    with on_the_cpu() as count:
        both = Both(tiny_model("llama"))
        both.prefill(PROMPT)
        for turn in range(6):
            for one in both.passes:
                one.positions = positions + turn if turn % 2 else None
            both.check_pass(tree)
            both.commit([0])
    assert (count.recorded, count.replayed) == (2, 4)


def test_rows_that_are_loaded_are_seen_by_the_same_graph():
    """As those that a prefix cache knows."""
    with on_the_cpu() as count:
        both = Both(tiny_model("llama"))
        both.prefill(PROMPT)
        for _ in range(3):
            both.check_pass(TokenTree.root(torch.tensor([1])))
            both.commit([0])
        for cache in both.caches:
            cache.load(*cache.copied(), 7)
        for _ in range(3):
            both.check_pass(TokenTree.root(torch.tensor([2])))
            both.commit([0])
    assert (count.recorded, count.replayed) == (1, 5)


def test_buffers_that_were_replaced_are_noticed():
    with on_the_cpu() as count:
        both = Both(tiny_model("llama"))
        both.prefill(PROMPT)
        for _ in range(3):
            both.check_pass(TokenTree.root(torch.tensor([1])))
            both.commit([0])
        assert count.replayed == 2
        for cache in both.caches:
            cache.truncate(7)
            cache.keys, cache.values = ([rows.clone() for rows in buffers] for buffers in (cache.keys, cache.values))
        for _ in range(3):
            both.check_pass(TokenTree.root(torch.tensor([2])))
            both.commit([0])
    assert (count.recorded, count.replayed) == (2, 4)


def refused(run: Run) -> Run:
    raise RuntimeError("operation not permitted when stream is capturing")


def stale(run: Run) -> Run:
    """A replay that says what it said when it was recorded, though it writes its rows."""
    output = PassOutput(run().logits.clone().roll(1, dims=-1))
    return lambda: (run(), output)[1]


def undefined(run: Run) -> Run:
    return lambda: PassOutput(run().logits * float("nan"))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (refused, r"RuntimeError: operation not permitted when stream is capturing\)"),
        (stale, r"the first replay was off by .* of the largest number\)"),
        (undefined, "the first replay was off by nan"),
    ],
)
def test_what_cannot_be_recorded_is_said_and_runs_as_it_is(record, reason):
    model = tiny_model("llama")
    with on_the_cpu(record), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = generate(model, None, PROMPT, max_new_tokens=30, runner="cudagraph", policy="autoregressive")
    said = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    assert len(said) == 1
    assert said[0].startswith("a pass of 1 rows could not be recorded as a CUDA graph, so passes run one kernel at a")
    assert re.search(reason, said[0])
    assert found.token_ids == greedy(model, PROMPT, 30)
    assert found.report.runner == "eager"


def test_rows_that_do_not_arrive_are_noticed():
    """Where logits follow from the token alone, they do not tell; keys and values do."""
    cache = TreeCache(64)

    def lost(run: Run) -> Run:
        def replay() -> PassOutput:
            output = run()
            for keys in cache.keys:
                keys[:, :, cache.length :] = 0
            return output

        return replay

    tree = TokenTree.root(torch.tensor([7]))
    with on_the_cpu(lost), torch.inference_mode():
        runner = make_runner(tiny_model("llama"), "cudagraph")
        one = Passes(runner, StageClock(CPU))
        one.prefill(torch.tensor(PROMPT), cache)
        one.forward(flatten([tree], [cache.length]), cache, stage="verify")
        cache.rollback()
        with pytest.warns(RuntimeWarning, match="was off by 1 of the largest"):
            one.forward(flatten([tree], [cache.length]), cache, stage="verify")
    assert runner.computed_by == "eager"


@pytest.mark.parametrize("family", ASKING)
def test_a_model_that_asks_the_device_runs_as_it_is(family):
    with on_the_cpu(traced), pytest.warns(RuntimeWarning, match="could not be recorded as a CUDA graph"):
        found = generate(tiny_model(family), None, PROMPT, max_new_tokens=6, runner="cudagraph", eos_token_id=[])
    assert found.report.runner == "eager"
    assert found.token_ids == greedy(tiny_model(family), PROMPT, 6)


def test_there_is_none_on_a_cpu():
    with pytest.raises(ParameterError, match="is for models on a CUDA GPU, got one on cpu; use runner='auto'"):
        generate(tiny_model("llama"), None, [1, 2], runner="cudagraph")


def test_which_models_may_be_replayed():
    model = single("llama")
    assert is_replayable(model)
    hook = model.model.layers[1].register_forward_hook(lambda *_: None)
    assert not is_replayable(model)
    with on_the_cpu(), pytest.warns(RuntimeWarning, match="a part of the model has code of its own"):
        assert make_runner(model, "cudagraph").name == "eager"
    hook.remove()
    model.lm_head.forward = model.lm_head.forward
    assert not is_replayable(model)
    del model.lm_head.forward
    model.model.layers[0].mlp.act_fn = type("Own", (nn.ReLU,), {"__module__": "elsewhere"})()
    assert not is_replayable(model)
    model.model.layers[0].mlp.act_fn.__class__.is_replayable = True
    assert is_replayable(model)
    with on_the_cpu():
        assert runner_for(model, "cudagraph") == "cudagraph"


def test_synthetic_pairs_say_that_they_may_be_replayed():
    pair = synthetic_pair("tiny")
    assert is_replayable(pair.target)
    assert is_replayable(pair.drafter)


def test_nobody_gets_it_who_did_not_ask():
    with on_the_cpu():
        assert runner_for(single("llama", torch.float16), "auto") == "eager"
    assert [drafters_runner(name) for name in ("auto", "eager", "packed", "cudagraph", "mine")] == [
        "auto", "eager", "auto", "cudagraph", "auto",
    ]  # fmt: skip


# with a GPU


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "mistral"])
def test_replays_on_a_gpu_are_plain_passes(family, dtype):
    device = torch.device("cuda", torch.cuda.current_device())
    both = Both(single(family, dtype).to(device), 600, device)
    tolerance = {torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.5}[dtype]
    both.prefill(PROMPT * 10, device)
    for _ in range(6):
        both.check_pass(bushy_tree(device), tolerance=tolerance)
        both.commit([0, 2])
    for token in range(200):  # over a border of slots
        both.check_pass(TokenTree.root(torch.tensor([token % 30], device=device)), tolerance=tolerance)
        both.commit([0])
    assert both.runners[1].computed_by == "cudagraph"
    passes = both.runners[1]._graphs.of(both.caches[1])
    assert sum(one.replay is not None for one in passes.by_shape.values()) >= 2


@needs_cuda
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_generations_on_a_gpu_are_greedy(family):
    model, drafter = single(family).cuda(), copy.deepcopy(perturbed(family)).float().cuda()
    expected = greedy(model, PROMPT, 100)
    for policy in ("phase1", "autoregressive"):
        found = generate(model, drafter, PROMPT, policy=policy, max_new_tokens=100, runner="cudagraph", eos_token_id=[])
        assert found.report.runner == "cudagraph"
        check_the_same_up_to_a_tie(copy.deepcopy(model).cpu(), PROMPT, found.token_ids, expected)


@needs_cuda
@pytest.mark.parametrize("width", WIDTHS)
def test_the_kernel_on_a_gpu_writes_the_levels_that_torch_writes(width):
    device = torch.device("cuda", torch.cuda.current_device())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert level_writer(device, width, 16) is not None


@needs_cuda
@pytest.mark.parametrize("policy", ["fixed(depth=3)", "phase3", "best_first(nodes=8,depth=4)"])
def test_whole_steps_on_a_gpu_are_recorded_and_greedy(policy):
    """tests/test_recorded.py looks closer, on a pretended device."""
    model, drafter = single("llama").cuda(), copy.deepcopy(perturbed("llama")).float().cuda()
    engine = Engine(model, ModelDrafter(drafter), runner="cudagraph")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        session = Session.on(engine, PROMPT, policy=policy, max_new_tokens=100, eos_token_id=[])
        for _ in run(session):
            pass
    assert session.target.runner.num_steps_recorded > 0
    expected = greedy(model, PROMPT, 100)
    check_the_same_up_to_a_tie(copy.deepcopy(model).cpu(), PROMPT, session.new_token_ids, expected)


@needs_cuda
def test_a_model_that_waits_for_the_gpu_runs_as_it_is():
    def look(module: nn.Module, arguments: object, output: Any) -> None:
        float(output.logits.sum())

    look.is_replayable = True  # which is not so
    model = single("llama").cuda()
    expected = greedy(model, PROMPT, 20)
    model.register_forward_hook(look)
    with pytest.warns(RuntimeWarning, match="the host would wait for the device within it"):
        found = generate(model, None, PROMPT, max_new_tokens=20, runner="cudagraph", eos_token_id=[])
    check_the_same_up_to_a_tie(copy.deepcopy(single("llama")), PROMPT, found.token_ids, expected)
    torch.cuda.empty_cache()  # torch is as it was
    torch.rand(3, device="cuda")
