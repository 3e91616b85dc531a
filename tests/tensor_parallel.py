"""One of the processes that share a model by transformers' tensor parallelism: `python tensor_parallel.py FOLDER`.

The folder has the model. It prints one object of JSON: for each case the tokens, or the error. torchrun's variables say
which process it is.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from dynatree_core import Engine, generate, generate_batch, hf
from dynatree_core.models.placement import num_processes
from dynatree_core.serve.service import Service
from dynatree_core.serve.settings import Settings

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
OTHER = [2, 7, 1, 8, 2, 8]
NUM_NEW = 16


def outcome(compute: Callable[[], Any]) -> Any:
    """What comes of it, or the name and words of its error."""
    dist.barrier()
    try:
        return compute()
    except Exception as error:  # noqa: BLE001  # it is what is asked for
        return f"{type(error).__name__}: {error}"


def main(folder: str) -> dict[str, Any]:
    rank = dist.get_rank()
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the newer spelling is not in the oldest transformers
        shared = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, tp_plan="auto")

    def tokens(drafter: Any = "prompt_lookup", prompt: list[int] = PROMPT, target: Any = shared, **options: Any) -> Any:
        asked = {"policy": "fixed(depth=3)", "max_new_tokens": NUM_NEW, "eos_token_id": [], **options}
        return outcome(lambda: generate(target, drafter, prompt, **asked).token_ids)

    def with_transformers() -> Any:
        asked = {"max_new_tokens": NUM_NEW, "do_sample": False, "eos_token_id": None}
        ours = {"custom_generate": hf.generate, "drafter": "prompt_lookup"}
        return shared.generate(torch.tensor([PROMPT]), **asked, **ours)[0, len(PROMPT) :].tolist()

    def batch() -> Any:
        results = generate_batch(shared, whole, [PROMPT, OTHER], max_new_tokens=NUM_NEW, eos_token_id=[])
        return [result.token_ids for result in results]

    def service() -> Any:
        return Service({"x": Engine(shared)}, Settings(model_names=("x",), policies=("fixed",), drafters=("x",)))

    sampled = {"do_sample": True, "temperature": 0.8}
    return {
        "processes": num_processes(shared),
        "lookup": tokens(),
        "whole drafter": tokens(whole, policy="phase3"),
        "shared drafter": tokens(shared, policy="phase3"),
        "shared drafter of a whole target": tokens(shared, target=whole),
        "linear": tokens(whole, policy="linear(depth=4)"),
        "sampled": tokens(whole, **sampled, seed=7),
        "batch": outcome(batch),
        "transformers": outcome(with_transformers),
        "native": tokens(runner="native"),
        "packed": tokens(runner="packed"),
        "cost_aware": tokens(whole, policy="cost_aware"),
        "no seed": tokens(**sampled),
        "max_time": tokens(max_time=9.0),
        "server": outcome(service),
        "other prompts": tokens(prompt=PROMPT if rank == 0 else OTHER),
        "afterwards": tokens(),
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = main(sys.argv[1])
    print(json.dumps(found))
    dist.destroy_process_group()
