"""What a target is asked, what is stored of it, and going on after a stop."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import attrs
import pytest
import torch
from character_target import WORDS, Interrupted
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from dynatree_bench.distill import teach as teaching
from dynatree_bench.distill.evaluate import level_costs
from dynatree_bench.distill.prompts import Prompt, ask_prompts, chat_prefix, continue_prompts, read_passages
from dynatree_bench.distill.teach import TeachingPlan, teach
from dynatree_bench.distill.teacher import Shard, read_shard, write
from dynatree_core import load_model
from dynatree_core.cli.prompts import PromptPicks
from dynatree_core.errors import InputError
from dynatree_core.models.student import new_student
from dynatree_core.testing.models import greedy


def test_a_short_context_is_kept_to(character_target, text_file, tmp_path):
    """No text of a target with few positions is longer than they are, and prompts leave half of them to the answer."""
    loaded = load_model(str(character_target))
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 100}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=30)).eval()
    target = attrs.evolve(loaded, model=model)
    plan = about_texts(text_file, num_new=80)
    plan = attrs.evolve(plan, block_len=768, passage_len=20)  # questions of four passages are too long
    taught = teach(target, plan, tmp_path / "teaching", lambda *_: None)
    assert {re.sub(r"^apart-|-\d+$", "", file.stem) for file in taught.to_learn} == {
        "read",
        "asked",
        "continued",
        "own",
    }
    shards = [read_shard(file) for file in (*taught.to_learn, *taught.apart)]
    lengths = [shard.text(index).stop - shard.text(index).start for shard in shards for index in range(shard.num_texts)]
    assert max(lengths) == 100
    student = new_student(model, [0], torch.arange(len(WORDS)))
    assert len(level_costs(student, model, (1, 16), repeats=2)) == 2
    with pytest.raises(InputError, match=r"need half its positions .* got 61 tokens for 50"):
        teach(target, a_plan(openings=("a" * 60,)), tmp_path / "long", lambda *_: None)


def a_plan(**changes) -> TeachingPlan:
    plan = TeachingPlan(
        texts=(), num_text_tokens=0, num_continued=0, num_asked=0, num_self_prompts=40, questions=(),
        openings=("", "a"), num_new=8, seed=0, batch=16,
    )  # fmt: skip
    return attrs.evolve(plan, **changes)


def test_teaching_goes_on_where_it_was_interrupted(character_target, tmp_path, monkeypatch):
    """Batches that are there are not asked again, and those that come later are the same as in one go."""
    target = load_model(str(character_target))
    whole = teach(target, a_plan(), tmp_path / "whole", lambda *_: None)

    def interrupt(done, total, _):
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        teach(target, a_plan(), tmp_path / "parts", interrupt)
    asked = []
    original = teaching._ask
    monkeypatch.setattr(teaching, "_ask", lambda *arguments: asked.append(arguments[-1].name) or original(*arguments))
    parts = teach(target, a_plan(), tmp_path / "parts", lambda *_: None)
    parts, whole = [*parts.to_learn, *parts.apart], [*whole.to_learn, *whole.apart]
    assert len(asked) == len(whole) - 2
    assert [file.name for file in parts] == [file.name for file in whole]
    for one, other in zip(parts, whole, strict=True):
        for field in attrs.fields(Shard):
            assert torch.equal(getattr(read_shard(one), field.name), getattr(read_shard(other), field.name))


def about_texts(*texts: Path, num_new: int = 1, **changes) -> TeachingPlan:
    return a_plan(
        texts=texts, num_text_tokens=40_000, num_continued=160, num_asked=160, questions=("what? {text}",),
        num_new=num_new, passage_len=30, block_len=64, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("form", ["safetensors", "in memory"])
def test_another_model_of_the_same_name_is_another_target(form, character_target, tmp_path):
    """Its answers are not mixed with those of the first, whether its weights or only its settings are others."""
    place = tmp_path / "model"
    shutil.copytree(character_target, place)
    if form == "in memory":  # of no files whose hash could be taken
        (place / "model.safetensors").rename(place / "weights")
        torch.save(load_file(place / "weights"), place / "pytorch_model.bin")

    def taught():
        return teach(load_model(str(place)), a_plan(), tmp_path / "teaching", lambda *_: None)

    first = taught()
    assert taught() == first
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(InputError, match="another request"):
        taught()
    (place / "config.json").write_text(json.dumps(config | {"transformers_version": "5.17"}))
    assert taught() == first
    other = load_model(str(place)).model
    other.lm_head.weight.data[0] += 1
    other.save_pretrained(place)
    (place / "pytorch_model.bin").unlink(missing_ok=True)
    if form == "in memory":
        torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
        (place / "model.safetensors").unlink()
    with pytest.raises(InputError, match="another request"):
        taught()


def test_what_is_kept_apart_is_in_no_batch_to_learn_from(character_target, tmp_path, monkeypatch):
    """No passage is on both sides, though each is read, asked about and gone on with, and some are there twice."""
    names = [f"{{{one}{other}}}" for one in "abcdefgh" for other in "abcdefgh"]
    text = tmp_path / "book.txt"
    lines = [f"{name} sat on a mat. " * 8 + "\n" for name in names]
    text.write_text("".join([*lines, *lines[:32]]))
    asked = {}
    original = teaching._ask

    def spied(target, tokenizer, plan, lesson):
        written = [prompt.token_ids for prompt in lesson.prompts]
        words = "".join(tokenizer.convert_ids_to_tokens([i for ids in (*lesson.blocks, *written) for i in ids]))
        asked[lesson.name] = set(re.findall(r"\{\w\w\}", words)) & set(names)
        return original(target, tokenizer, plan, lesson)

    monkeypatch.setattr(teaching, "_ask", spied)
    target, plan = load_model(str(character_target)), about_texts(text, batch=8)
    taught = teach(target, plan, tmp_path / "all", lambda *_: None)
    sides = [[file.stem for file in files] for files in (taught.to_learn, taught.apart)]
    learnt, apart = [set().union(*(asked[name] for name in side)) for side in sides]
    assert not learnt & apart
    assert [len(learnt), len(apart)] == [60, 4]
    kinds = [{re.sub(r"^apart-|-\d+$", "", name) for name in side} for side in sides]
    assert kinds[0] == kinds[1] == {"read", "asked", "asked-long", "continued", "own"}
    first = teach(target, plan, tmp_path / "two", lambda *_: None, num_batches=2)
    assert (len(first.to_learn), len(first.apart)) == (1, 1)


def test_questions_of_its_own_are_kept_apart_whatever_their_opening():
    questions = [(row % 16, row % 160) for row in range(320)]  # openings in turn, and each question twice
    lessons = teaching._lessons(None, a_plan(), questions)
    asked = [(lesson.is_apart, prompt.token_ids) for lesson in lessons for prompt in lesson.prompts]
    apart, learnt = ({ids for is_apart, ids in asked if is_apart == side} for side in (True, False))
    assert not learnt & apart
    assert [len(asked), len(learnt), len(apart)] == [320, 150, 10]
    assert len({opening for opening, _ in apart}) > 3


def test_texts_are_known_by_what_they_say(character_target, text_file, tmp_path):
    """A text that was moved is the same; one that was changed is not, nor is a folder of another version."""
    target, folder = load_model(str(character_target)), tmp_path / "teaching"
    before = teach(target, about_texts(text_file), folder, lambda *_: None, num_batches=2)
    moved = text_file.rename(tmp_path / "moved.txt")
    assert teach(target, about_texts(moved), folder, lambda *_: None, num_batches=2) == before
    words = moved.read_text()
    moved.write_text(words.replace("cat", "dog"))
    with pytest.raises(InputError, match="another request"):
        teach(target, about_texts(moved), folder, lambda *_: None, num_batches=2)
    with pytest.raises(InputError, match="must be a file that can be read"):
        teach(target, about_texts(text_file), folder, lambda *_: None, num_batches=2)
    moved.write_text(words)
    request = folder / "request.json"
    old = json.loads(request.read_text())
    del old["apart_every"]
    request.write_text(json.dumps(old, indent=1))
    with pytest.raises(InputError, match=r"another version .*delete the folder"):
        teach(target, about_texts(moved), folder, lambda *_: None, num_batches=2)


def test_what_the_target_writes_is_its_own_output(character_target):
    """Greedy texts equal generate()'s, and every stored distribution is that of a plain pass over the text."""
    target = load_model(str(character_target), dtype="float64").model
    prompts = [Prompt((31, 0, 1, 2), 0.0), Prompt((5,), 0.0), Prompt((31, 7, 8, 9, 10, 11, 12), 0.9)]
    shard = write(target, prompts, num_new=10, end_ids=[30], pad_id=29, seed=1)
    for index, prompt in enumerate(prompts):
        span = shard.text(index)
        text = shard.token_ids[span].tolist()
        assert text[: len(prompt.token_ids)] == list(prompt.token_ids)
        new = text[len(prompt.token_ids) :]
        if prompt.temperature == 0:
            assert new == greedy(target, list(prompt.token_ids), 10, eos=[30])[: len(new)]
        asked = shard.is_scored[span]
        assert asked.nonzero().flatten().tolist() == list(range(len(prompt.token_ids) - 1, len(text) - 1))
        with torch.inference_mode():
            logprobs = target(torch.tensor([text])).logits[0].log_softmax(-1)
        top = logprobs.topk(shard.top_ids.shape[1])
        assert torch.equal(shard.top_ids[span][asked].long(), top.indices[asked])
        torch.testing.assert_close(shard.top_logprobs[span][asked].double(), top.values[asked], atol=1e-2, rtol=1e-3)


