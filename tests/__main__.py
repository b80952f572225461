"""Pass the tests: python3 tests

Sets everything up first. --oldest runs them on the oldest supported transformers, --newest on the newest that the
package index has, where its warnings of what goes away are errors; --long runs only those that take minutes to hours,
--release only what must hold before a version is published; whatever follows goes to pytest. Files of tests run beside
each other, on all cores; -n 0 runs them one after the other.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "demo"))

from environment import python  # noqa: E402

# Of transformers, beside the one that is pinned.
VERSIONS = ("oldest", "newest")
# Tests that are run alone, where they are asked for.
MARKS = ("long", "release")
# Files of tests beside each other, one for each core; and no test may hang. In the order of their names: xdist would
# begin with the files that have the most tests, and end with those of few long ones, for which one core waits.
SIDE_BY_SIDE = ("-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder", "--timeout", "900")
CHECKS = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"])


def main() -> int:
    """Exit status of the first check that fails, or of pytest."""
    arguments = sys.argv[1:]
    versions = next((entry for entry in VERSIONS if f"--{entry}" in arguments), "pinned")
    interpreter = str(python(versions))
    which = [part for mark in MARKS if f"--{mark}" in arguments for part in ("-m", mark)]
    # What takes hours, or is one test, is run by itself.
    which += [] if which or "-n" in arguments else SIDE_BY_SIDE
    which += ["--no-deprecated"] if versions == "newest" else []
    ours = [f"--{value}" for value in (*VERSIONS, *MARKS)]
    commands = [*CHECKS, ["pytest", *which, *(argument for argument in arguments if argument not in ours)]]
    statuses = (subprocess.run([interpreter, "-m", *command], cwd=ROOT, check=False).returncode for command in commands)
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main())
