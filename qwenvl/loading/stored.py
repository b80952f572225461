"""What a folder's weight files are and hold, before and after transformers reads them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..models.checkpoint import INDEX, has_own_index
from ..models.download import weight_map

_SETTINGS = "generation_config.json"


@contextmanager
def indexed(folder: Path) -> Iterator[Path]:
    """What to give to transformers as the model's folder: where its files have no index that is of use, another with
    one that names them. Nothing is written into the folder, which need not be ours."""
    # An absolute path stays one when it is joined to that of a folder.
    places = {} if has_own_index(folder) else {name: str(path.absolute()) for name, path in weight_map(folder).items()}
    if not places:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="qwenvl-") as made:
        (Path(made) / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
        if (folder / _SETTINGS).is_file():
            shutil.copy(folder / _SETTINGS, made)
        yield Path(made)


def tie_as_said(folder: Path, config: Any) -> None:
    """Where the output head is not stored, it is the embeddings, if any part of config.json says so: which part is
    looked at depends on the version of transformers."""
    said = getattr(config.get_text_config(), "tie_word_embeddings", False)
    if said and not any(name.endswith("lm_head.weight") for name in weight_map(folder)):
        config.tie_word_embeddings = True
