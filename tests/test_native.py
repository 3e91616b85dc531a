"""The native runner: the same pass, put together from fused operators, with the same bits for any number of rows."""

from __future__ import annotations

import copy
import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from students import HEAD_IDS
from test_architectures import bushy_tree
from torch import Tensor, nn

from dynatree_core import Engine, generate, ops
from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.errors import CacheError, ParameterError
from dynatree_core.models.architectures import EXACT_FAMILIES
from dynatree_core.models.blueprint import FAMILIES, Mixture, NoBlueprintError, blueprint_of
from dynatree_core.models.kept import kept_of
from dynatree_core.models.stored import narrowest, pack_narrowest
from dynatree_core.models.student import new_student
from dynatree_core.ops.native import loading
from dynatree_core.runners import choice
from dynatree_core.runners.altered import altered_part
from dynatree_core.runners.base import PassOutput, Rows
from dynatree_core.runners.choice import made_runner, make_runner, runner_for
from dynatree_core.runners.eager import EagerRunner
from dynatree_core.runners.native import NativeRunner, Twin
from dynatree_core.runners.workspace import ANGLES
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import CONTEXT, ROPES, VARIANTS, VOCAB, greedy, perturbed, tiny_model, tiny_variant
from dynatree_core.trace.replaying import KnownTarget
from dynatree_core.tree.flatten import FlatTrees, flatten, flatten_chain
from dynatree_core.tree.token_tree import TokenTree

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6]

# computed by other runners
LEFT_TO_OTHERS = {"deepseek_v3"}
KNOWN = [name for name in (*EXACT_FAMILIES, *VARIANTS) if VARIANTS.get(name, (name,))[0] not in LEFT_TO_OTHERS]
NOT_KNOWN = {"opt, norm after": "norms stand behind its layers"}
FITTING = [name for name in KNOWN if name not in NOT_KNOWN]

needs_library = pytest.mark.skipif(
    ops.reason_unavailable() is not None, reason=f"the operators' library is not usable: {ops.reason_unavailable()}"
)


@functools.cache
def single(name: str) -> nn.Module:
    """A tiny model of a family or a variant in single precision; nobody changes it."""
    return copy.deepcopy(tiny_variant(name)).float()


@functools.cache
def twin_of(name: str) -> Twin:
    with torch.no_grad():
        return Twin(blueprint_of(single(name)).packed(pack_narrowest))


def logits_of(passes: Any, chunks: Sequence[FlatTrees | Sequence[int]], capacity: int = 100, **asked: Any) -> Tensor:
    """[all rows, vocab] of passes one behind the other; tokens are committed, a tree must be the last."""
    cache, found = TreeCache(capacity), []
    with torch.inference_mode():
        for chunk in chunks:
            flat = chunk if isinstance(chunk, FlatTrees) else flatten_chain(torch.tensor(chunk), cache.length)
            found.append(passes.forward(cache.prepare(flat), cache, **asked).logits[0])
            if not isinstance(chunk, FlatTrees):
                cache.commit([range(len(chunk))])
    return torch.cat(found)


def test_every_family_has_a_blueprint_or_is_named_as_one_without():
    assert FAMILIES.keys() | LEFT_TO_OTHERS == EXACT_FAMILIES.keys()
    assert not FAMILIES.keys() & LEFT_TO_OTHERS


@pytest.mark.parametrize("name", FITTING)
def test_a_native_pass_is_the_plain_pass_up_to_rounding(name: str) -> None:
    tree = flatten([bushy_tree()], [len(TEXT)])
    plain = logits_of(EagerRunner(single(name)), [TEXT[:11], TEXT[11:], tree])
    found = logits_of(twin_of(name), [TEXT[:11], TEXT[11:], tree])
    scale = plain.abs().amax()
    torch.testing.assert_close(found / scale, plain / scale, rtol=0, atol=1e-5)


