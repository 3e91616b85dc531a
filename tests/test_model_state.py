"""When a model counts as another one, for packed copies, probes and kept rows; weights outside inference mode."""

from __future__ import annotations

import array
import collections
import copy
import functools
import gc
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from dynatree_core import PrefixCache, generate
from dynatree_core.models import comparable
from dynatree_core.models.state import can_infer, foreign_parts, is_untouched, state_of
from dynatree_core.testing.models import greedy, perturbed, tiny_model

PROMPT = [1, 2, 3, 4, 5]


class Adapted(nn.Module):
    """A layer with adapters beside its weights, as PEFT's are: names in a list, scales in a dict, a flag."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        width = inner.weight.shape[0]
        self.shifts = nn.ParameterDict(
            {name: nn.Parameter(torch.full((width,), by)) for name, by in (("a", 0.3), ("b", -0.4))}
        )
        self.double()
        self.active = ["a"]
        self.scaling = {"a": 1.0, "b": 1.0}
        self._is_off = False

    def forward(self, rows, names=None):
        out = self.inner(rows)
        for name in () if self._is_off else self.active if names is None else names:
            out = out + self.scaling[name] * self.shifts[name]
        return out


def adapted():
    model = copy.deepcopy(tiny_model("llama"))
    attention = model.model.layers[0].self_attn
    attention.v_proj = Adapted(attention.v_proj)
    return model, attention.v_proj


def by_name(part, args, given, names):
    return args, {**given, "names": names}


CHANGES = {
    "list": lambda layer: layer.active.__setitem__(0, "b"),
    "dict": lambda layer: layer.scaling.update(a=2.0),
    "flag": lambda layer: setattr(layer, "_is_off", True),
    "weights": lambda layer: layer.shifts["a"].data.mul_(2),
    "one weight": lambda layer: layer.inner.weight.data[3].add_(torch.eye(32)[5]),
    "weights, counted": lambda layer: torch.no_grad()(layer.shifts["a"].mul_)(2),
    "hook": lambda layer: layer.register_forward_hook(lambda part, args, out: out + 0.5),
    "hook by name": lambda layer: layer.register_forward_pre_hook(
        functools.partial(by_name, names=["b"]), with_kwargs=True
    ),
    "forward": lambda layer: setattr(layer, "forward", lambda rows: layer.inner(rows)),
    "module": lambda layer: setattr(layer, "inner", copy.deepcopy(layer.inner)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change):
    model, layer = adapted()
    before = state_of(model)
    assert state_of(model) == before
    CHANGES[change](layer)
    assert state_of(model) != before


@pytest.mark.parametrize("change", [name for name in CHANGES if name not in ("weights", "one weight")])
def test_kept_rows_do_not_cross_a_change(change):
    model, layer = adapted()
    cache = PrefixCache()
    generate(model, None, PROMPT, max_new_tokens=8, prefix_cache=cache)
    assert generate(model, None, PROMPT, max_new_tokens=8, prefix_cache=cache).report.num_reused_tokens == 4
    CHANGES[change](layer)
    result = generate(model, None, PROMPT, max_new_tokens=8, prefix_cache=cache)
    assert result.report.num_reused_tokens == 0
    assert result.token_ids == greedy(model, PROMPT, 8)


@pytest.mark.parametrize("runner", ["eager", "packed"])
def test_a_change_of_a_configuration_that_a_layer_has_of_its_own_is_seen(runner):
    """OLMo's layers read in each pass where queries, keys and values are cut."""
    model, other = (copy.deepcopy(tiny_model("olmo")).float() for _ in range(2))
    model.model.layers[0] = other.model.layers[0]
    cache = PrefixCache()
    for clip, num_reused in ((1.0, 0), (1.0, 4), (0.1, 0), (1.0, 4)):
        other.config.clip_qkv = clip
        result = generate(model, None, PROMPT, max_new_tokens=8, prefix_cache=cache, runner=runner)
        assert result.report.num_reused_tokens == num_reused
        assert result.token_ids == greedy(model, PROMPT, 8)


