"""How a policy's configuration and a checkpoint's files become its prompter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from manyhands.errors import InvalidInput, NotFound

from .. import files as policy_files
from ..configuration import STRICT, PositiveInt
from ..fast import FastTokenizer
from ..files import Files
from ..recipes import recipe as recipes
from ..recipes.recipe import SHIPPED, Recipe
from ..recipes.render import PromptDropout
from .locations import LOCATION_TOKENS
from .pi052 import Pi05Prompter, Pi052Prompter, Pi052PromptOptions
from .smolvla import SmolVLA2Prompter, SmolVLA2PromptOptions, SmolVLAPrompter
from .tokenizer import Tokenizer

Share = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Attributes:
    recipe: What annotations become in training: the name of a shipped recipe, "recipe.yaml" for the one among the
        checkpoint's files, "" for none: every sample acts on its task.
    plan_dropout, memory_dropout, subtask_dropout: In training, the share of prompts that lose such a message.
    vary_task: In training: other wordings of the task, where an episode has some, take its place.
    """

    __pydantic_config__ = STRICT

    recipe: str = ""
    plan_dropout: Share = 0.0
    memory_dropout: Share = 0.0
    subtask_dropout: Share = 0.0
    vary_task: bool = False

    def __post_init__(self) -> None:
        if self.recipe not in ("", policy_files.RECIPE, *SHIPPED):
            raise InvalidInput(
                f"is {self.recipe!r}, must be empty, {policy_files.RECIPE!r} for the checkpoint's own, or one of "
                f"{', '.join(SHIPPED)}",
                field="prompts.recipe",
            )

    def dropout(self, *, as_smolvla2: bool) -> PromptDropout:
        return PromptDropout(
            plan=self.plan_dropout, memory=self.memory_dropout, subtask=self.subtask_dropout, as_smolvla2=as_smolvla2
        )


@dataclass(frozen=True, kw_only=True)
class Pi052PromptSettings(PromptSettings):
    """Attributes:
    joint: Acting prompts hold task and subtask, and subtasks are asked for with the state in sight.
    max_action_tokens: Of the wrapped FAST sequence; a chunk that takes more is an error.
    """

    joint: bool = False
    max_action_tokens: PositiveInt = 256


def pi052_prompter(
    files: Files,
    settings: Pi052PromptSettings,
    *,
    prompt_length: int,
    fast_skip_tokens: int,
    with_text: bool,
    with_fast: bool,
) -> Pi052Prompter | None:
    """None where files hold no tokenizer: such a policy takes prepared inputs only.

    Args:
        with_text: pi052's prompts; else pi05's.
        with_fast: Training learns FAST tokens.

    Raises:
        NotFound: A file that the settings need is not there.
        Corrupt, InvalidInput: A file is not what its name says; names it.
    """
    if policy_files.TOKENIZER not in files:
        return None
    tokenizer = Tokenizer.parse(files[policy_files.TOKENIZER], LOCATION_TOKENS, source=policy_files.TOKENIZER)
    options = Pi052PromptOptions(
        recipe=recipe_of(files, settings.recipe),
        prompt_length=prompt_length,
        max_action_tokens=settings.max_action_tokens,
        fast_skip_tokens=fast_skip_tokens,
        dropout=settings.dropout(as_smolvla2=False),
        vary_task=settings.vary_task,
        joint=settings.joint,
        learns_fast=with_fast,
    )
    return Pi052Prompter(tokenizer, options, _fast(files)) if with_text else Pi05Prompter(tokenizer, options)


def smolvla_prompter(
    files: Files, settings: PromptSettings, *, prompt_length: int, with_text: bool
) -> SmolVLA2Prompter | None:
    """As pi052_prompter(). with_text: SmolVLA2's prompts; else SmolVLA's."""
    if policy_files.TOKENIZER not in files:
        return None
    tokenizer = Tokenizer.parse(files[policy_files.TOKENIZER], source=policy_files.TOKENIZER)
    options = SmolVLA2PromptOptions(
        recipe=recipe_of(files, settings.recipe),
        prompt_length=prompt_length,
        dropout=settings.dropout(as_smolvla2=True),
        vary_task=settings.vary_task,
    )
    return (SmolVLA2Prompter if with_text else SmolVLAPrompter)(tokenizer, options)


def recipe_of(files: Files, name: str) -> Recipe | None:
    """What PromptSettings.recipe names; None where it is empty. NotFound, or InvalidInput for a file that is no recipe."""
    if name == policy_files.RECIPE:
        if name not in files:
            raise NotFound(f"prompts.recipe says {name!r}, but the checkpoint has no such file", field="prompts.recipe")
        return recipes.parse_yaml(files[name], name=name, source=name)
    return recipes.load(name) if name else None


def _fast(files: Files) -> FastTokenizer | None:
    """None where there is none: acting needs none, and a prompter that makes FAST tokens says that it misses it."""
    names = (policy_files.ACTION_TOKENIZER, policy_files.ACTION_TOKENIZER_CONFIG)
    if not any(name in files for name in names):
        return None
    for name in names:
        if name not in files:
            raise NotFound("is missing; a FAST tokenizer has two files", field=name)
    return FastTokenizer.parse(*(files[name] for name in names), source="action_tokenizer")
