"""Tokenizers and recipes of lerobot's checkpoints: it names them, and somebody has to have them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyhands.errors import NotFound

from . import files as policy_files
from .fast import FastTokenizer
from .lerobot_fields import Described
from .lerobot_processors import Processing
from .prompts.tokenizer import TOKENIZER_FILE
from .recipes import recipe as recipes
from .recipes.recipe import SHIPPED

PALIGEMMA = "google/paligemma-3b-pt-224"
SMOLVLM = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
FAST = "lerobot/fast-action-tokenizer"
# Only these are looked for in the cache: a checkpoint does not choose files of this machine.
_CACHED = (PALIGEMMA, SMOLVLM, FAST, "physical-intelligence/fast")
_USUAL = {"pi05": PALIGEMMA, "pi052": PALIGEMMA, "smolvla": SMOLVLM, "smolvla2": SMOLVLM}

# For transformers, which lerobot reads tokenizers with.
_SPECIAL_TOKENS = {
    PALIGEMMA: {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
    SMOLVLM: {
        "bos_token": "<|im_start|>",
        "eos_token": "<end_of_utterance>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    },
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """Attributes:
    files: For Policy.take_files().
    recipe: For PromptSettings: a shipped name, that of the file, or "".
    notes: What is missing, and what that means.
    """

    files: dict[str, bytes]
    recipe: str
    notes: tuple[str, ...]


def find(
    folder: Path,
    described: Described[Any],
    processing: Processing,
    *,
    tokenizer: Path | None,
    action_tokenizer: Path | None,
    recipe: Path | None,
) -> Found:
    """Given ones first, then those in the folder, then the cache's. NotFound or Corrupt for a given one that is none."""
    files: dict[str, bytes] = {}
    notes: list[str] = []
    name = processing.tokenizer_name or _USUAL[described.type_name]
    content = _tokenizer(folder, tokenizer, name)
    if content is None:
        notes.append(
            f"the tokenizer {name} is neither in the folder nor in the local cache: without it the policy acts on prepared "
            "inputs only; give its folder"
        )
    else:
        files[policy_files.TOKENIZER] = content
    fast_name = processing.action_tokenizer_name or described.action_tokenizer_name
    if fast_name is not None and getattr(described.config, "fast_weight", 0.0) > 0:
        fast = _action_tokenizer(folder, action_tokenizer, fast_name)
        if fast is None:
            notes.append(
                f"the FAST tokenizer {fast_name} is neither in the folder nor in the local cache: training needs it, acting "
                "does not; give its folder"
            )
        else:
            files[policy_files.ACTION_TOKENIZER], files[policy_files.ACTION_TOKENIZER_CONFIG] = fast.contents()
    return Found(files=files, recipe=_recipe(folder, described, recipe, files, notes), notes=tuple(notes))


def describe_tokenizer(folder: Path, name: str) -> None:
    """What transformers wants beside tokenizer.json, where the folder has that."""
    path = folder / policy_files.TOKENIZER
    if path.is_file():
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **_SPECIAL_TOKENS[name]}
        (path.parent / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _tokenizer(folder: Path, given: Path | None, name: str) -> bytes | None:
    if given is not None:
        path = given / TOKENIZER_FILE if given.is_dir() else given
        if not path.is_file():
            raise NotFound(f"{given} is no tokenizer; give a folder with {TOKENIZER_FILE}", field="tokenizer")
        return path.read_bytes()
    places = (folder / policy_files.TOKENIZER, folder / TOKENIZER_FILE, _cached(name, TOKENIZER_FILE))
    return next((place.read_bytes() for place in places if place is not None and place.is_file()), None)


def _action_tokenizer(folder: Path, given: Path | None, name: str) -> FastTokenizer | None:
    if given is not None:
        return FastTokenizer.load(given)
    own = (folder / policy_files.ACTION_TOKENIZER).parent
    cached = _cached(name, "processor_config.json")
    for place in (own, cached.parent if cached is not None else None):
        if place is not None and place.is_dir():
            return FastTokenizer.load(place)
    return None


def _cached(name: str, file_name: str) -> Path | None:
    """Of the Hugging Face cache on this machine; nothing is fetched."""
    if name not in _CACHED:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file_name)
    return Path(found) if isinstance(found, str) else None


def _recipe(folder: Path, described: Described[Any], given: Path | None, files: dict[str, bytes], notes: list[str]) -> str:
    """A name for PromptSettings; a recipe that is not shipped is put among files."""
    if given is None and described.recipe_path is None:
        return str(described.config.prompts.recipe)
    path = given or folder / Path(described.recipe_path or "").name
    if path.is_file():
        recipes.load(path)
        files[policy_files.RECIPE] = path.read_bytes()
        return policy_files.RECIPE
    if given is not None:
        raise NotFound(f"{given} is no recipe file", field="recipe")
    if path.stem in SHIPPED:
        notes.append(f"recipe_path is {described.recipe_path}; the shipped recipe {path.stem} is taken for it")
        return path.stem
    notes.append(f"the recipe {described.recipe_path} is not in the folder: training goes by the task alone; give the file")
    return ""
