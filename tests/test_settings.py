"""Settings of generate() inside the tree: processors, stopping, padded prompts and positions change both alike."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import (
    BatchEncoding,
    EosTokenCriteria,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteria,
)

from dynatree_core import Session, build_stack, generate, hf, run
from dynatree_core.errors import ContextLimitError, NonFiniteLogitsError, ParameterError, PromptError
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import CONTEXT, VOCAB, greedy, perturbed, tiny_model
from dynatree_policies.fixed import Fixed

TARGET, DRAFTER, PROMPT = tiny_model("llama"), perturbed("llama"), [1, 2, 3]


class Grudge(LogitsProcessor):
    """A user's processor with a memory: whatever it saw chosen most recently, it forbids three calls later."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append(input_ids[0].tolist())
        if len(self.calls) > 3:
            scores[0, self.calls[-3][-1]] = -torch.inf
        return scores


class Countdown(StoppingCriteria):
    """A user's criterion with a memory: done when it was asked so many times."""

    def __init__(self, calls):
        self.calls_left, self.texts = calls, []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls_left -= 1
        self.texts.append(input_ids[0].tolist())
        return torch.full((1,), self.calls_left <= 0)


@given(data=st.data())
def test_processors_see_each_node_with_its_own_path(data):
    family, seed = data.draw(ours.families), data.draw(ours.model_seeds)
    target, prompt = tiny_model(family, seed), data.draw(ours.prompts)
    asked = data.draw(ours.processor_settings)
    length = data.draw(st.integers(1, 24))
    eos = data.draw(st.lists(ours.token_ids, max_size=3))
    expected = greedy(target, prompt, length, eos, **asked)
    drafter, stack = data.draw(ours.drafters(family, seed)), data.draw(ours.stacks())
    result = generate(target, drafter, prompt, policy=stack, max_new_tokens=length, eos_token_id=eos, **asked)
    assert result.token_ids == expected


@settings(max_examples=30)
@given(data=st.data())
def test_a_users_own_processor_is_called_as_by_generate(data):
    """Once for each emitted token, in order, with the text up to there: even a processor with a memory is exact."""
    prompt, length = data.draw(ours.prompts), data.draw(st.integers(1, 24))
    eos = data.draw(st.lists(ours.token_ids, max_size=2))
    theirs, mine = Grudge(), Grudge()
    expected = greedy(TARGET, prompt, length, eos, logits_processor=[theirs], repetition_penalty=1.2)
    drafter = data.draw(ours.drafters("llama", 0))
    result = generate(
        TARGET, drafter, prompt, policy=data.draw(ours.stacks()), max_new_tokens=length, eos_token_id=eos,
        logits_processor=[mine], repetition_penalty=1.2,
    )  # fmt: skip
    assert result.token_ids == expected
    assert mine.calls == theirs.calls


def test_trees_are_worth_something_under_a_processor():
    result = generate(TARGET, TARGET, PROMPT, policy="fixed(tau=0.0)", max_new_tokens=30, suppress_tokens=[5])
    assert result.token_ids == greedy(TARGET, PROMPT, 30, suppress_tokens=[5])
    assert result.report.tokens_per_iteration > 2


def test_a_users_processor_replaces_the_settings_own():
    stronger = RepetitionPenaltyLogitsProcessor(4.0)
    expected = greedy(TARGET, PROMPT, 20, logits_processor=[stronger], repetition_penalty=1.1)
    result = generate(TARGET, DRAFTER, PROMPT, max_new_tokens=20, logits_processor=[stronger], repetition_penalty=1.1)
    assert result.token_ids == expected != greedy(TARGET, PROMPT, 20, repetition_penalty=1.1)


