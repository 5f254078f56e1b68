"""Who may move the robot, whether a command is executed and as what, and what happens when none comes.

Pure: no thread, no socket, no device; the clock is an argument and what must survive a restart goes through Memory. The
agent calls it from its robot thread only.

The lease: one holder, an epoch that only grows, an end ttl after the last live command. Without a valid command for
watchdog_s the robot holds, then parks, then drops, as its rules say. An emergency stop ends the lease and latches until
somebody at the robot clears it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from manyhands.errors import AlreadyExists, InvalidInput, Refused
from manyhands.robot.types import Authority, RobotMode, RobotStatus

from .limits import Limiter
from .robot import Readings, Rest, SafetyRules, Vector

MAX_TTL_S = 60.0


class Memory(Protocol):
    """See state.StateDirectory."""

    def last_epoch(self) -> int: ...
    def save_epoch(self, epoch: int) -> None: ...
    def stop_reason(self) -> str | None: ...
    def latch_stop(self, reason: str) -> None: ...


class Duty(enum.Enum):
    """What the agent's own loop must do in this control period."""

    NOTHING = "nothing"  # Commands drive the robot.
    HOLD = "hold"
    PARK = "park"
    DROP = "drop"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """executed (N,) goes to the robot; clamped names the elements that a limit changed."""

    executed: Vector
    clamped: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Health:
    """Of one reading at one moment."""

    valid: bool
    age_s: float
    reason: str


@dataclass(kw_only=True)
class _Lease:
    epoch: int
    holder: str
    authority: Authority
    request_id: str
    ttl_s: float
    renewed_s: float
    last_sequence: int = 0
    commanded: bool = False

    def ends_s(self) -> float:
        return self.renewed_s + self.ttl_s


