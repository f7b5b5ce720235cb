"""Stores weights in the orientation that MatMul reads, so that no graph transposes a weight at run time."""

from __future__ import annotations

import onnx_ir as ir

from qavp_export.passes._infra import Refusal, RewritePass, RewriteResult


class FoldWeightTransposes(RewritePass):
    """Replaces `Transpose(weight)` by an initializer that holds the transposed weight.

    1. `Transpose` with `perm = (1, 0)` of a rank-2 initializer becomes an initializer named after the weight with
       `.transposed` appended. Its tensor is lazy: the weight is read and transposed when it is saved.
    2. A weight whose last use was a transpose is removed.
    """

    def call(self, model: ir.Model) -> RewriteResult:
        """Folds every weight transpose in the main graph."""
        graph = model.graph
        matched, refused = 0, []
        folded: dict[ir.Value, ir.Value] = {}
        for node in list(graph):
            if node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
                continue
            weight = node.inputs[0]
            if weight is None or not weight.is_initializer() or weight.const_value is None:
                continue
            perm = node.attributes.get_ints("perm", [])
            if list(perm) != [1, 0]:
                refused.append(Refusal(node.name or "", f"perm is {list(perm)}, not [1, 0]"))
                continue
            if weight not in folded:
                folded[weight] = _transposed(weight)
                graph.register_initializer(folded[weight])
            node.outputs[0].replace_all_uses_with(folded[weight], replace_graph_outputs=True)
            graph.remove(node, safe=True)
            matched += 1
        for weight in folded:
            if not weight.uses():
                graph.initializers.pop(str(weight.name))
        return RewriteResult(model, modified=matched > 0, matched=matched, refused=refused)


def _transposed(weight: ir.Value) -> ir.Value:
    tensor = weight.const_value
    if tensor is None:
        raise TypeError(f"initializer {weight.name} has no tensor")
    rows, columns = tensor.shape.numpy()
    name = f"{weight.name}.transposed"
    lazy = ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().T, name=name),
        dtype=tensor.dtype,
        shape=ir.Shape((columns, rows)),
        name=name,
    )
    return ir.Value(
        name=name,
        shape=lazy.shape,
        type=ir.TensorType(tensor.dtype),
        const_value=lazy,
        metadata_props=dict(weight.metadata_props),
    )
