"""What pip install . builds with: hatchling, which must not look up the classifiers of ComfyUI's registry at PyPI."""

import os

os.environ["HATCH_METADATA_CLASSIFIERS_NO_VERIFY"] = "1"

from hatchling.build import *  # noqa: F403
