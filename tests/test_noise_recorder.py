"""The recorder's rows are what was stamped, wherever blocks end, and on disk they outlive whatever happens between."""

import gc
import json
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from sigma_noise import parts, trace
from sigma_noise.parts import Parts, make_ready
from sigma_noise.recorder import Recorder
from sigma_noise.trace import Series, rank_file
from sigma_train.errors import WrongInput

HERE = {"boot": "a", "host": "node0"}


def rows(first: int, n: int, rank: int = 0) -> dict[trace.Key, Series]:
    start = np.arange(first, first + n, dtype=np.int64) * 10
    return {
        (rank, "quantum", "step"): Series(start, start + 7, np.arange(first, first + n, dtype=np.float64))
    }


def numbers(found: trace.Trace, rank: int = 0) -> list[int]:
    return found.get(rank, "quantum", "step").value.astype(int).tolist()


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_rows_are_what_was_stamped(block):
    """Defends: rows lost or repeated where a block ends; rows of one name under another; a second taking."""
    recorder = Recorder(3, block)
    forward, step = recorder.code("quantum", "forward"), recorder.code("counter", "step")
    for turn in range(2):
        for i in range(10):
            recorder.add(forward, 100 * i, 100 * i + i)
            recorder.add(step, 100 * i, 100 * i, (1 << 53) - turn)
            recorder.make_room()
        assert len(recorder) == 20
        found = recorder.taken()
        assert len(recorder) == 0
        assert set(found) == {(3, "quantum", "forward"), (3, "counter", "step")}
        got = found[3, "quantum", "forward"]
        assert got.start_ns.tolist() == [100 * i for i in range(10)]
        assert got.end_ns.tolist() == [101 * i for i in range(10)]
        assert got.value.tolist() == [1.0] * 10
        assert found[3, "counter", "step"].value.tolist() == [(1 << 53) - turn] * 10
    assert recorder.taken() == {}


def test_rows_are_in_order_of_their_begin():
    """Defends: a collective that began first and ended last, standing behind those within it."""
    recorder = Recorder(0)
    name = recorder.code("quantum", "a2a")
    for start, end in ((5, 6), (1, 9), (7, 8)):
        recorder.add(name, start, end)
    assert recorder.taken()[0, "quantum", "a2a"].end_ns.tolist() == [9, 6, 8]


def test_a_row_allocates_nothing_that_stays():
    """Defends: rows as objects, which the collector would then have to walk through."""
    recorder = Recorder(0, block=5000)
    name = recorder.code("quantum", "forward")
    before = sys.getallocatedblocks()
    for i in range(5000):
        recorder.add(name, i, i + 1)
    assert sys.getallocatedblocks() - before < 100


def test_what_is_held_is_bounded():
    recorder = Recorder(0, block=10, most=25)
    name = recorder.code("quantum", "forward")
    for i in range(24):
        recorder.add(name, i, i)
    assert not recorder.is_full
    recorder.add(name, 24, 24)
    assert recorder.is_full
    recorder.taken()
    assert not recorder.is_full


def test_pauses_of_the_collector_are_events():
    """Defends: a pause that is not seen, or seen after it was to be; the generation left out."""
    recorder = Recorder(2)
    recorder.watch_gc()
    gc.callbacks[-1]("stop", {"generation": 0})  # of a pause that had begun before
    assert recorder.taken() == {}
    try:
        began = time.monotonic_ns()
        gc.collect(2)
        ended = time.monotonic_ns()
    finally:
        recorder.unwatch_gc()
    gc.collect(2)
    pauses = recorder.taken()[2, "event", "gc"]
    whole = [i for i in range(len(pauses)) if began <= pauses.start_ns[i] <= pauses.end_ns[i] <= ended]
    assert 2.0 in pauses.value[whole]
    assert pauses.end_ns.max() <= ended
    assert pauses.seconds.max() > 1e-5
    assert recorder.taken() == {}


def test_the_file_and_its_parts_are_all_that_was_added(tmp_path):
    """Defends: rows in no file or in two, at any moment; a file that is rewritten for every part."""
    own, folds, n = Parts(tmp_path, 0, {"seed": 1}, HERE), 0, 0
    file = rank_file(tmp_path, 0)
    for _ in range(30):
        before = file.stat().st_ino if file.exists() else 0
        own.add(rows(n, 10))
        n += 10
        folds += file.stat().st_ino != before
        assert numbers(parts.read(tmp_path)) == list(range(n))
        waiting = n - pq.read_metadata(file).num_rows
        assert waiting * 8 < n
    assert folds < 25
    parts.fold(tmp_path, 0)
    assert list((tmp_path / "parts").iterdir()) == []
    whole = trace.read(tmp_path)
    assert numbers(whole) == list(range(n))
    assert whole.run == {"seed": 1}
    assert whole.ranks[0]["boot"] == "a"


