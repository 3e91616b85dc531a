"""Distillation end to end on tiny models: what is asked, what is stored, what is learnt, and going on after a stop."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import sys
from pathlib import Path

import attrs
import click.testing
import pytest
import torch
from safetensors.torch import load_file
from students import HEAD_IDS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dynatree_bench.distill import teach as teaching
from dynatree_bench.distill.distill_cli import distill
from dynatree_bench.distill.evaluate import agreement, level_costs
from dynatree_bench.distill.prompts import Prompt, ask_prompts, chat_prefix, continue_prompts, read_passages
from dynatree_bench.distill.teach import TeachingPlan, teach
from dynatree_bench.distill.teacher import Shard, read_shard, score, write, write_shard
from dynatree_bench.distill.train import (
    Batch,
    TrainingPlan,
    batches_of,
    collate,
    divergence,
    frequent_tokens,
    load_checkpoint,
    scored_logits,
    train,
)
from dynatree_bench.studies.drafter_value import replayed
from dynatree_core import build_drafter, generate, load_model
from dynatree_core.cli.prompt_options import PromptPicks
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.errors import InputError, ModelLoadError, PluginLoadError
from dynatree_core.files.tensors import save_tensors
from dynatree_core.models.architectures import EXACT_FAMILIES
from dynatree_core.models.student import new_student, save_student
from dynatree_core.testing.models import VOCAB, greedy, perturbed, tiny_model

WORDS = [*"abcdefghijklmnopqrstuvwxyz", " ", ".", "\n", "<s>", "</s>", "<u>", "<a>", "?", "!", "{", "}"]
ROOT = Path(__file__).parents[1]
TEMPLATE = "{% for m in messages %}<u>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of characters, with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("target")
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="?",
        eos_token="</s>",
        pad_token="<s>",
        additional_special_tokens=["<u>", "<a>"],
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=30, bos_token_id=29, pad_token_id=29,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.dim() == 2:  # fresh weights say all tokens alike: there would be nothing to learn
            weight.data *= 6
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "book.txt"
    file.write_text("".join(f"the cat number {chr(97 + i % 26)} sat on a mat. it was happy\n" for i in range(120)))
    return file


def command(*arguments: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(distill, [str(argument) for argument in arguments], catch_exceptions=False)


def options(folder: Path, text: Path, out: Path) -> list[object]:
    return [
        "--target", folder, "--text", text, "--out", out, "--read", 1600, "--continue", 30, "--ask", 30,
        "--self-prompts", 20, "--new-tokens", 12, "--outputs", 30, "--epochs", 6, "--batch-tokens", 2048,
        "--learning-rate", 3e-3, "--threads", 1, "--device", "cpu",
    ]  # fmt: skip


def test_a_drafter_is_made_and_drafts(target_folder, text_file, tmp_path):
    """The command makes a drafter that agrees better than before; trees with it give the target's own output."""
    out = tmp_path / "drafter"
    ran = command(*options(target_folder, text_file, out))
    assert ran.exit_code == 0, ran.output
    report = json.loads((out / "report.json").read_text())
    assert report["after"]["top1"] > report["before"]["top1"] + 0.1
    assert report["course"][-1]["loss"] < report["course"][0]["loss"]
    assert sum(report["after"]["counts"]) == report["after"]["num_positions"]
    card = (out / "README.md").read_text()
    assert f"{report['after']['top1']:.3f}" in card
    for figure in ("calibration.png", "training.png"):
        assert figure in card
        assert (out / figure).stat().st_size > 5000
    target = load_model(str(target_folder)).model
    result = generate(target, f"distilled(path={str(out)!r})", [0, 1, 2], policy="fixed", max_new_tokens=40)
    assert result.token_ids == greedy(target, [0, 1, 2], 40)[: len(result.token_ids)]
    assert result.report.num_accepted_tokens > 0
    again = command(*options(target_folder, text_file, out))
    assert again.exit_code == 0
    other = json.loads((out / "report.json").read_text())
    assert other["after"] == report["after"], "a finished run that is given again changes nothing"


