"""What pictures of the last chunks were seen as, for questions about the same pictures.

A robot asks for its subtask about what it acts on (subtask_question.py): the same pictures, and vision is a quarter of a
question's prefix. Kept are tokens of whole observations, each owner's for itself: no robot's answer depends on what another
one saw. On the thread of the units, in their order.

Shapes: I cameras, P tokens of a camera, D width.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt
import torch

from .settings import Pictures

# A question may be looked at when the next chunk's pictures have been seen already.
MOST_OF_AN_OWNER = 2


class KeptVision:
    """Args:
    num_places: Observations kept; the oldest makes room. 0: none are.
    tokens_shape: (I * P, D).
    """

    def __init__(self, num_places: int, tokens_shape: tuple[int, int], *, dtype: torch.dtype, device: torch.device) -> None:
        self._tokens = torch.zeros(num_places, *tokens_shape, dtype=dtype, device=device)
        # By place, whose pictures they are; oldest first.
        self._kept: OrderedDict[int, tuple[str, Pictures]] = OrderedDict()

    def keep(self, owner: str, pictures: Pictures, tokens: torch.Tensor) -> None:
        """tokens: (I, P, D) or (I * P, D); copied. Nobody's pictures ("") are not kept."""
        if not owner or not len(self._tokens):
            return
        of_owner = [place for place, (whose, _) in self._kept.items() if whose == owner]
        place = len(self._kept)
        if len(of_owner) == MOST_OF_AN_OWNER:
            place = of_owner[0]
            del self._kept[place]
        elif place == len(self._tokens):
            place, _ = self._kept.popitem(last=False)
        self._tokens[place].copy_(tokens.reshape(self._tokens.shape[1:]))
        self._kept[place] = (owner, pictures)

    def find(self, owner: str, pictures: Pictures) -> torch.Tensor | None:
        """(I * P, D), holding until the next keep(); None where the owner's last chunks had no such pictures."""
        for place, (whose, known) in reversed(self._kept.items()):
            if whose == owner and all(map(_are_same, known, pictures)):
                return self._tokens[place]
        return None

    def forget(self) -> None:
        """Weights changed."""
        self._kept.clear()


def _are_same(one: npt.NDArray[np.uint8] | None, other: npt.NDArray[np.uint8] | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)
