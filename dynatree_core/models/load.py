"""Models by name: the embedded default, a folder, or an id on the model hub."""

from __future__ import annotations

import contextlib
import os
import pickle
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import attrs
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from dynatree_core import ops
from dynatree_core.errors import ModelLoadError, ParameterError
from dynatree_core.files.folders import expanded
from dynatree_core.files.writing import unreadable
from dynatree_core.models import embedded, hub
from dynatree_core.models.blueprint import NoBlueprintError
from dynatree_core.ops import Activations

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DEFAULT_MODEL",
    "LoadedModel",
    "check_model_name",
    "load_config",
    "load_model",
    "model_folder",
    "resolve_device",
    "vocabularies_match",
]

DEFAULT_MODEL = "default"

_DTYPES = ("float64", "float32", "bfloat16", "float16")
# exceptions that transformers raises for damaged files; each was seen, or is raised by a library that it calls
_LOAD_FAILURES = (
    OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError,
    ImportError, pickle.UnpicklingError, SafetensorError, StrictDataclassError,
)  # fmt: skip
# looked for first, because without them AutoTokenizer makes an empty tokenizer for some model types
_VOCABULARY_FILES = ("tokenizer.*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


@attrs.frozen(eq=False)
class LoadedModel:
    """A causal language model in evaluation mode, with its tokenizer and name."""

    model: PreTrainedModel  # or a `StoredModel`, which has what a generation asks of one, where `weights` were given
    tokenizer: PreTrainedTokenizerBase | None  # None: its folder holds none
    name: str

    @property
    def rounded(self) -> str | None:
        """What of it is rounded, in words; None: nothing."""
        from dynatree_core.models.stored import rounding_of

        return rounding_of(self.model)


def load_model(
    name: str | None,
    *,
    device: str | None = None,
    dtype: str = "auto",
    weights: str | None = None,
    activations: Activations = "full",
    progress: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        name: None or "default": the embedded model, converted first if need be. A path (one that begins with
            `.`, `/` or `~`, or exists): a folder made by `save_pretrained`. Else: an id on the model hub.
        device: "cpu", "cuda" or "cuda:N"; None or "auto": CUDA where there is any, else the CPU.
        dtype: "float64", "float32", "bfloat16" or "float16"; "auto": float32 on the CPU, the checkpoint's own
            on CUDA.
        weights: None: a model of transformers. Else in which bits its weights are kept, computing in float32 on a CPU:
            "stored": as they were published, with the same numbers; "int8" or "int4": rounded to so many, the
            matrices alone, 32 with one scale; "fp32": in 32. All but the last are a `StoredModel`, which the `native`
            runner computes without transformers' modules. Where that cannot run a model, "stored" gives a model of
            transformers with the same numbers.
        activations: "full": products take their rows in float32. "int8": with weights of 4 or 8 bits they take them
            rounded to 8 bits, which is faster and another model, whose plain decoding is what trees are lossless for.
        progress: called with a sentence before anything that takes seconds; None: silent.

    Raises:
        ParameterError: a device that is not here, an unknown dtype, or weights or activations that cannot be had.
        ModelLoadError: in one line what was expected, what came and what to do.
        DefaultModelError: the embedded model is not installed or cannot be converted.
    """
    where = resolve_device(device)
    weights_dtype = _resolve_dtype(dtype, where)
    name = DEFAULT_MODEL if name is None else name
    check_model_name(name)
    if activations not in get_args(Activations):
        raise ParameterError(f"activations must be one of {', '.join(get_args(Activations))}, got {activations!r}")
    if activations != "full" and weights in (None, "fp32"):
        raise ParameterError(
            f"activations='{activations}' multiply weights of 4 or 8 bits, got weights={weights!r}; give "
            "weights='stored', where they are published so, 'int8' or 'int4', or leave activations out"
        )
    if weights is not None:
        stored = _load_stored(name, where, weights_dtype, weights, activations, progress)
        if stored is not None:
            return stored
    is_folder = _is_folder(name)
    location = _location(name, is_folder, progress)
    if progress is not None:
        progress(f"loading {name}" if is_folder else f"loading {name} from the model hub or its local cache")
    # for the hub bars and warnings stay: a download can take minutes
    with _quiet_transformers() if is_folder else contextlib.nullcontext():
        config = _load_config(name, location, is_folder)
        model = _load_weights(name, location, config, weights_dtype)
        tokenizer = _load_tokenizer(name, location, is_folder)
    with _explained(name, f"a model that fits on {where}", "choose another device, dtype or model"):
        model.to(where)  # type: ignore[arg-type]  # a decorator of transformers hides its signature
    model.eval()  # type: ignore[no-untyped-call]  # transformers leaves it unannotated
    return LoadedModel(model, tokenizer, name)


def load_config(name: str | None) -> PreTrainedConfig:
    """The configuration of a model by its name as in `load_model`, without its weights.

    Raises:
        ModelLoadError, DefaultModelError: as `load_model`.
    """
    name = DEFAULT_MODEL if name is None else name
    check_model_name(name)
    is_folder = _is_folder(name)
    return _load_config(name, _location(name, is_folder, None), is_folder)


def _load_stored(
    name: str,
    where: torch.device,
    dtype: torch.dtype | str,
    weights: str,
    activations: Activations,
    progress: Callable[[str], None] | None,
) -> LoadedModel | None:
    """A `StoredModel`; None where a model of transformers has the weights that are asked for."""
    from dynatree_core.models import stored

    if weights not in stored.WEIGHTS:
        raise ParameterError(f"weights must be one of {', '.join(stored.WEIGHTS)}, got {weights!r}")
    if weights == "fp32":
        return None
    reason = ops.reason_unavailable()
    if where.type != "cpu" or dtype != torch.float32:
        reason = f"they are computed in float32 on a CPU, got {str(dtype).removeprefix('torch.')} on {where}"
    if reason is None:
        try:
            return _stored_model(name, weights, activations, progress)
        except NoBlueprintError as error:
            reason = f"the native runner knows no model whose {error}"
    if activations != "full":
        raise ParameterError(f"activations='{activations}' cannot be had for '{name}': {reason}; leave it out")
    if weights != "stored":
        raise ParameterError(f"weights={weights!r} cannot be had for '{name}': {reason}; leave it out")
    return None


def _stored_model(
    name: str, weights: str, activations: Activations, progress: Callable[[str], None] | None
) -> LoadedModel:
    from dynatree_core.models import stored

    def in_float32() -> PreTrainedModel:
        return load_model(name, device="cpu", dtype="float32").model

    if name == DEFAULT_MODEL:
        folder = embedded.packed_path(progress=progress)
        if progress is not None:
            progress(f"loading {name}")
        model = stored.load_packed(
            folder,
            weights,
            in_float32=in_float32,
            advice="`dynatree models install` mends the folder",
            activations=activations,
        )
        from transformers import PreTrainedTokenizerFast  # and no more of transformers

        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
        return LoadedModel(cast("PreTrainedModel", model), tokenizer, name)
    is_folder = _is_path(name)
    place = _location(name, True, None) if is_folder else hub.fetched_folder(name)
    if place is None:
        raise NoBlueprintError("files are still to be fetched")
    if progress is not None:
        progress(f"loading {name}")
    location = str(place)
    with _quiet_transformers():
        config = _load_config(name, location, True)
        blueprint = stored.read_checkpoint(Path(location), config, weights)
        tokenizer = _load_tokenizer(name, location, True)
        generation_config = _load_generation_config(location, config)
    model = stored.StoredModel(
        config, generation_config, blueprint, weights=weights, in_float32=in_float32, activations=activations
    )
    return LoadedModel(cast("PreTrainedModel", model), tokenizer, name)


def _load_generation_config(location: str, config: PreTrainedConfig) -> Any:
    """The generation config that from_pretrained would set: the folder's file, else one from the configuration."""
    from transformers import GenerationConfig

    kind: Any = GenerationConfig  # transformers leaves some of its functions unannotated
    if (Path(location) / "generation_config.json").is_file():
        return kind.from_pretrained(location)
    return kind.from_model_config(config)


def check_model_name(name: str | None) -> None:
    """Refuse at once what cannot be loaded: a folder without a model, or an id when the hub cannot be reached.

    Raises:
        ModelLoadError: in one line what was expected, what came and what to do.
    """
    if name is None or name == DEFAULT_MODEL:
        return
    if _is_path(name):
        _location(name, True, None)
    elif hub.fetched_folder(name) is None and (reason := hub.offline_reason()) is not None:
        raise ModelLoadError(
            f"cannot load '{name}': expected a folder, or a model that can be fetched from the hub or was fetched "
            f"before, got no folder of that name, no such model in the local cache, and no connection: {reason}; check "
            "the id and the network, give a folder, or no name for the default model"
        )


def model_folder(name: str | None) -> Path:
    """The folder that `load_model` loads a name from.

    Raises:
        ModelLoadError: there is no such folder.
    """
    name = DEFAULT_MODEL if name is None else name
    if _is_folder(name):
        return Path(_location(name, True, None))
    fetched = hub.fetched_folder(name)
    if fetched is None:
        raise ModelLoadError(
            f"the files of '{name}' must be in the hub's local cache once it is loaded, got none there; give a folder"
        )
    return fetched


def vocabularies_match(target: PreTrainedTokenizerBase | None, drafter: PreTrainedTokenizerBase | None) -> bool | None:
    """Whether both tokenizers give every token the same id; None where one of the two is missing."""
    if target is None or drafter is None:
        return None
    return bool(target.get_vocab() == drafter.get_vocab())


def resolve_device(device: str | None) -> torch.device:
    """The device of a name; None or "auto": CUDA where there is any, else the CPU.

    Raises:
        ParameterError: one that is not here.
    """
    num_cuda = torch.cuda.device_count()
    if device is None or device == "auto":
        return torch.device("cuda" if num_cuda else "cpu")
    accepted = ["auto", "cpu", *["cuda"][:num_cuda], *(f"cuda:{index}" for index in range(num_cuda))]
    if device not in accepted:
        raise ParameterError(f"the device must be one of those here ({', '.join(accepted)}), got '{device}'")
    return torch.device(device)


def _resolve_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """The dtype argument of from_pretrained, for which "auto" means the checkpoint's own."""
    if dtype == "auto":
        return "auto" if device.type == "cuda" else torch.float32
    if dtype not in _DTYPES:
        raise ParameterError(f"the dtype must be one of auto, {', '.join(_DTYPES)}, got '{dtype}'")
    return cast(torch.dtype, getattr(torch, dtype))


def _is_folder(name: str) -> bool:
    """Whether a name means a folder rather than an id on the hub."""
    return name == DEFAULT_MODEL or _is_path(name)


def _is_path(name: str) -> bool:
    """Whether a name has the form of a path: no hub id is empty, begins with . / or ~, or has two slashes."""
    return not name or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or Path(name).exists()


def _location(name: str, is_folder: bool, progress: Callable[[str], None] | None) -> str:
    """The argument of from_pretrained: an absolute path, or the hub id.

    Without a connection it is the folder in the hub's local cache: given an id, transformers would still request files.
    """
    if name == DEFAULT_MODEL:
        return str(embedded.path(progress=progress))
    if not is_folder:
        return name if hub.offline_reason() is None else str(hub.fetched_folder(name))
    folder = expanded(name).absolute()
    if name and (closed := unreadable(folder / "config.json")) is not None:
        raise ModelLoadError(_closed(name, closed))
    if name and (folder / "config.json").is_file():
        return str(folder)
    came = "a folder without it" if name and folder.is_dir() else "a file" if folder.is_file() else "nothing there"
    files = [folder] if folder.is_file() else folder.glob("*.gguf") if name and folder.is_dir() else ()
    gguf = next((file for file in files if file.suffix.lower() == ".gguf"), None)
    if gguf is not None:
        raise ModelLoadError(
            f"cannot load '{name}': expected a folder with a config.json, got {came} and a GGUF; in Python give the "
            f"model that AutoModelForCausalLM.from_pretrained({str(gguf.parent)!r}, gguf_file={gguf.name!r}) makes, or "
            "the folder of the model that it was made from"
        )
    raise ModelLoadError(
        f"cannot load '{name}': expected a folder with a config.json, got {came}; give a folder made by "
        "save_pretrained, an id on the model hub (owner/name), or no name for the default model"
    )


def _load_config(name: str, location: str, is_folder: bool) -> PreTrainedConfig:
    from transformers import AutoConfig  # imports take seconds: such names make transformers import its models

    expected = "a config.json of a model type that transformers knows"
    advice = "save it again, or choose another model"
    if not is_folder:
        expected = "a folder, or a model that can be fetched from the hub or was fetched before"
        advice = "check the id and the network, give a folder, or no name for the default model"
    with _explained(name, expected, advice, location):
        # by default transformers asks on the terminal whether to run code that comes with the model
        config: PreTrainedConfig = AutoConfig.from_pretrained(location, trust_remote_code=False)
    reason = _reason_against(config)
    if reason is not None:
        raise ModelLoadError(
            f"cannot load '{name}': expected a decoder-only causal language model such as Llama, "
            f"got one of type '{config.model_type}', {reason}; choose another model"
        )
    return config


def _reason_against(config: PreTrainedConfig) -> str | None:
    """Why the model does not predict each token from those before it alone, or None."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    if config.is_encoder_decoder:
        return "which is an encoder-decoder"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "which has no causal language-modelling head"
    # BERT and its like; the flag alone would not do, GPT-NeoX is a decoder and says False too
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True):
        return "which is an encoder, whose tokens see those after them"
    return None


def _load_weights(name: str, location: str, config: PreTrainedConfig, dtype: torch.dtype | str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    with _explained(name, "readable weights that fit its config.json", "fetch or save the model again", location):
        loaded = AutoModelForCausalLM.from_pretrained(
            location,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with a message that names the parameter
        )
    model, found = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    # transformers fills missing weights with random numbers
    lacking = sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])])
    if lacking:
        raise ModelLoadError(
            f"cannot load '{name}': expected weights of the shape that config.json says for every parameter, "
            f"got none for {len(lacking)} of them, such as {lacking[0]}; fetch or save the model again"
        )
    return model


def _load_tokenizer(name: str, location: str, is_folder: bool) -> PreTrainedTokenizerBase | None:
    if is_folder and not any(any(Path(location).glob(pattern)) for pattern in _VOCABULARY_FILES):
        return None
    from transformers import AutoTokenizer

    with _explained(name, "a readable tokenizer with it", "fetch or save the tokenizer again", location):
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    return cast("PreTrainedTokenizerBase", tokenizer)


@contextlib.contextmanager
def _explained(name: str, expected: str, advice: str, location: str | None = None) -> Iterator[None]:
    """Turn what transformers raises into one line, which says whether files are unreadable or damaged."""
    try:
        yield
    except _LOAD_FAILURES as error:
        if location is not None and os.path.isabs(location) and (closed := unreadable(Path(location))) is not None:
            raise ModelLoadError(_closed(name, closed)) from error
        came = textwrap.shorten(str(error), 160, placeholder=" …") or "no message"
        raise ModelLoadError(
            f"cannot load '{name}': expected {expected}, got {type(error).__name__} ({came}); {advice}"
        ) from error


def _closed(name: str, closed: str) -> str:
    return (
        f"cannot load '{name}': expected files that this user may read, got {closed}; let its owner `chmod -R a+rX` "
        "the folder"
    )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings inside; everything as before afterwards."""
    logging: Any = transformers_logging  # its functions are unannotated
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
