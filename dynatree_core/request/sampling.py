"""How a token is chosen from the target's scores: the best one, or one drawn at random.

Sampling inside a tree is exact because the tree is fixed before anything is drawn. At each node of the path, in order,
the target draws its token, whatever was drafted; the path goes on if a child has that token. So the text has the
target's own distribution, for every policy and drafter, and with the same seed it is the same text.
(The rule of Leviathan et al. 2023, which accepts a drafted token with probability p/q, would not be exact here: its
proof needs the drafted token to be a sample of q, and a policy may have chosen it by its probability.)
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Sampler"]


class Sampler:
    """Draws one token at a time, with a random generator of its own or torch's.

    Args:
        device: of the scores.
        seed: of a generator of its own; None: torch's global one, as `generate` uses it.
    """

    def __init__(self, device: torch.device, seed: int | None) -> None:
        self._device = device
        if seed is not None:
            self._generator = torch.Generator(device).manual_seed(seed)
        elif device.type == "cuda":
            self._generator = torch.cuda.default_generators[device.index or 0]
        else:
            self._generator = torch.default_generator

        self._other = self._generator  # the generator to return to after `apart`
        self._row, self._num_rows = 0, 1

    def draw_for(self, row: int, num_rows: int) -> None:
        """From now on, return the token that this row gets when `generate` draws for all rows of a batch at once."""
        self._row, self._num_rows = row, num_rows

    def apart(self, state: Tensor) -> None:
        """From now on, draw from a separate generator that starts in this state."""
        self._other = self._generator
        self._generator = torch.Generator(self._device)
        self._generator.set_state(state)

    def rejoin(self, state: Tensor) -> None:
        """Return to the generator in use before `apart`, and set its state."""
        self._generator = self._other
        self.restore(state)

    def draw(self, scores: Tensor) -> Tensor:
        """A token id [1] for scores [1, vocab], which are unnormalised log-probabilities."""
        chances = scores.softmax(dim=-1).expand(self._num_rows, -1)
        return torch.multinomial(chances, num_samples=1, generator=self._generator)[self._row]

    def state(self) -> Tensor:
        """The generator's state."""
        return self._generator.get_state()

    def restore(self, state: Tensor) -> None:
        """Go back to an earlier state, so that the same numbers are drawn again."""
        self._generator.set_state(state)
