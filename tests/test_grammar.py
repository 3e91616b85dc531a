"""Texts that follow a grammar: what is generated is what a plain loop with the same rules would choose."""

from __future__ import annotations

import functools
import itertools
import json
import sys
from typing import Any

import pytest
import regex
import torch
from command import byte_level_tokenizer, for_transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dynatree_core import Engine, Grammar, Session, generate, generate_batch, run
from dynatree_core.errors import GrammarError
from dynatree_core.request.grammar import GrammarProcessor, _fault_ahead
from dynatree_core.text.stream import decode_text

pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'dynatree[grammar]'")

VOCAB, END = 260, 256  # bytes, an end token, and rows of the head that no token has
PROMPT = [72, 101, 108, 108, 111]
POLICIES = ("autoregressive", "fixed(depth=3,branch=2,tau=0.0)", "phase3")
PATTERNS = (
    r"[a-f]{3,9}(-[0-9]{2})*",
    r"(yes|no|maybe)",
    r"(ä)?b*c+[x-z]{0,4}",
    r"[0-9]{1,3}(\.[0-9]{1,3}){3}",
)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["tree", "chain"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}


@functools.cache
def target(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=800, eos_token_id=END, bos_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


@functools.cache
def tokenizer() -> Any:
    return for_transformers(byte_level_tokenizer(), eos_token="<end>")


@functools.cache
def words() -> list[bytes]:
    """The bytes of each token but the end token."""
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    return [bytes(byte_of[char] for char in tokenizer().convert_ids_to_tokens(place)) for place in range(256)]


def plain_loop(pattern: str, length: int, *, seed: int = 0) -> list[int]:
    """One pass a token; what may follow is asked of the package regex, byte by byte."""
    rules = regex.compile(pattern.encode())
    said: list[int] = []
    while len(said) < length and said[-1:] != [END]:
        scores = target(seed)(torch.tensor([[*PROMPT, *said]])).logits[0, -1].float()
        text = b"".join(words()[token] for token in said)
        allowed = [token for token in range(256) if rules.fullmatch(text + words()[token], partial=True)]
        if rules.fullmatch(text):
            allowed.append(END)
        said.append(max(allowed, key=lambda token: scores[token].item()))
    return said


TOO_LARGE = {"type": "object", "properties": {str(number): {"type": "integer"} for number in range(3000)}}


class OfWords:
    """No tokenizer of those that llguidance reads."""

    def __len__(self) -> int:
        return VOCAB


def asked(grammar: Grammar, **options: Any) -> dict[str, Any]:
    return {"grammar": grammar, "tokenizer": tokenizer(), "max_new_tokens": 40, **options}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_regex_gives_what_a_plain_loop_chooses(pattern, policy):
    result = generate(target(), target(), PROMPT, policy=policy, **asked(Grammar.regex(pattern)))
    assert result.token_ids == plain_loop(pattern, 40)
    assert result.stop_reason in ("eos", "length")
    if result.stop_reason == "eos":
        assert regex.fullmatch(pattern, decode_text(tokenizer(), result.token_ids))


@pytest.mark.parametrize("seed", range(3))
def test_a_schema_gives_json_that_fulfils_it_and_the_same_with_trees_and_without(seed):
    grammar = Grammar.json_schema(SCHEMA)
    plain = generate(target(seed), None, PROMPT, policy="autoregressive", **asked(grammar, max_new_tokens=600))
    read = json.loads(decode_text(tokenizer(), plain.token_ids))
    assert plain.stop_reason == "eos"
    assert set(read) == {"name", "kind", "sizes"}
    assert isinstance(read["name"], str)
    assert read["kind"] in ("tree", "chain")
    assert all(size in range(10) for size in read["sizes"])
    for policy in POLICIES[1:]:
        trees = generate(target(seed), "prompt_lookup", PROMPT, policy=policy, **asked(grammar, max_new_tokens=600))
        assert trees.token_ids == plain.token_ids


def test_generate_of_transformers_with_the_same_processor_says_the_same():
    for grammar in (Grammar.json_schema(SCHEMA), Grammar.regex(PATTERNS[0])):
        rules = GrammarProcessor(
            grammar, tokenizer(), num_prompt=len(PROMPT), vocab=VOCAB, eos_token_ids=frozenset({END})
        )
        theirs = target().generate(
            torch.tensor([PROMPT]), do_sample=False, max_new_tokens=40, logits_processor=[rules], pad_token_id=0
        )
        ours = generate(target(), target(), PROMPT, policy="fixed", **asked(grammar))
        assert ours.token_ids == theirs[0, len(PROMPT) :].tolist()


def test_sampled_texts_follow_it_and_are_the_same_with_trees_and_without():
    for seed in range(4):
        options = asked(Grammar.regex(PATTERNS[3]), do_sample=True, seed=seed, temperature=1.5)
        plain, trees = (generate(target(), target(), PROMPT, policy=policy, **options) for policy in POLICIES[:2])
        assert trees.token_ids == plain.token_ids
        assert regex.fullmatch(PATTERNS[3], decode_text(tokenizer(), plain.token_ids))


def test_each_of_a_batch_has_its_own():
    each = [{"grammar": Grammar.regex(pattern)} for pattern in PATTERNS] + [{}]
    results = generate_batch(
        target(), target(), [PROMPT] * 5, each=each, policy="fixed", tokenizer=tokenizer(), max_new_tokens=40,
        max_sequences=3,
    )  # fmt: skip
    assert [result.token_ids for result in results[:4]] == [plain_loop(pattern, 40) for pattern in PATTERNS]
    assert results[4].token_ids == generate(target(), None, PROMPT, max_new_tokens=40).token_ids


def test_a_session_that_was_broken_off_goes_on_with_the_same_text():
    expected = plain_loop(PATTERNS[0], 40)
    for place in range(6):
        session = Session(target(), target(), PROMPT, policy="fixed", **asked(Grammar.regex(PATTERNS[0])))
        rules = next(one for one in session.logits_processors if isinstance(one, GrammarProcessor))
        steps = run(session)
        for taken, _ in enumerate(steps):
            if taken == place:
                rules._num_read = None  # as a break inside a call leaves it
                steps.close()
        for _ in run(session):
            pass
        assert session.result().token_ids == expected


def test_log_probabilities_are_those_before_the_grammar():
    result = generate(target(), target(), PROMPT, policy="fixed", **asked(Grammar.regex("(yes|no)"), logprobs=1))
    first = target()(torch.tensor([PROMPT])).logits[0, -1].float().log_softmax(-1)
    assert result.logprobs[0].logprob == pytest.approx(first[result.token_ids[0]].item(), abs=1e-5)
    assert result.logprobs[0].top[0][0] == first.argmax().item() != result.token_ids[0]


def test_one_of_several_end_tokens_may_end_it():
    result = generate(
        target(), None, PROMPT, **asked(Grammar.regex("(yes|no)"), eos_token_id=[END, 257], logit_bias={257: 80.0})
    )
    assert result.token_ids[-1] == 257
    assert decode_text(tokenizer(), result.token_ids[:-1]) in ("yes", "no")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grammar": Grammar.regex("(unclosed")}, "does not take this regex"),
        ({"grammar": Grammar.json_schema({"type": "objec"})}, "does not take this json_schema"),
        ({"grammar": Grammar.regex("(a{1000}){1000}")}, "does not take this regex: lexer error"),
        ({"grammar": Grammar.json_schema(TOO_LARGE)}, "does not take this json_schema: Parser Error"),
        ({"grammar": "(yes|no)"}, "must be a Grammar"),
        ({"tokenizer": None}, "needs the target's tokenizer"),
        ({"eos_token_id": []}, "needs an end token"),
        ({"tokenizer": OfWords()}, "tokenizer that llguidance can read"),
        ({"eos_token_id": 258}, "needs an end token that the tokenizer knows"),
    ],
    ids=lambda given: given if isinstance(given, str) else ", ".join(given),
)
def test_what_cannot_be_used_is_refused_before_anything_runs(options, message):
    with pytest.raises(GrammarError, match=message):
        generate(target(), None, PROMPT, **{**asked(Grammar.regex("(yes|no)")), **options})


