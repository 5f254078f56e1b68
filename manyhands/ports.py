"""Where each service listens unless told otherwise; one list, so that no two defaults collide."""

from __future__ import annotations

STORE = 50051
WEIGHTS = 50052
INFERENCE = 50053
LEARNER = 50054
FIRST_ROBOT = 50061  # The agents of more robots on one machine follow: 50062, ...
FIRST_ACTOR = 50071
DASHBOARD = 8080

DEFAULT_PORTS: dict[str, int] = {
    "store": STORE,
    "weights": WEIGHTS,
    "serve": INFERENCE,
    "learner": LEARNER,
    "robot": FIRST_ROBOT,
    "actor": FIRST_ACTOR,
    "dashboard": DASHBOARD,
}