def test_a_book_of_one_line_is_many_passages(tmp_path):
    file = tmp_path / "book.gz"
    file.write_bytes(gzip.compress(("word " * 20_000).encode("utf-8-sig")))
    passages = read_passages([file], 1800)
    assert len(passages) == 56
    assert " ".join(passages).split() == ["word"] * 20_000


def test_prompts_of_ones_own_are_answered(character_target, tmp_path):
    """Each is in a batch, through the chat template, and some are kept apart."""
    file = tmp_path / "mine.csv"
    words = [f"what is a {one}{other}" for one in "abcdefgh" for other in "abcd"]
    file.write_text("id,words\n" + "".join(f"{i},{text}\n" for i, text in enumerate([*words, "why " * 100])))
    plan = a_plan(num_self_prompts=0, prompts=(str(file),), picks=PromptPicks(column="words"))
    target = load_model(str(character_target))
    taught = teach(target, plan, tmp_path / "all", lambda *_: None)
    assert taught.num_too_long == 1
    found = []
    for side in (taught.to_learn, taught.apart):
        shards = [read_shard(shard) for shard in side]
        said = [
            target.tokenizer.decode(shard.token_ids[shard.text(i)]) for shard in shards for i in range(shard.num_texts)
        ]
        found.append({match[1] for text in said if (match := re.match("<u>(what.*?)</s><a>", text.replace(" ", "")))})
    assert not found[0] & found[1]
    assert found[0] | found[1] == {text.replace(" ", "") for text in words}
    assert len(found[1]) == 3


