"""Reads the fixtures without weights: recipes, prompts, tokenizers, and what misc.json has of processors."""

from __future__ import annotations

import functools
import importlib.util
import json
from types import ModuleType
from typing import Any

from tokenizers import Tokenizer as RawTokenizer

from policies.fast import FastTokenizer, parse_config
from policies.prompts.pi052 import paligemma
from policies.prompts.tokenizer import Tokenizer

from . import golden


@functools.cache
def read(name: str) -> dict[str, Any]:
    """A JSON file of the fixtures' folder."""
    path = golden.folder() / name
    assert path.is_file(), f"{path} is not there; {path.parent} must hold the fixtures its README describes"
    value: dict[str, Any] = json.loads(path.read_text())
    return value


@functools.cache
def raw_tokenizer_json(name: str) -> str:
    """Brought to its full size by the fixtures' own rule."""
    trimmed = json.loads((golden.folder() / "tokenizers" / f"{name}.json").read_text())
    return json.dumps(_expander().expand(name, trimmed))


def pi_tokenizer(name: str = "gemma_like", *, with_locations: bool = True) -> Tokenizer:
    raw = RawTokenizer.from_str(raw_tokenizer_json(name))
    return paligemma(raw) if with_locations else Tokenizer(raw)


def smol_tokenizer(name: str = "smol_like") -> Tokenizer:
    return Tokenizer(RawTokenizer.from_str(raw_tokenizer_json(name)))


def tokenizer_config(name: str) -> dict[str, Any]:
    return read(f"tokenizers/{name}_config.json")


def fast_tokenizer(name: str = "fast") -> FastTokenizer:
    raw = RawTokenizer.from_file(str(golden.folder() / "tokenizers" / f"{name}.json"))
    return FastTokenizer(raw, parse_config(tokenizer_config(name)))


def _expander() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pad_tokenizer", golden.folder() / "pad_tokenizer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
