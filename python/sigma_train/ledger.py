"""The writer of ledger.jsonl: what the processes of a run did and when, added line by line and never taken back.

A line is one write of bytes that the system then holds, so a process that is killed loses the time since its last line,
which is a step's at most while it trains, and nothing that was written.  Nothing is synced: a machine that loses power
may lose the last half minute of lines.
"""

import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from sigma_train.account import Account, Totals
from sigma_train.errors import Stopped, WrongInput
from sigma_train.events import FILE, Back, Begin, End, Event, How, Peak, Spent, Was, read_events, to_line
from sigma_train.files import failed_writes_are_oserrors, must_be_writable
from sigma_train.folder import LOCK, claimed

LAUNCHED_AT = "SIGMA_LAUNCHED_AT"  # when the process that starts the ranks was itself started
SHORT = 1_000_000  # ns: what is left of a step before a pause may count as the pause's
TEXTFILE_EVERY = 10_000_000_000  # ns


class LedgerWarning(UserWarning):
    """Something about the ledger that does not keep a run from training."""


class Ledger:
    """A run's ledger, written by its first rank; on the others it does nothing.

    Use as a context manager from `begin` to the last file of the run: it writes how the attempt ended.
    textfile: where the figures are left for Prometheus, if anywhere.
    """

    def __init__(self, path: Path, is_first: bool, textfile: Path | None = None) -> None:
        self._path, self._is_first, self._textfile = path, is_first, textfile
        self._fd = -1
        self._wall, self._clock = time.time_ns(), time.monotonic_ns()
        self._now: Was = "start"
        self._last = self._textfile_due = 0
        self.account = Account()
        self.outcome: How | None = None  # of the training; None: it has not come to an end of its own

    def now(self) -> int:
        return self._wall + time.monotonic_ns() - self._clock

    def begin(self, began: int, ranks: int, resumed: int, machine: str, tokens: int, flops: int) -> None:
        """Open the file and write that an attempt has begun; its arguments are those of `events.Begin`.

        Raises: WrongInput if the textfile cannot be written.
        """
        if not self._is_first:
            return
        self.account = _earlier(self._path)
        is_restarted = self._is_restarted()
        launched = int(os.environ.get(LAUNCHED_AT, began))
        peaks = (a.peak for a in reversed(self.account.attempts) if a.machine == machine and a.ranks == ranks)
        peak = next((peak * ranks for peak in peaks if peak), None)
        event = Begin(
            at=self.now(), began=began if is_restarted else min(began, launched), ranks=ranks, resumed=resumed,
            restarted=is_restarted, launch=_launch(), machine=machine, tokens=tokens, flops=flops, peak=peak,
        )  # fmt: skip
        if self._textfile is not None:
            with must_be_writable("train.prometheus", self._textfile.parent):
                self._write_textfile(self._textfile)
        self._fd = _open(self._path)
        self._write(event)

    def _is_restarted(self) -> bool:
        """Whether a program started this attempt after the one before, of which the ledger tells."""
        if LAUNCHED_AT in os.environ:
            return self.account.last_at >= int(os.environ[LAUNCHED_AT])
        return bool(self.account.attempts) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"

    @property
    def peak(self) -> float | None:
        """FLOP/s of a rank, where this attempt knows it."""
        return self.account.attempts[-1].peak if self.account.attempts else None

    def measured(self, flops_per_s: float) -> None:
        """The peak of all ranks."""
        self._write(Peak(at=self.now(), flops_per_s=flops_per_s))

    def turn(self, now: Was) -> None:
        """What was done until here is over; the time from here on goes into `now`."""
        self._write(Spent(at=self.now(), was=self._now))
        self._now = now

    def step(self, number: int, is_learned: bool) -> None:
        """A step is at its end: all time since the last, but for pauses, was its."""
        self._write(Spent(at=self.now(), was="step" if is_learned else "left_out", step=number))

    @contextlib.contextmanager
    def pause(self, cause: Was) -> Iterator[None]:
        """What is done in this block is no part of a step.  Pauses may lie within one another."""
        if self._fd < 0:
            yield
            return
        former = self._now
        if self.now() - self._last > SHORT:
            self._write(Spent(at=self.now(), was=former))
        self._now = cause
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):  # a full disk, of which the error tells already
                self._write(Spent(at=self.now(), was=cause))
            raise
        finally:
            self._now = former
        self._write(Spent(at=self.now(), was=cause))

    def gone_back(self, step: int) -> None:
        """To the checkpoint of this step; the time that took was paused for."""
        self._write(Back(at=self.now(), step=step))

    def figures(self) -> dict[str, float]:
        """What a row of the metrics shows of the whole run; leaves the textfile too, if the last is old enough."""
        if self._fd < 0:
            return {}
        totals = self.account.totals()
        if self.now() >= self._textfile_due:
            self._textfile_due = self.now() + TEXTFILE_EVERY
            self._try_textfile()
        shares = {
            "utilisation": totals.utilisation,
            "mfu_useful": totals.mfu_useful,
            "mfu_allocated": totals.mfu_allocated,
        }
        return {name: share for name, share in shares.items() if share is not None}

    def totals(self) -> Totals:
        return self.account.totals()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd < 0:
            return
        stopped: How = "signal" if isinstance(error, Stopped) else "failed"
        how = self.outcome or stopped
        if error is not None and stopped == "failed":
            how = "failed"
        why = " ".join(str(error or "").split())[:500]
        try:
            self._write(Spent(at=self.now(), was=self._now))
            self._write(End(at=self.now(), how=how, why=why, launch=_launch()))
        except OSError as lost:
            if error is None:
                raise
            if not isinstance(error, OSError):  # a full disk, of which the error tells already
                _warn_of_the_end(lost)
        finally:
            os.close(self._fd)
            self._fd = -1
        self._try_textfile()

    def _write(self, event: Event) -> None:
        if self._fd < 0:
            return
        _append(self._fd, event, self._path)
        self.account.add(event)
        self._last = event.at

    def _try_textfile(self) -> None:
        if self._textfile is None:
            return
        try:
            self._write_textfile(self._textfile)
        except OSError as error:
            warnings.warn(
                f"train.prometheus: cannot write {self._textfile}: {error.strerror}; the run goes on",
                LedgerWarning,
                stacklevel=3,
            )

    def _write_textfile(self, path: Path) -> None:
        from sigma_train.textfile import write_textfile  # here: most runs have none

        write_textfile(path, {str(self._path.parent): self.account})


