"""Numbers of the work for Prometheus, at Ray's endpoint of each node, as `ray_xtal_NAME`."""

import os
import sys
from collections.abc import Mapping
from typing import Any


class Gauges:
    """The newest values of a process's numbers; without Ray there is nobody to tell."""

    def __init__(self) -> None:
        self._gauges: dict[str, Any] = {}

    def set(self, numbers: Mapping[str, float], **labels: str) -> None:
        """Tell the newest values; a name has the same labels each time."""
        if "ray" not in sys.modules:
            return
        from ray.util.metrics import Gauge

        # Of processes with equal labels Ray tells the sum alone.
        labels |= {"pid": str(os.getpid())}
        for name, value in numbers.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"xtal_{name}", tag_keys=tuple(labels))
            self._gauges[name].set(value, labels)
