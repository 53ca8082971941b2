"""What a measurement leaves behind: one table of five columns, in one Parquet file a rank.

| column | type | a quantum | a counter | an event |
|---|---|---|---|---|
| rank | int32 | who measured | who measured | who measured |
| kind | string | "quantum" | "counter" | "event" |
| name | string | its kernel: spin, gemm, copy, grouped, a2a, or the phase of a step | what is counted | the cause |
| start_ns | int64 | begin | when it was read | begin |
| end_ns | int64 | end | the same | end |
| value | float64 | work done: 1 of fixed work, units of fixed time | what it said, rising | a detail of the cause |

Stamps are nanoseconds of CLOCK_MONOTONIC of the rank's host, so ranks of one host share a clock.  The file's
metadata hold, under `sigma_noise`, a JSON object: `schema`, `run` (what was asked for, the same on every rank) and
`ranks`, by number: host, clock, what measures it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from sigma_train.errors import WrongInput
from sigma_train.files import atomic_file, sha256_file

SCHEMA = 1
METADATA = b"sigma_noise"
COLUMNS = pa.schema(
    [
        ("rank", pa.int32()),
        ("kind", pa.dictionary(pa.int8(), pa.string())),
        ("name", pa.dictionary(pa.int32(), pa.string())),
        ("start_ns", pa.int64()),
        ("end_ns", pa.int64()),
        ("value", pa.float64()),
    ]
)
OF_A_RUN = ("id", "program", "tool", "seed", "ranks")  # of `run`: where these differ, so do the runs
KINDS = ("quantum", "counter", "event")


@dataclass(frozen=True)
class Series:
    """Rows of one rank, kind and name in order of their begin: stamps in ns, int64 [n], and value, f64 [n]."""

    start_ns: NDArray[np.int64]
    end_ns: NDArray[np.int64]
    value: NDArray[np.float64]

    def __post_init__(self) -> None:
        if not len(self.start_ns) == len(self.end_ns) == len(self.value):
            raise ValueError(
                f"Series: start_ns, end_ns and value must be of one length, found {len(self.start_ns)}, "
                f"{len(self.end_ns)} and {len(self.value)}"
            )

    def __len__(self) -> int:
        return len(self.start_ns)

    @property
    def seconds(self) -> NDArray[np.float64]:
        """How long each took."""
        return (self.end_ns - self.start_ns) * 1e-9

    def since(self, origin_ns: int) -> NDArray[np.float64]:
        """When each began, seconds after `origin_ns`."""
        return (self.start_ns - origin_ns) * 1e-9


Key = tuple[int, str, str]  # rank, kind, name


@dataclass(frozen=True)
class Trace:
    """Everything that was measured.  `run` and `ranks` are JSON objects; `ranks` is keyed by the rank's number."""

    run: Mapping[str, Any]
    ranks: Mapping[int, Mapping[str, Any]]
    rows: Mapping[Key, Series] = field(repr=False)

    def names(self, kind: str = "quantum") -> list[str]:
        return sorted({name for _, k, name in self.rows if k == kind})

    def get(self, rank: int, kind: str, name: str) -> Series:
        """An empty series where there is none."""
        return self.rows.get((rank, kind, name), EMPTY)

    def of(self, rank: int, kind: str) -> Iterator[tuple[str, Series]]:
        """The names of a rank and kind, with their rows."""
        return (
            (name, series) for (r, k, name), series in sorted(self.rows.items()) if (r, k) == (rank, kind)
        )

    @property
    def origin_ns(self) -> int:
        """The first begin of all."""
        return min((int(s.start_ns[0]) for s in self.rows.values() if len(s)), default=0)

    def write(self, path: Path) -> None:
        """One file, whole or absent.  Raises OSError."""
        tables = [_table(key, series) for key, series in sorted(self.rows.items())]
        head = {
            "schema": SCHEMA,
            "run": dict(self.run),
            "ranks": {str(r): dict(m) for r, m in self.ranks.items()},
        }
        table = pa.concat_tables(tables) if tables else COLUMNS.empty_table()
        table = table.replace_schema_metadata({METADATA: json.dumps(head, sort_keys=True).encode()})
        with atomic_file(path) as file:
            pq.write_table(table, file, compression="zstd")


EMPTY = Series(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float64))


def rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank:05d}.parquet"


