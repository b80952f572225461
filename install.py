"""Install the packages that depend on torch without replacing torch itself.

ComfyUI-Manager runs this after requirements.txt, at every update too; by hand, run python install.py in ComfyUI's
environment. Installed packages stay as they are, unless they are too old. Standard library only.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

# Everything that these depend on comes with ComfyUI.
PACKAGES = {
    "accelerate": "1.1",  # loads weights straight onto the GPU, without a copy in RAM first
    "bitsandbytes": "0.45",  # the quantization choices 4bit and 8bit
}
PACK = Path(__file__).resolve().parent
MODELS = "custom_models.json"


def main() -> int:
    """Install what is missing; return the installer's exit status, 0 if nothing is missing, 1 without an installer."""
    bring_back_models(PACK)
    missing = [f"{name}>={oldest}" for name, oldest in PACKAGES.items() if not is_installed(name, oldest)]
    if not missing:
        return 0
    installer = find_installer()
    if installer is None:
        print(
            f"{' and '.join(missing)} cannot be installed: this Python has neither pip nor uv, and there is no uv in "
            f"the path. Install one of them (https://docs.astral.sh/uv), then run: {sys.executable} {__file__}",
            file=sys.stderr,
        )
        return 1
    return subprocess.run([*installer, "--no-deps", *missing], check=False).returncode


def is_installed(name: str, oldest: str) -> bool:
    """Return True if that version or a later one is installed."""
    try:
        return _numbers(metadata.version(name) or "") >= _numbers(oldest)
    except metadata.PackageNotFoundError:
        return False


def find_installer() -> list[str] | None:
    """Return the command that installs into this Python, None without pip and uv; uv's environments have no pip."""
    if util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install"]
    uv = [sys.executable, "-m", "uv"] if util.find_spec("uv") else [path] if (path := shutil.which("uv")) else None
    return uv and [*uv, "pip", "install", "--python", sys.executable]


def bring_back_models(pack: Path) -> None:
    """Restore the user's custom_models.json, once, after ComfyUI-Manager has stashed it away.

    Before an update, ComfyUI-Manager puts every change aside with `git stash` and leaves it there. At its next start
    the pack copies the file to a folder that updates do not touch.
    """
    git = shutil.which("git")
    if git is None or not (pack / ".git").exists():
        return
    file = pack / MODELS
    if not file.is_file() or file.read_bytes().split() != (_git(git, pack, "show", f"HEAD:{MODELS}") or b"").split():
        return  # it is the user's own already
    mark = (
        pack / (_git(git, pack, "rev-parse", "--git-path", "qwenvl-models-brought-back") or b".git/x").decode().strip()
    )
    stashed = _newest_stash(git, pack)
    if stashed is None or (mark.is_file() and mark.read_text(encoding="utf-8") == stashed):
        return
    file.write_bytes(_git(git, pack, "show", f"{stashed}:{MODELS}") or b"")
    mark.write_text(stashed, encoding="utf-8")
    print(f"{MODELS} has your models again: an update had put them aside (git stash).")


def _newest_stash(git: str, pack: Path) -> str | None:
    """Return the newest stash that changes custom_models.json, None if none does."""
    for stash in (_git(git, pack, "log", "--walk-reflogs", "--format=%H", "refs/stash", "--") or b"").decode().split():
        then, before = (_git(git, pack, "show", f"{commit}:{MODELS}") for commit in (stash, f"{stash}^1"))
        if then and then != before:
            return stash
    return None


def _git(git: str, pack: Path, *arguments: str) -> bytes | None:
    """Return what git prints; None if it fails."""
    done = subprocess.run([git, "-C", str(pack), *arguments], capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"[0-9]+(\.[0-9]+)*", version)
    return tuple(map(int, found[0].split("."))) if found else (0,)


if __name__ == "__main__":
    sys.exit(main())
