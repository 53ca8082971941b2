"""The ledger of a run, as its processes write it, whatever ends them, and as `sigma ledger` shows it."""

import json
import math
import random
import resource
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import forked
import pytest
import rank_faults
from prometheus_client.parser import text_string_to_metric_families
from sigma_train import events
from sigma_train.account import Account
from sigma_train.config import load_config
from sigma_train.errors import WrongInput
from sigma_train.events import FILE, Begin, Event, Spent, read_events, to_line
from sigma_train.ledger import LAUNCHED_AT, Ledger, LedgerWarning, attempt_ended
from sigma_train.model import LanguageModel, flops_per_token
from support import SIGMA, assert_one_sentence, sigma
from test_train_account import NS, at, begin, check, end, steps
from test_train_guard import poison, rows
from test_train_learning import SMALL  # noqa: F401 - of make_trainer


def write(folder: Path, *parts: Event | list[Event] | bytes) -> Path:
    """A run's folder with this ledger."""
    folder.mkdir(exist_ok=True)
    lines = []
    for part in parts:
        lines += (
            [part] if isinstance(part, bytes) else map(to_line, part if isinstance(part, list) else [part])
        )
    (folder / FILE).write_bytes(b"".join(lines))
    return folder


HALF = b'{"at":123,"event":"sp'


def test_a_half_written_line_is_passed_over(tmp_path):
    """At the end, and where the process after the killed one went on in a line of its own."""
    whole = [begin(0, 1), *steps(1, range(1, 3))]
    assert len(list(read_events(write(tmp_path, whole, HALF) / FILE))) == 3
    assert len(list(read_events(write(tmp_path, whole, HALF + b"\n", whole) / FILE))) == 6
    assert len(list(read_events(write(tmp_path, whole, HALF + b"\n", end(5)) / FILE))) == 4


def test_a_line_that_is_finished_while_it_is_read_is_left_to_the_next_reader(tmp_path, monkeypatch):
    """Defends: its second half taken for a line of its own, and the ledger of a run that trains for damaged."""
    lines = [to_line(event) for event in [begin(0, 1), *steps(1, range(1, 4))]]
    path = write(tmp_path, *lines[:2], lines[2][:30]) / FILE

    class Late:
        def validate_json(self, line: bytes) -> Event:
            if line == lines[2][:30]:
                path.write_bytes(b"".join(lines))
            return told.validate_json(line)

    told = events._EVENT
    monkeypatch.setattr(events, "_EVENT", Late())
    assert len(list(read_events(path))) == 2
    assert len(list(read_events(path))) == 4


DAMAGED = [
    (HALF + b"\n", "step", 2),
    (b"\x00\xff\n", "step", 2),
    (b"{}\n", "step", 2),
    (b"[" * 10**5 + b"\n", "step", 2),
    (b'{"at":1e400,"event":"back","step":1}\n', "step", 2),
    (b'{"at":-1,"event":"back","step":1}\n', "step", 2),
    (b'{"at":true,"event":"spent","was":"step"}\n', "step", 2),
    (b'{"at":1,"event":"spent","was":"leisure"}\n', "step", 2),
    (b"garbage\ngarbage\n", "end", 2),
]


@pytest.mark.parametrize("damage, follows, line", DAMAGED, ids=lambda x: ascii(x)[:30])
def test_a_damaged_ledger_is_named(tmp_path, damage, follows, line):
    after = end(9) if follows == "end" else steps(1, range(1, 2))
    run = write(tmp_path / "run", begin(0, 1), damage, after)
    with pytest.raises(WrongInput, match=f"ledger.jsonl is damaged: line {line} is no event of a ledger$"):
        list(read_events(run / FILE))


def test_a_damaged_ledger_does_not_keep_a_run_from_going_on(tmp_path):
    write(tmp_path, begin(0, 1), b"garbage\n", steps(1, range(1, 2)))
    former = (tmp_path / FILE).read_bytes()
    with pytest.warns(LedgerWarning, match="line 2 is no event"), ledger_in(tmp_path) as book:
        book.outcome = "finished"
    assert Account(read_events(tmp_path / FILE)).totals().attempts == 1
    (aside,) = tmp_path.glob("ledger-damaged-*.jsonl")
    assert aside.read_bytes() == former


