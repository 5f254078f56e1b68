"""What the server's device did during a load, by the server's metrics page."""

from __future__ import annotations

import time
import urllib.request
from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families

from services.inference.engine_process import LOAD_PERIOD_S
from tests.benchmarks.serving.loads import Found

PREFIX = "manyhands_inference_device_"
# As the page's readers know them, in this order.
KINDS = {
    "prefix": "prefix",
    "expert": "steps",
    "text_prefix": "slices of questions",
    "draft_check": "drafts",
    "text": "text steps",
}
# The engine tells what the device did once a period; then it is on the page.
SETTLE_S = LOAD_PERIOD_S + 0.5

Totals = dict[str, dict[str, float]]


class Meter:
    """Reads the page; made when a load begins."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"
        self._before = self._read()

    def found(self, seconds: float) -> Found:
        """Since the beginning, when the load has ended, which took so many seconds."""
        time.sleep(SETTLE_S)
        return between(self._before, self._read(), seconds)

    def _read(self) -> Totals:
        with urllib.request.urlopen(self._url, timeout=10) as response:
            return totals(response.read().decode())


def totals(metrics_page: str) -> Totals:
    """By name (seconds, units, rows; gap_seconds) and kind, of all models together."""
    found: Totals = {name: defaultdict(float) for name in ("seconds", "units", "rows", "gap_seconds")}
    for family in text_string_to_metric_families(metrics_page):
        for sample in family.samples:
            name = sample.name.removeprefix(PREFIX).removesuffix("_total")
            if sample.name == f"{PREFIX}{name}_total" and name in found:
                found[name][sample.labels.get("kind", "")] += sample.value
    return found


def between(before: Totals, after: Totals, seconds: float) -> Found:
    """Of each of so many seconds; kinds of which nothing ran are left out."""

    def since(name: str, kind: str) -> float:
        return after[name][kind] - before[name][kind]

    return {
        "kinds": {
            kind: {
                "ms_per_s": since("seconds", kind) / seconds * 1e3,
                "units_per_s": since("units", kind) / seconds,
                "mean_rows": since("rows", kind) / since("units", kind),
            }
            for kind in KINDS
            if since("units", kind) > 0
        },
        "between_ms_per_s": since("gap_seconds", "") / seconds * 1e3,
    }


def line(found: Found) -> str:
    kinds = [
        f"{KINDS[kind]} {use['ms_per_s']:.0f} ({use['units_per_s']:.0f} units of {use['mean_rows']:.1f})"
        for kind, use in found["kinds"].items()
    ]
    return ", ".join([*kinds, f"between units {found['between_ms_per_s']:.0f}"])
