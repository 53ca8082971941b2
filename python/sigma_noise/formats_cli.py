"""`sigma noise import` and `sigma noise export`: measurements of other tools, and for other tools."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sigma_noise.options import seconds

if TYPE_CHECKING:
    from sigma_noise.formats import Format
    from sigma_noise.trace import Trace

FORMAT = typer.Option(help="chrome, rtla, netgauge, prometheus or hdr; else told by content and name")


def import_(
    source: Annotated[Path, typer.Argument(help="a file, or a folder of such, one a rank")],
    out: Annotated[Path, typer.Argument(help="a folder, for a file a rank, or FILE.parquet")],
    format: Annotated[str | None, FORMAT] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="whose it is, whatever the file says")] = None,
    events: Annotated[
        list[str] | None,
        typer.Option(help="of a Chrome trace, CATEGORY/NAME[=CALLED], with * and ?; may be repeated"),
    ] = None,
) -> None:
    """Make a measurement of a Chrome trace, of rtla's or the osnoise tracer's text, or of netgauge's detours."""
    from sigma_train.errors import WrongInput

    from sigma_noise.trace import KINDS

    files = sorted(f for f in source.iterdir() if f.is_file()) if source.is_dir() else [source]
    if not files:
        raise WrongInput(f"{source}: an empty folder; import wants files")
    if source.is_dir() and rank is not None and len(files) > 1:
        raise WrongInput(f"--rank is for one file, {source} has {len(files)}")
    if any(out.glob("*.parquet")) or (out.suffix == ".parquet" and out.exists()):
        raise WrongInput(f"{out}: a measurement is there already; name another place")
    trace = _joined([_read(file, format, {"rank": rank, "events": events or None}) for file in files], files)
    _write(trace, out)
    kinds = (f"{sum(len(s) for (_, k, _), s in trace.rows.items() if k == kind):,} {kind}" for kind in KINDS)
    plural = "s" if len(trace.ranks) != 1 else ""
    typer.echo(f"{out}: {', '.join(f'{each} rows' for each in kinds)} of {len(trace.ranks)} rank{plural}")


def export(
    path: Annotated[Path, typer.Argument(help="a measurement: a folder, or a file")],
    to: Annotated[Path, typer.Argument(help="the file to write")],
    format: Annotated[str | None, FORMAT] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="of netgauge's: whose detours")] = None,
    name: Annotated[str | None, typer.Option(help="of netgauge's and hdr: which quanta, or detour")] = None,
    threshold_s: Annotated[
        float | None,
        typer.Option(
            "--threshold", parser=seconds, metavar="TIME", help="above the floor, that makes a detour"
        ),
    ] = None,
    per_rank: Annotated[
        bool, typer.Option("--per-rank", help="of prometheus: a label for each rank")
    ] = False,
    interval_s: Annotated[
        float | None,
        typer.Option("--interval", parser=seconds, metavar="TIME", help="of hdr: a histogram each"),
    ] = None,
) -> None:
    """Write a measurement for Perfetto, LogGOPSim, Prometheus or HdrHistogram."""
    from sigma_train.errors import WrongInput
    from sigma_train.files import must_be_writable

    from sigma_noise.formats import told_by
    from sigma_noise.trace import read

    if threshold_s is not None and not 0 < threshold_s < float("inf"):
        raise WrongInput(
            f"--threshold must be more than 0 s, found {threshold_s:g}; leave it out for the usual one"
        )
    chosen = told_by(to, format, to_write=True)
    options = _applying(
        chosen,
        chosen.write_options,
        {
            "rank": rank,
            "name": name,
            "threshold_s": threshold_s,
            "per_rank": per_rank or None,
            "interval_s": interval_s,
        },
    )
    trace = read(path)
    with must_be_writable("export", to.parent):
        chosen.write(trace, to, **options)
    typer.echo(f"{to}: {to.stat().st_size:,} bytes")


def _read(file: Path, named: str | None, options: dict[str, Any]) -> "Trace":
    from sigma_noise.formats import told_by

    chosen = told_by(file, named, to_write=False)
    return chosen.read(file, **_applying(chosen, chosen.read_options, options))


def _applying(chosen: "Format", known: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Those that were given.  Raises: WrongInput if one would not apply, instead of passing over it."""
    from sigma_train.errors import WrongInput

    from sigma_noise.formats import FORMATS

    given = {key: value for key, value in options.items() if value is not None}
    if strange := [key for key in given if key not in known]:
        called = next(key for key, each in FORMATS.items() if each is chosen)
        option = strange[0].removesuffix("_s").replace("_", "-")
        raise WrongInput(f"--{option} does not apply to the format {called}")
    return given


def _joined(traces: "list[Trace]", files: list[Path]) -> "Trace":
    """Traces of different ranks as one; each rank tells the file it came from and that file's digest.

    Raises: WrongInput if two hold the same rank.
    """
    from sigma_train.errors import WrongInput
    from sigma_train.files import sha256_file

    from sigma_noise.trace import Trace

    ranks: dict[int, dict[str, Any]] = {}
    rows = {}
    for trace, file in zip(traces, files, strict=True):
        if twice := sorted(ranks.keys() & trace.ranks.keys()):
            raise WrongInput(f"{file}: rank {twice[0]} is in {ranks[twice[0]]['imported']['file']} as well")
        imported = {"file": file.name, "sha256": sha256_file(file)}
        ranks |= {rank: {**facts, "imported": imported} for rank, facts in trace.ranks.items()}
        rows |= trace.rows
    run = next((trace.run for trace in traces if trace.run), {})
    return Trace(dict(run), dict(sorted(ranks.items())), rows)


def _write(trace: "Trace", out: Path) -> None:
    from sigma_train.files import must_be_writable

    from sigma_noise.trace import Trace, rank_file

    with must_be_writable("out", out.parent):
        if out.suffix == ".parquet":
            trace.write(out)
            return
        out.mkdir(parents=True, exist_ok=True)
        for rank, facts in trace.ranks.items():
            rows = {key: series for key, series in trace.rows.items() if key[0] == rank}
            Trace(trace.run, {rank: facts}, rows).write(rank_file(out, rank))
