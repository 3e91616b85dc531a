"""A target and its drafter, loaded by name as on the command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import attrs
from safetensors import safe_open
from transformers import PreTrainedModel

from dynatree_bench.data.synthetic import MarkovSource, synthetic_pair
from dynatree_bench.run.experiments import USELESS
from dynatree_bench.run.machine import weights_sha256
from dynatree_bench.run.quantised import quantise
from dynatree_bench.run.records import ModelInfo
from dynatree_bench.run.useless import useless_drafter
from dynatree_core import Drafter, LoadedModel, load_model
from dynatree_core.cli.loading import check_drafter_model, registered_drafter, usual_drafter
from dynatree_core.drafters.model import ModelDrafter, restricted_ids
from dynatree_core.errors import InputError, VocabularyMismatchError
from dynatree_core.models.load import check_model_name, resolve_device, vocabularies_match
from dynatree_core.models.student import HEAD_IDS
from dynatree_core.trace import Trace


class MethodError(Exception):
    """Why a method cannot run on a pair, in one line."""


@attrs.frozen(eq=False)
class Pair:
    """What a benchmark runs on."""

    target: LoadedModel
    drafter: Drafter
    source: MarkovSource | None = None  # of the text of a synthetic pair, see dynatree_bench.data.synthetic
    drafters: Mapping[str, Drafter] = attrs.field(factory=dict)  # by name, where several were asked for
    trace: Trace | None = None  # in which our generations are recorded
    is_trusted: bool = False  # the target was quantised in order to measure what that changes

    def drafting_with(self, name: str | None) -> Pair:
        """The pair with one of its drafters; None: as it is."""
        return self if name is None else attrs.evolve(self, drafter=self.drafters[name])

    def said(self) -> dict[str, str]:
        """What the provenance of a study says of it."""
        dtype = str(self.target.model.dtype).removeprefix("torch.")
        return {"target": self.target.name, "dtype": dtype, "drafter": str(self.drafter)}

    @property
    def drafter_model(self) -> PreTrainedModel | None:
        """The drafter's model, where it has one that transformers itself could draft with."""
        models = self.drafter.models(self.target.model)
        if self.drafter.price_class() != "model" or len(models) != 1:
            return None
        [model] = models
        return model if isinstance(model, PreTrainedModel) and restricted_ids(model) is None else None

    @property
    def end_token_ids(self) -> list[int]:
        """The tokens with which the target's own generation config ends a text."""
        config = self.target.model.generation_config
        ids = config.eos_token_id if config is not None else None
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


@attrs.frozen
class Models:
    """The models that a benchmark is asked for; None: what is usual."""

    target: str | None = None  # a folder or a hub id
    drafters: tuple[str, ...] = ()  # registered ones, a model's folder or hub id, or one of USELESS
    synthetic: str | None = None  # a pair of this shape instead, see `load_synthetic`
    device: str | None = None
    dtype: str = "auto"
    layers: int | None = None  # the target's first ones; None: all
    quantise: str | None = None  # the target, by one of QUANTISERS

    def load(self, *, seed: int = 0, progress: Callable[[str], None] | None = None) -> Pair:
        """Load them.

        Raises:
            DynaTreeError: whatever cannot be loaded, or two models that do not share their tokens.
        """
        if self.synthetic is not None:
            pair = load_synthetic(self.synthetic, device=self.device, dtype=self.dtype, seed=seed)
        else:
            where = {"device": self.device, "dtype": self.dtype}
            pair = load_pair(self.target, *self.drafters, **where, progress=progress)
        if self.layers is not None:
            base = pair.target.model.base_model
            base.layers = base.layers[: self.layers]
        if self.quantise is not None:
            quantise(pair.target.model, self.quantise)
            pair = attrs.evolve(pair, is_trusted=True)
        return pair

    def settings(self) -> dict[str, Any]:
        """What of it a run's provenance does not tell elsewhere."""
        found = {"layers": self.layers, "quantise": self.quantise}
        return {name: value for name, value in found.items() if value is not None}


