"""The carrier for receivers on the publisher's host: map the file, verify it, hand out views.

Nothing is copied. The map is private, so writing to a tensor copies that page and changes nothing for anybody
else, and it outlives the file: a version that is retired meanwhile stays readable for whoever mapped it.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import torch

from asyncrl.errors import WeightsError
from asyncrl.messages.version import Manifest
from asyncrl.weights.manifest import tensors_of, verify


def load(manifest: Manifest) -> dict[str, torch.Tensor]:
    """Verified views on the mapped file, by name. Reads every byte once, so it belongs on a thread.

    Raises:
        WeightsError: the file is gone, or is not what the manifest says.
    """
    try:
        with Path(manifest.path).open("rb") as file:
            buffer = (
                bytearray()
                if manifest.num_bytes == 0
                else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            )
    except FileNotFoundError as error:
        raise WeightsError(
            f"weights {manifest.name}: {manifest.path} is gone; the version was retired, take the newest one"
        ) from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"weights {manifest.name}: {manifest.path} cannot be mapped: {error}") from error
    verify(manifest, buffer)
    return tensors_of(manifest, buffer)
