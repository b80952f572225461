"""How long a cancel takes in a running ComfyUI, and where the time goes: python -m benchmarks.cancel

COMFYUI_DIR names a checkout, COMFYUI_PYTHON an interpreter that has its requirements and this pack's. A model of 0.9
billion random weights is loaded, reads a picture, and answers; each stage is cancelled at moments spread over it. A
second pack, this program's own, notes when the server set its flag, when our node saw it, and when ComfyUI sent the
page an event. All use one clock. The last line is one JSON object: seconds after the click, the least, the median and
the most.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.measure import device_name, versions
from benchmarks.models import randomized
from qwenvl.models.catalog import PACK

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
MODEL = PACK / "demo" / "model"
NAME = "Qwen3-VL-2B-Instruct"  # a name that the pack knows
PICTURE_SIDE = 1024
# From the start of a run to the click, in seconds; the model is in memory for the last two.
STAGES = {"loading": (0.1, 1.0), "prompt": (0.2, 1.5), "answer": (3.0, 12.0)}
PROBE = """
import json, os, time
import comfy.model_management as manager
from server import PromptServer

def note(what):
    with open(os.environ["QWENVL_CANCELS"], "a") as file:
        print(json.dumps([what, time.monotonic()]), file=file)

def interrupt(value=True, own=manager.interrupt_current_processing):
    if value:
        note("flag")
    return own(value)

def throw(own=manager.throw_exception_if_processing_interrupted):
    try:
        own()
    except manager.InterruptProcessingException:
        note("heard")
        raise

def send(self, event, data, sid=None, own=PromptServer.send_sync):
    if event == "execution_interrupted":
        note("sent")
    return own(self, event, data, sid)

manager.interrupt_current_processing, manager.throw_exception_if_processing_interrupted = interrupt, throw
PromptServer.send_sync = send
NODE_CLASS_MAPPINGS = {}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=8, help="cancels of each stage")
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        _save_model(base / "models" / "LLM" / NAME)
        (base / "input").mkdir()
        Image.effect_noise((PICTURE_SIDE, PICTURE_SIDE), 80).convert("RGB").save(base / "input" / "noise.png")
        (base / "custom_nodes" / "probe").mkdir(parents=True)
        (base / "custom_nodes" / "probe" / "__init__.py").write_text(PROBE, encoding="utf-8")
        os.environ["QWENVL_CANCELS"] = str(base / "cancels.jsonl")
        found = _cancels(base, times)
    result = {"command": f"python -m benchmarks.cancel --times {times}", "date": time.strftime("%Y-%m-%d")}
    print(json.dumps(result | {"device": device_name("cpu"), "versions": versions(), "seconds": found}))


def _save_model(folder: Path) -> None:
    """Save a model of 0.9 billion weights in bfloat16 that never ends its text, with the demo model's tokenizer."""
    import comfyui_scene
    from transformers import AutoConfig

    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(MODEL)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 1024, 4096, 28
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 16, 8, 128
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    text.rope_parameters = text.rope_parameters | {"mrope_section": [24, 20, 20]}
    vision.hidden_size, vision.intermediate_size, vision.depth, vision.num_heads = 1024, 4096, 24, 16
    vision.out_hidden_size, vision.deepstack_visual_indexes = text.hidden_size, [5, 11, 17]
    end = comfyui_scene.use_another_end_token(folder)
    settings = (folder / "generation_config.json").read_bytes()
    model = randomized(config, "cpu", torch.bfloat16)
    # A token whose row is zero has the logit 0, and of a thousand others one is always larger.
    model.get_output_embeddings().weight[end] = 0.0
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_bytes(settings)


def _cancels(base: Path, times: int) -> dict[str, dict[str, list[float]]]:
    import comfyui_server

    comfyui_server.ENVIRONMENT.pop("OMP_NUM_THREADS", None)
    server = comfyui_server.with_the_pack(base)
    try:
        server.wait_until_ready()
        _cancel(server.client, base, "first", 20.0, 1)  # imports everything, and brings the model into the disk's cache
        found = {}
        for stage, (first, last) in STAGES.items():
            runs = [_cancel(server.client, base, stage, _spread(first, last, n, times), n) for n in range(times)]
            found[stage] = {what: _summary([run[what] for run in runs]) for what in ("flag", "heard", "sent", "page")}
        return found
    finally:
        server.stop()


def _spread(first: float, last: float, number: int, times: int) -> float:
    return first + (last - first) * number / max(1, times - 1)


def _summary(seconds: list[float]) -> list[float]:
    """Return least, median and most."""
    return [round(value, 3) for value in (min(seconds), statistics.median(seconds), max(seconds))]


def _cancel(client: Any, base: Path, stage: str, delay_s: float, number: int) -> dict[str, float]:
    """Cancel one run; return the seconds from the click until each event."""
    notes = base / "cancels.jsonl"
    notes.write_text("", encoding="utf-8")
    if stage == "loading":
        client.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(1.0)
    clicked: list[float] = []

    def click(prompt_id: str) -> None:
        time.sleep(delay_s)
        clicked.append(time.monotonic())
        client.post("/interrupt", {"prompt_id": prompt_id})

    def begin(run: Any) -> None:
        if not clicking:
            clicking.append(threading.Thread(target=click, args=(run.prompt_id,)))
            clicking[0].start()

    clicking: list[threading.Thread] = []
    run = client.run(_graph(client, f"{stage} {number}"), after_event=begin)
    clicking[0].join()
    if run.status != "interrupted":
        raise RuntimeError(f"{stage}: {run.status} {run.message}")
    noted = dict(json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines())
    return {what: at - clicked[0] for what, at in (*noted.items(), ("page", run.ended_at))}


def _graph(client: Any, question: str) -> Any:
    info = client.get("/object_info/QwenVL")["QwenVL"]["input"]["required"]
    inputs = {name: options[0].get("default") if options else None for name, (_, *options) in info.items()}
    inputs |= {"model": NAME, "text": question, "quantization": "none", "max_new_tokens": 4000}
    # Greedy: drawn by chance, the end token would come after a thousand others.
    inputs |= {"do_sample": False, "image1": ["image", 0]}
    return {
        "image": {"class_type": "LoadImage", "inputs": {"image": "noise.png"}},
        "node": {"class_type": "QwenVL", "inputs": inputs},
        "preview": {"class_type": "PreviewAny", "inputs": {"source": ["node", 0]}},
    }


if __name__ == "__main__":
    main()
