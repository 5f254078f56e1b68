"""The one command: manyhands COMMAND [flags]. Commands are a closed table, imported only when they run."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import __version__, config, errors, logs
from .cli_help import command_help, overview


@dataclass(frozen=True, kw_only=True)
class Command:
    """One line of the table.

    Attributes:
        module: Holds Settings and main(settings) -> exit code.
        summary: For the list of commands.
        extra: What to install for it, "" when the plain package is enough.
    """

    module: str
    summary: str
    extra: str = ""


COMMANDS: dict[str, Command] = {
    "demo": Command(
        module="deploy.demo.main",
        summary="three simulated robots record, learn and act, on one machine",
        extra="learn",
    ),
    "robot": Command(
        module="robot_agent.main",
        summary="robot PC: own one robot's devices and judge every command",
        extra="robot",
    ),
    "actor": Command(
        module="actor.main",
        summary="robot PC: drive one robot through episodes, by policy or person",
        extra="robot",
    ),
    "record": Command(module="actor.record", summary="record a teleoperator's episodes on a running actor", extra="robot"),
    "rollout": Command(module="actor.rollout", summary="let a served policy act on a running actor", extra="robot"),
    "serve": Command(
        module="services.inference.main",
        summary="GPU host: run policies for many robots",
        extra="serve",
    ),
    "simulate-fleet": Command(
        module="services.inference.simulate_fleet",
        summary="how many robots a GPU carries, without the GPU",
        extra="serve",
    ),
    "loadtest": Command(
        module="services.loadtest.main",
        summary="simulated robots against a running inference service",
        extra="serve",
    ),
    "weights": Command(
        module="services.weights.main",
        summary="keep versions of policies for learners and services",
        extra="serve",
    ),
    "store": Command(
        module="dataset_store.main",
        summary="keep episodes, hand out training data",
        extra="serve",
    ),
    "learner": Command(
        module="learner.main",
        summary="cluster: train policies from the store and publish them",
        extra="learn",
    ),
    "dashboard": Command(
        module="services.dashboard.main",
        summary="local web page: robots, chunks, latency, episodes, learning",
        extra="serve",
    ),
    "policy": Command(
        module="policies.main",
        summary="make, inspect and check policy checkpoints",
        extra="serve",
    ),
    "dataset": Command(
        module="dataset_store.tools",
        summary="inspect, check and export datasets",
        extra="serve",
    ),
    "doctor": Command(
        module="manyhands.doctor",
        summary="check versions, ports, devices, GPU and disk; say what to do",
    ),
    "lab-certificates": Command(
        module="manyhands.lab_certificates",
        summary="make certificates and tokens for all roles of a lab",
    ),
}

OUR_PACKAGES = frozenset({"manyhands", *(command.module.partition(".")[0] for command in COMMANDS.values())})

# Which extra brings a third-party module. A module that is not here comes with the plain package.
EXTRA_OF_MODULE = {
    "torch": "serve",
    "safetensors": "serve",
    "uvloop": "serve",
    "aiohttp": "serve",
    "av": "serve",
    "pyarrow": "serve",
    "ray": "learn",
    "websockets": "compare",
    "msgpack": "compare",
    "tqdm": "learn",
    "matplotlib": "learn",
    "metaworld": "sim",
    "mujoco": "sim",
    "gymnasium": "sim",
    "playwright": "dev",
}

USAGE_ERROR = 2
FAILURE = 1
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: the command's own; 2 when what the user asked for cannot be, 1 for another failure, 130 after Ctrl-C."""
    try:
        code = _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has gone, as in "| head"; Python would complain once more while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    return code


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview({name: command.summary for name, command in COMMANDS.items()}))
        return 0 if words else USAGE_ERROR
    if words[0] in ("-V", "--version", "version"):
        print(f"manyhands {__version__}")
        return 0
    name = words[0]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"; did you mean 'manyhands {close[0]}'?" if close else ""
        return _complain("", f"unknown command {name!r}{hint}; 'manyhands --help' lists all", USAGE_ERROR)
    try:
        return _run(name, words[1:])
    except errors.ManyhandsError as error:
        users_fault = isinstance(error, errors.InvalidInput | errors.Refused | errors.NotFound | errors.AlreadyExists)
        return _complain(name, str(error), USAGE_ERROR if users_fault else FAILURE)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if not missing or missing in OUR_PACKAGES:
            raise
        return _complain(name, missing_module_advice(name, missing), USAGE_ERROR)
    except KeyboardInterrupt:
        return INTERRUPTED


def missing_module_advice(command: str, module: str) -> str:
    extra = EXTRA_OF_MODULE.get(module) or COMMANDS[command].extra
    # "learn" has most of "serve": who runs the learner needs one install, not two.
    if COMMANDS[command].extra == "learn" and extra == "serve":
        extra = "learn"
    target = f"manyhands[{extra}]" if extra else "manyhands"
    return f"this command needs {module}, which is not installed: run  pip install '{target}'"


def _run(name: str, flags: Sequence[str]) -> int:
    command = COMMANDS[name]
    module: Any = _import_command(command.module)
    try:
        settings = config.load(module.Settings, flags)
    except config.HelpAsked:
        print(command_help(name, command.summary, module.__doc__ or "", module.Settings))
        return 0
    except errors.InvalidInput as error:
        return _complain(name, f"{error}\n'manyhands {name} --help' shows every setting", USAGE_ERROR)
    logs.set_up(settings.log_level, process=name, as_json=settings.log_json)
    return int(module.main(settings))


def _import_command(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise errors.NotOffered(f"this installation has no {module}") from None
        raise


def _complain(command: str, message: str, code: int) -> int:
    first, *rest = message.splitlines() or [""]
    print(f"manyhands{' ' if command else ''}{command}: {first}", *(f"  {line}" for line in rest), sep="\n", file=sys.stderr)
    return code
