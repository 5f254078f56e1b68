"""The inference service on the page, and swapping its weights by clicking, in a real browser over real services."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page, expect

from deploy.local import Topology
from manyhands.clients.act_stream import ActStream
from manyhands.clients.inference import InferenceClient
from manyhands.clients.weights import WeightsClient
from tests.support.inference_lab import (
    ENVIRONMENT,
    ask,
    make_observation,
    make_policy,
    next_chunk,
    next_refusal,
    open_session,
    serve,
)
from tests.support.waiting import wait_until
from tests.support.weights_lab import publish, start_weights

FITS_WIDTH = "document.documentElement.scrollWidth <= innerWidth"


@dataclass(kw_only=True)
class ServedLab:
    """A small policy "tiny" at its checkpoint; versions 1 and 2 are good, 3 is not; one robot, "left"."""

    url: str
    client: InferenceClient
    stream: ActStream
    topology: Topology

    def served_number(self) -> int:
        (model,) = self.client.list_models()
        return model.version.number


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedLab]:
    folder = tmp_path_factory.mktemp("served")
    with Topology(folder / "logs", environment=ENVIRONMENT) as topology:
        weights = start_weights(topology, folder)
        service = serve(topology, folder / "tiny", make_policy(0), "--weights", weights)
        with WeightsClient(weights) as learner:
            publish_all(learner)
        flags = ["--inference", service.address, "--weights", weights, "--allow-swaps"]
        dashboard = topology.start("dashboard", ["dashboard", "--address", "127.0.0.1:0", *flags], wave=3)
        with InferenceClient(service.address) as client:
            session = open_session(client, "left")
            with client.act_stream(session.session_id) as stream:
                yield ServedLab(url=f"http://{dashboard.address}/", client=client, stream=stream, topology=topology)


def publish_all(learner: WeightsClient) -> None:
    for number in (1, 2):
        assert publish(learner, make_policy(number), step=number).number == number
    name, tensor = next(iter(make_policy(3).state_dict().items()))
    assert publish(learner, make_policy(3), step=3, **{name: torch.full_like(tensor, np.nan)}).number == 3


@pytest.fixture
def page(browser: Browser, served: ServedLab) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(15_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(f"script error: {error}"))
    page.goto(served.url)
    page.wait_for_selector("#link[data-state=live]")
    yield page
    context.close()
    assert problems == []


def button(page: Page, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def test_robots_stages_capacity_and_refusals_are_shown(page: Page, served: ServedLab) -> None:
    for seed in range(10):
        ask(served.stream, seed)
        next_chunk(served.stream)
    bad = make_observation(9)
    bad["observation.state"] = np.full_like(bad["observation.state"], np.nan)
    for _ in range(4):
        ask(served.stream, 9, observation=bad)
        message = next_refusal(served.stream).message
    inference = page.locator("#inference")
    expect(inference.locator("[data-field='robots']")).to_have_text("1")
    expect(inference.locator("[data-session='left'] td").nth(4)).to_have_text("4")
    for stage in ("decode", "queue", "prefix", "sample", "postprocess", "total"):
        expect(inference.locator(f"[data-stage='{stage}'] td.num").first).to_contain_text("ms")
    expect(inference.locator("[data-room='tiny']")).to_contain_text("5 of ")
    expect(inference.locator("[data-room='tiny']")).to_contain_text("more like these")
    refusal = inference.locator("[data-refusal='left']")
    expect(refusal).to_have_count(1)
    expect(refusal).to_contain_text(message)
    assert [cell.inner_text() for cell in refusal.locator("td").all()][1::2] == ["invalid", "4"]
    expect(page.locator("#versions [data-served='tiny']")).to_contain_text("tiny v0")


def test_a_swap_is_asked_for_twice_and_its_result_is_shown(page: Page, served: ServedLab) -> None:
    dialog = page.locator("#confirm")
    answer = page.locator("#swap-answer")
    expect(answer).to_be_hidden()
    button(page, "Swap tiny to v1").click()
    expect(dialog).to_contain_text("Swap tiny from v0 to v1?")
    dialog.get_by_role("button", name="Cancel").click()
    expect(dialog).to_be_hidden()
    button(page, "Swap tiny to v1").click()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert served.served_number() == 0, "nothing happened yet"
    button(page, "Swap tiny to v1").click()
    dialog.get_by_role("button", name="Swap").click()
    expect(answer).to_contain_text("tiny: v0 → v1, pause ")
    assert served.served_number() == 1
    expect(page.locator("[data-served='tiny']")).to_contain_text("tiny v1")
    expect(page.locator("[data-published='1']")).to_contain_text("served")
    expect(page.locator("[data-swap='1']")).to_contain_text("served")
    ask(served.stream, 21)
    next_chunk(served.stream)


def test_a_refused_version_is_shown_with_its_reason_and_changes_nothing(page: Page, served: ServedLab) -> None:
    before = served.served_number()
    button(page, "Swap tiny to v3").click()
    page.locator("#confirm").get_by_role("button", name="Swap").click()
    answer = page.locator("#swap-answer")
    expect(answer).to_contain_text(f"Not swapped, v{before} goes on serving:")
    expect(answer).to_contain_text("not finite")
    expect(answer).to_have_attribute("data-state", "refused")
    expect(page.locator("[data-swap='3']")).to_contain_text("refused:")
    assert served.served_number() == before
    expect(button(page, "Swap tiny to v3")).to_be_enabled()


def test_rolling_back_holds_the_version_until_somebody_goes_on(page: Page, served: ServedLab) -> None:
    dialog = page.locator("#confirm")
    button(page, "Swap tiny to v2").click()
    dialog.get_by_role("button", name="Swap").click()
    expect(page.locator("[data-served='tiny']")).to_contain_text("tiny v2")
    button(page, "Roll back to v1, tiny").click()
    expect(dialog).to_contain_text("Swap tiny from v2 to v1?")
    expect(dialog).to_contain_text("will not replace v1 until")
    dialog.get_by_role("button", name="Swap").click()
    expect(page.locator("#swap-answer")).to_contain_text("tiny: v2 → v1")
    row = page.locator("[data-served='tiny']")
    expect(row).to_contain_text("held")
    assert served.served_number() == 1
    expect(button(page, "Go on with the newest, tiny")).to_be_visible()
    expect(row.get_by_role("button", name="Roll back")).to_have_count(0)


def test_buttons_stay_where_they_are_while_numbers_change(page: Page, served: ServedLab) -> None:
    """A button that is drawn anew under the finger is not pressed, and the keyboard loses its place."""
    swap = button(page, "Swap tiny to v2")
    swap.focus()
    element = swap.element_handle()
    drawn = page.locator("#inference [data-field='chunks']").inner_text()
    ask(served.stream, 31)
    next_chunk(served.stream)
    expect(page.locator("#inference [data-field='chunks']")).not_to_have_text(drawn)
    assert element.evaluate("button => button.isConnected && document.activeElement === button")


def test_somebody_else_s_swap_while_the_dialog_is_open_is_not_overwritten(page: Page, served: ServedLab) -> None:
    before = served.served_number()
    button(page, "Swap tiny to v2").click()
    served.client.swap_weights("tiny", 2 if before != 2 else 1)
    wait_until(lambda: served.served_number() != before, 5, "somebody else swapped")
    expect(page.locator("[data-served='tiny']")).to_contain_text(f"tiny v{served.served_number()}")
    now = served.served_number()
    page.locator("#confirm").get_by_role("button", name="Swap").click()
    expect(page.locator("#swap-answer")).to_contain_text(f"serves v{now} now, not v{before}")
    assert served.served_number() == now


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(browser: Browser, served: ServedLab, scheme: Any) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme=scheme, has_touch=True)
    page = context.new_page()
    page.goto(served.url)
    page.wait_for_selector("#inference [data-stage]")
    assert page.evaluate(FITS_WIDTH)
    number = 1 if served.served_number() != 1 else 2
    swap = button(page, f"Swap tiny to v{number}")
    swap.scroll_into_view_if_needed()
    reachable = swap.bounding_box()
    assert reachable is not None
    assert reachable["x"] + reachable["width"] <= 390, "without scrolling its table sideways"
    swap.tap()
    dialog = page.locator("#confirm")
    expect(dialog).to_contain_text(f"to v{number}?")
    box = dialog.bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    dialog.get_by_role("button", name="Cancel").tap()
    assert page.evaluate(FITS_WIDTH)
    context.close()


def test_without_the_flag_there_is_no_button_and_the_page_says_why(browser: Browser, served: ServedLab) -> None:
    flags = list(served.topology.services["dashboard"].command)
    flags.remove("--allow-swaps")
    service = served.topology.start("looker", flags, wave=3)
    page = browser.new_page()
    page.goto(f"http://{service.address}/")
    expect(page.locator("[data-field='no-swaps']")).to_contain_text("--allow-swaps")
    expect(page.locator("[data-published='2']")).to_be_visible()
    expect(page.locator("#versions button")).to_have_count(0)
    page.close()
    served.topology.stop("looker")
