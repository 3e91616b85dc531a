"""The custom_generate folder, built in or written by `dynatree hf-folder`, and what transformers does with it."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from students import tiny_student
from tiny_folder import save_tiny, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from dynatree_core import hf
from dynatree_core.cli.group import main
from dynatree_core.errors import DynaTreeError, ModelLoadError, ParameterError
from dynatree_core.hf import entry as hf_entry
from dynatree_core.hf.export import Chosen, check_place, program, write_folder
from dynatree_core.models.load import model_folder
from dynatree_core.models.student import save_student
from dynatree_core.testing.models import perturbed, tiny_model

PROMPT = torch.tensor([[1, 2, 3, 1, 2, 3, 1]])
PLAIN = {"attention_mask": torch.ones_like(PROMPT), "do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
FOLDER = {"custom_generate": hf.FOLDER, "trust_remote_code": True}
CHOSEN = Chosen("prompt_lookup", "fixed(depth=3)", {"tau": 0.0})


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory):
    """transformers copies programs of folders into a cache, which here is not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", [*sys.path])
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written")
    write_folder(out, source, "tiny", CHOSEN)
    return out


@pytest.fixture(scope="module")
def plain(source: Path):
    return AutoModelForCausalLM.from_pretrained(source).eval()


@pytest.fixture(scope="module")
def trees(written: Path):
    return AutoModelForCausalLM.from_pretrained(written, trust_remote_code=True).eval()


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The arguments of each generation that went through trees."""
    calls: list[dict] = []

    def noting(model, **arguments):
        calls.append(arguments)
        return hf.generate_with(model, **arguments)

    monkeypatch.setattr(hf_entry, "generate_with", noting)
    return calls


class Last(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 5 == 0


class Never(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[:, input_ids[0, -1]] = -torch.inf
        return scores


ASKED = [
    {},
    {"do_sample": True, "temperature": 0.7, "top_k": 9},
    {"generation_config": GenerationConfig(max_new_tokens=9, repetition_penalty=1.3), "max_new_tokens": None},
    {"logits_processor": [Never()]},
    {"stopping_criteria": [Last()]},
    {"prefix_allowed_tokens_fn": lambda batch, ids: [1, 2, 3, 4 + len(ids) % 5]},
    {"stop_strings": ["e", "th"], "tokenizer": tiny_tokenizer()},
    {"tokenizer": tiny_tokenizer()},
    {"num_return_sequences": 2, "do_sample": True},
    {"negative_prompt_ids": PROMPT, "negative_prompt_attention_mask": torch.ones_like(PROMPT)},
    {"return_dict_in_generate": True},
    {"assistant_model": None, "synced_gpus": None, "streamer": None, "stop_strings": None},
]


def text_of(result):
    return (result if torch.is_tensor(result) else result.sequences).tolist()


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: "+".join(asked) or "nothing")
def test_both_ways_give_what_generate_gives(plain, trees, used, asked):
    arguments = {**PLAIN, **asked}
    torch.manual_seed(3)
    expected = text_of(plain.generate(PROMPT, **arguments))
    for call in (lambda: plain.generate(PROMPT, **arguments, **FOLDER), lambda: trees.generate(PROMPT, **arguments)):
        torch.manual_seed(3)
        assert text_of(call()) == expected
    assert [one.get("policy") for one in used] == [None, "fixed(depth=3)"]


def test_a_config_alone_brings_no_warning(trees, capsys):
    """transformers warns of settings beside a config, of which the caller has given none."""
    trees.generate(PROMPT, generation_config=GenerationConfig(max_new_tokens=4, pad_token_id=0))
    assert "Passing `generation_config` together with" not in capsys.readouterr().err


def test_several_prompts(plain, trees, used):
    ids = torch.tensor([[0, 0, 1, 2, 3, 1], [4, 5, 6, 4, 5, 6]])
    arguments = {**PLAIN, "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])}
    expected = plain.generate(ids, **arguments).tolist()
    assert trees.generate(ids, **arguments).tolist() == expected
    assert plain.generate(ids, **arguments, **FOLDER).tolist() == expected
    assert len(used) == 2


def test_arguments_without_a_name(plain, trees):
    config = GenerationConfig(max_new_tokens=6, pad_token_id=0)
    expected = plain.generate(PROMPT, config).tolist()
    assert trees.generate(PROMPT, config).tolist() == expected
    assert trees.generate(inputs=PROMPT, generation_config=config).tolist() == expected
    assert trees.generate(input_ids=PROMPT, generation_config=config).tolist() == expected
    with pytest.raises(TypeError, match="multiple values for argument 'inputs'"):
        trees.generate(PROMPT, inputs=PROMPT)
    with pytest.raises(TypeError, match="too many positional arguments"):
        trees.generate(PROMPT, *[None] * 11)


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({"assistant_model": tiny_model("llama")}, ParameterError, "give the small model as drafter="),
        ({"synced_gpus": True}, ParameterError, "decoding runs in one process"),
        ({"num_beams": 2}, ParameterError, "has no num_beams, got 2"),
        ({"guidance_scale": 2.0, "negative_prompt_ids": PROMPT}, ParameterError, "has no guidance_scale"),
        ({"cache_implementation": "paged"}, ParameterError, "got 'paged', continuous batching without trees"),
        ({"stop_strings": ["e"]}, ParameterError, "stop_strings need the target's tokenizer"),
        ({"polcy": "fixed"}, ValueError, "'polcy'"),
        ({"options": [1]}, ParameterError, r"options must be a mapping such as .*, got \[1\]"),
        ({"options": {"max_nodes": -1}}, ParameterError, "max_nodes must be an integer"),
        ({"policy": "no_such"}, DynaTreeError, "no_such"),
        ({"drafter": "no_such"}, DynaTreeError, "no_such"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_is_refused_with_the_reason(plain, trees, asked, error, words):
    for call in (
        lambda streamer: plain.generate(PROMPT, **PLAIN, **asked, **FOLDER, streamer=streamer),
        lambda streamer: trees.generate(PROMPT, **PLAIN, **asked, streamer=streamer),
    ):
        streamer = TextIteratorStreamer(tiny_tokenizer(), timeout=60)
        with pytest.raises(error, match=words):
            call(streamer)


def test_a_call_chooses_before_the_folder_does(trees, used):
    drafter = perturbed("llama")
    trees.generate(PROMPT, **PLAIN, drafter=drafter, policy="linear", options={"max_nodes": 4})
    trees.generate(PROMPT, **PLAIN, drafter=None, options={"tau": 0.5})
    [first, second] = used
    assert (first["drafter"], first["policy"], first["options"]) == (drafter, "linear", {"tau": 0.0, "max_nodes": 4})
    assert (second["drafter"], second["policy"], second["options"]) == (None, "fixed(depth=3)", {"tau": 0.5})


def test_another_loop_may_be_named(plain, trees, used):
    def loop(model, input_ids, **ignored):
        return input_ids[:, :2]

    assert trees.generate(PROMPT, **PLAIN, custom_generate=loop).tolist() == [[1, 2]]
    assert used == []
    expected = plain.generate(PROMPT, **PLAIN).tolist()
    assert trees.generate(PROMPT, **PLAIN, custom_generate=hf.generate, policy="fixed").tolist() == expected
    assert trees.generate(PROMPT, **PLAIN, **FOLDER).tolist() == expected
    assert len(used) == 1


class Collecting(TextStreamer):
    text = ""

    def on_finalized_text(self, text, stream_end=False):
        self.text += text


def test_a_streamer(plain, trees, used):
    theirs, folders, bound = (Collecting(tiny_tokenizer()) for _ in range(3))
    plain.generate(PROMPT, **PLAIN, streamer=theirs)
    plain.generate(PROMPT, **PLAIN, streamer=folders, **FOLDER)
    trees.generate(PROMPT, **PLAIN, streamer=bound)
    assert folders.text == bound.text == theirs.text != ""
    assert len(used) == 2


@pytest.mark.parametrize("fault", [{}, {"policy": "no_such"}])
def test_an_iterating_streamer_in_a_thread(plain, trees, fault):
    expected = "" if fault else tiny_tokenizer().decode(plain.generate(PROMPT, **PLAIN)[0, PROMPT.shape[1] :])
    raised = []

    def work(call: Callable[..., object], **arguments: object) -> None:
        try:
            call(PROMPT, **PLAIN, **fault, **arguments)
        except DynaTreeError as error:
            raised.append(error)

    for call, more in ((plain.generate, FOLDER), (trees.generate, {})):
        streamer = TextIteratorStreamer(tiny_tokenizer(), skip_prompt=True, timeout=60)
        thread = threading.Thread(target=work, args=(call,), kwargs={**more, "streamer": streamer})
        thread.start()
        assert "".join(streamer) == expected
        thread.join()
    assert len(raised) == (2 if fault else 0)


@pytest.mark.parametrize("is_bound", [True, False])
def test_pipelines_with_stop_strings_streamer_and_batches(plain, trees, used, is_bound):
    tokenizer = tiny_tokenizer()
    theirs = pipeline("text-generation", model=plain, tokenizer=tokenizer)
    mine = pipeline("text-generation", model=trees, tokenizer=tokenizer) if is_bound else theirs
    more = {} if is_bound else FOLDER
    asked = {"do_sample": False, "max_new_tokens": 16, "return_full_text": False}
    [full] = theirs("the cat", **asked)
    stop = full["generated_text"][4:6]
    chat = [{"role": "user", "content": "the cat"}]
    for prompt, extra in (
        ("the cat", {}),
        ("the cat", {"stop_strings": [stop], "tokenizer": tokenizer}),
        ("the cat", {"stop_sequence": stop[-1]}),
        (["the cat", "a hen"], {}),
        (["the cat", "a hen"], {"batch_size": 2}),
        ([chat], {}),
    ):
        expected = theirs(prompt, **asked, **extra)
        assert mine(prompt, **asked, **extra, **more) == expected
    assert len(used) >= 6
    streams = [Collecting(tokenizer, skip_prompt=True) for _ in range(2)]
    theirs("the cat", **asked, streamer=streams[0])
    mine("the cat", **asked, streamer=streams[1], **more)
    assert streams[0].text == streams[1].text != ""


def test_copies_names_and_helpers(plain, trees, written, used):
    """A copy has its own weights, a pipeline loads the folder by name, another model's generate may call ours."""
    expected = plain.generate(PROMPT, **PLAIN).tolist()
    copied = copy.deepcopy(trees)
    torch.nn.init.zeros_(copied.lm_head.weight)
    assert copied.generate(PROMPT, **PLAIN).tolist() == [[*PROMPT[0].tolist(), *[0] * 20]]
    assert trees.generate(PROMPT, **PLAIN).tolist() == expected
    assert len(used) == 2
    named = pipeline("text-generation", model=str(written), trust_remote_code=True)
    asked = {"do_sample": False, "max_new_tokens": 12}
    assert named("the cat", **asked) == pipeline("text-generation", model=str(written))("the cat", **asked)
    assert len(used) == 3
    assert plain.generate(PROMPT, **PLAIN, assistant_model=trees).tolist() == expected


