"""Blueprints: what the passes of a model consist of, for a runner that computes them by operators of its own.

A blueprint is made from a model's configuration and its parameters, by the table `FAMILIES`. Nothing is guessed: a
setting that the table does not know, a parameter that no layer has taken, or a module of another class than
transformers' own is a reason against it (`NoBlueprintError`), and the model is computed as transformers wrote it.

Each family was read in transformers' source; `tests/test_native.py` compares every one of them with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dynatree_core.models.architectures import EXACT_FAMILIES
from dynatree_core.models.state import is_plain
from dynatree_core.ops import ACTIVATIONS, Activation, Norm, PackedMatrix

__all__ = [
    "FAMILIES",
    "Blueprint",
    "Family",
    "Layer",
    "Matrix",
    "Mixture",
    "Mlp",
    "NoBlueprintError",
    "Packer",
    "Rope",
    "blueprint_of",
    "family_of",
    "read_blueprint",
    "ropes_of_config",
]

_SLIDING = "sliding_attention"  # as in a configuration's layer_types
_WITHOUT_ROPE = ("gpt2", "opt")


class NoBlueprintError(Exception):
    """There is no blueprint of a model; says why, behind "knows no model whose"."""


Packer = Callable[[tuple[Tensor, ...], Tensor | None], PackedMatrix]  # matrices one below the other, and their biases


@attrs.frozen(eq=False)
class Matrix:
    """A linear layer, or several that read the same rows, one below the other."""

    parts: tuple[Tensor, ...]  # [outputs, inputs] each
    bias: Tensor | None  # [outputs of all parts]
    order: Tensor | None = None  # [outputs] int64: the rows in which they are wanted, of all parts; None: as they are

    @property
    def num_outputs(self) -> int:
        return sum(len(part) for part in self.parts) if self.order is None else len(self.order)

    @property
    def num_inputs(self) -> int:
        return self.parts[0].shape[1]

    def packed(self, pack: Packer) -> PackedMatrix:
        """The matrix as the operators take it."""
        if self.order is None:
            return pack(self.parts, self.bias)
        rows = torch.cat(self.parts)[self.order]
        return pack((rows,), None if self.bias is None else self.bias[self.order])


@attrs.frozen(eq=False)
class Rope:
    """A rotary embedding: the first `2 × frequencies` numbers of each head are turned by the position."""

    inv_freq: Tensor  # [frequencies] float32
    scaling: float  # cosine and sine are multiplied by it
    is_interleaved: bool  # pairs stand side by side, rather than half the turned numbers apart


@attrs.frozen(eq=False)
class Mlp:
    """The layer behind attention: act(gate) × up, or act(up), and back to the hidden size."""

    up: Matrix | PackedMatrix  # gate and up, one below the other, where it is gated
    down: Matrix | PackedMatrix
    activation: Activation


@attrs.frozen(eq=False, kw_only=True)
class Mixture:
    """Several layers in the place of `Mlp`, of which a row goes through some."""

    router: Matrix | PackedMatrix  # a score for each expert; the last for the one that every row goes through
    experts: tuple[Mlp, ...]  # which comes last, where there is one
    num_chosen: int  # experts of a row, besides that one
    adds_up: bool  # whether the weights of these add up to 1, rather than to their shares in a softmax of all
    has_shared: bool  # whether every row goes through the last one, by the sigmoid of its score


@attrs.frozen(eq=False, kw_only=True)
class Layer:
    """A decoder layer."""

    qkv: Matrix | PackedMatrix  # queries, keys and values, one below the other
    output: Matrix | PackedMatrix
    mlp: Mlp | Mixture
    num_heads: int
    num_key_heads: int
    head_dim: int
    scale: float  # of the scores
    attention_norm: Norm | None = None  # of what goes into the attention
    mlp_norm: Norm | None = None
    attention_post_norm: Norm | None = None  # of what comes out, before it is added
    mlp_post_norm: Norm | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    rope: Rope | None = None
    window: int | None = None  # how far back it sees, itself counted; None: all the way
    softcap: float | None = None  # of the scores
    sinks: Tensor | None = None  # [heads]: a score each that takes its share and gives nothing
    clip: float | None = None  # of queries, keys and values
    residual_scale: float = 1.0  # of what attention and MLP add
    is_parallel: bool = False  # the MLP reads what the attention reads, not what it leaves
    query_growth: tuple[float, float] | None = None  # (β, length): queries × 1 + β log(1 + ⌊position ÷ length⌋)


@attrs.frozen(eq=False, kw_only=True)
class Blueprint:
    """What a pass computes, from token ids to logits."""

    embedding: Tensor | PackedMatrix  # [tokens, hidden]
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    head: Matrix | PackedMatrix
    embedding_scale: float = 1.0
    positions: Tensor | None = None  # [positions, hidden]: learned, added to the embeddings
    position_offset: int = 0  # row of the table for position 0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def packed(self, pack: Packer, pack_router: Packer | None = None) -> Blueprint:
        """The same with every matrix packed, each once.

        Args:
            pack: how.
            pack_router: routers of mixtures, where these are to be packed otherwise: rounded to fewer bits one sends
                rows to other experts.
        """
        of_router = None if pack_router is None else lambda matrix: matrix.packed(pack_router)
        return self.mapped(lambda matrix: matrix.packed(pack), of_router)

    def mapped(self, laid_out: Callable[[Any], Any], router_laid_out: Callable[[Any], Any] | None = None) -> Blueprint:
        """The same with every matrix as somebody's operators take it; routers of mixtures by their own function."""

        def of_mlp(mlp: Mlp) -> Mlp:
            return attrs.evolve(mlp, up=laid_out(mlp.up), down=laid_out(mlp.down))

        def of_either(mlp: Mlp | Mixture) -> Mlp | Mixture:
            if isinstance(mlp, Mlp):
                return of_mlp(mlp)
            router = (router_laid_out or laid_out)(mlp.router)
            return attrs.evolve(mlp, router=router, experts=tuple(map(of_mlp, mlp.experts)))

        layers = tuple(
            attrs.evolve(layer, qkv=laid_out(layer.qkv), output=laid_out(layer.output), mlp=of_either(layer.mlp))
            for layer in self.layers
        )
        return attrs.evolve(self, layers=layers, head=laid_out(self.head))

    def matrices(self) -> list[Any]:
        """All matrices, each as often as it stands somewhere, in one order; the embeddings are not among them."""
        found: list[Any] = [self.head]
        for layer in self.layers:
            blocks = layer.mlp.experts if isinstance(layer.mlp, Mixture) else (layer.mlp,)
            routers = [layer.mlp.router] if isinstance(layer.mlp, Mixture) else []
            found += [layer.qkv, layer.output, *routers, *(part for block in blocks for part in (block.up, block.down))]
        return found


