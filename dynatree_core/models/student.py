"""A student: a small model made for one target, whose token embeddings it shares.

What is stored is what is its own: a few layers and a list of the tokens that it can say. Its input embeddings are the
target's, looked up where they are; its head holds the target's rows for those tokens. So it is small on disk, and a
level of a tree does not cost a product with the whole vocabulary.
"""

from __future__ import annotations

import copy
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch
from torch import Tensor, nn

from dynatree_core.errors import ModelLoadError, VocabularyMismatchError
from dynatree_core.files.tensors import load_tensors, save_tensors
from dynatree_core.files.writing import unreadable, whole_file, write_text
from dynatree_core.models.blueprint import NoBlueprintError, family_of, read_blueprint, ropes_of_config
from dynatree_core.models.state import is_plain
from dynatree_core.models.stored import StoredModel, StoredTable, pack_narrowest, plain_config
from dynatree_core.ops import PackedMatrix
from dynatree_core.ops.selection import selected

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "WEIGHTS",
    "RestrictedHead",
    "SharedEmbedding",
    "config_of_layers",
    "is_student",
    "load_student",
    "new_student",
    "read_card",
    "save_student",
]

WEIGHTS = "student.safetensors"
CARD = "student.json"  # says for which target it was made, and how
FORMAT = 1
HEAD_IDS = "head_ids"  # among the weights: [outputs] int32, the token of each output