def test_settings_come_from_the_call_then_a_given_configuration_then_the_targets():
    plain, tame, strict = (greedy(TARGET, PROMPT, 20, repetition_penalty=penalty) for penalty in (1.0, 1.3, 4.0))
    assert len({tuple(plain), tuple(tame), tuple(strict)}) == 3
    config = GenerationConfig(repetition_penalty=4.0)
    TARGET.generation_config.repetition_penalty = 1.3
    try:
        assert generate(TARGET, DRAFTER, PROMPT, max_new_tokens=20).token_ids == tame
        assert generate(TARGET, DRAFTER, PROMPT, max_new_tokens=20, repetition_penalty=1.0).token_ids == plain
        assert generate(TARGET, DRAFTER, PROMPT, max_new_tokens=20, generation_config=config).token_ids == strict
    finally:
        TARGET.generation_config.repetition_penalty = None


@given(data=st.data())
def test_stopping_anywhere_in_a_path(data):
    """Several end tokens, and a criterion that counts: never a token more or less, and asked once for each."""
    prompt, length = data.draw(ours.prompts), data.draw(st.integers(1, 24))
    eos, calls = data.draw(st.lists(ours.token_ids, max_size=3)), data.draw(st.integers(1, 26))
    theirs, mine = Countdown(calls), Countdown(calls)
    expected = greedy(TARGET, prompt, length, eos, stopping_criteria=[theirs])
    result = generate(
        TARGET, data.draw(ours.drafters("llama", 0)), prompt, policy=data.draw(ours.stacks()), max_new_tokens=length,
        eos_token_id=eos, stopping_criteria=[mine],
    )  # fmt: skip
    assert result.token_ids == expected
    assert mine.texts == theirs.texts
    ends = expected[-1] in eos
    assert result.stop_reason == ("eos" if ends else "length" if len(expected) == length else "criterion")


LETTERS = [*"abcdefghij", "ab", "bc", "cd", "abc", "ba", "ca", " ", " a", "b ", "cab", *"klmnopqrstuvwxyz."]


@pytest.fixture(scope="module")
def tokenizer():
    """A token for each of the tiny vocabulary's ids, some of them longer than a letter."""
    assert len(LETTERS) == VOCAB
    inner = Tokenizer(models.BPE({text: i for i, text in enumerate(LETTERS)}, merges=[]))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@settings(max_examples=40)
@given(data=st.data())
def test_stop_strings_across_token_borders(data, tokenizer):
    seed = data.draw(ours.model_seeds)
    target, prompt = tiny_model("gpt2", seed), data.draw(ours.prompts)
    text = "".join(LETTERS[token] for token in greedy(target, prompt, 24))
    start = data.draw(st.integers(0, len(text) - 2))
    stops = [
        text[start : start + data.draw(st.integers(1, 4))],
        *data.draw(st.lists(st.sampled_from(LETTERS), max_size=2)),
    ]
    expected = greedy(target, prompt, 24, stop_strings=stops, tokenizer=tokenizer)
    drafter, stack = data.draw(ours.drafters("gpt2", seed)), data.draw(ours.stacks())
    result = generate(target, drafter, prompt, policy=stack, max_new_tokens=24, stop_strings=stops, tokenizer=tokenizer)
    assert result.token_ids == expected
    assert result.stop_reason == ("length" if len(expected) == 24 else "stop_string")


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ParameterError, match="stop_strings need the target's tokenizer"):
        generate(TARGET, DRAFTER, PROMPT, stop_strings=["a"])


def test_max_time():
    result = generate(TARGET, DRAFTER, PROMPT, max_new_tokens=100, max_time=0.0)
    assert (len(result.token_ids), result.stop_reason) == (1, "time")  # as by generate(): asked after the first token
    assert len(greedy(TARGET, PROMPT, 100, max_time=0.0)) == 1
    assert generate(TARGET, DRAFTER, PROMPT, max_new_tokens=10, max_time=1e6).stop_reason == "length"
    with pytest.raises(ParameterError, match="max_time must be a number of seconds"):
        generate(TARGET, DRAFTER, PROMPT, max_time="soon")