@attrs.frozen(kw_only=True)
class Family:
    """Under which names transformers keeps a family's parameters and settings. The defaults are Llama's."""

    base: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    final_norm: str | None = "norm"
    head_in_files: str = "lm_head"  # what checkpoints call the head
    norm: str = "rms"  # or "layer"
    eps: str | float = "rms_norm_eps"  # a field of the configuration, or the number itself
    is_one_added: bool = False  # norms multiply with 1 + weight
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    qkv_order: str = "stacked"  # order of the rows of a fused matrix: "stacked", "by_head" or "by_group"
    output: str = "o_proj"
    query_key_norms: tuple[str, str] | None = None
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"  # None beside is_parallel: the attention's
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    mlp: str = "mlp"
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    router: str = "gate"  # of a mixture of experts, where a layer has one
    expert_in_files: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # which hold experts one by one
    mixture_in_files: str = "mlp"
    adds_up: str | None = None  # whether weights of a row's experts add up to 1: a field; None: they do
    is_clipped: bool = False  # experts are gpt-oss's: [inputs, outputs], gate and up by turns, and a gate of their own
    is_parallel: bool = False
    activation: str = "hidden_act"
    is_interleaved: bool = False
    turns_part: bool = False  # of each head, as partial_rotary_factor says; others do so in scaled embeddings only
    is_transposed: bool = False  # matrices are [inputs, outputs], as GPT-2's Conv1D has them
    details: Callable[[Any, _Reader], dict[str, Any]] | None = None  # more fields of Blueprint
    layer_details: Callable[[Any, int], dict[str, Any]] | None = None  # further fields of one Layer
    refuses: Callable[[Any], str | None] = lambda config: None  # names an unsupported setting
    variant: Callable[[Any], dict[str, Any]] = lambda config: {}  # fields that a setting changes


