"""What a machine can hold of docs/architecture.md: import arrows, a robot side without torch, nothing run from data."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("manyhands", "policies", "robot_agent", "actor", "services", "dataset_store", "learner", "deploy")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if "_pb2" not in path.name)

# Closed tables of name -> "module:Class" (or command -> module); nothing else imports by name.
REGISTRIES = {
    "manyhands/cli.py",
    "learner/recipes/__init__.py",
    "policies/registry.py",
    "robot_agent/robots/registry.py",
}
OBJECT_LOADERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
BANNED_CALLS = {
    "eval": "code from data",
    "exec": "code from data",
    "torch.load": "unpickles",
    "yaml.load": "builds objects",
    "yaml.unsafe_load": "builds objects",
    "yaml.full_load": "builds objects",
    "__import__": "imports by name",
    "importlib.import_module": "imports by name",
    "import_module": "imports by name",
    "pkgutil.resolve_name": "imports by name",
    "runpy.run_module": "imports by name",
    "runpy.run_path": "code from data",
}


def test_imports_follow_the_arrows() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_source_folder_is_a_package() -> None:
    """A folder without __init__.py would escape the arrows above, and the wheel."""
    folders = {path.parent for path in SOURCES}
    assert [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


ROBOT_SIDE = """
import importlib, pkgutil, sys

BLOCKED = {"torch", "ray", "safetensors", "transformers", "pyarrow", "av", "aiohttp", "accelerate", "deepspeed", "uvloop"}


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not installed on a robot PC", name=name)
        return None


sys.meta_path.insert(0, Blocker())
for name in ("manyhands", "robot_agent", "actor"):
    package = importlib.import_module(name)
    for found in pkgutil.walk_packages(package.__path__, f"{name}."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
missing = {"robot_agent.main", "actor.main"} - set(sys.modules)
assert not missing, missing
loaded = BLOCKED & {name.partition(".")[0] for name in sys.modules}
assert not loaded, loaded
print("imported", sum(name.startswith(("manyhands", "robot_agent", "actor")) for name in sys.modules))
"""


def test_robot_side_imports_without_the_packages_of_servers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ROBOT_SIDE], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("imported")


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return ""


def _violations(tree: ast.AST, file: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                if name.partition(".")[0] in OBJECT_LOADERS:
                    yield f"{file}:{node.lineno}: imports {name}, which runs code from data"
        elif isinstance(node, ast.Call):
            name = _dotted(node.func)
            reason = BANNED_CALLS.get(name)
            if reason is not None and not (reason == "imports by name" and file in REGISTRIES):
                yield f"{file}:{node.lineno}: calls {name}: {reason}"
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    yield f"{file}:{node.lineno}: allow_pickle"
                if keyword.arg == "trust_remote_code":
                    yield f"{file}:{node.lineno}: trust_remote_code"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_code_or_objects_come_from_data(package: str) -> None:
    found = [
        violation
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] == package
        for violation in _violations(ast.parse(path.read_text(encoding="utf-8")), str(path.relative_to(ROOT)))
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "importlib.import_module(name)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_check_itself_sees(line: str) -> None:
    assert list(_violations(ast.parse(line), "policies/somewhere.py"))


def test_registries_are_still_there() -> None:
    """An exception for a file that has gone would wait for another one of its name."""
    assert [name for name in sorted(REGISTRIES) if not (ROOT / name).exists()] == []


def test_pages_that_are_named_exist():
    sources = [*SOURCES, ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    named = {
        (path.relative_to(ROOT).as_posix(), page)
        for path in sources
        for page in re.findall(r"docs/[\w/-]+\.md", path.read_text())
    }
    assert len(named) > 10
    assert not {(source, page) for source, page in named if not (ROOT / page).is_file()}
