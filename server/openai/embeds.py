"""`prompt_embeds`: input embeddings in a request body, base64 of a `.npy` or a safetensors file.

vLLM's field of this name holds a pickle of torch; reading one can run code, so it is refused here.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import struct
from typing import Any, Final

import numpy as np
import torch

from deltafold.runtime.engine import Embeddings

_FLOATS: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MOST_HEADER: Final = 4096
_EXPECTED: Final = "expected base64 of a .npy file, or of a safetensors file with one tensor"


def read_prompt_embeds(value: Any) -> list[Embeddings] | None:
    """One prompt's embeddings, or a list of them. Raises `ValueError` for anything else."""
    if value is None:
        return None
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{_EXPECTED}, or a list of them")
    return [Embeddings(_decoded(text)) for text in texts]


def _decoded(text: str) -> torch.Tensor:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(_EXPECTED) from error
    tensor = _npy(data) if data[:6] == b"\x93NUMPY" else _safetensors(data)
    if tensor.dim() != 2:
        raise ValueError(f"embeddings have two dimensions, not {tensor.dim()}")
    return tensor


def _npy(data: bytes) -> torch.Tensor:
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, _, dtype = read[version](file, max_header_size=_MOST_HEADER)
    except (ValueError, KeyError) as error:
        raise ValueError(_EXPECTED) from error
    # Asked before reading, since a short file may claim to be a huge array, or a pickle.
    if dtype.kind != "f" or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError("the .npy file is no whole array of floats")
    file.seek(0)
    array = np.lib.format.read_array(file, allow_pickle=False)
    return torch.from_numpy(array.astype(np.float32))


def _safetensors(data: bytes) -> torch.Tensor:
    try:
        (length,) = struct.unpack("<Q", data[:8])
        if length > _MOST_HEADER:
            raise ValueError("the header is too long")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        (entry,) = header.values()
        start, stop = (8 + length + int(place) for place in entry["data_offsets"])
        dtype, shape = _FLOATS[entry["dtype"]], tuple(int(size) for size in entry["shape"])
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(_EXPECTED) from error
    sound = min(shape, default=1) > 0 and start == 8 + length and stop == len(data)
    if not sound or math.prod(shape) * dtype.itemsize != stop - start:
        raise ValueError("the safetensors file is no whole tensor of floats")
    return torch.frombuffer(bytearray(data[start:stop]), dtype=dtype).reshape(shape).float()