class _Reader:
    """A model's parameters by name. It notes which were used: an unused one is a layer that is not understood."""

    def __init__(self, weights: Mapping[str, Tensor], family: Family) -> None:
        self._weights = weights
        self._family = family
        self.taken: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self._weights

    def has_norm(self, name: str) -> bool:
        return self.has(f"{name}.weight") or self.has(f"{name}.norms.0.weight")

    def get(self, name: str) -> Tensor:
        if name not in self._weights:
            raise NoBlueprintError(f"'{name}' is missing")
        self.taken.add(name)
        return self._weights[name].detach()

    def vector(self, name: str) -> Tensor:
        """Numbers of a norm, a bias or a table, in the precision that is computed in."""
        vector = self.get(name)
        return vector if vector.dtype == torch.float64 else vector.float().contiguous()

    def norm(self, name: str | None, config: Any, *, eps: str | float | None = None) -> Norm | None:
        """The norm of a name; one without any parameters where there are none."""
        if name is None:
            return None
        family = self._family
        given = family.eps if eps is None else eps
        size = float(getattr(config, given)) if isinstance(given, str) else given
        weight, bias = self._of_norm(name, "weight"), self._of_norm(name, "bias")
        return Norm(family.norm, weight, size, bias, offset=1.0 if family.is_one_added else 0.0)  # type: ignore[arg-type]

    def _of_norm(self, name: str, part: str) -> Tensor | None:
        """A norm's weight or bias: [hidden], or [heads, head_dim] where each head has its own; None: it has none."""
        if self.has(f"{name}.{part}"):
            return self.vector(f"{name}.{part}")
        heads: list[Tensor] = []
        while self.has(f"{name}.norms.{len(heads)}.{part}"):
            heads.append(self.vector(f"{name}.norms.{len(heads)}.{part}"))
        return torch.stack(heads) if heads else None

    def head(self) -> Matrix:
        bias = self.vector("lm_head.bias") if self.has("lm_head.bias") else None
        return Matrix((self.get("lm_head.weight"),), bias)

    def matrix(self, *names: str, order: Tensor | None = None) -> Matrix:
        """Linear layers, one below the other; with `order` their rows are taken in it."""
        parts = [self.get(f"{name}.weight") for name in names]
        if self._family.is_transposed:
            parts = [part.t() for part in parts]
        biases = [self.vector(f"{name}.bias") if self.has(f"{name}.bias") else None for name in names]
        bias = None
        if any(bias is not None for bias in biases):
            sized = zip(biases, parts, strict=True)
            some = next(bias for bias in biases if bias is not None)
            bias = torch.cat([some.new_zeros(part.shape[0]) if one is None else one for one, part in sized])
        return Matrix(tuple(parts), bias, order)


def blueprint_of(model: nn.Module) -> Blueprint:
    """What a model's passes consist of. Its tensors are the model's own, but where they had to be put in order.

    Args:
        model: one that is as transformers made it (`is_untouched`), or a student.

    Raises:
        NoBlueprintError: it is not known here, or not all of it.
    """
    config: Any = model.config
    family = family_of(config)
    blueprint = read_blueprint(config, _weights_of(model, family), _ropes(model, family))
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    table = getattr(table, "table", table)  # a student's is its target's
    if hasattr(table, "embed_scale"):  # a number that Gemma's families keep there
        blueprint = attrs.evolve(blueprint, embedding_scale=float(table.embed_scale.to(table.weight.dtype)))
    if config._attn_implementation != "sdpa":
        return blueprint
    # which has no soft caps, so that a family with them has none where a release of transformers runs it so
    return attrs.evolve(blueprint, layers=tuple(attrs.evolve(layer, softcap=None) for layer in blueprint.layers))


