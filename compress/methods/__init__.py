"""Methods by name, one file each. Importing this package registers them all."""

from deltafold.compress.methods.axis_signs import AxisSigns
from deltafold.compress.methods.base import (
    METHODS,
    Method,
    PairMethod,
    SurveyedMethod,
    bits_per_weight,
    build,
    method_class,
    parse_spec,
    spec_of,
)
from deltafold.compress.methods.bitdelta import BitDelta
from deltafold.compress.methods.chain import Chain
from deltafold.compress.methods.codebook import CodebookMethod
from deltafold.compress.methods.dare import Dare
from deltafold.compress.methods.dct import Dct
from deltafold.compress.methods.delta_come import DeltaCome
from deltafold.compress.methods.deltazip import DeltaZip
from deltafold.compress.methods.dqrelo import DQrelo
from deltafold.compress.methods.exact import ExactMethod
from deltafold.compress.methods.impart import ImPart
from deltafold.compress.methods.int_hessian import IntegerHessian
from deltafold.compress.methods.integer import Integer
from deltafold.compress.methods.lloyd import Lloyd
from deltafold.compress.methods.lossless import LosslessMethod
from deltafold.compress.methods.nm import NMMethod
from deltafold.compress.methods.quantize_and_drop import QuantizeAndDrop
from deltafold.compress.methods.shift_scale import ShiftScale
from deltafold.compress.methods.sparse import SparseMethod
from deltafold.compress.methods.stratified import Stratified
from deltafold.compress.methods.svd import Svd
from deltafold.compress.methods.svd_act import SvdAct
from deltafold.compress.methods.svd_widths import SvdWidths
from deltafold.compress.methods.topk import TopK
from deltafold.compress.methods.ultradelta import UltraDelta

__all__ = [
    "METHODS",
    "AxisSigns",
    "BitDelta",
    "Chain",
    "CodebookMethod",
    "DQrelo",
    "Dare",
    "Dct",
    "DeltaCome",
    "DeltaZip",
    "ExactMethod",
    "ImPart",
    "Integer",
    "IntegerHessian",
    "Lloyd",
    "LosslessMethod",
    "Method",
    "NMMethod",
    "PairMethod",
    "QuantizeAndDrop",
    "ShiftScale",
    "SparseMethod",
    "Stratified",
    "SurveyedMethod",
    "Svd",
    "SvdAct",
    "SvdWidths",
    "TopK",
    "UltraDelta",
    "bits_per_weight",
    "build",
    "method_class",
    "parse_spec",
    "spec_of",
]
