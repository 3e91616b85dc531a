"""Where a model's weights are and where its passes are computed, which need not be one place.

transformers' `device_map` has accelerate's hooks bring weights from the memory of the CPU or a disk for each pass, and
its `tp_plan` shares each matrix among processes that compute a pass together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "brought_to",
    "check_same_pass",
    "computing_device",
    "num_processes",
    "reason_against_place",
    "reason_to_call",
]

META = torch.device("meta")


def computing_device(model: nn.Module) -> torch.device:
    """The device on which the model's passes are computed, and so where its rows and caches are."""
    return brought_to(model, model.device)  # type: ignore[arg-type]


def brought_to(model: nn.Module, device: torch.device) -> torch.device:
    """Where a model whose first tensor is on this device computes."""
    return next(iter(_hooked_devices(model)), device) if device == META else device


def reason_to_call(model: nn.Module) -> str | None:
    """Why passes can only be had by calling the model: its weights do not lie whole in one place; None: they do."""
    if num_processes(model) > 1:
        return f"its weights are shared by {num_processes(model)} processes"
    if any(getattr(hook, "offload", False) for part in model.modules() for hook in _hooks(part)):
        return "its weights are brought from the CPU or a disk for each pass"
    return None


def num_processes(model: nn.Module) -> int:
    """How many processes compute a pass together, each with a share of the weights; 1: this one alone."""
    mesh = _mesh(model)
    return 1 if mesh is None else int(mesh.size())


def reason_against_place(model: nn.Module) -> str | None:
    """Why passes cannot be computed from where the weights are; None: they can."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    devices = {tensor.device for _, tensor in tensors}
    lost = sorted({name for name, tensor in tensors if tensor.device == META} - {*_brought(model)})
    if lost:
        return f"its weights have no values ({lost[0]} is on the meta device and nothing brings it); load them"
    computing = (devices - {META}) | _hooked_devices(model)
    if len(computing) > 1:
        names = ", ".join(sorted(map(str, computing)))
        return f"its weights are on {names}; load it on one device, with the rest of a device_map on 'cpu' or 'disk'"
    return None


def check_same_pass(model: nn.Module, token_ids: Tensor, position_ids: Tensor) -> None:
    """See that all processes that share the model's weights begin the same pass; nothing where there is one.

    Otherwise each would add its own rows to sums over all of them.

    Args:
        model: whose pass begins.
        token_ids, position_ids: [lanes, rows] of it.

    Raises:
        RuntimeError: they do not.
    """
    mesh = _mesh(model)
    if mesh is None or mesh.size() == 1:
        return
    own = _digest(token_ids, position_ids)
    found = [torch.empty_like(own) for _ in range(mesh.size())]
    dist.all_gather(found, own, group=mesh.get_group())
    if any(not torch.equal(own, other) for other in found):
        raise RuntimeError(
            f"the {mesh.size()} processes that share the model's weights must compute the same passes, but began "
            "different ones; take no policy that goes by measured times, such as governor, and the same seed, prompts "
            "and options in each"
        )


def _digest(token_ids: Tensor, position_ids: Tensor) -> Tensor:
    """[4] int64: numbers of lanes and rows, and sums of what is in them, weighted by place."""
    lanes, rows = token_ids.shape
    place = torch.arange(1, lanes * rows + 1, device=token_ids.device)
    sums = [(tensor.reshape(-1) * place).sum() for tensor in (token_ids, position_ids.expand(lanes, rows))]
    return torch.stack([torch.tensor(lanes, device=place.device), torch.tensor(rows, device=place.device), *sums])


def _mesh(model: nn.Module) -> Any:
    """The processes among which the first shared weight is shared; None: none is."""
    if not dist.is_available() or not dist.is_initialized():  # without a group of processes nothing can be shared
        return None
    return next((tensor.device_mesh for tensor in model.parameters() if hasattr(tensor, "device_mesh")), None)


def _hooks(part: nn.Module) -> Iterator[Any]:
    """accelerate's hooks of one module."""
    hook = getattr(part, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", [hook])


def _hooked_devices(model: nn.Module) -> set[torch.device]:
    """Where accelerate's hooks have modules computed."""
    named = [getattr(hook, "execution_device", None) for part in model.modules() for hook in _hooks(part)]
    return {_device(place) for place in named if place is not None}


def _device(place: Any) -> torch.device:
    """A device as accelerate names it; a number is that of an accelerator."""
    found = torch.device(place)
    if found.type != "cpu" and found.type != "meta" and found.index is None:
        return torch.device(found.type, 0)
    return found


def _brought(model: nn.Module) -> Iterator[str]:
    """The names of tensors that a hook brings for a pass."""
    for prefix, part in model.named_modules(remove_duplicate=False):
        for hook in _hooks(part):
            if getattr(hook, "offload", False):
                is_deep = bool(getattr(hook, "place_submodules", False))
                for name, _ in (*part.named_parameters(recurse=is_deep), *part.named_buffers(recurse=is_deep)):
                    yield f"{prefix}.{name}" if prefix else name