def test_another_request_does_not_mix_with_what_is_there(target_folder, text_file, tmp_path):
    """Other layers are trained from what was said already; what would be said otherwise is refused."""
    request = [*options(target_folder, text_file, tmp_path / "drafter"), "--epochs", 1]
    weights = []
    for layers in ("0,1", "0,2", "2"):
        assert command(*request, "--layers", layers).exit_code == 0
        weights.append((tmp_path / "drafter" / "student.safetensors").read_bytes())
        report = json.loads((tmp_path / "drafter" / "report.json").read_text())
        assert report["layers"] == [int(layer) for layer in layers.split(",")]
    assert len(set(weights)) == 3
    command(*request, "--layers", "0,1")
    assert (tmp_path / "drafter" / "student.safetensors").read_bytes() == weights[0]
    with pytest.raises(InputError, match="another request"):
        command(*request, "--seed", 7)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_of_somebody_elses_is_left_alone(target_folder, text_file, tmp_path, monkeypatch):
    """The target's own folder above all: its config.json and README.md have the names of ours."""
    own, project, drafter = tmp_path / "own", tmp_path / "project", tmp_path / "drafter"
    shutil.copytree(target_folder, own)
    project.mkdir()
    (project / "README.md").write_text("mine")
    # of another target, and without what a run could go on with
    save_student(new_student(tiny_model("llama"), [0], torch.arange(8)), drafter, torch.float32, {"target": "other"})
    monkeypatch.setattr("dynatree_bench.distill.run.load_model", lambda *args, **options: pytest.fail("loaded"))
    for out in (own, project, drafter):
        before = contents(out)
        with pytest.raises(InputError, match=rf"`dynatree distill` writes must go to .* got {out}, which holds"):
            command(*options(own, text_file, out))
        assert contents(out) == before


