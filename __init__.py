"""ComfyUI_QwenVL: Qwen models as ComfyUI nodes. ComfyUI imports this file."""

if __package__:  # pytest imports this file too, as a module without a package
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
    from .qwenvl.report import startup_report

    startup_report()

    WEB_DIRECTORY = "./web"
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
