"""The engine behind the nodes and the command line. It knows ComfyUI in host.py only.

Reading order: request (what is asked) -> pipeline (the five steps) -> media, cache, loader, prompt, decode
(one step each) -> catalog and download (where a model lives) -> host (ComfyUI).
"""
