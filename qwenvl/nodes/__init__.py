"""What ComfyUI's page sees: widgets and lists in, the small nodes and the sidebar. Begin with widgets.py."""
