"""`transformers serve` on loopback: a real OpenAI-compatible engine for the tests and the benchmark.

Run as a program, it is that engine: python engine.py FOLDER PORT
"""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

START_S = 120


class Served:
    """The engine in a process of its own, with the model in the folder.

    Args:
        folder: the model's folder. Its path is the engine's name for the model, and must not contain "@".
        log: file for the engine's output.
    """

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.model = str(folder)
        self.address = ("127.0.0.1", port)
        self.base_url = f"http://127.0.0.1:{port}/v1"
        self._log = log
        quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(log.parent / "no hub")}
        with log.open("w") as file:
            command = [sys.executable, __file__, str(folder), str(port)]
            self._process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **quiet})

    def __enter__(self) -> Served:
        health = self.base_url.replace("/v1", "/health")
        end = time.monotonic() + START_S
        while time.monotonic() < end and self._process.poll() is None:
            try:
                urllib.request.urlopen(health, timeout=5).close()
                return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        self.__exit__()
        raise RuntimeError(f"transformers serve did not start:\n{self._log.read_text()[-3000:]}")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _decode_image(data, mode=None, **_):
    """Replace torchvision.io.decode_image, which lacks its operators with a CPU build of torch."""
    import numpy as np
    import torch
    from PIL import Image

    content = data.numpy().tobytes() if isinstance(data, torch.Tensor) else Path(data).read_bytes()
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


def main(folder: str, port: str) -> None:
    import torch
    import torchvision.extension
    import torchvision.io

    torch.set_num_threads(1)
    if not torchvision.extension._has_ops():
        torchvision.io.decode_image = _decode_image
    from transformers.cli.transformers import main as transformers

    sys.argv = ["transformers", "serve", folder, "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    transformers()


if __name__ == "__main__":
    main(*sys.argv[1:])