def load_pair(
    target: str | None = None,
    *drafters: str,
    device: str | None = None,
    dtype: str = "auto",
    progress: Callable[[str], None] | None = None,
) -> Pair:
    """Load a target and its drafters.

    Args:
        target: a folder or a hub id; None: the embedded default model.
        drafters: a registered drafter such as "prompt_lookup" or "distilled+prompt_lookup", one of USELESS, or a
            model's folder or hub id; none: the one with which `dynatree generate` drafts for this target.
        device, dtype, progress: as in `dynatree_core.load_model`.

    Raises:
        DynaTreeError: whatever cannot be loaded, or two models that do not share their tokens.
    """
    drafters = drafters or (usual_drafter(target),)
    check_model_name(target)
    registered = {name: registered_drafter(name) for name in drafters if name not in USELESS}
    for name, found in registered.items():
        if found is None:
            check_drafter_model(name)  # before the target is loaded
    loaded = load_model(target, device=device, dtype=dtype, progress=progress)
    made = {}
    for name in drafters:
        if name in USELESS:
            made[name] = useless_drafter(name, loaded)
        else:
            made[name] = registered[name] or _drafter_model(name, loaded, progress)
    return Pair(loaded, made[drafters[0]], drafters=made)


def _drafter_model(name: str, target: LoadedModel, progress: Callable[[str], None] | None) -> Drafter:
    precision = str(target.model.dtype).removeprefix("torch.")
    small = load_model(name, device=str(target.model.device), dtype=precision, progress=progress)
    if vocabularies_match(target.tokenizer, small.tokenizer) is False:
        raise VocabularyMismatchError(
            f"target and drafter must give every token the same id, but the tokenizers of '{target.name}' and "
            f"'{small.name}' do not; choose a drafter of the target's family, or prompt_lookup"
        )
    return ModelDrafter(small.model)


def load_synthetic(spec: str, *, device: str | None = None, dtype: str = "auto", seed: int = 0) -> Pair:
    """A pair of random models of a shape, with the text of a random source.

    Args:
        spec: "SHAPE", "SHAPE:ACCEPTANCE" or "SHAPE:ACCEPTANCE:DECAY", such as "llama-7b+68m:0.7".
        device: as in `load_pair`.
        dtype: "auto" is float32 on the CPU and bfloat16 on CUDA.
        seed: of weights and text.

    Raises:
        InputError: an unknown shape, or numbers that make no source.
    """
    shape, *numbers = spec.split(":")
    names = ("acceptance", "decay")[: len(numbers)]
    try:
        given: dict[str, Any] = dict(zip(names, map(float, numbers), strict=True))
    except ValueError as error:  # no number, or one too many
        raise InputError(f"a synthetic pair is SHAPE[:ACCEPTANCE[:DECAY]] with numbers, got '{spec}'") from error
    where = resolve_device(device)
    precision = ("bfloat16" if where.type == "cuda" else "float32") if dtype == "auto" else dtype
    made = synthetic_pair(shape, **given, device=where, dtype=precision, seed=seed)
    target = LoadedModel(cast(PreTrainedModel, made.target), None, made.name)
    return Pair(target, ModelDrafter(made.drafter), made.source)


def drafter_info(pair: Pair) -> ModelInfo | None:
    """The model that drafts, as a run's provenance has it; None where none does."""
    if pair.drafter_model is not None:
        return model_info(pair.drafter_model)
    for own in pair.drafter.own_weights(pair.target.model.device):
        shapes = []
        for file in own.folder.glob("*.safetensors"):
            with safe_open(file, "pt") as weights:
                shapes += [weights.get_slice(name).get_shape() for name in set(weights.keys()) - {HEAD_IDS}]
        return ModelInfo(
            name=own.drafter,
            sha256=weights_sha256(str(own.folder)),
            dtype=str(own.dtype).removeprefix("torch."),
            num_parameters=sum(map(math.prod, shapes)),
        )
    models = [model for model in pair.drafter.models(pair.target.model) if model is not pair.target.model]
    return next((model_info(one, str(pair.drafter)) for one in models if isinstance(one, PreTrainedModel)), None)


def model_info(model: PreTrainedModel, name: str | None = None) -> ModelInfo:
    """A model as a run's provenance has it."""
    path = str(model.config.name_or_path)
    return ModelInfo(
        name=name or path or type(model).__name__,
        sha256=weights_sha256(path) if path else None,
        dtype=str(model.dtype).removeprefix("torch."),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
