"""Fails when the committed stubs are not what the protos generate; says how to mend it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    protos = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "protos").rglob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        out = [f"--{plugin}_out={scratch}" for plugin in ("python", "grpc_python")]
        out += [f"--{plugin}_out=quiet:{scratch}" for plugin in ("mypy", "mypy_grpc")]
        command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "protos", *out, *protos]
        # protoc looks for its mypy plugins on PATH; they lie beside the interpreter, whether or not it was activated.
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        fresh = {path.relative_to(scratch): path.read_bytes() for path in Path(scratch).rglob("*_pb2*")}
    committed = {
        path.relative_to(ROOT): path.read_bytes()
        for path in (ROOT / "manyhands").rglob("*_pb2*")
        if path.suffix in (".py", ".pyi")
    }
    stale = sorted(str(path) for path in fresh.keys() | committed.keys() if fresh.get(path) != committed.get(path))
    if stale:
        print("These stubs are not what the protos generate; run 'make proto' and commit them:", *stale, sep="\n  ")
        return 1
    print(f"{len(fresh)} stubs are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
