"""Workloads: where prompts come from, and what is said where they cannot."""

from __future__ import annotations

import io
import json
import socket

import datasets
import pytest
from command import TEMPLATE, byte_level_tokenizer, for_transformers, save_model

from dynatree_bench.data.prompts import BUILT_IN
from dynatree_bench.data.turns import played
from dynatree_bench.data.workloads import (
    KNOWN,
    MAX_ROWS,
    Picks,
    Prompt,
    Workload,
    digest,
    encode,
    load_workload,
    local_variable,
    random_prompts,
    some_of,
)
from dynatree_core import InputError, LoadedModel, load_model
from dynatree_core.testing.models import greedy, tiny_model
from dynatree_core.text.prompt_files import PASSAGE_CHARS


def ids(workload):
    return [prompt.prompt_id for prompt in workload.prompts]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "mine.jsonl"
    records = [{"id": f"{kind}{i}", "category": kind, "prompt": f"{kind} {i}"} for kind in "ab" for i in range(3)]
    path.write_text("\n".join(map(json.dumps, [*records, {"prompt": "alone"}])) + "\n\n")
    return path


def target(**options):
    tokenizer = for_transformers(byte_level_tokenizer(), **options)
    return LoadedModel(tiny_model("llama"), tokenizer, "tiny")


def test_built_in_prompts_take_the_kinds_in_turn():
    workload = load_workload("built-in", 4)
    assert ids(workload) == ["prose-0", "code-0", "copying-0", "prose-1"]
    assert workload.is_chat
    assert [prompt.text for prompt in load_workload("built-in:code").prompts] == BUILT_IN["code"]


def test_built_in_text_is_one_text_from_different_places_on():
    first, second = load_workload("built-in:text", 2).prompts
    assert first.text != second.text
    assert sorted(first.text) == sorted(second.text)
    assert not load_workload("built-in:text", 2).is_chat


def test_a_jsonl_file_with_and_without_ids_and_categories(jsonl):
    workload = load_workload(str(jsonl))
    assert (workload.name, workload.is_chat) == ("mine", True)
    assert ids(workload) == ["a0", "b0", "mine-0006", "a1", "b1", "a2", "b2"]
    assert workload.prompts[2] == Prompt("mine-0006", "mine", "alone")
    assert ids(load_workload(str(jsonl), 2)) == ["a0", "b0"]


