"""Runs the `dynatree` command in tests: tiny models, their tokenizers, plugins that fail, and what was printed."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dynatree_core import Drafter, DraftPlan, DraftState, Proposals, StepReport, TokenTree, count, hookimpl
from dynatree_core.cli.group import main
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


def run_command(capture: pytest.CaptureFixture[str], *args: object) -> Ran:
    """Run `dynatree` in this process; what was printed before is not part of what it leaves behind."""
    capture.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    captured = capture.readouterr()
    assert isinstance(ended.value.code, int)
    return Ran(ended.value.code, captured.out, captured.err)


Dynatree = Callable[..., Ran]


@pytest.fixture
def dynatree(capfd: pytest.CaptureFixture[str]) -> Dynatree:
    """Runs the command in this process; file descriptors are captured, so what libraries print is seen too."""
    return functools.partial(run_command, capfd)


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


@pytest.fixture
def audit(dynatree: Dynatree, folders: SimpleNamespace) -> Dynatree:
    """Runs `dynatree audit` on the plain model, past the end-of-text token."""

    def run(*args: object) -> Ran:
        return dynatree("audit", *ON_CPU, "--target", folders.plain, "--ignore-eos", "--max-new-tokens", 20, *args)

    return run


def spawn(*args: object, **options: Any) -> subprocess.Popen[bytes]:
    """The command in a process of its own."""
    code = "from dynatree_core.cli.group import main; main()"
    environment = {**os.environ, "TERM": "xterm", **options.pop("env", {})}
    environment.pop("NO_COLOR", None)
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=environment, **options)


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
