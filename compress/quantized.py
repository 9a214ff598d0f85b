"""A base whose linear layers are quantised: which tensors, and which values they then have.

Deltas may be taken against the values that a quantised base really holds, so the arithmetic is fixed
here, in plain torch, and both packing and serving use it. It gives the codes and values that
bitsandbytes gives on a CPU, bit for bit: `nf4` is 4-bit NormalFloat (Dettmers et al., QLoRA, arXiv
2305.14314, section 3) without double quantisation, `int8` the row-wise absolute maximum that
LLM.int8() stores weights with (Dettmers et al., arXiv 2208.07339, section 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from deltafold.compress.checkpoint import Checkpoint, Spec
from deltafold.compress.companions import vocabulary
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.manifest import Quantization, QuantizationMethod
from deltafold.compress.naming import NamedBase

METHODS: Final[tuple[QuantizationMethod, ...]] = ("nf4", "int8")
#: Weights that share a scale in `nf4`.
BLOCK: Final = 64
#: The levels of `nf4`: QLoRA's appendix E, in ascending order.
NF4_LEVELS: Final = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
#: What `int8` multiplies code times scale by: float32's neighbour of 1/127.
INT8_STEP: Final = 7.874015718698502e-3

_DTYPES: Final = ("F32", "F16", "BF16")
#: Last modules that are tables, output layers or routers, whatever their shape.
_KEPT: Final = frozenset(
    ("wte", "wpe", "lm_head", "embed_out", "output", "score", "classifier", "gate", "router")
)
_SMALLEST: Final = 1e-38
#: Weights that are coded at a time: what one step makes then stays in a core's cache.
_CHUNK: Final = 2**18


@dataclass(frozen=True)
class Packed:
    """One quantised matrix.

    Attributes:
        method: `nf4` or `int8`.
        codes: `nf4`: uint8 `[numel / 2, 1]`, the first of two weights in the high half of a byte;
            `int8`: int8 of the tensor's shape.
        absmax: float32, one a block of 64 weights in memory order, or one a row.
        shape: the tensor's.
    """

    method: QuantizationMethod
    codes: torch.Tensor
    absmax: torch.Tensor
    shape: tuple[int, int]

    def values(self) -> torch.Tensor:
        """The values that these codes stand for: float32 of `shape`, on the codes' device."""
        if self.method == "int8":
            return self.codes.to(torch.float32) * self.absmax.unsqueeze(1) * INT8_STEP
        levels = torch.tensor(NF4_LEVELS, device=self.codes.device)
        halves = torch.cat([self.codes >> 4, self.codes & 15], dim=1)
        blocks = levels[halves.reshape(-1, BLOCK).to(torch.int32)]
        return (blocks * self.absmax.unsqueeze(1)).reshape(self.shape)

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.absmax))


def quantization_of(base: Checkpoint | NamedBase, method: str) -> Quantization:
    """The tensors of a base that are quantised, by name, dtype and shape alone.

    Matrices called `*.weight` whose rows are whole blocks long, but for embeddings, output layers,
    routers and experts: models keep the last two in ways of their own. A base under a fine-tune's names
    gives these.

    Raises:
        DeltafoldError: `bad-argument` for an unknown method.
    """
    known = next((m for m in METHODS if m == method), None)
    if known is None:
        raise DeltafoldError(
            "bad-argument",
            f"there is no base quantization {method!r}.",
            facts=[("known", ", ".join(METHODS))],
        )
    words, _ = vocabulary(base.folder)
    view = base if isinstance(base, NamedBase) else NamedBase(base)
    own = view.checkpoint
    # A base is quantised by its own names, whatever a fine-tune calls its tensors.
    chosen = [n for n in own.names() if _is_quantised(n, own.spec(n), words)]
    names = tuple(sorted(view.named(dict.fromkeys(chosen))))
    return Quantization(method=known, block=block_of(known), tensors=names)


def block_of(method: QuantizationMethod) -> int:
    """Weights that share a scale; 0 is a row."""
    return BLOCK if method == "nf4" else 0


def _is_quantised(name: str, spec: Spec, words: int | None) -> bool:
    module, _, attribute = name.rpartition(".")
    *path, last = module.split(".")
    return (
        attribute == "weight"
        and fits(spec)
        and spec.shape[0] != words
        and last not in _KEPT
        and "emb" not in last
        and not any("expert" in segment for segment in path)
    )


def fits(spec: Spec) -> bool:
    """Whether a tensor of this dtype and shape can be quantised at all."""
    return (
        spec.dtype in _DTYPES
        and len(spec.shape) == 2
        and min(spec.shape) > 0
        and spec.shape[1] % BLOCK == 0
    )


def quantize(name: str, tensor: torch.Tensor, method: QuantizationMethod) -> Packed:
    """Quantise a matrix for which `fits` holds; on the CPU, so that the bits are the same anywhere.

    Raises:
        DeltafoldError: `not-finite` for NaN or infinity (for int8 also above float16's range).
    """
    shape = (tensor.shape[0], tensor.shape[1])
    tensor = tensor.cpu()
    # LLM.int8() rounds weights to float16 before it looks at them.
    values = (tensor.to(torch.float16) if method == "int8" else tensor).to(torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise DeltafoldError(
            "not-finite",
            f"{name} of the base has entries that {method} cannot hold.",
            fix="serve the base unquantised, or check it",
        )
    return Packed(method, *(_int8(values) if method == "int8" else _nf4(values)), shape)


def _int8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    absmax = values.abs().amax(dim=1)
    safe = torch.where(absmax == 0, torch.ones_like(absmax), absmax)
    return torch.round(values * (127.0 / safe).unsqueeze(1)).to(torch.int8), absmax


def _nf4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = values.reshape(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    codes = torch.empty(len(blocks), BLOCK // 2, dtype=torch.uint8)
    step = _CHUNK // BLOCK
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        # A reciprocal and a product, not a quotient: they round differently.
        factor = 1.0 / absmax[part].clamp(min=_SMALLEST)
        codes[part] = _nf4_codes((blocks[part] * factor.unsqueeze(1)).clamp_(-1, 1))
    return codes.reshape(-1, 1), absmax


def _nf4_codes(scaled: torch.Tensor) -> torch.Tensor:
    """Nearest levels, the lower one half way, two to a byte: `[blocks, 64]` to `[blocks, 32]`."""
    levels = torch.tensor(NF4_LEVELS)
    index = torch.zeros(scaled.shape, dtype=torch.uint8)
    for bound in (levels[1:] + levels[:-1]) / 2:
        index += scaled > bound
    return (index[:, ::2] << 4) | index[:, 1::2]


def dequantized(name: str, tensor: torch.Tensor, method: QuantizationMethod) -> torch.Tensor:
    """What a quantised base holds in a tensor's place: float32 of its shape."""
    return quantize(name, tensor, method).values()
