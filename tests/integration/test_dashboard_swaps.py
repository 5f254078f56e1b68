"""Swapping weights through the dashboard's HTTP: off by default, operators only, from its own page only, twice named."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from deploy.local import Topology
from manyhands import roles
from manyhands.common.v1 import common_pb2
from manyhands.errors import Refused
from manyhands.inference.v1 import inference_pb2, inference_pb2_grpc
from manyhands.security import SecuritySettings
from manyhands.server import GrpcServer


class SwappingService(inference_pb2_grpc.InferenceServiceServicer):
    """Serves "arm" at version 3; refuses version 9; takes as long as a test wants."""

    def __init__(self) -> None:
        self.number = 3
        self.asked: list[tuple[str, int, str]] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.was_asked = asyncio.Event()
        self.tokens_shown: list[int] = []

    async def GetStatus(self, request: Any, context: Any) -> inference_pb2.GetStatusResponse:  # noqa: N802
        version = common_pb2.PolicyVersion(model="arm", number=self.number, digest=bytes(32))
        return inference_pb2.GetStatusResponse(models=[inference_pb2.Model(name="arm", version=version)])

    async def SwapWeights(self, request: Any, context: Any) -> inference_pb2.SwapWeightsResponse:  # noqa: N802
        self.asked.append((request.model, request.number, str(roles.caller())))
        self.tokens_shown.append(sum(key == "authorization" for key, _ in context.invocation_metadata()))
        self.was_asked.set()
        await self.may_answer.wait()
        if request.number == 9:
            raise Refused("has (data type, shape) other than the served policy's", field="blocks.0.weight")
        previous, self.number = self.number, request.number or 99
        return inference_pb2.SwapWeightsResponse(
            previous=common_pb2.PolicyVersion(model="arm", number=previous),
            current=common_pb2.PolicyVersion(model="arm", number=self.number),
        )


@contextlib.asynccontextmanager
async def serving(servicer: SwappingService, security: SecuritySettings | None = None) -> AsyncIterator[str]:
    server = GrpcServer("127.0.0.1:0", security_settings=security or SecuritySettings())
    register = inference_pb2_grpc.add_InferenceServiceServicer_to_server
    server.add(register, servicer, "manyhands.inference.v1.InferenceService")
    await server.start()
    try:
        yield server.address
    finally:
        await server.stop(0.0)


@pytest.fixture
def topology(tmp_path: Path) -> Iterator[Topology]:
    with Topology(tmp_path / "logs") as topology:
        yield topology


class Page:
    """The dashboard as its own page's script meets it."""

    def __init__(self, session: aiohttp.ClientSession, url: str, token: str = "") -> None:
        self._session, self._url = session, url
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    async def rights(self) -> Any:
        async with self._session.get(f"{self._url}/api/rights", headers=self._headers) as response:
            assert response.status == 200
            return await response.json()

    async def swap(self, body: object, *, model: str = "arm", origin: str | None = "own", **options: Any) -> tuple[int, str]:
        headers = dict(self._headers)
        if origin is not None:
            headers["Origin"] = self._url if origin == "own" else origin
        if "data" not in options:
            options["json"] = body
        async with self._session.post(f"{self._url}/api/models/{model}/swap", headers=headers, **options) as response:
            return response.status, await response.text()

    async def wait_until_known(self) -> None:
        """Until the dashboard has heard what is served."""
        await self.swap_until({"confirm": "arm", "from": 12345, "to": 0}, "not v12345")

    async def swap_until(self, body: object, answer: str) -> None:
        deadline = time.monotonic() + 20
        while answer not in (text := (await self.swap(body))[1]):
            assert time.monotonic() < deadline, text
            await asyncio.sleep(0.05)


async def start(topology: Topology, *flags: str) -> str:
    command = ["dashboard", "--address", "127.0.0.1:0", *flags]
    return (await asyncio.to_thread(topology.start, "dashboard", command)).address


GOOD = {"confirm": "arm", "from": 3, "to": 5}


async def test_it_is_off_unless_switched_on(topology: Topology) -> None:
    servicer = SwappingService()
    async with serving(servicer) as address, aiohttp.ClientSession() as session:
        page = Page(session, f"http://{await start(topology, '--inference', address)}")
        rights = await page.rights()
        assert (rights["swap"], "--allow-swaps" in rights["why_not"]) == (False, True)
        status, text = await page.swap(GOOD)
        assert (status, "--allow-swaps" in text) == (403, True)
        assert servicer.asked == []