def with_scaled(layer, scale):
    """The layer with an output that a function of its own scales."""
    layer.register_forward_hook(lambda part, args, out: out * scale["of values"])


def scaled_by_object(layer, scale):
    class Scaler:
        def __init__(self):
            self.scale = scale

        def hook(self, part, args, out):
            return out * self.scale["of values"]

    layer.register_forward_hook(Scaler().hook)


@pytest.mark.parametrize("attach", [with_scaled, scaled_by_object])
def test_kept_rows_do_not_cross_a_change_of_what_a_hook_reads(attach):
    model, layer = adapted()
    scale = {"of values": 1.0}
    attach(layer, scale)
    cache = PrefixCache()
    for value, num_reused in ((1.0, 0), (1.0, 4), (2.5, 0), (2.5, 4)):
        scale["of values"] = value
        result = generate(model, None, PROMPT, max_new_tokens=8, prefix_cache=cache)
        assert result.token_ids == greedy(model, PROMPT, 8)
        assert result.report.num_reused_tokens == num_reused


def of_a_module(scale):
    made = nn.Linear(1, 1).double()
    with torch.no_grad():
        made.weight.fill_(scale)
    return made


def set_number(module, scale):
    with torch.no_grad():
        module.weight.fill_(scale)


class Slotted:
    __slots__ = ("scale",)

    def __init__(self):
        self.scale = 1.0


class OfClass:
    scale = 1.0

    def __call__(self):
        return self.scale


class OfAnotherClass:
    def __call__(self):
        return OfClass.scale


def nested():
    kept = Slotted()
    kept.scale = {"of": [types.SimpleNamespace(values=[1.0])]}
    return kept


SETTINGS = types.ModuleType("settings_of_somebody")

# what code may read a number from: (make it, read it, set it)
SOURCES = {
    "numpy": (lambda: np.ones(1), lambda it: float(it[0]), lambda it, to: it.__setitem__(0, to)),
    "deque": (lambda: collections.deque([1.0]), lambda it: it[0], lambda it, to: it.__setitem__(0, to)),
    "large numpy": (lambda: np.ones((1024, 1024)), lambda it: it[0, 0], lambda it, to: it.fill(to)),
    "array": (lambda: array.array("d", [1.0]), lambda it: it[0], lambda it, to: it.__setitem__(0, to)),
    "slots": (Slotted, lambda it: it.scale, lambda it, to: setattr(it, "scale", to)),
    "class": (lambda: None, lambda _: OfClass.scale, lambda _, to: setattr(OfClass, "scale", to)),
    "class of an object": (OfClass, lambda it: it(), lambda it, to: setattr(OfClass, "scale", to)),
    "class of an object, by name": (OfClass, lambda it: it.scale, lambda it, to: setattr(OfClass, "scale", to)),
    "class in a call": (OfAnotherClass, lambda it: it(), lambda it, to: setattr(OfClass, "scale", to)),
    "package": (lambda: None, lambda _: SETTINGS.scale, lambda _, to: setattr(SETTINGS, "scale", to)),
    "module's weight": (lambda: of_a_module(1.0), lambda it: it.weight.detach()[0, 0], set_number),
    "module's attribute": (lambda: nn.ReLU(), lambda it: it.scale, lambda it, to: setattr(it, "scale", to)),
    "nested": (
        nested,
        lambda it: it.scale["of"][0].values[0],
        lambda it, to: it.scale["of"][0].values.__setitem__(0, to),
    ),
}


def with_hook(layer, read, source):
    layer.register_forward_hook(lambda part, args, out: out * read(source))


def with_forward(layer, read, source):
    class Scaled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, rows):
            return self.inner(rows) * read(source)

    layer.inner = Scaled(layer.inner)


