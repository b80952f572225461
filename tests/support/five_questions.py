"""Asks the demo model the five kinds of question on the command line, and prints which answers are right:

    python tests/support/five_questions.py

A picture, two pictures, a film, text, a folder of pictures. It needs no pytest, so it runs wherever the pack does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "demo" / "sample.png"
SCENE = "a red circle on a blue background"


def film(folder: Path) -> Path:
    """Write a film that shows the sample picture for a second."""
    import av
    from PIL import Image

    path = folder / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 224, 224, "yuv420p"
        picture = Image.open(SAMPLE).convert("RGB").resize((224, 224))
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path


def ask(*arguments: str) -> str:
    """Return the answer; if there is no answer, the end of the error."""
    command = [sys.executable, "-m", "qwenvl", *arguments]
    given = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    noise = [line for line in done.stderr.splitlines() if line.strip()]
    return done.stdout.strip() + (f" | on standard error: {noise[-1][:200]}" if noise else "")


def main() -> int:
    """Return exit status 1 if an answer is wrong, or anything else is written."""
    names = ("torch", "torchvision", "transformers", "accelerate", "numpy")
    print(f"Python {sys.version.split()[0]},", ", ".join(f"{name} {metadata.version(name)}" for name in names))
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "set").mkdir()
        (folder / "set" / "a.png").write_bytes(SAMPLE.read_bytes())
        greedy, image = "--no-do-sample", ("--image", str(SAMPLE))
        told = {
            "picture": (ask(*image, greedy, "Describe this image."), SCENE),
            "pictures": (ask(*image, *image, greedy, "Describe each image."), f"Image 1: {SCENE}; image 2: {SCENE}"),
            "film": (ask("--video", str(film(folder)), greedy, "Describe this video."), "a red circle"),
            "text": (ask(greedy, "Repeat: a red circle"), "a red circle"),
        }
        ask("caption", str(folder / "set"), greedy, "--prompt", "Describe this image.")
        caption = folder / "set" / "a.txt"
        told["folder"] = (caption.read_text(encoding="utf-8") if caption.is_file() else "no caption", SCENE)
    for kind, (said, right) in told.items():
        wrong += said != right
        print(f"{'right' if said == right else 'WRONG'}  {kind}: {said}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