class SharedEmbedding(nn.Module):
    """The target's input embeddings in the student's dtype. The table is shared, and frozen."""

    def __init__(self, table: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        # in a tuple, so that it is no part of the student: neither moved, stored nor trained
        self._table: tuple[Any] = (table,)
        self.dtype = dtype

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedEmbedding:
        return self  # it owns no tensors

    @property
    def table(self) -> Any:
        """The target's own module."""
        return self._table[0]

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return int(self.table.weight.shape[0])

    def forward(self, token_ids: Tensor) -> Tensor:
        embedded: Tensor = self._table[0](token_ids)
        return embedded.detach().to(self.dtype)


class RestrictedHead(nn.Module):
    """The rows of the target's head for some of its tokens: logits [..., outputs] instead of [..., vocab]."""

    token_ids: Tensor  # [outputs] int64, ascending
    weight: Tensor  # [outputs, hidden]
    bias: Tensor | None  # [outputs]

    def __init__(self, head: Any, token_ids: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        rows = token_ids.long()
        weight = _numbers(head.weight.detach())
        bias: Tensor | None = getattr(head, "bias", None)
        # not persistent: made from the target again whenever the student is loaded
        self.register_buffer("token_ids", rows.to(weight.device), persistent=False)
        self.register_buffer("weight", weight[rows].to(dtype), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach()[rows].to(dtype), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight, self.bias)


def _numbers(weight: Any) -> Tensor:
    """A matrix that can be indexed by rows; a quantised one is dequantised as a whole first."""
    if is_plain(weight) or not hasattr(weight, "dequantize"):
        return weight  # type: ignore[no-any-return]
    numbers: Tensor = weight.dequantize()
    return numbers


def new_student(
    target: PreTrainedModel, layers: Sequence[int], head_ids: Tensor, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A student that begins as some of its target's layers, one behind the other, in eval mode.

    Args:
        target: a causal language model; it is not changed.
        layers: which of its layers, counted from 0.
        head_ids: [outputs] the tokens that the student's head has.
        dtype: of the student.

    Raises:
        ValueError: layers that the target does not have, or in an order that its family cannot have them in.
    """
    num_layers = int(target.config.num_hidden_layers)
    if not layers or not all(0 <= layer < num_layers for layer in layers):
        raise ValueError(f"the student's layers must be from 0 to {num_layers - 1}, got {list(layers)}")
    student = _assembled(config_of_layers(layers, target.config), target, head_ids, dtype)
    # the first one; layers may have others inside, such as norms of each head
    stack = next(name for name, part in target.named_modules() if isinstance(part, nn.ModuleList))
    weights = dict(target.state_dict())
    own = {}
    for name in student.state_dict():
        source = name
        if name.startswith(f"{stack}."):
            index, _, rest = name.removeprefix(f"{stack}.").partition(".")
            source = f"{stack}.{layers[int(index)]}.{rest}"
        own[name] = weights[source].to(dtype)
    student.load_state_dict(own)
    return student.eval()  # type: ignore[no-any-return, no-untyped-call]  # transformers leaves it unannotated


def config_of_layers(layers: Sequence[int], whole: Any) -> Any:
    """The configuration of a model of some layers, each of them as it was among all.

    Raises:
        ValueError: a layer with experts before one without, where the configuration says how many have none.
    """
    config = copy.deepcopy(whole)
    config.num_hidden_layers = len(layers)
    for setting in ("layer_types", "no_rope_layers"):  # which say something of each layer
        if getattr(config, setting, None):
            setattr(config, setting, [getattr(config, setting)[layer] for layer in layers])
    num_dense = getattr(config, "first_k_dense_replace", None)  # the first ones, which have no experts
    if num_dense is not None:
        config.first_k_dense_replace = sum(layer < num_dense for layer in layers)
        if not all(layer < num_dense for layer in layers[: config.first_k_dense_replace]):
            raise ValueError(
                f"the student's layers without experts, those below {num_dense}, must come first, got {list(layers)}"
            )
    if getattr(config, "mlp_only_layers", None) is not None:
        dense, step = config.mlp_only_layers, config.decoder_sparse_step
        config.mlp_only_layers = [
            place for place, layer in enumerate(layers) if layer in dense or (layer + 1) % step != 0
        ]
        config.decoder_sparse_step = 1
    return config


def save_student(student: PreTrainedModel, folder: Path, dtype: torch.dtype, card: Mapping[str, Any]) -> None:
    """Save the student's own parts: configuration, layers, the tokens of its head, and the card."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: Any = student  # transformers leaves some of its functions unannotated
    head = parts.get_output_embeddings()
    own = {name: weight.to(dtype) for name, weight in student.state_dict().items()}
    with whole_file(folder / "config.json") as draft:
        student.config.to_json_file(draft)
    save_tensors({**own, HEAD_IDS: head.token_ids.int()}, folder / WEIGHTS)
    sizes = {"vocab_size": parts.get_input_embeddings().num_embeddings, "hidden_size": int(head.weight.shape[1])}
    write_text(folder / CARD, json.dumps({"format": FORMAT, **sizes, **card}, indent=2) + "\n")


def is_student(folder: Path) -> bool:
    """Whether a folder holds a student, rather than a model that stands alone."""
    return (folder / CARD).is_file()


def read_card(folder: Path) -> dict[str, Any] | None:
    """The card of a student's folder; None where the folder is not one of `save_student`."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return card if isinstance(card, dict) and {"format", "vocab_size", "hidden_size"} <= set(card) else None


def load_student(folder: Path, target: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A stored student with its target's embeddings, on the target's device, ready to draft.

    Raises:
        ModelLoadError: the folder holds no student, or a damaged one.
        VocabularyMismatchError: the target is not one that it can be used with.
    """
    if (closed := unreadable(folder / CARD, folder / "config.json", folder / WEIGHTS)) is not None:
        raise ModelLoadError(
            f"the drafter in '{folder}' must be one that this user may read, got {closed}; let its owner run `chmod -R "
            f"a+rX {folder}`, or choose another drafter"
        )
    is_stored = isinstance(target, StoredModel)
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        config = _read_config(folder, is_plain=is_stored)
        weights = load_tensors(folder / WEIGHTS, advice="make it again")
        head_ids = weights.pop(HEAD_IDS)
        made_for = card["vocab_size"], card["hidden_size"]
    except (OSError, ValueError, KeyError, TypeError, ModelLoadError) as error:
        raise _damaged(folder, error) from error
    table: Any = target.get_input_embeddings()
    got = tuple(table.weight.shape)
    if made_for != got:
        raise VocabularyMismatchError(
            f"the drafter in '{folder}' shares the embeddings of its target, {card.get('target')}: {made_for[0]} "
            f"tokens of {made_for[1]} numbers, but this target has {got[0]} of {got[1]}; choose another drafter, such "
            "as prompt_lookup"
        )
    try:
        if isinstance(target, StoredModel):  # whose rows can be read, without widening all of them
            return cast("PreTrainedModel", _stored_student(folder, config, target, head_ids, weights))
        _check_embeddings(target, head_ids)
        student = _assembled(config, target, head_ids, dtype)
        student.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()})
    except (
        RuntimeError,
        IndexError,
        NoBlueprintError,
    ) as error:  # missing tensors, other shapes, token ids outside the vocabulary
        raise _damaged(folder, error) from error
    return student.eval()  # type: ignore[no-any-return, no-untyped-call]  # transformers leaves it unannotated


def _stored_student(
    folder: Path, config: PreTrainedConfig, target: StoredModel, head_ids: Tensor, weights: Mapping[str, Tensor]
) -> StoredModel:
    """A student of a `StoredModel`, in its stored bits. Its head has the target's packed rows, unchanged."""
    family = family_of(config)
    stand_in = torch.zeros(1, config.hidden_size)  # for embeddings and head, which are the target's
    named = {**weights, f"{family.base}.{family.embedding}.weight": stand_in, "lm_head.weight": stand_in}
    own = read_blueprint(config, named, ropes_of_config(config)).packed(pack_narrowest)
    head = target.get_output_embeddings().packed
    assert isinstance(head, PackedMatrix), "the head of a stored model is packed"
    rows = head_ids.long()
    some = selected(head, rows)
    blueprint = attrs.evolve(own, embedding=target.blueprint.embedding, head=some)
    return StoredModel(
        config,
        target.generation_config,
        blueprint,
        weights="stored",
        in_float32=lambda: load_student(folder, target.in_transformers(), torch.float32),
        head=StoredTable(some, rows),
    )


def _read_config(folder: Path, *, is_plain: bool) -> PreTrainedConfig:
    if is_plain:  # no class of a family, whose import takes more than a second; a student's file has every setting
        return plain_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    from transformers import AutoConfig

    config: PreTrainedConfig = AutoConfig.from_pretrained(str(folder))
    return config


def _check_embeddings(target: Any, head_ids: Tensor) -> None:
    """Refuse a target whose embeddings or head cannot be read row by row.

    Raises:
        VocabularyMismatchError: naming their class.
    """
    device = target.device
    try:
        target.get_input_embeddings()(head_ids[:1].long().to(device))
        _numbers(target.get_output_embeddings().weight)[head_ids[:1].long().to(device)]
    except (RuntimeError, TypeError, AttributeError) as error:  # NotImplementedError among them
        tables = target.get_input_embeddings(), target.get_output_embeddings()
        kinds = " and ".join(sorted({type(getattr(table, "weight", table)).__name__ for table in tables}))
        came = textwrap.shorten(str(error), 120, placeholder=" …")
        raise VocabularyMismatchError(
            f"a distilled drafter reads rows of its target's embeddings and head, which are {kinds} here and cannot be "
            f"read so ({type(error).__name__}: {came}); leave these two layers as they are when quantising, or use the "
            "drafter prompt_lookup"
        ) from error


def _damaged(folder: Path, error: Exception) -> ModelLoadError:
    came = textwrap.shorten(str(error), 160, placeholder=" …")
    return ModelLoadError(
        f"cannot load the drafter in '{folder}': expected a folder made by `dynatree distill`, got "
        f"{type(error).__name__} ({came}); make it again, or choose another drafter"
    )


def _assembled(
    config: PreTrainedConfig, target: PreTrainedModel, head_ids: Tensor, dtype: torch.dtype
) -> PreTrainedModel:
    """A model of this configuration with random layers, the target's embeddings, and a head for some tokens."""
    from transformers import AutoModelForCausalLM  # takes seconds, and a student of a `StoredModel` needs none

    config = copy.deepcopy(config)
    # smallest possible tables, since they are replaced below
    config.vocab_size, config.tie_word_embeddings = 1, False
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None  # or it warns of ids beyond the table
    auto: Any = AutoModelForCausalLM  # transformers leaves some of its functions unannotated
    source: Any = target
    # sampling without a seed draws from the same generators as the random layers, which are replaced as well
    with torch.random.fork_rng([target.device] if target.device.type == "cuda" else []):
        student = auto.from_config(config, dtype=dtype).to(target.device)
    student.set_input_embeddings(SharedEmbedding(source.get_input_embeddings(), dtype))
    student.set_output_embeddings(RestrictedHead(source.get_output_embeddings(), head_ids.to(target.device), dtype))
    return cast("PreTrainedModel", student)
