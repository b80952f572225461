"""A reader of a preset's YAML: lists, mappings and text, and nothing that makes a small file large in memory.

Imported only when a preset is read, since PyYAML may be missing.
"""

from __future__ import annotations

import yaml

_DEEPEST = 8
YamlError = yaml.YAMLError


def read(text: str) -> object:
    """Return the value of a YAML text.

    Raises:
        YamlError: the text is not YAML.
        ValueError: the text has tags, anchors or aliases, or is nested too deep.
    """
    return _PlainLoader(text).get_single_data()


class _PlainLoader(yaml.BaseLoader):
    """A loader of lists, mappings and text. safe_load would make numbers and dates, and fail at impossible dates."""

    def fetch_flow_collection_start(self, token: type) -> None:
        # PyYAML's time grows with the square of the depth.
        if self.flow_level > _DEEPEST:
            raise ValueError("it is nested too deep for a preset")
        super().fetch_flow_collection_start(token)

    def _refuse(self) -> None:
        """Reject tags and anchors, which would be missing in the text, and aliases, which make a small file large."""
        raise ValueError("what begins with !, & or * must be in quotes, or behind `|` on lines of its own")

    fetch_tag = fetch_anchor = fetch_alias = _refuse
