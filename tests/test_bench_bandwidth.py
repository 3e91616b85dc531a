"""The memory's bandwidth: what is read, by which clock, what a step reads of a model, and what a report says of it."""

from __future__ import annotations

import attrs
import pytest
import torch
from test_bench_records import INFO, RECORD
from torch import nn

from dynatree_bench.report.memory_share import memory_sentence, memory_share
from dynatree_bench.report.statistics import BASELINE, HF_BASELINE, iteration_seconds
from dynatree_bench.run import bandwidth
from dynatree_bench.run.bandwidth import ReadSpeed, cache_bytes, memory_info, read_speed, share_of_bandwidth, step_reads
from dynatree_bench.run.records import MemoryInfo, MethodInfo, Results, Steps
from dynatree_core.testing.models import tiny_model

CPU = torch.device("cpu")
MB = 10**6


@pytest.fixture
def small_buffers(monkeypatch):
    monkeypatch.setattr(bandwidth, "MIN_BYTES", 2**12)
    monkeypatch.setattr(bandwidth, "cache_bytes", lambda device: 2**12)
    monkeypatch.setattr(bandwidth, "_free_bytes", lambda device: 2**20)


def ticking(*durations):
    """A clock by which reads take so long, one after another."""
    times = [0.0]
    for seconds in durations:
        times += [times[-1], times[-1] + seconds]
    left = iter(times[1:])
    return lambda device: next(left)


def test_the_fastest_of_several_reads_of_a_buffer_beyond_the_caches_counts(small_buffers, monkeypatch):
    monkeypatch.setattr(bandwidth, "READS", 3)
    sums = []
    monkeypatch.setattr(torch.Tensor, "sum", lambda self: sums.append((self.nbytes, self.min().item())))
    found = read_speed(CPU, clock=ticking(0.5, 0.25, 1.0))
    assert sums == [(4 * 2**12, 1.0)] * 3, "each time the whole buffer, of pages that were written"
    assert found == ReadSpeed(bytes_per_second=4 * 2**12 / 0.25, cache_bytes=2**12)


def test_without_caches_that_are_known_the_buffer_is_as_large_as_is_usual(small_buffers, monkeypatch):
    monkeypatch.setattr(bandwidth, "cache_bytes", lambda device: None)
    monkeypatch.setattr(bandwidth, "READS", 1)
    assert read_speed(CPU, clock=ticking(1.0)) == ReadSpeed(2**12, None)


def test_without_room_for_the_buffer_nothing_is_measured(small_buffers, monkeypatch):
    monkeypatch.setattr(bandwidth, "_free_bytes", lambda device: 8 * 2**12 - 1)
    assert read_speed(CPU) is None
    assert memory_info(tiny_model("llama")) is None


def test_the_last_caches_of_the_processors_that_the_process_may_use_count_once(monkeypatch, tmp_path):
    caches = {  # processor -> index -> level, size, shared with
        0: [(1, "48K", "0"), (2, "1024K", "0"), (3, "32768K", "0-1")],
        1: [(1, "48K", "1"), (2, "1024K", "1"), (3, "32768K", "0-1")],
        2: [(1, "48K", "2"), (2, "1024K", "2"), (3, "16384K", "2")],
        3: [(3, "65536K", "3")],
    }
    for processor, found in caches.items():
        for index, (level, size, shared) in enumerate(found):
            folder = tmp_path / f"cpu{processor}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, value in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(f"{value}\n")
    (tmp_path / "cpufreq").mkdir()
    monkeypatch.setattr(bandwidth, "CACHES", tmp_path)
    monkeypatch.setattr(bandwidth.os, "sched_getaffinity", lambda pid: {0, 1, 2})
    assert cache_bytes(CPU) == (32768 + 16384) * 2**10
    monkeypatch.setattr(bandwidth, "CACHES", tmp_path / "elsewhere")
    assert cache_bytes(CPU) is None


# what a step reads


def num_parameters(model):
    return sum(one.numel() for one in model.parameters())


def test_a_table_of_embeddings_is_read_only_as_a_head():
    model = tiny_model("llama")
    table = model.get_input_embeddings().weight
    assert step_reads(model).num_weights == num_parameters(model) - table.numel()
    assert step_reads(model).num_bytes == 8 * step_reads(model).num_weights, "float64"
    tied = tiny_model("llama", tie_word_embeddings=True)
    assert step_reads(tied).num_weights == num_parameters(tied), "once, though it has two names"


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_table_of_positions_is_not_read(family):
    model = tiny_model(family)
    tables = [one for one in model.modules() if isinstance(one, nn.Embedding)]
    positions = [one for one in tables if one.weight is not model.get_output_embeddings().weight]
    assert len(positions) == 1
    assert step_reads(model).num_weights == num_parameters(model) - positions[0].weight.numel()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_of_experts_those_are_read_that_a_token_goes_to(family):
    model = tiny_model(family)
    experts = [one for name, one in model.named_modules() if name.split(".")[-1] == "experts"]
    of_experts = sum(map(num_parameters, experts))
    assert model.config.num_experts_per_tok / experts[0].num_experts == 0.5
    rest = sum(one.numel() for one in model.state_dict().values()) - of_experts
    table = model.get_input_embeddings().weight
    is_tied = table is model.get_output_embeddings().weight
    assert not is_tied
    assert step_reads(model).num_weights == rest - table.numel() + of_experts / 2


