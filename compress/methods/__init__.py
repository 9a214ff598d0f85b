"""Methods by name, one file each. Importing this package registers them all."""

from deltafold.compress.methods.axis_signs import AxisSigns
from deltafold.compress.methods.base import (
    METHODS,
    Method,
    build,
    method_class,
    parse_spec,
    spec_of,
)
from deltafold.compress.methods.bitdelta import BitDelta
from deltafold.compress.methods.chain import Chain
from deltafold.compress.methods.dare import Dare
from deltafold.compress.methods.delta_come import DeltaCome
from deltafold.compress.methods.deltazip import DeltaZip
from deltafold.compress.methods.exact import ExactMethod, LosslessMethod
from deltafold.compress.methods.int_hessian import IntegerHessian
from deltafold.compress.methods.integer import Integer
from deltafold.compress.methods.svd import Svd
from deltafold.compress.methods.svd_act import SvdAct

__all__ = [
    "METHODS",
    "AxisSigns",
    "BitDelta",
    "Chain",
    "Dare",
    "DeltaCome",
    "DeltaZip",
    "ExactMethod",
    "Integer",
    "IntegerHessian",
    "LosslessMethod",
    "Method",
    "Svd",
    "SvdAct",
    "build",
    "method_class",
    "parse_spec",
    "spec_of",
]
