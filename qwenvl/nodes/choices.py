"""Facts for the page's list of models: which are on this machine, how large they are, and how much memory there is."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..comfyui import host
from ..loading.budget import model_bytes
from ..loading.devices import device_choices, gpus
from ..models import catalog
from ..models.builtin import Model
from ..models.discovery import describe
from ..models.download import default_policy, why_forbidden
from ..settings import ALL_GPUS, ALL_GPUS_AND_CPU, AUTO, QUANTIZATIONS


def facts() -> dict[str, Any]:
    """Collect, for JSON: all models by name, bytes of memory by device, and why downloads are forbidden, if so."""
    roots = host.model_roots()
    return {
        "models": {name: _model(model, roots) for name, model in catalog.all_models(roots).items()},
        "memory": {choice: _memory(choice) for choice in device_choices()},
        "forbidden": why_forbidden(default_policy()),
    }


def _model(model: Model, roots: Sequence[Path]) -> dict[str, Any]:
    if model.engine:
        return {"place": "elsewhere", "disk": 0, "memory": {}}
    folder = catalog.locate(model, roots)
    found = describe(folder) if folder else None
    disk = found.bytes_on_disk if found else model.size.disk if model.size else 0
    memory = dict(model.size.memory) if model.size else {}
    if folder and not memory:
        memory = _bytes_in_memory(folder, (folder / "config.json").stat().st_mtime_ns)
    place = "here" if folder else "hub" if model.repo_id else "damaged"
    return {"place": place, "disk": disk, "memory": memory}


@functools.lru_cache(maxsize=256)
def _bytes_in_memory(folder: Path, _changed: int) -> dict[str, int]:
    """Compute the bytes in memory, by quantization, of a model whose sizes are not built in."""
    return {quantization: model_bytes(folder, torch.bfloat16, quantization) for quantization in QUANTIZATIONS}


def _memory(choice: str) -> int:
    """Sum the total bytes of the chosen devices, memory in use included: ComfyUI makes room."""
    every = {
        AUTO: (host.device() or "cpu",),
        ALL_GPUS: gpus(),
        ALL_GPUS_AND_CPU: (*gpus(), "cpu"),
    }
    return sum(map(host.total_bytes, every.get(choice, (choice,))))
