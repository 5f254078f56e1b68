"""The dashboard as its peers and other programs meet it: fan-out, ranges, refusals, TLS. Its page: tests/browser."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from deploy.local import Topology
from manyhands import codec, errors
from manyhands.dataset.v1 import dataset_pb2, dataset_pb2_grpc
from manyhands.robot.v1 import robot_pb2, robot_pb2_grpc
from manyhands.server import GrpcServer
from manyhands.spec import Feature, FeatureKind, Spec

CAMERA = "observation.images.front"
SPEC = Spec(
    observation=(
        Feature(
            name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(2,),
            element_names=("a.pos", "b.pos"), element_units=("rad", "rad"),
        ),
        Feature(name=CAMERA, kind=FeatureKind.IMAGE, dtype="uint8", shape=(8, 8, 3)),
    ),
    action=(Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(2,)),),
    control_rate_hz=30.0,
)  # fmt: skip
PICTURE = np.full((8, 8, 3), (10, 200, 30), np.uint8)


class CountingRobot(robot_pb2_grpc.RobotServiceServicer):
    """Counts who looks, and whether they want pictures."""

    def __init__(self) -> None:
        self.observers: list[bool] = []
        self.most_observers = 0
        self.stops: list[str] = []

    async def Describe(self, request: robot_pb2.DescribeRequest, context: Any) -> robot_pb2.DescribeResponse:  # noqa: N802
        return robot_pb2.DescribeResponse(robot_id="counting", spec=SPEC.to_proto())

    async def Observe(  # noqa: N802
        self, request: robot_pb2.ObserveRequest, context: Any
    ) -> AsyncIterator[robot_pb2.ObserveResponse]:
        self.observers.append(request.include_images)
        self.most_observers = max(self.most_observers, len(self.observers))
        try:
            while True:
                values = {"observation.state": np.array([1.5, -0.25], np.float32)}
                if request.include_images:
                    values[CAMERA] = PICTURE  # type: ignore[assignment]
                response = robot_pb2.ObserveResponse(task="count")
                response.observation.values.extend(codec.encode_values(values))
                yield response
                await asyncio.sleep(1 / request.max_rate_hz)
        finally:
            self.observers.remove(request.include_images)

    async def Hold(self, request: robot_pb2.HoldRequest, context: Any) -> robot_pb2.HoldResponse:  # noqa: N802
        self.stops.append("hold")
        return robot_pb2.HoldResponse(status=robot_pb2.RobotStatus(mode=robot_pb2.ROBOT_MODE_HOLDING))

    async def EmergencyStop(  # noqa: N802
        self, request: robot_pb2.EmergencyStopRequest, context: Any
    ) -> robot_pb2.EmergencyStopResponse:
        self.stops.append("emergency stop")
        return robot_pb2.EmergencyStopResponse(status=robot_pb2.RobotStatus(mode=robot_pb2.ROBOT_MODE_EMERGENCY_STOP))


class OneFileStore(dataset_pb2_grpc.DatasetServiceServicer):
    """A published video of known bytes."""

    content = bytes(range(256)) * 4096
    path = "videos/front/chunk-000/file-000.mp4"

    async def ListDatasets(self, request: Any, context: Any) -> dataset_pb2.ListDatasetsResponse:  # noqa: N802
        info = dataset_pb2.DatasetInfo(definition=dataset_pb2.DatasetDefinition(name="d", spec=SPEC.to_proto()))
        return dataset_pb2.ListDatasetsResponse(datasets=[info])

    async def GetSnapshot(self, request: Any, context: Any) -> dataset_pb2.GetSnapshotResponse:  # noqa: N802
        if request.dataset != "d":
            raise errors.NotFound("no such dataset", field="dataset")
        files = [dataset_pb2.ShardFile(path=name, size_bytes=len(self.content)) for name in (self.path, "meta/info.json")]
        return dataset_pb2.GetSnapshotResponse(dataset="d", files=files)

    async def ReadShard(  # noqa: N802
        self, request: dataset_pb2.ReadShardRequest, context: Any
    ) -> AsyncIterator[dataset_pb2.ReadShardResponse]:
        end = request.offset + request.length if request.length else len(self.content)
        for offset in range(request.offset, end, 100_000):
            yield dataset_pb2.ReadShardResponse(offset=offset, data=self.content[offset : min(offset + 100_000, end)])


@contextlib.asynccontextmanager
async def serving(register: Any, servicer: Any, name: str) -> AsyncIterator[str]:
    server = GrpcServer("127.0.0.1:0")
    server.add(register, servicer, name)
    await server.start()
    try:
        yield server.address
    finally:
        await server.stop(0.0)


@pytest.fixture
async def robot() -> AsyncIterator[tuple[CountingRobot, str]]:
    servicer = CountingRobot()
    register = robot_pb2_grpc.add_RobotServiceServicer_to_server
    async with serving(register, servicer, "manyhands.robot.v1.RobotService") as address:
        yield servicer, address


@pytest.fixture
def topology(tmp_path: Path) -> Iterator[Topology]:
    with Topology(tmp_path / "logs") as topology:
        yield topology


async def start(topology: Topology, *flags: str) -> str:
    command = ["dashboard", "--address", "127.0.0.1:0", *flags]
    service = await asyncio.to_thread(topology.start, "dashboard", command)
    return f"http://{service.address}"


async def until(condition: Callable[[], Any], what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


class Tab:
    """One open page: the topics as its script would hold them."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.topics: dict[str, list[Any]] = {}
        self._reading = asyncio.create_task(self._read(socket))

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for message in socket:
            for topic, change in json.loads(message.data)["topics"].items():
                before = [] if change["reset"] else self.topics.get(topic, [])
                self.topics[topic] = (before + change["values"])[-change["keep"] :]

    def latest(self, topic: str) -> Any:
        return (self.topics.get(topic) or [None])[-1]


