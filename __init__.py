"""ComfyUI_QwenVL: Qwen models as ComfyUI nodes. ComfyUI imports this file."""

if __package__:  # pytest imports this file too, as a module without a package
    from .nodes import MODELS, NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, Qwen, QwenVL
    from .qwenvl.comfyui.outputs import take_answers_for_outputs
    from .qwenvl.errors import name_errors_shortly
    from .qwenvl.models.catalog import keep_own
    from .qwenvl.nodes.clashes import warn_of_clashes
    from .qwenvl.nodes.older_prompts import take_them
    from .qwenvl.nodes.panel import add_routes
    from .qwenvl.report.findings import startup_report

    startup_report()
    warn_of_clashes(NODE_CLASS_MAPPINGS)
    keep_own()
    add_routes(MODELS)
    _asked = {name: node for name, node in NODE_CLASS_MAPPINGS.items() if issubclass(node, (Qwen, QwenVL))}
    take_them(_asked)
    take_answers_for_outputs(_asked)
    name_errors_shortly(NODE_CLASS_MAPPINGS.values())

    WEB_DIRECTORY = "./web"
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
