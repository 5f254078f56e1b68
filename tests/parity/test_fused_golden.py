"""The fused path, without its kernels, on the golden fixtures: what serves gives lerobot's numbers, in float32.

With kernels and on a GPU it is held against the plain module (test_fused_gpu.py), which these fixtures hold too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from policies.pi052.policy import Pi052Inputs, Pi052Policy
from policies.rtc import PrefixSchedule
from services.inference.fused import ChunkStart, FusedPi052, FusedSettings, PrefixRow
from services.inference.fused.units import NO_LOCATIONS, TOO_SHORT
from tests.support import fused_lab as lab

from . import pi
from .golden import Golden, relative_error

CPU = torch.device("cpu")


def fused_of(policy: Pi052Policy, golden: Golden, num_steps: int, **changes: Any) -> FusedPi052:
    settings = FusedSettings(
        num_cameras=len(golden.config["cameras"]),
        num_steps=num_steps,
        horizon=golden.config["chunk_size"],
        num_slots=8,
        max_text=32,
        prompt_lengths=(64,),
        expert_rows=(1, 2, 4, 8),
        text_rows=(1, 2, 4),
        **changes,
    )
    made = FusedPi052(policy.config.network, settings, CPU, dtype=torch.float32)
    made.weights.refill(policy.network.state_dict())
    return made


def begin(fused: FusedPi052, inputs: Pi052Inputs) -> list[int]:
    """Vision and prefixes of a batch; its slots."""
    slots, rows = [], []
    for pictures, valid, tokens, are_valid in zip(
        inputs.pictures, inputs.picture_valid, inputs.tokens, inputs.token_valid, strict=True
    ):
        slot = fused.slots.take()
        assert slot is not None
        seen = fused.vision(pictures).clone()
        rows.append(
            PrefixRow(slot=slot, picture_tokens=seen, picture_valid=valid.tolist(), tokens=tokens[are_valid].tolist())
        )
        slots.append(slot)
    fused.prefix(rows)
    return slots


def chunks(fused: FusedPi052, slots: Sequence[int], starts: Sequence[ChunkStart]) -> torch.Tensor:
    """Each row begins one step behind the one before it, as robots do that come one after the other."""
    for begun in zip(slots, starts, strict=True):
        fused.begin_chunks([begun])
    for tick in range(fused.settings.num_steps + len(slots)):
        rows = [(slot, tick - row) for row, slot in enumerate(slots) if 0 <= tick - row < fused.settings.num_steps]
        if rows:
            fused.expert_step(rows)
    return fused.slots.actions[list(slots)]


@pytest.mark.parametrize("name", ["pi05", "pi052"])
def test_chunks_of_rows_at_different_steps(name: str, request: pytest.FixtureRequest) -> None:
    policy, golden = request.getfixturevalue(name), request.getfixturevalue(f"{name}_golden")
    keys = [key for key in golden.tensors if ".chunk." in f".{key}" and key.rpartition(".")[2].isdigit()]
    assert any(key.endswith("chunk.4") for key in keys)
    for key in keys:
        without = pi.missing_camera(golden, key.split(".")[0]) if name == "pi05" else None
        inputs = pi.acting(pi.inputs_of(golden, without=without))
        fused = fused_of(policy, golden, int(key.rpartition(".")[2]))
        noise = golden["in.noise"][: len(inputs.tokens)]
        found = chunks(fused, begin(fused, inputs), [start_of(one) for one in noise])
        assert relative_error(found, golden[key]) <= pi.AIM, key


def start_of(noise: torch.Tensor, **guided: Any) -> ChunkStart:
    settings: dict[str, Any] = {"committed": None, "delay_steps": 0, "execution_horizon": 0}
    settings |= {"schedule": PrefixSchedule.LINEAR, "trained_max_delay": 0}
    return ChunkStart.of(noise, **(settings | guided))


def test_guided_chunks_beside_free_ones(pi05: Pi052Policy, pi05_golden: Golden) -> None:
    golden = pi05_golden
    inputs = pi.acting(pi.inputs_of(golden))
    count = len(inputs.tokens)
    committed = pi.committed_of(golden, [0] * count, [0] * count)
    free = {4: golden["all.chunk.4"], 10: golden["all.chunk.10"]}
    assert any(case["steps"] in free for case in golden.meta["rtc"])
    for case in golden.meta["rtc"]:
        fused = fused_of(pi05, golden, case["steps"], max_guidance_weight=case["max_guidance_weight"])
        guided = [
            start_of(
                noise,
                committed=actions[:length],
                delay_steps=case["inference_delay"],
                execution_horizon=case["execution_horizon"],
                schedule=PrefixSchedule[case["schedule"]],
            )
            for noise, actions, length in zip(golden["in.noise"], committed.actions, committed.length.tolist(), strict=False)
        ]
        slots = [*begin(fused, inputs), *begin(fused, inputs)]
        found = chunks(fused, slots, [*guided, *[start_of(noise) for noise in golden["in.noise"][:count]]])
        assert relative_error(found[:count], golden[case["key"]]) <= pi.AIM, case
        if case["steps"] in free:
            assert relative_error(found[count:], free[case["steps"]]) <= pi.AIM, case


def test_greedy_ids_of_rows_that_decode_together(pi052: Pi052Policy, pi052_golden: Golden) -> None:
    golden = pi052_golden
    for case in golden.meta["select"]:
        rules = pi.rules_of(golden, case)
        fused = fused_of(pi052, golden, 4, decoding=rules)
        prompt = pi.prompt_of(golden, case["tokens"])
        others = pi.prompt_of(golden, golden.meta["select"][-1]["tokens"])
        slots = [*begin(fused, others), *begin(fused, prompt)]
        flags = NO_LOCATIONS if rules.suppress_locations else 0
        ids: list[int] = []
        while len(ids) < len(case["ids"]):
            short = TOO_SHORT if len(ids) < rules.min_new_tokens else 0
            rows = [lab.TextRow(slot=slot, flags=flags | short) for slot in slots]
            _, tokens = fused.text_step(rows) if ids else fused.first_text(rows)
            ids.append(int(tokens[1]))
        assert ids == case["ids"], case
