"""The most memory that this process held. Standard library only, for processes of their own too."""

import sys
from pathlib import Path


def begin() -> None:
    """Forget what was held until now, where the system can: on Linux."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> int:
    """Return the most that was held since begin().

    On Linux from the process's own status: what getrusage says counts the process that started this one, so beside a
    large parent every growth would be 0.
    """
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) // 1024
    import resource

    # Kilobytes, but bytes on a Mac.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1 << 20 if sys.platform == "darwin" else 1 << 10)