async def test_ten_tabs_cost_a_robot_one_stream_and_pictures_only_while_somebody_looks(
    topology: Topology, robot: tuple[CountingRobot, str]
) -> None:
    servicer, address = robot
    url = await start(topology, "--robot", f"one={address}")
    await until(lambda: servicer.observers == [False], "nobody looks: no pictures")
    async with aiohttp.ClientSession() as session:
        sockets = [await session.ws_connect(f"{url}/api/live") for _ in range(10)]
        tabs = [Tab(socket) for socket in sockets]
        await until(lambda: all(tab.topics.get("robot:one:samples") for tab in tabs), "every tab sees samples")
        await until(lambda: servicer.observers == [True], "somebody looks: pictures")
        await until(lambda: all(tab.latest("robot:one:samples")["pictures"] for tab in tabs), "and hears of pictures")
        sample = tabs[0].latest("robot:one:samples")
        assert sample["values"]["observation.state"] == [1.5, -0.25]
        async with session.get(f"{url}/api/robots/one/cameras/{CAMERA}") as response:
            assert response.content_type == "image/jpeg"
            jpeg = await response.read()
        image = codec.encode_image(PICTURE)
        assert jpeg == image.data
        for socket in sockets:
            await socket.close()
    await until(lambda: servicer.observers == [False], "everybody left: no pictures")
    assert servicer.most_observers <= 2, "the old stream may end a moment after the new one began"


async def test_stopping_needs_the_name_repeated_and_this_page(topology: Topology, robot: tuple[CountingRobot, str]) -> None:
    servicer, address = robot
    url = await start(topology, "--robot", f"one={address}")
    async with aiohttp.ClientSession() as session:

        async def post(action: str, **options: Any) -> tuple[int, str]:
            async with session.post(f"{url}/api/robots/one/{action}", **options) as response:
                return response.status, await response.text()

        assert (await post("hold"))[0] == 400
        assert (await post("hold", data={"confirm": "one"}))[0] == 400
        status, text = await post("hold", json={"confirm": "two"})
        assert (status, "must repeat the robot's name, 'one'" in text) == (400, True)
        status, text = await post("emergency-stop", json={"confirm": "one"}, headers={"Origin": "http://evil.example"})
        assert (status, servicer.stops) == (403, [])
        async with session.post(f"{url}/api/robots/nine/hold", json={"confirm": "nine"}) as response:
            assert response.status == 404
            assert "there are one" in await response.text()
        status, text = await post("hold", json={"confirm": "one"})
        assert (status, json.loads(text)["mode"]) == (200, "holding")
        status, text = await post("emergency-stop", json={"confirm": "one"})
        assert (status, json.loads(text)["mode"]) == (200, "emergency stop")
        assert servicer.stops == ["hold", "emergency stop"]
        # A foreign site whose name points here (DNS rebinding) sees nothing, and its scripts cannot listen.
        async with session.get(f"{url}/", headers={"Host": "evil.example:8080"}) as response:
            assert response.status == 403
        with pytest.raises(aiohttp.WSServerHandshakeError):
            await session.ws_connect(f"{url}/api/live", headers={"Origin": "http://evil.example"})


async def test_stopping_a_robot_that_is_away_says_so(topology: Topology) -> None:
    url = await start(topology, "--robot", "one=127.0.0.1:1")
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{url}/api/robots/one/hold", json={"confirm": "one"}) as response:
            assert response.status == 503
        socket = await session.ws_connect(f"{url}/api/live")
        tab = Tab(socket)
        await until(lambda: (tab.latest("services") or [{}])[0].get("state") == "down", "it is shown as down")
        assert tab.latest("robot:one")["connected"] is False
        await socket.close()