def family_of(config: Any) -> Family:
    """Where a model of this configuration keeps what.

    Raises:
        NoBlueprintError: it is not known here, or has a setting that is not.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise NoBlueprintError(f"model type is '{config.model_type}'")
    reason = family.refuses(config)
    if reason is not None:
        raise NoBlueprintError(reason)
    return attrs.evolve(family, **family.variant(config))


def read_blueprint(config: Any, weights: Mapping[str, Tensor], ropes: Mapping[str, Rope | None]) -> Blueprint:
    """The blueprint of a configuration and its parameters.

    Args:
        config: the model's.
        weights: all parameters by transformers' names; "lm_head.weight" is there too where it is tied.
        ropes: rotary embeddings by layer type, "all" for the one of all layers; None: there is none.

    Raises:
        NoBlueprintError: as `blueprint_of`.
    """
    family = family_of(config)
    reader = _Reader(weights, family)
    base = family.base
    details = {} if family.details is None else family.details(config, reader)
    names = [f"{base}.{family.layers}.{index}" for index in range(int(config.num_hidden_layers))]
    layers = tuple(_layer(name, index, config, family, reader, ropes) for index, name in enumerate(names))
    blueprint = Blueprint(
        embedding=reader.get(f"{base}.{family.embedding}.weight"),
        layers=layers,
        final_norm=reader.norm(None if family.final_norm is None else f"{base}.{family.final_norm}", config),
        head=reader.head(),
        **details,
    )
    left = sorted(weights.keys() - reader.taken)
    if left:
        raise NoBlueprintError(f"layers have more than is known of {config.model_type}, such as '{left[0]}'")
    return blueprint


def _weights_of(model: nn.Module, family: Family) -> dict[str, Tensor]:
    """A model's parameters, and what its embeddings and its head compute with, under the names of these."""
    modules: Any = model
    table, head = modules.get_input_embeddings(), modules.get_output_embeddings()
    table = getattr(table, "table", table)  # a student's is its target's
    for role, part in (("embedding", table), ("head", head)):
        if not isinstance(getattr(part, "weight", None), Tensor):  # such as a sequence of layers
            raise NoBlueprintError(f"{role} is a {type(part).__name__}")
    if getattr(table, "max_norm", None) is not None:
        raise NoBlueprintError("embeddings are scaled down to a length when they are looked up")
    weights: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    weights[f"{family.base}.{family.embedding}.weight"] = table.weight
    weights["lm_head.weight"] = head.weight  # of a student, a buffer
    if getattr(head, "bias", None) is not None:
        weights["lm_head.bias"] = head.bias
    for name, weight in weights.items():
        if not is_plain(weight):
            raise NoBlueprintError(f"'{name}' is a {type(weight).__name__}")
    return weights


