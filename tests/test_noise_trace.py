"""The file of a measurement: what is written is read again, and what is not ours is refused by a sentence."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sigma_noise.trace import COLUMNS, METADATA, Series, Trace, digests, rank_file, read
from sigma_train.errors import WrongInput


def series(seed: int, n: int) -> Series:
    rng = np.random.default_rng(seed)
    start = np.cumsum(rng.integers(1, 1 << 40, n))
    return Series(start, start + rng.integers(0, 1 << 30, n), rng.normal(size=n))


def trace_of(rank: int) -> Trace:
    rows = {
        (rank, "quantum", "spin"): series(rank, 1000),
        (rank, "quantum", "gemm"): series(rank + 50, 33),
        (rank, "counter", "run_delay_ns"): series(rank + 90, 7),
        (rank, "event", "gc"): series(rank + 99, 1),
    }
    return Trace({"seed": 5, "quantum_ns": 1000}, {rank: {"host": f"node{rank // 2}"}}, rows)


def same(a: Series, b: Series) -> bool:
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("start_ns", "end_ns", "value"))


@pytest.mark.parametrize("as_folder", [True, False])
def test_what_is_written_is_read_again(tmp_path, as_folder):
    """Defends: stamps rounded to f64, rows of one name under another, ranks lost between files."""
    traces = [trace_of(rank) for rank in range(3 if as_folder else 1)]
    for rank, trace in enumerate(traces):
        trace.write(rank_file(tmp_path, rank))
    back = read(tmp_path if as_folder else rank_file(tmp_path, 0))
    assert back.run == {"seed": 5, "quantum_ns": 1000}
    assert back.ranks == {r: {"host": f"node{r // 2}"} for r in range(len(traces))}
    assert back.names() == ["gemm", "spin"]
    assert back.names("event") == ["gc"]
    for trace in traces:
        for (rank, kind, name), want in trace.rows.items():
            assert same(back.get(rank, kind, name), want), (rank, kind, name)
    assert len(back.get(9, "quantum", "spin")) == 0
    assert back.origin_ns == min(int(s.start_ns[0]) for t in traces for s in t.rows.values())
    assert len(digests(tmp_path)) == len(traces)


def test_one_file_of_many_ranks(tmp_path):
    """Defends: dictionaries of several chunks, whose codes differ."""
    rows = {key: s for rank in (3, 1) for key, s in trace_of(rank).rows.items()}
    Trace({}, {1: {}, 3: {}}, rows).write(tmp_path / "all.parquet")
    back = read(tmp_path / "all.parquet")
    assert list(back.ranks) == [1, 3]
    assert set(back.rows) == set(rows)
    assert all(same(back.rows[key], rows[key]) for key in rows)


def test_a_measurement_without_rows(tmp_path):
    Trace({"a": 1}, {0: {}}, {}).write(tmp_path / "x.parquet")
    back = read(tmp_path / "x.parquet")
    assert back.rows == {}
    assert back.run == {"a": 1}
    assert back.origin_ns == 0


def test_what_is_not_ours_is_refused_by_a_sentence(tmp_path):
    def refused(path):
        with pytest.raises(WrongInput) as error:
            read(path)
        return str(error.value)

    assert "no measurement here" in refused(tmp_path)
    assert "no measurement here" in refused(tmp_path / "none")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really PAR1")
    assert "not a file of `sigma noise`" in refused(tmp_path)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    assert "not a file of `sigma noise`" in refused(tmp_path)
    table = COLUMNS.empty_table().replace_schema_metadata(
        {METADATA: json.dumps({"schema": 9, "run": {}, "ranks": {}})}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert "schema 9" in refused(tmp_path)
    for ranks in ({"first": {}}, {"-1": {}}, []):
        head = {METADATA: json.dumps({"schema": 1, "run": {}, "ranks": ranks})}
        pq.write_table(COLUMNS.empty_table().replace_schema_metadata(head), tmp_path / "a.parquet")
        assert "not a file of `sigma noise`: r" in refused(tmp_path)
    trace_of(0).write(tmp_path / "a.parquet")
    trace_of(0).write(tmp_path / "b.parquet")
    assert "rank 0 is in another file" in refused(tmp_path)


def test_a_folder_is_of_one_run_and_has_all_its_ranks(tmp_path):
    """Defends: ranks of two runs compared as if they had run side by side; half a run."""
    run = {"id": "a", "ranks": 2, "seed": 5}
    Trace(run, {0: {}}, {}).write(rank_file(tmp_path, 0))
    with pytest.raises(WrongInput, match="rank 1 of 2 is missing"):
        read(tmp_path)
    assert list(read(rank_file(tmp_path, 0)).ranks) == [0], "one file may be looked at"
    for other in ({"id": "b"}, {"ranks": 3}, {"seed": 6}):
        Trace(run | other, {1: {}}, {}).write(rank_file(tmp_path, 1))
        with pytest.raises(WrongInput, match=f"of another run than .* \\({next(iter(other))} "):
            read(tmp_path)
    Trace(run, {1: {}}, {}).write(rank_file(tmp_path, 1))
    assert list(read(tmp_path).ranks) == [0, 1]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    """Defends: half-written measurements."""
    path = rank_file(tmp_path, 0)
    trace_of(0).write(path)
    before = path.read_bytes()
    monkeypatch.setattr(pq, "write_table", lambda table, file, **_: (file.write(b"x"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        trace_of(1).write(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