class Scaled(nn.Module):
    scale = 1.0

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @torch.no_grad()
    def forward(self, rows):
        return self._times(self.inner(rows))

    def _times(self, rows):
        return rows * self.scale


class Inheriting(Scaled):
    def forward(self, rows):
        return super().forward(rows)


@pytest.mark.parametrize("kind", [Scaled, Inheriting])
def test_kept_rows_do_not_cross_a_change_of_a_class_that_a_decorated_or_inherited_forward_reads(kind, monkeypatch):
    model, layer = adapted()
    layer.inner = kind(layer.inner)
    cache = PrefixCache()
    for value, num_reused in ((1.0, 0), (1.0, 4), (2.5, 0), (2.5, 4)):
        monkeypatch.setattr(Scaled, "scale", value)
        result = generate(model, None, PROMPT, max_new_tokens=8, prefix_cache=cache)
        assert result.token_ids == greedy(model, PROMPT, 8)
        assert result.report.num_reused_tokens == num_reused


class Counting(Scaled):
    num_calls = 0

    def forward(self, rows):
        type(self).num_calls += 1
        return self.inner(rows)


def test_a_class_that_counts_leaves_kept_rows_as_they_are():
    model, layer = adapted()
    layer.inner = Counting(layer.inner)
    cache = PrefixCache()
    for num_reused in (0, 4):
        result = generate(model, None, PROMPT, max_new_tokens=8, prefix_cache=cache)
        assert result.token_ids == greedy(model, PROMPT, 8)
        assert result.report.num_reused_tokens == num_reused


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_part_that_was_compiled_by_torchscript_has_a_snapshot():
    model, _ = adapted()
    model.model.layers[0].mlp.act_fn = torch.jit.script(nn.SiLU())
    assert state_of(model, reads_code=True) == state_of(model, reads_code=True)


def test_a_model_is_not_read_once_more_for_each_hook_that_reaches_it(monkeypatch):
    class Steering:
        def __init__(self, model):
            self.model = model

        def hook(self, part, args, out):
            return out

    def num_read(num_hooks):
        model, _ = adapted()
        steering, read = Steering(model), []
        for part in [*model.modules()][:num_hooks]:
            part.register_forward_hook(steering.hook)
        tensor_state = comparable.tensor_state
        with monkeypatch.context() as patched:
            patched.setattr(
                comparable, "tensor_state", lambda *told, **more: read.append(1) or tensor_state(*told, **more)
            )
            state_of(model, reads_code=True)
        return len(read)

    assert num_read(8) == num_read(1)


@pytest.mark.parametrize("attach", [with_hook, with_forward])
@pytest.mark.parametrize("name", SOURCES)
def test_kept_rows_do_not_cross_a_change_of_whatever_code_reads(name, attach):
    make, read, write = SOURCES[name]
    source = make()
    write(source, 1.0)
    model, layer = adapted()
    attach(layer, read, source)
    cache = PrefixCache()
    for value, num_reused in ((None, 0), (None, 4), (2.5, 0), (None, 4)):
        if value is not None:
            write(source, value)
        result = generate(model, None, PROMPT, max_new_tokens=8, prefix_cache=cache)
        assert result.token_ids == greedy(model, PROMPT, 8)
        assert result.report.num_reused_tokens == num_reused


def test_a_hook_that_records_leaves_kept_rows_as_they_are():
    model, layer = adapted()
    shapes = []
    layer.register_forward_hook(lambda part, args, out: shapes.append(out.shape))
    cache = PrefixCache()
    for num_reused in (0, 4, 4):
        result = generate(model, None, PROMPT, max_new_tokens=8, prefix_cache=cache)
        assert result.report.num_reused_tokens == num_reused


def replace_weight(layer, scale):
    numbers = (layer.inner.weight.detach() * scale).tolist()
    del layer.inner.weight
    layer.inner.weight = nn.Parameter(torch.tensor(numbers, dtype=torch.float64))


