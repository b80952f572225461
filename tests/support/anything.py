"""Values of any kind and shape, as a hostile JSON file may hold them."""

from __future__ import annotations

import math

from hypothesis import strategies as st

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=9)
    | st.sampled_from([10**300, -1, 0, 2**64, "\ud800", "\0", "../x", "/" + "n" * 300, math.nan, math.inf, "x" * 5000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(document):
    """Return (container, key) of every value in it, at any depth."""
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(pairs):
        yield document, key
        if isinstance(value, (dict, list)):
            yield from places(value)