def test_damaged_work_says_what_to_delete(tmp_path):
    (tmp_path / "shard.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ModelLoadError, match=r"shard\.safetensors must hold tensors .*; delete it, and the same"):
        read_shard(tmp_path / "shard.safetensors")
    save_tensors({"odd": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelLoadError, match=r"other\.safetensors must hold .*token_ids.*, got odd; delete it"):
        read_shard(tmp_path / "other.safetensors")
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\3\4 cut off")
    with pytest.raises(ModelLoadError, match=r"checkpoint\.pt must hold a checkpoint .*; delete it, and the training"):
        load_checkpoint(tmp_path / "checkpoint.pt", torch.device("cpu"))


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    for name in ("run", "card"):
        monkeypatch.delitem(sys.modules, f"dynatree_bench.distill.{name}", raising=False)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PluginLoadError, match=r"needs matplotlib.*pip install 'dynatree\[bench\]'"):
        command("--out", tmp_path)


@pytest.mark.parametrize("text", [distill.help, (ROOT / "docs" / "distill.md").read_text(encoding="utf-8")])
def test_the_examples_draft_with_both_drafters(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = tiny_model("llama")
    save_student(new_student(target, [0], HEAD_IDS), Path("drafter"), torch.float32, {})
    [example] = re.findall(r'dynatree generate .*--drafter "(.*?)" "', text)
    drafter = build_drafter(example)
    assert [str(part) for part in drafter.drafters] == ["distilled(path='drafter')", "prompt_lookup"]
    assert generate(target, drafter, [0, 1, 2], max_new_tokens=12).token_ids == greedy(target, [0, 1, 2], 12)


def test_layers_that_are_no_numbers(tmp_path):
    assert "numbers joined by commas, got '0;1'" in command("--out", tmp_path, "--layers", "0;1").output


@pytest.mark.parametrize(
    "wrong",
    [
        ("--outputs", 0), ("--outputs", -5), ("--learning-rate", "nan"), ("--learning-rate", -1), ("--new-tokens", 0),
        ("--continue", -4), ("--ask", -1), ("--read", -1), ("--self-prompts", -1), ("--epochs", 0),
        ("--batch-tokens", 0),
    ],
    ids=lambda wrong: f"{wrong[0]}={wrong[1]}",
)  # fmt: skip
def test_numbers_out_of_range_are_refused_at_once(wrong, tmp_path, monkeypatch):
    monkeypatch.setattr("dynatree_bench.distill.run.make_drafter", lambda *asked: pytest.fail("it began"))
    ran = command("--out", tmp_path, *wrong)
    assert ran.exit_code == 2
    assert f"Invalid value for '{wrong[0]}'" in ran.output


@pytest.mark.parametrize("layers", ["0,3", "-1"])
def test_layers_that_the_target_lacks_are_refused_before_it_is_asked(layers, target_folder, text_file, tmp_path):
    with pytest.raises(InputError, match=r"--layers must be from 0 to 2 for .*, got \["):
        command(*options(target_folder, text_file, tmp_path / "drafter"), "--layers", layers)
    assert not list((tmp_path / "drafter" / "work").iterdir())


def test_a_short_context_is_kept_to(target_folder, text_file, tmp_path):
    """No text of a target with few positions is longer than they are, and prompts leave half of them to the answer."""
    loaded = load_model(str(target_folder))
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


class Interrupted(Exception):
    """In place of a signal."""


def a_plan(**changes) -> TeachingPlan:
    plan = TeachingPlan(
        texts=(), num_text_tokens=0, num_continued=0, num_asked=0, num_self_prompts=40, questions=(),
        openings=("", "a"), num_new=8, seed=0, batch=16,
    )  # fmt: skip
    return attrs.evolve(plan, **changes)


def test_teaching_goes_on_where_it_was_interrupted(target_folder, tmp_path, monkeypatch):
    """Batches that are there are not asked again, and those that come later are the same as in one go."""
    target = load_model(str(target_folder))
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
def test_another_model_of_the_same_name_is_another_target(form, target_folder, tmp_path):
    """Its answers are not mixed with those of the first, whether its weights or only its settings are others."""
    place = tmp_path / "model"
    shutil.copytree(target_folder, place)
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


def test_what_is_kept_apart_is_in_no_batch_to_learn_from(target_folder, tmp_path, monkeypatch):
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
    target, plan = load_model(str(target_folder)), about_texts(text, batch=8)
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


def test_texts_are_known_by_what_they_say(target_folder, text_file, tmp_path):
    """A text that was moved is the same; one that was changed is not, nor is a folder of another version."""
    target, folder = load_model(str(target_folder)), tmp_path / "teaching"
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


def said_by(model, num_texts=24, length=20) -> Shard:
    generator = torch.Generator().manual_seed(0)
    return score(model, torch.randint(VOCAB, (num_texts, length), generator=generator))


@pytest.mark.parametrize(("family", "stopped_after"), [("llama", 1), ("llama", 20), ("llama", 33), ("gpt2", 33)])
def test_an_interrupted_training_ends_with_the_same_weights(family, stopped_after, tmp_path):
    """Also where the target's configuration has dropout, as that of gpt2 does."""
    target, plan = tiny_model(family), TrainingPlan(6, batch_tokens=64, checkpoint_seconds=0)
    shards = [said_by(target)]
    whole = new_student(target, [0], HEAD_IDS)
    course = train(whole, shards, VOCAB, plan, tmp_path / "whole", lambda *_: None)
    assert len(course) >= 2

    def interrupt(done, total, loss):
        if done == stopped_after:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(new_student(target, [0], HEAD_IDS), shards, VOCAB, plan, tmp_path / "parts", interrupt)
    resumed = new_student(target, [0], HEAD_IDS)
    steps = []
    often = attrs.evolve(plan, checkpoint_seconds=1)  # how often it is stored is no part of a training
    assert train(resumed, shards, VOCAB, often, tmp_path / "parts", lambda done, *_: steps.append(done)) == course
    assert steps[0] == (stopped_after // 20) * 20 + 1, "from the last checkpoint on"
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [1]}, {"layers": [0, 1]}, {"head_ids": HEAD_IDS[1:]}, {"head_ids": torch.arange(HEAD_IDS.numel())},
        {"num_texts": 23}, {"temperature": 0.5}, {"num_epochs": 2}, {"learning_rate": 2e-3}, {"seed": 1},
        {"batch_tokens": 100}, {"warm_up": 0.5}, {"weight_decay": 0.1}, {"max_gradient": 0.1},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_training_has_a_checkpoint_of_its_own(change, tmp_path):
    """Beside a finished training it begins anew, and ends as it does alone."""
    target = tiny_model("llama")

    def trained(folder, layers=(0,), head_ids=HEAD_IDS, num_texts=24, temperature=1.0, **settings):
        student, steps = new_student(target, layers, head_ids), []
        shard = said_by(target, num_texts)
        shard = attrs.evolve(shard, top_logprobs=shard.top_logprobs / temperature)
        plan = TrainingPlan(**{"num_epochs": 1, "batch_tokens": 200, **settings})
        train(student, [shard], VOCAB, plan, folder, lambda done, *_: steps.append(done))
        return student.state_dict(), steps

    _, first = trained(tmp_path)
    assert len(first) > 1
    assert trained(tmp_path)[1] == [], "a finished training has nothing left to do"
    beside, steps = trained(tmp_path, **change)
    assert steps[0] == 1
    alone, _ = trained(tmp_path / "alone", **change)
    assert all(torch.equal(weight, alone[name]) for name, weight in beside.items())


def test_what_the_target_writes_is_its_own_output(target_folder):
    """Greedy texts equal generate()'s, and every stored distribution is that of a plain pass over the text."""
    target = load_model(str(target_folder), dtype="float64").model
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


@pytest.mark.parametrize("family", EXACT_FAMILIES)
def test_what_is_judged_and_learnt_is_what_the_model_says(family):
    """Some families scale or cap what their head says; the logits are those of the forward that drafts."""
    target = tiny_model(family, **({"logit_scale": 0.1} if family.startswith("cohere") else {}))
    text = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    with torch.inference_mode():
        said = target(text).logits.log_softmax(-1)
    shard = score(target, text)
    known = said.flatten(0, 1).gather(1, shard.top_ids.long())
    torch.testing.assert_close(shard.top_logprobs.double(), known, atol=1e-2, rtol=1e-3)
    student = new_student(target, [0, 1], torch.arange(VOCAB), dtype=torch.float64)
    is_scored = torch.tensor([[False, True, True, False, False, False], [False, False, True, True, True, False]])
    batch = Batch(text, is_scored, shard.top_ids[:5], shard.top_logprobs[:5])
    with torch.inference_mode():
        found = scored_logits(student, batch).log_softmax(-1)
    torch.testing.assert_close(found.double(), said[is_scored], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", ["linear", "fixed(depth=3,branch=3,tau=0.0)", "phase3"])
def test_a_replay_is_a_real_run_without_the_target(policy):
    """The same tokens and the same trees, for a model that drafts and for prompt_lookup."""
    target, drafter = tiny_model("llama"), ModelDrafter(perturbed("llama", noise=0.02))
    shard = write(target, [Prompt((1, 2, 3), 0.0), Prompt((5, 6), 0.0)], num_new=30, end_ids=[], pad_id=0, seed=0)
    for source in (drafter, build_drafter("prompt_lookup")):
        for index, prompt in enumerate([[1, 2, 3], [5, 6]]):
            real = generate(target, source, prompt, policy=policy, max_new_tokens=30).report
            session = replayed(shard, index, target, source, policy)
            assert session.steps == list(real.steps)
            assert real.num_iterations < 30 or source is not drafter


def test_a_shard_survives_its_file(tmp_path):
    shard = said_by(tiny_model("llama"))
    write_shard(shard, tmp_path / "one.safetensors")
    found = read_shard(tmp_path / "one.safetensors")
    for field in attrs.fields(Shard):
        assert torch.equal(getattr(found, field.name), getattr(shard, field.name))
    assert [file.name for file in tmp_path.iterdir()] == ["one.safetensors"]


def test_batches_hold_every_text_once():
    shards = [said_by(tiny_model("llama"), 5, 12), said_by(tiny_model("llama"), 7, 30)]
    batches = batches_of(shards, 64)
    assert sorted(text for batch in batches for text in batch) == [
        (s, i) for s, n in ((0, 5), (1, 7)) for i in range(n)
    ]
    for texts in batches:
        assert collate(shards, texts, torch.device("cpu")).token_ids.numel() <= 64


def test_divergence_is_that_of_the_whole_distributions():
    """With all tokens known and all of them named it is KL itself; with a restricted head the rest is one outcome."""
    torch.manual_seed(0)
    target, student = torch.randn(5, 8).log_softmax(-1), torch.randn(5, 8)
    top = target.topk(8)
    whole = divergence(student, torch.arange(8), top.indices, top.values)
    q = student.log_softmax(-1)
    expected = (target.exp() * (target - q)).sum(-1).mean()
    torch.testing.assert_close(whole, expected, atol=2e-5, rtol=1e-4)
    known = torch.tensor([0, 2, 3, 7])
    output_of = torch.full((8,), -1)
    output_of[known] = torch.arange(4)
    part = divergence(student[:, known], output_of, top.indices, top.values)
    q = student[:, known].log_softmax(-1)
    p = target[:, known].exp()
    tail_p = 1 - p.sum(-1)
    expected = ((p * (p.log() - q)).sum(-1) + tail_p * (tail_p.log() - torch.tensor(1e-6).log())).mean()
    torch.testing.assert_close(part, expected, atol=2e-4, rtol=1e-3)


def test_frequent_tokens_are_those_that_the_target_expects():
    shard = said_by(tiny_model("llama"))
    weight = torch.zeros(VOCAB)
    weight.index_add_(0, shard.top_ids.flatten().long(), shard.top_logprobs.float().exp().flatten())
    assert set(frequent_tokens([shard], VOCAB, 5).tolist()) == set(weight.topk(5).indices.tolist())
    assert frequent_tokens([shard], VOCAB, 10 * VOCAB).tolist() == list(range(VOCAB))


def test_agreement_of_the_target_with_itself_and_of_a_worse_one():
    target = tiny_model("llama")
    shards = [said_by(target)]
    itself = agreement(new_student(target, [0, 1], torch.arange(VOCAB)).eval(), shards, torch.float32)
    assert itself.top1 == itself.covered == 1
    assert itself.chain(6) == 7
    worse = agreement(new_student(target, [1], HEAD_IDS).eval(), shards, torch.float32)
    assert 0 < worse.top1 < worse.top3 < worse.covered < 1
    assert sum(worse.rank_acceptance) <= worse.covered
    assert sum(worse.counts) == worse.num_positions == shards[0].num_scored
    assert 1 < worse.chain(6) < worse.tree(6, 2)


def test_costs_of_levels():
    target = tiny_model("llama")
    student = new_student(target, [0], HEAD_IDS, dtype=torch.float64).eval()
    costs = level_costs(student, target, (1, 4), context=16, repeats=3)
    assert [cost.width for cost in costs] == [1, 4]
    assert all(0 < cost.low <= cost.ratio <= cost.high for cost in costs)


def test_a_book_of_one_line_is_many_passages(tmp_path):
    file = tmp_path / "book.gz"
    file.write_bytes(gzip.compress(("word " * 20_000).encode("utf-8-sig")))
    passages = read_passages([file], 1800)
    assert len(passages) == 56
    assert " ".join(passages).split() == ["word"] * 20_000


def test_prompts_of_ones_own_are_answered(target_folder, tmp_path):
    """Each is in a batch, through the chat template, and some are kept apart."""
    file = tmp_path / "mine.csv"
    words = [f"what is a {one}{other}" for one in "abcdefgh" for other in "abcd"]
    file.write_text("id,words\n" + "".join(f"{i},{text}\n" for i, text in enumerate([*words, "why " * 100])))
    plan = a_plan(num_self_prompts=0, prompts=(str(file),), picks=PromptPicks(column="words"))
    target = load_model(str(target_folder))
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


def test_too_little_to_learn_from_is_told_before_the_target_is_asked(target_folder, tmp_path, monkeypatch):
    file = tmp_path / "mine"
    file.write_text('{"prompt": "what"}\n')
    monkeypatch.setattr(teaching, "_ask", lambda *_: pytest.fail("it was asked"))
    with pytest.raises(InputError, match="one that is kept apart, got 0 and 1; raise"):
        teach(
            load_model(str(target_folder)),
            a_plan(num_self_prompts=0, prompts=(str(file),)),
            tmp_path / "t",
            lambda *_: None,
        )


def test_files_are_read_before_a_model_is_loaded(tmp_path):
    file = tmp_path / "mine"
    file.write_text('{"prompt": "what"}\n{"prompt": 7}\n')
    with pytest.raises(InputError, match='mine, line 2: "prompt" must be a text'):
        command("--target", "no/such-model", "--out", tmp_path / "out", "--prompts", file)
    assert not (tmp_path / "out").exists()


def test_prompts(target_folder, text_file, tmp_path):
    tokenizer = load_model(str(target_folder)).tokenizer
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