# what is written


def test_the_folder_loads_with_and_without_trees(written, source, plain):
    without = AutoModelForCausalLM.from_pretrained(written)
    assert "generate" not in vars(without)
    assert without.generate(PROMPT, **PLAIN).tolist() == plain.generate(PROMPT, **PLAIN).tolist()
    assert AutoTokenizer.from_pretrained(written).get_vocab() == tiny_tokenizer().get_vocab()
    for name in ("model.safetensors", "config.json"):
        assert (written / name).read_bytes() == (source / name).read_bytes()
    readme = (written / "README.md").read_text()
    assert "`fixed(depth=3)`" in readme
    assert "`tau=0.0`" in readme


def test_a_program_with_nothing_chosen_is_the_built_in_one():
    text = Path(hf.FOLDER, "custom_generate", "generate.py").read_text()
    assert program(CHOSEN) != text
    assert "DEFAULTS: dict[str, Any] = {'drafter': 'prompt_lookup', 'policy': 'fixed(depth=3)'" in program(CHOSEN)
    compile(program(Chosen('distilled(path="it\'s")', "a'b", {"cache": 'x"y'})), "generate.py", "exec")


def test_links_and_what_a_later_run_replaces(source, tmp_path):
    out, other = tmp_path / "out", save_tiny(tmp_path / "other", seed=1)
    (other / "extra.safetensors").write_bytes(b"another")
    before = (source / "model.safetensors").read_bytes()
    write_folder(out, source, "tiny", CHOSEN, is_linked=True)
    assert (out / "model.safetensors").is_symlink()
    assert not (out / "config.json").is_symlink()
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert model.generate(PROMPT, **PLAIN).shape == (1, 27)
    check_place(out, other)
    write_folder(out, other, "other", CHOSEN)
    assert (source / "model.safetensors").read_bytes() == before  # not written through the link
    assert not (out / "model.safetensors").is_symlink()
    (out / "mine.txt").write_text("a note")
    write_folder(out, source, "tiny", CHOSEN)
    assert not (out / "extra.safetensors").exists()
    assert (out / "mine.txt").read_text() == "a note"
    assert (out / "model.safetensors").read_bytes() == before


