"""ComfyUI_QwenVL: Qwen models as ComfyUI nodes. ComfyUI imports this file."""

if __package__:  # pytest imports this file too, as a module without a package
    from .nodes import MODELS, NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
    from .qwenvl.older_prompts import take_them
    from .qwenvl.panel import add_routes
    from .qwenvl.report import startup_report

    startup_report()
    add_routes(MODELS)
    take_them({name: NODE_CLASS_MAPPINGS[name] for name in ("QwenVL", "Qwen", "Qwen2.5VL", "Qwen2.5", "Qwen2VL")})

    WEB_DIRECTORY = "./web"
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
