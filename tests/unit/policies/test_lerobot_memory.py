"""A large policy of lerobot's is never in memory twice, whatever precision its file has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from policies.configuration import Precision, TowerSize, VisionSize
from policies.pi052 import checkpoint_keys, lerobot_config
from policies.pi052.config import NetworkConfig, pi05_config
from policies.pi052.model import Pi052Network
from tests.support import lerobot_lab
from tests.unit.policies.test_lerobot_folder import SPEC

LIMIT = 1.3
SIZES = {
    "vision": {"width": 64, "depth": 1, "mlp": 64, "heads": 2, "patch": 8},
    "language": {"width": 1024, "depth": 4, "mlp": 8192, "heads": 8, "kv_heads": 1, "head_dim": 128},
    "expert": {"width": 256, "depth": 4, "mlp": 1024, "heads": 8, "kv_heads": 1, "head_dim": 128},
    "vocabulary": 20000,
}
NETWORK = NetworkConfig(
    vision=VisionSize(**SIZES["vision"]),
    language=TowerSize(**SIZES["language"]),
    expert=TowerSize(**SIZES["expert"]),
    vocabulary=SIZES["vocabulary"],
    image_height=16,
    image_width=16,
    precision=Precision.BFLOAT16,
)
# Run in a process of its own: the peak is that of the process. (getrusage's is that of the process that started it, too.)
SCRIPT = """
import json, re, sys
from pathlib import Path
import torch
from policies import lerobot_folder
from policies.configuration import TowerSize, VisionSize
from policies.pi052 import lerobot_config
from policies.pi052.config import NetworkConfig
from policies.pi052.policy import Pi05Policy
from tests.unit.policies.test_lerobot_folder import SPEC

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

sizes = json.loads(sys.argv[2])
towers = {name: TowerSize(**sizes[name]) for name in ("language", "expert")}
lerobot_config.TOWERS = {"gemma_2b": towers["language"], "gemma_300m": towers["expert"]}
lerobot_config.BASE = NetworkConfig(vision=VisionSize(**sizes["vision"]), vocabulary=sizes["vocabulary"], **towers)
with torch.device("meta"):  # What torch and the policy's code take is not counted.
    Pi05Policy.from_config(Pi05Policy.tiny_config(), SPEC)
before = peak()
policy = lerobot_folder.read(Path(sys.argv[1])).policy
grown = peak() - before
print(json.dumps([grown, sum(p.numel() * p.element_size() for p in policy.parameters())]))
"""


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_reading_takes_little_more_than_the_weights(
    stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lerobot_lab.name_pi_sizes(monkeypatch, NETWORK)
    config = lerobot_config.write("pi05", pi05_config(network=NETWORK), SPEC)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        network = Pi052Network(NETWORK)
    some = torch.randn(1 << 20).to(stored)
    weights = {
        checkpoint_keys.to_lerobot(name): some.repeat(-(-p.numel() // len(some)))[: p.numel()].reshape(p.shape).clone()
        for name, p in network.named_parameters()
    }
    save_file(weights, tmp_path / "model.safetensors")
    del weights
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), json.dumps(SIZES)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[3],
    )
    assert ran.returncode == 0, ran.stderr
    grown, size = json.loads(ran.stdout)
    print(f"{grown / size:.3f} of {size / 1e6:.0f} MB")
    assert size > 300e6
    assert 0.9 * size < grown < LIMIT * size