def ledger_in(folder: Path, **more) -> Ledger:
    book = Ledger(folder / FILE, True)
    book.begin(
        **({"began": book.now(), "ranks": 2, "resumed": 0, "machine": "m", "tokens": 1, "flops": 1} | more)
    )
    return book


def test_a_peak_is_measured_once_a_kind_of_machine(tmp_path):
    with ledger_in(tmp_path) as book:
        assert book.peak is None
        book.measured(10.0)
    for more, peak in ({}, 5.0), ({"machine": "n"}, None), ({"ranks": 4}, None), ({}, 5.0):
        with ledger_in(tmp_path, **more) as book:
            assert book.peak == peak, more


def test_pauses_within_pauses_and_within_a_step(tmp_path):
    """What is before a pause belongs to the step, what is in the inner one not to the outer."""
    with ledger_in(tmp_path) as book:
        book.turn("step")
        time.sleep(0.01)
        with book.pause("checkpoint"):
            time.sleep(0.01)
            with book.pause("check"):
                time.sleep(0.02)
            time.sleep(0.01)
        time.sleep(0.01)
        book.step(1, True)
        live = book.totals()
    read = Account(read_events(tmp_path / FILE)).totals()
    assert {c: read.spent[c] for c in ("useful", "checkpoint", "check")} == {
        c: live.spent[c] for c in ("useful", "checkpoint", "check")
    }
    for cause, least in ("useful", 0.02), ("checkpoint", 0.02), ("check", 0.02):
        assert read.spent[cause] >= 2 * least * NS, "two ranks"
    check(read)


def test_what_goes_wrong_in_a_pause_is_what_is_told(tmp_path):
    with pytest.raises(KeyError), ledger_in(tmp_path) as book, book.pause("validation"):
        raise KeyError("x")
    *_, paused, last, ended = read_events(tmp_path / FILE)
    assert (paused.was, last.was, ended.how, ended.why) == ("validation", "start", "failed", "'x'")


