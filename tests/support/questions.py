"""A question to a text head, as the front end hands it to an engine."""

from __future__ import annotations

import time
from typing import Any

from manyhands.inference.v1 import inference_pb2
from services.inference.engine_port import Observed, Question


def question_about(sample: Observed, *, model: str = "tiny", deadline_s: float = 30.0, **asked: Any) -> Question:
    """The likeliest answer to what the next subtask is, unless asked says otherwise; fields as Question has them."""
    values: dict[str, Any] = {
        "owner": "",
        "kind": inference_pb2.TEXT_KIND_SUBTASK,
        "user_text": "",
        "previous_text": "",
        "max_new_tokens": 0,
        "temperature": 0.0,
        "top_p": 1.0,
    }
    until_s = time.monotonic() + deadline_s
    return Question(model=model, sample=sample, until_s=until_s, allowed_s=deadline_s, **(values | asked))
