"""Runs `dynatree chat` in tests: its models, and the answers that are expected."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import ON_CPU, TEMPLATE, Ran, byte_level_tokenizer, for_transformers, run_command, save_model

from dynatree_core import PrefixCache, generate, load_model
from dynatree_core.conversation import Conversation
from dynatree_core.text.stream import decode_text

# as many checkpoints' own: a system's message may stand first, and roles alternate
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + TEMPLATE.removeprefix("{% for m in messages %}")
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Models that never end a text by themselves: with a chat template, a strict one, none, and a short context."""
    root = tmp_path_factory.mktemp("models")

    def save(name: str, template: str | None, *, context: int = 20_000, seed: int = 0) -> Path:
        folder = root / name
        save_model(folder, for_transformers(byte_level_tokenizer(), chat_template=template), seed=seed)
        for file in ("config.json", "generation_config.json"):
            settings = json.loads((folder / file).read_text()) | {"eos_token_id": None}
            if file == "config.json":
                settings["max_position_embeddings"] = context
            (folder / file).write_text(json.dumps(settings))
        return folder

    return SimpleNamespace(
        plain=save("plain", TEMPLATE),
        strict=save("strict", STRICT),
        mute=save("mute", None),
        short=save("short", TEMPLATE, context=120),
        drafter=save("drafter", TEMPLATE, seed=1),
    )


@pytest.fixture
def say(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folders: SimpleNamespace
) -> Callable[..., Ran]:
    """Runs `dynatree chat` with these lines on standard input."""

    def run(*lines: str | bytes, args: tuple[object, ...] = (), target: object = None) -> Ran:
        data = b"".join(line if isinstance(line, bytes) else f"{line}\n".encode() for line in lines)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        return run_command(capfd, "chat", *ON_CPU, "--target", target or folders.plain, "--max-new-tokens", 12, *args)

    return run


@pytest.fixture
def conversation(folders: SimpleNamespace) -> Conversation:
    loaded = load_model(str(folders.plain), device="cpu", dtype="float64")
    assert loaded.tokenizer is not None
    return Conversation(
        target=loaded,
        tokenizer=loaded.tokenizer,
        drafter="prompt_lookup",
        drafter_name="prompt_lookup",
        policy="phase3",
        max_new_tokens=20,
        prefix_cache=PrefixCache(),
    )


def expected_answers(folder: Path, *said: str, system: str | None = None, **options: Any) -> list[str]:
    """What generation without a prefix cache and without drafting answers, turn by turn."""
    loaded = load_model(str(folder), device="cpu", dtype="float32")
    tokenizer: Any = loaded.tokenizer
    messages = [{"role": "system", "content": system}] if system else []
    answers = []
    for number, text in enumerate(said):
        messages.append({"role": "user", "content": text})
        prompt = tokenizer(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ).input_ids
        asked = {**options, "seed": options["seed"] + number} if "seed" in options else options
        result = generate(loaded.model, None, prompt, policy="autoregressive", max_new_tokens=12, **asked)
        answers.append(decode_text(tokenizer, result.token_ids))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def as_shown(answers: list[str]) -> str:
    return "".join(text + ("" if text.endswith("\n") else "\n") for text in answers)


SUMMARY = re.compile(
    r"^(\d+) tokens · ([\d.]+) tokens/iteration · [\d.]+ tokens/s · (\d+) of (\d+) prompt tokens reused"
)


def summaries(ran: Ran) -> list[re.Match[str]]:
    return [found for line in ran.err.splitlines() if (found := SUMMARY.match(line))]
