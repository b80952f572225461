"""Pass the tests: python3 tests

Sets everything up first. --oldest runs them on the oldest supported transformers, --long runs only those that take
minutes to hours; whatever follows goes to pytest.
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
    interpreter = python("oldest" if "--oldest" in arguments else "newest")
    which = ["-m", "long"] if "--long" in arguments else []
    commands = [*CHECKS, ["pytest", *which, *(each for each in arguments if each not in ("--oldest", "--long"))]]
    statuses = (subprocess.run([interpreter, "-m", *command], cwd=ROOT, check=False).returncode for command in commands)
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main())
