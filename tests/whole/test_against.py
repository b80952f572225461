"""The benchmark beside llama.cpp: what is written for it, how it is measured, and, where it is installed, all of it."""

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest

from benchmarks import against, random_gguf
from benchmarks.llama import LlamaBench, with_children
from benchmarks.models import SHAPES, _config

ROOT = Path(__file__).resolve().parents[2]
HOW = "install it as CONTRIBUTING.md says"
needs_gguf = pytest.mark.skipif(not find_spec("gguf"), reason=f"the package gguf is not there: {HOW}")
needs_llama = pytest.mark.skipif(not find_spec("xllamacpp"), reason=f"the package xllamacpp is not there: {HOW}")
# Of 28 layers, those to which llama-quantize gives six bits in a Q4_K_M.
MORE_BITS = {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27}


@pytest.mark.parametrize("shape", ["nano", "0.6b", "8b"])
def test_the_matrices_are_those_of_our_own_model(shape):
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(_config(SHAPES[shape]))
    model.tie_weights()
    wanted = {name: weight for name, weight in model.named_parameters() if "visual" not in name and weight.ndim > 1}
    found = [sizes for _, sizes, _ in random_gguf.matrices(SHAPES[shape], "bf16")]
    assert sorted(found) == sorted(tuple(weight.shape) for weight in wanted.values())
    norms = [weight for name, weight in model.named_parameters() if "visual" not in name and weight.ndim == 1]
    assert sorted(sizes for _, sizes, _ in random_gguf.norms(SHAPES[shape])) == sorted(
        tuple(each.shape) for each in norms
    )


@pytest.mark.parametrize("name", ["attn_v", "ffn_down"])
def test_q4_k_m_has_six_bits_where_llama_cpp_has_them(name):
    types = {i: random_gguf.type_of(name, "Q4_K_M", i, 28) for i in range(28)}
    assert {i for i, type_ in types.items() if type_ == "Q6_K"} == MORE_BITS
    assert set(types.values()) == {"Q6_K", "Q4_K"}


def test_the_head_has_more_bits_and_so_has_an_embedding_that_is_the_head():
    ends = {name: type_ for name, _, type_ in random_gguf.matrices(SHAPES["0.6b"], "Q4_K_M") if "blk" not in name}
    assert ends == {"token_embd.weight": "Q6_K"}
    ends = {name: type_ for name, _, type_ in random_gguf.matrices(SHAPES["8b"], "Q4_K_M") if "blk" not in name}
    assert ends == {"token_embd.weight": "Q4_K", "output.weight": "Q6_K"}


@needs_gguf
@pytest.mark.parametrize("type_", random_gguf.IN_BLOCK)
def test_blocks_are_finite_weights_of_the_wanted_size(type_):
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    kind = GGMLQuantizationType[type_]
    made = random_gguf.blocks(type_, 512, numpy.random.default_rng(0))
    assert (random_gguf.IN_BLOCK[type_], made.shape[1]) == GGML_QUANT_SIZES[kind]
    weights = quants.dequantize(made, kind)
    assert numpy.isfinite(weights).all()
    assert 0.5 * random_gguf.LARGEST < numpy.abs(weights).max() <= 1.02 * random_gguf.LARGEST
    assert len(numpy.unique(weights)) > 100


@needs_gguf
@pytest.mark.parametrize(("shape", "kind"), [("nano", "bf16"), ("nano", "Q8_0"), ("small", "Q4_K_M")])
def test_the_file_says_what_the_model_is(tmp_path, shape, kind):
    from gguf import GGUFReader

    sizes, file = SHAPES[shape], tmp_path / "model.gguf"
    random_gguf.write(file, sizes, kind)
    reader = GGUFReader(file)
    told = {name: reader.get_field(f"qwen3.{name}").contents() for name in ("embedding_length", "block_count")}
    assert told == {"embedding_length": sizes.hidden, "block_count": sizes.layers}
    assert reader.get_field("general.architecture").contents() == "qwen3"
    assert reader.get_field("qwen3.attention.key_length").contents() == sizes.head_dim
    words = reader.get_field("tokenizer.ggml.tokens").contents()
    assert len(words) == len(set(words)) == sizes.vocabulary
    expected = {name: type_ for name, _, type_ in random_gguf.norms(sizes) + random_gguf.matrices(sizes, kind)}
    assert {tensor.name: tensor.tensor_type.name for tensor in reader.tensors} == expected


