"""What arXiv 2410.13841 says that an edit or a codec does to the fine-tune's loss.

Its section 4 tells three classes apart by the sign of the loss difference. That holds for the models,
data and settings that were tried there. `deltafold diagnose` measures the same for one fine-tune.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

#: By kind and id; what the paper does not speak of is not here. It speaks of EXPO as improved, at well
#: chosen factors, and itself finds interpolation better than extrapolation on most sets.
CLASSES: Final[Mapping[str, Mapping[str, str]]] = {
    "codec": {
        "bitdelta": "decreased",
        "dare": "competitive",
        "svd": "decreased",
    },
    "edit": {
        "dare": "competitive",
        "dare-k": "competitive",
        "dare-k-gradient": "decreased",
        "della": "competitive",
        "sampled-magnitudes": "decreased",
        "scale": "improved or not",
        "trim": "decreased",
    },
    "family": {},
    "merge": {},
}
