"""The core behind the nodes and the command line, in rooms: see pipeline.py first, then the room of each step.

In the order of a run: nodes (widgets) -> request -> pipeline and session -> media (read), loading (load), prompting
(encode), decoding (generate), prompting (the answer). Beside them: models (which there are), remote (an engine in place
of a model here), report (what a machine and a run tell of themselves), comfyui (all that is known of ComfyUI), cli.
"""