def test_a_shape_that_no_block_fits_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rows of 64 weights, and a block of Q4_K holds 256: take another shape"):
        random_gguf.write(tmp_path / "model.gguf", SHAPES["nano"], "Q4_K_M")
    assert not list(tmp_path.iterdir())


def test_the_ratio_is_of_each_round_with_its_range():
    speeds = {"ours": [10.0, 20.0, 9.0], "llama": [10.0, 40.0, 10.0]}
    found = {name: [{"tokens_per_s": each} for each in values] for name, values in speeds.items()}
    summary = against.figures(found)
    assert (summary["ratio"], summary["ratio_range"]) == (0.9, [0.5, 1.0])
    assert (summary["llama_tokens_per_s"], summary["llama_tokens_per_s_range"]) == (10.0, [10.0, 40.0])


def test_without_the_packages_it_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(against.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["against"])
    with pytest.raises(SystemExit, match=r"Not found: gguf, xllamacpp.*\n.*pip install .* xllamacpp gguf"):
        against.main()


def program(folder, text):
    """A program that stands for llama-bench."""
    script, file = folder / "llama_bench.py", folder / "llama-bench"
    script.write_text(f"import json, sys, time\n{text}\n")
    # Not the interpreter in the first line: its path may hold spaces.
    file.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    file.chmod(0o755)
    return str(file)


ANSWER = """
assert "--no-warmup" in sys.argv
json.dump([{"build_commit": "abc", "cpu_info": "a CPU", "arguments": sys.argv[1:]}], sys.stdout)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the program that stands for llama-bench is started by its #! line")
def test_llama_bench_is_asked_for_that_many_tokens_behind_the_prompt(tmp_path):
    bench = LlamaBench(program(tmp_path, ANSWER), tmp_path / "model.gguf", 2)
    told = " ".join(bench.side([1, 2, 3])(16)["arguments"])
    assert all(each in told for each in (f"-m {tmp_path / 'model.gguf'}", "-t 2", "-p 0", "-n 16", "-d 3"))
    assert bench.about == {"llama_bench": "abc", "llama_system": "a CPU"}


@pytest.mark.skipif(sys.platform == "win32", reason="the program that stands for llama-bench is started by its #! line")
def test_what_llama_bench_says_when_it_fails_is_told(tmp_path):
    bench = LlamaBench(program(tmp_path, "sys.exit('no such model')"), tmp_path / "model.gguf", 1)
    with pytest.raises(RuntimeError, match="ended with status 1: no such model"):
        bench.side([1])(16)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell the time of ended programs")
def test_on_one_thread_the_work_of_llama_bench_is_counted():
    clock = with_children(time.process_time)
    before = clock()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 1: pass"], check=True)
    assert clock() - before >= 0.9
    assert with_children(time.perf_counter) is time.perf_counter


@needs_gguf
@needs_llama
@pytest.mark.parametrize(("shape", "quantization"), [("nano", "none"), ("nano", "8bit"), ("small", "4bit")])
def test_it_measures_both(tmp_path, shape, quantization):
    command = [sys.executable, "-m", "benchmarks.against", "--shape", shape, "--quantization", quantization]
    more = ["--tokens", "4", "--rounds", "2", "--context", "12", "--folder", str(tmp_path)]
    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    found = json.loads(last)
    assert [line.split()[0] for line in lines[-3:]] == ["ours", "llama.cpp", "ratio"]
    assert found["tier"] == "own step"
    for name in ("ours_tokens_per_s", "llama_tokens_per_s", "ratio"):
        low, high = found[f"{name}_range"]
        assert 0 < low <= found[name] <= high
    assert found["xllamacpp"]
    assert found["command"] == f"python -m {' '.join([*command[2:], *more])}"
    assert [file.name for file in tmp_path.iterdir()] == [f"{shape}-{against.KINDS[quantization]}.gguf"]
