"""Meta-World's Sawyer arm in MuJoCo: 50 tasks, each with a scripted expert and an instruction.

The action moves the hand: (dx, dy, dz) in [-1, 1], where 1 is 1 cm of the commanded position per control period, and the
gripper's effort in [-1, 1], 1 closes. A control period is 12.5 ms of simulated time whatever rate_hz says; rate_hz is how
often an actor commands.

Rendering is tuned for CPUs: no multisampling, shadows or reflections. Two cameras cost 12 CPU-ms at 128 pixels, 14 at 160
and 17 at 224 (EGL on one core; the package's default of 8 samples and 4096-pixel shadow maps costs 208 ms at 128).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from pydantic import Field

from manyhands.errors import InvalidInput, Refused
from manyhands.robot.types import CameraGeometry, EpisodeOutcome
from manyhands.spec import Feature, FeatureKind, Spec

from ..camera import picture
from ..robot import CommandKind, ElementLimit, Reading, Readings, Robot, RobotOptions, SafetyRules, Vector
from ..teleoperator import Teleoperator

os.environ.setdefault("MUJOCO_GL", "egl")
try:
    import mujoco
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.policies import ENV_POLICY_MAP
except ImportError as error:
    raise Refused(
        f"the metaworld robot needs the simulators: pip install 'manyhands[sim]' ({error})", field="robot"
    ) from None

# Every task of the package, without its "-v3", and what to say to a policy.
INSTRUCTIONS: dict[str, str] = {
    "assembly": "pick up the wrench and put it over the peg",
    "basketball": "put the ball into the basket",
    "bin-picking": "move the cube from one bin to the other",
    "box-close": "put the lid on the box",
    "button-press": "press the button",
    "button-press-topdown": "press the button from above",
    "button-press-topdown-wall": "press the button from above, over the wall",
    "button-press-wall": "press the button behind the wall",
    "coffee-button": "push the button of the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the wrench off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-close": "close the faucet",
    "faucet-open": "open the faucet",
    "hammer": "hammer the nail",
    "hand-insert": "put the hand into the hole",
    "handle-press": "press the handle down",
    "handle-press-side": "press the handle down from the side",
    "handle-pull": "pull the handle up",
    "handle-pull-side": "pull the handle up from the side",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "insert the peg into the hole",
    "peg-unplug-side": "pull the peg out",
    "pick-out-of-hole": "pick the puck out of the hole",
    "pick-place": "pick up the puck and bring it to the goal",
    "pick-place-wall": "pick up the puck and bring it over the wall to the goal",
    "plate-slide": "slide the plate into the cabinet",
    "plate-slide-back": "slide the plate back out of the cabinet",
    "plate-slide-back-side": "slide the plate sideways out of the cabinet",
    "plate-slide-side": "slide the plate sideways into the cabinet",
    "push": "push the puck to the goal",
    "push-back": "push the puck back to the goal",
    "push-wall": "push the puck around the wall to the goal",
    "reach": "reach the goal",
    "reach-wall": "reach the goal behind the wall",
    "shelf-place": "put the puck on the shelf",
    "soccer": "push the ball into the goal",
    "stick-pull": "pull the box with the stick",
    "stick-push": "push the box with the stick",
    "sweep": "sweep the cube off the table",
    "sweep-into": "sweep the cube into the hole",
    "window-close": "close the window",
    "window-open": "open the window",
}

FRONT = "observation.images.front"
WRIST = "observation.images.wrist"
STATE = "observation.state"
ACTION = "action"


def _frame_names(prefix: str) -> list[str]:
    names = [f"{prefix}hand.x", f"{prefix}hand.y", f"{prefix}hand.z", f"{prefix}gripper.opening"]
    for number in (1, 2):
        names += [f"{prefix}object{number}.{axis}" for axis in ("x", "y", "z", "qx", "qy", "qz", "qw")]
    return names


_FRAME_UNITS = ["m"] * 3 + ["1"] + (["m"] * 3 + ["1"] * 4) * 2
# The package stacks the present frame, the frame before it and the goal.
STATE_NAMES = (*_frame_names(""), *_frame_names("previous."), "goal.x", "goal.y", "goal.z")
STATE_UNITS = (*_FRAME_UNITS, *_FRAME_UNITS, "m", "m", "m")
ACTION_NAMES = ("hand.dx", "hand.dy", "hand.dz", "gripper.effort")
# dx = 1 asks for 1 cm.
ACTION_UNITS = ("cm", "cm", "cm", "1")


class MetaWorldOptions(RobotOptions):
    task: str = Field("reach", description="a task of the package without its -v3: reach, drawer-open, door-open, ...")
    image_size: int = Field(128, ge=16, le=1024, description="pixels, height and width of both cameras")
    front_camera: Literal["corner", "corner2", "corner3", "corner4"] = Field(
        "corner4", description="the scene camera; corner4 is the nearest"
    )
    expert_noise: float = Field(
        0.0, ge=0, le=1, description="standard deviation of what the expert adds to its actions: shows the way back"
    )
    settle_ticks: int = Field(
        0, ge=0, le=1000, description="control periods an episode goes on after its first success: shows how to stay"
    )


class MetaWorldRobot(Robot):
    type_name = "metaworld"
    Options = MetaWorldOptions
    simulated = True

    def __init__(self, options: MetaWorldOptions) -> None:
        self._options = options
        if options.task not in INSTRUCTIONS:
            raise InvalidInput(f"{options.task!r} is not one of {', '.join(INSTRUCTIONS)}", field="options.task")
        size = options.image_size
        self.spec = Spec(
            observation=(
                Feature(
                    name=STATE,
                    kind=FeatureKind.STATE,
                    dtype="float32",
                    shape=(39,),
                    element_names=STATE_NAMES,
                    element_units=STATE_UNITS,
                ),
                Feature(name=FRONT, kind=FeatureKind.IMAGE, dtype="uint8", shape=(size, size, 3)),
                Feature(name=WRIST, kind=FeatureKind.IMAGE, dtype="uint8", shape=(size, size, 3)),
            ),
            action=(
                Feature(
                    name=ACTION,
                    kind=FeatureKind.ACTION,
                    dtype="float32",
                    shape=(4,),
                    element_names=ACTION_NAMES,
                    element_units=ACTION_UNITS,
                ),
            ),
            control_rate_hz=options.rate_hz,
            robot_type="metaworld-sawyer",
        )
        self.rules = SafetyRules(
            # A step of 1 from tick to tick costs the experts nothing (9 episodes of 4 tasks) and keeps a policy from
            # throwing the hand about.
            elements=tuple(
                ElementLimit(name=name, kind=CommandKind.VELOCITY, low=-1.0, high=1.0, max_step=step)
                for name, step in zip(ACTION_NAMES, (1.0, 1.0, 1.0, 2.0), strict=True)
            ),
            required_states=(STATE,),
            watchdog_s=options.watchdog_s,
            max_command_age_s=5.0,
        )
        self.cameras = tuple(
            CameraGeometry(name=name, source_height=size, source_width=size, resize="none") for name in (FRONT, WRIST)
        )
        self.teleoperators = {"expert": Expert(self)}
        self.tasks = (INSTRUCTIONS[options.task],)
        self.task = self.tasks[0]
        self._env: Any = None
        self._renderer: Any = None
        self._raw_state: npt.NDArray[np.float64] = np.zeros(39)
        self._gripper_effort = 0.0
        self._success = False
        self._ticks_since_success = 0

    def connect(self) -> None:
        env = ALL_V3_ENVIRONMENTS[f"{self._options.task}-v3"]()
        # What the package's set_task() would set from its pickled tasks, but with the goal visible and the scene drawn from
        # the seed at every reset.
        env._set_task_called = True
        env._partially_observable = False
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True
        env.__dict__.pop("sawyer_observation_space", None)
        env.model.vis.quality.offsamples = 0
        self._env = env
        self.reset(0, "")
        try:
            self._render(self._options.front_camera)
        except Exception as error:
            # GL libraries fail in many ways; here they stop the start instead of the first picture.
            raise Refused(
                f"MuJoCo cannot draw with MUJOCO_GL={os.environ['MUJOCO_GL']} ({error}); install libegl1, or set "
                "MUJOCO_GL=osmesa and install libosmesa6",
                field="MUJOCO_GL",
            ) from error

    def observe(self, *, include_images: bool) -> dict[str, Reading]:
        readings = {STATE: Reading.now(self._raw_state.astype(np.float32))}
        if include_images:
            # The package's corner cameras hang upside down; the gripper's has "away from the base" at the top already.
            stamp = readings[STATE].captured_ns
            front, wrist = self._render(self._options.front_camera), self._render("gripperPOV")
            readings[FRONT] = picture(front[::-1, ::-1], stamp)
            readings[WRIST] = picture(wrist, stamp)
        return readings

    def apply(self, action: Vector) -> None:
        # The package refuses to go on after 500 steps; how long an episode is, is the actor's business.
        self._env.curr_path_length = 0
        self._raw_state, _, _, _, info = self._env.step(action.astype(np.float32))
        self._gripper_effort = float(action[3])
        if self._success:
            self._ticks_since_success += 1
        self._success = self._success or bool(info["success"])

    def hold_action(self, readings: Readings) -> Vector:
        return np.array([0.0, 0.0, 0.0, self._gripper_effort])

    def constrain(self, action: Vector, readings: Readings) -> Vector:
        """Keeps the commanded hand in the task's box; one that is outside may only come back."""
        env = self._env
        position = env.data.mocap_pos[0]
        bent = action.copy()
        bent[:3] = np.clip(
            action[:3],
            np.minimum(0.0, (env.mocap_low - position) / env.action_scale),
            np.maximum(0.0, (env.mocap_high - position) / env.action_scale),
        )
        return bent

    def reset(self, seed: int, task: str) -> None:
        if task and task not in (self.task, self._options.task):
            raise InvalidInput(f"this scene offers {self.task!r} only; start another agent for {task!r}", field="task")
        if seed < 0:
            raise InvalidInput(f"seed ({seed}) must be >= 0", field="seed")
        self._env.seed(seed)
        mujoco.mj_resetData(self._env.model, self._env.data)
        raw_state, _ = self._env.reset()
        self._raw_state = np.asarray(raw_state, dtype=np.float64)
        self._gripper_effort = 0.0
        self._success = False
        self._ticks_since_success = 0
        for teleoperator in self.teleoperators.values():
            teleoperator.begin_episode(seed)

    def outcome(self) -> EpisodeOutcome:
        settled = self._success and self._ticks_since_success >= self._options.settle_ticks
        return EpisodeOutcome.SUCCESS if settled else EpisodeOutcome.RUNNING

    def disconnect(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._env = None

    def _render(self, camera: str) -> npt.NDArray[np.uint8]:
        if self._renderer is None:
            size = self._options.image_size
            self._renderer = mujoco.Renderer(self._env.model, size, size)
            self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
            self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        self._renderer.update_scene(self._env.data, camera)
        pixels: npt.NDArray[np.uint8] = self._renderer.render()
        return pixels

    @property
    def expert_noise(self) -> float:
        return self._options.expert_noise

    @property
    def task_name(self) -> str:
        """As the package calls it, without "-v3"."""
        return self._options.task

    @property
    def raw_state(self) -> npt.NDArray[np.float64]:
        """(39,) as the simulator gave it; the experts were written against it."""
        return self._raw_state


class Expert(Teleoperator):
    """The package's scripted policy of the robot's task."""

    def __init__(self, robot: MetaWorldRobot) -> None:
        self._robot = robot
        self._make = cast("Callable[[], Any]", ENV_POLICY_MAP[f"{robot.task_name}-v3"])
        self._policy = self._make()
        self._rng = np.random.default_rng(0)

    def action(self, readings: Readings) -> Mapping[str, npt.NDArray[np.generic]]:
        with warnings.catch_warnings():
            # It warns about its own gains; what is over 1 is cut here, as the simulator would.
            warnings.simplefilter("ignore")
            proposed = np.clip(self._policy.get_action(self._robot.raw_state), -1.0, 1.0)
        noise = self._rng.normal(0.0, self._robot.expert_noise, proposed.shape)
        return {ACTION: np.clip(proposed + noise, -1.0, 1.0).astype(np.float32)}

    def begin_episode(self, seed: int) -> None:
        self._policy = self._make()
        self._rng = np.random.default_rng(seed)
