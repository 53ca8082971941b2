"""What one model loses and costs at several k, for people: tables and a picture."""

import statistics
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from sigma_train.console import say
from sigma_train.elastic import Elastic, Measured, Plan, in_words
from sigma_train.elastic_allocation import Allocation


def show(elastic: Elastic, measured: list[Measured]) -> None:
    console = Console()
    columns = ("k", "", "bits/byte", "active, M", "MFLOP", "most", "mean", "entropy", "dead")
    table = _table(f"{elastic.checkpoint}, validation split", columns)
    for m in measured:
        load = m.load()
        table.add_row(
            _name(m.plan), elastic.standing(m.plan), f"{m.bits_per_byte:.4f}", _active(m), f"{m.flops / 1e6:.2f}",
            f"{max(load['most']):+.0%}", f"{max(load['mean_deviation']):.0%}", f"{min(load['entropy']):.3f}",
            str(sum(map(int, load["dead"]))),
        )  # fmt: skip
    console.print(table)
    say(console, trained_at(elastic))
    say(
        console,
        "active: parameters that a token meets; MFLOP: of a token's forward, 2 for each and attention",
    )
    say(
        console,
        "load of experts, of the layer where it is worst: most above an even share, mean deviation from it, entropy "
        "(1: even); dead: without a token, of all layers",
    )


def show_search(elastic: Elastic, found: Allocation) -> None:
    """Both paths, the even spread, and what the search has won."""
    console = Console()
    on_front = found.on_the_front()
    columns = ("", "k of each layer", "", "mean k", "searched", "held out", "active, M", "front")
    table = _table(f"{elastic.checkpoint}, mean k at most {found.mean_k:g}", columns)
    for name, plans in _parts(found):
        for plan in plans:
            m, standing = found.judged[plan], elastic.standing(plan)
            table.add_row(
                name, in_words(plan), "" if standing == "trained" else standing, f"{statistics.mean(plan):.2f}",
                f"{found.searched[plan]:.4f}", f"{m.bits_per_byte:.4f}", _active(m), "*" if on_front[plan] else "",
            )  # fmt: skip
            name = ""
        table.add_section()
    console.print(table)
    say(console, trained_at(elastic))
    say(
        console,
        f"found {in_words(found.found.plan)}, of {found.found.tried} plans tried; bits per byte: searched on the half "
        "of the batches on which plans were chosen, held out on the other; front: no plan here has both less cost and "
        "less loss held out",
    )
    for plan, gain, error in found.gains():
        say(console, f"held out, {gain:+.4f} ± {error:.4f} bits per byte are saved over {in_words(plan)}")
    if not found.gains():
        say(console, "this is the even spread itself")


def trained_at(elastic: Elastic) -> str:
    """What the run was trained at, in a sentence."""
    layers = [", ".join(map(str, sorted(layer))) for layer in elastic.seen]
    told = f"{layers[0]} in each layer" if len(set(layers)) == 1 else "layer by layer: " + "; ".join(layers)
    return f"trained at k = {told}; beyond the largest of these is extrapolation"


def picture(found: Allocation) -> bytes:
    """Loss held out over mean k: both paths, the even spread, and the same k in all layers."""
    import matplotlib.pyplot as plt

    from sigma_train.report import png

    figure, axes = plt.subplots(figsize=(8, 5))
    for (name, plans), style in zip(_parts(found), ("o-", "s-", "D", "x--"), strict=True):
        points = [(statistics.mean(plan), found.judged[plan].bits_per_byte) for plan in plans]
        axes.plot(*zip(*points, strict=True), style, label=name, alpha=0.8)
    best = found.found.plan
    axes.annotate(
        in_words(best), (statistics.mean(best), found.judged[best].bits_per_byte), xytext=(6, 8),
        textcoords="offset points",
    )  # fmt: skip
    axes.set(xlabel="experts a token and layer, mean", ylabel="held out, bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    return png(figure)


def _parts(found: Allocation) -> list[tuple[str, tuple[Plan, ...]]]:
    return [
        ("lowered", found.found.lowered),
        ("raised", found.found.raised),
        ("even", tuple(dict.fromkeys(found.even))),
        ("uniform", found.uniform),
    ]


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number > 1 and column else "left", overflow="fold")
    return table


def _name(plan: Plan) -> str:
    return str(plan[0]) if len(set(plan)) == 1 else in_words(plan)


def _active(m: Measured) -> str:
    return f"{m.active_parameters / 1e6:.3f}"