def test_max_time_counts_from_the_start(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("transformers.generation.stopping_criteria.time", SimpleNamespace(time=lambda: now[0]))
    session = Session(TARGET, DRAFTER, PROMPT, policy="fixed", max_new_tokens=100, max_time=0.2)
    for _ in run(session):
        now[0] += 0.25
    assert session.stop_reason == "time"
    assert session.num_iterations == 2


@pytest.mark.parametrize("max_length", [3, 4, 20])
def test_max_length_counts_the_prompt(max_length):
    result = generate(TARGET, DRAFTER, PROMPT, max_length=max_length)
    assert result.token_ids == greedy(TARGET, PROMPT, max_length - 3)
    assert result.stop_reason == "length"


def test_max_length_errors():
    with pytest.raises(ParameterError, match="it must be at least 3, got 2; raise it"):
        generate(TARGET, DRAFTER, PROMPT, max_length=2)
    with pytest.raises(ParameterError, match="give one of them"):
        generate(TARGET, DRAFTER, PROMPT, max_length=20, max_new_tokens=5)


def test_a_session_goes_on_after_a_break_with_processors_and_criteria():
    session = Session(
        TARGET,
        DRAFTER,
        PROMPT,
        policy="phase3",
        max_new_tokens=30,
        repetition_penalty=1.3,
        stopping_criteria=[Countdown(22)],
    )
    while session.stop_reason is None:
        for _ in run(session):
            break
    assert session.result().token_ids == greedy(TARGET, PROMPT, 22, repetition_penalty=1.3)
    assert session.result().stop_reason == "criterion"


def test_nan_under_a_processor():
    class Breaks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores * (torch.nan if input_ids.shape[1] > 7 else 1)

    with pytest.raises(NonFiniteLogitsError) as caught:
        generate(TARGET, DRAFTER, PROMPT, max_new_tokens=20, logits_processor=[Breaks()])
    assert caught.value.partial.token_ids == greedy(TARGET, PROMPT, 20)[: len(caught.value.partial.token_ids)]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"repetition_penalty": -1.0}, "a setting of the generation cannot be used: .*strictly positive"),
        ({"no_repeat_ngram_size": -2}, "a setting of the generation cannot be used"),
        ({"exponential_decay_length_penalty": (3, 1.1)}, "needs an end token"),
        ({"num_beams": 4}, "the option 'num_beams' is not applied here"),
        ({"do_sample": "no"}, "do_sample must be True or False"),
        ({"trust_model": "no"}, "trust_model must be True or False, got 'no'"),
        ({"inherit_settings": 0}, "inherit_settings must be True or False, got 0"),
        ({"top_k": True, "do_sample": True}, "top_k must be an integer, got True"),
        ({"no_repeat_ngram_size": True}, "no_repeat_ngram_size must be an integer, got True"),
        ({"watermarking_config": 5}, "the settings of this generation cannot be used"),
        ({"costs": 5}, "costs must be a CostModel, or None to have them measured, got 5"),
        ({"logits_processor": 3}, "logits_processor must be a list of LogitsProcessor"),
        ({"stopping_criteria": [3]}, "stopping_criteria must be a list of StoppingCriteria"),
        ({"repitition_penalty": 1.2}, "did you mean 'repetition_penalty'"),
        ({"generation_config": {"min_length": 3}}, "must be transformers' GenerationConfig"),
    ],
)
def test_bad_settings(option, message):
    with pytest.raises(ParameterError, match=message):
        generate(TARGET, DRAFTER, PROMPT, **option)


