"""The report of a comparison on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_MANY_TYPES = 8
_WIDE = 140  # columns of a table that is not printed on a terminal


def print_report(report: Mapping[str, Any], baseline: str) -> None:
    """Prints one row for each arm.

    Args:
        report: What `run.report` returned.
        baseline: The arm that the others are compared with.
    """
    console = Console()
    console = console if console.is_terminal else Console(width=_WIDE)
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
        console.print(_fidelity_table(report, baseline))


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
    shares = [arm["foreground_kept"] for arm in arms.values()]
    told = any(share is not None for share in shares)
    table = _table("tokens", "all [95%]", f"less {baseline} [95%]", "p", *(["foreground kept"] if told else []))
    against = {
        **{pair["a"]: (pair, 1) for pair in report["comparisons"] if pair["b"] == baseline},
        **{pair["b"]: (pair, -1) for pair in report["comparisons"] if pair["a"] == baseline},
    }
    for (name, arm), share in zip(arms.items(), shares, strict=True):
        low, high = (100 * bound for bound in arm["interval_95"])
        difference, p = _difference(*against[name]) if name in against else ("", "")
        table.add_row(
            f"{name}, {arm['seeds']} seeds" if arm["seeds"] > 1 else name,
            _tokens(arm["vision_tokens"], arm["recipe"]),
            f"{100 * arm['accuracy']:.1f} [{low:.1f}, {high:.1f}]",
            difference,
            p,
            *([] if share is None else [f"{100 * share:.0f}"]),
        )
    return table


def _type_table(arms: Mapping[str, Any], kinds: Sequence[str]) -> Table:
    table = _table(*kinds)
    for name, arm in arms.items():
        table.add_row(name, *(f"{100 * arm['by_type'][kind]['accuracy']:.1f}" for kind in kinds))
    return table


def _difference(pair: Mapping[str, Any], sign: int) -> tuple[str, str]:
    test = pair["mcnemar"]
    p = "" if test is None else "<0.0001" if test["p"] < 1e-4 else f"{test['p']:.4f}"
    return _signed(pair, sign, 100, 1), p


def _signed(pair: Mapping[str, Any], sign: int, factor: float, digits: int) -> str:
    # Adding 0 turns -0.0 into 0.0.
    middle, low, high = (factor * sign * bound + 0.0 for bound in (pair["difference"], *pair["interval_95"]))
    low, high = min(low, high), max(low, high)
    return f"{middle:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _tokens(tokens: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    return f"{recipe['keep']:.4g} of all" if tokens["after"] is None else str(tokens["after"])


def _fidelity_table(report: Mapping[str, Any], baseline: str) -> Table:
    arms = {name: arm["fidelity"] for name, arm in report["arms"].items() if "fidelity" in arm}
    against = [f"KL less {baseline} [95%]"] if baseline in arms else []
    pairs = {
        **{pair["a"]: (pair["kl"], 1) for pair in report["fidelity_comparisons"] if pair["b"] == baseline},
        **{pair["b"]: (pair["kl"], -1) for pair in report["fidelity_comparisons"] if pair["a"] == baseline},
    }
    table = _table("KL in nats [95%]", *against, "same top-1 in % [95%]")
    for name, found in arms.items():
        low, high = found["kl_interval_95"]
        least, most = (100 * bound for bound in found["top1_agreement_interval_95"])
        difference = _signed(*pairs[name], 1, 4) if name in pairs else ""
        table.add_row(
            name,
            f"{found['kl']:.4f} [{low:.4f}, {high:.4f}]",
            *([difference] if against else []),
            f"{100 * found['top1_agreement']:.1f} [{least:.1f}, {most:.1f}]",
        )
    return table
