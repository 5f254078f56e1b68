"""The demo's stages: what each does, and how it is said in plain words."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from manyhands import stamps
from manyhands.actor.v1 import actor_pb2
from manyhands.clients.actor import roll_out, teleoperate
from manyhands.errors import Refused, TooLate
from manyhands.learner.v1 import learner_pb2

from .fleet import MODEL, RECIPE, Fleet
from .report import Episode, Findings
from .runs import RobotRun, Runs, run_with_progress
from .video import Clip, side_by_side

DATASET = "demo"
EVALUATION_DATASET = "demo-evaluation"
# Two cores share rendering, training and serving: one arithmetic thread a process keeps the control loops on time.
ENVIRONMENT = {
    "MUJOCO_GL": "egl",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_AUTH_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
}
# The slowest expert needs about 100 ticks.
MAX_EPISODE_STEPS = 150
REPLAN_INTERVAL_STEPS = 8
_CLIPS_PER_ROBOT = 3

START_TEXT = (
    "Each of these is a process of its own, and they meet over gRPC only: the dataset store, the weights service, a "
    "learner on Ray, the inference service with an untrained policy, three robot agents (Meta-World in MuJoCo, two "
    "cameras each), an actor for each robot, and the dashboard."
)
RECORD_TEXT = (
    "Scripted experts stand in for people at a teleoperator. Each actor drives its robot 20 times a second, writes "
    "every frame to a spool on disk and streams it to the store, which acknowledges only what is durable and "
    "publishes LeRobotDataset v3.0: parquet and mp4."
)
UNTRAINED_TEXT = (
    "The served policy acts now, with random weights: an actor sends an observation, the inference service answers "
    "with a chunk of actions, the robot's own safety limits judge each of them. Success should be near zero."
)
LEARN_TEXT = (
    "The learner copies the recorded episodes from the store, trains a small flow-matching policy that reads the "
    "instruction, and publishes versions as it goes. The robots keep acting: the inference service swaps each version "
    "in between two batches."
)
TRAINED_TEXT = (
    "The newest version acts on scenes nobody has recorded. This is the figure that counts, with its 95 % "
    "confidence interval."
)
REPORT_TEXT = "The evaluated episodes become a video, learning and latency a plot, and everything a table."


def record(fleet: Fleet, num_episodes: int, console: Console) -> list[Episode]:
    """Successful expert episodes of every robot into the store; failures are discarded and tried again."""
    fleet.create_datasets(DATASET, EVALUATION_DATASET)
    definitions = {
        robot.name: teleoperate(
            DATASET,
            teleoperator="expert",
            episode_count=num_episodes * robot.recording_factor,
            max_episode_steps=MAX_EPISODE_STEPS,
            discard_failures=True,
        )
        for robot in fleet.robots
    }
    return [episode for run in run_with_progress(fleet, "record", definitions, console) for episode in run.episodes]


def closed_loop(
    fleet: Fleet, name: str, num_episodes: int, console: Console, *, first_seed: int, dataset: str = ""
) -> list[RobotRun]:
    """num_episodes per robot with the served policy."""
    definitions = _policy_runs(fleet, num_episodes, first_seed=first_seed, dataset=dataset)
    return run_with_progress(fleet, name, definitions, console)


def learn(fleet: Fleet, max_duration_s: float, findings: Findings, console: Console) -> None:
    """Trains while the robots go on acting; fills the learner's part of findings."""
    acting = Runs(fleet, "while-learning", _policy_runs(fleet, 0, first_seed=7_000))
    acting.start()
    try:
        fleet.learner.start_run(
            learner_pb2.RunDefinition(
                run_id=f"demo-{uuid.uuid4().hex[:8]}",
                recipe=RECIPE,
                dataset=DATASET,
                model=MODEL,
                max_duration=stamps.to_duration(max_duration_s),
            )
        )
        _follow_learner(fleet, max_duration_s, findings, console)
        _wait_until_served(fleet, findings.published[-1][1])
    finally:
        acting.stop()
    results = acting.wait()
    findings.served_versions = list(dict.fromkeys(number for result in results for number in result.version_numbers))
    for result in results:
        numbers = ", ".join(str(number) for number in dict.fromkeys(result.version_numbers))
        console.print(f"  {result.robot} acted on versions {numbers} in one go")


