"""Writing a Llama model from a GGUF file: the way transformers loads it, with float32 weights, or packed as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from dynatree_core import ops
from dynatree_core.files.tensors import save_tensors
from dynatree_core.files.writing import write_text
from dynatree_core.models.blueprint import Blueprint, Layer, Mlp, ropes_of_config
from dynatree_core.models.stored import save_packed
from dynatree_core.ops import Norm, PackedMatrix

__all__ = ["convert_llama", "pack_llama"]

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
    config, special_ids = _config(field)
    config.save_pretrained(folder)
    # generate() looks here for the end of a turn, <|im_end|>
    write_text(folder / "generation_config.json", json.dumps(special_ids, indent=2))
    _tokenizer(field).save_pretrained(folder)
    _write_weights(reader, folder / "model.safetensors", head_dim=field["llama.rope.dimension_count"])


def pack_llama(source: Path, folder: Path) -> None:
    """Write the same model with its blocks as they are in the GGUF, laid out for the operators (`StoredModel`)."""
    reader = GGUFReader(source)
    field = {name: value.contents() for name, value in reader.fields.items()}
    config, special_ids = _config(field)
    _tokenizer(field).save_pretrained(folder)
    save_packed(_blueprint(reader, config), config, special_ids, folder)


def _blueprint(reader: GGUFReader, config: LlamaConfig) -> Blueprint:
    found = {tensor.name: tensor for tensor in reader.tensors}
    head_dim = config.hidden_size // config.num_attention_heads

    def packed(*names: str) -> PackedMatrix:
        tensors = [found[f"{name}.weight"] for name in names]
        parts = [torch.from_numpy(tensor.data.copy()) for tensor in tensors]
        turned = [
            part[_half_apart(len(part), head_dim)] if _is_turned(name) else part
            for name, part in zip(names, parts, strict=True)
        ]
        return ops.pack_blocks(turned, tensors[0].tensor_type.name, int(tensors[0].shape[0]))

    def norm(name: str) -> Norm:
        weight = torch.from_numpy(dequantize(found[f"{name}.weight"].data, found[f"{name}.weight"].tensor_type).copy())
        return Norm("rms", weight, config.rms_norm_eps)

    rope = ropes_of_config(config)["all"]
    layers = []
    for index in range(config.num_hidden_layers):
        name = f"blk.{index}"
        layers.append(
            Layer(
                qkv=packed(*(f"{name}.attn_{part}" for part in "qkv")),
                output=packed(f"{name}.attn_output"),
                mlp=Mlp(packed(f"{name}.ffn_gate", f"{name}.ffn_up"), packed(f"{name}.ffn_down"), "silu"),
                num_heads=config.num_attention_heads,
                num_key_heads=int(config.num_key_value_heads or config.num_attention_heads),
                head_dim=head_dim,
                scale=head_dim**-0.5,
                attention_norm=norm(f"{name}.attn_norm"),
                mlp_norm=norm(f"{name}.ffn_norm"),
                rope=rope,
            )
        )
    head = packed("token_embd")
    return Blueprint(embedding=head, layers=tuple(layers), final_norm=norm("output_norm"), head=head)


def _is_turned(gguf_name: str) -> bool:
    return gguf_name.endswith((".attn_q", ".attn_k"))


def _half_apart(num_rows: int, head_dim: int) -> Tensor:
    """The order of a matrix's rows for transformers.

    Rotary embeddings pair rows: llama.cpp puts the two side by side, transformers half a head apart.
    """
    return torch.arange(num_rows).view(-1, head_dim // 2, 2).transpose(1, 2).reshape(-1)


def _config(field: dict[str, Any]) -> tuple[LlamaConfig, dict[str, int]]:
    """The configuration, and the ids of special tokens."""
    special_ids = {f"{role}_token_id": field[f"tokenizer.ggml.{_ROLES[role]}_token_id"] for role in _ROLES}
    del special_ids["unk_token_id"]  # only the tokenizer needs it
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
    return config, special_ids


def _write_weights(reader: GGUFReader, file: Path, *, head_dim: int) -> None:
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())  # [out, in] or [out]
        if _is_turned(tensor.name.removesuffix(".weight")):
            weight = weight[_half_apart(len(weight), head_dim)]
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