def test_plain_text_is_cut_into_passages_all_over_it(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Chapter {i}. " + "word " * 420 for i in range(40)))
    every = load_workload(str(path))
    assert all(PASSAGE_CHARS <= len(prompt.text) <= 2 * PASSAGE_CHARS for prompt in every.prompts)
    assert all(prompt.text.startswith("Chapter") for prompt in every.prompts)
    assert not every.is_chat
    some = load_workload(str(path), 4).prompts
    assert [prompt.text for prompt in some] == [every.prompts[i].text for i in (0, 10, 20, 30)]


def test_a_folder_of_text_files(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(name * 100)
    assert [prompt.text[:3] for prompt in load_workload(str(tmp_path)).prompts] == ["one", "two"]


def test_a_known_benchmark_from_a_local_file(jsonl, monkeypatch):
    by_option = load_workload(f"gsm8k={jsonl}", 2)
    monkeypatch.setenv(local_variable("gsm8k"), str(jsonl))
    assert load_workload("gsm8k", 2) == by_option
    assert by_option.name == "gsm8k"
    assert by_option.is_chat
    assert not load_workload(f"wikitext-2={jsonl}").is_chat


def test_a_file_by_a_name_of_one_s_own(jsonl, tmp_path):
    workload = load_workload(f"other={jsonl}", 3)
    assert (workload.name, ids(workload)) == ("other", ["a0", "b0", "other-0006"])
    path = tmp_path / "x=y.jsonl"  # a file may be called so
    path.write_text(jsonl.read_text())
    assert load_workload(str(path)).name == "x=y"
    with pytest.raises(InputError, match="must be a file that can be read"):
        load_workload(f"other={tmp_path / 'missing.jsonl'}")


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_offline_it_says_which_line_to_run(name, monkeypatch):
    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach it\non the Hub")

    monkeypatch.delenv(local_variable(name), raising=False)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(InputError, match="Couldn't reach it on the Hub") as caught:
        load_workload(name)
    assert f"--workload {name}=FILE or {local_variable(name)}=FILE" in str(caught.value)


def test_the_hub_really_offline():
    """The environment of all tests forbids the hub: datasets says so in a way of its own."""
    with pytest.raises(InputError, match=r"cannot be read.*--workload FILE"):
        load_workload("owner/not-there:main:test:question")


def test_hub_data_sets_are_streamed_and_their_columns_read(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return [{"question": f"q{i}", "text": "line\n" * 500, "turns": [f"first {i}", "second"]} for i in range(5)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for known in ("gsm8k", "wikitext-2"):
        monkeypatch.delenv(local_variable(known), raising=False)
    questions = load_workload("gsm8k", 2)
    assert [prompt.text for prompt in questions.prompts] == ["q0", "q1"]
    assert asked[-1] == (("openai/gsm8k",), {"split": "test", "streaming": True, "name": "main"})
    whole = load_workload("wikitext-2")
    assert len(whole.prompts) == 6
    assert not whole.is_chat
    own = load_workload("owner/name:config:train:question")
    assert own.prompts[0].text == "q0"
    assert asked[-1] == (("owner/name",), {"split": "train", "streaming": True, "name": "config"})
    assert load_workload("owner/name").prompts[0].text == "first 0", "the first column that is known"
    with pytest.raises(InputError, match="must have the column 'answer', got the columns question, text, turns"):
        load_workload("owner/name:config:train:answer")


def test_rows_of_the_hub_keep_their_categories(monkeypatch):
    rows = [{"turns": [f"first {i}", "second"], "category": kind} for i, kind in enumerate(["qa", "qa", "rag", None])]
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: rows)
    name = "owner/name::train:turns"
    assert load_workload(name, 3).prompts == (
        Prompt(f"{name}-0000", "qa", "first 0", later=("second",)),
        Prompt(f"{name}-0002", "rag", "first 2", later=("second",)),
        Prompt(f"{name}-0003", name, "first 3", later=("second",)),  # it has none
    )
    assert [one.text for one in load_workload(name, picks=Picks(categories=("rag",))).prompts] == ["first 2"]


def test_rows_that_are_not_read_are_counted(monkeypatch):
    rows = [{"prompt": f"p{i}" if i else " "} for i in range(MAX_ROWS + 1)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: rows)
    found = load_workload("owner/name")
    assert len(found.prompts) == MAX_ROWS - 1
    assert found.notes == (
        "owner/name: 1 of 5,000 rows are left out, which are blank",
        "'owner/name': the first 5,000 rows are read, and no more",
    )


def test_spec_bench_is_fetched_without_datasets(tmp_path, monkeypatch):
    """It is a file at an address, which datasets would need one package more for."""
    rows = [{"question_id": 81 + i, "category": "writing", "turns": ["First?", "Then?"]} for i in range(2)]
    monkeypatch.delenv(local_variable("spec-bench"), raising=False)
    fetched = []

    def urlopen(address, timeout):
        fetched.append(address)
        return io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode())

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: pytest.fail("datasets was asked"))
    assert ids(load_workload("spec-bench")) == ["spec-bench-81", "spec-bench-82"]
    assert fetched == [KNOWN["spec-bench"].files]
    assert ids(load_workload("mine=http://example.invalid/question.jsonl", 1)) == ["mine-81"]


def test_what_is_no_workload(tmp_path):
    for spec in ("wikitext2", "./not-there.jsonl", "nonsense"):
        with pytest.raises(InputError, match="a workload must be"):
            load_workload(spec)
    with pytest.raises(InputError, match=r"did you mean 'wikitext-2'"):
        load_workload("wikitext2")
    with pytest.raises(InputError, match="kind prose, code, copying or text, got 'poems'"):
        load_workload("built-in:poems")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    with pytest.raises(InputError, match="at least one prompt"):
        load_workload(str(empty))
    empty.write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="UTF-8"):
        load_workload(str(empty))


