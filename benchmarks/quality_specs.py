"""What the quality benchmark runs: a few specs a method, one for each size.

Methods and edits come from the registries. One that this table does not know runs with its defaults; a
spec that this version refuses is told and left out.
"""

from __future__ import annotations

from deltafold.compress.edits import EDITS
from deltafold.compress.families import FAMILIES
from deltafold.compress.merges import MERGES
from deltafold.compress.methods import METHODS
from deltafold.compress.spec import split_outside

#: Specs of about 1, 2 and 4 bits a weight. Whatever is beside the codes (scales, masks) counts too.
CODECS: dict[str, dict[str, str]] = {
    "axis-signs": {"1": "axis-signs"},
    "bitdelta": {
        "1": "bitdelta:bits=1",
        "2": "bitdelta:bits=2",
        "4": "bitdelta:bits=4",
    },
    "codebook": {"1": "codebook:bits=1", "2": "codebook:bits=2", "4": "codebook:bits=4"},
    "d-qrelo": {"1": "d-qrelo:rho=0.0156", "2": "d-qrelo:rho=0.0625", "4": "d-qrelo:rho=0.1875"},
    "dare": {
        "1": "dare:drop=0.9375",
        "2": "dare:drop=0.875",
        "4": "dare:drop=0.75",
    },
    "dct": {"1": "dct:share=0.5", "2": "dct:share=1.0", "4": "dct:bits=4,share=1.0"},
    "delta-come": {
        "1": "delta-come:bits=1.0",
        "2": "delta-come:bits=2.0",
        "4": "delta-come:bits=4.0",
    },
    "deltazip": {"2": "deltazip:bits=2", "4": "deltazip:bits=4"},
    "exact": {"16": "exact"},
    "impart": {"1": "impart:ratio=16.0", "2": "impart:ratio=8.0", "4": "impart:ratio=4.0"},
    "int": {"2": "int:bits=2", "4": "int:bits=4", "8": "int:bits=8"},
    "int-hessian": {"2": "int-hessian:bits=2", "4": "int-hessian:bits=4"},
    "lloyd": {"1": "lloyd:bits=1", "2": "lloyd:bits=2", "4": "lloyd:bits=4"},
    "lossless": {"16": "lossless"},
    "nm": {
        "1": "nm:keep=1,of=8,bits=4",
        "2": "nm:keep=1,of=4,bits=4",
        "3": "nm:bits=4",
        "4": "nm:keep=3,bits=4",
    },
    "quantize-and-drop": {
        "1": "quantize-and-drop:drop=0.9",
        "2": "quantize-and-drop:drop=0.75",
        "4": "quantize-and-drop:drop=0.3",
    },
    "shift-scale": {
        "1": "shift-scale:vector=(svd:bits=0.1)",
        "2": "shift-scale:vector=(svd:bits=0.5),rest=(bitdelta:bits=2)",
        "4": "shift-scale:vector=(svd:bits=0.5),rest=(int:bits=4)",
    },
    # By itself it stores what an edit leaves.
    "sparse": {
        "1": "trim:keep=0.1,scope=tensor+sparse:bits=4",
        "2": "trim:keep=0.2,scope=tensor+sparse:bits=4",
        "4": "trim:keep=0.4,scope=tensor+sparse:bits=8",
    },
    "stratified": {
        "1": "stratified:of=8",
        "2": "stratified:of=4",
        "3": "stratified:of=2",
        "4": "stratified:of=2,bits=8",
    },
    "svd": {"1": "svd:bits=1", "2": "svd:bits=2", "4": "svd:bits=4"},
    "svd-act": {"1": "svd-act:bits=1", "2": "svd-act:bits=2", "4": "svd-act:bits=4"},
    "svd-widths": {
        "1": "svd-widths:bits=1.0",
        "2": "svd-widths:bits=2.0",
        "4": "svd-widths:bits=4.0",
    },
    "topk": {
        "1": "topk:keep=0.1,bits=4",
        "2": "topk:keep=0.2,bits=4",
        "3": "topk:keep=0.5,bits=4",
        "4": "topk:keep=0.4,bits=8",
    },
    "ultradelta": {
        "1": "ultradelta:drop=0.9",
        "2": "ultradelta:drop=0.75",
        "4": "ultradelta:drop=0.3",
    },
}
#: Families, and the codec of what they share.
FAMILY_SPECS: dict[str, tuple[str, ...]] = {
    "emr": ("emr", "emr --codec int:bits=4"),
    "row-groups": (
        "row-groups:groups=2 --codec int:bits=4",
        "row-groups:groups=4 --codec int:bits=4",
    ),
    "shift-scale": (
        "shift-scale --codec int:bits=4",
        "shift-scale:rest=(bitdelta:bits=2) --codec int:bits=4",
    ),
}
#: Merges into one delta, and Twin-Merging's zoo of a shared delta and one for each task.
MERGE_SPECS: dict[str, tuple[str, ...]] = {
    "task": ("task", "task:scale=1"),
    "twin": ("twin",),
}
#: Edits by themselves, their result kept in float32.
EDIT_SPECS: dict[str, tuple[str, ...]] = {
    "dare": ("dare:drop=0.5", "dare:drop=0.9"),
    "dare-k": ("dare-k:k=0.5", "dare-k:k=0.5,mask=sign"),
    "dare-k-gradient": ("dare-k-gradient:k=0.5",),
    "darex-q": ("darex-q:drop=0.5", "darex-q:drop=0.9"),
    "della": ("della:drop=0.5", "della:drop=0.85"),
    "sampled-magnitudes": (
        "sampled-magnitudes:spread=0",
        "sampled-magnitudes",
        "sampled-magnitudes:draw=uniform",
    ),
    "scale": ("scale:by=0.8", "scale:by=1.2"),
    "stratified": ("stratified:group=2", "stratified:group=8"),
    "trim": ("trim:keep=0.5", "trim:keep=0.2"),
}
#: Enough to see that everything runs.
QUICK = ("bitdelta", "int", "scale")
QUICK_CANDIDATES = ("bitdelta:bits=1", "svd:bits=0.25", "int:bits=2", "int:bits=4")


def codec_specs(quick: bool) -> list[tuple[str, str]]:
    """`(bits, spec)` of every registered codec."""
    return [
        (bits, spec)
        for name in sorted(METHODS)
        if not quick or name in QUICK
        for bits, spec in CODECS.get(name, {"default": name}).items()
        if not quick or bits in ("1", "4", "default")
    ]


def edit_specs(quick: bool) -> list[str]:
    """Specs of every registered edit."""
    names = [name for name in sorted(EDITS) if not quick or name in QUICK]
    return [spec for name in names for spec in EDIT_SPECS.get(name, (name,))]


def family_specs() -> list[str]:
    """Specs of every registered family, with the codec of what is shared."""
    return [spec for name in sorted(FAMILIES) for spec in FAMILY_SPECS.get(name, (name,))]


def merge_specs() -> list[str]:
    """Specs of every registered merge."""
    return [spec for name in sorted(MERGES) for spec in MERGE_SPECS.get(name, (name,))]


def name_of(spec: str) -> str:
    """The method's name: what stands behind an edit is the codec."""
    return split_outside(spec, r"\+")[-1].partition(" ")[0].partition(":")[0]