MIXTURES = {  # settings of checkpoints: (model type, what differs from its tiny configuration, experts of a row)
    "one expert": ("mixtral", {"num_experts_per_tok": 1}, 1),
    "all experts": ("mixtral", {"num_experts_per_tok": 4}, 4),
    "weights add up": ("qwen3_moe", {"norm_topk_prob": True}, 2),
    "weights that do not": ("qwen3_moe", {"norm_topk_prob": False}, 2),
    "OLMoE, weights add up": ("olmoe", {"norm_topk_prob": True}, 2),
    "every second layer": ("qwen2_moe", {"decoder_sparse_step": 2}, 2),
    "a dense layer": ("qwen3_moe", {"mlp_only_layers": (1,)}, 2),
    "many experts": ("qwen3_moe", {"num_experts": 33, "num_experts_per_tok": 8}, 8),
}


@functools.cache
def mixture_of(name: str) -> nn.Module:
    """A tiny model in double precision whose router is sure of itself; nobody changes it."""
    family, settings, _ = MIXTURES[name]
    return copy.deepcopy(tiny_model(family, **settings))


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixtures_settings_are_followed(name: str) -> None:
    """In double precision, where the reference computes; transformers rounds weights of experts to float32 there."""
    model = mixture_of(name)
    with torch.no_grad():
        twin = Twin(blueprint_of(model).packed(pack_narrowest))
    plain, found = logits_of(EagerRunner(model), [TEXT]), logits_of(twin, [TEXT])
    assert plain.dtype == found.dtype == torch.float64
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6 * plain.abs().amax().item())
    mixtures = [layer.mlp for layer in twin.blueprint.layers if isinstance(layer.mlp, Mixture)]
    assert [mixture.num_chosen for mixture in mixtures] == [MIXTURES[name][2]] * len(mixtures)
    assert len(mixtures) == (1 if "layer" in name else 2)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_all_rows_may_go_to_the_same_experts(family: str) -> None:
    """A router that nothing can change: two experts are chosen by every row, and the others by none."""
    model: Any = copy.deepcopy(single(family))
    routers = [part for name, part in model.named_modules() if name.endswith((".gate", ".router"))]
    assert len(routers) == 2
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.zero_()[0] = 1  # one number of a row is left
        for router in routers:
            signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
            router.weight.zero_()[:, 0] = signs  # whose sign says which two are taken: the first and third, or not
            router.weight[:, 0] += torch.tensor([0.0, 0.1, 0.2, 0.3])
        twin = Twin(blueprint_of(model).packed(pack_narrowest))
    plain, found = logits_of(EagerRunner(model), [TEXT]), logits_of(twin, [TEXT])
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5 * plain.abs().amax().item())


def test_angles_are_found_where_any_release_of_transformers_keeps_them() -> None:
    model: Any = copy.deepcopy(single("gptj"))
    expected = blueprint_of(model).layers[0].rope
    assert expected is not None
    if hasattr(model.transformer, "rotary_emb"):  # from 5.24 on; before that each layer had the table
        table = model.transformer.rotary_emb.embed_positions
        del model.transformer.rotary_emb
        for layer in model.transformer.h:
            layer.attn.embed_positions = table
    found = blueprint_of(model).layers[0].rope
    assert found is not None
    assert torch.equal(found.inv_freq, expected.inv_freq)
    lost: Any = copy.deepcopy(single("llama"))
    del lost.model.rotary_emb
    with pytest.raises(NoBlueprintError, match="rotary embedding is not where this release of transformers"):
        blueprint_of(lost)


@pytest.mark.parametrize(("attention", "softcap"), [("eager", 2.0), ("sdpa", None)])
def test_scores_are_capped_where_transformers_caps_them(attention: str, softcap: float | None) -> None:
    """Its SDPA has no soft caps, and is what 5.17.0 chooses for Gemma 2."""
    model: Any = copy.deepcopy(single("gemma2"))
    model.config._attn_implementation = attention
    assert {layer.softcap for layer in blueprint_of(model).layers} == {softcap}


