"""Models whose weights are elsewhere than their passes: `device_map` with offloading, and `tp_plan`."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tensor_parallel import NUM_NEW, OTHER, PROMPT
from torch import nn
from transformers import AutoModelForCausalLM

from dynatree_core import PrefixCache, generate, generate_batch, hf
from dynatree_core.errors import ParameterError, UnsupportedModelError
from dynatree_core.models.placement import computing_device
from dynatree_core.testing.models import greedy, perturbed, tiny_model

ROOT = Path(__file__).parents[1]
# parts of a tiny Llama -> where they are
SPLIT = {
    "model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
    "model.layers.0": "cpu", "model.layers.1": "disk",
}  # fmt: skip
MAPS = {
    "all on the disk": {"": "disk"},
    "one layer": SPLIT,
    "all but the layers": {**dict.fromkeys(SPLIT, "disk"), "model.layers.0": "cpu", "model.layers.1": "cpu"},
}
WORDS = {
    "native": "reads a model's weights",
    "packed": "reads a model's weights",
    "cudagraph": "reads a model's weights",
}


def offloaded(folder: Path, device_map: Any, model_type: str = "llama") -> nn.Module:
    """A tiny model, parts of which are on the disk."""
    tiny_model(model_type).save_pretrained(folder / "model")
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float64, device_map=device_map, offload_folder=str(folder / "offload")
    )
    return model


@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_an_offloaded_target_has_the_tokens_of_generate(tmp_path, device_map, model_type):
    target, expected = offloaded(tmp_path, device_map, model_type), greedy(tiny_model(model_type), PROMPT, NUM_NEW)
    assert any(parameter.device.type == "meta" for parameter in target.parameters())
    assert computing_device(target) == torch.device("cpu")
    drafter = perturbed(model_type, noise=0.02)
    for policy in ("fixed(depth=3)", "phase3", "cost_aware"):
        result = generate(target, drafter, PROMPT, policy=policy, max_new_tokens=NUM_NEW)
        assert (result.token_ids, result.report.runner) == (expected, "eager")
    sampled = {"do_sample": True, "temperature": 0.9, "seed": 3, "max_new_tokens": NUM_NEW}
    assert (
        generate(target, drafter, PROMPT, **sampled).token_ids
        == generate(tiny_model(model_type), drafter, PROMPT, **sampled).token_ids
    )


def test_an_offloaded_target_works_with_batches_kept_rows_and_transformers_own_generate(tmp_path):
    target, plain = offloaded(tmp_path, SPLIT), tiny_model("llama")
    results = generate_batch(target, "prompt_lookup", [PROMPT, OTHER], max_new_tokens=NUM_NEW)
    assert [result.token_ids for result in results] == [greedy(plain, prompt, NUM_NEW) for prompt in (PROMPT, OTHER)]
    kept = PrefixCache()
    for _ in range(2):
        result = generate(target, None, PROMPT, max_new_tokens=NUM_NEW, prefix_cache=kept)
        assert result.token_ids == greedy(plain, PROMPT, NUM_NEW)
    asked = {"max_new_tokens": NUM_NEW, "do_sample": False, "custom_generate": hf.generate, "drafter": "prompt_lookup"}
    assert target.generate(torch.tensor([PROMPT]), **asked)[0, len(PROMPT) :].tolist() == greedy(plain, PROMPT, NUM_NEW)


@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS)
def test_an_offloaded_drafter_proposes_what_it_would_elsewhere(tmp_path, device_map):
    target, drafter = perturbed("llama", noise=0.02), offloaded(tmp_path, device_map)
    results = [
        generate(target, one, PROMPT, policy="fixed(depth=3)", max_new_tokens=NUM_NEW, runner="eager")
        for one in (drafter, tiny_model("llama"))
    ]
    assert results[0].token_ids == results[1].token_ids == greedy(target, PROMPT, NUM_NEW)
    assert results[0].report.steps == results[1].report.steps


@pytest.mark.parametrize("runner", WORDS)
def test_a_runner_that_reads_weights_takes_none_that_are_brought(tmp_path, runner):
    with pytest.raises(ParameterError, match=f"the {runner} runner reads a model's weights, but .* brought"):
        generate(offloaded(tmp_path, SPLIT), None, PROMPT, max_new_tokens=2, runner=runner)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_a_device_map_that_offloads_nothing_changes_nothing(tmp_path, device_map):
    result = generate(offloaded(tmp_path, device_map), None, PROMPT, max_new_tokens=NUM_NEW)
    assert result.token_ids == greedy(tiny_model("llama"), PROMPT, NUM_NEW)


@pytest.mark.parametrize("role", ["target", "drafter"])
def test_weights_without_values_are_refused(role):
    lost = copy.deepcopy(tiny_model("llama")).to("meta")
    models = {"target": tiny_model("llama"), "drafter": tiny_model("qwen2"), role: lost}
    with pytest.raises((UnsupportedModelError, ParameterError), match="meta"):
        generate(models["target"], models["drafter"], PROMPT, max_new_tokens=2)


def test_layers_that_compute_on_two_devices_are_refused(tmp_path):
    target = offloaded(tmp_path, SPLIT)
    add_hook_to_module(target.model.layers[0], AlignDevicesHook("cpu"), append=True)
    target.model.layers[0]._hf_hook.hooks[-1].execution_device = "cuda:1"
    with pytest.raises(UnsupportedModelError, match="its weights are on cpu, cuda:1; load it on one device"):
        generate(target, None, PROMPT, max_new_tokens=2)


# tensor parallelism


def by_two_processes(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes says that share the model of a folder."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(ROOT / "tests" / "tensor_parallel.py"), str(folder)]
    running = [
        subprocess.Popen(
            command, env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], said
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.mark.skipif(sys.platform != "linux", reason="gloo is told to use the loopback device by its Linux name")
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_processes_that_share_a_model_have_the_tokens_of_generate(tmp_path, model_type):
    plain = tiny_model(model_type)
    plain.save_pretrained(tmp_path)
    expected = greedy(plain, PROMPT, NUM_NEW)
    sampled = generate(
        plain, plain, PROMPT, policy="fixed(depth=3)", max_new_tokens=NUM_NEW, eos_token_id=[], do_sample=True,
        temperature=0.8, seed=7,
    )  # fmt: skip
    found = by_two_processes(tmp_path)
    for one in found:
        assert one["processes"] == 2
        for case in (
            "lookup", "whole drafter", "shared drafter", "shared drafter of a whole target", "linear", "transformers",
            "afterwards",
        ):  # fmt: skip
            assert one[case] == expected, case
        assert one["sampled"] == sampled.token_ids
        assert one["batch"] == [expected, greedy(plain, OTHER, NUM_NEW)]
        for runner in ("native", "packed"):
            assert f"the {runner} runner reads a model's weights, but its weights are shared by 2" in one[runner]
        assert "costs are measured by one process" in one["cost_aware"]
        assert "needs the same seed=" in one["no seed"]
        assert "max_time cannot be used" in one["max_time"]
        assert "a server has its model in one process" in one["server"]
        assert "must compute the same passes, but began different ones" in one["other prompts"]
