"""`sigma ledger`: where the time of runs went, as tables, JSON, or a file for Prometheus."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sigma_train.account import Account, Totals
    from sigma_train.growth_cost import SunkCostLedger


def ledger(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs; one may be in progress")],
    as_json: Annotated[bool, typer.Option("--json", help="print every figure as JSON")] = False,
    prometheus: Annotated[
        Path | None, typer.Option(help="also write FILE for a textfile collector, its name ending in .prom")
    ] = None,
) -> None:
    """Show where the time of runs went."""
    import json

    from sigma_train import ledger_view
    from sigma_train.account import Account, Totals
    from sigma_train.errors import WrongInput
    from sigma_train.events import FILE, read_events

    if len({run.resolve() for run in runs}) < len(runs):
        raise WrongInput(f"ledger wants different runs, found {', '.join(map(str, runs))}")
    accounts: dict[str, Account] = {}
    for run in runs:
        account = accounts[str(run)] = Account(read_events(run / FILE))
        if not account.attempts:
            raise WrongInput(f"{run / FILE} tells of no attempt")
    if prometheus is not None:
        from sigma_train.files import must_be_writable
        from sigma_train.textfile import write_textfile

        with must_be_writable("--prometheus", prometheus.parent):
            write_textfile(prometheus, accounts)
    total = sum((account.totals() for account in accounts.values()), Totals())
    costs = {str(run): cost for run in runs if (cost := _cost(run)) is not None}
    if as_json:
        by_run = {
            name: account.figures() | (ledger_view.cost(costs[name]) if name in costs else {})
            for name, account in accounts.items()
        }
        typer.echo(json.dumps({"runs": by_run, "total": total.figures()}, indent=2))
        return
    _show(accounts, total, costs)


def _cost(run: Path) -> "SunkCostLedger | None":
    """Of a run that began with other weights, whose settings say so: to know what it has cost takes torch."""
    import tomllib

    try:
        settings = tomllib.loads((run / "config.toml").read_text())
    except (OSError, ValueError):
        return None
    train = settings.get("train")
    if not (isinstance(train, dict) and train.get("init_from")):
        return None
    from sigma_train.growth_cost import ledger_of_run

    return ledger_of_run(run)


def _show(accounts: "dict[str, Account]", total: "Totals", costs: "dict[str, SunkCostLedger]") -> None:
    from rich.console import Console
    from rich.table import Table

    from sigma_train import ledger_view
    from sigma_train.console import say

    console = Console()
    totals = {name: account.totals() for name, account in accounts.items()}
    if len(totals) > 1:
        totals["all runs"] = total
    for name, each in totals.items():
        table = Table("cause", "rank-seconds", "share", "what it is", title=name, title_justify="left")
        for column in table.columns[1:3]:
            column.justify = "right"
        for row in ledger_view.rows(each):
            table.add_row(*row)
        console.print(table)
        for figure, value in ledger_view.facts(each):
            say(console, f"  {figure:24} {value}")
        if name in costs:
            for figure, flops in ledger_view.cost(costs[name]).items():
                say(console, f"  {figure.replace('_', ' '):24} {flops:.4g}")
        if name in accounts:
            for line in ledger_view.story(accounts[name]):
                say(console, f"  {line}")
        console.print()
