"""llama.cpp as a side of measure.rounds(): in this process by xllamacpp, or by the program llama-bench."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import Side

INSTALL = """\
llama.cpp is measured with the packages xllamacpp and gguf. Put them beside this environment:
    python -m pip install --no-deps --target FOLDER xllamacpp gguf
    PYTHONPATH=FOLDER python -m benchmarks.against ...
xllamacpp is not needed with --llama-bench."""


class Llama:
    """A model in llama.cpp's server, without its network: tokens in, tokens out.

    A prompt that was asked before is not computed again.
    """

    def __init__(self, file: Path, threads: int, context: int) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        parameters.n_ctx, parameters.n_parallel = context, 1
        parameters.fit_params = parameters.use_jinja = parameters.ui = False
        parameters.cache_ram_mib = 0
        parameters.port, parameters.verbosity = 0, 1
        self._server = xllamacpp.Server(parameters)
        self.about = {"xllamacpp": xllamacpp.__version__, "llama_system": xllamacpp.get_system_info().strip(" |")}

    def side(self, prompt: list[int]) -> Side:
        """Return a side of rounds() that continues that prompt, greedily."""

        def run(tokens: int) -> dict[str, Any]:
            asked = {
                "prompt": prompt,
                "n_predict": tokens,
                "ignore_eos": True,
                "temperature": 0,
                "samplers": ["temperature"],
                "cache_prompt": True,
            }
            answer = self._server.handle_completions(asked)
            made = answer["timings"]["predicted_n"]
            if made != tokens:
                raise RuntimeError(f"llama.cpp was asked for {tokens} tokens and made {made}: {answer}")
            return answer

        return run


class LlamaBench:
    """llama.cpp's own program, started for every measurement: loading and prompt are in the short answer's time too."""

    def __init__(self, program: str, file: Path, threads: int) -> None:
        options = {"-m": str(file), "-t": str(threads), "-p": "0", "-r": "1", "-o": "json"}
        self._command = [program, "--no-warmup", *(word for option in options.items() for word in option)]
        self.about: dict[str, Any] = {}

    def side(self, prompt: list[int]) -> Side:
        """Return a side of rounds() that makes tokens behind as many tokens as the prompt has."""

        def run(tokens: int) -> dict[str, Any]:
            command = [*self._command, "-n", str(tokens), "-d", str(len(prompt))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{command[0]} ended with status {done.returncode}: {done.stderr[-2000:]}")
            (answer,) = json.loads(done.stdout)
            self.about = {"llama_bench": answer["build_commit"], "llama_system": answer["cpu_info"]}
            return answer

        return run


def with_children(clock: Callable[[], float]) -> Callable[[], float]:
    """Return the clock; one of the process's own time then counts that of ended programs too."""
    if clock is not time.process_time:
        return clock
    import resource

    def both() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    return both
