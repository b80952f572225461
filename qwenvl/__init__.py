"""The engine behind the nodes and the command line. It knows ComfyUI in host.py only.

Reading order: request (what is asked) -> pipeline (the five steps) -> media, cache, loader, prompt, batch, decode,
answer (one step each) -> catalog and download (where a model lives) -> remote (an engine in place of the steps) ->
report and diagnostics (what this machine and a run tell of themselves) -> host (ComfyUI). The README's tree names
every module in a line.
"""
