"""The process that measures: it reads the names of lines, one JSON object each, and answers each with its figures.

It catches nothing but NotMeasured: after any other error the process ends, and with it whatever state the error left,
on the device too. runner.py reads the error from what was printed, and starts another one.
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
    """Arguments: the module whose lines() are measured, and the options as JSON."""
    replies = _own_output()
    faulthandler.enable()  # so that a crash tells where it was
    module, options = sys.argv[1], Options(**json.loads(sys.argv[2]))
    by_name: dict[str, Line] = {line.name: line for line in importlib.import_module(module).lines(options)}
    bench = Bench(options)
    _say(replies, {"ready": True})
    for request in sys.stdin:
        asked = json.loads(request)
        bench.ends = time.monotonic() + asked["seconds"]
        # A line that hangs is ended from outside: this tells where it was.
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
    """Standard output for replies alone: what libraries print there goes to the errors."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _say(replies: TextIO, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