@pytest.mark.parametrize("schema", ["[1]", "{", 3, {"a": {1, 2}}], ids=str)
def test_what_is_no_schema_is_refused(schema):
    with pytest.raises(GrammarError, match="a JSON schema must be"):
        Grammar.json_schema(schema)


def test_what_becomes_too_large_on_the_way_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr("dynatree_core.request.grammar.PROBED_TOKENS", 0)
    with pytest.raises(GrammarError, match="can go on with, but: lexer error") as ended:
        generate(target(), None, PROMPT, **asked(Grammar.regex("(a{1000}){1000}")))
    assert "state" not in str(ended.value)
    assert ended.value.partial.token_ids == tokenizer()("a").input_ids


def test_a_schema_that_is_nested_too_deeply_is_refused():
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(GrammarError, match="must not be nested so deeply"):
        Grammar.json_schema(schema)


def test_a_grammar_that_begins_with_what_no_token_writes_is_refused():
    class Mute:  # llguidance's matcher, of a vocabulary without the letters that the grammar asks for
        def deep_copy(self) -> Mute:
            return self

        def compute_logit_bias(self) -> bytes:
            return bytes(4)

        def is_error(self) -> bool:
            return False

        is_stopped = is_error

    assert "no token of the vocabulary" in _fault_ahead(Mute())


def test_where_nothing_may_follow_it_is_an_error_and_no_other_text():
    forbidden = [words().index(b"y"), words().index(b"n")]
    with pytest.raises(GrammarError, match="a token must be left"):
        generate(target(), None, PROMPT, **asked(Grammar.regex("(yes|no)"), suppress_tokens=forbidden))


def test_without_llguidance_it_is_refused_with_the_extras_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarError, match=r"dynatree\[grammar\]"):
        generate(target(), None, PROMPT, **asked(Grammar.regex("(yes|no)")))


def test_who_is_put_back_when_memory_is_short_goes_on_with_the_same_text():
    engine = Engine(target(), target(), tokenizer=tokenizer(), max_sequences=2)
    handles = [
        engine.submit(PROMPT, policy="fixed", max_new_tokens=40, grammar=Grammar.regex(PATTERNS[0])) for _ in range(2)
    ]
    for step in itertools.count():
        if all(handle.is_done for handle in handles):
            break
        if step in (1, 3) and engine.load.num_running > 1:
            engine._scheduler._put_back()
        engine.step()
    assert engine.load.num_preempted > 0
    assert [handle.result().token_ids for handle in handles] == [plain_loop(PATTERNS[0], 40)] * 2