def _follow_learner(fleet: Fleet, max_duration_s: float, findings: Findings, console: Console) -> None:
    columns = (TextColumn("  training"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=max_duration_s, note="waiting for Ray's workers")
        first_point_s: float | None = None
        for point in fleet.learner.watch():
            if "train/loss" in point.metrics:
                if first_point_s is None:
                    first_point_s = time.monotonic()
                findings.learner_curve.append((point.step, dict(point.metrics)))
                loss = point.metrics["train/loss"]
                note = f"step {point.step}, loss {loss:.4f}, {len(findings.published)} versions published"
                progress.update(bar, completed=min(time.monotonic() - first_point_s, max_duration_s), note=note)
            if point.HasField("published"):
                findings.published.append((point.step, point.published.number))
            if point.status.state == learner_pb2.RUN_STATE_FAILED:
                raise Refused(f"training failed: {point.status.detail}", field="learner")
            if point.status.state == learner_pb2.RUN_STATE_FINISHED:
                progress.update(bar, completed=max_duration_s)
                break
    if not findings.published:
        raise Refused("training ended without a published version", field="learner")


def _wait_until_served(fleet: Fleet, number: int, timeout_s: float = 20.0) -> None:
    """Returns once the inference service serves this version."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if any(model.version.number == number for model in fleet.inference.list_models() if model.name == MODEL):
            return
        time.sleep(0.2)
    raise TooLate(f"version {number} was published but not served within {timeout_s:.0f} s", field="inference")


def publish(fleet: Fleet, dataset: str) -> Path:
    """The dataset's root, once every sealed episode can be read."""
    return Path(fleet.store.publish(dataset).root_path)


def verify(fleet: Fleet, root: Path, console: Console) -> None:
    """The store's own conformance check, as a user would run it."""
    fleet.topology.run("dataset-verify", ["dataset", "verify", str(root)])
    console.print(f"  manyhands dataset verify {root}: sound", soft_wrap=True)


def make_video(fleet: Fleet, root: Path, path: Path) -> Path:
    """The first evaluated episodes of all robots side by side."""
    columns: list[list[Clip]] = []
    episodes = list(fleet.store.list_episodes(EVALUATION_DATASET))
    for plan in fleet.robots:
        clips: list[Clip] = []
        for episode in [episode for episode in episodes if episode.robot_id == plan.name][:_CLIPS_PER_ROBOT]:
            video = next(video for video in episode.videos if video.feature.endswith(".front"))
            version = f"v{episode.versions[-1].number}" if episode.versions else ""
            clips.append(
                Clip(
                    path=root / video.path,
                    from_timestamp_s=video.from_timestamp_s,
                    to_timestamp_s=video.to_timestamp_s,
                    caption=f"{plan.name}: {', '.join(episode.tasks)} ({version})",
                )
            )
        columns.append(clips)
    fps = round(fleet.store.get_dataset(EVALUATION_DATASET).definition.spec.control_rate_hz)
    side_by_side(columns, path, fps=fps)
    return path


def _policy_runs(
    fleet: Fleet, num_episodes: int, *, first_seed: int, dataset: str = ""
) -> dict[str, actor_pb2.RunDefinition]:
    return {
        robot.name: roll_out(
            MODEL,
            episode_count=num_episodes,
            max_episode_steps=MAX_EPISODE_STEPS,
            replan_interval_steps=REPLAN_INTERVAL_STEPS,
            first_seed=first_seed,
            dataset=dataset,
        )
        for robot in fleet.robots
    }