def _layer(
    name: str, index: int, config: Any, family: Family, reader: _Reader, ropes: Mapping[str, Rope | None]
) -> Layer:
    attention = f"{name}.{family.attention}"
    # some families ignore a head_dim or num_key_value_heads of their configuration, so these are seen by the matrices
    heads = int(config.num_attention_heads)
    output = reader.matrix(f"{attention}.{family.output}")
    head_dim = output.num_inputs // heads
    order = _qkv_order(config, family, heads, head_dim)
    qkv = reader.matrix(*(f"{attention}.{part}" for part in family.qkv), order=order)
    key_heads = (qkv.num_outputs // head_dim - heads) // 2
    if output.num_inputs != heads * head_dim or qkv.num_outputs != (heads + 2 * key_heads) * head_dim:
        raise NoBlueprintError(f"'{attention}' has matrices that do not fit its {heads} heads")
    kinds = getattr(config, "layer_types", None)
    kind = kinds[index] if kinds and EXACT_FAMILIES[config.model_type] == "layer" else "all"
    query_norm = key_norm = None
    if family.query_key_norms is not None and reader.has_norm(f"{attention}.{family.query_key_norms[0]}"):
        query_norm, key_norm = (reader.norm(f"{attention}.{norm}", config) for norm in family.query_key_norms)
    mlp = f"{name}.{family.mlp}" if family.mlp else name
    parts: dict[str, Any] = {
        "qkv": qkv,
        "output": output,
        "mlp": _mixture(mlp, config, family, reader) or _mlp(mlp, config, family, reader),
        "num_heads": heads,
        "num_key_heads": key_heads,
        "head_dim": head_dim,
        "scale": head_dim**-0.5,
        "query_norm": query_norm,
        "key_norm": key_norm,
        "rope": ropes[kind] if kind in ropes else ropes["all"],
        "window": _window(config, kind),
        "is_parallel": family.is_parallel,
    }
    for role in ("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm"):
        own = getattr(family, role)
        parts[role] = reader.norm(None if own is None else f"{name}.{own}", config)
    if reader.has(f"{attention}.sinks"):
        parts["sinks"] = reader.vector(f"{attention}.sinks")
    if family.layer_details is not None:
        parts |= family.layer_details(config, index)
    if parts["is_parallel"] and parts["mlp_norm"] is None:
        parts["mlp_norm"] = parts["attention_norm"]
    return Layer(**parts)


def _activation(config: Any, family: Family) -> Activation:
    activation = getattr(config, family.activation)
    if activation not in ACTIVATIONS:
        raise NoBlueprintError(f"activation is {activation!r}")
    return ACTIVATIONS[activation]


def _mlp(name: str, config: Any, family: Family, reader: _Reader) -> Mlp:
    return Mlp(
        reader.matrix(*(f"{name}.{part}" for part in family.up)),
        reader.matrix(f"{name}.{family.down}"),
        _activation(config, family),
    )


def _mixture(name: str, config: Any, family: Family, reader: _Reader) -> Mixture | None:
    """A layer's mixture of experts; None: it has none. Some families have it in some layers only."""
    if not reader.has(f"{name}.experts.gate_up_proj") and not reader.has(_in_files(name, 0, family)[0] + ".weight"):
        return None
    has_shared = reader.has(f"{name}.shared_expert_gate.weight")
    num_experts = reader.matrix(f"{name}.{family.router}").num_outputs
    experts = _experts(name, num_experts, config, family, reader)
    routers = [family.router]
    if has_shared:
        experts.append(_mlp(f"{name}.shared_expert", config, family, reader))
        routers.append("shared_expert_gate")
    return Mixture(
        router=reader.matrix(*(f"{name}.{router}" for router in routers)),
        experts=tuple(experts),
        num_chosen=int(config.num_experts_per_tok),
        adds_up=family.adds_up is None or bool(getattr(config, family.adds_up)),
        has_shared=has_shared,
    )


def _in_files(name: str, number: int, family: Family) -> list[str]:
    """Gate, up and down of an expert, as checkpoints name them."""
    return [f"{name}.experts.{number}.{part}" for part in family.expert_in_files]


def _experts(name: str, number: int, config: Any, family: Family, reader: _Reader) -> list[Mlp]:
    """A layer's experts: two tensors of all of them in a model, and most checkpoints have some for each."""
    activation: Activation = "clipped_swiglu" if family.is_clipped else _activation(config, family)
    if not reader.has(f"{name}.experts.gate_up_proj"):
        parts = [_in_files(name, one, family) for one in range(number)]
        return [Mlp(reader.matrix(gate, up), reader.matrix(down), activation) for gate, up, down in parts]
    ups, downs = (reader.get(f"{name}.experts.{part}_proj") for part in ("gate_up", "down"))
    if len(ups) != number or len(downs) != number:
        raise NoBlueprintError(f"'{name}.experts' are {len(ups)} and its router has {number} outputs")
    if not family.is_clipped:
        pairs = zip(ups, downs, strict=True)
        return [Mlp(Matrix((up,), None), Matrix((down,), None), activation) for up, down in pairs]
    biases = (reader.vector(f"{name}.experts.{part}_proj_bias") for part in ("gate_up", "down"))
    by_turns = torch.arange(ups.shape[2]).view(-1, 2).t().reshape(-1)
    return [
        Mlp(Matrix((up.t(),), up_bias, by_turns), Matrix((down.t(),), down_bias), activation)
        for up, down, up_bias, down_bias in zip(ups, downs, *biases, strict=True)
    ]


def _window(config: Any, kind: str) -> int | None:
    """How far back a layer sees, as `architectures.attention_layout` has it."""
    looks_back = EXACT_FAMILIES[config.model_type]
    if looks_back == "every" or kind == _SLIDING:
        window = getattr(config, "sliding_window", None)
        return None if window is None else int(window)
    return None


def _qkv_order(config: Any, family: Family, heads: int, head_dim: int) -> Tensor | None:
    """The rows of a fused matrix as queries, keys and values one below the other; None: they stand so."""
    if family.qkv_order == "by_head":  # GPT-NeoX: query, key and value of the first head, then of the second
        rows = torch.arange(3 * heads * head_dim).view(heads, 3, head_dim)
        return rows.transpose(0, 1).reshape(-1)
    if family.qkv_order == "by_group":  # Falcon
        if not config.new_decoder_architecture and config.multi_query:
            return None
        groups = int(config.num_kv_heads) if config.new_decoder_architecture else heads
        rows = torch.arange((heads + 2 * groups) * head_dim).view(groups, -1, head_dim)
        queries, keys, values = rows[:, :-2], rows[:, -2:-1], rows[:, -1:]
        # transformers keeps a key and a value for each head in the cache, so as many are made here
        repeated = (part.expand(-1, heads // groups, -1) for part in (keys, values))
        return torch.cat([queries.reshape(-1), *(part.reshape(-1) for part in repeated)])
    return None


def _ropes(model: nn.Module, family: Family) -> dict[str, Rope | None]:
    """The rotary embeddings by layer type, "all" for the one of all layers; None: there is none."""
    config: Any = model.config
    if config.model_type in _WITHOUT_ROPE:
        return {"all": None}
    # GPT-J's, a table of the default angles; in releases of transformers before 5.24 each layer has one
    tables: list[Any] = [part.embed_positions for part in model.modules() if hasattr(part, "embed_positions")]
    if tables:
        pairs = tables[0].shape[1]
        inv_freq = 1.0 / 10000 ** (torch.arange(0, pairs, 2, dtype=torch.float32) / pairs)
        angles = torch.arange(tables[0].shape[0], dtype=torch.float32)[:, None] * inv_freq
        expected = torch.cat([angles.sin(), angles.cos()], dim=1)
        close = max(torch.finfo(tables[0].dtype).eps, 1e-6)
        if not all(torch.allclose(table.float().cpu(), expected, rtol=0, atol=close) for table in tables):
            raise NoBlueprintError("table of angles is not the usual one")
        return {"all": Rope(inv_freq, 1.0, family.is_interleaved)}
    try:
        module: Any = model.get_submodule(f"{family.base}.rotary_emb")
    except AttributeError:
        raise NoBlueprintError("rotary embedding is not where this release of transformers should have it") from None
    ropes: dict[str, Rope | None] = {}
    for name, _ in module.named_buffers(recurse=False):
        if not name.endswith("original_inv_freq"):
            continue
        prefix = name.removesuffix("original_inv_freq")  # "" or a layer type and "_"
        kind = prefix.removesuffix("_")
        frequencies: Tensor = getattr(module, name if _begins_anew(module, kind) else f"{prefix}inv_freq")
        scaling = getattr(module, f"{prefix}attention_scaling")
        ropes[kind or "all"] = Rope(frequencies.detach().float(), float(scaling), family.is_interleaved)
    if not ropes:
        raise NoBlueprintError(f"rotary embedding is a {type(module).__name__} without frequencies")
    return ropes


def _begins_anew(rotary: Any, kind: str) -> bool:
    """Whether the next pass within the context limit (`architectures.max_positions`) has the frequencies of the start.

    Those that grow with the text have grown in a longer one. All others are as somebody may have set them.
    """
    rope_type = rotary.rope_type[kind] if kind else rotary.rope_type
    num_cached = getattr(rotary, f"{kind}_max_seq_len_cached", rotary.max_seq_len_cached)
    return rope_type == "longrope" or ("dynamic" in rope_type and bool(num_cached > rotary.original_max_seq_len))


def ropes_of_config(config: Any) -> dict[str, Rope | None]:
    """The rotary embeddings that a configuration describes, as transformers makes them of it.

    Raises:
        NoBlueprintError: of a kind that is not known here.
    """
    family = family_of(config)
    described = getattr(config, "rope_parameters", None)
    if config.model_type in _WITHOUT_ROPE:
        return {"all": None}
    if described is None or config.model_type == "gptj":
        raise NoBlueprintError("rotary embedding is not described")
    nested = {kind: part for kind, part in described.items() if isinstance(part, dict)}
    if not nested:
        return {"all": Rope(*_frequencies(config, family, described, None), family.is_interleaved)}
    return {
        kind: Rope(*_frequencies(config, family, part, kind), family.is_interleaved) for kind, part in nested.items()
    }


def _frequencies(config: Any, family: Family, rope: Mapping[str, Any], kind: str | None) -> tuple[Tensor, float]:
    """[frequencies] float32, and the scaling, as transformers computes them for a layer type."""
    if rope["rope_type"] == "default":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        turned = int(head_dim * rope.get("partial_rotary_factor", 1.0)) if family.turns_part else head_dim
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, turned, 2, dtype=torch.float) / turned), 1.0
    if rope["rope_type"] not in ROPE_INIT_FUNCTIONS:
        raise NoBlueprintError(f"rotary embedding is of type '{rope['rope_type']}'")
    named = {} if kind is None else {"layer_type": kind}
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, device=torch.device("cpu"), **named)
    return inv_freq.float(), float(scaling)


