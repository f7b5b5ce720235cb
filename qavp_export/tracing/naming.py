"""Gives traced nodes and values names that read like the model."""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

# Metadata key of an initializer that stands for a parameter: the parameter's name in the Hugging Face model.
PARAMETER = "qavp.parameter"
# What stands before the names of CLIP's parameters, beside those of the model.
CLIP = "clip"
_SCOPES = "pkg.torch.onnx.name_scopes"
# Names of the ecosystem (ONNX Runtime GenAI): /model/layers.0/attn/q_proj/MatMul
_RENAMES = {"self_attn": "attn"}


class ReadableNames(ir.passes.InPlacePass):
    """Names nodes after their module, values after their node, and drops the exporter's metadata.

    1. A node becomes `/<module path>/<op type>`, numbered if the module holds several of that type.
    2. A value becomes its node's name, numbered if the node has several outputs; graph inputs and outputs keep theirs.
    3. A constant becomes `constant.<number>` in graph order; parameters keep their names.
    4. Metadata is removed: it holds source paths of the exporting machine.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Renames everything in the main graph; see the class."""
        graph = model.graph
        fixed = {value.name for value in (*graph.inputs, *graph.outputs)}
        seen: Counter[str] = Counter()
        for node in graph:
            node.name = _numbered(f"{_module_path(node)}/{node.op_type}", seen)
            for index, output in enumerate(node.outputs):
                if output.name not in fixed:
                    output.name = f"{node.name}:{index}" if index else node.name
                output.metadata_props.clear()
            node.metadata_props.clear()
            node.doc_string = None
        constants = [value for value in graph.initializers.values() if PARAMETER not in value.metadata_props]
        for number, value in enumerate(constants):
            value.name = f"constant.{number}"
        graph.metadata_props.clear()
        model.metadata_props.clear()
        return ir.passes.PassResult(model, modified=True)


def _module_path(node: ir.Node) -> str:
    # The last scope is the operation itself.
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))[:-1]
    module = scopes[-1] if scopes and not scopes[-1].startswith("_empty_nn_module_stack") else ""
    path = ""
    for part in module.split(".") if module else []:
        path += f".{part}" if part.isdigit() else f"/{_RENAMES.get(part, part)}"
    return path


def _numbered(name: str, seen: Counter[str]) -> str:
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}_{seen[name] - 1}"
