"""The page over HTTP: static files, one live WebSocket a tab, pictures, episodes, the two ways to stop a robot, swaps."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import WSCloseCode, WSMsgType, web
from aiohttp.typedefs import Handler

from manyhands import errors, roles

from .access import LOGIN_PATH, Access, add_headers
from .feed import Feed
from .robots import Fleet, RobotWatch
from .sources import DatasetReader
from .swaps import METHOD, WeightSwapper, wanted_swap

STATIC = Path(__file__).parent / "static"
LIVE_INTERVAL_S = 0.1
MAX_PAGE_SIZE = 100
# Of the errors that a service answers, what a browser should see.
_HTTP_STATUS: dict[type[errors.ManyhandsError], int] = {
    errors.InvalidInput: 400,
    errors.NotFound: 404,
    errors.NotAllowed: 403,
    errors.Unauthenticated: 403,
    errors.Refused: 409,
    errors.Conflict: 409,
    errors.Unreachable: 503,
    errors.TooLate: 504,
}
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class Pages:
    """Args:
    access: Who asks.
    datasets: None when no store was named.
    swapper: None where this page may not swap weights.
    """

    def __init__(
        self, feed: Feed, access: Access, fleet: Fleet, datasets: DatasetReader | None, swapper: WeightSwapper | None
    ) -> None:
        self._feed = feed
        self._access = access
        self._swapper = swapper
        self._fleet = fleet
        self._datasets = datasets
        self._live: set[web.WebSocketResponse] = set()

    def application(self) -> web.Application:
        access = self._access
        application = web.Application(middlewares=[access.middleware, _answer_errors], client_max_size=64 * 1024)
        application.on_response_prepare.append(add_headers)
        application.on_shutdown.append(self._end_live)
        application.add_routes(
            [
                web.get("/", self.index),
                web.get(LOGIN_PATH, access.show_login),
                web.post(LOGIN_PATH, access.log_in),
                web.get("/api/live", self.live),
                web.get("/api/robots/{robot}/cameras/{camera}", self.picture),
                web.post("/api/robots/{robot}/hold", self.hold),
                web.post("/api/robots/{robot}/emergency-stop", self.emergency_stop),
                web.get("/api/rights", self.rights),
                web.post("/api/models/{model}/swap", self.swap),
                web.get("/api/datasets/{dataset}/episodes", self.episodes),
                web.get("/api/datasets/{dataset}/files/{path:.+}", self.file),
                web.static("/static", STATIC),
            ]
        )
        return application

    async def index(self, request: web.Request) -> web.FileResponse:
        return web.FileResponse(STATIC / "index.html")

    async def live(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(heartbeat=10.0)
        await socket.prepare(request)
        self._live.add(socket)
        with self._feed.viewing():
            sending = asyncio.create_task(self._send(socket))
            try:
                async for message in socket:  # Tabs only listen; reading notices when they go.
                    if message.type in (WSMsgType.ERROR, WSMsgType.CLOSE):
                        break
            finally:
                self._live.discard(socket)
                sending.cancel()
                with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                    await sending
        return socket

    async def picture(self, request: web.Request) -> web.Response:
        picture = self._robot(request).pictures.get(request.match_info["camera"])
        if picture is None:
            raise web.HTTPNotFound(text="no picture of this camera has come yet")
        return web.Response(body=picture.jpeg, content_type="image/jpeg", headers={"X-Picture-Number": str(picture.number)})

    async def hold(self, request: web.Request) -> web.Response:
        robot = await self._confirmed_robot(request)
        return web.json_response(await robot.hold("hold asked for on the dashboard"))

    async def emergency_stop(self, request: web.Request) -> web.Response:
        robot = await self._confirmed_robot(request)
        return web.json_response(await robot.emergency_stop("emergency stop asked for on the dashboard"))

    async def rights(self, request: web.Request) -> web.Response:
        """What whoever looks may do beyond looking and stopping."""
        why = ""
        if self._swapper is None:
            why = "off: start the dashboard with --allow-swaps and --inference HOST:PORT"
        else:
            try:
                roles.check_allowed(self._identity(request), METHOD)
            except errors.NotAllowed:
                why = "it needs an operator's token"
        return web.json_response({"swap": not why, "why_not": why})

    async def swap(self, request: web.Request) -> web.Response:
        """Swaps a model to another version. Refused unless switched on, by an operator, from this page, twice named."""
        if self._swapper is None:
            raise errors.NotAllowed("this dashboard swaps nothing; start it with --allow-swaps and --inference HOST:PORT")
        self._access.check_own_page(request)
        identity = self._identity(request)
        roles.check_allowed(identity, METHOD)
        model = request.match_info["model"]
        wanted = wanted_swap(model, await _json(request), self._feed.latest("inference"))
        return web.json_response(await self._swapper.swap(wanted, by=identity, token=self._access.token(request)))

    async def episodes(self, request: web.Request) -> web.Response:
        from_index = _whole_number(request, "from", default=0)
        page_size = min(_whole_number(request, "limit", default=MAX_PAGE_SIZE), MAX_PAGE_SIZE)
        dataset = request.match_info["dataset"]
        return web.json_response(await self._store().episodes(dataset, from_index=from_index, page_size=page_size))

    async def file(self, request: web.Request) -> web.StreamResponse:
        """A video of a dataset, any range of it, so that a browser can seek."""
        dataset, path = request.match_info["dataset"], request.match_info["path"]
        if not path.endswith(".mp4"):
            raise web.HTTPNotFound(text="only videos (.mp4) are shown here")
        store = self._store()
        size = await store.size_bytes(dataset, path)
        span = byte_range(request.headers.get("Range", ""), size)
        if span is None:
            raise web.HTTPRequestRangeNotSatisfiable(headers={"Content-Range": f"bytes */{size}"})
        begin, end = span
        headers = {"Accept-Ranges": "bytes", "Content-Type": "video/mp4", "Content-Length": str(end - begin)}
        # Published files never change: a browser may keep what it has seen.
        headers["Cache-Control"] = "private, max-age=3600"
        is_part = "Range" in request.headers
        if is_part:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        answer = web.StreamResponse(status=206 if is_part else 200, headers=headers)
        await answer.prepare(request)
        if request.method != "HEAD" and end > begin:
            async with contextlib.aclosing(store.read(dataset, path, offset=begin, length=end - begin)) as pieces:
                await _copy(pieces, answer)
        await answer.write_eof()
        return answer

    async def _send(self, socket: web.WebSocketResponse) -> None:
        async for message in self._feed.follow(interval_s=LIVE_INTERVAL_S):
            await socket.send_str(json.dumps(message, separators=(",", ":"), allow_nan=False))

    async def _end_live(self, application: web.Application) -> None:
        for socket in list(self._live):
            await socket.close(code=WSCloseCode.GOING_AWAY, message=b"the dashboard ends")

    def _robot(self, request: web.Request) -> RobotWatch:
        name = request.match_info["robot"]
        robot = self._fleet.robots.get(name)
        if robot is None:
            raise errors.NotFound(f"no robot {name!r}; there are {', '.join(self._fleet.robots) or 'none'}", field="robot")
        return robot

    async def _confirmed_robot(self, request: web.Request) -> RobotWatch:
        """The robot, when the request names it a second time: no link, form or mistyped command stops one by accident."""
        robot = self._robot(request)
        body = await _json(request)
        if not isinstance(body, dict) or body.get("confirm") != robot.name:
            raise errors.InvalidInput(f"must repeat the robot's name, {robot.name!r}", field="confirm")
        return robot

    def _identity(self, request: web.Request) -> roles.Identity:
        identity = self._access.identity(request)
        assert identity is not None, "strangers are turned away before"
        return identity

    def _store(self) -> DatasetReader:
        if self._datasets is None:
            raise errors.NotFound("no store was named; start the dashboard with --store HOST:PORT", field="store")
        return self._datasets


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """[begin, end) that a Range header asks of size bytes; everything without one, None when it cannot be satisfied.

    One range, as browsers ask for: "bytes=5-", "bytes=5-9", "bytes=-5" (the last five).
    """
    if not header:
        return 0, size
    match = _RANGE.fullmatch(header.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return (max(0, size - int(last)), size) if int(last) and size else None
    begin = int(first)
    end = min(int(last) + 1, size) if last else size
    return (begin, end) if begin < end else None


async def _json(request: web.Request) -> object:
    """The body, which no form of another site can send."""
    if request.content_type != "application/json":
        raise errors.InvalidInput("must be application/json", field="content-type")
    try:
        return await request.json()
    except ValueError:
        raise errors.InvalidInput("is not JSON", field="body") from None


def _whole_number(request: web.Request, name: str, *, default: int) -> int:
    text = request.query.get(name, str(default))
    if not text.isdecimal() or len(text) > 12:
        raise errors.InvalidInput(f"{text[:20]!r} must be a whole number", field=name)
    return int(text)


async def _copy(pieces: AsyncIterator[bytes], answer: web.StreamResponse) -> None:
    async for piece in pieces:
        await answer.write(piece)


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except errors.ManyhandsError as error:
        status = next((code for kind, code in _HTTP_STATUS.items() if isinstance(error, kind)), 502)
        return web.json_response({"error": str(error)}, status=status)
