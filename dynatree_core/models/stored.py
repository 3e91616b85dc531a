"""Models whose weights stay in their published bits: a blueprint with packed matrices, without transformers' modules.

Decoding needs neither transformers' modules nor a second copy of the weights. A model can be saved as one file, which
is mapped into memory rather than read; then transformers' model code, whose import takes seconds, is not needed either.

`StoredModel.in_transformers` is the same model as transformers has it, in float32: for runners that need modules, and
as the oracle of the tests.
"""

from __future__ import annotations

import copy
import functools
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from dynatree_core import ops
from dynatree_core.errors import ModelLoadError, ParameterError
from dynatree_core.files.tensors import mapped_tensors, save_aligned
from dynatree_core.files.writing import write_text
from dynatree_core.models.architectures import cache_argument
from dynatree_core.models.blueprint import (
    Blueprint,
    Family,
    Layer,
    Mixture,
    Mlp,
    NoBlueprintError,
    Packer,
    Rope,
    blueprint_of,
    family_of,
    read_blueprint,
    ropes_of_config,
)
from dynatree_core.ops import Activations, Norm, PackedMatrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "WEIGHTS",
    "StoredModel",
    "StoredTable",
    "load_packed",
    "narrowest",
    "pack_narrowest",
    "packer",
    "plain_config",
    "read_checkpoint",
    "rounding_of",
    "save_packed",
]

WEIGHTS = ("stored", "fp32", "int8", "int4")  # as published; in 32 bits; rounded to 8 or 4 bits, 32 with one scale
PACKED = "packed.safetensors"
CONFIG = "config.json"
GENERATION = "generation_config.json"
_BITS = {"int8": 8, "int4": 4}
_NO_WEIGHTS = (".masked_bias", "rotary_emb.inv_freq")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class StoredModel(nn.Module):
    """A causal language model held as a blueprint with packed weights; it computes in float32, on a CPU.

    The `native` runner computes its passes. Other runners, and its own forward, use `in_transformers`.

    Args:
        config: of the family, with all its settings.
        generation_config: what its folder says of generation.
        blueprint: with packed matrices.
        weights: one of WEIGHTS, the bits of the packed matrices.
        in_float32: loads the published weights into a float32 model of transformers; None: there is no such form.
        head: what reads rows of the head; None: made of the blueprint's.
        activations: "full", or "int8": matrices of 4 or 8 bits multiply rows that are rounded to 8 bits
            (`ops.with_activations`), the others full ones.

    Raises:
        ParameterError: activations="int8" for matrices of which none can.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(
        self,
        config: PreTrainedConfig,
        generation_config: GenerationConfig,
        blueprint: Blueprint,
        *,
        weights: str,
        in_float32: Callable[[], PreTrainedModel] | None = None,
        head: StoredTable | None = None,
        activations: Activations = "full",
    ) -> None:
        super().__init__()
        self.config = config
        self.generation_config = generation_config
        self.blueprint = blueprint = _with_activations(blueprint, activations)
        self.weights = weights
        self.activations = activations
        self._in_float32 = in_float32
        self._lock = threading.Lock()  # so that two threads do not both load it
        self._tables: tuple[StoredTable, StoredTable] = (  # in a tuple, so that torch does not register them as layers
            StoredTable(blueprint.embedding),
            head or StoredTable(_packed(blueprint.head)),
        )
        self.eval()

    def get_input_embeddings(self) -> StoredTable:
        return self._tables[0]

    def get_output_embeddings(self) -> StoredTable:
        return self._tables[1]

    @property
    def set_up(self) -> str | None:
        """What makes it another model than the published one, in words; None: nothing does."""
        if self.activations != "full":
            return f"weights {self.weights}, activations {self.activations}"
        return f"weights {self.weights}" if self.weights in _BITS else None

    @property
    def num_bytes(self) -> int:
        """Bytes of its weights."""
        matrices: dict[int, PackedMatrix] = {id(matrix): matrix for matrix in self.blueprint.matrices()}
        table = self.blueprint.embedding
        own = 0 if isinstance(table, PackedMatrix) else table.numel() * table.element_size()
        return own + sum(matrix.num_bytes for matrix in matrices.values())

    @functools.cached_property
    def _plain(self) -> PreTrainedModel:
        if self.activations != "full":
            raise ParameterError(
                f"activations='{self.activations}' are computed by the native runner alone, got another runner or code "
                "that asks for transformers' modules; leave runner at 'auto', or load the model without activations"
            )
        if self._in_float32 is None:
            raise ParameterError(
                f"this {self.config.model_type} is for the native runner alone, got another one; leave runner at 'auto'"
            )
        model = self._in_float32()
        has_caps = any(layer.softcap is not None for layer in self.blueprint.layers)
        if has_caps and model.config._attn_implementation == "sdpa":  # which has none; 5.17.0 takes it
            model.set_attn_implementation("eager")
        if self.weights in _BITS:
            with torch.no_grad():
                _copy_numbers(self.blueprint, blueprint_of(model))
        return model

    def in_transformers(self) -> PreTrainedModel:
        """The same model as a float32 model of transformers; loaded at the first call.

        Raises:
            ParameterError: it has no such form, see `in_float32`, or rounds its activations.
        """
        with self._lock:
            return self._plain

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        **others: Any,
    ) -> Any:
        """The forward of `in_transformers()`."""
        plain = self.in_transformers()
        others[cache_argument(plain)] = cache
        return plain(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **others)

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredModel:
        return self  # it is never changed


def rounding_of(model: nn.Module) -> str | None:
    """What makes a model another than the published one, in words; None: nothing that is known."""
    return model.set_up if isinstance(model, StoredModel) else None


class StoredTable(nn.Module):
    """A packed embedding or head as a module, for code that reads its size or some of its rows."""

    token_ids: Tensor | None  # [outputs] int64: the token of each output, where a head has some tokens only

    def __init__(self, weight: Tensor | PackedMatrix, token_ids: Tensor | None = None) -> None:
        super().__init__()
        self.packed = weight
        self.token_ids = token_ids

    @property
    def weight(self) -> _Rows:
        return _Rows(self.packed)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[..., hidden]: rows of an embedding."""
        return self.weight[token_ids.reshape(-1)].view(*token_ids.shape, -1)


