"""The `dynatree` command: what it prints where, its exit codes, and what an interrupt leaves behind."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import click
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dynatree_core import (
    Drafter,
    DraftPlan,
    DraftState,
    GenerationReport,
    Proposals,
    Session,
    StepReport,
    TokenTree,
    count,
    hookimpl,
)
from dynatree_core.cli import main as cli
from dynatree_core.cli.console import REPLACEMENT, Answer, Comparison, IncrementalText, report_table
from dynatree_core.cli.exits import UNREAD
from dynatree_core.cli.main import main
from dynatree_core.engine import session as session_module
from dynatree_core.models.embedded import EmbeddedModel
from dynatree_core.models.student import new_student, save_student
from dynatree_core.plugins import registry as plugins_module

SAMPLES = ["naïve café", "日本語の文字", "🌲🌳 trees 🎄", "größer", "плавать", "a b  c\n\td", "👩‍👩‍👧"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
ON_CPU = ("--device", "cpu")  # the default is a GPU where there is one, whose rounding is another
SHOW_CURSOR, HIDE_CURSOR, GREEN, RESET = "\x1b[?25h", "\x1b[?25l", "\x1b[32m", "\x1b[0m"


def byte_level_tokenizer(*, num_merges: int = 0) -> Tokenizer:
    """Byte-level BPE: characters beyond ASCII are several bytes, and a merge may join parts of two of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if num_merges:
        size = len(alphabet) + num_merges
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(SAMPLES * 3, trainer)
    return tokenizer


def for_transformers(tokenizer: Tokenizer, **options: Any) -> Any:  # Any: transformers leaves it unannotated
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)  # type: ignore[no-untyped-call]


def byte_fallback_tokenizer() -> Tokenizer:
    """The way of Llama 2: characters where it knows them, bytes where not, a leading blank that decoding removes."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocab |= {char: len(vocab) + index for index, char in enumerate("▁abcdefghé")}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def save_model(folder: Path, tokenizer: Any, *, seed: int = 0) -> Path:
    """A tiny random Llama."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=20_000, eos_token_id=256, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Model folders: plain, one with a chat template, one whose tokens have other ids, one without a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    plain = for_transformers(byte_level_tokenizer(), eos_token="<end>")
    chat = for_transformers(byte_level_tokenizer(), eos_token="<end>", chat_template=TEMPLATE)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    reversed_ids = byte_level_tokenizer()
    reversed_ids.model = models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[])
    other = for_transformers(reversed_ids, eos_token="<end>")
    return SimpleNamespace(
        plain=save_model(root / "plain", plain),
        chat=save_model(root / "chat", chat),
        other=save_model(root / "other", other, seed=1),
        mute=save_model(root / "mute", None),
        tokenizer=plain,
    )


@attrs.frozen
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Dynatree = Callable[..., Ran]


