"""Tiny models with PEFT's adapters on them, and what is asked of them."""

from __future__ import annotations

import copy

import peft
import torch

from dynatree_core import hf
from dynatree_core.testing.models import tiny_model

PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])
ASKED = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 16, "pad_token_id": 0}
TREES = {"custom_generate": hf.generate, "policy": "fixed(tau=0.0)"}
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]

ADAPTERS = {
    "LoRA": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=PROJECTIONS),
    "DoRA": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=PROJECTIONS, use_dora=True),
    "rsLoRA on the embeddings": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=[*PROJECTIONS, "embed_tokens", "lm_head"], use_rslora=True
    ),
    "LoHa": lambda: peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=PROJECTIONS),
    "LoKr": lambda: peft.LoKrConfig(task_type="CAUSAL_LM", target_modules=PROJECTIONS),
    "IA3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "OFT": lambda: peft.OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], oft_block_size=8, r=0),
    "BOFT": lambda: peft.BOFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], boft_block_size=4),
    "VeRA": lambda: peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
    "HRA": lambda: peft.HRAConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"]),
    "layer norms": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
    "AdaLoRA": lambda: peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=PROJECTIONS, total_step=10),
}


def wrapped(config, name="default", family="llama"):
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(tiny_model(family)).float(), config, adapter_name=name)
    shake(model)
    return model.double().eval()


def shake(model):
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in parameter_name:
            parameter.data += 0.3 * torch.randn_like(parameter)


def tokens(output):
    return output[0, PROMPT.shape[1] :].tolist()
