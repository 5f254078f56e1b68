"""Where compiled kernels are kept: the engine process, which compiles them, is told."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from deploy.local import Topology
from manyhands.errors import InvalidInput
from policies import checkpoint
from services.inference import main
from tests.support.inference_lab import ENVIRONMENT, make_policy


def test_the_engine_process_keeps_kernels_where_it_is_told(tmp_path: Path) -> None:
    checkpoint.save(make_policy(), tmp_path / "tiny")
    kernels = tmp_path / "host" / "kernels"
    with Topology(tmp_path / "logs", environment=ENVIRONMENT) as topology:
        flags = ["--kernel-cache", str(kernels), "--address", "127.0.0.1:0"]
        service = topology.start("serve", ["serve", f"--model=tiny={tmp_path / 'tiny'}", *flags])
        engines = [
            process
            for process in psutil.Process(service.process.pid).children(recursive=True)
            if "services.inference.engine_process" in process.cmdline()
        ]
        assert [process.environ()["TRITON_CACHE_DIR"] for process in engines] == [str(kernels)]
    assert kernels.is_dir()


def test_a_folder_that_cannot_be_made_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InvalidInput, match="cannot be made") as refused:
        main._keep_kernels(tmp_path / "file" / "kernels")
    assert refused.value.field == "kernel_cache"
