"""Other engines for CPUs that a user could take instead, each behind one small adapter, and model files for them.

They are no dependencies: `pip install 'dynatree[peers]'` fetches and builds what there is. Each gets the weights that
ours get, from the same GGUF file.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import gguf
import numpy as np

from dynatree_bench.run.pairs import MethodError
from dynatree_core.advice import pip_install

LOOKUPS = (10, 2)  # tokens that llama.cpp's prompt lookup drafts: the default, and what its README advises for CPUs
KINDS = {"F32": 0, "F16": 1, "Q8_0": 7, "Q4_1": 3}  # kind of weights -> llama.cpp's number of such a file


@attrs.frozen(eq=False)
class Decoded:
    """What a peer made of a prompt."""

    token_ids: tuple[int, ...]
    decode_seconds: float  # of all tokens, at the pace of those that came after the first: it comes out of the prompt


@attrs.frozen(eq=False)
class Peer:
    """A model file in another engine."""

    # prompt, new tokens at most, end tokens; MethodError: the engine failed
    decode: Callable[[Sequence[int], int, Sequence[int]], Decoded]
    # numbers of rows, repeats -> best by rows, with the same error; None: it does not let passes be measured
    pass_seconds: Callable[[Sequence[int], int], Mapping[int, float]] | None = None


@contextmanager
def _failing_as(what: str) -> Iterator[None]:
    """What an engine raises in there is a MethodError, so that one that fails is left out; both raise RuntimeError."""
    try:
        yield
    except RuntimeError as error:  # the reason follows the place in its sources
        reason = (str(error).strip().splitlines() or [""])[-1]
        raise MethodError(f"{what} ({reason})") from error


def llama_cpp(file: Path, *, threads: int, num_slots: int, num_drafted: int | None, is_float32: bool) -> Peer:
    """A GGUF file in llama.cpp, through llama-cpp-python.

    Args:
        file: the model.
        threads: that it computes with.
        num_slots: tokens of a text at most.
        num_drafted: tokens that its prompt lookup drafts; None: it does not.
        is_float32: keep keys and values in float32, as ours are; else in its default, float16.

    Raises:
        MethodError: it is not installed, or cannot be loaded.
    """
    try:
        module = importlib.import_module("llama_cpp")
        lookup = importlib.import_module("llama_cpp.llama_speculative").LlamaPromptLookupDecoding
    except ModuleNotFoundError as error:
        raise MethodError(f"llama.cpp: not installed; run {pip_install('dynatree[peers]')}") from error
    except (ImportError, OSError, RuntimeError) as error:  # what its loader of libraries raises
        raise MethodError(f"llama.cpp: cannot be loaded ({type(error).__name__}: {error})") from error
    kept = {"type_k": KINDS["F32"], "type_v": KINDS["F32"]} if is_float32 else {}
    engine: Any = module.Llama(
        model_path=str(file),
        n_ctx=num_slots,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=num_drafted is not None,
        draft_model=None if num_drafted is None else lookup(num_pred_tokens=num_drafted),
        verbose=False,
        **kept,
    )

    def decode(prompt_ids: Sequence[int], max_new_tokens: int, end_ids: Sequence[int]) -> Decoded:
        engine.reset()  # nothing is kept of the last prompt
        token_ids: list[int] = []
        seconds: list[float] = []
        with _failing_as(f"llama.cpp: cannot decode {file.name}"):
            for token in engine.generate(list(prompt_ids), temp=0.0):
                seconds.append(time.perf_counter())
                token_ids.append(int(token))
                if token in end_ids or len(token_ids) == max_new_tokens:
                    break
        number = len(token_ids)
        return Decoded(tuple(token_ids), (seconds[-1] - seconds[0]) * number / (number - 1) if number > 1 else 0.0)

    def pass_seconds(rows: Sequence[int], repeats: int) -> Mapping[int, float]:
        context = min(256, num_slots - max(rows))
        found: dict[int, float] = {}
        with _failing_as(f"llama.cpp: cannot compute {file.name}"):
            engine.reset()
            engine.eval(list(range(context)))
            for count in [count for _ in range(repeats) for count in rows]:
                engine.n_tokens = context  # what the pass before has added is removed by the next
                start = time.perf_counter()
                engine.eval(list(range(count)))
                found[count] = min(time.perf_counter() - start, found.get(count, float("inf")))
        return found

    return Peer(decode, pass_seconds)


def openvino(file: Path, *, threads: int, is_float32: bool) -> Peer:
    """A GGUF file in OpenVINO GenAI, which reads it by itself.

    Args:
        file: the model.
        threads: that it computes with.
        is_float32: compute, and keep keys and values, in float32, as ours are; else in its defaults, which round
            activations, and keys and values, to 8 bits.

    Raises:
        MethodError: it is not installed, cannot be loaded, or cannot read the file.
    """
    try:
        module, runtime = (importlib.import_module(name) for name in ("openvino_genai", "openvino"))
    except ModuleNotFoundError as error:
        raise MethodError(f"OpenVINO GenAI: not installed; run {pip_install('dynatree[peers]')}") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise MethodError(f"OpenVINO GenAI: cannot be loaded ({type(error).__name__}: {error})") from error
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
    if is_float32:
        settings |= {
            "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }  # fmt: skip
    with _failing_as(f"OpenVINO GenAI: cannot read {file.name}"):
        engine: Any = module.LLMPipeline(str(file), "CPU", **settings)

    def decode(prompt_ids: Sequence[int], max_new_tokens: int, end_ids: Sequence[int]) -> Decoded:
        ids = np.array([prompt_ids], np.int64)
        how = module.GenerationConfig()  # greedy; that of the file has its own end tokens
        how.max_new_tokens, how.ignore_eos, how.stop_token_ids = max_new_tokens, not end_ids, set(end_ids)
        inputs = module.TokenizedInputs(runtime.Tensor(ids), runtime.Tensor(np.ones_like(ids)))
        with _failing_as(f"OpenVINO GenAI: cannot decode {file.name}"):
            found = engine.generate(inputs, how)
        token_ids = tuple(map(int, found.tokens[0]))
        number = len(token_ids)
        milliseconds = found.perf_metrics.get_tpot().mean  # of a token after the first
        return Decoded(token_ids, number * milliseconds / 1000 if number > 1 else 0.0)

    return Peer(decode)


def write_gguf(source: Path, file: Path, kind: str) -> None:
    """Write a GGUF file with the matrices of another one as `kind`, one of KINDS.

    The vectors stay in float32, and matrices that are of the kind already as they are. All else is copied.
    """
    reader = gguf.GGUFReader(source)
    wanted = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(file, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kinds = field.types
        writer.add_key_value(name, field.contents(), kinds[0], sub_type=kinds[-1] if len(kinds) > 1 else None)
    writer.add_file_type(KINDS[kind])
    for tensor in reader.tensors:
        is_kept = tensor.tensor_type == wanted or len(tensor.shape) == 1
        own = tensor.tensor_type if is_kept else wanted
        writer.add_tensor(tensor.name, tensor.data if is_kept else _as(tensor, wanted), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _as(tensor: Any, kind: Any) -> np.ndarray:
    return gguf.quants.quantize(gguf.dequantize(tensor.data, tensor.tensor_type), kind)


def matrix_sizes(file: Path) -> tuple[int, int]:
    """Weights of a GGUF file's tensors, and their bytes: what a pass reads where embeddings are the head too."""
    tensors = gguf.GGUFReader(file).tensors
    return sum(int(tensor.n_elements) for tensor in tensors), sum(int(tensor.n_bytes) for tensor in tensors)
