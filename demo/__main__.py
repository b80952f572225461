"""Describe the sample picture with the shipped model: python3 demo

Sets everything up first. Whatever follows goes to the command line instead: python3 demo --image my.png "What is this?"
"""

import os
import subprocess
import sys

from environment import ROOT, python

SAMPLE = ["--image", str(ROOT / "demo" / "sample.png"), "--no-do-sample", "Describe this image."]


def main() -> int:
    command = [str(python()), "-m", "qwenvl", *(sys.argv[1:] or SAMPLE)]
    return subprocess.run(command, env=dict(os.environ, PYTHONPATH=str(ROOT)), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
