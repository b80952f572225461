"""The process that measures: it reads names of lines, one JSON object each, and replies with figures.

It catches only NotMeasured. After any other error the process ends, and with it the state that the error left, on the
device too. runner.py reads the error from the output, and starts another process.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import time
from typing import Any, TextIO

from benchmarks.gpu.bench import Bench, Line, NotMeasured, Options


def main() -> None:
    """Measure lines. The arguments are the module whose lines() are measured, and the options as JSON."""
    replies = _own_output()
    faulthandler.enable()  # so that a crash prints a traceback
    module, options = sys.argv[1], Options(**json.loads(sys.argv[2]))
    by_name: dict[str, Line] = {line.name: line for line in importlib.import_module(module).lines(options)}
    bench = Bench(options)
    _say(replies, {"ready": True})
    for request in sys.stdin:
        asked = json.loads(request)
        bench.ends = time.monotonic() + asked["seconds"]
        # A line that hangs is ended from outside; just before, this prints where it is.
        faulthandler.dump_traceback_later(max(0.5, asked["seconds"] - 1))
        reply = _measured(by_name[asked["line"]], bench)
        faulthandler.cancel_dump_traceback_later()
        _say(replies, reply)


def _measured(line: Line, bench: Bench) -> dict[str, Any]:
    try:
        result = line.measure(bench)
        bench.settle()
    except NotMeasured as error:
        return {"status": "not measured", "why": str(error)}
    return {"status": "measured", "result": result}


def _own_output() -> TextIO:
    """Keep standard output for replies: what libraries print there goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _say(replies: TextIO, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