def read(path: Path) -> Trace:
    """A file, or all files of a folder.

    Raises: WrongInput if there are none, one is no file of ours, two hold the same rank, or those of a folder are of
    several runs or lack a rank of theirs.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise WrongInput(f"{path}: no measurement here; `sigma noise run --out {path}` makes one")
    run: dict[str, Any] = {}
    ranks: dict[int, Mapping[str, Any]] = {}
    rows: dict[Key, Series] = {}
    for file in files:
        head, table = _checked(file)
        own = {int(r): m for r, m in head["ranks"].items()}
        if twice := sorted(ranks.keys() & own.keys()):
            raise WrongInput(
                f"{file}: rank {twice[0]} is in another file of {path} as well; give each run its folder"
            )
        run = run or head["run"]
        must_be_of_one_run(path, file, run, head["run"])
        ranks |= own
        rows |= _split(table)
    if path.is_dir() and (missing := sorted(set(range(run.get("ranks", 0))) - ranks.keys())):
        raise WrongInput(f"{path}: rank {missing[0]} of {run['ranks']} is missing; that run did not end well")
    return Trace(run, dict(sorted(ranks.items())), rows)


def must_be_of_one_run(path: Path, file: Path, run: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raises: WrongInput."""
    if wrong := [name for name in OF_A_RUN if run.get(name) != other.get(name)]:
        raise WrongInput(
            f"{file}: of another run than the other files of {path} ({wrong[0]} {other.get(wrong[0])!r} and "
            f"{run.get(wrong[0])!r}); give each run its folder"
        )


def checked_head(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The JSON object of a file's metadata.  Raises: KeyError, TypeError or ValueError where it is none of ours."""
    head: dict[str, Any] = json.loads((metadata or {})[METADATA])
    if head["schema"] != SCHEMA:
        raise ValueError(f"schema {head['schema']}; this version reads {SCHEMA}")
    if not isinstance(head["run"], dict) or not isinstance(head["ranks"], dict):
        raise ValueError("run and ranks must be objects")
    if wrong := [rank for rank in head["ranks"] if not (rank.isascii() and rank.isdigit())]:
        raise ValueError(f"ranks must be whole numbers, found {wrong[0]!r}")
    if not isinstance(head["run"].get("ranks", 0), int):
        raise ValueError(f"run.ranks must be a whole number, found {head['run']['ranks']!r}")
    return head


def digests(path: Path) -> dict[str, str]:
    """sha256 of each file, by name."""
    files: Iterable[Path] = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    return {file.name: sha256_file(file) for file in files}


def _table(key: Key, series: Series) -> pa.Table:
    rank, kind, name = key
    n = len(series)
    same = pa.array(np.zeros(n, np.int8)), pa.array(np.zeros(n, np.int32))
    return pa.table(
        [
            pa.array(np.full(n, rank, np.int32)),
            pa.DictionaryArray.from_arrays(same[0], [kind]),
            pa.DictionaryArray.from_arrays(same[1], [name]),
            pa.array(series.start_ns),
            pa.array(series.end_ns),
            pa.array(series.value),
        ],
        schema=COLUMNS,
    )


def _checked(file: Path) -> tuple[dict[str, Any], pa.Table]:
    try:
        table = pq.read_table(file)
        head = checked_head(table.schema.metadata)
        if not table.schema.equals(COLUMNS):
            raise ValueError(f"its columns are {', '.join(table.schema.names)}")
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise WrongInput(
            f"{file}: not a file of `sigma noise`: {' '.join(str(error).split())[:200]}"
        ) from None
    return head, table


def _split(table: pa.Table) -> dict[Key, Series]:
    table = table.unify_dictionaries().combine_chunks()
    if not table.num_rows:
        return {}
    kinds, names = (_codes(table[column]) for column in ("kind", "name"))
    rank = table["rank"].to_numpy()
    start, end, value = (table[column].to_numpy() for column in ("start_ns", "end_ns", "value"))
    order = np.lexsort((start, names[0], kinds[0], rank))
    keys = np.stack([rank[order], kinds[0][order], names[0][order]])
    cuts = np.flatnonzero(np.any(keys[:, 1:] != keys[:, :-1], axis=0)) + 1
    return {
        (int(rank[at[0]]), kinds[1][kinds[0][at[0]]], names[1][names[0][at[0]]]): Series(
            start[at], end[at], value[at]
        )
        for at in np.split(order, cuts)
    }


def _codes(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[str]]:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    return array.indices.to_numpy().astype(np.int64), array.dictionary.to_pylist()
