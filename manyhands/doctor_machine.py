"""The machine: ports, devices, GPU, rendering, disk, memory, clock, limits."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from . import ports
from .doctor_report import Check, State

_GIB = 2**30
# A first start of torch or of a software renderer on a busy small machine takes tens of seconds.
_SUBPROCESS_TIMEOUT_S = 90.0

_ASK_TORCH = """
import torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(torch.__version__, "; ".join(names), sep="|")
"""
_RENDER = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><light pos='0 0 3'/><geom size='1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 32, 32) as renderer:
    renderer.update_scene(data)
    assert renderer.render().max() > 0, "the picture is black"
"""


def check_ports(wanted: Mapping[str, int] = ports.DEFAULT_PORTS) -> list[Check]:
    """A line for each default port: free, one of ours, or somebody else's."""
    return [_check_port(service, port) for service, port in wanted.items()]


def _check_port(service: str, port: int) -> Check:
    name = f"port {port}"
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            holder, is_ours = _port_holder(port)
            if is_ours:
                return Check(name=name, state=State.OK, detail=f"{service}: {holder} listens")
            return Check(
                name=name,
                state=State.WARN,
                detail=f"{service}: taken by {holder}",
                advice=f"stop it, or start  manyhands {service}  with another --address",
            )
    return Check(name=name, state=State.OK, detail=f"{service}: free")


def _port_holder(port: int) -> tuple[str, bool]:
    """The listening process, and whether it is a manyhands command."""
    try:
        for link in psutil.net_connections(kind="tcp"):
            if link.laddr and link.laddr.port == port and link.status == psutil.CONN_LISTEN and link.pid:
                process = psutil.Process(link.pid)
                return f"{process.name()} (pid {link.pid})", is_our_command(process.cmdline())
    except psutil.Error:
        pass
    return "another user's process", False


def is_our_command(command_line: Sequence[str]) -> bool:
    """Whether it runs the script manyhands, or Python with -m manyhands."""
    return "manyhands" in [Path(word).name for word in command_line[:2]] or list(command_line[1:3]) == ["-m", "manyhands"]


def check_cameras(devices: Path = Path("/dev")) -> list[Check]:
    return [_check_device_files("cameras", sorted(devices.glob("video*")), "video")]


def check_serial_ports(devices: Path = Path("/dev")) -> list[Check]:
    found = [path for pattern in ("ttyUSB*", "ttyACM*") for path in sorted(devices.glob(pattern))]
    return [_check_device_files("serial ports", found, "dialout")]


def _check_device_files(name: str, paths: list[Path], group: str) -> Check:
    if not paths:
        return Check(name=name, state=State.OK, detail="none (only a PC with a real robot has some)")
    listing = ", ".join(str(path) for path in paths)
    closed = [path for path in paths if not os.access(path, os.R_OK | os.W_OK)]
    if closed:
        refused = ", ".join(str(path) for path in closed)
        advice = f"sudo usermod -aG {group} $USER, then log in again"
        return Check(name=name, state=State.WARN, detail=f"{listing}; no permission for {refused}", advice=advice)
    return Check(name=name, state=State.OK, detail=listing)


def check_gpu(*, ask_torch: bool = True) -> list[Check]:
    """torch, if there, is asked in a process of its own: nothing here loads it, and a broken driver kills only that."""
    has_device = Path("/dev/nvidia0").exists()
    if importlib.util.find_spec("torch") is None:
        if has_device:
            advice = "for serving or learning here: pip install 'manyhands[serve]'"
            return [Check(name="gpu", state=State.WARN, detail="a device, but torch is not installed", advice=advice)]
        return [Check(name="gpu", state=State.OK, detail="none, and torch is not installed: fine for a robot PC")]
    if not ask_torch:
        return [Check(name="gpu", state=State.OK, detail="a device" if has_device else "none; torch computes on the CPU")]
    code, output = _run_python(_ASK_TORCH)
    if code != 0:
        advice = "reinstall torch for this machine: https://pytorch.org/get-started/locally"
        return [Check(name="gpu", state=State.FAIL, detail=f"torch does not start: {output}", advice=advice)]
    version, _, names = output.partition("|")
    if names:
        return [Check(name="gpu", state=State.OK, detail=f"{names} (torch {version})")]
    if has_device:
        advice = "install torch's CUDA build, or a driver that fits it (nvidia-smi shows the driver's CUDA version)"
        return [Check(name="gpu", state=State.WARN, detail=f"a device that torch {version} does not see", advice=advice)]
    return [Check(name="gpu", state=State.OK, detail=f"none; torch {version} computes on the CPU")]


