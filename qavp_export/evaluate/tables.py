"""The report of a comparison on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_MANY_TYPES = 8


def print_report(report: Mapping[str, Any], baseline: str) -> None:
    """Prints one row for each arm.

    Args:
        report: What `run.report` returned.
        baseline: The arm that the others are compared with.
    """
    console = Console()
    data, shown = report["data"], report["fidelity"]
    if data is not None:
        arms = {name: arm for name, arm in report["arms"].items() if "accuracy" in arm}
        _heading(console, f"{data['name']}: accuracy in % ({data['metric']}), {data['questions']} questions, greedy")
        console.print(_accuracy_table(report, arms, baseline))
        _note(console, "Intervals: bootstrap over questions, paired for differences. p: exact McNemar test.")
        kinds = next(iter(arms.values()))["by_type"]
        if 1 < len(kinds) <= _MANY_TYPES:
            counts = ", ".join(f"{kind} {found['questions']}" for kind, found in kinds.items())
            _heading(console, f"by type of question ({counts})")
            console.print(_type_table(arms, list(kinds)))
    if shown is not None:
        _heading(console, f"fidelity to full precision with all tokens, over {shown['prompts']} of its greedy answers")
        console.print(_fidelity_table(report))


def _heading(console: Console, text: str) -> None:
    console.print(text, style="bold", highlight=False, markup=False)


def _note(console: Console, text: str) -> None:
    console.print(text, style="dim", highlight=False, markup=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("arm", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _accuracy_table(report: Mapping[str, Any], arms: Mapping[str, Any], baseline: str) -> Table:
    table = _table("tokens", "all [95%]", f"less {baseline} [95%]", "p")
    against = {
        **{pair["a"]: (pair, 1) for pair in report["comparisons"] if pair["b"] == baseline},
        **{pair["b"]: (pair, -1) for pair in report["comparisons"] if pair["a"] == baseline},
    }
    for name, arm in arms.items():
        low, high = (100 * bound for bound in arm["interval_95"])
        difference, p = _difference(*against[name]) if name in against else ("", "")
        table.add_row(
            f"{name}, {arm['seeds']} seeds" if arm["seeds"] > 1 else name,
            _tokens(arm["vision_tokens"], arm["recipe"]),
            f"{100 * arm['accuracy']:.1f} [{low:.1f}, {high:.1f}]",
            difference,
            p,
        )
    return table


def _type_table(arms: Mapping[str, Any], kinds: Sequence[str]) -> Table:
    table = _table(*kinds)
    for name, arm in arms.items():
        table.add_row(name, *(f"{100 * arm['by_type'][kind]['accuracy']:.1f}" for kind in kinds))
    return table


def _difference(pair: Mapping[str, Any], sign: int) -> tuple[str, str]:
    # Adding 0 turns -0.0 into 0.0.
    middle, low, high = (100 * sign * bound + 0.0 for bound in (pair["difference"], *pair["interval_95"]))
    low, high = min(low, high), max(low, high)
    test = pair["mcnemar"]
    p = "" if test is None else "<0.0001" if test["p"] < 1e-4 else f"{test['p']:.4f}"
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]", p


def _tokens(tokens: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    return f"{recipe['keep']:.4g} of all" if tokens["after"] is None else str(tokens["after"])


def _fidelity_table(report: Mapping[str, Any]) -> Table:
    table = _table("KL in nats [95%]", "same top-1 in % [95%]")
    for name, arm in report["arms"].items():
        if "fidelity" not in arm:
            continue
        found = arm["fidelity"]
        low, high = found["kl_interval_95"]
        least, most = (100 * bound for bound in found["top1_agreement_interval_95"])
        table.add_row(
            name,
            f"{found['kl']:.4f} [{low:.4f}, {high:.4f}]",
            f"{100 * found['top1_agreement']:.1f} [{least:.1f}, {most:.1f}]",
        )
    return table
