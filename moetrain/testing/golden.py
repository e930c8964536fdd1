"""Golden vectors: what another implementation computed, stored as ``<slug>.json`` and ``<slug>.safetensors``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "tests" / "golden" / "data"


def golden_folder() -> Path:
    """``$MOETRAIN_GOLDEN``, else ``tests/golden/data`` of the checkout that this file is in."""
    return Path(os.environ.get("MOETRAIN_GOLDEN") or DEFAULT_FOLDER).expanduser()


def golden(slug: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of one set of vectors.

    Raises FileNotFoundError naming the file and the folder's variable if one of the two files is missing, and
    ValueError if they do not describe the same tensors.
    """
    from safetensors.torch import load_file

    folder = golden_folder()
    description, data = folder / f"{slug}.json", folder / f"{slug}.safetensors"
    for path in (description, data):
        if not path.is_file():
            raise FileNotFoundError(
                f"golden vectors {slug!r}: {path} does not exist (the folder is $MOETRAIN_GOLDEN, by default {DEFAULT_FOLDER})"
            )
    meta, tensors = json.loads(description.read_text()), load_file(data)
    undescribed = set(meta.get("tensors", tensors)) ^ set(tensors)
    if undescribed:
        raise ValueError(f"golden vectors {slug!r}: {description.name} and {data.name} disagree on the tensors {sorted(undescribed)}")
    return meta, tensors
