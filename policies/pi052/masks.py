"""Who may attend to whom, and at which position: the whole of pi052's attention pattern.

The prefix is [pictures, language, FAST action tokens]; the suffix is the noisy actions, K repeats of T of them.

    query \\ key      pictures, prompt   target text    FAST            actions
    picture, prompt  yes                no             no              no
    target text      yes                up to itself   no              no
    FAST             yes                yes            up to itself    no
    actions          yes                yes            never           own repeat

A token opens a new block where its mark is set; a query sees every key of its own and of earlier blocks. Actions stand at
the positions that follow the prefix without FAST, as if FAST were not there: it is not, when the robot acts.

Shapes: B rows, S prefix tokens, K repeats, T horizon.
"""

from __future__ import annotations

import torch

from ..attention import bias, prefix_attention, prefix_positions

__all__ = [
    "bias", "prefix_attention", "prefix_positions", "suffix_attention", "suffix_positions", "visible_to_actions",
]  # fmt: skip


def visible_to_actions(valid_BS: torch.Tensor, is_fast_S: torch.Tensor) -> torch.Tensor:
    """(B, S) bool: what an action may see of the prefix."""
    return valid_BS & ~is_fast_S


def suffix_attention(visible_BS: torch.Tensor, repeats: int, horizon: int) -> torch.Tensor:
    """(B, K*T, S + K*T) bool: each repeat sees the visible prefix and itself, in both directions."""
    rows, length = visible_BS.shape[0], repeats * horizon
    repeat_of = torch.arange(length, device=visible_BS.device) // horizon
    own = (repeat_of[:, None] == repeat_of[None, :]).expand(rows, length, length)
    return torch.cat([visible_BS[:, None, :].expand(rows, length, visible_BS.shape[1]), own], dim=2)


def suffix_positions(visible_BS: torch.Tensor, repeats: int, horizon: int) -> torch.Tensor:
    """(B, K*T) int64: every repeat takes the same positions."""
    step = torch.arange(horizon, device=visible_BS.device).repeat(repeats)
    return visible_BS.sum(dim=1, keepdim=True) + step