def test_a_router_that_does_not_fit_its_experts_is_a_reason_against_the_model() -> None:
    model: Any = copy.deepcopy(single("qwen3_moe"))
    model.model.layers[1].mlp.gate.weight = nn.Parameter(torch.zeros(5, 32))
    with pytest.raises(NoBlueprintError, match=r"layers.1.mlp.experts' are 4 and its router has 5 outputs"):
        blueprint_of(model)
    with pytest.raises(NoBlueprintError, match="queries and keys are cut behind their norms"):
        blueprint_of(tiny_model("olmoe", clip_qkv=1.0))
    strange = copy.deepcopy(single("gpt_oss"))
    strange.config.swiglu_limit = 5.0  # type: ignore[union-attr]
    with pytest.raises(NoBlueprintError, match=r"a gate with the settings \(1.702, 5.0\)"):
        blueprint_of(strange)


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_embeddings_of_all_kinds_are_the_models_own(rope: str) -> None:
    model = copy.deepcopy(tiny_model("llama", rope_parameters=frozen({"rope_type": rope, **ROPES[rope]}))).float()
    twin = Twin(blueprint_of(model).packed(pack_narrowest))
    plain, found = logits_of(EagerRunner(model), [TEXT]), logits_of(twin, [TEXT])
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)


def slowed(model: Any, by: float) -> None:
    """The model with other frequencies than its configuration says, as is done to stretch a context."""
    model.model.rotary_emb.inv_freq *= by


def longer(model: Any) -> None:
    """A text beyond the limit, with which some frequencies grow."""
    with torch.no_grad():
        model(torch.arange(CONTEXT + 20)[None] % VOCAB)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("change", [functools.partial(slowed, by=0.25), longer], ids=["slowed", "after a longer text"])
def test_angles_are_those_that_the_model_computes_with(rope: str, change: Callable[[Any], None]) -> None:
    model = copy.deepcopy(tiny_model("llama", rope_parameters=frozen({"rope_type": rope, **ROPES[rope]}))).float()
    change(model)
    twin = Twin(blueprint_of(model).packed(pack_narrowest))
    plain, found = logits_of(EagerRunner(model), [TEXT]), logits_of(twin, [TEXT])
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)


def test_embeddings_are_scaled_as_the_model_scales_them() -> None:
    model: Any = copy.deepcopy(single("gemma3_text"))
    model.model.embed_tokens.embed_scale *= 0.5
    twin = Twin(blueprint_of(model).packed(pack_narrowest))
    plain, found = logits_of(EagerRunner(model), [TEXT]), logits_of(twin, [TEXT])
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5 * plain.abs().amax().item())


def test_a_table_of_angles_that_was_changed_is_a_reason_against_the_model() -> None:
    model: Any = copy.deepcopy(single("gptj"))
    blueprint_of(copy.deepcopy(model).bfloat16())  # which rounds the table
    for part in model.modules():
        if hasattr(part, "embed_positions"):
            part.embed_positions = part.embed_positions.roll(1, 0)
    with pytest.raises(NoBlueprintError, match="table of angles is not the usual one"):
        blueprint_of(model)


@pytest.mark.parametrize("role", ["embedding", "head"])
def test_layers_in_the_place_of_a_matrix_are_a_reason_against_the_model(role: str) -> None:
    model: Any = copy.deepcopy(single("llama"))
    if role == "head":
        model.lm_head = nn.Sequential(model.lm_head, nn.Tanh()).eval()
    else:
        model.model.embed_tokens = nn.Sequential(model.model.embed_tokens, nn.Linear(32, 32)).eval()
    with pytest.raises(NoBlueprintError, match=f"{role} is a Sequential"):
        blueprint_of(model)
    assert generate(model, None, TEXT, max_new_tokens=12).token_ids == greedy(model, TEXT, 12)


