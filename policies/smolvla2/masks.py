"""Who may attend to whom, and at which position: the whole of SmolVLA's attention pattern.

The prefix is [pictures, language, state]; the suffix is the noisy actions.

    query \\ key      pictures, prompt   target text    state   actions
    picture, prompt  yes                no             no      no
    target text      yes                up to itself   no      no
    state            yes                yes            yes     no
    actions          yes                yes            yes     up to itself (layers with self attention), none (others)

Blocks and positions of the prefix: policies/attention.py. Actions stand behind the prefix in layers with self attention; in
the others they are counted from 0, though the keys they meet there stand where the prefix does.

Shapes: B rows, S prefix tokens, T horizon.
"""

from __future__ import annotations

import torch


def prefix_to_actions(valid_BS: torch.Tensor, horizon: int) -> torch.Tensor:
    """(B, T, S) bool: every action sees the whole prefix."""
    return valid_BS[:, None, :].expand(-1, horizon, -1)


def suffix_attention(valid_BS: torch.Tensor, horizon: int) -> torch.Tensor:
    """(B, T, S + T) bool: the prefix, and actions up to the own."""
    own = torch.ones(horizon, horizon, dtype=torch.bool, device=valid_BS.device).tril()
    return torch.cat([prefix_to_actions(valid_BS, horizon), own.expand(valid_BS.shape[0], -1, -1)], dim=2)


def suffix_positions(valid_BS: torch.Tensor, horizon: int) -> torch.Tensor:
    """(B, T) int64."""
    return valid_BS.sum(dim=1, keepdim=True) + torch.arange(horizon, device=valid_BS.device)


def cross_positions(valid_BS: torch.Tensor, horizon: int) -> torch.Tensor:
    """(B, T) int64."""
    return torch.arange(horizon, device=valid_BS.device).expand(valid_BS.shape[0], -1)
