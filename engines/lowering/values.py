"""Puts values in each other's place."""

from __future__ import annotations

import onnx_ir as ir


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Puts a value in another's place; a graph output keeps its name."""
    if old.is_graph_output():
        old.name, new.name = f"{old.name}.replaced", old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
