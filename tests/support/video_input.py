"""Stands for ComfyUI's VIDEO type, which the pack knows by its class's name."""

from abc import ABC, abstractmethod


class VideoInput(ABC):
    """ComfyUI's base class: by itself it makes a file of the frames, which in older versions fails."""

    @abstractmethod
    def get_components(self): ...

    def get_stream_source(self):
        raise ValueError("Could not determine output format")