def replace_data(layer, scale):
    numbers = (layer.inner.weight.detach() * scale).tolist()
    layer.inner.weight.data = torch.empty(0, dtype=torch.float64)
    layer.inner.weight.data = torch.tensor(numbers, dtype=torch.float64)


def replace_adapter(layer, scale):
    layer.shifts["a"].data.mul_(scale)


def replace_module(layer, scale):
    class Scaled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        @property
        def weight(self):
            return self.inner.weight

        def forward(self, rows):
            return self.inner(rows) * scale

    inner = getattr(layer.inner, "inner", layer.inner)
    layer.inner = None
    gc.collect()
    layer.inner = Scaled(inner)


@pytest.mark.parametrize("change", [replace_weight, replace_data, replace_adapter, replace_module])
def test_what_comes_to_stand_at_an_address_is_another_thing(change):
    """Memory is given again at once: a tensor or a module made behind another one often has its address."""
    model, layer = adapted()
    cache = PrefixCache()
    for scale in (2.0, 0.3, 4.0, 0.2, 7.0):
        change(layer, scale)
        result = generate(model, None, PROMPT, max_new_tokens=8, prefix_cache=cache)
        assert result.token_ids == greedy(model, PROMPT, 8)
        assert result.report.num_reused_tokens == 0


def test_an_adapter_that_comes_back_finds_its_rows():
    model, layer = adapted()
    cache = PrefixCache()
    for names in (["a"], ["b"], ["a"], ["b"]):
        hook = layer.register_forward_pre_hook(functools.partial(by_name, names=names), with_kwargs=True)
        result = generate(model, None, PROMPT, max_new_tokens=8, prefix_cache=cache)
        assert result.token_ids == greedy(model, PROMPT, 8)
        hook.remove()
    assert result.report.num_reused_tokens == 4


def test_rows_of_a_generation_that_saw_two_adapters_are_not_kept():
    from dynatree_core import Session, run

    model, layer = adapted()
    cache = PrefixCache()
    session = Session(model, None, PROMPT, policy="autoregressive", max_new_tokens=8, prefix_cache=cache)
    steps = run(session)
    next(steps)
    layer.active[0] = "b"
    list(steps)
    assert cache.num_bytes == 0


def test_a_hook_on_every_module_counts():
    model = tiny_model("llama")
    before = state_of(model)
    handle = register_module_forward_hook(lambda part, args, out: None)
    try:
        assert not is_untouched(model)
        assert list(foreign_parts(model)) == ["torch has a forward hook for all modules"]
        assert state_of(model) != before
    finally:
        handle.remove()
    assert is_untouched(model)


class Packed(torch.Tensor):
    """Weights that refuse torch's inference mode, as some quantised ones do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if torch.is_inference_mode_enabled():
            raise RuntimeError("Cannot set version_counter for inference tensor")
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def packed_model(seed=0):
    model = copy.deepcopy(tiny_model("llama", seed))
    for layer in model.model.layers:
        layer.mlp.up_proj._parameters["weight"] = layer.mlp.up_proj.weight.detach().as_subclass(Packed)
    return model


@pytest.mark.parametrize("policy", ["autoregressive", "fixed(tau=0.0)", "phase3", "cost_aware"])
def test_weights_that_inference_mode_cannot_use(policy):
    target, drafter = packed_model(), perturbed("llama")
    assert not can_infer(target)
    expected = greedy(target, PROMPT, 24)
    cache = PrefixCache()
    for _ in range(2):
        result = generate(target, drafter, PROMPT, policy=policy, max_new_tokens=24, prefix_cache=cache)
        assert result.token_ids == expected
    assert result.report.num_reused_tokens == 4
    plain = tiny_model("llama")
    result = generate(plain, packed_model(1), PROMPT, policy=policy, max_new_tokens=24, cache="sinks=2,window=64")
    assert result.token_ids == greedy(plain, PROMPT, 24)
