"""Quantisation of a loaded model by name, with the libraries that people use, for programs that compare outputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import attrs
from torch import nn

from dynatree_core import InputError


@attrs.frozen
class Quantiser:
    """One way to quantise a model in place."""

    library: str  # the module to import
    package: str  # what brings it
    apply: Callable[[Any, nn.Module], None]


def _torchao(config: Callable[[Any], Any]) -> Quantiser:
    return Quantiser(
        "torchao.quantization", "torchao", lambda library, model: library.quantize_(model, config(library))
    )


def _quanto(weights: str) -> Quantiser:
    def apply(library: Any, model: nn.Module) -> None:
        library.quantize(model, weights=getattr(library, weights))
        library.freeze(model)

    return Quantiser("optimum.quanto", "optimum-quanto", apply)


def _intx(library: Any, bits: int) -> Any:
    dtypes = importlib.import_module("torch")
    return library.IntxWeightOnlyConfig(weight_dtype=getattr(dtypes, f"int{bits}"), granularity=library.PerGroup(32))


def _one_scale(library: Any) -> Any:
    return library.Int8DynamicActivationInt8WeightConfig(granularity=library.PerTensor(), version=2)


QUANTISERS = {
    "torchao-int8": _torchao(lambda library: library.Int8WeightOnlyConfig()),
    "torchao-int4": _torchao(lambda library: _intx(library, 4)),
    "torchao-int8-rows": _torchao(lambda library: library.Int8DynamicActivationInt8WeightConfig(version=2)),
    "torchao-int8-one-scale": _torchao(_one_scale),
    "quanto-qint8": _quanto("qint8"),
    "quanto-qint4": _quanto("qint4"),
}


def quantise(model: nn.Module, name: str) -> None:
    """Quantise a model in place.

    Raises:
        InputError: the library is not installed.
    """
    quantiser = QUANTISERS[name]
    try:
        library = importlib.import_module(quantiser.library)
    except ImportError as error:
        raise InputError(f"{name} needs {quantiser.package}, which is not installed ({error}); install it") from error
    quantiser.apply(library, model)
