"""Tables of the pages that commands write."""

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    head, *body = (f"| {' | '.join(row)} |" for row in (columns, *rows))
    return [head, "|---" * len(columns) + "|", *body]