class Halved(torch.Tensor):
    """A weight that stands for twice what is stored, as a quantised one does."""

    def __tensor_flatten__(self):
        return ["stored", "nothing"], None


def test_a_weight_that_is_made_of_others_counts_as_it_is_stored():
    layer = nn.Linear(6, 4, bias=False)
    weight = torch.randn(4, 6).as_subclass(Halved)
    weight.stored, weight.nothing = torch.zeros(4, 6, dtype=torch.int8), None
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.weight.stored, layer.weight.nothing = weight.stored, None
    assert step_reads(nn.ModuleDict({"head": layer})).num_bytes == 24
    assert step_reads(nn.ModuleDict({"head": nn.Linear(6, 4, bias=False)})).num_bytes == 96


def test_of_two_measurements_of_a_run_the_faster_one_counts(monkeypatch):
    model, speeds = tiny_model("llama"), iter([20.0, 10.0, 30.0])
    monkeypatch.setattr(bandwidth, "read_speed", lambda device: ReadSpeed(next(speeds), 64))
    first = memory_info(model)
    assert first == MemoryInfo(20.0, 64, step_reads(model).num_bytes)
    assert memory_info(model, first) == first, "the second one is slower"
    assert memory_info(model, first).bytes_per_second == 30


# what the results say of it


def results(*decoded, memory):
    """Outputs of two tokens, two iterations each, as (method, seconds)."""
    records = tuple(
        attrs.evolve(
            RECORD, method=method, repeat=i, decode_seconds=seconds, token_ids=(5, 6),
            steps=Steps((0, 0), (0, 0), (0, 0), (1, 1)), trials=None, replay=None,
        )
        for i, (method, seconds) in enumerate(decoded)
    )  # fmt: skip
    methods = tuple(MethodInfo(name, "hf", None, None, {}) for name in dict.fromkeys(name for name, _ in decoded))
    return Results(None, attrs.evolve(INFO, memory=memory, methods=methods), records)


def test_a_share_is_the_time_that_reading_takes_at_least_of_the_time_that_it_took():
    assert share_of_bandwidth(500 * MB, 0.1, 20_000 * MB) == 0.25


def test_an_iteration_takes_the_mean_over_all_whose_number_and_time_are_known():
    found = results((BASELINE, 0.2), (BASELINE, 0.4), (BASELINE, 0.0), memory=None).records
    assert iteration_seconds(found) == pytest.approx(0.15)
    assert iteration_seconds([attrs.evolve(found[0], steps=None)]) is None
    assert iteration_seconds([]) is None


def test_a_run_says_what_plain_decoding_and_generate_reach():
    memory = MemoryInfo(20_000 * MB, 32 * MB, 500 * MB)
    both = results((BASELINE, 0.08), (BASELINE, 0.12), (HF_BASELINE, 0.2), memory=memory)
    assert memory_sentence(both) == (
        "memory is read at 20.0 GB/s here; plain decoding reads 500 MB of weights in 50.0 ms a token, 50 % of what "
        "bandwidth allows, and `hf generate` 25 %; at full bandwidth plain decoding would be 2.0 times as fast"
    )
    noisy = attrs.evolve(both, info=attrs.evolve(both.info, settings={"cores": 100}))
    begin, end = memory_sentence(noisy).split("; the machine was busy")
    assert memory_sentence(both).startswith(begin)
    assert end == ", so this is not to be believed"
    alone = results((BASELINE, 0.04), memory=memory)
    assert memory_sentence(alone).endswith("500 MB of weights in 20.0 ms a token, 125 % of what bandwidth allows")


def test_weights_that_the_caches_hold_are_not_bound_by_the_memory():
    memory = MemoryInfo(20_000 * MB, 32 * MB, 32 * MB)
    assert memory_share(memory, 0.1) is None
    said = memory_sentence(results((BASELINE, 0.1), memory=memory))
    assert said.endswith("reads 32 MB of weights, which the caches hold, so bandwidth does not bound it")
    assert memory_share(attrs.evolve(memory, cache_bytes=None), 0.1) == pytest.approx(0.016)


def test_what_was_not_measured_is_not_said():
    memory = MemoryInfo(20_000 * MB, 32 * MB, 500 * MB)
    assert memory_sentence(results((BASELINE, 0.1), memory=None)) is None
    assert memory_sentence(results((HF_BASELINE, 0.1), memory=memory)) is None
    assert memory_share(None, 0.1) is memory_share(memory, None) is None
