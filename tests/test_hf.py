"""generate() with trees: each argument that is honoured gives what generate() gives, each other one is refused."""

from __future__ import annotations

import functools
import inspect
import threading
from decimal import Decimal

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from dynatree_core import PrefixCache, generate, hf
from dynatree_core.errors import DynaTreeError, ParameterError, PromptError
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import VOCAB, perturbed, tiny_model

TARGET, DRAFTER = tiny_model("llama"), perturbed("llama")
PROMPT = torch.tensor([[1, 2, 3]])
PLAIN = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 20, "pad_token_id": 0}
TREES = {"custom_generate": hf.generate, "drafter": DRAFTER, "policy": "fixed(tau=0.0)"}


@pytest.fixture(scope="module")
def tokenizer():
    texts = [*"abcdefghijklmnopqrstuvwxyz .,!?'", "ab", "the", " a", "re", "in"]
    assert len(texts) == VOCAB
    inner = Tokenizer(models.BPE({text: i for i, text in enumerate(texts)}, merges=[]))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="a", eos_token="?")


class No(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[:, input_ids[0, -1]] = -torch.inf
        return scores


class Ten(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((1,), input_ids.shape[1] >= 10)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"max_new_tokens": 1},
        {"max_new_tokens": None, "max_length": 9},
        {"max_new_tokens": None, "generation_config": GenerationConfig(max_new_tokens=7, repetition_penalty=1.3)},
        {"eos_token_id": [4, 11, 30]},
        {"min_new_tokens": 6, "eos_token_id": list(range(18))},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"bad_words_ids": [[4], [7, 8]], "suppress_tokens": [3]},
        {"forced_eos_token_id": 5, "sequence_bias": {(9,): 3.0}},
        {"logits_processor": [No()]},
        {"stopping_criteria": [Ten()]},
        {"max_time": 0.0},
        {"max_time": Decimal(0)},
        {"max_time": numpy.float32(0)},
        {"stopping_criteria": [MaxLengthCriteria(11)]},
        {"stopping_criteria": [MaxLengthCriteria(31)]},
        {"stopping_criteria": [EosTokenCriteria([4, 11, 30])]},
        {"prefix_allowed_tokens_fn": lambda batch, ids: [1, 2, 3, 4 + len(ids) % 5]},
        {"do_sample": True, "temperature": 0.6, "top_k": 12, "top_p": 0.9},
        {"do_sample": True, "min_p": 0.1, "repetition_penalty": 1.2},
        {"attention_mask": torch.tensor([[0, 1, 1]])},
        {"position_ids": torch.tensor([[3, 5, 9]])},
        {"use_cache": False},
    ],
    ids=lambda asked: "+".join(asked) or "nothing",
)
def test_what_is_honoured(asked):
    arguments = {**PLAIN, **asked}
    torch.manual_seed(3)
    expected = TARGET.generate(PROMPT, **arguments)
    torch.manual_seed(3)
    assert TARGET.generate(PROMPT, **arguments, **TREES).tolist() == expected.tolist()


@settings(max_examples=30)
@given(data=st.data())
def test_any_settings(data):
    family, seed = data.draw(ours.families), data.draw(ours.model_seeds)
    target, prompt = tiny_model(family, seed), torch.tensor([data.draw(ours.prompts)])
    asked = data.draw(ours.settings)
    torch_seed = asked.pop("seed", 0)
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": data.draw(st.integers(1, 20)), **asked}
    arguments |= {"eos_token_id": data.draw(st.lists(ours.token_ids, max_size=2)) or None, "pad_token_id": 0}
    trees = {"drafter": data.draw(ours.drafters(family, seed)), "policy": data.draw(ours.stacks())}
    torch.manual_seed(torch_seed)
    expected = target.generate(prompt, **arguments)
    torch.manual_seed(torch_seed)
    assert target.generate(prompt, **arguments, custom_generate=hf.generate, **trees).tolist() == expected.tolist()


