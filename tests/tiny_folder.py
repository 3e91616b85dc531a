"""A tiny target with its tokenizer in a folder, as clients of transformers want models."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from dynatree_core.testing.models import VOCAB, tiny_model

TEXTS = [*"abcdefghijklmnopqrstuvwxyz .,!?'", "ab", "the", " a", "re", "in"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}! {% endfor %}"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each letter, and a chat template."""
    assert len(TEXTS) == VOCAB
    inner = Tokenizer(models.BPE({text: i for i, text in enumerate(TEXTS)}, merges=[]))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="a", eos_token="?", chat_template=TEMPLATE)


def save_tiny(folder: Path, seed: int = 0) -> Path:
    """A float64 Llama, its weights drawn by the seed."""
    tiny_model("llama", seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