BEYOND = 10**6  # no token of the vocabulary


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"forced_bos_token_id": BEYOND},
            "forced_bos_token_id must be from 0 to 36, the target's vocabulary, got 1000000",
        ),
        ({"forced_bos_token_id": "a"}, "forced_bos_token_id must be a token id or several, integers, got 'a'"),
        ({"forced_eos_token_id": [3, BEYOND]}, "forced_eos_token_id must be from 0 to 36"),
        ({"forced_eos_token_id": True}, "forced_eos_token_id must be a token id or several"),
        ({"bad_words_ids": [[3, BEYOND]]}, "bad_words_ids must be from 0 to 36"),
        ({"sequence_bias": [[[BEYOND], 1.0]]}, "sequence_bias must be from 0 to 36"),
        (
            {"exponential_decay_length_penalty": (0, 1.5), "eos_token_id": [BEYOND]},
            "eos_token_id, which exponential_decay_length_penalty favours, must be from 0 to 36",
        ),
        ({"exponential_decay_length_penalty": (0, "a"), "eos_token_id": 3}, "needs a place and a factor, got 'a'"),
    ],
)
def test_tokens_that_the_vocabulary_lacks_are_refused_where_generate_fails(asked, message):
    with pytest.raises(ParameterError, match=message):
        generate(TARGET, DRAFTER, PROMPT[:1], max_new_tokens=3, **asked)
    with pytest.raises((IndexError, TypeError, ValueError)):
        greedy(TARGET, PROMPT[:1], 3, **asked)


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        (PROMPT[:1], {"suppress_tokens": [BEYOND, -2], "begin_suppress_tokens": [BEYOND]}),
        (PROMPT[:1], {"forced_bos_token_id": [4, 9]}),
        (PROMPT, {"forced_bos_token_id": BEYOND}),
    ],
)
def test_tokens_that_the_vocabulary_lacks_change_nothing_where_generate_goes_on(prompt, asked):
    mine = generate(TARGET, DRAFTER, prompt, max_new_tokens=4, eos_token_id=[], **asked)
    assert mine.token_ids == greedy(TARGET, prompt, 4, **asked)


def test_a_given_configuration_is_filled_up_from_the_targets():
    expected = greedy(TARGET, PROMPT, 20, [9], repetition_penalty=1.7, no_repeat_ngram_size=2)
    own = TARGET.generation_config
    own.repetition_penalty, own.eos_token_id = 1.7, 9
    try:
        given = GenerationConfig(no_repeat_ngram_size=2)
        theirs = TARGET.generate(torch.tensor([PROMPT]), generation_config=given, max_new_tokens=20, pad_token_id=0)
        result = generate(TARGET, DRAFTER, PROMPT, generation_config=given, max_new_tokens=20)
        plain = generate(TARGET, DRAFTER, PROMPT, generation_config=given, max_new_tokens=20, inherit_settings=False)
    finally:
        own.repetition_penalty, own.eos_token_id = None, None
    assert result.token_ids == theirs[0, 3:].tolist() == expected
    assert plain.token_ids == greedy(TARGET, PROMPT, 20, no_repeat_ngram_size=2) != expected


def test_a_processor_takes_the_place_of_one_of_its_class():
    """A bias comes before the repetition penalty, the caller's as well as that of the settings."""
    asked = {"sequence_bias": {(9,): 3.0}, "repetition_penalty": 1.5}
    own = SequenceBiasLogitsProcessor({(8,): 1.0, (11,): 0.7, (20,): 0.9})
    expected = greedy(TARGET, PROMPT, 20, logits_processor=[own], **asked)
    assert expected != greedy(TARGET, PROMPT, 20, **asked)
    found = generate(TARGET, DRAFTER, PROMPT, max_new_tokens=20, logits_processor=[own], **asked)
    assert found.token_ids == expected
    order = [type(one) for one in Session(TARGET, None, PROMPT, logits_processor=[own], **asked).logits_processors]
    assert order == [SequenceBiasLogitsProcessor, RepetitionPenaltyLogitsProcessor]


def test_a_criterion_takes_the_place_of_one_of_its_class():
    text = greedy(TARGET, PROMPT, 20)
    early, late = text[2], next(token for token in text[3:] if token not in text[:3])
    TARGET.generation_config.eos_token_id = early
    try:
        for own in (EosTokenCriteria(late), MaxTimeCriteria(100.0)):
            asked = {"max_time": 0.0, "stopping_criteria": [own], "max_new_tokens": 20}
            prompt = torch.tensor([PROMPT])
            expected = TARGET.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **asked)
            assert generate(TARGET, DRAFTER, PROMPT, **asked).token_ids == expected[0, 3:].tolist()
        found = generate(TARGET, DRAFTER, PROMPT, stopping_criteria=[EosTokenCriteria(late)], max_new_tokens=20)
    finally:
        TARGET.generation_config.eos_token_id = None
    assert found.token_ids == text[: text.index(late) + 1]
    assert found.stop_reason == "criterion"


