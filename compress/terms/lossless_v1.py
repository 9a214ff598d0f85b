"""Bit-exact and small: XOR with the base, bytes of one kind together, then zstandard.

After the XOR, words of a fine-tune differ from zero mostly in their low bits. Rotating each word left
by one puts the sign beside the mantissa, so that the high byte is the exponent alone; the bytes are
then laid out by their place in the word, and each such stream is compressed by itself. Follows the
stream split of BitX (Su et al., arXiv 2505.06252).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from deltafold.compress import dtypes
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.terms.base import Checked, Context, Encoded, Parts, PartSpec, register

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@register
@dataclass(frozen=True)
class LosslessStreams(Checked):
    """XOR streams.

    Parts: `stream0` (low byte of the rotated word) to `stream{w-1}` (high byte), uint8.

    Attributes:
        dtype: the fine-tune's dtype, filled in by encode.
        mode: "xor" against the base, or "raw" where the base has no tensor of that dtype and shape.
        lengths: compressed bytes of each stream; empty until encoded.
        level: zstandard level.
    """

    id: ClassVar[str] = "lossless"
    version: ClassVar[int] = 1

    dtype: str = "BF16"
    mode: Literal["xor", "raw"] = "xor"
    lengths: tuple[int, ...] = ()
    level: int = 3

    def __post_init__(self) -> None:
        self._require(self.dtype in dtypes.TORCH, f"unknown dtype {self.dtype!r}")
        self._require(self.mode in ("xor", "raw"), "mode must be xor or raw")
        self._require(1 <= self.level <= 22, "level must be 1 to 22")
        size = dtypes.TORCH[self.dtype].itemsize
        sound = all(type(n) is int and n >= 0 for n in self.lengths)
        self._require(sound and len(self.lengths) in (0, size), "lengths must be one a stream")

    def encode(self, delta: torch.Tensor, context: Context) -> Encoded:
        """Takes `context.variant` and `context.base`; the delta itself is not looked at."""
        variant = context.variant
        assert variant is not None
        mode: Literal["xor", "raw"] = "xor" if _fits(context.base, variant) else "raw"
        words = _words(variant)
        if mode == "xor":
            assert context.base is not None
            words = words ^ _words(context.base)
        parts: dict[str, torch.Tensor] = {}
        compressor = zstandard.ZstdCompressor(level=self.level)
        for i, stream in enumerate(_split(words)):
            packed = compressor.compress(stream.tobytes())
            parts[f"stream{i}"] = torch.from_numpy(np.frombuffer(packed, np.uint8).copy())
        lengths = tuple(part.numel() for part in parts.values())
        name = dtypes.NAMES[variant.dtype]
        return Encoded(replace(self, dtype=name, mode=mode, lengths=lengths), parts)

    def decode(self, parts: Parts, shape: tuple[int, ...], context: Context) -> torch.Tensor:
        """Value minus base, float32."""
        value = self.restore(parts, shape, dtypes.TORCH[self.dtype], context).to(torch.float32)
        return value if context.base is None else value - context.base.to(torch.float32)

    def restore(
        self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype, context: Context
    ) -> torch.Tensor:
        """The fine-tune's tensor, bit for bit. Raises `checksum` where the streams do not fit."""
        own = dtypes.TORCH[self.dtype]
        count = math.prod(shape)
        size = own.itemsize
        streams = [self._inflate(parts[f"stream{i}"], count, context) for i in range(size)]
        words = _join(streams, count)
        if self.mode == "xor":
            base = context.base
            if base is None or not _fits(base, torch.empty(shape, dtype=own, device="meta")):
                raise DeltafoldError(
                    "base-mismatch",
                    f"{context.name}: the base's tensor has another shape or dtype.",
                )
            words = words ^ _words(base)
        return torch.from_numpy(words.view(np.uint8)).view(own).reshape(shape)

    def parts(self, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        """Dtype and shape of each part; before encoding the size of the raw tensor is promised."""
        size = dtypes.TORCH[self.dtype].itemsize
        lengths = self.lengths or (math.prod(shape),) * size
        return {f"stream{i}": PartSpec(torch.uint8, (n,)) for i, n in enumerate(lengths)}

    def _inflate(self, part: torch.Tensor, count: int, context: Context) -> NDArray[np.uint8]:
        packed = part.numpy().tobytes()
        try:
            # Asked before inflating, since a small stream may claim to be a huge one.
            if zstandard.frame_content_size(packed) != count:
                raise DeltafoldError("checksum", f"{context.name}: a stream has the wrong length.")
            raw = zstandard.ZstdDecompressor().decompress(packed)
        except zstandard.ZstdError as error:
            raise DeltafoldError("checksum", f"{context.name}: a stream is damaged: {error}") from (
                error
            )
        return np.frombuffer(raw, np.uint8)


def _fits(base: torch.Tensor | None, variant: torch.Tensor) -> bool:
    return base is not None and base.dtype == variant.dtype and base.shape == variant.shape


def _words(tensor: torch.Tensor) -> NDArray[Any]:
    raw = dtypes.raw_bytes(tensor).numpy()
    return raw.view(_WORDS[tensor.dtype.itemsize])


def _split(words: NDArray[Any]) -> list[NDArray[np.uint8]]:
    size = words.dtype.itemsize
    if size > 1:
        one, rest = words.dtype.type(1), words.dtype.type(8 * size - 1)
        words = (words << one) | (words >> rest)
    raw = np.ascontiguousarray(words).view(np.uint8).reshape(-1, size)
    return [np.ascontiguousarray(raw[:, i]) for i in range(size)]


def _join(streams: list[NDArray[np.uint8]], count: int) -> NDArray[Any]:
    size = len(streams)
    raw = np.empty((count, size), dtype=np.uint8)
    for i, stream in enumerate(streams):
        raw[:, i] = stream
    words: NDArray[Any] = raw.reshape(-1).view(_WORDS[size])
    if size > 1:
        one, rest = words.dtype.type(1), words.dtype.type(8 * size - 1)
        words = (words >> one) | (words << rest)
    return words