class SafetyCore:
    """See the module. clock answers monotonic seconds, on the scale of Reading.captured_ns."""

    def __init__(
        self,
        rules: SafetyRules,
        *,
        control_rate_hz: float,
        memory: Memory,
        clock: Callable[[], float],
        constrain: Callable[[Vector, Readings], Vector] = lambda action, readings: action,
    ) -> None:
        self.rules = rules
        self.limiter = Limiter(rules.elements, control_rate_hz)
        self._memory = memory
        self._clock = clock
        self._constrain = constrain
        self._epoch = memory.last_epoch()
        self._stop_reason = memory.stop_reason()
        self._stop_on_disk = self._stop_reason is not None
        self._lease: _Lease | None = None
        self._fault = ""
        self._last: Vector | None = None  # Executed in the previous control period; None after any break.
        self._quiet_since_s = clock()  # Last valid command, or start of the present rest.
        self._watchdog_armed = False
        self._held = False  # Hold() was called; the next valid command ends it.
        self._clamped_count = 0
        self._refused_count = 0
        self._hold_count = 0

    # Authority.

    def acquire(self, holder: str, authority: Authority, ttl_s: float, request_id: str) -> int:
        """The epoch of a new lease, on disk before it is answered; the same one for a repeated request."""
        now = self._clock()
        if not holder:
            raise InvalidInput("must name who asks, as in actor/left-arm", field="holder")
        if authority not in (Authority.POLICY, Authority.HUMAN):
            raise InvalidInput("must be POLICY or HUMAN", field="authority")
        if not (math.isfinite(ttl_s) and 0 < ttl_s <= MAX_TTL_S):
            raise InvalidInput(f"ttl ({ttl_s} s) must be over 0 and at most {MAX_TTL_S:g} s", field="ttl")
        self._refuse_when_stopped()
        lease = self._live_lease(now)
        if lease is not None:
            if request_id and (lease.holder, lease.request_id) == (holder, request_id):
                lease.renewed_s = now  # Who asks is alive, and about to command.
                return lease.epoch
            remaining = lease.ends_s() - now
            raise Refused(
                f"{lease.holder} has the robot under epoch {lease.epoch}; its lease ends {remaining:.1f} s after its last "
                "command, or when it releases",
                field="holder",
                retry_after_s=remaining,
            )
        epoch = self._epoch + 1
        self._memory.save_epoch(epoch)
        self._epoch = epoch
        self._lease = _Lease(
            epoch=epoch, holder=holder, authority=authority, request_id=request_id, ttl_s=ttl_s, renewed_s=now
        )
        self._last = None
        return epoch

    def release(self, epoch: int) -> None:
        if self._lease is not None and self._lease.epoch == epoch:
            self._end_lease()

    def begin_episode(self, epoch: int) -> None:
        """Before and after a reset: the lease is asked for and renewed, the watchdog starts anew, steps count from here."""
        now = self._clock()
        self._refuse_when_stopped()
        lease = self._require_lease(epoch, now)
        lease.renewed_s = now
        lease.commanded = False
        self._watchdog_armed = False
        self._quiet_since_s = now
        self._held = False
        self._last = None

    def renew(self, epoch: int) -> None:
        """While the agent itself drives for the holder, as in going home; refused like a command once a stop, a hold or
        another holder came in between."""
        now = self._clock()
        self._refuse_when_stopped()
        self._refuse_in_fault()
        lease = self._require_lease(epoch, now)
        if self._held:
            raise Refused("somebody called Hold; reset again when the robot may move", field="hold")
        lease.renewed_s = now
        self._quiet_since_s = now

    # Commands.

    def judge(
        self,
        *,
        epoch: int,
        sequence: int,
        wanted: Vector,
        age_s: float,
        readings: Readings,
        measured: Callable[[], Vector],
        torques: Callable[[], Vector | None],
    ) -> Judgement:
        """What to execute for a command.

        wanted is (N,); measured and torques, (N,) each, are asked for only once the readings are known to be valid.

        Raises:
            Refused: Emergency stop, fault, no or another lease, stale command or stale state. The robot does not move.
            AlreadyExists: A sequence that is not above the last one.
            InvalidInput: Values that are not finite, or an impossible age.
        """
        try:
            return self._judge(epoch, sequence, wanted, age_s, readings, measured, torques)
        except (Refused, AlreadyExists, InvalidInput):
            self._refused_count += 1
            raise

    def refuse(self) -> None:
        """Counts a command that was refused before it reached judge()."""
        self._refused_count += 1

    def _judge(
        self,
        epoch: int,
        sequence: int,
        wanted: Vector,
        age_s: float,
        readings: Readings,
        measured: Callable[[], Vector],
        torques: Callable[[], Vector | None],
    ) -> Judgement:
        now = self._clock()
        self._refuse_when_stopped()
        self._refuse_in_fault()
        self._watch(now)
        lease = self._require_lease(epoch, now)
        if sequence <= lease.last_sequence:
            raise AlreadyExists(
                f"sequence {sequence} was used; the last of epoch {epoch} is {lease.last_sequence}", field="sequence"
            )
        finite = np.isfinite(wanted)
        if wanted.shape != (len(self.rules.elements),) or not finite.all():
            name = self.limiter.names[int(np.argmin(finite))] if wanted.shape == finite.shape == (len(finite),) else "action"
            raise InvalidInput("must be finite", field=name)
        if not (math.isfinite(age_s) and age_s >= 0):
            raise InvalidInput(f"age ({age_s} s) must be >= 0", field="age")
        if age_s > self.rules.max_command_age_s:
            raise Refused(
                f"the observation behind this action is {age_s:.3f} s old, the bound is {self.rules.max_command_age_s:g} s; "
                "act on a newer one",
                field="age",
            )
        for name in self.rules.required_states:
            health = self.health(readings).get(name)
            if health is None or not health.valid:
                reason = "was not read" if health is None else health.reason
                raise Refused(f"no command without a valid {name}: {reason}", field=name)
        here = measured()
        if not np.isfinite(here).all():
            raise Refused("the measured position is not finite", field=self.limiter.names[int(np.argmin(np.isfinite(here)))])

        executed = self._approach(wanted, here, torques(), readings)
        clamped = tuple(self.limiter.changed(wanted, executed))
        lease.last_sequence = sequence
        lease.renewed_s = now
        lease.commanded = True
        self._watchdog_armed = True
        self._held = False
        self._quiet_since_s = now
        self._clamped_count += bool(clamped)
        return Judgement(executed=executed, clamped=clamped)

    def approach(self, target: Vector, here: Vector, torques: Vector | None, readings: Readings) -> Vector:
        """One limited step towards target, for parking and going home."""
        return self._approach(target, here, torques, readings)

    def _approach(self, wanted: Vector, here: Vector, torques: Vector | None, readings: Readings) -> Vector:
        last = here if self._last is None else self._last
        executed = self._constrain(self.limiter.limit(wanted, last, here, torques), readings)
        self._last = executed
        return executed

    # Resting.

    def hold(self) -> None:
        """Hold() was called: nothing moves until the next valid command."""
        self._held = True
        self._watchdog_armed = False
        self._last = None

    def stop(self, reason: str) -> None:
        """Emergency stop, in force when this returns. The caller stills the robot and then calls remember_stop()."""
        if self._stop_reason is None:
            self._stop_reason = reason or "no reason given"
            self._stop_on_disk = False
            self._end_lease()

    def remember_stop(self) -> None:
        """Puts the stop on disk, so that it outlives the process; as slow as the disk. A failure leaves it in force."""
        if self._stop_reason is not None and not self._stop_on_disk:
            self._memory.latch_stop(self._stop_reason)
            self._stop_on_disk = True

    def fail(self, reason: str) -> None:
        """A device failed: no command is executed any more."""
        self._fault = self._fault or reason
        self._last = None

    def duty(self) -> Duty:
        """Called at least every control period: expires the lease, fires the watchdog, notices a cleared stop."""
        now = self._clock()
        if self._stop_reason is not None:
            if self._stop_on_disk and self._memory.stop_reason() is None:
                self._stop_reason = None
                self._quiet_since_s = now
            else:
                return Duty.DROP if self.rules.on_emergency_stop is Rest.DROP else Duty.HOLD
        lease = self._live_lease(now)
        self._watch(now)
        if lease is not None and not self._held and not self._fault and now - self._quiet_since_s < self.rules.watchdog_s:
            return Duty.NOTHING
        resting_s = now - self._quiet_since_s - self.rules.watchdog_s
        dropping = self.rules.drop_after_s is not None and resting_s >= self.rules.drop_after_s
        # A robot in fault does not set out for its park pose.
        parking = self.rules.park_after_s is not None and resting_s >= self.rules.park_after_s and not self._fault
        if parking and not dropping:
            return Duty.PARK  # Its steps follow one another: the last one stays known.
        self._last = None
        return Duty.DROP if dropping else Duty.HOLD

    # Looking.

    def health(self, readings: Readings) -> Mapping[str, Health]:
        """Per reading: invalid when its device said so or when it is older than max_state_age_s."""
        now = self._clock()
        healths: dict[str, Health] = {}
        for name, reading in readings.items():
            age_s = max(0.0, now - reading.captured_ns / 1e9)
            if not reading.valid:
                healths[name] = Health(valid=False, age_s=age_s, reason=reading.reason or "the device did not answer")
            elif age_s > self.rules.max_state_age_s:
                reason = f"{age_s:.3f} s old, the bound is {self.rules.max_state_age_s:g} s"
                healths[name] = Health(valid=False, age_s=age_s, reason=reason)
            else:
                healths[name] = Health(valid=True, age_s=age_s, reason="")
        return healths

    def status(self) -> RobotStatus:
        now = self._clock()
        self._watch(now)
        lease = self._live_lease(now)
        if self._stop_reason is not None:
            mode = RobotMode.EMERGENCY_STOP
        elif self._fault:
            mode = RobotMode.FAULT
        elif lease is None:
            mode = RobotMode.IDLE
        elif self._held or not lease.commanded or now - self._quiet_since_s >= self.rules.watchdog_s:
            mode = RobotMode.HOLDING
        else:
            mode = RobotMode.ACTIVE
        return RobotStatus(
            mode=mode,
            lease_epoch=self._epoch,
            lease_holder=lease.holder if lease else "",
            authority=lease.authority if lease else Authority.NONE,
            fault=self._fault or (f"emergency stop: {self._stop_reason}" if self._stop_reason is not None else ""),
            clamped_count=self._clamped_count,
            refused_count=self._refused_count,
            hold_count=self._hold_count,
        )

    @property
    def fault(self) -> str:
        return self._fault

    @property
    def stopped(self) -> bool:
        return self._stop_reason is not None

    def _watch(self, now: float) -> None:
        """The watchdog. Armed by a command; a release, a reset or Hold() disarms it, so that it counts losses only."""
        if self._watchdog_armed and now - self._quiet_since_s >= self.rules.watchdog_s:
            self._watchdog_armed = False
            self._last = None
            self._hold_count += 1

    def _live_lease(self, now: float) -> _Lease | None:
        if self._lease is not None and now >= self._lease.ends_s():
            if self._watchdog_armed:
                self._hold_count += 1
            self._end_lease()
        return self._lease

    def _require_lease(self, epoch: int, now: float) -> _Lease:
        lease = self._live_lease(now)
        if lease is None or lease.epoch != epoch:
            holder = f"{lease.holder} has the robot under epoch {lease.epoch}" if lease else "nobody has the robot"
            raise Refused(f"epoch {epoch} has no lease any more; {holder}. Acquire control first", field="epoch")
        return lease

    def _end_lease(self) -> None:
        self._lease = None
        self._watchdog_armed = False
        self._last = None

    def _refuse_in_fault(self) -> None:
        if self._fault:
            raise Refused(f"the robot is in fault: {self._fault}; see to the device and restart the agent", field="fault")

    def _refuse_when_stopped(self) -> None:
        if self._stop_reason is not None:
            raise Refused(
                f"emergency stop ({self._stop_reason}); somebody at the robot clears it with 'manyhands robot --clear-stop'",
                field="emergency_stop",
            )
