"""How much memory a process has taken, of the host and of the GPU."""

from __future__ import annotations

import re
import resource
import sys
import threading
from pathlib import Path

from qavp_export.engines.cuda.driver import Device
from qavp_export.errors import QavpError, UnavailableError

_INTERVAL_S = 0.01
_STATUS = Path("/proc/self/status")


def host_peak() -> int:
    """Returns the most bytes of host memory that this process has had at once."""
    if _STATUS.exists():
        # Not getrusage: what a process had before it started a program counts there as the program's.
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class DeviceMemory:
    """Watches the memory of the GPU from a thread; what was in use when it began does not count.

    The driver tells what all processes use together: nothing else may begin to use the GPU meanwhile.

    Attributes:
        device_name: The GPU's name; None without one.
    """

    def __init__(self) -> None:
        """Begins to watch, where there is a GPU."""
        self._stop = threading.Event()
        self._peak = 0
        self._thread: threading.Thread | None = None
        self.device_name: str | None = None
        try:
            device = Device.open()
        except UnavailableError:
            return
        self.device_name = device.name
        self._before = device.memory_used()
        self._thread = threading.Thread(target=self._watch, args=(device,), daemon=True)
        self._thread.start()

    def stop(self) -> int | None:
        """Stops, and returns the most bytes that were in use at once; None where that is not known."""
        if self._thread is None:
            return None
        self._stop.set()
        self._thread.join()
        return max(self._peak - self._before, 0)

    def _watch(self, device: Device) -> None:
        try:
            device.make_current()
            while True:
                self._peak = max(self._peak, device.memory_used())
                if self._stop.wait(_INTERVAL_S):
                    break
            self._peak = max(self._peak, device.memory_used())
        except QavpError:
            # A GPU that fails tells the engine so, too.
            return
