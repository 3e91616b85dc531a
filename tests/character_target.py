"""A tiny model of characters, with a tokenizer and a chat template."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [*"abcdefghijklmnopqrstuvwxyz", " ", ".", "\n", "<s>", "</s>", "<u>", "<a>", "?", "!", "{", "}"]
TEMPLATE = "{% for m in messages %}<u>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def save_target(folder: Path) -> Path:
    """Save the model in a folder, which is returned."""
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


class Interrupted(Exception):
    """In place of a signal."""