@pytest.fixture
def dynatree(capfd: pytest.CaptureFixture[str]) -> Dynatree:
    """Runs the command in this process; file descriptors are captured, so what libraries print is seen too."""

    def run(*args: object) -> Ran:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        captured = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Ran(ended.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def generate(dynatree: Dynatree, folders: SimpleNamespace) -> Dynatree:
    """Runs `dynatree generate` on the plain model, past the end-of-text token."""

    def run(*args: object) -> Ran:
        return dynatree("generate", *ON_CPU, "--target", folders.plain, "--ignore-eos", *args)

    return run


@attrs.define
class Mishap:
    """A policy that drafts one token a step, and at iteration `at` interrupts (0) or raises (1)."""

    at: int = count(3, minimum=0)
    raises: int = count(1, minimum=0)

    @hookimpl
    def on_iteration_end(self, report: StepReport) -> None:
        if report.iteration == self.at:
            if self.raises:
                raise ValueError("two\nlines")
            signal.raise_signal(signal.SIGINT)


@attrs.define
class Misspelt:
    """A policy with a hook that does not exist."""

    @hookimpl
    def branch_facto(self, frontier: object) -> int:
        return 1


class Demanding:
    """A policy that cannot be made from nothing.

    More words.
    """

    def __init__(self, what: int, size: int = 3) -> None:
        self.what = what


class BrokenDrafter(Drafter):
    """A drafter whose every proposal fails."""

    def __str__(self) -> str:
        return "broken"

    def start(self, plan: DraftPlan) -> DraftState:
        return BrokenState()


class BrokenState(DraftState):
    def prefill(self, prompt_ids: torch.Tensor) -> None:
        pass

    def propose(self, committed_ids: torch.Tensor, tree: TokenTree, k: int) -> Proposals:
        raise ValueError("no draft")

    def commit(self, draft_path: tuple[int, ...]) -> None:
        pass

    def rollback(self) -> None:
        pass


@pytest.fixture
def more_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Policies of this module, some of them broken, and two drafters of one name, as if packages provided them."""
    extra = [
        EntryPoint("mishap", f"{__name__}:Mishap", "dynatree.policies"),
        EntryPoint("misspelt", f"{__name__}:Misspelt", "dynatree.policies"),
        EntryPoint("demanding", f"{__name__}:Demanding", "dynatree.policies"),
        EntryPoint("absent", "no_such_module:Policy", "dynatree.policies"),
        EntryPoint("wrong", f"{__name__}:SAMPLES", "dynatree.presets"),
        EntryPoint("broken", f"{__name__}:BrokenDrafter", "dynatree.drafters"),
        EntryPoint("twin", "one:Drafter", "dynatree.drafters"),
        EntryPoint("twin", "two:Drafter", "dynatree.drafters"),
    ]

    def with_extra(*, group: str) -> list[EntryPoint]:
        return [*entry_points(group=group), *(entry for entry in extra if entry.group == group)]

    monkeypatch.setattr(plugins_module, "entry_points", with_extra)
    plugins_module.plugin_table.cache_clear()
    yield
    plugins_module.plugin_table.cache_clear()


def is_one_error_line(ran: Ran, *words: str) -> bool:
    lines = ran.err.splitlines()
    return len(lines) == 1 and lines[0].startswith("dynatree: error: ") and all(word in lines[0] for word in words)


# ---- the answer ----------------------------------------------------------------------------------------------


def test_only_the_answer_is_on_stdout_and_the_numbers_on_stderr(generate: Dynatree) -> None:
    document = generate("--json", "--max-new-tokens", 30, "abc").document
    ran = generate("--max-new-tokens", 30, "abc")
    assert ran.code == 0
    assert ran.out == document["text"] + ("" if document["text"].endswith("\n") else "\n")
    labels = ["tokens / iteration", "path acceptance", "node acceptance", "drafted nodes", "tokens / s", "drafting"]
    labels += ["verification", "the rest", "prefill", "stop reason", "length"]
    assert all(label in ran.err for label in labels)
    assert "identical" not in ran.err


def test_the_default_target_is_the_embedded_model(
    dynatree: Dynatree, folders: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynatree_core.models import load as models_module

    load, names = models_module.load_model, []

    def noting(name: str | None, **options: Any) -> Any:
        names.append(name)
        return load(str(folders.plain), **options)

    monkeypatch.setattr(models_module, "load_model", noting)
    document = dynatree("generate", "--json", "--drafter", "prompt_lookup", "--max-new-tokens", 2, "abc").document
    assert names == [None]
    assert document["target"] == "default"


def test_the_usual_drafter_suits_the_target(generate: Dynatree) -> None:
    assert cli.usual_drafter(None) == cli.usual_drafter("default") == "distilled+prompt_lookup"
    assert generate("--json", "--max-new-tokens", 2, "abc").document["drafter"] == "prompt_lookup"


def test_a_student_or_a_union_as_drafter(generate: Dynatree, folders: SimpleNamespace, tmp_path: Path) -> None:
    target = LlamaForCausalLM.from_pretrained(folders.plain)
    student = new_student(target, [0], torch.arange(0, target.config.vocab_size, 2)).eval()
    save_student(student, tmp_path, torch.float32, {"target": "plain"})
    asked = ("--policy", "fixed(tau=0.0)", "--max-new-tokens", 8, "abcabc")
    for drafter in (tmp_path, f"distilled(path={str(tmp_path)!r})+prompt_lookup"):
        document = generate("--json", "--compare", "--drafter", drafter, *asked).document
        assert document["identical"] is True
        assert document["num_drafted_nodes"] > 0


def test_on_every_device(dynatree: Dynatree, folders: SimpleNamespace, device: torch.device) -> None:
    models_ = ("--target", folders.plain, "--drafter", folders.plain, "--policy", "linear(depth=3)")
    exact = ("--dtype", "float64", "--ignore-eos", "--max-new-tokens", 12)
    ran = dynatree("generate", "--json", "--compare", "--device", str(device), *models_, *exact, "abc")
    assert ran.code == 0
    assert ran.document["device"] == str(device)
    assert ran.document["identical"] is True
    assert ran.document["node_acceptance"] == 1


def test_stopping_at_the_end_of_the_text(
    dynatree: Dynatree, folders: SimpleNamespace, generate: Dynatree, tmp_path: Path
) -> None:
    token_ids = generate("--json", "--max-new-tokens", 20, "abc").document["token_ids"]
    folder = tmp_path / "ends"
    folder.mkdir()
    for file in folders.plain.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": token_ids[4]}))
    document = dynatree("generate", *ON_CPU, "--json", "--target", folder, "abc").document
    assert document["stop_reason"] == "eos"
    assert document["token_ids"] == token_ids[: token_ids.index(token_ids[4]) + 1]
    on = dynatree(
        "generate", *ON_CPU, "--json", "--target", folder, "--ignore-eos", "--max-new-tokens", 20, "abc"
    ).document
    assert on["stop_reason"] == "length"
    assert on["token_ids"] == token_ids


def test_no_tokens_wanted(generate: Dynatree) -> None:
    ran = generate("--max-new-tokens", 0, "--compare", "abc")
    assert (ran.code, ran.out) == (0, "")
    document = generate("--max-new-tokens", 0, "--compare", "--json", "abc").document
    assert document["text"] == ""
    assert document["token_ids"] == []
    assert document["stop_reason"] == "length"
    assert document["tokens_per_second"] is None
    assert document["identical"] is True
    assert document["speedup"] is None


def test_a_terminal_that_lacks_characters(folders: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="latin-1"))
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--target", str(folders.plain), "--ignore-eos", "--max-new-tokens", "30", "abc"])
    assert ended.value.code == 0
    assert b"?" in written.getvalue()


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_a_prompt_on_standard_input(generate: Dynatree, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    wanted = generate("--json", "--max-new-tokens", 8, "zwei\nZeilen ü").document
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"zwei\nZeilen ü{ending}".encode())))
    got = generate("--json", "--max-new-tokens", 8, "-").document
    assert got["token_ids"] == wanted["token_ids"]
    assert got["num_prompt_tokens"] == wanted["num_prompt_tokens"] == 14


def test_chat_template(dynatree: Dynatree, folders: SimpleNamespace) -> None:
    def num_prompt_tokens(*args: object) -> int:
        document = dynatree("generate", "--json", "--target", folders.chat, "--max-new-tokens", 1, *args).document
        return int(document["num_prompt_tokens"])

    wrapped = len("<user>abc<assistant>")
    assert num_prompt_tokens("abc") == wrapped
    assert num_prompt_tokens("--chat", "abc") == wrapped
    assert num_prompt_tokens("--raw", "abc") == 3


def test_options_reach_the_session(generate: Dynatree, folders: SimpleNamespace) -> None:
    own = ("--drafter", folders.plain, "--policy", "fixed(depth=5,branch=2,tau=0.0)", "--json", "--max-new-tokens", 9)
    free = generate(*own, "--tau", 0, "abc").document
    assert free["num_drafted_nodes"] > free["num_iterations"]
    assert generate(*own, "--max-nodes", 0, "abc").document["num_drafted_nodes"] == 0
    assert generate(*own, "--max-depth", 0, "abc").document["num_drafted_nodes"] == 0
    assert generate(*own, "--tau", 1, "abc").document["num_drafted_nodes"] == 0
    narrow = generate(*own, "--max-branch", 1, "abc")
    assert narrow.code == 1
    assert "max_branch=1" in narrow.err


# ---- JSON ----------------------------------------------------------------------------------------------------


def test_settings_of_generate_reach_the_session(generate: Dynatree) -> None:
    plain = generate("--json", "--max-new-tokens", "24", "x").document
    stop = next(char for char in plain["text"][1:] if char.isascii() and char.isprintable())
    stopped = generate("--json", "--max-new-tokens", "24", "--stop", stop, "--stop", "never there", "x").document
    assert stopped["stop_reason"] == "stop_string"
    assert stopped["text"] == plain["text"][: plain["text"].index(stop) + 1]
    timed = generate("--json", "--max-new-tokens", "24", "--max-time", "0", "x").document
    assert (timed["stop_reason"], timed["num_new_tokens"]) == ("time", 1)
    penalised = generate("--json", "--max-new-tokens", "24", "--repetition-penalty", "9", "x").document
    assert len(set(penalised["token_ids"])) > len(set(plain["token_ids"]))
    unique = generate("--json", "--compare", "--max-new-tokens", "24", "--no-repeat-ngram-size", "1", "x").document
    assert len(set(unique["token_ids"])) == 24
    assert unique["identical"] is True
    assert generate("--json", "--max-new-tokens", "24", "--exact", "fixed_width", "x").document["text"] == plain["text"]
    refused = generate("--compare", "--max-time", "1", "x")
    assert refused.code == 2
    assert "--compare needs outputs of one length" in refused.err


def test_a_cache_of_sinks_and_a_window(generate: Dynatree, audit: Dynatree, tmp_path: Path) -> None:
    args = ("--json", "--dtype", "float64", "--max-new-tokens", 40, "--ignore-eos")
    ran = generate(*args, "--compare", "--cache", "sinks=2,window=6", "abc")
    assert (ran.code, ran.document["identical"], ran.document["cache"]) == (0, True, "sinks=2,window=6")
    assert generate(*args, "--cache", "sinks=0,window=1", "abc").document["token_ids"] != ran.document["token_ids"]
    path = tmp_path / "answer.json"
    path.write_text(json.dumps(ran.document))
    refused = audit("--output", path)
    assert refused.code == 2
    assert is_one_error_line(refused, "a cache that keeps all tokens", "--cache sinks=2,window=6")


def test_json_holds_every_metric_and_where_it_comes_from(generate: Dynatree, folders: SimpleNamespace) -> None:
    ran = generate("--json", "--dtype", "float64", "--policy", "phase3:plan", "--max-new-tokens", 12, "abc")
    assert (ran.code, ran.err) == (0, "")
    document = ran.document
    assert {field.name for field in attrs.fields(GenerationReport)} - {"steps"} <= set(document)
    assert "steps" not in document
    assert document["target"] == str(folders.plain)
    assert document["drafter"] == "prompt_lookup"
    assert document["policy"] == "phase3:plan"
    assert document["expanded_policy"] == "confidence:plan+dynamic_depth:plan+history:plan"
    assert (document["device"], document["dtype"]) == ("cpu", "float64")
    assert document["versions"]["torch"] == torch.__version__
    assert set(document["versions"]) == {"dynatree", "torch", "transformers"}
    assert len(document["token_ids"]) == document["num_new_tokens"] == 12
    assert document["text"] == folders.tokenizer.decode(document["token_ids"])
    assert not {"identical", "speedup", "autoregressive"} & set(document)


def test_json_comparison(generate: Dynatree) -> None:
    ran = generate("--json", "--compare", "--max-new-tokens", 12, "abc")
    document, baseline = ran.document, ran.document["autoregressive"]
    assert ran.code == 0
    assert document["identical"] is True
    assert baseline["token_ids"] == document["token_ids"]
    assert baseline["policy"] == "autoregressive"
    assert baseline["drafter"] is None
    assert baseline["tokens_per_iteration"] == 1
    assert document["speedup"] == pytest.approx(document["tokens_per_second"] / baseline["tokens_per_second"])


@pytest.mark.slow
def test_json_is_all_that_a_process_prints_on_stdout(folders: SimpleNamespace) -> None:
    args = ["generate", *ON_CPU, "--json", "--compare", "--target", folders.plain, "--max-new-tokens", 4, "abc"]
    process = spawn(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert json.loads(out)["identical"] is True
    assert err == b""


# ---- the comparison ------------------------------------------------------------------------------------------


def test_comparison_in_the_table(generate: Dynatree) -> None:
    ran = generate("--compare", "--max-new-tokens", 12, "abc")
    assert ran.code == 0
    rows = [line.split() for line in ran.err.splitlines()]
    assert ["identical", "yes"] in rows
    assert any(row[:1] == ["speedup"] and row[1].endswith("×") for row in rows)
    assert "only an indication" in ran.err
    assert "autoregressive" in ran.err


def test_a_comparison_warms_up_without_a_trace(generate: Dynatree, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Session] = []

    class Noted(Session):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(session_module, "Session", Noted)
    document = generate("--compare", "--json", "--max-new-tokens", 12, "abc").document
    assert sorted(len(session.new_token_ids) for session in made) == [8, 12, 12]
    assert document["num_new_tokens"] == 12
    made.clear()
    generate("--max-new-tokens", 12, "abc")
    assert len(made) == 1


def test_tokens_that_differ_fail_the_comparison(generate: Dynatree, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Session):
        def result(self, stop_reason: str | None = None) -> Any:
            result = super().result(stop_reason)
            if self.drafter_name is None:
                result.token_ids[5] += 1
            return result

    monkeypatch.setattr(session_module, "Session", Wrong)
    ran = generate("--compare", "--max-new-tokens", 12, "abc")
    assert ran.code == 1
    assert ["identical", "no,", "from", "token", "5", "on"] in [line.split() for line in ran.err.splitlines()]
    assert generate("--compare", "--json", "--max-new-tokens", 12, "abc").code == 1


def test_an_interrupted_comparison_says_nothing(folders: SimpleNamespace) -> None:
    from dynatree_core import load_model

    session = Session(load_model(str(folders.plain)).model, None, [1, 2], policy="autoregressive", max_new_tokens=0)
    ended, cut = session.result(), attrs.evolve(session.result(), stop_reason="interrupted")
    assert Comparison(ended, ended).is_identical is True
    assert Comparison(ended, cut).is_identical is None
    assert Comparison(ended).is_identical is None
    assert "identical" not in list(report_table(Comparison(ended, cut)).columns[0].cells)


# ---- drafters ------------------------------------------------------------------------------------------------


def test_a_model_as_drafter(generate: Dynatree, folders: SimpleNamespace) -> None:
    args = ("--policy", "linear(depth=3)", "--dtype", "float64", "--json", "--max-new-tokens", 12, "abc")
    document = generate("--drafter", folders.plain, *args).document
    assert document["node_acceptance"] == 1
    assert document["tokens_per_iteration"] == 4
    assert document["drafter"] == f"model(model='{folders.plain}')"


def test_a_registered_drafter_with_parameters(generate: Dynatree) -> None:
    assert generate("--drafter", "prompt_lookup(max_matches=2)", "--max-new-tokens", 2, "abc").code == 0
    ran = generate("--drafter", "prompt_lookup(max_match=2)", "abc")
    assert ran.code == 2
    assert is_one_error_line(ran, "max_match", "did you mean 'max_matches'")


def test_a_misspelt_drafter_is_told_before_anything_is_loaded(dynatree: Dynatree) -> None:
    ran = dynatree("generate", "--target", "/nowhere", "--drafter", "promptlookup", "abc")
    assert ran.code == 2
    assert is_one_error_line(ran, "did you mean 'prompt_lookup'", "known are: adapter_off, distilled, model")


def test_a_drafter_that_is_neither_registered_nor_a_model(
    generate: Dynatree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "xyz").mkdir()
    ran = generate("--drafter", "xyz", "abc")
    assert ran.code == 1
    assert is_one_error_line(ran, "cannot load 'xyz'", "or name an installed drafter: adapter_off, distilled, model")


def test_vocabularies_that_disagree(generate: Dynatree, folders: SimpleNamespace) -> None:
    ran = generate("--drafter", folders.other, "abc")
    assert (ran.code, ran.out) == (2, "")
    assert is_one_error_line(ran, "must give every token the same id", "other")


# ---- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--policy", "phse3"], ["did you mean 'phase3'"]),
        (["--policy", "confidence(high=2)"], ["from 0 to 1"]),
        (["--policy", "confidence(hihg=0.5)"], ["did you mean 'high'"]),
        (["--policy", "confidence(high=)"], ["cannot read"]),
        (["--policy", ""], ["cannot read"]),
        (["--max-new-tokens", "-1"], ["--max-new-tokens", "dynatree generate --help"]),
        (["--max-new-tokens", "many"], ["--max-new-tokens"]),
        (["--max-new-tokens", "30000"], ["context of 20000"]),
        (["--max-depth", "-1"], ["--max-depth"]),
        (["--max-nodes", "1.5"], ["--max-nodes"]),
        (["--max-branch", "0"], ["--max-branch"]),
        (["--tau", "1.5"], ["--tau"]),
        (["--tau", "nan"], ["--tau", "nan is not a finite number"]),
        (["--max-time", "nan"], ["--max-time", "nan is not a finite number"]),
        (["--repetition-penalty", "inf"], ["--repetition-penalty", "inf is not a finite number"]),
        (["--stop", "x", "--stop", ""], ["--stop", "at least one character"]),
        (["--dtype", "int8"], ["--dtype", "float32"]),
        (["--on-error", "ignore"], ["--on-error"]),
        (["--cache", "sinks=4"], ["'sinks=4,window=1024'"]),
        (["--cache", "sinks=4,window=8", "--exact", "fixed_width"], ["exact='fixed_width'", "leave out"]),
        (["--chat"], ["--chat", "--raw"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["another prompt"], ["extra argument"]),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_code_2(generate: Dynatree, args: list[str], words: list[str]) -> None:
    ran = generate(*args, "abc")
    assert (ran.code, ran.out) == (2, "")
    assert is_one_error_line(ran, *words)


def test_a_share_that_is_no_number(dynatree: Dynatree) -> None:
    assert is_one_error_line(dynatree("chat", "--top-p", "nan"), "--top-p", "nan is not a finite number")


def test_an_empty_prompt(generate: Dynatree, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = generate("")
    assert ran.code == 2
    assert is_one_error_line(ran, "at least one character")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert generate("-").code == 2


def test_a_prompt_that_is_not_text(generate: Dynatree, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = generate(os.fsdecode(b"caf\xe9"))  # what Python makes of an argument in Latin-1
    assert ran.code == 2
    assert is_one_error_line(ran, "UTF-8")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert is_one_error_line(generate("-"), "UTF-8")


def test_no_command_is_help_and_a_wrong_one_is_a_mistake(dynatree: Dynatree) -> None:
    assert dynatree().out == dynatree("--help").out
    assert dynatree().code == 0
    ran = dynatree("generat")
    assert (ran.code, ran.out) == (2, "")
    assert is_one_error_line(ran, "generat", "dynatree --help")
    assert dynatree("generate").code == 2


def test_calibrate(dynatree: Dynatree, folders: SimpleNamespace) -> None:
    models_ = ("--target", folders.plain, "--drafter", folders.plain, "--rounds", "1")
    document = dynatree("calibrate", "--json", *ON_CPU, *models_).document
    assert document["device"] == "cpu"
    verify, draft = document["costs"]["verify"], document["costs"]["draft"]
    assert verify["seconds"] == sorted(verify["seconds"])
    assert (verify["at"][0], draft["at"][0]) == (1, 1)
    ran = dynatree("calibrate", *ON_CPU, "--target", folders.plain, "--rounds", "1")
    assert ran.code == 0
    for expected in ("target's pass, by rows", "drafter's level, by nodes", "rest of an iteration", "kept in "):
        assert expected in ran.out


def test_calibrate_where_nothing_can_be_kept(
    dynatree: Dynatree, folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("dynatree_core.costs.folder", lambda: tmp_path / "file" / "costs")
    ran = dynatree("calibrate", *ON_CPU, "--target", folders.plain, "--drafter", "prompt_lookup", "--rounds", "1")
    assert ran.code == 0
    assert "kept in" not in ran.out
    warned = ran.err.splitlines()
    assert warned
    assert all(line.startswith("dynatree: warning: measured costs cannot be kept") for line in warned)


@pytest.mark.parametrize(
    "command",
    [
        *([], ["generate"], ["policies"], ["drafters"], ["new-policy"], ["new-drafter"], ["models"]),
        *(["models", "install"], ["calibrate"], ["completion"]),
    ],
)
def test_help(dynatree: Dynatree, command: list[str]) -> None:
    ran = dynatree(*command, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert "Usage: dynatree" in ran.out
    if command in ([], ["generate"]):
        assert '\n    dynatree generate "' in ran.out, "examples keep their lines"


def test_version(dynatree: Dynatree) -> None:
    assert dynatree("--version").out.split()[0] == "dynatree"


# ---- failures ------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there(dynatree: Dynatree, tmp_path: Path) -> None:
    ran = dynatree("generate", "--json", "--target", tmp_path / "nowhere", "abc")
    assert (ran.code, ran.out) == (1, "")
    assert is_one_error_line(ran, "nowhere")


def test_a_target_without_tokenizer(dynatree: Dynatree, folders: SimpleNamespace) -> None:
    ran = dynatree("generate", "--target", folders.mute, "abc")
    assert ran.code == 2
    assert is_one_error_line(ran, "tokenizer")


@pytest.mark.usefixtures("more_plugins")
def test_a_failure_midway_keeps_what_was_committed(generate: Dynatree) -> None:
    whole = generate("--json", "--max-new-tokens", 20, "abc").document
    ran = generate("--policy", "mishap", "--max-new-tokens", 20, "abc")
    document = generate("--policy", "mishap", "--max-new-tokens", 20, "--json", "abc").document
    assert ran.code == 1
    assert ran.err.splitlines()[-1].startswith("dynatree: error: policy 'mishap', hook on_iteration_end: raised")
    assert "two lines" in ran.err
    assert document["stop_reason"] == "error"
    assert 4 <= document["num_new_tokens"] < 20
    assert document["token_ids"] == whole["token_ids"][: document["num_new_tokens"]]
    assert ran.out.rstrip("\n") == document["text"].rstrip("\n")


@pytest.mark.usefixtures("more_plugins")
def test_a_failure_at_once_is_the_error_alone(generate: Dynatree) -> None:
    ran = generate("--policy", "mishap(at=0)", "--max-new-tokens", 20, "abc")
    assert len(ran.err.splitlines()) > 1, "a token was committed"
    ran = generate("--drafter", "broken", "abc")
    assert (ran.code, ran.out) == (1, "")
    assert is_one_error_line(ran, "drafter 'broken' raised ValueError: no draft")


def test_a_runner_that_is_not_here_is_the_error_alone(generate: Dynatree) -> None:
    ran = generate("--runner", "cudagraph", "abc")
    assert (ran.code, ran.out) == (2, "")
    assert is_one_error_line(ran, "the cudagraph runner is for models on a CUDA GPU, got one on cpu")


@pytest.mark.usefixtures("more_plugins")
def test_fallback_goes_on_with_a_warning_of_one_line(generate: Dynatree) -> None:
    args = ("--policy", "mishap", "--on-error", "fallback", "--max-new-tokens", 20)
    ran = generate(*args, "--json", "--compare", "abc")
    assert ran.code == 0
    assert ran.document["identical"] is True
    assert ran.document["num_new_tokens"] == 20
    [line] = ran.err.splitlines()
    assert line.startswith("dynatree: warning: drafting is off")
    assert "two lines" in line
    in_text = generate(*args, "abc")
    assert in_text.err.splitlines()[0] == line, "the warning comes before the table"
    assert in_text.out.rstrip("\n") == ran.document["text"].rstrip("\n")


def test_what_nobody_foresaw_is_a_line_too(generate: Dynatree, monkeypatch: pytest.MonkeyPatch) -> None:
    def burst(text: str) -> None:
        raise LookupError(f"no\n{text}")

    monkeypatch.setattr(plugins_module, "build_stack", burst)
    ran = generate("abc")
    assert ran.code == 1
    assert is_one_error_line(ran, "unexpected LookupError: no phase3", "DYNATREE_DEBUG=1")
    monkeypatch.setenv("DYNATREE_DEBUG", "1")
    with pytest.raises(LookupError):
        main(["generate", "abc"])


def test_warnings_of_libraries_are_folded_as_well(generate: Dynatree, monkeypatch: pytest.MonkeyPatch) -> None:
    build = plugins_module.build_stack

    def warn(text: str) -> Any:
        warnings.warn("so\nit is", UserWarning, stacklevel=2)
        return build(text)

    monkeypatch.setattr(plugins_module, "build_stack", warn)
    assert generate("--max-new-tokens", 1, "--json", "abc").err == "dynatree: warning: so it is\n"


# ---- interrupts ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("more_plugins")
def test_an_interrupt_leaves_a_document(generate: Dynatree) -> None:
    whole = generate("--json", "--max-new-tokens", 20, "abc").document
    ran = generate("--json", "--policy", "mishap(raises=0)", "--max-new-tokens", 20, "abc")
    assert ran.code == 130
    assert ran.document["stop_reason"] == "interrupted"
    assert 4 <= len(ran.document["token_ids"]) < 20
    assert ran.document["token_ids"] == whole["token_ids"][: len(ran.document["token_ids"])]


@pytest.mark.usefixtures("more_plugins")
def test_an_interrupt_leaves_the_text(generate: Dynatree) -> None:
    document = generate("--json", "--policy", "mishap(raises=0)", "--max-new-tokens", 20, "abc").document
    ran = generate("--policy", "mishap(raises=0)", "--max-new-tokens", 20, "abc")
    assert ran.code == 130
    assert ran.out.rstrip("\n") == document["text"].rstrip("\n")
    assert ran.out.endswith("\n")
    assert "interrupted" in ran.err


def test_an_interrupt_while_loading(generate: Dynatree, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str | None, **options: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("dynatree_core.models.load.load_model", interrupted)
    ran = generate("abc")
    assert (ran.code, ran.out) == (130, "")
    assert "Traceback" not in ran.err
    ran = generate("--json", "--compare", "abc")
    assert ran.code == 130
    assert ran.document["stop_reason"] == "interrupted"
    assert ran.document["token_ids"] == []
    assert ran.document["tokens_per_second"] is None
    assert ran.document["autoregressive"] is None


@pytest.mark.slow
def test_an_interrupt_while_torch_is_imported(tmp_path: Path) -> None:
    """It leaves torch half imported, and a second import of it raises something else."""
    (tmp_path / "torch.py").write_text(
        "import sys\n"
        "again, sys.interrupted = hasattr(sys, 'interrupted'), True\n"
        "raise AttributeError('partially initialized') if again else KeyboardInterrupt\n"
    )
    process = spawn(
        "generate", "--json", "abc", stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PYTHONPATH": str(tmp_path)}
    )
    out, err = process.communicate()
    assert (process.returncode, out, err.strip()) == (130, b"", b"")


def test_an_interrupt_elsewhere(dynatree: Dynatree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynatree_core.models.embedded.describe", lambda: signal.raise_signal(signal.SIGINT))
    ran = dynatree("models")
    assert (ran.code, ran.out) == (130, "")
    assert "Traceback" not in ran.err


def test_an_interrupt_while_a_step_is_shown_waits_for_its_end(capfd: pytest.CaptureFixture[str]) -> None:
    def decode(token_ids: list[int], **options: bool) -> str:
        if token_ids == [0]:
            signal.raise_signal(signal.SIGINT)
        return "".join(map(chr, (97 + token for token in token_ids)))

    answer = Answer(SimpleNamespace(decode=decode))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        answer.show([0, 1, 2], num_accepted=2)
    answer.finish([0, 1, 2, 3])
    assert capfd.readouterr().out == "abcd\n"


def spawn(*args: object, **options: Any) -> subprocess.Popen[bytes]:
    """The command in a process of its own."""
    code = "from dynatree_core.cli.main import main; main()"
    environment = {**os.environ, "TERM": "xterm", **options.pop("env", {})}
    environment.pop("NO_COLOR", None)
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=environment, **options)


@pytest.mark.slow
def test_sigint_in_a_pipe(folders: SimpleNamespace, generate: Dynatree) -> None:
    args = ("--ignore-eos", "--policy", "autoregressive", "--max-new-tokens", 15_000, "abc")
    process = spawn(
        "generate", *ON_CPU, "--target", folders.plain, *args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    assert process.stdout is not None
    start = process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert b"interrupted" in err
    shown = (start + rest).decode().removesuffix("\n").rstrip(REPLACEMENT)
    whole = generate("--json", "--max-new-tokens", 400, "--policy", "autoregressive", "abc").document["text"]
    whole = whole.rstrip(REPLACEMENT)
    assert len(shown) > 3
    assert shown.startswith(whole) or whole.startswith(shown)


@pytest.mark.slow
def test_sigint_in_a_terminal(folders: SimpleNamespace) -> None:
    args = ("generate", "--target", folders.plain, "--drafter", folders.plain, "--policy", "linear", "--ignore-eos")
    master, slave = os.openpty()
    process = spawn(*args, "--max-new-tokens", 15_000, "abc", stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    seen = b""
    for piece in read_terminal(master):
        seen += piece
        if GREEN.encode() in seen and process.poll() is None:
            process.send_signal(signal.SIGINT)
            break
    seen += b"".join(read_terminal(master))
    os.close(master)
    assert process.wait(timeout=120) == 130
    text = seen.decode(errors="replace")
    assert "Traceback" not in text
    assert "loading" in text, "a spinner says what is being waited for"
    assert text.rfind(SHOW_CURSOR) > text.rfind(HIDE_CURSOR) >= 0
    assert text.rfind(RESET) > text.rfind(GREEN)
    assert "drafted and accepted" in text
    assert text.removesuffix(SHOW_CURSOR).endswith("\n")


def read_terminal(master: int) -> Iterator[bytes]:
    """What comes from a pseudo-terminal until its other end is closed, which Linux reports as an error."""
    while True:
        try:
            piece = os.read(master, 65_536)
        except OSError:
            return
        if not piece:
            return
        yield piece


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error(folders: SimpleNamespace) -> None:
    args = ("generate", "--target", folders.plain, "--ignore-eos", "--max-new-tokens", 15_000, "abc")
    process = spawn(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(5)
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=120)
    assert process.returncode == UNREAD
    assert err == b""


# ---- colours -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("is_terminal", "environment", "is_coloured"),
    [
        (True, {"TERM": "xterm"}, True),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {"TERM": "xterm"}, False),
        (False, {"TERM": "xterm", "FORCE_COLOR": "1"}, False),
    ],
)
def test_colours_where_the_terminal_allows_them(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folders: SimpleNamespace,
    is_terminal: bool,
    environment: dict[str, str],
    is_coloured: bool,
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    options = ["--drafter", str(folders.plain), "--policy", "linear(depth=3)", "--ignore-eos", "--max-new-tokens", "8"]
    with pytest.raises(SystemExit):
        main(["generate", "--target", str(folders.plain), *options, "abc"])
    out, err = capsys.readouterr()
    assert (GREEN in out) == is_coloured
    assert out.count(GREEN) == out.count(RESET)
    assert ("drafted and accepted" in err) == is_coloured
    if not is_coloured:
        assert "\x1b" not in out


def test_accepted_tokens_are_green_and_the_bonus_token_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    tree, esc = "🌲".encode(), 0x1B
    tokenizer = for_transformers(byte_level_tokenizer())
    ids = {byte: tokenizer.convert_tokens_to_ids(char) for byte, char in byte_to_char().items()}
    answer = Answer(tokenizer)
    answer.show([ids[byte] for byte in b"ab" + tree[:2]], num_accepted=3)
    answer.show([ids[byte] for byte in tree[2:] + b"c"], num_accepted=2)
    answer.show([ids[esc], ids[ord("d")]], num_accepted=0)
    answer.finish([0] * 9)
    assert capsys.readouterr().out == f"{GREEN}ab{RESET}{GREEN}🌲{RESET}c␛d\n"


def test_a_pipe_gets_control_characters_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    answer = Answer(SimpleNamespace(decode=lambda token_ids, **options: "\x1b[31m"[: len(token_ids)]))  # type: ignore
    answer.show(range(5), num_accepted=2)
    answer.finish(range(5))
    assert capsys.readouterr().out == "\x1b[31m\n"


def byte_to_char() -> dict[int, str]:
    """The character that stands for each byte in a byte-level vocabulary."""
    return {
        byte: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(byte))[0][0]
        for byte in [*range(0x80)]
    } | {0xF0: "ð", 0x9F: "Ł", 0x8C: "Į", 0xB2: "²"}


# ---- text from tokens ----------------------------------------------------------------------------------------

PLAIN = for_transformers(byte_level_tokenizer())
MERGED = for_transformers(byte_level_tokenizer(num_merges=120))
FALLBACK = for_transformers(byte_fallback_tokenizer())
LONG_TEXT = st.lists(st.sampled_from([*SAMPLES, " ", "\n"]), min_size=8, max_size=40).map("".join)


@pytest.mark.parametrize("tokenizer", [PLAIN, MERGED], ids=["bytes", "merged"])
@given(text=LONG_TEXT | st.text(max_size=120))
def test_incremental_text_is_the_text_so_far(tokenizer: Any, text: str) -> None:
    shown, incremental = "", IncrementalText(tokenizer.decode)
    token_ids = tokenizer.encode(text)
    for num, token in enumerate(token_ids, start=1):
        shown += incremental.push(token)
        assert shown == tokenizer.decode(token_ids[:num]).rstrip(REPLACEMENT)
    shown += incremental.finish()
    assert shown == tokenizer.decode(token_ids) == text


@given(token_ids=st.lists(st.integers(0, len(MERGED) - 1), max_size=150))
def test_incremental_text_of_any_bytes(token_ids: list[int]) -> None:
    incremental = IncrementalText(MERGED.decode)
    pieces = [incremental.push(token) for token in token_ids]
    assert "".join(pieces) + incremental.finish() == MERGED.decode(token_ids)


@given(text=st.text(alphabet="abcdefghé 日🌲", max_size=120))
@example(text="日" * 60)  # one run of bytes, in which the window would begin within a character
def test_incremental_text_with_byte_fallback(text: str) -> None:
    incremental = IncrementalText(FALLBACK.decode)
    token_ids = FALLBACK.encode(text)
    pieces = [incremental.push(token) for token in token_ids]
    assert "".join(pieces) + incremental.finish() == FALLBACK.decode(token_ids) == text


def test_incremental_text_forgets_what_is_settled() -> None:
    lengths = []

    def decode(token_ids: list[int]) -> str:
        lengths.append(len(token_ids))
        return str(MERGED.decode(token_ids))

    incremental = IncrementalText(decode)
    for token in MERGED.encode("plain words again and again, " * 20):
        incremental.push(token)
    assert max(lengths) <= 40


# ---- lists ---------------------------------------------------------------------------------------------------


def test_policies_and_presets(dynatree: Dynatree) -> None:
    rows = {row["name"]: row for row in dynatree("policies", "--json").document}
    assert rows["phase3"]["kind"] == "preset"
    assert rows["phase3"]["expands_to"] == "confidence+dynamic_depth+history"
    assert rows["phase3"]["description"] == "= confidence+dynamic_depth+history"
    confidence = rows["confidence"]
    assert confidence["kind"] == "policy"
    assert confidence["package"] == "dynatree"
    assert confidence["hooks"] == ["branch_factor"]
    assert confidence["parameters"]["high"] == 0.9
    assert confidence["variants"]["plan"]["high"] == 0.8
    assert confidence["description"].startswith("Few children")
    assert all(row["error"] is None for row in rows.values())
    ran = dynatree("policies")
    assert ran.code == 0
    for name in rows:
        assert name in ran.out
    for detail in ("high=0.9", ":plan", "branch_factor", "dynatree 0", "= confidence+dynamic_depth+history"):
        assert detail in ran.out


def test_drafters(dynatree: Dynatree) -> None:
    rows = {row["name"]: row for row in dynatree("drafters", "--json").document}
    assert rows["prompt_lookup"]["parameters"] == {"max_ngram": 8, "max_matches": 16}
    assert rows["model"]["required"] == ["model"]
    ran = dynatree("drafters")
    assert "max_ngram=8" in ran.out
    assert "model (required)" in ran.out


@pytest.mark.usefixtures("more_plugins")
def test_a_broken_plugin_hides_no_other(dynatree: Dynatree) -> None:
    rows = {row["name"]: row for row in dynatree("policies", "--json").document}
    assert rows["confidence"]["error"] is None
    assert "no_such_module" in rows["absent"]["error"]
    assert "did you mean 'branch_factor'" in rows["misspelt"]["error"]
    assert rows["wrong"]["error"] is not None
    assert "what" in rows["demanding"]["error"]
    assert rows["demanding"]["description"] == "A policy that cannot be made from nothing."
    assert rows["demanding"]["parameters"] == {"what": None, "size": 3}
    [twin] = [row for row in dynatree("drafters", "--json").document if row["name"] == "twin"]
    assert "must be unique" in twin["error"]
    for command in ("policies", "drafters"):
        ran = dynatree(command)
        assert (ran.code, ran.err) == (0, "")
        assert "cannot be used" in ran.out


def test_commands_of_other_packages(dynatree: Dynatree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "rotten.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    found = EntryPoints(
        [
            EntryPoint("plant", f"{__name__}:plant", cli.COMMANDS),
            EntryPoint("felled", "no_such_module:felled", cli.COMMANDS),
            EntryPoint("rotten", "rotten:command", cli.COMMANDS),
            EntryPoint("stone", "os:sep", cli.COMMANDS),
            EntryPoint("twice", "one:command", cli.COMMANDS),
            EntryPoint("twice", "two:command", cli.COMMANDS),
        ]
    )
    monkeypatch.setattr(cli, "entry_points", lambda **wanted: found.select(**wanted))
    ran = dynatree("plant", "--help")
    assert (ran.code, ran.err) == (0, "")
    assert "Plant a tree." in ran.out
    ran = dynatree("felled")
    assert is_one_error_line(ran, "felled", "no_such_module")
    assert is_one_error_line(dynatree("twice"), "one package")
    assert is_one_error_line(dynatree("rotten"), "ZeroDivisionError", "uninstall its package, rotten:command")
    assert is_one_error_line(dynatree("stone"), "must be a click command, got '/'")
    ran = dynatree("--help")
    assert ran.code == 0
    assert "Plant a tree." in ran.out
    assert "broken: ModuleNotFoundError: No module named" in ran.out


@click.command()
def plant() -> None:
    """Plant a tree."""


# ---- the embedded model --------------------------------------------------------------------------------------


def embedded_model(folder: Path, *, installed: bool, converted: bool) -> EmbeddedModel:
    return EmbeddedModel("Tiny", "llm-tiny", "1.2", "Apache-2.0", installed, converted, folder, 541_000_000 * converted)


@pytest.mark.parametrize(("installed", "converted"), [(False, False), (True, False), (True, True), (False, True)])
def test_models(
    dynatree: Dynatree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: bool, converted: bool
) -> None:
    model = embedded_model(tmp_path, installed=installed, converted=converted)
    monkeypatch.setattr("dynatree_core.models.embedded.describe", lambda: model)
    ran = dynatree("models")
    assert (ran.code, ran.err) == (0, "")
    for detail in ("Tiny", "llm-tiny 1.2", "Apache-2.0", str(tmp_path)):
        assert detail in ran.out
    assert ("not installed" in ran.out) == (not installed)
    assert ("541 MB" in ran.out) == converted
    assert ("dynatree models install" in ran.out) == (not converted)


def test_models_names_the_damage(dynatree: Dynatree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = attrs.evolve(embedded_model(tmp_path, installed=False, converted=False), damage="weights are missing")
    monkeypatch.setattr("dynatree_core.models.embedded.describe", lambda: model)
    ran = dynatree("models")
    assert (ran.code, ran.err) == (0, "")
    assert "no: weights are missing" in ran.out
    assert "dynatree models install" in ran.out


def test_models_install(dynatree: Dynatree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def make_ready(*, progress: Callable[[str], None]) -> Path:
        progress("converting")
        return tmp_path

    model = embedded_model(tmp_path, installed=True, converted=False)
    monkeypatch.setattr("dynatree_core.models.embedded.describe", lambda: model)
    monkeypatch.setattr("dynatree_core.models.embedded.make_ready", make_ready)
    ran = dynatree("models", "install")
    assert (ran.code, ran.err) == (0, "")
    *times, last = ran.out.splitlines()
    assert last == f"Tiny is ready in {tmp_path}"
    assert [re.sub(r": \d+\.\d s$", "", line) for line in times] == ["converting"]
    monkeypatch.setattr("dynatree_core.models.embedded.make_ready", lambda *, progress: tmp_path)
    ran = dynatree("models", "install")
    assert (ran.code, ran.out, ran.err) == (0, f"Tiny is ready in {tmp_path}\n", "")


# ---- the audit -----------------------------------------------------------------------------------------------


@pytest.fixture
def audit(dynatree: Dynatree, folders: SimpleNamespace) -> Dynatree:
    """Runs `dynatree audit` on the plain model, past the end-of-text token."""

    def run(*args: object) -> Ran:
        return dynatree("audit", *ON_CPU, "--target", folders.plain, "--ignore-eos", "--max-new-tokens", 20, *args)

    return run


def test_audit_of_a_generation(audit: Dynatree, generate: Dynatree) -> None:
    ran = audit("abc")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("identical to autoregressive decoding (20 tokens)\n")
    for label in ("bound", "float32", "within the bound", "as verified", "tokens / iteration"):
        assert label in ran.out
    document = audit("--json", "--exact", "fixed_width", "--dtype", "bfloat16", "abc").document
    assert document["verdict"] in ("identical", "tie")
    assert (document["num_outputs"], document["num_rows"], document["dtype"]) == (1, 16, "bfloat16")
    rounding = document["rounding"]
    assert document["bound"] == max(rounding["deviation"], 10 * rounding["spread"], 2 * rounding["spacing"])
    assert len(document["audits"][0]["token_ids"]) == document["num_positions"] == 20
    whole = generate("--json", "--exact", "fixed_width", "--dtype", "bfloat16", "--max-new-tokens", 20, "abc").document
    assert whole["exact"] == "fixed_width"
    assert document["audits"][0]["token_ids"] == whole["token_ids"]
    assert document["audits"][0]["prompt_ids"] == whole["prompt_ids"]


def test_audit_of_prompts(audit: Dynatree, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("abc", "def", "ghi")))
    document = audit("--json", "--prompts", path, "--limit", 2).document
    assert (document["num_outputs"], document["num_identical"], document["num_differing"]) == (2, 2, 0)
    assert document["rounding"]["num_positions"] == document["num_positions"] == 40
    assert document["smallest_gap"] is None
    ran = audit("--prompts", path)
    assert ran.code == 0
    assert ran.out.splitlines()[0].split() == ["outputs", "3"]
    path.write_text('{"prompt": "abc"}\n{"text": "abc"}\n')
    ran = audit("--prompts", path)
    assert ran.code == 2
    assert is_one_error_line(ran, "line 2", 'must have a "prompt"')
    path.write_text("")
    assert is_one_error_line(audit("--prompts", path), "at least one prompt", "got none")
    path.write_text('{"prompt": "a\u2028b"}\n\n{"prompt": "abc"}\n \n', encoding="utf-8")  # no line ends at U+2028
    assert audit("--json", "--prompts", path, "--num-prompts", "all").document["num_outputs"] == 2
    for wrong_prompt in (None, 7, ""):
        path.write_text(json.dumps({"prompt": wrong_prompt}))
        assert is_one_error_line(audit("--prompts", path), "line 1", '"prompt" must')
    path.write_bytes(b"caf\xe9")
    for wrong in (path, tmp_path, tmp_path / "nowhere"):
        ran = audit("--prompts", wrong)
        assert ran.code == 2
        assert is_one_error_line(ran)


def test_audit_of_an_output(audit: Dynatree, generate: Dynatree, tmp_path: Path) -> None:
    path = tmp_path / "answer.json"
    document = generate("--json", "--dtype", "float64", "--max-new-tokens", 12, "abc").document
    path.write_text(json.dumps(document))
    ran = audit("--output", path, "--json")
    assert ran.code == 0
    assert ran.document["verdict"] == "identical"
    assert ran.document["dtype"] == "float64", "the output's own, where none is asked for"
    assert ran.document["num_positions"] == 12
    assert ran.document["tokens_per_iteration"] is None
    wrong = [*document["token_ids"][:7], (document["token_ids"][7] + 1) % 200, *document["token_ids"][8:]]
    path.write_text(json.dumps(document | {"token_ids": wrong}))
    ran = audit("--output", path)
    assert ran.code == 1
    assert ran.out.startswith("first difference at token 7 of 12: bug\n")
    assert f"expected {document['token_ids'][7]} " in ran.out
    assert "beyond the bound" in ran.out
    ran = audit("--output", path, "--json", "--dtype", "float32", "--reference-dtype", "float64")
    assert ran.code == 1
    first = ran.document["audits"][0]["differences"][0]
    assert (first["position"], first["token_id"], first["verdict"]) == (7, wrong[7], "bug")
    assert "transformers, all rows, float64" in first["logits"]


def test_audit_of_an_output_knows_how_it_was_made(
    dynatree: Dynatree, generate: Dynatree, folders: SimpleNamespace, tmp_path: Path
) -> None:
    """Its target, end tokens and width of passes come from the file; another target is refused."""
    path, width = tmp_path / "answer.json", ("--exact", "fixed_width", "--max-nodes", 7)
    [end] = generate("--json", "--max-new-tokens", 1, "abc").document["token_ids"]
    target = shutil.copytree(folders.plain, tmp_path / "target")
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    made = dynatree(
        "generate", *ON_CPU, "--json", "--target", target, "--ignore-eos", "--max-new-tokens", 8, *width, "abc"
    )
    path.write_text(made.out)
    ran = dynatree("audit", *ON_CPU, "--json", "--output", path)
    assert (ran.code, ran.document["target"], ran.document["num_rows"]) == (0, str(target), 8)
    path.write_text(json.dumps(made.document | {"ignore_eos": False}))
    assert "goes on after token 0" in dynatree("audit", *ON_CPU, "--output", path).out
    same = target / ".." / "target"
    assert dynatree("audit", *ON_CPU, "--ignore-eos", "--target", same, "--output", path).code == 0
    ran = dynatree("audit", *ON_CPU, "--target", folders.plain, "--output", path)
    assert ran.code == 2
    assert is_one_error_line(ran, f"made by, '{target}', got --target '{folders.plain}'", "leave --target out")


@pytest.mark.parametrize("way", ["option", "generation config"])
def test_audit_of_changed_logits_is_refused(
    dynatree: Dynatree, folders: SimpleNamespace, tmp_path: Path, way: str
) -> None:
    path, target = tmp_path / "answer.json", folders.plain
    options: list[object] = ["--no-repeat-ngram-size", 1]
    if way == "generation config":
        target, options = shutil.copytree(target, tmp_path / "target"), []
        (target / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5}))
    made = dynatree("generate", *ON_CPU, "--json", "--target", target, *options, "--max-new-tokens", 4, "abc")
    path.write_text(made.out)
    [name] = made.document["logits_processors"]
    ran = dynatree("audit", *ON_CPU, "--output", path)
    assert ran.code == 2
    assert is_one_error_line(ran, f"changed by {name} (--repetition-penalty", "generate --compare")


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"token_ids": ["a"]}, 'a list of whole numbers as "token_ids"'),
        ({"token_ids": 7}, 'a list of whole numbers as "token_ids"'),
        ({"token_ids": None}, '"token_ids", or at least "text"'),
        ({"prompt_ids": "abc"}, 'a list of whole numbers as "prompt_ids"'),
        ({"dtype": 7}, 'a dtype as "dtype"'),
        ({"target": 7}, 'a model as "target"'),
        ({"exact": "yes"}, '"fixed_width" or null as "exact"'),
        ({"max_nodes": -1}, 'a whole number as "max_nodes"'),
        ({"ignore_eos": 1}, 'true or false as "ignore_eos"'),
        ({"logits_processors": 7}, 'a list of names as "logits_processors"'),
    ],
    ids=str,
)
def test_an_output_with_something_wrong_in_it(
    audit: Dynatree, tmp_path: Path, wrong: dict[str, object], expected: str
) -> None:
    path = tmp_path / "answer.json"
    path.write_text(json.dumps({"prompt_ids": [1, 2], "token_ids": [5, 6]} | wrong))
    ran = audit("--output", path)
    assert ran.code == 2
    assert is_one_error_line(ran, f"{path} must ", expected)


def test_an_output_that_is_not_there(audit: Dynatree, tmp_path: Path) -> None:
    ran = audit("--output", tmp_path / "nowhere.json")
    assert is_one_error_line(ran, "must be a file that can be read", "check the path")
    assert "JSON" not in ran.err


def test_audit_of_a_text(audit: Dynatree, generate: Dynatree, folders: SimpleNamespace, tmp_path: Path) -> None:
    """Of an output by another program, without token ids."""
    path = tmp_path / "answer.json"
    token_ids = folders.tokenizer("some words").input_ids
    path.write_text(json.dumps({"text": "some words"}))
    ran = audit("--output", path, "--json", "abc")
    assert "its text is cut into tokens again" in ran.err
    assert ran.document["audits"][0]["token_ids"] == token_ids
    assert ran.document["audits"][0]["prompt_ids"] == folders.tokenizer("abc").input_ids
    assert ran.code == 1, "a random model does not say this"
    assert is_one_error_line(audit("--output", path), "needs its PROMPT on the command line")
    for wrong in ("{", "[1, 2]", '{"tokens": []}'):
        path.write_text(wrong)
        ran = audit("--output", path)
        assert ran.code == 2
        assert is_one_error_line(ran, "`dynatree generate --json`")


def test_audit_wants_one_source(audit: Dynatree, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "abc"}\n')
    for args in ([], ["--prompts", path, "abc"], ["--prompts", path, "--output", path]):
        ran = audit(*args)
        assert ran.code == 2
        assert is_one_error_line(ran, "give either PROMPT, --prompts or --output")


def test_an_interrupted_audit_tells_what_it_has(
    audit: Dynatree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynatree_core.cli import audit_report as audit_cli_module

    real, done = audit_cli_module.audit_generation, []

    def interrupted(*args: Any, **options: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(real(*args, **options))
        return done[-1]

    monkeypatch.setattr(audit_cli_module, "audit_generation", interrupted)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "abc"}\n' * 4)
    ran = audit("--json", "--prompts", path)
    assert ran.code == 130
    assert ran.document["num_outputs"] == 2
    ran = audit("--json", "abc")
    assert (ran.code, ran.out) == (130, "")


def test_comparing_in_half_precision_points_to_the_audit(generate: Dynatree, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("--compare", "--json", "--max-new-tokens", 4, "abc")
    assert generate("--dtype", "bfloat16", *args).document["identical"] is True
    original = session_module.Session.result

    def another(session: Session, *args: Any) -> Any:
        result = original(session, *args)
        return attrs.evolve(result, token_ids=[*result.token_ids, 0]) if session.drafter_name else result

    monkeypatch.setattr(session_module.Session, "result", another)
    ran = generate("--dtype", "bfloat16", *args)
    assert ran.code == 1
    assert (
        ran.err
        == "dynatree: note: half precision rounds; `dynatree audit` tells whether that explains the difference\n"
    )
    assert generate("--dtype", "float32", *args).err == ""
