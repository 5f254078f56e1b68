"""A UnitEngine of a tiny pi052 on the CPU: what robots ask it, and what the plain module makes of the same."""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time

import numpy as np
import torch

from manyhands.inference.v1 import inference_pb2
from policies.policy import CommittedPrefix, Sample, TextKind, TextRequest
from services.inference.engine_port import Answer, Job, Observed, Row, TextEnd
from services.inference.fused_model import FusedModel
from services.inference.unit_engine import UnitEngine
from tests.support import prompted_lab
from tests.support.prompted_lab import CAMERA, CPU, HORIZON, STATE
from tests.support.questions import question_about

TOLERANCE = 1e-5
SUBTASK = TextRequest(kind=TextKind.SUBTASK)
DRAWN = TextRequest(kind=TextKind.SUBTASK, temperature=1.0, top_p=0.9)


def make_policy(policy_type="pi052", **changes):
    policy = prompted_lab.policy(policy_type, max_new_tokens=12, **changes).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.network.named_parameters():
        if "modulation" in name:  # Fresh ones are zero: every step would see the same expert.
            parameter.data.normal_(std=0.2, generator=generator)
    return policy


def sample(seed, *, task="tidy up"):
    random_numbers = np.random.default_rng(seed)
    picture = random_numbers.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Sample(observation={CAMERA: picture, STATE: random_numbers.uniform(-1, 1, 2).astype(np.float32)}, task=task)


def row(seed, *, prefix=None, delay_steps=0, execution_horizon=HORIZON, task="tidy up"):
    given = sample(seed, task=task)
    return Row(
        sample=Observed(observation=given.observation, task=given.task),
        prefix=prefix,
        delay_steps=delay_steps,
        execution_horizon=execution_horizon,
        seed=seed,
    )


def plain(policy, asked):
    """(T, R), by the plain module, alone."""
    committed = None
    if asked.prefix is not None:
        actions = torch.zeros(1, HORIZON, policy.model_action_size)
        actions[0, : len(asked.prefix)] = torch.from_numpy(asked.prefix)
        committed = CommittedPrefix(
            actions=actions,
            length=torch.tensor([len(asked.prefix)]),
            delay_steps=torch.tensor([asked.delay_steps]),
            execution_horizon=torch.tensor([asked.execution_horizon]),
        )
    inputs = policy.preprocess([Sample(observation=asked.sample.observation, task=asked.sample.task)], CPU)
    chunk = policy.act(inputs, policy.draw_noise([asked.seed]), committed)
    return policy.postprocess(chunk, inputs)[0], policy.carried(chunk, inputs)[0].numpy()


def submit(engine, owner, asked, *, deadline_s=30.0, request_id=1, rehearse=None, gate=0):
    outcomes = queue.Queue()
    now_s = time.monotonic()
    engine.submit(
        owner=owner,
        request_id=request_id,
        arrived_s=now_s,
        deadline_s=now_s + deadline_s,
        job=Job(model="tiny", row=asked, done=outcomes.put, rehearse=rehearse, gate=gate),
    )
    return outcomes


def answer_of(outcomes):
    outcome = outcomes.get(timeout=30.0)
    assert isinstance(outcome, Answer), outcome
    return outcome


def hold(engine):
    """The engine does nothing until the gate opens: it, and the thread that waits for that."""
    entered, gate = threading.Event(), threading.Event()

    def wait():
        entered.set()
        assert gate.wait(30.0)

    holding = threading.Thread(target=engine.between_passes, args=(wait,))
    holding.start()
    assert entered.wait(30.0)
    return gate, holding


def near(found, expected):
    return np.linalg.norm(found - expected) <= TOLERANCE * np.linalg.norm(expected)


KINDS = {
    TextKind.SUBTASK: inference_pb2.TEXT_KIND_SUBTASK,
    TextKind.MEMORY: inference_pb2.TEXT_KIND_MEMORY,
    TextKind.INTERJECTION: inference_pb2.TEXT_KIND_INTERJECTION,
    TextKind.VISUAL_QUESTION: inference_pb2.TEXT_KIND_VISUAL_QUESTION,
}


def ask(engine, request, *, seed=1, deadline_s=30.0, owner="", heard=None):
    """How to stop it, and what is heard; heard: A queue that hears it, or a new one."""
    given, heard = sample(seed), heard or queue.Queue()
    question = question_about(
        Observed(observation=given.observation, task=given.task),
        deadline_s=deadline_s,
        owner=owner,
        kind=KINDS[request.kind],
        user_text=request.user_text,
        previous_text=request.previous_text,
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
    )
    return engine.ask(question, heard.put), heard


