"""The front end of the inference service knows its models by description: it starts without torch and without policies."""

from __future__ import annotations

import subprocess
import sys

FRONT_END = """
import sys

BLOCKED = {"torch", "policies", "safetensors", "tokenizers", "transformers"}


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is for the engine process", name=name)
        return None


sys.meta_path.insert(0, Blocker())
import services.inference.main
import services.inference.engine_process  # Its heavy part comes when it has said so to the front end.

loaded = BLOCKED & {name.partition(".")[0] for name in sys.modules}
assert not loaded, loaded
front_end = "service stream text prepare sessions engine_supervisor engine_client engine_rows slot_layout".split()
missing = {f"services.inference.{name}" for name in front_end} - set(sys.modules)
assert not missing, missing
print("imported")
"""


def test_the_front_end_imports_neither_torch_nor_policies() -> None:
    done = subprocess.run([sys.executable, "-c", FRONT_END], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "imported\n"), done.stderr
