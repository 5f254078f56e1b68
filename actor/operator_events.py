"""Pedals and buttons at the robot, as wishes for the episode that runs: success, failure, record again, stop."""

from __future__ import annotations

import enum
import logging
import threading

from manyhands import errors
from manyhands.clients.robot import RobotClient, TeleopEvent, TeleopEventKind

logger = logging.getLogger(__name__)

RECONNECT_S = 0.5
# The agent's own events. The scene's end and an emergency stop come with the observation, where they belong to a tick.
AGENT_SOURCES = ("scene", "emergency stop")


class Wish(enum.Enum):
    SUCCESS = TeleopEventKind.SUCCESS
    FAILURE = TeleopEventKind.FAILURE
    RERECORD = TeleopEventKind.RERECORD
    STOP = TeleopEventKind.STOP


def wish_of(event: TeleopEvent) -> Wish | None:
    """What event asks for; None for interventions, which the observation tells, and for what is not a person's."""
    if event.source in AGENT_SOURCES:
        return None
    return next((wish for wish in Wish if wish.value is event.kind), None)


class OperatorEvents:
    """A thread that listens for as long as the run goes on; take() never waits."""

    def __init__(self, client: RobotClient) -> None:
        self._client = client
        self._closing = threading.Event()
        self._wish: Wish | None = None
        self._next_number = 0
        self._thread = threading.Thread(target=self._listen, name="operator", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def forget(self) -> None:
        """What was pressed before an episode is not about it."""
        self._wish = None

    def take(self) -> Wish | None:
        """The last thing that was pressed and not taken yet."""
        wish, self._wish = self._wish, None
        return wish

    def close(self) -> None:
        """The thread ends with the client's connection."""
        self._closing.set()

    def _listen(self) -> None:
        while not self._closing.is_set():
            try:
                for event in self._client.watch_teleop_events(self._next_number):
                    self._next_number = event.number + 1
                    wish = wish_of(event)
                    if wish is not None:
                        logger.info("the operator (%s) says %s", event.source, wish.name.lower())
                        self._wish = wish
            except (errors.ManyhandsError, ValueError) as error:  # ValueError: the channel was closed.
                logger.debug("no operator events: %s", error)
                # A restarted agent counts its events anew.
                self._next_number = 0
            self._closing.wait(RECONNECT_S)
