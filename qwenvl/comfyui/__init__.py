"""All that is known of ComfyUI: folders, memory, cancel, progress, live text. Begin with host.py."""
