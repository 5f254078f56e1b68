"""What every process that starts others needs."""

from __future__ import annotations

import shutil
import signal


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> list[str]:
    """Words before a command that have the kernel end it with its parent; none where there is no setpriv (util-linux).

    Not a preexec_fn: that makes Python fork instead of vfork, and a fork under gRPC's threads kills the child at times.
    """
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", number.name.removeprefix("SIG"), "--"] if setpriv else []