async def test_only_its_own_page_swaps_and_only_what_was_agreed_to(topology: Topology) -> None:
    servicer = SwappingService()
    async with serving(servicer) as address, aiohttp.ClientSession() as session:
        page = Page(session, f"http://{await start(topology, '--inference', address, '--allow-swaps')}")
        assert await page.rights() == {"swap": True, "why_not": ""}
        await page.wait_until_known()
        # Another site's script, form or frame; a name that was made to point here; a program without a page.
        for origin in ("http://evil.example", "null", None):
            assert (await page.swap(GOOD, origin=origin))[0] == 403, origin
        assert (await page.swap(None, data="confirm=arm&from=3&to=5"))[0] == 400
        for body in (
            {"from": 3, "to": 5},
            {"confirm": "leg", "from": 3, "to": 5},
            {"confirm": "arm", "to": 5},
            {"confirm": "arm", "from": 3},
            {"confirm": "arm", "from": 3, "to": -1},
            {"confirm": "arm", "from": 3, "to": "5"},
            {"confirm": "arm", "from": True, "to": 5},
            {"confirm": "arm", "from": 3, "to": 2**63},
            {"confirm": "arm", "from": 3, "to": 5.5},
            [],
            "arm",
        ):
            assert (await page.swap(body))[0] == 400, body
        assert (await page.swap({"confirm": "leg", "from": 3, "to": 5}, model="leg"))[0] == 404
        status, text = await page.swap({"confirm": "arm", "from": 2, "to": 5})
        assert (status, "serves v3 now, not v2" in text) == (409, True)
        assert servicer.asked == [], "nothing of that reached the service"
        status, text = await page.swap(GOOD)
        assert (status, servicer.number) == (200, 5)
        assert servicer.asked == [("arm", 5, "operator/loopback")]
        await page.swap_until(GOOD, "serves v5 now")
        status, text = await page.swap({"confirm": "arm", "from": 5, "to": 9})
        assert (status, "blocks.0.weight" in text) == (409, True), "the service's own words"
        assert servicer.number == 5


async def test_one_swap_at_a_time(topology: Topology) -> None:
    servicer = SwappingService()
    async with serving(servicer) as address, aiohttp.ClientSession() as session:
        page = Page(session, f"http://{await start(topology, '--inference', address, '--allow-swaps')}")
        await page.wait_until_known()
        servicer.may_answer.clear()
        first = asyncio.create_task(page.swap(GOOD))
        await asyncio.wait_for(servicer.was_asked.wait(), 5)
        status, text = await asyncio.wait_for(page.swap(GOOD), 5)
        assert (status, "runs already" in text) == (409, True)
        servicer.may_answer.set()
        assert (await first)[0] == 200
        assert len(servicer.asked) == 1


async def test_elsewhere_than_loopback_the_token_s_role_decides_and_the_service_hears_the_person(
    topology: Topology, tmp_path: Path
) -> None:
    lab = tmp_path / "lab"
    make = [sys.executable, "-m", "manyhands", "lab-certificates", "--output", str(lab), "--host", "127.0.0.1"]
    await asyncio.to_thread(subprocess.run, make, check=True, capture_output=True, timeout=30)
    pair = {"certificate": "certificate.pem", "key": "key.pem", "authority": "authority.pem"}
    security = {name: lab / "server" / file for name, file in pair.items()} | {"tokens": lab / "server" / "tokens.toml"}
    flags = [f"--security.{name}={path}" for name, path in security.items()]
    # The dashboard itself is a viewer: by its own token it may look, and nothing else.
    flags.append(f"--security.token-file={lab / 'viewer-main' / 'token'}")
    servicer = SwappingService()
    trust = aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=str(lab / "authority.pem")))
    async with serving(servicer, SecuritySettings(**security)) as address, aiohttp.ClientSession(connector=trust) as session:
        service = await start(topology, "--inference", address, "--allow-swaps", *flags)
        url = f"https://{service}"
        operator, viewer = (
            Page(session, url, (lab / f"{name}-main" / "token").read_text().strip()) for name in ("operator", "viewer")
        )
        await operator.wait_until_known()
        assert await viewer.rights() == {"swap": False, "why_not": "it needs an operator's token"}
        status, text = await viewer.swap(GOOD)
        assert (status, "needs the role operator" in text) == (403, True)
        assert (await Page(session, url).swap(GOOD))[0] == 401, "a stranger"
        assert servicer.asked == []
        assert "viewer/main asks" not in topology.services["dashboard"].log_path.read_text(), "not even tried"
        assert (await operator.rights())["swap"]
        assert (await operator.swap(GOOD, origin="https://evil.example"))[0] == 403
        status, text = await operator.swap(GOOD)
        assert (status, servicer.asked) == (200, [("arm", 5, "operator/main")]), text
        assert servicer.tokens_shown == [1], "the person's, without the dashboard's own beside it"