def attempt_ended(folder: Path, end: End) -> None:
    """What started several ranks writes how they ended, as a killed one writes nothing.

    Not where the folder is none of a run yet, or another process trains in it.  A disk that is full is a warning: the
    ranks may start again all the same.
    """
    if not (folder / LOCK).exists():
        return
    path = folder / FILE
    try:
        with contextlib.suppress(WrongInput), claimed(folder), _opened(path) as fd:
            _append(fd, end, path)
    except OSError as error:
        _warn_of_the_end(error)


def _warn_of_the_end(error: OSError) -> None:
    warnings.warn(f"the end of an attempt is not in the ledger: {error}", LedgerWarning, stacklevel=3)


def process_start() -> int:
    """The wall clock, ns, when this process was started, to a hundredth of a second; elsewhere than on Linux: now."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.time_ns() - int(age * 1e9)
    return time.time_ns()


def _launch() -> str | None:
    return os.environ.get("TORCHELASTIC_RUN_ID")


def _earlier(path: Path) -> Account:
    """What a ledger that is there tells; a damaged one is set aside, so that the run can go on."""
    if not path.exists():
        return Account()
    try:
        return Account(read_events(path))
    except WrongInput as error:
        aside = path.with_name(f"{path.stem}-damaged-{time.time_ns()}{path.suffix}")
        path.rename(aside)
        warnings.warn(
            f"{error}; it is {aside} from now on, and a new one begins", LedgerWarning, stacklevel=2
        )
        return Account()


def _open(path: Path) -> int:
    """To add at its end, in a line of its own whatever a killed process left there."""
    with failed_writes_are_oserrors(path):
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            os.write(fd, b"\n")
    return fd


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = _open(path)
    try:
        yield fd
    finally:
        os.close(fd)


def _append(fd: int, event: Event, path: Path) -> None:
    line = to_line(event)
    try:
        while line:  # a disk that fills takes a part, and refuses the rest
            line = line[os.write(fd, line) :]
    except OSError as error:  # failed_writes_are_oserrors would cost a third of the time of a line
        raise OSError(f"cannot write {path}: {error.strerror}") from None