class frozen(dict):  # type: ignore[type-arg]
    """A dict that `tiny_model` can remember."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(str(self))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "cohere2"])
def test_what_goes_into_the_head_is_the_plain_passes(name: str) -> None:
    flat = flatten_chain(torch.tensor(TEXT), 0)
    with torch.inference_mode():
        plain = EagerRunner(single(name)).forward(flat, TreeCache(40), hidden=True)
        found = twin_of(name).forward(flat, TreeCache(40), hidden=True)
        last = twin_of(name).forward(flat, TreeCache(40), last_row_only=True)
    torch.testing.assert_close(found.hidden, plain.hidden, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.logits, plain.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(last.logits, plain.logits[:, -1:], rtol=0, atol=1e-4)


def test_a_pass_gives_the_totals_of_its_logits_where_they_are_wanted() -> None:
    trees = [bushy_tree(), TokenTree.root(torch.tensor([7]))]
    one_asks = [Rows(flatten([tree], [0], wants_totals=tree is trees[0]), TreeCache(40)) for tree in trees]
    both_ask = [Rows(flatten([tree], [0], wants_totals=True), TreeCache(40)) for tree in trees]
    with torch.inference_mode():
        found = [one for parts in (one_asks, both_ask) for one in twin_of("gemma2").forward_together(parts)]
        unasked = twin_of("gemma2").forward(flatten([bushy_tree()], [0]), TreeCache(40))
    assert unasked.totals is None
    for one in found:
        assert one.totals is not None
        assert torch.equal(one.totals[0], ops.totals(one.logits[0]))


class Biased(NativeRunner):
    """Likes one token, and says no word of the totals that it has inherited."""

    def forward_together(self, parts: Sequence[Rows], **asked: Any) -> list[PassOutput]:
        outputs = super().forward_together(parts, **asked)
        for output in outputs:
            output.logits[..., 5] += 1000
        return outputs


@pytest.mark.parametrize("num_prompts", [1, 2])
def test_tokens_follow_a_runner_that_changes_the_logits_of_this_one(num_prompts: int) -> None:
    engine = Engine(single("llama"), None, make_runner=lambda model, name: Biased(model))
    handles = [engine.submit(TEXT[: 3 + place], max_new_tokens=3, eos_token_id=[]) for place in range(num_prompts)]
    assert [handle.result().token_ids for handle in handles] == [[5, 5, 5]] * num_prompts


def test_lanes_of_different_lengths_have_the_rows_that_each_has_alone() -> None:
    trees = [bushy_tree(), TokenTree.root(torch.tensor([7]))]
    texts = [TEXT[:5], TEXT[:14]]
    batch = TreeCache(80, lanes=2)
    alone = []
    with torch.inference_mode():
        for lane, (tree, text) in enumerate(zip(trees, texts, strict=True)):
            one = TreeCache(80)
            twin_of("mistral").forward(flatten_chain(torch.tensor(text), 0), one)
            one.commit([range(len(text))])
            batch.allocate(one.keys, one.values)
            batch.load(*one.copied(), len(text), lane)
            alone.append(twin_of("mistral").forward(flatten([tree], [len(text)]), one).logits[0])
        flat = flatten(trees, [len(text) for text in texts])
        found = twin_of("mistral").forward(batch.prepare(flat), batch).logits
    for lane, (tree, logits) in enumerate(zip(trees, alone, strict=True)):
        torch.testing.assert_close(found[lane, : tree.num_nodes], logits, rtol=0, atol=1e-5)
    assert batch.block_len == flat.num_rows


@pytest.mark.parametrize("name", ["llama", "gemma2", "ministral3", "olmo", "qwen2_moe", "gpt_oss"])
def test_sequences_of_one_pass_have_the_rows_that_each_has_alone(name: str) -> None:
    trees = [bushy_tree(), TokenTree.root(torch.tensor([7])), bushy_tree()]
    texts = [TEXT[:5], TEXT[:14], TEXT]
    caches = [TreeCache(80) for _ in texts]
    with torch.inference_mode():
        for cache, text in zip(caches, texts, strict=True):
            twin_of(name).forward(flatten_chain(torch.tensor(text), 0), cache)
            cache.commit([range(len(text))])
        flats = [flatten([tree], [len(text)]) for tree, text in zip(trees, texts, strict=True)]
        alone = [twin_of(name).forward(flat, cache, hidden=True) for flat, cache in zip(flats, caches, strict=True)]
        for cache in caches:
            cache.rollback()
        parts = [Rows(flat, cache) for flat, cache in zip(flats, caches, strict=True)]
        found = twin_of(name).forward_together(parts, hidden=True)
        for cache in caches:
            cache.rollback()
        last = twin_of(name).forward_together(parts, last_row_only=True)
    same = torch.equal if ops.reason_unavailable() is None else functools.partial(torch.allclose, atol=1e-5)
    for one, own, final in zip(found, alone, last, strict=True):
        assert one.hidden is not None
        assert own.hidden is not None
        assert same(one.logits, own.logits)
        assert same(one.hidden, own.hidden)
        assert same(final.logits, own.logits[:, -1:])
    assert [cache.block_len for cache in caches] == [tree.num_nodes for tree in trees]


@needs_library
def test_several_threads_compute_passes_of_one_twin() -> None:
    """Each has a workspace of its own."""
    passes, chunks = twin_of("llama"), [TEXT[:11], TEXT[11:], flatten([bushy_tree()], [len(TEXT)])]
    alone, wrong = logits_of(passes, chunks), []

    def call() -> None:
        wrong.extend(number for number in range(8) if not torch.equal(logits_of(passes, chunks), alone))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


@needs_library
def test_a_workspace_grows_with_passes_and_keeps_no_cache() -> None:
    twin = Twin(twin_of("gemma2").blueprint)
    wanted = logits_of(twin_of("gemma2"), [TEXT * 4], capacity=200)
    caches = [TreeCache(200), TreeCache(300)]
    with torch.inference_mode():
        for cache, text in zip(caches, (TEXT, TEXT * 4), strict=True):
            found = twin.forward(flatten_chain(torch.tensor(text), 0), cache).logits[0]
            assert torch.equal(found, wanted[: len(text)])
            assert len(twin._spare) == 1
    buffers = [weakref.ref(buffer) for cache in caches for buffer in (*cache.keys, *cache.values)]
    del caches, cache
    assert not [buffer for buffer in buffers if buffer() is not None]


@pytest.mark.parametrize("name", ["gemma2", "gptj"])
def test_a_blueprint_is_the_same_whatever_torchs_default_is(name: str) -> None:
    wanted, before = blueprint_of(single(name)), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = blueprint_of(single(name))
    finally:
        torch.set_default_dtype(before)
    assert found.embedding_scale == wanted.embedding_scale
    for one, other in zip(found.layers, wanted.layers, strict=True):
        assert one.rope is not None
        assert other.rope is not None
        assert torch.equal(one.rope.inv_freq, other.rope.inv_freq)


@needs_library
def test_a_workspace_serves_in_and_outside_of_inference_mode() -> None:
    """A drafter whose weights have no views in inference mode has its target leave that mode, too."""
    twin, wanted = Twin(twin_of("llama").blueprint), logits_of(twin_of("llama"), [TEXT])
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(twin.forward(flatten_chain(torch.tensor(TEXT), 0), TreeCache(40)).logits[0], wanted)
    assert len(twin._spare) == 1


@needs_library
def test_long_passes_of_one_sequence_and_short_ones_of_many_have_one_workspace() -> None:
    twin, works = Twin(twin_of("llama").blueprint), set()
    with torch.inference_mode():
        for _ in range(2):
            twin.forward(flatten_chain(torch.tensor(TEXT * 3), 0), TreeCache(80))
            works.add(twin._spare[0][0])
            twin.forward_together([Rows(flatten_chain(torch.tensor([7]), 0), TreeCache(8)) for _ in range(5)])
            works.add(twin._spare[0][0])
    assert len(works) == 2  # the second has room for both


class OneTakenByAnother(list):  # type: ignore[type-arg]
    """Workspaces of which another thread takes the last one whenever it is looked whether there is one."""

    def __bool__(self) -> bool:
        found = len(self) > 0
        self.clear()
        return found


@needs_library
def test_a_workspace_that_another_thread_takes_first_is_made_anew() -> None:
    twin, wanted = Twin(twin_of("llama").blueprint), logits_of(twin_of("llama"), [TEXT])
    twin._spare = OneTakenByAnother()
    for _ in range(2):
        assert torch.equal(logits_of(twin, [TEXT]), wanted)


# ---- equal bits -----------------------------------------------------------------------------------------------


@st.composite
def trees_and_chunks(draw: st.DrawFn) -> tuple[TokenTree, list[int]]:
    """A random tree, and the sizes of the chunks that a text of 23 tokens comes in."""
    sizes = []
    while sum(sizes) < len(TEXT):
        sizes.append(draw(st.integers(1, len(TEXT) - sum(sizes))))
    return draw(ours.trees(max_depth=4, max_width=4)), sizes


@needs_library
@pytest.mark.parametrize("name", FITTING)
@settings(max_examples=4)
@given(drawn=trees_and_chunks())
def test_a_rows_bits_depend_on_its_text_alone(name: str, drawn: tuple[TokenTree, list[int]]) -> None:
    tree, sizes = drawn
    chunks, rest = [], list(TEXT)
    for size in sizes:
        chunks.append(rest[:size])
        rest = rest[size:]
    passes = twin_of(name)
    whole = logits_of(passes, [TEXT])
    assert torch.equal(logits_of(passes, chunks), whole), "prefill in chunks"
    assert torch.equal(logits_of(passes, [[token] for token in TEXT]), whole), "one row a pass"
    found = logits_of(passes, [TEXT, flatten([tree], [len(TEXT)])])[len(TEXT) :]
    for node in range(tree.num_nodes):
        path = [other for other in range(tree.num_nodes) if tree.ancestor_mask[node, other]]
        tokens = [int(tree.token_ids[other]) for other in path]
        alone = logits_of(passes, [TEXT, *([token] for token in tokens)])[-1]
        assert torch.equal(found[node], alone), f"node {node} of {tree.parent.tolist()}"


@needs_library
def test_a_rows_bits_are_the_same_with_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(logits_of(twin_of("llama"), [TEXT]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_library
@pytest.mark.parametrize("name", FITTING)
def test_tokens_are_those_of_plain_decoding_and_of_eager(name: str) -> None:
    model, drafter = single(name), copy.deepcopy(perturbed(VARIANTS.get(name, (name,))[0])).float()
    drafter = drafter if drafter.config.to_dict() == model.config.to_dict() else model
    plain = generate(model, None, PROMPT, policy="autoregressive", runner="native", max_new_tokens=24)
    found = generate(
        model, drafter, PROMPT, policy="fixed(depth=3,branch=2,tau=0.0)", runner="native", max_new_tokens=24
    )
    assert found.report.runner == "native"
    assert found.token_ids == plain.token_ids == greedy(model, PROMPT, 24)


# ---- which models, and which not ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NOT_KNOWN, "deepseek_v3"])
def test_a_model_without_a_blueprint_is_left_to_others(name: str) -> None:
    with pytest.raises(NoBlueprintError, match=NOT_KNOWN.get(name, "model type is 'deepseek_v3'")):
        blueprint_of(single(name))


IGNORED = {"num_key_value_heads": 1, "head_dim": 16}  # by these families, with four heads of eight numbers


@needs_library
@pytest.mark.parametrize("name", ["gpt2", "gptj", "opt"])
def test_heads_are_those_of_the_matrices_whatever_a_configuration_says_of_them(name: str) -> None:
    model = copy.deepcopy(tiny_model(name, **IGNORED)).float()
    assert runner_for(model, "auto") == "native"
    plain, found = (logits_of(made_runner(model, runner), [TEXT]) for runner in ("eager", "native"))
    torch.testing.assert_close(found / plain.abs().amax(), plain / plain.abs().amax(), rtol=0, atol=1e-5)


def test_matrices_that_do_not_fit_the_heads_are_a_reason_against_the_model() -> None:
    model: Any = copy.deepcopy(single("gpt2"))
    model.config.num_attention_heads = 3
    with pytest.raises(NoBlueprintError, match=r"'transformer\.h\.0\.attn' has matrices that do not fit its 3 heads"):
        blueprint_of(model)


def test_a_parameter_that_no_layer_takes_is_a_reason_against_the_model() -> None:
    model: Any = copy.deepcopy(single("llama"))
    model.model.layers[1].mlp.extra = nn.Linear(2, 2)
    with pytest.raises(NoBlueprintError, match=r"more than is known of llama, such as 'model.layers.1.mlp.extra.bias'"):
        blueprint_of(model)


def test_a_setting_that_is_not_known_is_a_reason_against_the_model() -> None:
    model: Any = copy.deepcopy(single("llama"))
    model.config.hidden_act = "mish"
    with pytest.raises(NoBlueprintError, match="activation is 'mish'"):
        blueprint_of(model)


def test_a_module_that_was_replaced_or_set_otherwise_is_a_reason_against_the_model() -> None:
    assert all(altered_part(single(name)) is None for name in FITTING)
    assert altered_part(new_student(single("llama"), [1], HEAD_IDS)) is None
    padded = copy.deepcopy(single("llama"))
    for pad_token_id in (3, 10**6):  # which only gradients go by; the second is that of a table that was not enlarged
        assert altered_part(padded) is None
        padded.config.pad_token_id = pad_token_id
    model: Any = copy.deepcopy(single("llama"))
    model.model.layers[0].mlp.act_fn = nn.ReLU()  # which a blueprint, read from the configuration, would not follow
    assert altered_part(model) == "'model.layers.0.mlp.act_fn' is another one"
    model = copy.deepcopy(single("llama"))
    assert altered_part(model) is None
    model.model.layers[1].self_attn.scaling *= 2
    assert altered_part(model) == "'model.layers.1.self_attn' is another one"
    model = copy.deepcopy(single("llama"))
    assert altered_part(model) is None
    model.config.rms_norm_eps = 0.5  # which the norms, made before, do not have
    assert altered_part(model) == "'model.layers.0.input_layernorm' is another one"
    model, other = (copy.deepcopy(single("olmo")) for _ in range(2))
    model.model.layers[1] = other.model.layers[1]  # with a configuration of its own, which says the same
    assert altered_part(model) is None
    other.config.clip_qkv = 0.5  # which a layer reads in its passes
    assert altered_part(model) == "'model.layers.1.self_attn' is another one"
    model = copy.deepcopy(single("phi"))
    model.config.rope_parameters = {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}  # one is missing
    assert "cannot be made of a configuration alone (KeyError: 'partial_rotary_factor')" in str(altered_part(model))
    model = copy.deepcopy(single("qwen3"))
    del model.model.layers[1].self_attn.q_norm
    assert "self_attn.q_norm' is missing" in str(altered_part(model))


@needs_library
def test_reasons_against_a_model() -> None:
    def reason(model: nn.Module) -> str:
        with pytest.raises(ParameterError) as raised:
            runner_for(model, "native")
        return str(raised.value)

    assert "that compute in float32, got torch.float64 on cpu" in reason(tiny_model("llama"))
    assert "knows no model whose model type is 'deepseek_v3'" in reason(single("deepseek_v3"))
    hooked = copy.deepcopy(single("llama"))
    hooked.register_forward_hook(lambda module, args, output: output)
    assert "as transformers made them" in reason(hooked)
    mixed: Any = copy.deepcopy(single("llama"))
    mixed.model.norm.bfloat16()
    assert "weights are all float32, got torch.bfloat16, torch.float32" in reason(mixed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "under autocast" in reason(single("llama"))


def test_a_library_that_could_be_there_is_missed_once(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv(loading.CHOICE, raising=False)
    monkeypatch.setattr(loading, "FOLDER", tmp_path)
    monkeypatch.setattr(loading, "_chosen", functools.cache(loading._chosen.__wrapped__))
    choice._tell_of_missing_library.cache_clear()
    with pytest.warns(
        RuntimeWarning, match=r"packed serves: its library is missing; it was not compiled .* run `python"
    ):
        assert runner_for(single("llama"), "auto") == "packed"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert runner_for(single("llama"), "auto") == "packed"
        choice._tell_of_missing_library.cache_clear()
        monkeypatch.setenv(loading.CHOICE, "off")  # somebody's own choice
        assert runner_for(single("llama"), "auto") == "packed"


@needs_library
def test_a_bounded_cache_has_another_runner_or_is_refused() -> None:
    model = single("llama")
    found = generate(model, None, PROMPT, cache="sinks=2,window=6", max_new_tokens=12)
    assert found.report.runner != "native"
    with pytest.raises(ParameterError, match=r"the native runner takes no bounded cache, got cache='sinks=2,window=6'"):
        generate(model, None, PROMPT, cache="sinks=2,window=6", max_new_tokens=12, runner="native")


def test_a_cache_that_takes_no_rows_is_an_error() -> None:
    class Closed(TreeCache):
        can_record = False

    with pytest.raises(CacheError, match=r"a cache that can_record, got a Closed"):
        twin_of("llama").forward(flatten_chain(torch.tensor(TEXT), 0), Closed(40))


# ---- weights --------------------------------------------------------------------------------------------------


def test_matrices_that_were_published_in_16_bits_are_packed_in_16_bits() -> None:
    model: Any = copy.deepcopy(single("llama"))
    assert narrowest(model.lm_head.weight) == torch.float32
    halves = copy.deepcopy(model).half().float()
    assert narrowest(halves.lm_head.weight) == torch.float16
    rounded = model.bfloat16().float()
    assert narrowest(rounded.lm_head.weight) == torch.bfloat16
    with torch.no_grad():
        twin = Twin(blueprint_of(rounded).packed(pack_narrowest))
    assert twin.blueprint.layers[0].qkv.kind == "bfloat16"
    whole = Twin(blueprint_of(rounded).packed(lambda parts, bias: ops.pack(list(parts), bias)))
    assert whole.blueprint.layers[0].qkv.kind == "float32"
    torch.testing.assert_close(logits_of(twin, [TEXT]), logits_of(whole, [TEXT]), rtol=0, atol=0)


@needs_library
def test_packed_matrices_serve_until_a_weight_is_changed() -> None:
    model = copy.deepcopy(single("llama"))
    first = make_runner(model, "native", kept=kept_of(model))
    assert make_runner(model, "native", kept=kept_of(model)) is first
    with torch.no_grad():
        model.lm_head.weight.mul_(2)  # type: ignore[union-attr, operator]
    second = make_runner(model, "native", kept=kept_of(model))
    assert second is not first
    torch.testing.assert_close(logits_of(second, [TEXT]), 2 * logits_of(first, [TEXT]))


def test_a_student_drafts_on_it_with_its_targets_embeddings() -> None:
    student = new_student(single("llama"), [0, 1], HEAD_IDS)
    blueprint = blueprint_of(student)
    assert blueprint.embedding.data_ptr() == single("llama").get_input_embeddings().weight.data_ptr()  # type: ignore[operator]
    with torch.no_grad():
        twin = Twin(blueprint.packed(pack_narrowest))
    plain, found = logits_of(EagerRunner(student), [TEXT]), logits_of(twin, [TEXT])
    assert found.shape == (len(TEXT), len(HEAD_IDS))
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)


def test_angles_of_a_position_are_the_same_however_far_the_table_goes() -> None:
    def cosines(positions: list[int]) -> Tensor:
        angles = next(iter(copy.copy(twin_of("llama"))._angles.values()))
        fresh = type(angles)(angles._rope, torch.float32)
        return torch.stack([torch.from_numpy(fresh.at(np.array([position]))[0][0]) for position in positions])

    assert torch.equal(cosines([3, ANGLES + 1]), cosines([ANGLES + 1, 3]).flip(0))
    assert attrs.has(type(twin_of("llama").blueprint))


def test_the_name_of_the_class_is_that_of_the_entry_point() -> None:
    assert NativeRunner.name == "native"
    assert NativeRunner.has_equal_bits


@needs_library
def test_a_class_that_takes_more_than_a_configuration_is_left_to_others(recwarn):
    model = KnownTarget([1, 2, 3, 4, 5, 6, 7], vocab=9, room=8)  # one of this package, with a forward of its own
    assert "cannot be made of a configuration alone" in NativeRunner.reason_against(model)
    assert generate(model, None, [1, 2, 3], max_new_tokens=4).token_ids == [4, 5, 6, 7]
    assert not [warning for warning in recwarn if "leaves out" in str(warning.message)]
