"""Models' folders whose generate() decodes by trees, as tests write and load them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny_folder import save_tiny
from transformers import (
    AutoModelForCausalLM,
)

from dynatree_core import hf
from dynatree_core.hf import entry as hf_entry
from dynatree_core.hf.export import Chosen, write_folder

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
