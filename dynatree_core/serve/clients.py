"""How many requests each client has open at once."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from dynatree_core.serve.errors import ApiError

__all__ = ["Clients"]


class Clients:
    """Counts the requests that are read or answered, by client. For one thread.

    Args:
        most: that one client may have open at once; None: any number.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._num_open: Counter[str] = Counter()

    @contextlib.contextmanager
    def counted(self, client: str) -> Iterator[None]:
        """One more of this client, as long as the block runs.

        Raises:
            ApiError: it has as many as it may.
        """
        if self._most is not None and self._num_open[client] >= self._most:
            message = f"a client may have {self._most} requests open at once; ask again when one of them is answered"
            raise ApiError(429, message, code="too_many_requests", retry_after=1)
        self._num_open[client] += 1
        try:
            yield
        finally:
            self._num_open[client] -= 1
            if not self._num_open[client]:
                del self._num_open[client]