# ---- what only some families have -----------------------------------------------------------------------------


def _gemma(config: Any, reader: _Reader) -> dict[str, Any]:
    softcap = getattr(config, "final_logit_softcapping", None)
    return {
        "embedding_scale": float(torch.tensor(config.hidden_size**0.5, dtype=torch.float32)),
        "logit_softcap": softcap,
    }


def _gemma_layer(config: Any, index: int) -> dict[str, Any]:
    return {
        "scale": config.query_pre_attn_scalar**-0.5,
        "softcap": getattr(config, "attn_logit_softcapping", None),
    }


def _granite(config: Any, reader: _Reader) -> dict[str, Any]:
    return {"embedding_scale": config.embedding_multiplier, "logit_scale": 1 / config.logits_scaling}


def _granite_layer(config: Any, index: int) -> dict[str, Any]:
    return {"scale": config.attention_multiplier, "residual_scale": config.residual_multiplier}


def _smollm3_layer(config: Any, index: int) -> dict[str, Any]:
    turned = {} if config.no_rope_layers[index] else {"rope": None}
    return turned if config.use_sliding_window else {**turned, "window": None}


def _cohere2_layer(config: Any, index: int) -> dict[str, Any]:
    return {} if config.layer_types[index] == _SLIDING else {"rope": None}


