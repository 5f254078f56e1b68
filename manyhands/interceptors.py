"""One way to put something around every call of a grpc.aio server, whatever its shape."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

# Entered before a call's servicer method runs, left when the call is over or has raised.
Guard = Callable[[Any], contextlib.AbstractAsyncContextManager[None]]


class GuardInterceptor(grpc.aio.ServerInterceptor):
    """Runs every call inside make_guard(method)(context); the guard may raise before, and see what the call raises."""

    def __init__(self, make_guard: Callable[[str], Guard]) -> None:
        self._make_guard = make_guard

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        guard = self._make_guard(handler_call_details.method)
        if handler.response_streaming:
            wrapped: Any = _guard_streaming(handler.unary_stream or handler.stream_stream, guard)
            make = grpc.unary_stream_rpc_method_handler if handler.unary_stream else grpc.stream_stream_rpc_method_handler
        else:
            wrapped = _guard_unary(handler.unary_unary or handler.stream_unary, guard)
            make = grpc.unary_unary_rpc_method_handler if handler.unary_unary else grpc.stream_unary_rpc_method_handler
        return make(wrapped, handler.request_deserializer, handler.response_serializer)


def _guard_unary(behaviour: Any, guard: Guard) -> Any:
    async def call(request: Any, context: Any) -> Any:
        async with guard(context):
            return await behaviour(request, context)

    return call


def _guard_streaming(behaviour: Any, guard: Guard) -> Any:
    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        async with guard(context):
            responses = behaviour(request, context)
            if inspect.isawaitable(responses):
                await responses  # Writes through the context itself, as the standard health service does.
                return
            async with contextlib.aclosing(responses):
                async for response in responses:
                    yield response

    return call
