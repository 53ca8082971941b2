"""The rows of a run on disk, added to while it goes on: one file a rank, and parts that are not yet in it.

    rank00003.parquet              everything up to the part that its metadata name
    parts/rank00003-000017.parquet  what was added since, a part each time
    before-1/                      what was recorded under another clock

A part is a file of `trace.py` like the other; metadata are those of the newest.  Parts are folded into the rank's file
once they hold an eighth of its rows, so that in all each row is written nine times at most, and at the end of a run and
where it goes on.  Both are whole or absent; a process that dies in between leaves parts that the file already has, and
these are passed over.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sigma_train.errors import WrongInput
from sigma_train.files import atomic_file, sweep

from sigma_noise import trace
from sigma_noise.trace import COLUMNS, METADATA, Key, Series, Trace, rank_file

FOLD_AT = 8  # a part in so many of the rows that are in the file


class Parts:
    """What one rank adds to `folder`; no other process writes the same rank's."""

    def __init__(self, folder: Path, rank: int, run: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """`run` and `about` are the metadata from now on: the run's, and this rank's.

        Raises: WrongInput if a file of this rank is none of ours; OSError.
        """
        self.folder, self.rank, self.run, self.about = folder, rank, dict(run), dict(about)
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        for place in (folder, folder / "parts"):
            sweep(place, older_than_s=3600)
        fold(folder, rank)
        self._last = _folded(rank_file(folder, rank))
        self._unwritten: list[Mapping[Key, Series]] = []

    def add(self, rows: Mapping[Key, Series]) -> None:
        """Raises: OSError; what was written before stays, and what could not be is written by the next call."""
        if any(map(len, rows.values())):
            self._unwritten.append(rows)
        while self._unwritten:
            part = _part(self.folder, self.rank, self._last + 1)
            Trace(self.run, {self.rank: self.about}, self._unwritten[0]).write(part)
            self._last += 1
            del self._unwritten[0]
        waiting = sum(_rows(part) for part in _parts(self.folder, self.rank))
        if waiting * FOLD_AT >= _rows(rank_file(self.folder, self.rank)):
            fold(self.folder, self.rank)


def fold(folder: Path, rank: int) -> None:
    """Have the rank's file hold its parts, and the metadata of the newest.  It takes the memory of one part.

    Raises: WrongInput for a file that is none of ours; OSError.
    """
    file, parts = rank_file(folder, rank), _parts(folder, rank)
    folded = _folded(file)
    if new := [part for part in parts if _number(part) > folded]:
        head = _head(new[-1])
        former = _head(file)["ranks"][str(rank)] if file.exists() else {}
        head["ranks"][str(rank)] = _newer(former, head["ranks"][str(rank)]) | {"parts": _number(new[-1])}
        told = {METADATA: json.dumps(head, sort_keys=True).encode()}
        with (
            atomic_file(file) as out,
            pq.ParquetWriter(out, COLUMNS.with_metadata(told), compression="zstd") as writer,
        ):
            for source in [file, *new] if file.exists() else new:
                groups = pq.ParquetFile(source)
                for group in range(groups.num_row_groups):
                    writer.write_table(groups.read_row_group(group).replace_schema_metadata(told))
    for part in parts:
        part.unlink(missing_ok=True)


def read(folder: Path) -> Trace:
    """Everything in the folder of a run, parts too.  Raises: as `trace.read`."""
    files = sorted(folder.glob("rank*.parquet"))
    folded = {file.stem: _folded(file) for file in files}
    parts = sorted((folder / "parts").glob("rank*.parquet"))
    files += [part for part in parts if _number(part) > folded.get(part.stem[:-7], 0)]
    if not files:
        return trace.read(folder)
    found = [trace.read(file) for file in files]
    for file, each in zip(files, found, strict=True):
        trace.must_be_of_one_run(folder, file, found[0].run, each.run)
    keys = {key for each in found for key in each.rows}
    rows = {key: _joined([each.rows[key] for each in found if key in each.rows]) for key in keys}
    ranks: dict[int, Mapping[str, Any]] = {}
    for each in found:
        ranks |= {rank: _newer(ranks.get(rank, {}), about) for rank, about in each.ranks.items()}
    return Trace(found[-1].run, dict(sorted(ranks.items())), rows)


def has_any(folder: Path) -> bool:
    return any(folder.glob("rank*.parquet")) or any((folder / "parts").glob("rank*.parquet"))


def make_ready(folder: Path, clocks: Sequence[str]) -> Path | None:
    """For a run that goes on with ranks 0, 1, ... of these clocks, before any of them writes.

    What was recorded under other clocks is moved out of the way: its stamps say nothing beside those to come.  Parts of
    ranks that take no part any more are folded.
    Returns: where the former record is then, if it was moved.  Raises: as `fold`.
    """
    if not has_any(folder):
        return None
    heads = map(_head, [*folder.glob("rank*.parquet"), *(folder / "parts").glob("rank*.parquet")])
    former = [(int(rank), about.get("boot")) for head in heads for rank, about in head["ranks"].items()]
    if all(clocks[rank] == clock for rank, clock in former if rank < len(clocks)):
        for rank in {rank for rank, _ in former if rank >= len(clocks)}:
            fold(folder, rank)
        return None
    number = 1 + sum(1 for _ in folder.glob("before-*"))
    place = folder / f"before-{number}"
    place.mkdir()
    for path in [*folder.glob("rank*.parquet"), folder / "parts"]:
        if path.exists():
            path.rename(place / path.name)
    return place


def _parts(folder: Path, rank: int) -> list[Path]:
    return sorted((folder / "parts").glob(f"rank{rank:05d}-*.parquet"))


def _part(folder: Path, rank: int, number: int) -> Path:
    return folder / "parts" / f"{rank_file(folder, rank).stem}-{number:06d}.parquet"


def _number(part: Path) -> int:
    return int(part.stem[-6:])


def _rows(file: Path) -> int:
    return pq.read_metadata(file).num_rows if file.exists() else 0


def _folded(file: Path) -> int:
    """The last part that a rank's file has."""
    return max(about.get("parts", 0) for about in _head(file)["ranks"].values()) if file.exists() else 0


def _head(file: Path) -> dict[str, Any]:
    try:
        head = trace.checked_head(pq.read_metadata(file).metadata)
        if not head["ranks"]:
            raise ValueError("it is of no rank")
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        told = " ".join(str(error).split())[:200]
        raise WrongInput(f"{file}: not a file of `sigma noise`: {told}") from None
    return head


def _newer(former: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Of a rank.  Its groups are by the number of the attempt, and those of former ones are still of use."""
    return {**former, **about, "groups": former.get("groups", {}) | about.get("groups", {})}


def _joined(series: list[Series]) -> Series:
    start, end, value = (
        np.concatenate([getattr(s, f) for s in series]) for f in ("start_ns", "end_ns", "value")
    )
    order = np.argsort(start, kind="stable")
    return Series(start[order], end[order], value[order])