@pytest.mark.parametrize("do_sample", [False, True])
def test_scores_and_logits(do_sample):
    asked = {**PLAIN, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    asked |= {"repetition_penalty": 1.3, "do_sample": do_sample}
    torch.manual_seed(3)
    expected = TARGET.generate(PROMPT, **asked)
    torch.manual_seed(3)
    result = TARGET.generate(PROMPT, **asked, **TREES)
    assert result.sequences.tolist() == expected.sequences.tolist()
    for name in ("scores", "logits"):
        assert len(result[name]) == 20
        for ours_, theirs in zip(result[name], expected[name], strict=True):
            torch.testing.assert_close(ours_, theirs)


def gap(scores):
    """Between the two best tokens, [1, vocab]."""
    best = scores.topk(2).values[0]
    return best[0] - best[1]


class Unsure(StoppingCriteria):
    """Done when the scores of a token behind the fourth are so close: a use of `output_scores` that is documented."""

    def __init__(self, close):
        self.close = close

    def __call__(self, input_ids, scores, **kwargs):
        assert len(scores) == input_ids.shape[1] - PROMPT.shape[1]
        return torch.full((1,), bool(len(scores) > 4 and gap(scores[-1]) < self.close))


def test_criteria_that_look_at_scores():
    asked = {**PLAIN, "return_dict_in_generate": True, "output_scores": True}
    gaps = sorted(map(gap, TARGET.generate(PROMPT, **asked).scores[4:-1]))
    asked["stopping_criteria"] = [Unsure((gaps[0] + gaps[1]) / 2)]
    expected = TARGET.generate(PROMPT, **asked).sequences.tolist()
    assert TARGET.generate(PROMPT, **asked, **TREES).sequences.tolist() == expected
    assert 7 < len(expected[0]) < 23


def test_a_prefix_cache():
    cache = PrefixCache()
    expected = TARGET.generate(PROMPT, **PLAIN).tolist()
    for _ in range(2):
        assert TARGET.generate(PROMPT, **PLAIN, **TREES, options={"prefix_cache": cache}).tolist() == expected
        assert cache.num_bytes > 0


def test_recorded_scores_can_be_changed_in_place():
    result = TARGET.generate(PROMPT, **PLAIN, return_dict_in_generate=True, output_scores=True, **TREES)
    result.scores[0].add_(1)


def test_a_targets_own_settings_are_applied_once():
    TARGET.generation_config.repetition_penalty = 1.6
    try:
        expected = TARGET.generate(PROMPT, **PLAIN)
        assert TARGET.generate(PROMPT, **PLAIN, **TREES).tolist() == expected.tolist()
    finally:
        TARGET.generation_config.repetition_penalty = None


def test_options_of_a_session():
    narrow = hf.generate_with(
        TARGET, PROMPT, drafter=DRAFTER, options={"max_nodes": 0, "on_error": "fallback"}, **PLAIN
    )
    assert narrow.tolist() == TARGET.generate(PROMPT, **PLAIN).tolist()
    with pytest.raises(ParameterError, match="max_nodes must be an integer"):
        TARGET.generate(PROMPT, **PLAIN, **TREES, options={"max_nodes": -1})


def test_a_dict_without_scores():
    result = TARGET.generate(PROMPT, **PLAIN, return_dict_in_generate=True, **TREES)
    assert result.scores is None
    assert result.sequences.tolist() == TARGET.generate(PROMPT, **PLAIN).tolist()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_beams": 3}, "tree decoding has no num_beams, got 3"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "has no output_hidden_states"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "has no output_attentions"),
        ({"guidance_scale": 1.5}, "has no guidance_scale"),
        ({"force_words_ids": [[4]]}, "has no force_words_ids"),
        ({"constraints": ["a phrase"]}, "has no constraints"),
        ({"penalty_alpha": 0.6}, "has no penalty_alpha"),
        ({"dola_layers": "high"}, "has no dola_layers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_refused(asked, message):
    with pytest.raises(ParameterError, match=message):
        TARGET.generate(PROMPT, **PLAIN, **asked, **TREES)


@pytest.mark.parametrize("answer", [torch.tensor([False, True]), torch.tensor([2]), torch.tensor([]), 0.5, None])
def test_a_criterion_that_answers_neither_true_nor_false_is_refused(answer):
    class Odd(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return answer

    with pytest.raises(ParameterError, match=r"must answer True or False.*from Odd; return one bool"):
        generate(TARGET, DRAFTER, PROMPT, stopping_criteria=[Odd()], max_new_tokens=4)
    for kept in ({}, {"output_scores": True, "return_dict_in_generate": True}):
        with pytest.raises(ParameterError, match=r"must answer True or False.*from Odd; return one bool"):
            TARGET.generate(PROMPT, **PLAIN, **kept, stopping_criteria=[Odd()], **TREES)


def test_healing_is_refused_before_generate_asks_for_a_tokenizer():
    healing = GenerationConfig(token_healing=True, max_new_tokens=4)
    for asked in ({"token_healing": True}, {"generation_config": healing}):
        with pytest.raises(ParameterError, match=r"token_healing changes the prompt.*model\.heal_tokens"):
            hf.generate_with(TARGET, PROMPT, **asked)


def test_what_generate_hands_to_no_loop_is_refused():
    with pytest.raises(ParameterError, match=r"hands assistant_model on to no custom loop.*as drafter="):
        TARGET.generate(PROMPT, **PLAIN, assistant_model=DRAFTER, **TREES)
    with pytest.raises(ParameterError, match="hands synced_gpus on to no custom loop"):
        TARGET.generate(PROMPT, **PLAIN, synced_gpus=True, **TREES)


class Editing(LogitsProcessor):
    """Writes into the text that it is shown, and goes by what it finds there."""

    def __init__(self, back, by):
        self.back, self.by = back, by

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > self.back:
            input_ids[:, -self.back] = (input_ids[:, -self.back] + self.by) % VOCAB
        return scores + 0.3 * torch.sin(input_ids.sum() + torch.arange(VOCAB))


@settings(max_examples=30)
@given(back=st.integers(1, 8), by=st.integers(0, VOCAB - 1), policy=ours.stacks(), do_sample=st.booleans())
def test_a_processor_that_writes_into_the_text(back, by, policy, do_sample):
    asked = {**PLAIN, "do_sample": do_sample}
    torch.manual_seed(3)
    expected = TARGET.generate(PROMPT.clone(), **asked, logits_processor=[Editing(back, by)])
    trees = {**TREES, "policy": policy}
    for decode in (
        lambda given: TARGET.generate(PROMPT.clone(), **asked, logits_processor=given, **trees).tolist(),
        lambda given: [
            expected[0, :3].tolist()
            + generate(
                TARGET, DRAFTER, PROMPT, policy=policy, max_new_tokens=20, do_sample=do_sample, logits_processor=given
            ).token_ids
        ],
    ):
        torch.manual_seed(3)
        assert decode([Editing(back, by)]) == expected.tolist()


class Collecting(TextStreamer):
    def __init__(self, tokenizer, **options):
        super().__init__(tokenizer, **options)
        self.text = ""

    def on_finalized_text(self, text, stream_end=False):
        self.text += text


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_a_streamer_gets_what_it_gets_from_generate(tokenizer, skip_prompt):
    theirs, mine = (Collecting(tokenizer, skip_prompt=skip_prompt) for _ in range(2))
    expected = TARGET.generate(PROMPT, **PLAIN, streamer=theirs)
    result = hf.generate_with(TARGET, PROMPT, drafter=DRAFTER, policy="fixed", streamer=mine, **PLAIN)
    assert result.tolist() == expected.tolist()
    assert mine.text == theirs.text != ""


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_a_streamer_given_to_generate_itself(tokenizer, skip_prompt):
    theirs, mine = (Collecting(tokenizer, skip_prompt=skip_prompt) for _ in range(2))
    expected = TARGET.generate(PROMPT, **PLAIN, streamer=theirs)
    assert TARGET.generate(PROMPT, **PLAIN, streamer=mine, **TREES).tolist() == expected.tolist()
    assert mine.text == theirs.text != ""


def decorated(function):
    @functools.wraps(function)
    def called(*args, **given):
        return function(*args, **given)

    return called


@pytest.mark.parametrize("between", [decorated, lambda f: lambda *args, **given: f(*args, **given), functools.partial])
def test_a_streamer_given_to_generate_around_a_function_of_ones_own(tokenizer, between):
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    result = TARGET.generate(PROMPT, **PLAIN, streamer=streamer, custom_generate=between(hf.generate))
    assert "".join(streamer) == tokenizer.decode(result[0])


class Replacing(StoppingCriteria):
    """Puts another token in the place of the last one, or of one before it."""

    def __init__(self, back, num_tokens):
        self.back, self.num_tokens = back, num_tokens

    def __call__(self, input_ids, scores, **others):
        is_done = input_ids.shape[1] >= self.num_tokens
        if is_done or self.back > 1:
            input_ids[0, -self.back] = 7
        return torch.tensor([is_done])


@pytest.mark.parametrize("back", [1, 2, 3])
def test_a_criterion_that_writes_into_the_text(back):
    """What it writes before the last token is shown from then on; the last one may be replaced where the text ends."""
    expected = TARGET.generate(PROMPT.clone(), **PLAIN, stopping_criteria=[Replacing(back, 9)])
    result = TARGET.generate(PROMPT.clone(), **PLAIN, stopping_criteria=[Replacing(back, 9)], **TREES)
    assert result.tolist() == expected.tolist()


def test_a_criterion_that_replaces_the_last_token_of_a_text_that_goes_on_is_refused():
    def replace(input_ids, scores, **others):
        input_ids[0, -1] = (input_ids[0, -1] + 1) % VOCAB
        return torch.tensor([False])

    for decode in (
        lambda: TARGET.generate(PROMPT.clone(), **PLAIN, stopping_criteria=[replace], **TREES),
        lambda: generate(TARGET, DRAFTER, PROMPT, stopping_criteria=[replace]),
    ):
        with pytest.raises(ParameterError, match="must leave the last token as it is"):
            decode()


class Raising(LogitsProcessor):
    def __call__(self, input_ids, scores):
        raise RuntimeError("broken")


@pytest.mark.parametrize(
    "broken", [{"policy": "no_such"}, {"num_beams": 2}, {"logits_processor": [Raising()]}, {"stop_strings": ["a"]}]
)
@pytest.mark.parametrize("through", [hf.generate_with, lambda model, *args, **given: model.generate(*args, **given)])
def test_a_streamer_ends_where_a_generation_fails(tokenizer, broken, through):
    if not broken.keys().isdisjoint({"stop_strings", "num_beams"}) and through is not hf.generate_with:
        pytest.skip("generate() itself refuses these before it calls anybody, and ends no streamer")
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    trees = {"drafter": DRAFTER, "policy": "fixed"} | ({} if through is hf.generate_with else TREES)
    with pytest.raises((DynaTreeError, RuntimeError)):
        through(TARGET, PROMPT, **{**PLAIN, **trees, **broken}, streamer=streamer)
    list(streamer)  # it would wait for a minute, and raise


def test_an_iterating_streamer_in_a_thread(tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    arguments = {"drafter": DRAFTER, "streamer": streamer, "input_ids": PROMPT, **PLAIN}
    thread = threading.Thread(target=hf.generate_with, args=(TARGET,), kwargs=arguments)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(TARGET.generate(PROMPT, **PLAIN)[0, 3:])


def test_stop_strings(tokenizer):
    text = tokenizer.decode(TARGET.generate(PROMPT, **PLAIN)[0, 3:])
    asked = {**PLAIN, "stop_strings": [text[4:6]], "tokenizer": tokenizer}
    expected = TARGET.generate(PROMPT, **asked)
    assert hf.generate_with(TARGET, PROMPT, drafter=DRAFTER, **asked).tolist() == expected.tolist()
    assert expected.shape[1] < 23
    with pytest.raises(ParameterError, match="stop_strings need the target's tokenizer"):
        hf.generate_with(TARGET, PROMPT, drafter=DRAFTER, stop_strings=["a"], **PLAIN)
    own = TARGET.generation_config
    own.stop_strings = [text[4:6]]
    try:
        given = {**PLAIN, "tokenizer": tokenizer, "stopping_criteria": None}
        assert hf.generate_with(TARGET, PROMPT, drafter=DRAFTER, **given).tolist() == expected.tolist()
    finally:
        own.stop_strings = None
    given |= {"generation_config": GenerationConfig(stop_strings=[text[4:6]])}
    assert hf.generate_with(TARGET, PROMPT, drafter=DRAFTER, **given).tolist() == expected.tolist()


def renamed(function):
    """A function of somebody's own around ours, which names what it takes."""

    def called(model, input_ids, tokenizer=None, **given):
        return function(model, input_ids, tokenizer=tokenizer, **given)

    called.__signature__ = inspect.signature(function)
    return called


@pytest.mark.parametrize("around", [lambda function: function, functools.partial, decorated, renamed])
@pytest.mark.parametrize("is_in_config", [False, True])
def test_stop_strings_given_to_generate_itself(tokenizer, around, is_in_config):
    """generate() takes the tokenizer for itself, and needs it for them before it calls a loop."""
    stop = {"stop_strings": [tokenizer.decode(TARGET.generate(PROMPT, **PLAIN)[0, 3:])[4:6]]}
    asked = {**PLAIN, "tokenizer": tokenizer}
    asked |= {"generation_config": GenerationConfig(**stop)} if is_in_config else stop
    expected = TARGET.generate(PROMPT, **asked)
    assert expected.shape[1] < 23
    assert (
        TARGET.generate(PROMPT, **{**asked, **TREES, "custom_generate": around(hf.generate)}).tolist()
        == expected.tolist()
    )


def test_a_pipelines_stop_sequence(tokenizer):
    pipe = pipeline("text-generation", model=TARGET, tokenizer=tokenizer)
    asked = {"max_new_tokens": 12, "return_full_text": False, "do_sample": False}
    [full] = pipe("the cat", **asked)
    asked["stop_sequence"] = full["generated_text"][4:6]
    expected = pipe("the cat", **asked)
    assert len(expected[0]["generated_text"]) < len(full["generated_text"])
    assert pipe("the cat", **asked, **TREES) == expected


def test_a_pipeline_that_pads_at_the_right_is_refused(tokenizer):
    pipe = pipeline("text-generation", model=TARGET, tokenizer=tokenizer)  # which sets the left side
    pipe.tokenizer.padding_side = "right"
    with pytest.raises(PromptError, match="padded at its left only"):
        pipe(["the cat", "a hen in the barn"], batch_size=2, max_new_tokens=4, do_sample=False, **TREES)


def test_the_signature_is_read_by_others_without_effect(tokenizer):
    def read(generation_mode_kwargs, kwargs):
        return list(inspect.signature(hf.generate).parameters)

    asked = {}
    assert read({"tokenizer": tokenizer}, asked)[-2:] == ["tokenizer", "model_kwargs"]
    assert asked == {}


def test_pipeline(tokenizer):
    pipe = pipeline("text-generation", model=TARGET, tokenizer=tokenizer)
    asked = {"max_new_tokens": 12, "return_full_text": False, "do_sample": False}
    [expected] = pipe("the cat", **asked)
    [result] = pipe("the cat", **asked, custom_generate=hf.generate, drafter=DRAFTER, policy="phase3")
    assert result == expected
    assert result["generated_text"]
