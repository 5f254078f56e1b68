"""What the dashboard shows of a real system, in a real browser."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page, expect

from manyhands.clients.inference import InferenceClient
from manyhands.clients.robot import RobotClient, RobotMode
from manyhands.clients.weights import WeightsClient
from manyhands.learner.v1 import learner_pb2
from policies import checkpoint
from tests.browser.conftest import Lab
from tests.browser.peers import chunk, result, version
from tests.support.system import DATASET, MODEL, policy_run, teleoperated_run
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

CAMERA = "observation.images.front"

# Of a canvas, or of the frame that a video shows.
PIXELS = """source => {
  let canvas = source;
  if (source.tagName === "VIDEO") {
    canvas = document.createElement("canvas");
    canvas.width = source.videoWidth;
    canvas.height = source.videoHeight;
    canvas.getContext("2d").drawImage(source, 0, 0);
  }
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return {width: canvas.width, height: canvas.height, data: Array.from(data)};
}"""
# Presses a button, then reads a video's clock until it stands still.
PLAYED = """async (button, video) => {
  const times = [];
  button.click();
  await new Promise(resolve => video.addEventListener("playing", resolve, {once: true}));
  while (!video.paused) {
    times.push(video.currentTime);
    await new Promise(resolve => setTimeout(resolve, 20));
  }
  return times;
}"""
UNNAMED = """() => [...document.querySelectorAll("button, select, input, canvas, svg[role=img]")]
  .filter(element => !(element.textContent.trim() || element.getAttribute("aria-label")))
  .map(element => element.outerHTML)"""
# Of page and text, 0 to 255.
LIGHTNESS = """() => ["backgroundColor", "color"].map(name =>
  getComputedStyle(document.body)[name].match(/[\\d.]+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 3)"""


def pixels(page: Page, selector: str) -> np.ndarray:
    """(H, W, 3) uint8 of a canvas or video."""
    answer = page.locator(selector).evaluate(PIXELS)
    return np.array(answer["data"], np.uint8).reshape(answer["height"], answer["width"], 4)[..., :3]


def shown_values(page: Page, robot: str) -> dict[str, float]:
    outputs = page.locator(f"[data-robot='{robot}'] .legend output")
    return {item.get_attribute("data-element") or "": float(item.inner_text()) for item in outputs.all()}


def test_cameras_show_what_the_robot_sees_and_change_as_it_moves(page: Page, lab: Lab) -> None:
    camera = f"[data-robot='robot-0'] [data-camera='{CAMERA}']"
    page.wait_for_selector(f"{camera}[data-number]", state="attached")
    with RobotClient(lab.system.address("robot-0")) as robot:
        seen = robot.get_observation(include_images=True).values[CAMERA]
    wait_until(
        lambda: np.abs(pixels(page, camera).astype(int) - seen).mean() < 3, 5, "the page shows the robot's own picture"
    )
    before = pixels(page, camera)
    assert before.std() > 10
    with lab.system.actor(0) as actor:
        actor.start_run(teleoperated_run(episode_count=0, dataset=""))
        try:
            wait_until(lambda: np.abs(pixels(page, camera).astype(int) - before).max() > 60, 10, "the picture changes")
        finally:
            actor.stop_run()
            list(actor.results())


def test_the_joint_plot_follows_the_values_that_the_robot_reports(page: Page, lab: Lab) -> None:
    with RobotClient(lab.system.address("robot-1")) as robot:
        robot.acquire("test")
        robot.reset(seed=5)
        wanted = robot.get_observation(include_images=False).values["observation.state"]
        target = np.array([0.4, -0.3, 0.6, 0.1, -0.5, 0.9], np.float32)
        for _ in range(20):
            robot.command({"action": target})
            time.sleep(1 / 30)
        reached = robot.get_observation(include_images=False).values["observation.state"][:6]
        robot.release()
    assert np.abs(reached - wanted[:6]).max() > 0.2

    def follows() -> bool:
        shown = shown_values(page, "robot-1")
        return len(shown) == 6 and np.abs(np.array(list(shown.values())) - reached).max() < 2e-3

    wait_until(follows, 5, "the legend shows the joints' positions")
    assert "shoulder_pan.pos" in shown_values(page, "robot-1")
    plot = page.locator("[data-robot='robot-1'] canvas.plot")
    assert f"shoulder_pan.pos {float(f'{reached[0]:.4g}'):g} rad" in (plot.get_attribute("aria-label") or "")
    drawn = pixels(page, "[data-robot='robot-1'] canvas.plot").reshape(-1, 3)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # The first two joints' lines.
        assert (np.abs(drawn.astype(int) - colour).max(axis=1) < 12).sum() > 50
    # Any other feature can be chosen, and every element is readable as text.
    page.locator("[data-robot='robot-1'] select").select_option("action")
    page.locator("[data-robot='robot-1'] summary", has_text="All values").click()
    expect(page.locator("[data-robot='robot-1'] [data-value]")).to_have_count(6)
    cell = page.locator("[data-robot='robot-1'] [data-value='gripper.pos']")
    wait_until(lambda: abs(float(cell.inner_text()) - 0.9) < 0.01, 5, "the last command is shown")


def test_chunks_appear_with_the_version_that_made_them_and_swaps_are_listed(page: Page, lab: Lab) -> None:
    robot = page.locator("[data-robot='robot-0']")
    with lab.system.actor(0) as actor:
        actor.start_run(policy_run(dataset=""))
        expect(robot.locator("[data-field='newest-chunk']")).to_contain_text("arm v0")
        expect(robot.locator("[data-field='mode']")).to_have_text("active")
        expect(page.locator("[data-served='arm']")).to_contain_text("arm v0")
        publish_and_swap(lab, number=1)
        expect(robot.locator("[data-field='newest-chunk']")).to_contain_text("arm v1")
        bar = robot.locator("svg.timeline rect.acting[data-version='1']").last
        expect(bar).to_be_attached()
        assert re.search(
            r"arm v1: asked at tick \d+, came at tick \d+ after \d+ ms, for ticks \d+ to \d+", bar.text_content() or ""
        )
        expect(page.locator("[data-served='arm']")).to_contain_text("arm v1")
        expect(page.locator("[data-published='1']")).to_contain_text("served")
        expect(page.locator("[data-swap='1']")).to_contain_text("served")
        row = page.locator("[data-latency='robot-0']")
        expect(row).to_be_visible()
        actor.stop_run()
        list(actor.results())


def publish_and_swap(lab: Lab, *, number: int) -> None:
    """Slightly other weights than those that are served."""
    tensors = {name: value + 0.001 * torch.randn_like(value) if value.is_floating_point() else value
               for name, value in checkpoint.read_tensors(lab.system.checkpoint).items()}  # fmt: skip
    policy_type, config, spec = checkpoint.read_config(lab.system.checkpoint)
    with WeightsClient(lab.system.address("weights")) as weights:
        published = weights.publish(
            model=MODEL, policy_type=policy_type, config_json=json.dumps(config), spec=spec,
            tensors=checkpoint.to_wire(tensors), publish_id=f"test/{number}", metrics={"train/loss": 0.25, "train/step": 40},
        )  # fmt: skip
    assert published.number == number
    with InferenceClient(lab.system.address("inference")) as inference:
        inference.swap_weights(MODEL, number)


def test_refusals_and_exact_latencies_are_visible(page: Page, lab: Lab) -> None:
    ghost = page.locator("[data-robot='ghost']")
    lab.ghost.script.add(*(chunk(index, number=2, latency_ms=100 if index < 99 else 700) for index in range(1, 101)))
    expect(ghost.locator("[data-field='newest-chunk']")).to_contain_text(
        "arm v2, asked at tick 800, came at 803 after 700 ms"
    )
    row = page.locator("[data-latency='ghost']")
    expect(row).to_contain_text("100 / 700 ms")
    assert [cell.inner_text() for cell in row.locator("td.num").all()] == [
        "100 / 700 ms", "10 / 70 ms", "20 / 140 ms", "30 / 210 ms", "40 / 280 ms", "100",
    ]  # fmt: skip
    widths = row.locator(".bar span").evaluate_all("spans => spans.map(span => span.getBoundingClientRect().width)")
    np.testing.assert_allclose(np.array(widths) / widths[0], [1, 2, 3, 4], rtol=0.1)
    refusal = "observation.state: element 2 is nan; it must be finite"
    lab.ghost.script.add(chunk(101, refusal=refusal))
    expect(ghost.locator("[data-field='refusal']")).to_contain_text(refusal)
    expect(ghost.locator("svg.timeline .refused[data-request='101']")).to_be_attached()
    ghost.locator("summary", has_text="Last chunks").click()
    expect(ghost.locator("tr.bad")).to_contain_text(refusal)
    expect(ghost.locator("[data-field='success']")).to_have_text("19 of 20 episodes, 60 wanted")
    lab.ghost.script.add(result(1, success=True), result(2, success=False))
    expect(ghost.locator(".results li")).to_have_text(["✓", "✕"])
    expect(ghost.get_by_label("Episode 2: time limit, 120 frames, arm v2, 4 ticks held")).to_be_visible()


def test_the_learner_s_curve_ends_at_its_last_value_and_marks_what_was_published(page: Page, lab: Lab) -> None:
    def point(step: int, **fields: Any) -> learner_pb2.WatchProgressResponse:
        metrics = {"train/loss": 2.0 / step, "train/lr": 1e-3, "train/grad_norm": 0.5}
        return learner_pb2.WatchProgressResponse(step=step, metrics=metrics, **fields)

    # Publishing takes a while: that of step 150 is told after step 200.
    late = learner_pb2.WatchProgressResponse(step=150, published=version(7))
    lab.learner.script.add(*(point(step) for step in range(1, 201)), late)
    expect(page.locator("[data-last='train/loss']")).to_have_text("0.01 at step 200")
    expect(page.locator("[data-last='train/lr']")).to_have_text("0.001 at step 200")
    expect(page.locator("#learning [data-field='published']")).to_have_text("Published: arm v7 at step 150")
    expect(page.locator("#learning [data-field='step']")).to_have_text("200 of 1000")
    expect(page.locator("#learning [data-field='state']")).to_have_text("training")
    lab.learner.script.add(
        learner_pb2.WatchProgressResponse(step=201, metrics={"train/loss": float("nan"), "train/lr": 5e-4})
    )
    expect(page.locator("[data-last='train/loss']")).to_have_text("not a number at step 201")
    line = pixels(page, "[data-curve='train/loss']").reshape(-1, 3)
    assert (np.abs(line.astype(int) - (0x00, 0x72, 0xB2)).max(axis=1) < 12).sum() > 200


def test_a_killed_service_turns_red_within_3_s_and_green_when_it_is_back(page: Page, lab: Lab) -> None:
    for name in (
        "robot:robot-0",
        "robot:robot-1",
        "inference",
        "weights",
        "learner",
        "store",
    ):
        expect(page.locator(f"[data-service='{name}']")).to_have_attribute("data-state", "up")
    weights = page.locator("[data-service='weights']")
    lab.topology.kill("weights")
    killed_s = time.monotonic()
    expect(weights).to_have_attribute("data-state", "down", timeout=3_000)
    assert time.monotonic() - killed_s < 3.0
    expect(weights.locator(".state")).to_have_text("down")
    expect(page.locator("[data-service='store']")).to_have_attribute("data-state", "up")
    lab.restart("weights")
    expect(weights).to_have_attribute("data-state", "up", timeout=5_000)


def test_an_episode_plays_its_own_frames(page: Page, lab: Lab) -> None:
    episode = lab.system.published()[1]
    span = next(span for span in episode.videos if span.feature == CAMERA)
    assert span.from_timestamp_s > 0, "the second episode must begin inside its file"
    row = page.locator(f"[data-episode='{episode.index}']")
    expect(row).to_contain_text("success")
    expect(row).to_contain_text("teleoperated")
    row.get_by_role("button", name=f"Play episode {episode.index}").click()
    video = f"[data-playing='{episode.index}'] video[data-video='{CAMERA}']"
    page.wait_for_selector(video)
    expect(page.locator("[data-playing] video")).to_have_count(2)
    position = page.locator(video)
    # It plays by itself, and ends with its episode although the file goes on.
    wait_until(lambda: position.evaluate("video => video.readyState >= 2 && video.paused"), 15, "it has played")
    times = page.get_by_role("button", name="Play", exact=True).evaluate(PLAYED, position.element_handle())
    assert times == sorted(times)
    assert len(set(times)) >= 3, "it advances"
    assert span.from_timestamp_s - 1e-3 <= times[0]
    assert times[-1] <= span.to_timestamp_s + 0.1
    recorded = recorded_frames(lab, span.path)
    first = round(span.from_timestamp_s * lab.system.spec().control_rate_hz)
    for frame in (0, episode.frame_count // 2):
        page.locator("[data-playing] input[type=range]").evaluate(
            "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')); }", frame
        )
        wait_until(lambda: not position.evaluate("video => video.seeking"), 10)
        shown = pixels(page, video)
        distances = np.array([np.abs(shown.astype(int) - picture).mean() for picture in recorded])
        assert distances[first + frame] < 4
        assert abs(int(distances.argmin()) - (first + frame)) <= 1
        expect(page.locator("[data-playing] [data-field=position]")).to_contain_text(f"frame {frame}")


def recorded_frames(lab: Lab, path: str) -> list[np.ndarray]:
    with av.open(str(Path(lab.system.folder) / "store/datasets" / DATASET / path)) as container:
        return [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]


def test_emergency_stop_asks_first_and_then_latches(page: Page, lab: Lab) -> None:
    card = page.locator("[data-robot='robot-1']")
    dialog = page.locator("#confirm")
    card.get_by_role("button", name="Emergency stop").click()
    expect(dialog).to_contain_text("Emergency stop robot-1?")
    dialog.get_by_role("button", name="Cancel").click()
    assert lab.system.robot_mode(1) is not RobotMode.EMERGENCY_STOP
    card.get_by_role("button", name="Hold").click()
    dialog.get_by_role("button", name="Hold").click()
    expect(card).to_contain_text("The robot answers:")
    assert lab.system.robot_mode(1) is not RobotMode.EMERGENCY_STOP
    card.get_by_role("button", name="Emergency stop").click()
    dialog.get_by_role("button", name="Stop it").click()
    expect(card.locator("[data-field='mode']")).to_have_text("emergency stop")
    assert lab.system.robot_mode(1) is RobotMode.EMERGENCY_STOP
    assert lab.system.robot_mode(0) is not RobotMode.EMERGENCY_STOP


def test_the_page_survives_a_restart_of_the_dashboard(page: Page, lab: Lab) -> None:
    lab.topology.kill("dashboard")
    expect(page.locator("#link")).to_contain_text("away")
    lab.restart("dashboard")
    expect(page.locator("#link")).to_have_text("Live")
    expect(page.locator("[data-robot='robot-0'] [data-field='mode']")).not_to_have_text("away")
    expect(page.locator("[data-robot]")).to_have_count(3)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_on_a_phone_and_by_a_screen_reader(browser: Browser, lab: Lab, scheme: Any) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto(lab.url)
    page.wait_for_selector("[data-robot='robot-0'] [data-camera][data-number]", state="attached")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(UNNAMED) == []
    lightness = page.evaluate(LIGHTNESS)
    assert abs(lightness[0] - lightness[1]) > 150
    assert (lightness[0] < lightness[1]) == (scheme == "dark")
    context.close()


def test_an_empty_dashboard_says_what_to_do(browser: Browser, lab: Lab) -> None:
    service = lab.topology.start("empty", ["dashboard", "--address", "127.0.0.1:0"], wave=3)
    page = browser.new_page()
    page.goto(f"http://{service.address}/")
    for section, flag in (
        ("robots", "--robot NAME=HOST:PORT"),
        ("latency", "--actor HOST:PORT"),
        ("versions", "--weights HOST:PORT"),
        ("learning", "--learner HOST:PORT"),
        ("episodes", "--store HOST:PORT"),
    ):
        expect(page.locator(f"#{section}")).to_contain_text(flag)
    page.close()
    lab.topology.stop("empty")
