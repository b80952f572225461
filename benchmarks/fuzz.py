"""Millions of hostile files and texts, guided by the coverage they reach: python -m benchmarks.fuzz --target boxes

Needs atheris (pip install atheris), which nothing else requires. tests/support/targets.py has the targets and what each
must hold to. Without --target every target runs, each in a process of its own and for --executions; the last line is
one JSON object. A finding ends its target, and its input is written to --findings, from where it should become a test.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# The Python packages that are instrumented.
OURS = ("qwenvl", "json", "yaml", "PIL")
# Seconds after which an input counts as a hang, and the memory limit.
LONGEST_S, MOST_MB = 10, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--target", action="append", help="one of tests/support/targets.py, or one:executions; may be repeated"
    )
    parser.add_argument("--executions", type=int, default=10_000, help="of each target")
    parser.add_argument("--seconds", type=int, default=3600, help="the most for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest-input", type=int, default=512, help="bytes")
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "qwenvl-findings")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        _fuzz(options)
        return
    from tests.support.targets import TARGETS

    start, results = time.perf_counter(), {}
    for asked in options.target or TARGETS:
        name, _, executions = asked.partition(":")
        options.executions = int(executions or options.executions)
        results[name] = _in_a_process(name, options)
        print(name, json.dumps(results[name]), flush=True)
    print(json.dumps(_summary(results, time.perf_counter() - start)))


def _in_a_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one target in a process, which libFuzzer ends, perhaps by a signal."""
    options.findings.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.fuzz", "--inside", "--target", name]
    for option in ("executions", "seconds", "seed", "longest_input", "findings"):
        command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    output = done.stderr + done.stdout
    counts = re.findall(r"^#(\d+)\s.*?cov: (\d+) ft: (\d+) corp: (\d+)", output, re.MULTILINE)
    executions, covered, features, corpus = map(int, counts[-1]) if counts else (0, 0, 0, 0)
    ended = re.findall(r"^Done (\d+) in", output, re.MULTILINE)
    result = {
        "executions": int(ended[-1]) if ended else executions,
        "coverage": covered,
        "features": features,
        "corpus": corpus,
        "seconds": round(time.perf_counter() - start, 1),
        "finding": "",
    }
    # A process that is done may still be ended by the timer for hangs.
    if done.returncode and not ended:
        errors = [line for line in output.splitlines() if "Error" in line or "ERROR" in line or "Exception" in line]
        kept = re.findall(r"Test unit written to (\S+)", output)
        result["finding"] = f"{errors[0] if errors else f'status {done.returncode}'} {' '.join(kept)}"
    return result


def _summary(results: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    return {
        "executions": sum(result["executions"] for result in results.values()),
        "targets": results,
        "findings": [f"{name}: {result['finding']}" for name, result in results.items() if result["finding"]],
        "seconds": round(seconds, 1),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("atheris", "torch", "pillow", "av", "pyyaml")},
        },
        "date": time.strftime("%Y-%m-%d"),
    }


def _fuzz(options: argparse.Namespace) -> None:
    import atheris

    # Before our modules are imported, because they are instrumented at import.
    with atheris.instrument_imports(include=list(OURS), enable_loader_override=False):
        from qwenvl.log import log
        from tests.support.targets import TARGETS
    (name,) = options.target
    target = TARGETS[name]
    log.logger.propagate = False
    log.logger.addHandler(_Formatted())
    folder = Path(tempfile.mkdtemp(prefix=f"qwenvl-corpus-{name}-"))
    for number, seed in enumerate(target.seeds()):
        (folder / str(number)).write_bytes(seed)
    words = folder.with_suffix(".dict")
    # The format of libFuzzer's dictionaries.
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
    arguments = {
        "atheris_runs": options.executions,
        "max_len": options.longest_input,
        "seed": options.seed,
        "max_total_time": options.seconds,
        "timeout": LONGEST_S,
        "rss_limit_mb": MOST_MB,
        "artifact_prefix": f"{options.findings}/{name}-",
        **({"dict": words} if target.words else {}),
    }
    atheris.Setup([sys.argv[0], *(f"-{key}={value}" for key, value in arguments.items()), str(folder)], target)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    atheris.Fuzz()


def _escaped(word: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word.encode())


class _Formatted(logging.Handler):
    """Formats every line of the log, and writes none."""

    def emit(self, record: logging.LogRecord) -> None:
        record.getMessage()


if __name__ == "__main__":
    main()
