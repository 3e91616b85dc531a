"""`dynatree serve`: its metrics say what has happened."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import Running, events, gated, new_engine, new_service, running
from test_docs import DOCS, first_words, table

BODY = {"model": "tiny", "prompt": "the cat sat on the mat. the cat", "max_tokens": 24, "temperature": 0}


def samples(server: Running) -> dict[str, float]:
    """Value by name, with the labels beside the model's."""
    with server.http() as http:
        text = http.get("/metrics").text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "tiny"
            others = [f"{name}={value}" for name, value in sample.labels.items() if name != "model_name"]
            found[",".join([sample.name, *others])] = sample.value
    return found


def test_what_is_counted_is_what_the_answers_say():
    with running(new_service({"prompt_lookup": new_engine(prefix_cache=None)})) as server:
        before = samples(server)
        assert (before["vllm:generation_tokens_total"], before["vllm:num_requests_running"]) == (0, 0)
        usages = [server.post("/v1/completions", {**BODY, "n": n}).json()["usage"] for n in (1, 2)]
        assert server.post("/v1/completions", {**BODY, "n": 0}).status_code == 400
        found = samples(server)
    own = [usage["dynatree"] for usage in usages]
    assert found["vllm:prompt_tokens_total"] == 3 * 31
    assert found["vllm:generation_tokens_total"] == sum(usage["completion_tokens"] for usage in usages)
    assert found["dynatree_iterations_total"] == sum(one["iterations"] for one in own)
    assert found["vllm:spec_decode_num_draft_tokens_total"] == sum(one["drafted_tokens"] for one in own) > 0
    accepted = sum(one["accepted_tokens"] for one in own)
    assert found["vllm:spec_decode_num_accepted_tokens_total"] == accepted > 0
    by_position = [value for name, value in found.items() if "accepted_tokens_per_pos_total" in name]
    assert sum(by_position) == accepted
    assert by_position == sorted(by_position, reverse=True)
    assert found["vllm:request_success_total,finished_reason=length"] == 3
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert found[f"vllm:{name}_count"] == 3
    assert found["vllm:inter_token_latency_seconds_count"] == sum(one["iterations"] for one in own) - 3
    assert found["dynatree_requests_refused_total,code=invalid_type"] == 1
    assert found["dynatree_engine_up"] == 1


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_an_answer_has_the_metrics_that_benchmarks_read(route):
    """The names and sums are those of vLLM's `metrics`, as AIPerf's adapter checks them."""
    asked = {"model": "tiny", "max_tokens": 24, "temperature": 0}
    asked |= (
        {"prompt": BODY["prompt"]}
        if route == "/v1/completions"
        else {"messages": [{"role": "user", "content": "the cat"}]}
    )
    streamed = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    with running(new_service()) as server:
        whole = server.post(route, asked).json()
        *_, last = events(iter(server.post(route, streamed).text.splitlines()))
        found = samples(server)
        plain = server.post(route, {**asked, "dynatree": {"policy": "autoregressive"}}).json()
        several = server.post(route, {**asked, "n": 2}).json()
    for record in (whole, last):
        times, figures = record["metrics"], record["usage"]["dynatree"]
        acceptance = times.pop("speculative_decoding")
        histogram, num_steps = acceptance["acceptance_histogram"], acceptance["num_spec_steps"]
        assert len(histogram) == acceptance["num_spec_tokens"] + 1
        assert sum(histogram) == num_steps <= figures["iterations"]
        accepted = sum(number * count for number, count in enumerate(histogram))
        assert accepted == acceptance["num_accepted_draft_tokens"] == figures["accepted_tokens"] > 0
        assert acceptance["num_draft_tokens"] == figures["drafted_tokens"]
        assert acceptance["mean_acceptance_length"] == pytest.approx(1 + accepted / num_steps)
        assert acceptance["draft_acceptance_rate"] == pytest.approx(accepted / figures["drafted_tokens"])
        assert 1000 * figures["waiting_seconds"] == pytest.approx(times["queue_time_ms"])
        first = times["queue_time_ms"] + times["time_to_first_token_ms"]
        assert 1000 * figures["first_token_seconds"] == pytest.approx(first)
        assert times["mean_itl_ms"] == pytest.approx(times["generation_time_ms"] / 23)
        computing = times["time_to_first_token_ms"] + times["generation_time_ms"]
        assert times["tokens_per_second"] == pytest.approx(24_000 / computing)
    both = [record["usage"]["dynatree"] for record in (whole, last)]
    assert found["vllm:spec_decode_num_draft_tokens_total"] == sum(one["drafted_tokens"] for one in both)
    assert found["vllm:spec_decode_num_drafts_total"] == 2 * num_steps
    assert plain["metrics"]["speculative_decoding"] is None
    assert plain["metrics"]["tokens_per_second"] > 0
    assert several["metrics"] is None


def test_who_runs_and_who_waits():
    with (
        gated(new_service({"prompt_lookup": new_engine(max_sequences=1)})) as (server, gate),
        server.http() as http,
        http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as first,
        http.stream("POST", "/v1/completions", json={**BODY, "stream": True}),
    ):
        gate.step()
        records = events(first.iter_lines())  # kept: who lets go of it closes the stream
        assert next(records)["choices"][0]["text"]
        found = samples(server)
        assert (found["vllm:num_requests_running"], found["vllm:num_requests_waiting"]) == (1, 1)


def test_the_page_lists_every_metric():
    with running(new_service()) as server, server.http() as http:
        text = http.get("/metrics").text
    names = {family.name for family in text_string_to_metric_families(text)}
    families = {name for name in names if not name.endswith("_created")}  # which each counter and histogram has
    listed = first_words(table(DOCS / "serve.md", "metric", "kind", "what it counts"))
    assert sorted(name.removesuffix("_total") for name in listed) == sorted(families)