async def test_videos_come_in_ranges_and_nothing_else_comes(topology: Topology) -> None:
    register = dataset_pb2_grpc.add_DatasetServiceServicer_to_server
    async with serving(register, OneFileStore(), "manyhands.dataset.v1.DatasetService") as address:
        url = await start(topology, "--store", address)
        async with aiohttp.ClientSession() as session:
            video = f"{url}/api/datasets/d/files/{OneFileStore.path}"
            for header, begin, end in (
                ("bytes=0-", 0, 1 << 20),
                ("bytes=5000-300000", 5000, 300001),
                ("bytes=-7", -7, 1 << 20),
            ):
                async with session.get(video, headers={"Range": header}) as response:
                    assert response.status == 206
                    assert await response.read() == OneFileStore.content[begin:end]
                    first = begin % (1 << 20)
                    assert response.headers["Content-Range"] == f"bytes {first}-{end - 1}/{1 << 20}"
            async with session.get(video) as response:
                assert (response.status, response.headers["Accept-Ranges"]) == (200, "bytes")
                assert await response.read() == OneFileStore.content
            async with session.get(video, headers={"Range": "bytes=9999999-"}) as response:
                assert (response.status, response.headers["Content-Range"]) == (416, f"bytes */{1 << 20}")
            for path in ("meta/info.json", "videos/other.mp4", "..%2f..%2fetc%2fpasswd.mp4", "%2fetc%2fpasswd"):
                async with session.get(f"{url}/api/datasets/d/files/{path}") as response:
                    assert response.status == 404, path
            async with session.get(f"{url}/api/datasets/other/files/{OneFileStore.path}") as response:
                assert response.status == 404


async def test_it_ends_at_once_on_sigterm_although_tabs_are_open(
    topology: Topology, robot: tuple[CountingRobot, str]
) -> None:
    url = await start(topology, "--robot", f"one={robot[1]}")
    async with aiohttp.ClientSession() as session:
        socket = await session.ws_connect(f"{url}/api/live")
        await socket.receive()
        heard = asyncio.create_task(drained(socket))
        started = time.monotonic()
        await asyncio.to_thread(topology.stop, "dashboard")
        assert time.monotonic() - started < 5
        assert topology.services["dashboard"].process.returncode == 0
        await asyncio.wait_for(heard, 5)
        assert socket.close_code == aiohttp.WSCloseCode.GOING_AWAY, "tabs are told"


async def drained(socket: aiohttp.ClientWebSocketResponse) -> None:
    async for _ in socket:
        pass


async def test_elsewhere_than_loopback_it_needs_tls_and_shows_itself_to_tokens_only(
    topology: Topology, tmp_path: Path
) -> None:
    def refused(*flags: str) -> str:
        command = [sys.executable, "-m", "manyhands", "dashboard", "--address", "0.0.0.0:0", *flags]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert ended.returncode != 0
        return ended.stderr

    assert "needs TLS" in await asyncio.to_thread(refused)
    lab = tmp_path / "lab"
    make = [sys.executable, "-m", "manyhands", "lab-certificates", "--output", str(lab), "--host", "127.0.0.1"]
    await asyncio.to_thread(subprocess.run, make, check=True, capture_output=True, timeout=30)
    files = [f"--security.{name}={lab}/server/{file}" for name, file in
             (("certificate", "certificate.pem"), ("key", "key.pem"), ("authority", "authority.pem"))]  # fmt: skip
    assert "viewers need tokens" in await asyncio.to_thread(refused, *files)
    command = ["dashboard", "--address", "0.0.0.0:0", *files, f"--security.tokens={lab}/server/tokens.toml"]
    service = await asyncio.to_thread(topology.start, "dashboard", command)
    url = f"https://127.0.0.1:{service.address.rpartition(':')[2]}"
    token = (lab / "viewer-main/token").read_text().strip()
    trust = ssl.create_default_context(cafile=str(lab / "authority.pem"))
    connector = aiohttp.TCPConnector(ssl=trust)
    jar = aiohttp.CookieJar(unsafe=True)  # Cookies of an IP address.
    async with aiohttp.ClientSession(connector=connector, cookie_jar=jar) as session:

        async def status(path: str, **options: Any) -> int:
            async with session.get(url + path, allow_redirects=False, **options) as response:
                return response.status

        assert await status("/api/robots/x/cameras/y") == 401
        assert await status("/api/live", headers={"Authorization": "Bearer wrong-token-wrong-token"}) == 401
        assert await status("/") == 303
        assert await status("/login") == 200
        assert await status("/api/robots/x/cameras/y", headers={"Authorization": f"Bearer {token}"}) == 404
        async with session.post(f"{url}/login", data={"token": "not-the-token-at-all"}) as response:
            assert "not one this dashboard knows" in await response.text()
        assert await status("/") == 303
        async with session.post(f"{url}/login", data={"token": token}, allow_redirects=False) as response:
            assert response.status == 303
            cookie = response.headers["Set-Cookie"]
            assert "HttpOnly" in cookie
            assert "Secure" in cookie
            assert "SameSite=Strict" in cookie
        assert await status("/") == 200
        socket = await session.ws_connect(f"{url}/api/live")
        assert "configured" in json.loads((await socket.receive()).data)["topics"]
        await socket.close()
