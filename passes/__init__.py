"""Graph passes: each is one file, one class, one job, and works on any ONNX model.

A pass is called with an `onnx_ir.Model` and rewrites it in place; its result says how many places matched and, for
places that looked right but were refused, why::

    import onnx_ir as ir
    from qavp_export.passes import PruneVisionTokens

    model = ir.load("vision.onnx")
    result = PruneVisionTokens(at="image_features", keep=0.125)(model)
    ir.save(model, "pruned.onnx")
"""

from qavp_export.passes._infra import Refusal, RewritePass, RewriteResult
from qavp_export.passes._linear import by_output_channel, linear_layers
from qavp_export.passes.fold_weight_transposes import FoldWeightTransposes
from qavp_export.passes.hybrid_score import InsertHybridScore, set_score_weights
from qavp_export.passes.keep_all_tokens import KeepAllTokens
from qavp_export.passes.place_nvfp4 import PlaceNvfp4
from qavp_export.passes.place_qdq import PlaceQdq
from qavp_export.passes.precision import NVFP4, RealizedPrecision, realized_precision
from qavp_export.passes.prune_vision_tokens import PruneVisionTokens
from qavp_export.passes.quantizer import Quantized, RoundWeights, WeightQuantizer
from qavp_export.passes.rotate import LayerRotation, Rotate, RotateResult
from qavp_export.passes.scheme import SCHEMES, W4A4, W4A8, W4A16, W8A8, W8A16, Scheme
from qavp_export.passes.select_gather import SelectGather
from qavp_export.passes.store_half import StoreHalf

__all__ = [
    "NVFP4",
    "SCHEMES",
    "W4A4",
    "W4A8",
    "W4A16",
    "W8A8",
    "W8A16",
    "FoldWeightTransposes",
    "InsertHybridScore",
    "KeepAllTokens",
    "LayerRotation",
    "PlaceNvfp4",
    "PlaceQdq",
    "PruneVisionTokens",
    "Quantized",
    "RealizedPrecision",
    "Refusal",
    "RewritePass",
    "RewriteResult",
    "Rotate",
    "RotateResult",
    "RoundWeights",
    "Scheme",
    "SelectGather",
    "StoreHalf",
    "WeightQuantizer",
    "by_output_channel",
    "linear_layers",
    "realized_precision",
    "set_score_weights",
]
