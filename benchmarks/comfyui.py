"""Our decode speed against ComfyUI's own Qwen3-VL: python -m benchmarks.comfyui COMFYUI --shape nano --device cpu

COMFYUI is a checkout that has such a model and whose requirements this Python has. ComfyUI generates from embeddings as
long as our prompt, so that only the loops are compared: the same shape, random weights, the same number of tokens.
Sides take turns as in benchmarks.decode. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Side, clock_for, command, device_name, ratio, rounds, versions
from benchmarks.models import DECODE, SHAPES, Shape, build, prompt
from qwenvl.decoding.decoder import Decoder
from qwenvl.request import Sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="nano")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    how = command("benchmarks.comfyui").replace(str(options.comfyui), "COMFYUI")
    torch.set_num_threads(1)
    shape, dtype = SHAPES[options.shape], getattr(torch, options.dtype)
    model = build(shape, options.device, dtype)
    inputs = prompt(model, 16 if options.shape in ("nano", "small") else 64, 64)
    decoder, length = Decoder(model, "sdpa", decode=DECODE), inputs["input_ids"].shape[1]
    calls = iter(range(10**6))

    def ours(tokens: int) -> Any:
        sampling = Sampling(do_sample=False, max_new_tokens=tokens)
        return decoder.generate(inputs, sampling, None, lambda rows: None, lambda: None, str(next(calls)))

    def generate(tokens: int) -> Any:
        return model.generate(**inputs, do_sample=False, max_new_tokens=tokens)

    version, theirs = _comfyui(options.comfyui.resolve(), shape, length, options.device, dtype)
    sides = {"ours": ours, "generate": generate, "comfyui": theirs}
    found = rounds(sides, options.tokens, options.rounds, clock_for(options.device))
    speeds = {name: [figures["tokens_per_s"] for figures in rounds] for name, rounds in found.items()}
    result = {
        "command": how,
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(options.device),
        "versions": {**versions(), "comfyui": version},
        "shape": options.shape,
        "dtype": options.dtype,
        "prompt_tokens": length,
        "new_tokens": options.tokens,
        "rounds": options.rounds,
        "tokens_per_s": {name: round(statistics.median(values), 1) for name, values in speeds.items()},
        "ratio_to_generate": ratio(speeds["ours"], speeds["generate"]),
        "ratio_to_comfyui": ratio(speeds["ours"], speeds["comfyui"]),
    }
    print(json.dumps(result))


def _comfyui(folder: Path, shape: Shape, length: int, device: str, dtype: torch.dtype) -> tuple[str, Side]:
    """Return ComfyUI's version, and its loop with a model of that shape."""
    sys.argv = ["main.py", *(["--cpu"] if device == "cpu" else [])]
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    import comfy.options

    comfy.options.enable_args_parsing()
    logging.getLogger().setLevel(logging.ERROR)
    import comfy.ops
    import comfyui_version
    from comfy.text_encoders import qwen3vl
    from comfy.text_encoders.llama import Qwen3VL_8BConfig

    class Config(Qwen3VL_8BConfig):
        head_dim = shape.head_dim
        rope_dims = model_rope_dims(shape.head_dim)

    qwen3vl.QWEN3VL_CONFIGS["bench"] = Config
    qwen3vl.QWEN3VL_VISION["bench"] = {"hidden_size": 64, "intermediate_size": 256, "depth": 1}
    qwen3vl.QWEN3VL_VISION["bench"] |= {"deepstack_visual_indexes": [0]}

    class Model(qwen3vl.Qwen3VL):
        model_type = "bench"

    sizes = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "lm_head": not shape.tied,
    }
    with torch.device(device):
        # manual_cast is what ComfyUI's text encoders use by default.
        model = Model(sizes, dtype, device, comfy.ops.manual_cast).eval()
    for weight in model.parameters():
        weight.requires_grad_(False).uniform_(-0.05, 0.05)
    embeds = torch.randn(1, length, shape.hidden, dtype=dtype, device=device)

    @torch.inference_mode()
    def run(tokens: int) -> Any:
        return model.generate(embeds, do_sample=False, max_length=tokens, stop_tokens=[], execution_dtype=dtype)

    return comfyui_version.__version__, run


def model_rope_dims(head_dim: int) -> list[int]:
    return {64: [12, 10, 10], 128: [24, 20, 20]}[head_dim]


if __name__ == "__main__":
    main()
