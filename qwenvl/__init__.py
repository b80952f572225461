"""The core behind the nodes and the command line, in rooms: see pipeline.py first, then the room of each step.

In the order of a run: nodes (widgets) -> request -> pipeline and session -> media (read), loading (load), prompting
(encode), decoding (generate), prompting (the answer). Beside them: models (the list of models), remote (engines that
run models elsewhere), report (diagnosis of the machine and of a run), comfyui (the interface to ComfyUI), cli.
"""