def _neox_layer(config: Any, index: int) -> dict[str, Any]:
    return {"is_parallel": bool(config.use_parallel_residual)}


def _gpt2(config: Any, reader: _Reader) -> dict[str, Any]:
    return {"positions": reader.vector("transformer.wpe.weight")}


def _gpt2_layer(config: Any, index: int) -> dict[str, Any]:
    scale = (config.hidden_size // config.num_attention_heads) ** -0.5 if config.scale_attn_weights else 1.0
    return {"scale": scale / (index + 1) if config.scale_attn_by_inverse_layer_idx else scale}


def _opt(config: Any, reader: _Reader) -> dict[str, Any]:
    return {"positions": reader.vector("model.decoder.embed_positions.weight"), "position_offset": 2}


def _ministral_layer(config: Any, index: int) -> dict[str, Any]:
    rope = config.rope_parameters
    return {"query_growth": (rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings"))}


def _cohere(config: Any, reader: _Reader) -> dict[str, Any]:
    return {"logit_scale": config.logit_scale}


def _clipped_layer(config: Any, index: int) -> dict[str, Any]:
    return {"clip": config.clip_qkv}


def _refused_olmoe(config: Any) -> str | None:
    return None if config.clip_qkv is None else "queries and keys are cut behind their norms"


def _refused_gpt_oss(config: Any) -> str | None:
    settings = getattr(config, "swiglu_alpha", 1.702), getattr(config, "swiglu_limit", 7.0)
    return None if settings == (1.702, 7.0) else f"experts have a gate with the settings {settings}"


def _refused_opt(config: Any) -> str | None:
    if not config.do_layer_norm_before or config._remove_final_layer_norm:
        return "norms stand behind its layers"
    if config.word_embed_proj_dim != config.hidden_size:
        return "embeddings have another size than its layers"
    return None


def _refused_ministral(config: Any) -> str | None:
    rope = config.rope_parameters
    if rope.get("llama_4_scaling_beta") is None or rope.get("original_max_position_embeddings") is None:
        return "queries grow with the position by an unknown factor"
    return None


def _parallel_stablelm(config: Any) -> dict[str, Any]:
    return {"mlp_norm": None, "is_parallel": True} if config.use_parallel_residual else {}


def _parallel_falcon(config: Any) -> dict[str, Any]:
    if config.new_decoder_architecture:
        return {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp", "is_parallel": True}
    return {"mlp_norm": None, "is_parallel": True} if config.parallel_attn else {}


def _refused_falcon(config: Any) -> str | None:
    if config.alibi:
        return "positions are biases of attention"
    if config.new_decoder_architecture and not (config.parallel_attn and config.num_ln_in_parallel_attn == 2):
        return "parallel parts do not have a norm each"
    if not config.new_decoder_architecture and config.parallel_attn and config.num_ln_in_parallel_attn == 2:
        return "parallel parts have a norm each in the old layout"
    return None


def _refused_gptj(config: Any) -> str | None:
    return "heads are turned as a whole" if config.rotary_dim is None else None


def _refused_gpt2(config: Any) -> str | None:
    return "layers look at another text" if config.add_cross_attention else None


_LAYER: dict[str, Any] = {"norm": "layer"}
_NEW_GEMMA: dict[str, Any] = {
    "is_one_added": True, "activation": "hidden_activation", "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm", "mlp_post_norm": "post_feedforward_layernorm", "details": _gemma,
    "layer_details": _gemma_layer,
}  # fmt: skip
_OLMO2: dict[str, Any] = {
    "attention_norm": None, "mlp_norm": None, "attention_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm", "query_key_norms": ("q_norm", "k_norm"),
}  # fmt: skip
_PER_HEAD = ("q_norm", "k_norm")

# model type -> where it keeps what; what is not here is computed by other runners
FAMILIES: dict[str, Family] = {
    "cohere": Family(
        **_LAYER, eps="layer_norm_eps", mlp_norm=None, is_parallel=True, is_interleaved=True,
        query_key_norms=_PER_HEAD, details=_cohere,
    ),
    "cohere2": Family(
        **_LAYER, eps="layer_norm_eps", mlp_norm=None, is_parallel=True, is_interleaved=True, details=_cohere,
        layer_details=_cohere2_layer,
    ),
    "falcon": Family(
        **_LAYER, base="transformer", layers="h", embedding="word_embeddings", final_norm="ln_f",
        eps="layer_norm_epsilon", attention="self_attention", qkv=("query_key_value",), qkv_order="by_group",
        output="dense", up=("dense_h_to_4h",), down="dense_4h_to_h", activation="activation", refuses=_refused_falcon,
        variant=_parallel_falcon,
    ),
    "gemma": Family(is_one_added=True, details=_gemma),
    "gemma2": Family(**_NEW_GEMMA),
    "gemma3_text": Family(**_NEW_GEMMA, query_key_norms=_PER_HEAD),
    "glm4": Family(
        up=("gate_up_proj",), is_interleaved=True, turns_part=True, attention_post_norm="post_self_attn_layernorm",
        mlp_post_norm="post_mlp_layernorm",
    ),
    "gpt2": Family(
        **_LAYER, base="transformer", layers="h", embedding="wte", final_norm="ln_f", eps="layer_norm_epsilon",
        attention="attn", qkv=("c_attn",), output="c_proj", attention_norm="ln_1", mlp_norm="ln_2", up=("c_fc",),
        down="c_proj", activation="activation_function", is_transposed=True, details=_gpt2,
        layer_details=_gpt2_layer, refuses=_refused_gpt2,
    ),
    "gpt_neox": Family(
        **_LAYER, turns_part=True, base="gpt_neox", embedding="embed_in", head_in_files="embed_out",
        final_norm="final_layer_norm", eps="layer_norm_eps",
        attention="attention", qkv=("query_key_value",), qkv_order="by_head", output="dense", up=("dense_h_to_4h",),
        down="dense_4h_to_h", layer_details=_neox_layer,
    ),
    "gptj": Family(
        **_LAYER, base="transformer", layers="h", embedding="wte", final_norm="ln_f", eps="layer_norm_epsilon",
        attention="attn", output="out_proj", attention_norm="ln_1", mlp_norm=None, is_parallel=True, up=("fc_in",),
        down="fc_out", activation="activation_function", is_interleaved=True, refuses=_refused_gptj,
    ),
    "gpt_oss": Family(router="router", is_clipped=True, refuses=_refused_gpt_oss),
    "granite": Family(details=_granite, layer_details=_granite_layer),
    "llama": Family(),
    "ministral3": Family(layer_details=_ministral_layer, refuses=_refused_ministral),
    "mistral": Family(),
    "mixtral": Family(expert_in_files=("w1", "w3", "w2"), mixture_in_files="block_sparse_moe"),
    "olmo": Family(**_LAYER, eps=1e-5, layer_details=_clipped_layer),
    "olmo2": Family(**_OLMO2),
    "olmo3": Family(**_OLMO2),
    "olmoe": Family(query_key_norms=_PER_HEAD, adds_up="norm_topk_prob", refuses=_refused_olmoe),
    "opt": Family(
        **_LAYER, base="model.decoder", final_norm="final_layer_norm", eps=1e-5, output="out_proj",
        attention_norm="self_attn_layer_norm", mlp_norm="final_layer_norm", mlp="", up=("fc1",), down="fc2",
        activation="activation_function", details=_opt, refuses=_refused_opt,
    ),
    "phi": Family(
        **_LAYER, turns_part=True, final_norm="final_layernorm", eps="layer_norm_eps", output="dense", mlp_norm=None,
        is_parallel=True, query_key_norms=("q_layernorm", "k_layernorm"), up=("fc1",), down="fc2",
    ),
    "phi3": Family(turns_part=True, qkv=("qkv_proj",), up=("gate_up_proj",)),
    "qwen2": Family(),
    "qwen2_moe": Family(adds_up="norm_topk_prob"),
    "qwen3": Family(query_key_norms=_PER_HEAD),
    "qwen3_moe": Family(query_key_norms=_PER_HEAD, adds_up="norm_topk_prob"),
    "smollm3": Family(layer_details=_smollm3_layer),
    "stablelm": Family(
        **_LAYER, turns_part=True, eps="layer_norm_eps", query_key_norms=("q_layernorm", "k_layernorm"),
        variant=_parallel_stablelm,
    ),
    "starcoder2": Family(**_LAYER, eps="norm_epsilon", up=("c_fc",), down="c_proj"),
}  # fmt: skip
