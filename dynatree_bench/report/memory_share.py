"""What share of the memory's bandwidth decoding reaches, from the results of a run alone.

A pass of the target reads the weights once, over one row as over a tree. Its share is the time that reading them takes
at the speed at which the run found the memory to be read ÷ the time of an iteration, all of which counts.
"""

from __future__ import annotations

from dynatree_bench.report.statistics import BASELINE, HF_BASELINE, iteration_seconds
from dynatree_bench.run.bandwidth import share_of_bandwidth
from dynatree_bench.run.records import MemoryInfo, Results, is_busy


def memory_share(memory: MemoryInfo | None, seconds: float | None) -> float | None:
    """What iterations of this mean time reach of the bandwidth; None where it is not known, or the caches hold all."""
    if memory is None or seconds is None or is_cached(memory):
        return None
    return share_of_bandwidth(memory.step_bytes, seconds, memory.bytes_per_second)


def is_cached(memory: MemoryInfo) -> bool:
    """Whether weights stay in the caches from one step to the next, so that the memory does not bound a step."""
    return memory.step_bytes <= (memory.cache_bytes or 0)


def memory_sentence(results: Results) -> str | None:
    """How near plain decoding comes to what the memory allows, and transformers' own; None where that is not known."""
    memory = results.info.memory
    seconds, hf_seconds = (
        iteration_seconds(record for record in results.records if record.method == name)
        for name in (BASELINE, HF_BASELINE)
    )
    if memory is None or seconds is None:
        return None
    begin = f"memory is read at {memory.bytes_per_second / 1e9:.1f} GB/s here; plain decoding "
    size = f"{memory.step_bytes / 1e6:,.{0 if memory.step_bytes >= 1e7 else 2}f} MB of weights"
    if is_cached(memory):
        return f"{begin}reads {size}, which the caches hold, so bandwidth does not bound it"
    share, hf_share = memory_share(memory, seconds), memory_share(memory, hf_seconds)
    assert share is not None, "the memory and the time are known, and the caches do not hold all"
    beside = f", and `{HF_BASELINE}` {hf_share:.0%}" if hf_share is not None else ""
    said = f"{begin}reads {size} in {1000 * seconds:.1f} ms a token, {share:.0%} of what bandwidth allows{beside}"
    if is_busy(results):
        said += "; the machine was busy, so this is not to be believed"
    elif share < 1:
        said += f"; at full bandwidth plain decoding would be {1 / share:.1f} times as fast"
    return said.replace("%", " %")