def test_too_little_to_learn_from_is_told_before_the_target_is_asked(character_target, tmp_path, monkeypatch):
    file = tmp_path / "mine"
    file.write_text('{"prompt": "what"}\n')
    monkeypatch.setattr(teaching, "_ask", lambda *_: pytest.fail("it was asked"))
    with pytest.raises(InputError, match="one that is kept apart, got 0 and 1; raise"):
        teach(
            load_model(str(character_target)),
            a_plan(num_self_prompts=0, prompts=(str(file),)),
            tmp_path / "t",
            lambda *_: None,
        )


def test_prompts(character_target, text_file, tmp_path):
    tokenizer = load_model(str(character_target)).tokenizer
    before, behind = chat_prefix(tokenizer)
    assert tokenizer.decode(before) == "<u>"
    assert tokenizer.decode(behind).replace(" ", "") == "</s><a>"
    [asked] = ask_prompts(["the cat sat on the mat"], ["what? {text}"], tokenizer, 12)
    assert tokenizer.decode(asked).replace(" ", "") == "<u>what?thecatsat</s><a>"
    assert continue_prompts([], tokenizer, 12) == []
    with pytest.raises(InputError, match="where the passage goes"):
        ask_prompts(["x"], ["what?"], tokenizer, 12)
    assert all(len(passage) >= 90 for passage in read_passages([text_file], 100))
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(InputError, match="at least 100 characters"):
        read_passages([tmp_path / "short.txt"], 100)
    (tmp_path / "bytes.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"bytes.txt, line 1, column 4: must be UTF-8"):
        read_passages([tmp_path / "bytes.txt"], 100)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="chat template"):
        chat_prefix(tokenizer)