def test_a_record_that_was_changed_reaches_no_other_folder(source, tmp_path):
    write_folder(tmp_path / "out", source, "tiny", CHOSEN)
    (tmp_path / "precious").write_text("mine")
    record = tmp_path / "out" / "custom_generate" / "dynatree.json"
    names = ["../precious", str(tmp_path / "precious"), "custom_generate", 7]
    record.write_text(json.dumps({**json.loads(record.read_text()), "files": names}))
    write_folder(tmp_path / "out", source, "tiny", CHOSEN)
    assert (tmp_path / "precious").read_text() == "mine"


def test_programs_of_the_target_itself_are_left_out(tmp_path):
    """transformers would load them in the place of the model that was checked."""
    source = save_tiny(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "theirs.Model"}}))
    (source / "theirs.py").write_text("raise RuntimeError('run')")
    write_folder(tmp_path / "out", source, "tiny", CHOSEN)
    assert not (tmp_path / "out" / "theirs.py").exists()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)).__name__ == (
        "LlamaForCausalLM"
    )


# the command


def dynatree(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[object, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    said = capsys.readouterr()
    return ended.value.code, said.out + said.err


def test_the_command(capsys, source, plain, used, tmp_path):
    out = tmp_path / "out"
    chosen = ["--policy", "fixed(depth=2)", "--option", "tau=0", "--option", "on_error=fallback"]
    code, said = dynatree(capsys, "hf-folder", out, "--target", source, "--link", *chosen)
    assert (code, "trust_remote_code=True" in said) == (0, True), said
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert model.generate(PROMPT, **PLAIN).tolist() == plain.generate(PROMPT, **PLAIN).tolist()
    [call] = used
    assert (call["drafter"], call["policy"]) == ("prompt_lookup", "fixed(depth=2)")
    assert call["options"] == {"tau": 0, "on_error": "fallback"}
    assert dynatree(capsys, "hf-folder", out, "--target", source)[0] == 0  # its own folder is replaced


@pytest.mark.parametrize("text", ["{}", "distilled(path='{}')+prompt_lookup"])
def test_a_student_is_found_from_any_folder(capsys, source, plain, used, tmp_path, monkeypatch, text):
    save_student(tiny_student(tiny_model("llama")), tmp_path / "student", torch.float64, {})
    monkeypatch.chdir(tmp_path)
    drafter = text.format("./student")
    code, said = dynatree(capsys, "hf-folder", "out", "--target", source, "--drafter", drafter)
    assert code == 0, said
    monkeypatch.chdir(source)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.generate(PROMPT, **PLAIN).tolist() == plain.generate(PROMPT, **PLAIN).tolist()
    assert str(tmp_path / "student") in used[0]["drafter"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--policy", "fixd"], "did you mean 'fixed'"),
        (["--drafter", "promt_lookup"], "did you mean 'prompt_lookup'"),
        (["--drafter", "SOURCE"], "must be a registered one or a folder made by `dynatree distill`, got the model"),
        (["--option", "tao=1"], "must be one of .* got 'tao' .did you mean 'tau'"),
        (["--option", "tau"], "must be written NAME=VALUE, got 'tau'"),
        (["--option", "tau=high"], "tau must be"),
        (["--option", "max_nodes=-1"], "max_nodes must be"),
        (["--option", "on_error=ignore"], "on_error must be one of raise, fallback, got 'ignore'"),
        (["--option", "runner=fast"], "runner must be one of auto, cudagraph, eager, native, packed, got 'fast'"),
        (["--option", "exact=yes"], "exact"),
        (["--target", "nowhere/at/all"], "cannot load"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(capsys, source, tmp_path, monkeypatch, wrong, words):
    def unexpected(*args: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("dynatree_core.models.load.load_model", unexpected)
    given = [str(source) if word == "SOURCE" else word for word in wrong]
    code, said = dynatree(capsys, "hf-folder", tmp_path / "out", "--target", source, *given)
    assert code != 0
    assert re.search(words, " ".join(said.split())), said
    assert not (tmp_path / "out").exists()


def test_nothing_of_somebody_elses_is_replaced(capsys, source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    code, said = dynatree(capsys, "hf-folder", tmp_path, "--target", source)
    assert code != 0
    assert "new, empty or made by it" in said
    write_folder(tmp_path / "out", source, "tiny", CHOSEN)
    code, said = dynatree(capsys, "hf-folder", tmp_path / "out", "--target", tmp_path / "out")
    assert code != 0
    assert "another folder than the target's" in said


@pytest.mark.slow
def test_without_dynatree_the_folder_says_what_is_missing(written):
    """In a process that cannot import it."""
    code = (
        "import sys; sys.modules['dynatree_core'] = None\n"
        f"import runpy; runpy.run_path({str(written / 'custom_generate' / 'generate.py')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs the package dynatree in the environment" in done.stderr


def test_where_a_models_files_are(source, monkeypatch):
    monkeypatch.setattr(
        "dynatree_core.models.hub.fetched_folder", lambda name: source if name == "owner/tiny" else None
    )
    assert model_folder("owner/tiny") == model_folder(str(source)) == source
    with pytest.raises(ModelLoadError, match="must be in the hub's local cache once it is loaded, got none"):
        model_folder("owner/other")
