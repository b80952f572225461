"""The interface to ComfyUI: folders, memory, cancel, progress, live text. Begin with host.py."""