@attrs.frozen(eq=False)
class _Rows:
    """A packed matrix that unpacks rows to float32 when they are indexed."""

    packed: Tensor | PackedMatrix

    @property
    def shape(self) -> tuple[int, int]:
        packed = self.packed
        if isinstance(packed, PackedMatrix):
            return packed.num_outputs, packed.num_inputs
        return packed.shape[0], packed.shape[1]

    def __getitem__(self, rows: Tensor) -> Tensor:
        packed = self.packed
        return packed.lookup(rows) if isinstance(packed, PackedMatrix) else packed[rows].float()

    def dequantize(self) -> Tensor:
        """[outputs, inputs] float32"""
        return self.packed.unpacked() if isinstance(self.packed, PackedMatrix) else self.packed.float()


def _packed(matrix: Any) -> PackedMatrix:
    assert isinstance(matrix, PackedMatrix), "a stored model has a packed blueprint"
    return matrix


def _copy_numbers(source: Blueprint, target: Blueprint) -> None:
    """Write the numbers of packed matrices into a model's parameters, which its own blueprint refers to.

    Raises:
        ParameterError: some of them are in another order.
    """
    for packed, matrix in zip(source.matrices(), target.matrices(), strict=True):
        if matrix.order is not None:
            raise ParameterError(
                "weights of fewer bits are for the native runner alone where a family has queries, keys and values in "
                "one matrix, or gate and up by turns, got another runner; leave runner at 'auto'"
            )
        numbers = packed.unpacked().split([len(part) for part in matrix.parts])
        for part, rows in zip(matrix.parts, numbers, strict=True):
            part.copy_(rows)


# ---- packing --------------------------------------------------------------------------------------------------


def narrowest(weight: Tensor) -> torch.dtype:
    """The narrowest dtype that holds the same numbers: 16 bits for a float32 matrix that was published in them."""
    if weight.dtype == torch.float32:
        for dtype in (torch.bfloat16, torch.float16):
            if torch.equal(weight.to(dtype).float(), weight):
                return dtype
    return weight.dtype


