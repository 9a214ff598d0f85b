"""Each variant's own way from pictures to pixel values, by Pillow and numpy alone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Final

import torch

from deltafold.compress.errors import DeltafoldError

_FILES: Final = ("preprocessor_config.json", "processor_config.json")


class ImageFronts:
    """Image processors by the content of their configuration. Thread-safe.

    Args:
        base_folder: its processor is used where a variant's folder has none.
    """

    def __init__(self, base_folder: Path) -> None:
        self._base_folder = base_folder
        self._processors: dict[bytes, Any] = {}
        self._lock = threading.Lock()

    def pixels(self, folder: Path, picture: Any) -> torch.Tensor:
        """float32 `[C, H, W]` of one picture.

        Args:
            folder: the variant's, or the base's.
            picture: a `PIL.Image.Image`, a path of a file, or a uint8 array `[H, W, 3]`.

        Raises:
            DeltafoldError: `bad-argument` for what is no picture, or without a processor;
                `missing-extra` without Pillow.
        """
        processor = self._processor(folder)
        try:
            found = processor(images=opened(picture), return_tensors="pt")["pixel_values"]
        except (ValueError, TypeError) as error:
            raise _bad(f"the picture cannot be processed: {error}") from error
        if not isinstance(found, torch.Tensor) or found.dim() != 4 or len(found) != 1:
            raise _bad("the picture becomes several, and one at a time is served")
        return found[0].to(torch.float32)

    def _processor(self, folder: Path) -> Any:
        home = next((f for f in (folder, self._base_folder) if _key(f)), None)
        if home is None:
            raise _bad(f"neither {folder.name} nor its base has a preprocessor_config.json")
        need_pillow()
        with self._lock:
            key = _key(home)
            if key not in self._processors:
                from transformers import AutoImageProcessor

                self._processors[key] = AutoImageProcessor.from_pretrained(
                    home, local_files_only=True, backend="pil"
                )
            return self._processors[key]


def need_pillow() -> None:
    """Raises `missing-extra` without Pillow."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DeltafoldError(
            "missing-extra", "pictures need Pillow.", fix="pip install 'deltafold[images]'"
        ) from error


def opened(picture: Any) -> Any:
    """An RGB `PIL.Image.Image` of a picture, a path, or an array. Raises `bad-argument`."""
    need_pillow()
    import PIL.Image

    if isinstance(picture, PIL.Image.Image):
        return picture.convert("RGB")
    if isinstance(picture, Path):
        try:
            with PIL.Image.open(picture) as file:
                return file.convert("RGB")
        except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
            raise _bad(f"{picture} cannot be read as a picture: {error}") from error
    try:
        return PIL.Image.fromarray(picture).convert("RGB")
    except (TypeError, ValueError, AttributeError) as error:
        raise _bad(f"a {type(picture).__name__} is no picture") from error


def is_picture(value: Any) -> bool:
    """Whether a request's input is a picture: a path, an array, or an image of Pillow."""
    return isinstance(value, Path) or hasattr(value, "__array_interface__")


def _key(folder: Path) -> bytes:
    return b"".join((folder / n).read_bytes() for n in _FILES if (folder / n).is_file())


def _bad(message: str) -> DeltafoldError:
    return DeltafoldError("bad-argument", f"{message}.")
