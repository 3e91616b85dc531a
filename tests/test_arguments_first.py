"""What is wrong in arguments is told before a model is loaded or a network asked; and how briefly a hub is asked."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dynatree_core.cli.group import main
from dynatree_core.cli.loading import check_drafter_name
from dynatree_core.errors import ModelLoadError, UnknownPluginError
from dynatree_core.models import hub
from dynatree_core.models.load import check_model_name, load_model
from dynatree_core.plugins.presets import check_stack_names
from dynatree_core.policy.build import build_stack

ROOT = Path(__file__).parents[1]
ABSENT = ("--target", "owner/name")  # on a hub that must not be asked


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str]]:
    """Runs a command that must come to an error without loading a model or asking the hub."""

    def unexpected(*args: object, **options: object) -> None:
        raise AssertionError(f"a model was loaded, or the hub asked: {args}")

    # these first: a module that is imported while the function is replaced would keep the replacement
    for module in ("dynatree_bench.run.pairs", "dynatree_bench.distill.run", "dynatree_core.drafters.model"):
        monkeypatch.setattr(f"{module}.load_model", unexpected)
    monkeypatch.setattr("dynatree_core.models.load.load_model", unexpected)
    monkeypatch.setattr("dynatree_core.models.hub._unreachable", unexpected)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def ran(*args: object) -> tuple[object, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        return ended.value.code, capsys.readouterr().err

    return ran


PROMPT = {"generate": ["text"], "audit": ["text"], "profile": ["text"]}


@pytest.mark.parametrize("command", ["generate", "chat", "audit", "profile"])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--policy", "phse3"], "did you mean 'phase3'"),
        (["--policy", "fixed+histori"], "did you mean 'history'"),
        (["--policy", "fixed("], "cannot read"),
        (["--policy", "fixed+fixed"], "'fixed' twice"),
        (["--policy", "fixed:plan"], "has no variant 'plan'"),
        (["--policy", "fixed(depht=3)"], "did you mean 'depth'"),
        (["--policy", "confidence(high=2)"], "from 0 to 1"),
        (["--drafter", "promptlookup"], "did you mean 'prompt_lookup'"),
        (["--drafter", "prompt_lookup+distiled"], "did you mean 'distilled'"),
        (["--drafter", "prompt_lookup(max_match=3)"], "did you mean 'max_matches'"),
        (["--drafter", "./nowhere"], "nothing there"),
        (["--device", "cuda:99"], "the device must be one of those here"),
        (["--runner", "cudagraph", "--device", "cpu"], "for models on a CUDA GPU"),
    ],
)
def test_names_and_settings(run: Callable[..., tuple[object, str]], command: str, wrong: list[str], words: str) -> None:
    target = [] if "./nowhere" in wrong else ABSENT  # a drafter's folder is looked at when the target's name is right
    code, err = run(command, *target, *wrong, *PROMPT.get(command, []))
    assert code == (1 if "./nowhere" in wrong else 2)
    assert words in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("generate --cache sinks=4 text", "'sinks=4,window=1024'"),
        ("generate --cache sinks=4,window=8 --exact fixed_width text", "leave out one of them"),
        ("calibrate --drafter promptlookup", "did you mean 'prompt_lookup'"),
        ("calibrate --runner cudagraph --device cpu", "for models on a CUDA GPU"),
        ("audit --prompts nowhere.jsonl", "nowhere.jsonl"),
        ("audit --output nowhere.json", "nowhere.json"),
        ("bench main --drafter promptlookup", "did you mean 'prompt_lookup'"),
        ("distill --out drafter --question nothing", "must have {text} where a passage goes, got 'nothing'"),
        ("distill --out drafter --layers a,b", "numbers joined by commas"),
    ],
)
def test_each_command(
    run: Callable[..., tuple[object, str]], line: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, err = run(*line.split(), *ABSENT)
    assert code == 2
    assert words in err
    assert len(err.splitlines()) == 1


def test_names_are_checked_as_they_are_built() -> None:
    for stack in ("phase3", "phase3:plan", "fixed(depth=2)+history", "confidence+dynamic_depth"):
        check_stack_names(stack)
        assert build_stack(stack)
    for drafter in (
        "prompt_lookup",
        "distilled+prompt_lookup",
        "model(model='x')",
        "owner/name",
        "./promptlookup",
        "gpt2",
    ):
        check_drafter_name(drafter)
    with pytest.raises(UnknownPluginError, match="'confidense' is not an installed policy or preset"):
        check_stack_names("phase1+confidense")


# ---- the hub -------------------------------------------------------------------------------------------------


class Endpoint:
    """An address on this machine that takes connections and never answers as a hub does."""

    def __init__(self, *, hangs_up: bool) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.taken: list[socket.socket] = []
        self.hangs_up = hangs_up
        self.thread = threading.Thread(target=self._take, daemon=True)
        self.thread.start()

    def _take(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self.listener.accept()
                self.taken.append(connection)
                if self.hangs_up:
                    connection.close()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()
        for connection in self.taken:
            connection.close()


@pytest.fixture
def broken_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    endpoint = Endpoint(hangs_up=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint.url)
    monkeypatch.setattr("dynatree_core.models.hub.SECONDS", 60.0)  # it hangs up, however busy the machine is
    hub._unreachable.cache_clear()
    yield endpoint
    hub._unreachable.cache_clear()
    endpoint.close()


def test_a_hub_that_hangs_up_is_asked_once(broken_hub: Endpoint) -> None:
    for name in ("owner/name", "owner/other"):
        with pytest.raises(ModelLoadError, match=f"'{name}'.* no connection: {broken_hub.url} cannot be reached"):
            load_model(name)
    assert len(broken_hub.taken) == 1


def test_a_hub_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Endpoint(hangs_up=False)
    monkeypatch.setattr("dynatree_core.models.hub.SECONDS", 0.2)
    assert (hub._unreachable(endpoint.url) or "").startswith(endpoint.url)
    assert len(endpoint.taken) <= 1
    endpoint.close()


def test_a_look_up_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    session = type("Session", (), {"head": lambda self, url, timeout: done.wait(60)})()
    monkeypatch.setattr("huggingface_hub.get_session", lambda: session)
    monkeypatch.setattr("dynatree_core.models.hub.SECONDS", 0.1)
    assert hub._unreachable("http://hung") == "http://hung does not answer within 0.1 s"
    done.set()


def test_any_answer_is_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    session = type("Session", (), {"head": lambda self, url, timeout: "503"})()
    monkeypatch.setattr("huggingface_hub.get_session", lambda: session)
    assert hub._unreachable("http://busy") is None


def test_what_was_fetched_before_is_loaded_without_a_connection(
    broken_hub: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    snapshot = cache / "models--owner--name" / "snapshots" / "0123"
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
    LlamaForCausalLM(config).save_pretrained(snapshot)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    tokenizer.save_pretrained(snapshot)
    (cache / "models--owner--name" / "refs").mkdir()
    (cache / "models--owner--name" / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    check_model_name("owner/name")
    assert hub.fetched_folder("owner/name") == snapshot
    assert hub.fetched_folder("owner/other") is None
    assert hub.fetched_folder("no id at all") is None
    assert broken_hub.taken == [], "it is here, so nobody has to be asked"
    loaded = load_model("owner/name")
    assert (loaded.name, loaded.model.config.vocab_size) == ("owner/name", 8)
    assert len(broken_hub.taken) == 1


@pytest.mark.slow
def test_a_command_asks_a_broken_hub_once(tmp_path: Path) -> None:
    endpoint = Endpoint(hangs_up=True)
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    environment |= {"HF_ENDPOINT": endpoint.url, "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "dynatree_core", "generate", "--target", "owner/name", "text"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert "cannot load 'owner/name'" in done.stderr.splitlines()[-1]
    assert len(endpoint.taken) == 1
    endpoint.close()
