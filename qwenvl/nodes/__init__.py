"""What ComfyUI's page shows: widgets, lists as inputs, the small nodes and the sidebar. Begin with widgets.py."""