def test_a_full_disk_is_named(tmp_path):
    """A limit on the size of files stands for it; the line that did not fit is passed over."""
    book = ledger_in(tmp_path)
    (tmp_path / "run.lock").touch()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / FILE).stat().st_size + 100, hard))
    try:
        book.step(1, True)
        with pytest.raises(OSError, match=r"^cannot write .*ledger.jsonl: File too large$"):
            book.step(2, True)
        with pytest.warns(LedgerWarning, match="the end of an attempt is not in the ledger: cannot write"):
            attempt_ended(tmp_path, end(1, began=0, launch="x"))
        with pytest.warns(LedgerWarning, match="the end of an attempt is not"), pytest.raises(KeyError), book:
            raise KeyError("of the run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with ledger_in(tmp_path):
        pass
    assert [e.step for e in read_events(tmp_path / FILE) if isinstance(e, Spent) and e.step] == [1]


def test_an_end_is_written_into_nobody_elses_folder(tmp_path):
    """Defends: a folder that is none of a run, made one by a line of ours; another process's ledger."""
    attempt_ended(tmp_path, end(1))
    assert not list(tmp_path.iterdir())


def test_a_restart_is_told_from_a_start_by_the_user(tmp_path, monkeypatch):
    """By when the parent of the ranks was started: before the last line, or after it."""
    write(tmp_path, begin(0, 1), steps(1, range(1, 2)), end(3, "failed"))
    for launched, is_restart in (2, True), (5, False):
        monkeypatch.setenv(LAUNCHED_AT, str(at(launched)))
        with ledger_in(tmp_path, began=at(10)):
            pass
        event = [e for e in read_events(tmp_path / FILE) if isinstance(e, Begin)][-1]
        assert (event.restarted, event.began) == (is_restart, at(10) if is_restart else at(5))
        write(tmp_path, begin(0, 1), steps(1, range(1, 2)), end(3, "failed"))


def test_killed_at_any_moment(cache, tmp_path):
    """Defends: lines that are lost or torn by the next process, a ledger that can then not be read."""
    resumed, random_times, kept = 0, random.Random(0), b""
    for attempt in range(4):
        writer = partial(rank_faults.writes_a_ledger, tmp_path / FILE, resumed)
        with forked.Running([], cache, fault=writer) as process:
            while not process.said():
                assert process.poll() is None
                time.sleep(0.001)
            time.sleep(random_times.uniform(0, 0.03))
            list(read_events(tmp_path / FILE))  # while it is written
            process.kill()
            assert process.wait() == -signal.SIGKILL
        content = (tmp_path / FILE).read_bytes()
        assert content.startswith(kept), "what stood there was changed"
        if attempt % 2:  # as a kill between two pages of a file leaves it
            content = content[: content.rfind(b"{") + 9]
            (tmp_path / FILE).write_bytes(content)
        kept = content
        got = Account(read_events(tmp_path / FILE))
        check(got.totals())
        assert got.totals().attempts == attempt + 1
        assert got.totals().interruptions == attempt
        resumed = got.reached // 2
    assert got.totals().lost_steps > 0


def test_flops_of_a_token_by_hand():
    """smoke: two layers of hidden size 64, two heads of 32, one for keys, eight experts, 512 words."""
    config = load_config("smoke", None, [])
    c = config.model
    assert (c.hidden_size, c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim) == (64, 2, 2, 1, 32)
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 2 * 32
    layer = attention + 8 * 64 + 3 * 64 * c.intermediate_size + 2 * 64
    active = 512 * 64 + 2 * layer + 64
    assert flops_per_token(LanguageModel(config), config) == 6 * active + 12 * 2 * 64 * 64


def test_a_run_that_goes_back(make_trainer, monkeypatch):
    """Step 5 is not fit, so the run goes from 4 to 3 and leaves it out; 4 is computed twice."""
    trainer = make_trainer(
        "run", "train.steps=8", "train.save_every=3", "train.eval_every=100", "guard.on_nonfinite=rollback"
    )
    poison(monkeypatch, trainer, 4, math.nan)
    with trainer.ledger:
        trainer.run()
    got = Account(read_events(trainer.out / FILE))
    totals = got.totals()
    check(totals)
    assert (totals.rollbacks, totals.lost_steps, totals.interruptions, got.reached) == (1, 1, 0, 8)
    assert totals.tokens == trainer.tokens_seen
    assert all(
        totals.spent[cause] for cause in ("useful", "lost", "left_out", "restart", "checkpoint", "start")
    )
    assert got.attempts[-1].how == "finished"


def test_a_run_accounts_for_the_life_of_its_process(cache, tmp_path):
    """Of the second of two, after one that ended on its budget: all but the interpreter's own end."""
    run, prom = tmp_path / "run", tmp_path / "sigma.prom"
    args = ["train", "--preset", "smoke", "--steps", "6", "--out", str(run)]
    args += [
        "--set",
        "train.log_every=2",
        "--set",
        "guard.check_every=2",
        "--set",
        f"train.prometheus={prom}",
    ]
    first = sigma(*args, "--set", "train.time_budget_s=1e-9", env=cache, fault=rank_faults.nothing)
    assert first.returncode == 0, first.stderr
    before = Account(read_events(run / FILE)).totals()
    assert Account(read_events(run / FILE)).reached == 1, "one step whatever the budget"
    started = time.monotonic()
    process = subprocess.Popen([*SIGMA, *args, "--resume"], env=cache, stdout=subprocess.PIPE, text=True)
    stdout, _ = process.communicate(timeout=200)
    life = time.monotonic() - started
    assert process.returncode == 0
    got = Account(read_events(run / FILE))
    totals = got.totals()
    check(totals)
    allocated = (totals.allocated - before.allocated) / NS
    assert 0.6 * life <= allocated <= life + 0.05, "the rest is Python's own end"
    assert (totals.attempts, totals.interruptions, totals.lost_steps, got.reached) == (2, 0, 0, 6)
    assert totals.tokens == 6 * 8 * 64
    assert got.attempts[0].peak == got.attempts[1].peak is not None, "measured once"
    assert all(totals.spent[c] for c in ("start", "useful", "check", "checkpoint", "validation", "report"))
    assert "util " in stdout
    assert "mfu " in stdout
    assert stdout.rstrip().splitlines()[-1].endswith("0 interruptions")
    for name in ("utilisation", "mfu_useful", "mfu_allocated"):
        assert sorted(rows(run, name)) == [2, 4, 6]
    assert "effective utilisation" in (run / "report.html").read_text()
    assert (run / "time.png").stat().st_size > 1000
    told = samples(prom)
    assert told["sigma_train_allocated_rank_seconds_total", str(run)] == pytest.approx(totals.allocated / NS)
    assert told["sigma_train_reached_steps", str(run)] == 6


def samples(path: Path) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(path.read_text())
    found = [sample for family in families for sample in family.samples]
    return {
        (s.name, s.labels["run"], *([s.labels["cause"]] if "cause" in s.labels else [])): s.value
        for s in found
    }


def runs(tmp_path: Path) -> tuple[Path, Path]:
    one = write(tmp_path / "one", begin(0, 1), steps(1, range(1, 4)), end(5))
    again = [begin(9, 10, resumed=2), *steps(10, range(3, 5))]
    return one, write(tmp_path / "two", begin(0, 1, ranks=2), steps(1, range(1, 4)), again, HALF)


def test_sigma_ledger_shows_runs_and_their_total(cache, tmp_path):
    one, two = map(str, runs(tmp_path))
    for run, settings in ((one, "train = 3"), (two, "no settings")):  # of which no cost is asked
        (Path(run) / "config.toml").write_text(settings)
    wide = {**cache, "COLUMNS": "150"}
    result = sigma("ledger", one, two, env=wide)
    assert result.returncode == 0, result.stderr
    for text in (
        "all runs",
        "60.0%",
        "interrupted after step 3: its end was not written; recovered in 3.0 s",
    ):
        assert text in result.stdout
    assert "last attempt, to step 4: no end is written: it runs, or was killed" in result.stdout
    prom = tmp_path / "runs.prom"
    result = sigma("ledger", one, two, "--json", "--prometheus", str(prom), env=cache)
    told = json.loads(result.stdout)
    assert told["runs"][one]["utilisation"] == 0.6
    assert told["total"]["utilisation"] == pytest.approx((3 + 4 + 2) / (5 + 8 + 3))
    assert told["runs"][two]["interrupted"] == [
        {"step": 3, "why": "its end was not written", "recovery_s": 3.0}
    ]
    figures = samples(prom)
    assert figures["sigma_train_utilisation_ratio", one] == 0.6
    assert figures["sigma_train_spent_rank_seconds", two, "lost"] == 2
    assert figures["sigma_train_interruptions_total", two] == 1
    assert not list(tmp_path.glob("runs.prom.*"))


def test_sigma_ledger_refuses_what_is_none(cache, tmp_path):
    one, _ = runs(tmp_path)
    empty = write(tmp_path / "empty")
    damaged = write(tmp_path / "damaged", begin(0, 1), b"x\n", steps(1, range(1, 2)))
    wrong = [
        ((tmp_path / "none",), f"{tmp_path}/none holds no ledger of a run: ledger.jsonl is missing"),
        ((one / FILE,), f"cannot read {one}/ledger.jsonl/ledger.jsonl: Not a directory"),
        ((empty,), f"{empty}/ledger.jsonl tells of no attempt"),
        ((one, damaged), f"{damaged}/ledger.jsonl is damaged: line 2 is no event of a ledger"),
        ((one, f"{empty}/../one"), f"ledger wants different runs, found {one}, {empty}/../one"),
        (
            (one, "--prometheus", tmp_path / "no" / "x.prom"),
            f"--prometheus: cannot write in {tmp_path}/no: No such file or directory; name another folder",
        ),
    ]  # fmt: skip
    for args, message in wrong:
        assert_one_sentence(sigma("ledger", *map(str, args), env=cache), 2, message)


def test_a_textfile_that_cannot_be_written(cache, tmp_path, monkeypatch):
    """At the start it is wrong input, before anything is written; later the run goes on."""
    args = ["train", "--preset", "smoke", "--steps", "1", "--set", "data.max_bytes=200000"]
    result = sigma(
        *args, "--out", str(tmp_path / "run"), "--set", f"train.prometheus={tmp_path}/no/x.prom", env=cache
    )
    message = (
        f"train.prometheus: cannot write in {tmp_path}/no: No such file or directory; name another folder"
    )
    assert_one_sentence(result, 2, message)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]
    (tmp_path / "prom").mkdir()
    book = Ledger(tmp_path / FILE, True, tmp_path / "prom" / "x.prom")
    book.begin(book.now(), 1, 0, "m", 1, 1)
    (tmp_path / "prom" / "x.prom").unlink()
    (tmp_path / "prom").rmdir()
    with pytest.warns(LedgerWarning, match="x.prom: No such file or directory; the run goes on"):
        book.figures()
    (tmp_path / "prom").mkdir()
    with book:
        book.outcome = "finished"
    assert samples(tmp_path / "prom" / "x.prom")["sigma_train_attempts_total", str(tmp_path)] == 1
