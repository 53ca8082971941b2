"""The report: one HTML page that needs no network, its pictures as PNGs beside it, and all numbers as JSON."""

import base64
import io
from pathlib import Path

import matplotlib.pyplot as plt
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from sigma_train.files import atomic_file, write_json, write_text

from sigma_noise import screen
from sigma_noise.analysis import Analysis
from sigma_noise.as_json import as_json
from sigma_noise.plots import figures
from sigma_noise.trace import Trace

DPI = 110
MOST_CHANGES = 64


def write(trace: Trace, found: Analysis, out: Path) -> Path:
    """report.html, analysis.json and a PNG a picture into the folder; gives the page.  Raises OSError."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = {title: png(figure) for title, figure in figures(trace, found).items()}
    for title, content in pictures.items():
        with atomic_file(out / f"{title.lower().replace(' ', '-')}.png") as file:
            file.write(content)
    write_json(out / "analysis.json", as_json(found))
    write_text(out / "report.html", rendered(found, pictures))
    return out / "report.html"


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def rendered(found: Analysis, pictures: dict[str, bytes]) -> str:
    environment = Environment(
        loader=PackageLoader("sigma_noise", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "time": screen.time_of,
        "share": screen.share_of,
        "untold": screen.untold,
        "clock": screen.clocks_of,
    }
    changes = [(series, change) for series in found.series for change in series.changes]
    return environment.get_template("page.html.j2").render(
        found=found,
        first=screen.lines(found),
        detours_of=screen.detours_of,
        changes=sorted(changes, key=lambda of: -abs(of[1].shift.estimate)),
        most_changes=MOST_CHANGES,
        pictures={title: base64.b64encode(content).decode() for title, content in pictures.items()},
    )