def test_top_k_is_none_where_the_caller_says_so():
    """And 50 where nobody says anything: of 90 tokens that are about as likely it makes a difference."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    target = LlamaForCausalLM(LlamaConfig(vocab_size=90, **sizes, **ends)).double().eval()
    prompt, texts = torch.tensor([PROMPT]), []
    for asked in (
        {},
        {"top_k": None},
        {"top_k": 0},
        {"generation_config": GenerationConfig(do_sample=True, top_k=None)},
    ):
        arguments = {"max_new_tokens": 30, **({} if "generation_config" in asked else {"do_sample": True}), **asked}
        torch.manual_seed(5)
        expected = target.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)[0, 3:].tolist()
        assert generate(target, target, PROMPT, seed=5, **arguments).token_ids == expected
        texts.append(expected)
    assert texts[0] == texts[3] != texts[1] == texts[2]


def test_padding_is_guessed_where_generate_guesses_it():
    """A tensor without a mask is read as generate() reads it; a list of ids is all text."""
    padded = torch.tensor([[0, 0, 5, 6]])
    own = TARGET.generation_config
    try:
        for eos in (None, 9, 0):
            own.pad_token_id, own.eos_token_id = 0, eos
            expected = TARGET.generate(padded, max_new_tokens=12)[0, 4:].tolist()
            assert generate(TARGET, DRAFTER, padded, max_new_tokens=12).token_ids == expected
            assert generate(TARGET, DRAFTER, {"input_ids": padded}, max_new_tokens=12).token_ids == expected
            text = generate(TARGET, DRAFTER, padded[0].tolist(), max_new_tokens=12).token_ids
            assert (text == expected) == (eos == 0), "the zeros are no padding where they end texts"
        own.eos_token_id = None
        with pytest.raises(PromptError, match="or give attention_mask where a pad token is text"):
            generate(TARGET, DRAFTER, torch.tensor([5, 0, 6]), max_new_tokens=12)
        mask = [1, 1, 1]
        masked = generate(TARGET, DRAFTER, torch.tensor([5, 0, 6]), attention_mask=mask, max_new_tokens=12)
        assert masked.token_ids == greedy(TARGET, [5, 0, 6], 12)
    finally:
        own.pad_token_id, own.eos_token_id = None, None


def test_lengths_of_a_given_configuration():
    for config, length in ((GenerationConfig(max_new_tokens=5), 5), (GenerationConfig(max_length=9), 6)):
        assert len(generate(TARGET, DRAFTER, PROMPT, generation_config=config).token_ids) == length
        assert len(generate(TARGET, DRAFTER, PROMPT, generation_config=config, max_new_tokens=2).token_ids) == 2


def test_a_configuration_may_ask_for_sampling():
    given = GenerationConfig(do_sample=True, temperature=0.7)
    expected = generate(TARGET, None, PROMPT, max_new_tokens=20, do_sample=True, temperature=0.7, seed=4).token_ids
    assert generate(TARGET, DRAFTER, PROMPT, max_new_tokens=20, generation_config=given, seed=4).token_ids == expected


@pytest.mark.parametrize("scores", [torch.inf, -torch.inf])
def test_nothing_to_draw_from(scores):
    class Nothing(LogitsProcessor):
        def __call__(self, input_ids, given):
            return given if input_ids.shape[1] < 8 else torch.full_like(given, scores)

    with pytest.raises(NonFiniteLogitsError, match="nothing finite at the top") as caught:
        generate(TARGET, DRAFTER, PROMPT, max_new_tokens=20, do_sample=True, logits_processor=[Nothing()])
    assert len(caught.value.partial.token_ids) <= 5


def test_exponential_decay():
    asked = {"exponential_decay_length_penalty": (4, 1.5)}
    expected = greedy(TARGET, PROMPT, 30, [7], **asked)
    result = generate(TARGET, DRAFTER, PROMPT, max_new_tokens=30, eos_token_id=7, **asked)
    assert result.token_ids == expected
    assert expected[-1] == 7  # the penalty brought the end about


@settings(max_examples=30)
@given(data=st.data())
def test_padded_prompts(data):
    """Padding at the left is not looked at, but counts where generate() counts it: lengths, and what is repeated."""
    family, seed = data.draw(ours.families), data.draw(ours.model_seeds)
    target, prompt, padding = tiny_model(family, seed), data.draw(ours.prompts), data.draw(st.integers(0, 5))
    padded, mask = [0] * padding + prompt, torch.tensor([[0] * padding + [1] * len(prompt)])
    asked = data.draw(
        st.fixed_dictionaries(
            {}, optional={"no_repeat_ngram_size": st.integers(1, 3), "min_length": st.integers(1, 24)}
        )
    )
    eos = data.draw(st.lists(ours.token_ids, max_size=2))
    expected = greedy(target, padded, 16, eos, attention_mask=mask, **asked)
    drafter = data.draw(ours.drafters(family, seed))
    result = generate(
        target,
        drafter,
        padded,
        attention_mask=mask,
        policy="fixed(tau=0.0)",
        max_new_tokens=16,
        eos_token_id=eos,
        **asked,
    )
    assert result.token_ids == expected
    assert result.report.num_prompt_tokens == len(prompt)


def test_padding_is_not_penalised():
    """As by the generate() of newer versions of transformers: the text is that of the prompt without padding."""
    expected = greedy(TARGET, PROMPT, 20, repetition_penalty=3.0)
    for pad in expected:  # a token that would be chosen, were it not penalised
        padded, mask = [pad, pad, *PROMPT], [0, 0, 1, 1, 1]
        options = {"attention_mask": mask, "max_new_tokens": 20, "repetition_penalty": 3.0}
        assert generate(TARGET, DRAFTER, padded, **options).token_ids == expected


def test_what_a_tokenizer_returns_is_a_prompt():
    encoded = BatchEncoding(
        {"input_ids": torch.tensor([[0, 0, *PROMPT]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    )
    assert generate(TARGET, DRAFTER, encoded, max_new_tokens=12).token_ids == greedy(TARGET, PROMPT, 12)


def test_what_else_stands_in_a_prompts_mapping():
    """Positions hold, what the model would be given is refused, and what it does not take changes nothing."""
    ids, positions = torch.tensor([PROMPT]), torch.tensor([[0, 4, 5]])
    found = generate(TARGET, DRAFTER, {"input_ids": ids, "position_ids": positions}, max_new_tokens=12)
    expected = greedy(TARGET, PROMPT, 12, position_ids=positions)
    assert found.token_ids == expected != greedy(TARGET, PROMPT, 12)
    types = {"input_ids": ids, "token_type_ids": torch.ones_like(ids)}
    assert generate(TARGET, DRAFTER, types, max_new_tokens=12).token_ids == greedy(TARGET, PROMPT, 12)
    with pytest.raises(PromptError, match="may hold input_ids, attention_mask, position_ids, got token_type_ids too"):
        generate(tiny_model("gpt2"), None, types, max_new_tokens=12)


@pytest.mark.parametrize("setting", [{"num_return_sequences": 3, "do_sample": True}, {"token_healing": True}])
def test_settings_that_are_not_applied_are_told(setting):
    with pytest.warns(RuntimeWarning, match=f"asks for {next(iter(setting))}=.*which generate.. would apply"):
        generate(TARGET, DRAFTER, PROMPT, max_new_tokens=4, generation_config=GenerationConfig(**setting))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("positions", [[4, 5, 6, 7], [0, 2, 4, 9], [3, 3, 1, 0]])
def test_position_ids(family, positions):
    """The prompt's tokens stand where the caller says, later ones count on from the last, as by generate()."""
    target, prompt = tiny_model(family), [5, 6, 7, 8]
    expected = greedy(target, prompt, 20, position_ids=torch.tensor([positions]))
    result = generate(target, target, prompt, policy="fixed(tau=0.0)", max_new_tokens=20, position_ids=positions)
    assert result.token_ids == expected
    assert expected != greedy(target, prompt, 20) or positions == [
        4,
        5,
        6,
        7,
    ]  # an offset alone is nothing to rotations


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"attention_mask": [1, 1]}, PromptError, "a value for each of the prompt's 3 tokens"),
        ({"attention_mask": [1, 1, 0]}, PromptError, "padded at its left only.*padding_side"),
        ({"attention_mask": [1, 0, 1]}, PromptError, "padded at its left only"),
        ({"attention_mask": [0, 0, 0]}, PromptError, "needs one token that is none"),
        ({"attention_mask": "abc"}, PromptError, "attention_mask must be numbers"),
        ({"attention_mask": [[1], [1], [1]]}, PromptError, "a value for each"),
        ({"position_ids": "abc"}, PromptError, "position_ids must be numbers"),
        ({"position_ids": [0, 1]}, PromptError, "an integer for each of the prompt's 3 tokens"),
        ({"position_ids": [0.0, 1.0, 2.0]}, PromptError, "an integer for each"),
        ({"position_ids": [-1, 0, 1]}, PromptError, "at least 0, got -1"),
        ({"position_ids": [0, 1, CONTEXT - 5]}, ContextLimitError, "context of 160 tokens, got 156 \\+ 128"),
    ],
)
def test_bad_masks_and_positions(option, error, message):
    with pytest.raises(error, match=message):
        generate(TARGET, DRAFTER, PROMPT, **option)


