"""The canonical decoder with logits of the last token alone, for plain ONNX Runtime."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import onnx
from onnx import helper

from qavp_export.errors import BundleError

# Beside the canonical decoder, whose weights it reads.
LAST_LOGITS = PurePosixPath("decoder", "last_logits.onnx")


def write_last_logits(bundle: Path) -> None:
    """Writes the graph of a bundle's decoder anew, with the output projection behind the last token.

    The canonical graph computes logits for every token of the prompt: a needless 7 % of a prefill at 1.1B, which no
    one who runs it for speed would pay.

    Args:
        bundle: A bundle whose output projection is a MatMul on the normed hidden states: not quantized, or by weight.

    Raises:
        BundleError: It is not.
    """
    model = onnx.load(bundle / "decoder" / "model.onnx", load_external_data=False)
    graph = model.graph
    head = next((node for node in graph.node if "logits" in node.output), None)
    if head is None or head.op_type != "MatMul":
        raise BundleError(f"logits of {bundle} do not come from a MatMul; export it with float activations")
    hidden, index = "latency.last_hidden", "latency.last_index"
    # A negative index counts from the end; an index of one dimension keeps the axis.
    graph.initializer.append(helper.make_tensor(index, onnx.TensorProto.INT64, [1], [-1]))
    last = helper.make_node("Gather", [head.input[0], index], [hidden], name="latency.last", axis=1)
    graph.node.insert(list(graph.node).index(head), last)
    head.input[0] = hidden
    onnx.save(model, bundle / LAST_LOGITS)
