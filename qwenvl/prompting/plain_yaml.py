"""A preset's YAML: lists, mappings and text, and nothing that makes a small file large. Imported where one is read."""

from __future__ import annotations

import yaml

_DEEPEST = 8
YamlError = yaml.YAMLError


def read(text: str) -> object:
    """What the text holds.

    Raises:
        YamlError: it is no YAML.
        ValueError: it holds what a preset may not.
    """
    return _PlainLoader(text).get_single_data()


class _PlainLoader(yaml.BaseLoader):
    """Lists, mappings and text. safe_load would make numbers and dates, and fail where there is no such date."""

    def fetch_flow_collection_start(self, token: type) -> None:
        # They take it a time that grows with the square of their depth.
        if self.flow_level > _DEEPEST:
            raise ValueError("it is nested too deep for a preset")
        super().fetch_flow_collection_start(token)

    def _refuse(self) -> None:
        """Tags and anchors would be left out of the text; aliases of aliases make a small file large."""
        raise ValueError("what begins with !, & or * must be in quotes, or behind `|` on lines of its own")

    fetch_tag = fetch_anchor = fetch_alias = _refuse