def test_what_goes_on_is_joined(tmp_path):
    """Defends: a new start that writes over what the former one left, or gives its parts the same numbers."""
    for start in range(3):
        own = Parts(tmp_path, 0, {}, HERE | {"start": start, "groups": {str(start): [start]}})
        for part in range(3):
            own.add(rows(100 * start + 10 * part, 10))
    assert numbers(parts.read(tmp_path)) == [100 * s + i for s in range(3) for i in range(30)]
    for read in (parts.read, trace.read):
        about = read(tmp_path).ranks[0]
        assert about["start"] == 2
        assert about["groups"] == {"0": [0], "1": [1], "2": [2]}
        parts.fold(tmp_path, 0)


def test_a_death_between_file_and_parts_repeats_nothing(tmp_path, monkeypatch):
    own = Parts(tmp_path, 0, {}, HERE)
    own.add(rows(0, 100))
    own.add(rows(100, 5))
    left = {p.name: p.read_bytes() for p in (tmp_path / "parts").iterdir()}
    assert len(left) == 1
    parts.fold(tmp_path, 0)
    for name, content in left.items():  # as if they had not been removed
        (tmp_path / "parts" / name).write_bytes(content)
    assert numbers(parts.read(tmp_path)) == list(range(105))
    again = Parts(tmp_path, 0, {}, HERE)
    assert list((tmp_path / "parts").iterdir()) == []
    again.add(rows(105, 5))
    assert numbers(parts.read(tmp_path)) == list(range(110))


def test_a_write_that_fails_loses_nothing(tmp_path, monkeypatch):
    """Defends: rows that no disk has and nobody holds; rows that two parts have."""
    own = Parts(tmp_path, 0, {}, HERE)
    own.add(rows(0, 100))
    write, left = pq.ParquetWriter.write_table, [0]

    def full(*args, **named):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        write(*args, **named)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        own.add(rows(100, 20))  # the part
    assert numbers(parts.read(tmp_path)) == list(range(100))
    left[0] = 2
    with pytest.raises(OSError, match="No space left"):
        own.add(rows(120, 30))  # the file that is to hold the part and the one before
    assert numbers(parts.read(tmp_path)) == list(range(150))
    left[0] = 9
    own.add(rows(150, 1))
    assert numbers(trace.read(tmp_path)) == list(range(151))


def test_another_clock_begins_anew_and_keeps_the_former_record(tmp_path):
    """Defends: stamps of two boots in one file, whose order says nothing."""
    for rank in range(2):
        Parts(tmp_path, rank, {}, HERE).add(rows(0, 10, rank))
    assert make_ready(tmp_path, ["a", "a"]) is None
    assert make_ready(tmp_path, ["a"]) is None
    assert make_ready(tmp_path, ["a", "b"]) == tmp_path / "before-1"
    assert not parts.has_any(tmp_path)
    assert numbers(parts.read(tmp_path / "before-1"), 1) == list(range(10))
    Parts(tmp_path, 0, {}, HERE).add(rows(50, 10))
    assert numbers(parts.read(tmp_path)) == list(range(50, 60))


def test_parts_of_ranks_that_are_no_more_are_folded(tmp_path):
    for rank in range(3):
        own = Parts(tmp_path, rank, {}, HERE)
        own.add(rows(0, 100, rank))
        own.add(rows(100, 5, rank))
    make_ready(tmp_path, ["a"])
    assert [p.name[:9] for p in (tmp_path / "parts").iterdir()] == ["rank00000"]
    assert numbers(parts.read(tmp_path), 2) == list(range(105))


def test_parts_of_two_runs_are_refused(tmp_path):
    """Defends: what another run left in the folder, read as this one's."""
    for rank, seed in enumerate((1, 2)):
        Parts(tmp_path, rank, {"program": "sigma train", "seed": seed}, HERE).add(rows(0, 10, rank))
    with pytest.raises(WrongInput, match=r"rank00001.* of another run than .* \(seed 2 and 1\)"):
        parts.read(tmp_path)


def test_a_file_that_is_not_ours_is_refused(tmp_path):
    rank_file(tmp_path, 0).write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(WrongInput, match=r"rank00000\.parquet: not a file of `sigma noise`"):
        Parts(tmp_path, 0, {}, HERE)
    head = {trace.METADATA: json.dumps({"schema": 9, "ranks": {"0": {}}}).encode()}
    pq.write_table(trace.COLUMNS.empty_table().replace_schema_metadata(head), rank_file(tmp_path, 0))
    with pytest.raises(WrongInput, match="schema 9"):
        make_ready(tmp_path, ["a"])