def test_faults_of_a_jsonl_file(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "x"}\n{"text": "y"}\n')
    with pytest.raises(InputError, match='line 2: must have a "prompt" as the other rows'):
        load_workload(str(path))
    path.write_text('{"prompt": "x", "id": 1}\n{"prompt": "y", "id": 1}\n')
    with pytest.raises(InputError, match="'1' 2 times"):
        load_workload(str(path))
    with pytest.raises(InputError, match="must be a file that can be read"):
        load_workload(f"pg19={tmp_path / 'missing.jsonl'}")


def test_encoding_uses_the_template_for_requests_only():
    requests = Workload("w", (Prompt("p", "c", "hello"),), is_chat=True)
    plain, chat = target(), target(chat_template=TEMPLATE)
    text = plain.tokenizer("hello").input_ids
    assert encode(requests, plain)[0].token_ids == tuple(text)
    wrapped = encode(requests, chat)[0].token_ids
    assert chat.tokenizer.decode(wrapped) == "<user>hello<assistant>"
    assert encode(requests, chat, is_chat=False)[0].token_ids == tuple(text)
    story = Workload("w", requests.prompts, is_chat=False)
    assert encode(story, chat)[0].token_ids == tuple(text)
    assert encode(story, chat, is_chat=True)[0].token_ids == wrapped
    with pytest.raises(InputError, match="--chat needs"):
        encode(requests, plain, is_chat=True)
    with pytest.raises(InputError, match="tokenizer"):
        encode(requests, LoadedModel(tiny_model("llama"), None, "tiny"))


def test_cut_prompts_leave_out_what_is_too_short():
    workload = Workload("w", (Prompt("long", "c", "abcdefgh"), Prompt("short", "c", "abc")), is_chat=True)
    chat = target(chat_template=TEMPLATE)
    [cut] = encode(workload, chat, num_tokens=5)
    assert (cut.prompt_id, chat.tokenizer.decode(cut.token_ids)) == ("long", "abcde")
    with pytest.raises(InputError, match="the longest of 'w' has 8"):
        encode(workload, chat, num_tokens=9)


def test_some_of_the_prompts_are_spread_over_a_text_and_else_the_categories_in_turn():
    prompts = [Prompt(str(i), "ab"[i >= 6], "x") for i in range(8)]
    assert [prompt.prompt_id for prompt in some_of(prompts, 4, is_text=True)] == ["0", "2", "4", "6"]
    assert [prompt.prompt_id for prompt in some_of(prompts, 3, is_text=False)] == ["0", "6", "1"]
    assert some_of(prompts, 9, is_text=True) == tuple(prompts)


def test_random_prompts_follow_from_their_seed():
    first = random_prompts("random:1", 3, 10, 37)
    assert first == random_prompts("random:1", 3, 10, 37)
    assert digest(first) != digest(random_prompts("random:2", 3, 10, 37))
    assert digest(first) != digest(first[:2])
    assert all(0 <= token < 37 for prompt in first for token in prompt.token_ids)
    with pytest.raises(InputError, match="random:SEED"):
        random_prompts("random:x", 1, None, 37)


def test_conversations_are_played_with_the_targets_own_answers(tmp_path):
    path = tmp_path / "question.jsonl"
    path.write_text('{"id": "q", "turns": ["hello", "more"]}\n{"id": "r", "turns": ["alone"]}\n')
    tokenizer = for_transformers(byte_level_tokenizer(), chat_template=TEMPLATE)
    chat = load_model(str(save_model(tmp_path / "model", tokenizer)), device="cpu")
    workload = load_workload(str(path), picks=Picks(is_played=True))
    found = played(workload, chat, 5)
    assert [prompt.prompt_id for prompt in found] == ["q", "q/turn-2", "r"]
    first, second = (list(prompt.token_ids) for prompt in found[:2])
    assert found[0] == encode(workload, chat)[0]
    answer = chat.tokenizer.decode(greedy(chat.model, first, 5))
    assert chat.tokenizer.decode(second) == f"<user>hello<assistant>{answer}<user>more<assistant>"


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    """One refused connection decides: datasets would try for half a minute."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.delenv(local_variable("gsm8k"), raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: pytest.fail("datasets was asked"))
    for name in ("gsm8k", "owner/not-there:main:test:question"):
        with pytest.raises(InputError, match=rf"cannot be read \({endpoint} cannot be reached.*FILE"):
            load_workload(name)
