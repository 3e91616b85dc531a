"""What was answered is gone: a server keeps nothing of a request but numbers."""

from __future__ import annotations

import gc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from serving import new_service, running, until

from dynatree_core.engine.handle import Handle
from dynatree_core.engine.lane import Lane
from dynatree_core.request.request import Request
from dynatree_core.serve.answers import Answers

KINDS = (Handle, Lane, Request, Answers)


def alive() -> Counter[str]:
    """How many there are of each kind, everywhere in this process."""
    gc.collect()
    return Counter(type(one).__name__ for one in gc.get_objects() if type(one) in KINDS)


def test_nothing_of_answered_requests_stays():
    with running(new_service(max_requests=None)) as server:

        def ask(number: int) -> int:
            body = {
                "model": "tiny", "prompt": "the cat sat", "max_tokens": 3 + number % 5, "stream": number % 2 == 0,
                "n": 1 + number % 3, "temperature": 0.5, "logprobs": number % 4, "presence_penalty": number % 2,
            }  # fmt: skip
            return server.post("/v1/completions", body | ({"n": 0} if number % 7 == 0 else {})).status_code

        def ask_all(number: int) -> Counter[int]:
            with ThreadPoolExecutor(4) as clients:
                return Counter(clients.map(ask, range(number)))

        ask_all(12)  # what is made once is there now
        before = alive()
        assert ask_all(42) == {200: 36, 400: 6}
        with server.http() as http:
            text = http.get("/metrics").text
        assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in text
        until(lambda: alive() - before == Counter())  # a thread may still be on its way out of what has told of the end