def pack_narrowest(parts: tuple[Tensor, ...], bias: Tensor | None) -> PackedMatrix:
    """Matrices one below the other, in 16 bits where these hold the same numbers."""
    dtypes = {narrowest(part) for part in parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.promote_types(*[part.dtype for part in parts][:2])
    return ops.pack([part.to(dtype) for part in parts], bias)


def packer(weights: str) -> Packer:
    """How matrices are packed for `weights`, one of WEIGHTS."""
    if weights in _BITS:
        return lambda parts, bias: ops.quantise(list(parts), _BITS[weights], bias=bias)
    if weights == "fp32":
        return lambda parts, bias: ops.pack([part.float() for part in parts], bias)
    return pack_narrowest


def _requantised(matrix: PackedMatrix, weights: str) -> PackedMatrix:
    """A packed matrix rounded to fewer bits."""
    bias = None if matrix.bias is None else matrix.bias[: matrix.num_outputs]
    return ops.quantise(matrix.unpacked(), _BITS[weights], bias=bias)


def _with_weights(blueprint: Blueprint, weights: str) -> Blueprint:
    """A packed blueprint with other bits."""
    return _changed(blueprint, lambda matrix: _requantised(matrix, weights)) if weights in _BITS else blueprint


def _with_activations(blueprint: Blueprint, activations: Activations) -> Blueprint:
    """A packed blueprint whose products take their rows so, where they can.

    Raises:
        ParameterError: none of them can.
    """
    if activations == "full":
        return blueprint
    changed = _changed(blueprint, lambda matrix: ops.with_activations(matrix, activations))
    found = changed.matrices()
    if all(matrix.activations == "full" for matrix in found):
        kinds = ", ".join(sorted({matrix.kind for matrix in found}))
        raise ParameterError(
            f"activations='{activations}' multiply weights of {', '.join(ops.INTEGER_KINDS)}, got {kinds}; round them "
            "too, by weights='int8' or 'int4', or leave activations out"
        )
    return changed


def _changed(blueprint: Blueprint, change: Callable[[PackedMatrix], PackedMatrix]) -> Blueprint:
    """A packed blueprint with other matrices; an embedding tied to the head stays tied."""
    is_tied = blueprint.embedding is blueprint.head
    packed = blueprint.mapped(lambda matrix: change(_packed(matrix)), lambda router: router)
    return attrs.evolve(packed, embedding=_packed(packed.head) if is_tied else packed.embedding)


# ---- checkpoints of transformers ------------------------------------------------------------------------------


def read_checkpoint(folder: Path, config: PreTrainedConfig, weights: str) -> Blueprint:
    """The packed blueprint of a folder that `save_pretrained` has made.

    Args:
        folder: with safetensors files.
        config: read from it by transformers.
        weights: of WEIGHTS.

    Raises:
        NoBlueprintError: the model is not known, or its files are not as they would be written today.
        ModelLoadError: a file that cannot be read.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise NoBlueprintError("weights are quantised in a way of their own")
    if (folder / "adapter_config.json").is_file():
        raise NoBlueprintError("folder has an adapter, which transformers puts on")
    family = family_of(config)
    found = _checkpoint_tensors(folder)
    table = found.get(f"{family.base}.{family.embedding}.weight")
    if table is None:
        raise NoBlueprintError("files have no embeddings by today's name")
    for part in ("weight", "bias"):
        if (named := f"{family.head_in_files}.{part}") in found:
            found[f"lm_head.{part}"] = found.pop(named)
    old, new = f".{family.mixture_in_files}.", f".{family.mlp}."
    if old != new:
        found = {name.replace(old, new): tensor for name, tensor in found.items()}
    # transformers does not tie the two where the files have both, with different numbers
    is_tied = bool(config.tie_word_embeddings) and torch.equal(found.get("lm_head.weight", table), table)
    if is_tied:
        found["lm_head.weight"] = table
    strange = sorted({str(tensor.dtype) for tensor in found.values() if tensor.dtype not in _DTYPES})
    if strange:
        raise NoBlueprintError(f"files have tensors of {', '.join(strange)}")
    _check_parameters(found, config, family)
    blueprint = read_blueprint(config, found, ropes_of_config(config))
    packed = blueprint.packed(packer(weights), pack_narrowest)
    return attrs.evolve(packed, embedding=_packed(packed.head)) if is_tied else packed


def _check_parameters(found: Mapping[str, Tensor], config: Any, family: Family) -> None:
    """See that files have the parameters of transformers' model, each in its shape.

    It leaves out what files have besides, such as biases that the configuration does not ask for.

    Raises:
        NoBlueprintError: they have others, or there is no such model. Those of single experts, which it puts together,
            are not compared.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING  # looking a class up imports its family

    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        with torch.device("meta"):
            model = kind(copy.deepcopy(config))
    except (TypeError, ValueError, AttributeError, AssertionError, RuntimeError, ImportError) as error:
        raise NoBlueprintError(
            f"configuration no {kind.__name__} can be made of ({type(error).__name__}: {error})"
        ) from error
    head = f"{family.head_in_files}."
    wanted = {name.replace(head, "lm_head."): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    for name in sorted(shapes.keys() | wanted.keys()):
        if ".experts." in name or shapes.get(name) == wanted.get(name):
            continue
        if name not in wanted:
            raise NoBlueprintError(f"files have '{name}', which a {kind.__name__} of this configuration has not")
        if name not in shapes:
            raise NoBlueprintError(f"files lack '{name}'")
        raise NoBlueprintError(f"files have '{name}' of the shape {shapes[name]}, which should be {wanted[name]}")


def _checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():  # which transformers looks for first
        files = [single]
    elif index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    else:
        raise NoBlueprintError("folder has no safetensors")
    found: dict[str, Tensor] = {}
    for file in files:
        tensors, _ = mapped_tensors(file, advice="fetch or save the model again")
        found |= tensors
    # masks and rotary frequencies, which older versions of transformers saved with the weights
    return {name: tensor for name, tensor in found.items() if tensor.dim() < 4 and not name.endswith(_NO_WEIGHTS)}


def plain_config(settings: Mapping[str, Any]) -> PreTrainedConfig:
    """A configuration with these settings and no defaults of a family: its class would be imported with all others."""
    config = PreTrainedConfig()
    for name, value in settings.items():
        setattr(config, name, value)
    config._attn_implementation = "sdpa"  # decides the form of masks, where code asks for it
    return config


# ---- one file -------------------------------------------------------------------------------------------------

_RECORDS: dict[str, type] = {kind.__name__: kind for kind in (Blueprint, Layer, Mixture, Mlp, Norm, PackedMatrix, Rope)}


def save_packed(
    blueprint: Blueprint, config: PreTrainedConfig, generation_config: Mapping[str, Any], folder: Path
) -> None:
    """Write a packed blueprint, with its configuration, for `load_packed`.

    Raises:
        OSError: naming the file.
    """
    tensors: dict[str, Tensor] = {}
    plan = _described(blueprint, "", tensors, {})
    # large tensors last, so that the beginning of the file, which is read first, has all small ones
    ordered = dict(sorted(tensors.items(), key=lambda item: item[1].numel()))
    save_aligned(ordered, folder / PACKED, {"blueprint": json.dumps(plan)})
    write_text(folder / CONFIG, json.dumps(config.to_dict(), indent=2))
    write_text(folder / GENERATION, json.dumps(dict(generation_config), indent=2))


def load_packed(
    folder: Path,
    weights: str,
    *,
    in_float32: Callable[[], PreTrainedModel] | None = None,
    advice: str,
    activations: Activations = "full",
) -> StoredModel:
    """What `save_packed` has written.

    Args:
        folder: where.
        weights: of WEIGHTS, but "fp32".
        in_float32: as for `StoredModel`.
        advice: what to do about a file that is damaged.
        activations: as for `StoredModel`.

    Raises:
        ModelLoadError: a file that cannot be read.
        ParameterError: as for `StoredModel`.
    """
    tensors, metadata = mapped_tensors(folder / PACKED, advice=advice)
    try:
        plan = json.loads(metadata["blueprint"])
        blueprint = _restored(plan, tensors, {})
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        generation = json.loads((folder / GENERATION).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(
            f"{folder} must hold a model as it was packed, got {type(error).__name__} ({error}); {advice}"
        ) from error
    generation_config = GenerationConfig(**generation)  # type: ignore[no-untyped-call]
    return StoredModel(
        plain_config(settings),
        generation_config,
        _with_weights(blueprint, weights),
        weights=weights,
        in_float32=in_float32,
        activations=activations,
    )


def _described(value: Any, name: str, tensors: dict[str, Tensor], seen: dict[int, str]) -> Any:
    """A record as JSON, its tensors by name. What stands in several places is described once."""
    if isinstance(value, tuple):
        return [_described(one, f"{name}.{place}", tensors, seen) for place, one in enumerate(value)]
    if not isinstance(value, Tensor) and not attrs.has(type(value)):
        return value
    if id(value) in seen:
        return {"same": seen[id(value)]}
    seen[id(value)] = name
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    parts = {
        field.name: _described(getattr(value, field.name), f"{name}.{field.name}".lstrip("."), tensors, seen)
        for field in attrs.fields(type(value))
        if field.init  # the others are made by the implementation when it loads
    }
    return {"record": type(value).__name__, "name": name, "parts": parts}


def _restored(plan: Any, tensors: Mapping[str, Tensor], made: dict[str, Any]) -> Any:
    """What `_described` has described."""
    if isinstance(plan, list):
        return tuple(_restored(one, tensors, made) for one in plan)
    if not isinstance(plan, dict):
        return plan
    if "same" in plan:
        return made[plan["same"]]
    if "tensor" in plan:
        made[plan["tensor"]] = tensors[plan["tensor"]]
        return made[plan["tensor"]]
    parts = {name: _restored(part, tensors, made) for name, part in plan["parts"].items()}
    made[plan["name"]] = _RECORDS[plan["record"]](**parts)
    return made[plan["name"]]
