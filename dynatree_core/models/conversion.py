"""Writing a Llama model from a GGUF file the way transformers loads it: configs, tokenizer, float32 weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from dynatree_core.files.tensors import save_tensors
from dynatree_core.files.writing import write_text

__all__ = ["convert_llama"]

_LAYER_PARTS = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_OUTER_PARTS = {"token_embd": "embed_tokens", "output_norm": "norm"}
_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # of tokens; here -> in a GGUF
_CONTROL_TOKEN = 3  # the GGUF's token type of <|im_end|> and its like


def convert_llama(source: Path, folder: Path) -> None:
    """Write a Llama model from a GGUF the way transformers loads it: configs, tokenizer, float32 weights."""
    reader = GGUFReader(source)
    field = {name: value.contents() for name, value in reader.fields.items()}
    special_ids = {f"{role}_token_id": field[f"tokenizer.ggml.{_ROLES[role]}_token_id"] for role in _ROLES}
    del special_ids["unk_token_id"]  # the tokenizer's business only
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=field["llama.vocab_size"],
        hidden_size=field["llama.embedding_length"],
        intermediate_size=field["llama.feed_forward_length"],
        num_hidden_layers=field["llama.block_count"],
        num_attention_heads=field["llama.attention.head_count"],
        num_key_value_heads=field["llama.attention.head_count_kv"],
        max_position_embeddings=field["llama.context_length"],
        rms_norm_eps=field["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": field["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        **special_ids,
    )
    config.save_pretrained(folder)
    # generate() looks here for the end of a turn, <|im_end|>
    write_text(folder / "generation_config.json", json.dumps(special_ids, indent=2))
    _tokenizer(field).save_pretrained(folder)
    _write_weights(reader, folder / "model.safetensors", head_dim=field["llama.rope.dimension_count"])


def _write_weights(reader: GGUFReader, file: Path, *, head_dim: int) -> None:
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())  # [out, in] or [out]
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            # rotary embeddings pair rows: llama.cpp puts the two side by side, transformers half a head apart
            weight = weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        weights[_parameter_name(tensor.name)] = weight
    save_tensors(weights, file, metadata={"format": "pt"})


def _parameter_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight` in transformers."""
    match gguf_name.split("."):
        case ["blk", layer, part, "weight"]:
            return f"model.layers.{layer}.{_LAYER_PARTS[part]}.weight"
        case [part, "weight"]:
            return f"model.{_OUTER_PARTS[part]}.weight"
    raise AssertionError(f"the default model has a tensor of unknown name, {gguf_name!r}")


def _tokenizer(field: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer that the GGUF's fields describe, with its chat template."""
    tokens: list[str] = field["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    # all that the GGUF says about splitting is "smollm": digits one by one, then GPT-2's rule
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    kinds = zip(tokens, field["tokenizer.ggml.token_type"], strict=True)
    control_tokens = [token for token, kind in kinds if kind == _CONTROL_TOKEN]
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in control_tokens])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it unannotated
        tokenizer_object=bpe,
        model_max_length=field["llama.context_length"],
        chat_template=field["tokenizer.chat_template"],
        **{f"{role}_token": tokens[field[f"tokenizer.ggml.{_ROLES[role]}_token_id"]] for role in _ROLES},
    )
