"""Pass the tests: python3 tests

Sets everything up first. --oldest runs them on the oldest supported transformers; whatever follows goes to pytest.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "demo"))

from environment import python  # noqa: E402

CHECKS = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"])


def main() -> int:
    """Exit status of the first check that fails, or of pytest."""
    arguments = sys.argv[1:]
    oldest = "--oldest" in arguments
    interpreter = python("oldest" if oldest else "newest")
    commands = [*CHECKS, ["pytest", *(each for each in arguments if each != "--oldest")]]
    statuses = (subprocess.run([interpreter, "-m", *command], cwd=ROOT, check=False).returncode for command in commands)
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main())
