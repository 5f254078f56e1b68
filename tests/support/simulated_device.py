"""An engine process whose device is a clock; takes the place of services.inference.engine_process for benchmarks.

Units of a pi052 on the fused path are launched as on a GPU and are done when a GPU would be, and the host does all that it
does for one; what the network computes is left out after the first time, so chunks mean nothing.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from services.inference import engine_process
from services.inference.device_gate import DeviceGate
from services.inference.engine_process import EngineHost, exit_at_once

# Of a full-size pi052 on an H200 with one row (docs/benchmarks/2026-11-28-serving.md), and of text, which nobody asks for.
PREFIX_S, STEP_S, TEXT_S = 0.00827, 0.00075, 0.001
# Sleeping is late by as much; the rest is waited for awake, as a GPU's events are.
AWAKE_S = 0.0003


def simulated_model() -> type[Any]:
    from services.inference import fused_model

    class SimulatedModel(fused_model.FusedModel):
        runs_ahead = True
        _free_s = 0.0
        # Of the gate that opened last: when that was.
        _gate, _opened_s = 0, 0.0
        # When the unit that is being launched began, where that was at its gate.
        _began_s: float | None = None

        def _takes(self, seconds: float) -> None:
            self._free_s = max(time.monotonic(), self._free_s) + seconds

        def use_gate(self, gate: DeviceGate) -> None:
            super().use_gate(gate)
            self._gates = gate

        def see_ahead(self, gate: int) -> None:
            super().see_ahead(gate)
            threading.Thread(target=self._wait_at, args=(gate,)).start()

        def _wait_at(self, gate: int) -> None:
            while not self._gates.has_brought(gate):
                time.sleep(0.0001)
            self._gate, self._opened_s = gate, time.monotonic()

        def run_prefix(self, rows: Sequence[Any]) -> None:
            super().run_prefix(rows)
            if len(rows) == 1 and rows[0].gate and rows[0].gate == self._gate:
                self._began_s = self._opened_s
                self._free_s = max(self._free_s, self._opened_s + PREFIX_S)
            else:
                self._takes(PREFIX_S * len(rows))

        def run_expert(self, rows: Sequence[Any]) -> None:
            super().run_expert(rows)
            self._takes(STEP_S)

        def run_text_prefix(self, row: Any) -> Any:
            self._takes(TEXT_S)
            return super().run_text_prefix(row)

        def run_text(self, rows: Sequence[Any]) -> Any:
            self._takes(TEXT_S)
            return super().run_text(rows)

        def launched(self, launch: Callable[[], None]) -> Callable[[], float]:
            begin_s, self._began_s = max(time.monotonic(), self._free_s), None
            launch()
            begin_s = self._began_s or begin_s
            end_s = max(begin_s, self._free_s)

            def wait() -> float:
                _until(end_s)
                return end_s - begin_s

            return wait

        def wait(self) -> None:
            _until(self._free_s)

    return SimulatedModel


def _until(at_s: float) -> None:
    time.sleep(max(0.0, at_s - time.monotonic() - AWAKE_S))
    while time.monotonic() < at_s:
        time.sleep(0)


class SimulatedHost(EngineHost):
    def _load(self) -> Any:
        from services.inference import model_paths
        from services.inference.fused.graphs import Recorded

        run = Recorded.run

        def run_once(recorded: Any) -> Any:
            return recorded.outputs if hasattr(recorded, "outputs") else run(recorded)

        Recorded.run = run_once  # type: ignore[method-assign]
        model_paths.FusedModel = simulated_model()  # type: ignore[misc]
        return super()._load()


if __name__ == "__main__":
    exit_at_once(engine_process.main(sys.argv[1:], SimulatedHost))