def check_rendering(*, render: bool = True) -> list[Check]:
    """Whether simulated cameras work without a screen: EGL (with or without a GPU), else OSMesa."""
    install_egl = "sudo apt-get install -y libegl1 libgl1"
    if importlib.util.find_spec("mujoco") is None:
        return [Check(name="rendering", state=State.OK, detail="not needed: the simulators (extra sim) are not installed")]
    if not render:
        if ctypes.util.find_library("EGL"):
            return [Check(name="rendering", state=State.OK, detail="libEGL is there; not tried")]
        return [Check(name="rendering", state=State.WARN, detail="no libEGL", advice=install_egl)]
    failures: list[str] = []
    for backend in ("egl", "osmesa"):
        code, output = _run_python(_RENDER, {"MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend})
        if code == 0:
            advice = "" if backend == "egl" else f"export MUJOCO_GL=osmesa, or for speed: {install_egl}"
            state = State.OK if backend == "egl" else State.WARN
            return [Check(name="rendering", state=state, detail=f"MuJoCo renders through {backend}", advice=advice)]
        failures.append(f"{backend}: {output}")
    return [Check(name="rendering", state=State.WARN, detail="; ".join(failures), advice=install_egl)]


def _run_python(program: str, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit code and the last line said."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=_SUBPROCESS_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {_SUBPROCESS_TIMEOUT_S:g} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode, lines[-1] if lines else ""


def check_disk(folder: Path) -> list[Check]:
    free_gib = shutil.disk_usage(folder).free / _GIB
    detail = f"{free_gib:.1f} GiB free at {folder.resolve()}"
    # An hour of one robot with two cameras is about 1 GiB of video.
    if free_gib < 1:
        return [Check(name="disk", state=State.FAIL, detail=detail, advice="free at least 1 GiB, or use another --folder")]
    if free_gib < 10:
        advice = "10 GiB last for some hours of recording; keep data on a larger disk"
        return [Check(name="disk", state=State.WARN, detail=detail, advice=advice)]
    return [Check(name="disk", state=State.OK, detail=detail)]


def check_memory() -> list[Check]:
    available_gib = psutil.virtual_memory().available / _GIB
    checks = [Check(name="memory", state=State.OK, detail=f"{available_gib:.1f} GiB available")]
    if available_gib < 3:
        advice = "the demo needs about 3 GiB, a robot PC 0.5 GiB: close something"
        checks = [Check(name="memory", state=State.WARN, detail=f"{available_gib:.1f} GiB available", advice=advice)]
    shared = Path("/dev/shm")
    if shared.is_dir():
        shared_gib = shutil.disk_usage(shared).free / _GIB
        if shared_gib < 0.5:
            advice = "in a container: start it with --shm-size=2g (Ray keeps its objects there)"
            detail = f"{shared_gib:.2f} GiB free in {shared}"
            checks.append(Check(name="shared memory", state=State.WARN, detail=detail, advice=advice))
        else:
            checks.append(Check(name="shared memory", state=State.OK, detail=f"{shared_gib:.1f} GiB free"))
    return checks


def check_clock(*, num_sleeps: int = 50) -> list[Check]:
    """Resolution of the monotonic clock, and by how much a sleep of 1 ms is late: what a control loop lives on."""
    resolution_us = time.get_clock_info("monotonic").resolution * 1e6
    late_ms: list[float] = []
    for _ in range(num_sleeps):
        start = time.monotonic()
        time.sleep(0.001)
        late_ms.append((time.monotonic() - start - 0.001) * 1e3)
    median_ms = statistics.median(late_ms)
    detail = f"resolution {resolution_us:.3g} us; a 1 ms sleep ends {median_ms:.2f} ms late, {max(late_ms):.2f} ms at worst"
    if resolution_us > 1000 or median_ms > 2:
        advice = "control loops will jitter: check CPU load, power saving and the virtual machine's timer"
        return [Check(name="clock", state=State.WARN, detail=detail, advice=advice)]
    return [Check(name="clock", state=State.OK, detail=detail)]


def check_open_files() -> list[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 1024:
        advice = "ulimit -n 4096 before starting servers"
        return [Check(name="open files", state=State.WARN, detail=f"limit {soft} (hard {hard})", advice=advice)]
    return [Check(name="open files", state=State.OK, detail=f"limit {soft}")]


def check_browser() -> list[Check]:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return [Check(name="browser", state=State.OK, detail=path)]
    advice = "only to run the dashboard's tests: sudo apt-get install -y chromium"
    return [Check(name="browser", state=State.WARN, detail="no chromium", advice=advice)]
