"""Installs what depends on torch, and leaves the torch that is there alone: ComfyUI-Manager runs it after
requirements.txt; by hand, python install.py in ComfyUI's environment. What is installed already stays as it is.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata, util

# Everything else that they need comes with ComfyUI.
PACKAGES = {
    "accelerate": "accelerate>=1.0",  # loads weights straight onto the GPU, without a copy in RAM first
    "bitsandbytes": "bitsandbytes>=0.45",  # the quantization choices 4bit and 8bit
}


def main() -> int:
    """Exit status of the installer; 0 where nothing is missing."""
    missing = [wanted for name, wanted in PACKAGES.items() if not _is_installed(name)]
    if not missing:
        return 0
    # Environments made by uv have no pip.
    pip = [sys.executable, "-m", "pip"] if util.find_spec("pip") else ["uv", "pip"]
    target = [] if util.find_spec("pip") else ["--python", sys.executable]
    return subprocess.run([*pip, "install", *target, "--no-deps", *missing], check=False).returncode  # noqa: S603


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