@pytest.mark.parametrize("number", [np.int64, np.int32, np.uint8, torch.tensor, lambda value: np.array(value)])
def test_numbers_of_numpy_and_torch(number):
    """Lengths, limits and seeds as generate() takes them, and the parameters of policies."""
    expected = greedy(TARGET, PROMPT, 12)
    for asked in ({"max_new_tokens": number(12)}, {"max_length": number(15)}):
        for policy in ("phase3", Fixed(depth=number(3), branch=number(2))):
            result = generate(TARGET, DRAFTER, PROMPT, policy=policy, **asked)
            assert result.token_ids == expected
        inputs = {"input_ids": torch.tensor([PROMPT]), "pad_token_id": 0, **asked}
        assert TARGET.generate(**inputs, custom_generate=hf.generate)[0, 3:].tolist() == expected
    limits = {"max_nodes": number(4), "max_depth": number(2), "max_branch": number(3), "seed": number(7)}
    result = generate(TARGET, DRAFTER, PROMPT, max_new_tokens=12, do_sample=True, tau=np.float32(0.1), **limits)
    plain = {"max_nodes": 4, "max_depth": 2, "max_branch": 3, "seed": 7, "tau": 0.1}
    assert result.token_ids == generate(TARGET, DRAFTER, PROMPT, max_new_tokens=12, do_sample=True, **plain).token_ids
    assert generate(TARGET, None, PROMPT, max_new_tokens=4, max_time=torch.tensor(100.0)).token_ids == expected[:4]
    assert str(build_stack([Fixed(depth=number(3))])) == str(build_stack([Fixed(depth=3)]))


@pytest.mark.parametrize("wrong", [np.float32(3.0), torch.tensor([3]), np.bool_(True), torch.tensor(True), "3", 3.0])
def test_what_is_no_whole_number_is_refused(wrong):
    for name in ("max_new_tokens", "max_length", "max_nodes", "max_depth", "max_branch", "seed"):
        with pytest.raises(ParameterError, match=f"{name} must be an integer"):
            generate(TARGET, None, PROMPT, do_sample=True, **{name: wrong})
    with pytest.raises(ParameterError, match="'depth' must be an integer"):
        Fixed(depth=wrong)
