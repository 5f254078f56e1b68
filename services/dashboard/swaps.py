"""Swapping a served model's weights from the page: it changes what robots do, so it is off unless asked for.

Who may is the inference service's to say: where people show tokens, the swap is asked for with the token of whoever clicked,
not with the dashboard's own identity.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from manyhands import channel
from manyhands.errors import Conflict, InvalidInput, NotFound
from manyhands.inference.v1 import inference_pb2, inference_pb2_grpc
from manyhands.roles import Identity

from . import shapes
from .feed import Json
from .upstream import Upstream

logger = logging.getLogger(__name__)

METHOD = "/manyhands.inference.v1.InferenceService/SwapWeights"
# Fetching and staging gigabytes takes a while.
SWAP_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class WantedSwap:
    """What the person saw and agreed to; to_number 0 is the newest version."""

    model: str
    from_number: int
    to_number: int


def wanted_swap(model: str, body: object, status: Json | None) -> WantedSwap:
    """The checked request: it names the model a second time, what serves now and what shall.

    Args:
        model: From the path.
        body: The request's JSON.
        status: Topic "inference", as the page shows it.

    Raises:
        InvalidInput: A field is missing or wrong.
        NotFound: The model is not served.
        Conflict: Another version serves than the person saw.
    """
    if not isinstance(body, dict) or body.get("confirm") != model:
        raise InvalidInput(f"must repeat the model's name, {model!r}", field="confirm")
    numbers = {}
    for field in ("from", "to"):
        number = body.get(field)
        if type(number) is not int or not 0 <= number < 2**63:
            raise InvalidInput(f"must be a version's number, not {str(number)[:40]!r}", field=field)
        numbers[field] = number
    served = {one["name"]: one["version"] for one in (status or {"models": []})["models"]}
    if model not in served:
        raise NotFound(f"{model[:80]!r} is not served; there are {', '.join(served) or 'none'}", field="model")
    number = served[model]["number"] if served[model] else 0
    if number != numbers["from"]:
        raise Conflict(f"{model} serves v{number} now, not v{numbers['from']}; look again", field="from")
    return WantedSwap(model=model, from_number=numbers["from"], to_number=numbers["to"])


class WeightSwapper:
    """Asks the inference service at address; one swap a model at a time."""

    def __init__(self, upstream: Upstream, address: str) -> None:
        self._upstream = upstream
        self._address = address
        self._running: set[str] = set()

    async def swap(self, wanted: WantedSwap, *, by: Identity, token: str | None) -> Json:
        """What served, what serves now, and the pause.

        Args:
            by: Who asks, for the log.
            token: That they showed; None on plain loopback.

        Raises:
            ManyhandsError: What the service answers; nothing was changed then.
        """
        if wanted.model in self._running:
            raise Conflict(f"a swap of {wanted.model} runs already; wait for its end", field="model")
        self._running.add(wanted.model)
        logger.info("%s asks for v%d of %s, v%d serves", by, wanted.to_number, wanted.model, wanted.from_number)
        try:
            answer = await self._ask(wanted, token)
        except Exception as error:
            logger.warning("v%d of %s, asked for by %s: %s", wanted.to_number, wanted.model, by, error)
            raise
        finally:
            self._running.discard(wanted.model)
        logger.info("%s: v%d serves, asked for by %s", wanted.model, answer.current.number, by)
        return {
            "previous": shapes.version(answer.previous),
            "current": shapes.version(answer.current),
            "pause_ms": shapes.milliseconds(answer.pause),
        }

    async def _ask(self, wanted: WantedSwap, token: str | None) -> inference_pb2.SwapWeightsResponse:
        # A token travels over TLS only, and alone: the dashboard's own would come first.
        as_person = token is not None and self._upstream.has_tls
        connection = self._upstream.channel(self._address, without_token=as_person)
        stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(connection)
        request = inference_pb2.SwapWeightsRequest(model=wanted.model, number=wanted.to_number)
        metadata = (("authorization", f"Bearer {token}"),) if as_person else None
        with channel.translated_errors():
            return await stub.SwapWeights(request, timeout=SWAP_TIMEOUT_S, metadata=metadata)