def whole_text(heard):
    text = ""
    while isinstance(piece := heard.get(timeout=30.0), str):
        text += piece
    assert isinstance(piece, TextEnd)
    assert piece.error is None, piece.error
    return text


class SlowDevice:
    """Stands between an engine and its model: units are launched at once and done when they are let go, in order."""

    def __init__(self, model, monkeypatch):
        self.launched, self._gates, self._runs = [], queue.Queue(), model.launched
        monkeypatch.setattr(type(model), "runs_ahead", True)
        monkeypatch.setattr(model, "launched", self.launch)
        for name in ("run_prefix", "run_expert", "run_text_prefix", "run_text"):
            monkeypatch.setattr(model, name, functools.partial(self._run, name, getattr(model, name)))

    def _run(self, name, run, rows):
        self.launched.append(name)
        return run(rows)

    def launch(self, launch):
        gate, wait = threading.Event(), self._runs(launch)
        self._gates.put(gate)

        def until_let_go():
            assert gate.wait(30.0)
            return wait()

        return until_let_go

    def let_go(self, num=1):
        for _ in range(num):
            self._gates.get(timeout=30.0).set()

    def has_launched(self, *names):
        """Waits for it, and a moment longer for more than that."""
        end_s = time.monotonic() + 5.0
        while len(self.launched) < len(names) and time.monotonic() < end_s:
            time.sleep(0.001)
        time.sleep(0.02)
        assert self.launched == list(names)


class FakeGpu:
    """torch.cuda's events of a device whose time passes when a test says so."""

    def __init__(self, monkeypatch):
        self.now_s, self.waited = 0.0, []
        # Whether it is still at what was launched last.
        self.is_behind = False
        monkeypatch.setattr(torch.cuda, "Event", functools.partial(FakeEvent, self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)

    def runs(self, seconds):
        self.now_s += seconds

    stands_still = runs


class FakeEvent:
    def __init__(self, gpu, *, enable_timing):
        assert enable_timing
        self._gpu = gpu

    def record(self, stream):
        self.at_s = self._gpu.now_s

    def query(self):
        return not self._gpu.is_behind

    def synchronize(self):
        self._gpu.waited.append(self.at_s)

    def elapsed_time(self, end):
        """In ms."""
        return (end.at_s - self.at_s) * 1e3


class Stall:
    """Calls of a function wait, from the first one on, until they are let go; of: Those of one thread, by its name."""

    def __init__(self, monkeypatch, where, name, *, of=""):
        self.entered, self.gate, run = threading.Event(), threading.Event(), getattr(where, name)

        def stalled(*arguments, **named):
            if of in threading.current_thread().name:
                self.entered.set()
                assert self.gate.wait(30.0)
            return run(*arguments, **named)

        monkeypatch.setattr(where, name, stalled)


def let_go_until(device, condition):
    """One unit after the other."""
    end_s = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < end_s
        if not device._gates.empty():
            device.let_go()
        time.sleep(0.005)


def wait_for(condition):
    end_s = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)


class Clock:
    """The engine's, which a test can push on."""

    def __init__(self):
        self.pushed_s = 0.0

    def __call__(self):
        return time.monotonic() + self.pushed_s


# Fewer units than a chunk of the tiny policy has.
MAX_AHEAD = 4


@contextlib.contextmanager
def running(policy, **options):
    """A started engine of four rows and four texts; its model is "tiny"."""
    made = UnitEngine({"tiny": FusedModel("tiny", policy, CPU, max_rows=4, max_texts=4)}, max_rows=4, max_texts=4, **options)
    made.start()
    try:
        yield made
    finally:
        made.stop()


@contextlib.contextmanager
def running_ahead(policy, monkeypatch, clock):
    """An engine whose device runs behind it, and the device."""
    with running(policy, clock=clock) as made:
        device = SlowDevice(made.models["tiny"], monkeypatch)
        # Expected to take as good as no time: only how many may be ahead holds the engine back.
        monkeypatch.setattr(made._scheduler.times, "likely_s", lambda *_: 0.0)
        monkeypatch.setattr(made._device, "_max_ahead", MAX_AHEAD)
        yield made, device
        monkeypatch.undo()
        while not device._gates.empty():
            device.let_go()
