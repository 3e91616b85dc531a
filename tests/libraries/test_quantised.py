"""Quantised targets: weights alone are exact; activations are refused where passes have several shapes."""

from __future__ import annotations

import copy
import importlib
import types

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dynatree_core import generate, load_model
from dynatree_core.audit import audit_generation
from dynatree_core.errors import UnsupportedModelError, VocabularyMismatchError

# these libraries call what torch and transformers will take away
pytestmark = [pytest.mark.filterwarnings("default::FutureWarning", "default::DeprecationWarning")]

PROMPTS = [torch.randint(1, 64, (1, 20), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
TREES = "fixed(depth=4,tau=0.0)"


def fresh(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def plain(model, prompt):
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, max_new_tokens=16, do_sample=False)[0, 20:].tolist()


def exact(model):
    """Trees and plain decoding say what generate() says."""
    for prompt in PROMPTS:
        expected = plain(model, prompt)
        for policy in ("autoregressive", TREES):
            assert generate(model, fresh(1), prompt, policy=policy, max_new_tokens=16).token_ids == expected


def refused(model, found):
    for policy in ("autoregressive", TREES):
        with pytest.raises(UnsupportedModelError, match=found):
            generate(model, fresh(1), PROMPTS[0], policy=policy, max_new_tokens=16)


def of_one_shape(model):
    """Trees say what plain decoding says, in passes of one shape."""
    for prompt in PROMPTS:
        plain, tree = (
            generate(model, fresh(1), prompt, policy=policy, max_new_tokens=16, exact="fixed_width").token_ids
            for policy in ("autoregressive", TREES)
        )
        assert tree == plain


class TestTorchAO:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed; `make test` brings it")

    def quantised(self, config, **options):
        model = fresh()
        self.quantization.quantize_(model, config, **options)
        return model

    @pytest.mark.parametrize(
        "config",
        [
            lambda q: q.Int8WeightOnlyConfig(),
            lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32)),
            lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=q.PerGroup(32)),
        ],
        ids=["int8 weights", "int4 weights", "int2 weights"],
    )
    def test_weights(self, config):
        exact(self.quantised(config(self.quantization)))

    @pytest.mark.parametrize(
        "config",
        [
            lambda q: q.Int8DynamicActivationInt8WeightConfig(version=2),
            lambda q: q.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4),
        ],
        ids=["int8 weights", "int4 weights"],
    )
    def test_rows_of_int8(self, config):
        model = self.quantised(config(self.quantization))
        refused(model, "amplifies rounding")
        of_one_shape(model)

    def test_one_scale_for_all_rows(self):
        config = self.quantization.Int8DynamicActivationInt8WeightConfig(
            granularity=self.quantization.PerTensor(), version=2
        )
        model = self.quantised(config)
        refused(model, "rows depend on each other")
        _, report = audit_generation(model, fresh(1), PROMPTS[0], policy=TREES, max_new_tokens=16)
        assert report.verdict == "bug"
        assert "rows depend on each other" in report.faults[0]

    @pytest.mark.real_model
    def test_a_distilled_drafter_beside_quantised_embeddings(self):
        loaded = load_model(None)
        config = self.quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=self.quantization.PerGroup(32)
        )
        everything = lambda part, name: isinstance(part, nn.Linear | nn.Embedding)  # noqa: E731  # torchao's own form
        self.quantization.quantize_(loaded.model, config, everything)
        inputs = loaded.tokenizer("The capital of France is", return_tensors="pt")
        num = inputs.input_ids.shape[1]
        expected = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=2)[0, num:].tolist()
        try:
            assert generate(loaded.model, "distilled", inputs, max_new_tokens=2).token_ids == expected
        except VocabularyMismatchError as error:
            assert "embeddings and head" in str(error)  # noqa: PT017  # either is right


def unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The numbers of so many bits in each byte, the lowest of all bytes first: quanto's order."""
    return torch.cat([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]).to(torch.uint8)


class TestQuanto:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed; `make test` brings it")

    @pytest.mark.parametrize("weights", ["qint8", "qint4", "qint2"])
    def test_weights(self, weights, monkeypatch):
        # quanto compiles its unpacking of bits when it is first used, for minutes
        compiled = importlib.import_module("optimum.quanto.library.extensions.cpp").ext
        monkeypatch.setattr(compiled, "_lib", types.SimpleNamespace(unpack=unpacked))
        model = fresh()
        self.quanto.quantize(model, weights=getattr(self.quanto, weights))
        self.quanto.freeze(model)
        exact(model)
        target = fresh()
        for prompt in PROMPTS:
            assert generate(target, model, prompt, max_new_tokens=16).token_ids == plain(target, prompt)

    def test_activations_by_one_scale(self):
        """Calibrated beforehand, a scale does not depend on the pass, but its steps amplify rounding."""
        model = fresh()
        self.quanto.quantize(model, weights=self.quanto.qint8, activations=self.quanto.qint8)
        with self.quanto.Calibration(), torch.no_grad():
            model(PROMPTS[0])
        self.quanto.freeze(model)
        refused(model, "amplifies rounding")
        of_one_shape(model)


def test_dynamic_quantisation_of_torch():
    model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(fresh()), {nn.Linear}, dtype=torch.qint8)
    refused(model, "quantised by what is in all rows")
