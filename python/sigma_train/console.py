"""What commands tell, beside their tables."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def say(console: "Console", text: str, style: str = "") -> None:
    """A line as it is: brackets of a path are no markup, numbers have no colour, and what is long is not broken."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
