"""Every rank asks every other one: how soon it answers, how fast, and whether what comes is what was sent."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median, median_low

import torch
import torch.distributed as dist
from sigma_train.ranks import Ranks
from torch import Tensor

from sigma_kernels.validation.inputs import noise
from sigma_kernels.validation.rates import Rate
from sigma_kernels.validation.result import OK, SLOW, WRONG, Result

SMALL, LARGE = 1, 1 << 19  # of an answer, in numbers of 8 bytes
ASKS = {SMALL: 20, LARGE: 5}
BATCHES = 3
FACTOR = 2.0  # of the median of all pairs: ranks of one node lie at different distances, so less is no fault
LATENCY_FLOOR_S = 2e-4  # of a median that is judged: what a busy scheduler takes

Matrix = list[list[float]]  # [rank that asks][rank that answers]; the diagonal is 0


@dataclass
class Pairs:
    """What all ranks found: seconds until a small answer was there and until a large one was, and wrong answers."""

    latency: list[Matrix] = field(default_factory=list)  # by batch
    transfer: list[Matrix] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def best(self, of: list[Matrix]) -> Matrix:
        """Of each pair the best batch."""
        return [[min(entries) for entries in zip(*rows, strict=True)] for rows in zip(*of, strict=True)]


def rounds(P: int) -> Iterator[list[tuple[int, int]]]:
    """All pairs, in rounds in which each rank has one partner at most: the circle method of tournaments."""
    seats = list(range(P + P % 2))  # seat P is nobody
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        yield [(min(pair), max(pair)) for pair in pairs if max(pair) < P]
        seats = [seats[0], seats[-1], *seats[1:-1]]


class Partners:
    """The messages of one rank."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
        self.group = dist.new_group(backend="nccl") if gpus else None
        self.device = f"cuda:{ranks.rank % gpus}" if gpus else "cpu"
        numbers = torch.from_numpy(noise(LARGE + 1024, 18).view("int64"))
        self.numbers = numbers.to(self.device)
        self.wrong: set[str] = set()

    def content(self, of: int, to: int, turn: int, size: int) -> Tensor:
        """What rank `of` answers to rank `to` at its `turn`-th question."""
        first = (131 * of + 31 * to + 7 * turn) % 1021
        return self.numbers[first : first + size]

    def ask(self, other: int, turn: int, size: int) -> float:
        """Seconds from when the question was on its way until the answer was there."""
        answer = torch.empty(size, dtype=torch.int64, device=self.device)
        asked = dist.isend(self.numbers[:1], other, group=self.group)  # send would wait until it is heard
        start = time.perf_counter()
        dist.recv(answer, other, group=self.group)
        self.wait()
        took = time.perf_counter() - start
        if asked is not None:  # None: to a rank that is not in the group, which all are
            asked.wait()
        if not torch.equal(answer, self.content(other, self.ranks.rank, turn, size)):
            self.wrong.add(f"rank {self.ranks.rank} was answered wrongly by rank {other}")
        return took

    def answer(self, other: int, turn: int, size: int) -> None:
        question = torch.empty(1, dtype=torch.int64, device=self.device)
        dist.recv(question, other, group=self.group)
        dist.send(self.content(self.ranks.rank, other, turn, size), other, group=self.group)

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)

    def batch(self) -> tuple[list[float], list[float]]:
        """This rank's row of both matrices."""
        P, mine = self.ranks.size, self.ranks.rank
        rows = {SMALL: [0.0] * P, LARGE: [0.0] * P}
        for pairs in rounds(P):
            dist.barrier()
            for low, high in (pair for pair in pairs if mine in pair):
                for asking, other in ((low, high), (high, low)):
                    for size, row in rows.items():
                        if mine == asking:
                            row[other] = median(self.ask(other, turn, size) for turn in range(ASKS[size]))
                        else:
                            for turn in range(ASKS[size]):
                                self.answer(asking, turn, size)
        return rows[SMALL], rows[LARGE]


def measure(ranks: Ranks) -> Pairs:
    """On every rank what all found; a collective."""
    partners, found = Partners(ranks), Pairs()
    for number in range(BATCHES + 1):
        told = ranks.gathered(partners.batch())
        if number:  # the first has connections to make
            found.latency.append([row for row, _ in told])
            found.transfer.append([row for _, row in told])
    found.wrong = sorted(set().union(*ranks.gathered(partners.wrong)))
    return found


def others(P: int, r: int) -> list[int]:
    return [other for other in range(P) if other != r]


def slow_ranks(matrix: Matrix, floor: float = 0.0) -> list[tuple[int, float]]:
    """Ranks that answer, or are answered, in more than FACTOR times the median of all pairs; with that factor.

    Of two ranks only who answers late is told: with one pair each way, who is answered late says the same of the other.
    """
    P = len(matrix)
    usual = median_low(matrix[i][j] for i in range(P) for j in others(P, i))
    found = []
    for r in range(P):
        times = [median_low(matrix[i][r] for i in others(P, r))]
        if P > 2:
            times.append(median_low(matrix[r][j] for j in others(P, r)))
        if max(times) > FACTOR * max(usual, floor):
            found.append((r, max(times) / usual))
    return found


def slowest(matrix: Matrix) -> tuple[int, int]:
    P = len(matrix)
    return max(((i, j) for i in range(P) for j in others(P, i)), key=lambda pair: matrix[pair[0]][pair[1]])


def results(pairs: Pairs, where: str) -> list[Result]:
    """Of answers' content, latency and bandwidth."""
    found = [Result("ranks", "content of answers", where, WRONG, why) for why in pairs.wrong]
    if not found:
        found = [Result("ranks", "content of answers", where, OK)]
    for name, batches, floor in (
        ("latency", pairs.latency, LATENCY_FLOOR_S),
        ("bandwidth", pairs.transfer, 0.0),
    ):
        slow = slow_ranks(pairs.best(batches), floor)
        found += [
            Result("ranks", name, where, SLOW, f"rank {r} takes {factor:.1f} times the median of all pairs")
            for r, factor in slow
        ]
        if not slow:
            found.append(Result("ranks", name, where, OK))
    return found


def as_rates(pairs: Pairs, where: str) -> list[Rate]:
    """The medians of all pairs, by batch, as what a baseline keeps."""

    def medians(of: list[Matrix]) -> list[float]:
        return [median(m[i][j] for i in range(len(m)) for j in others(len(m), i)) for m in of]

    P = len(pairs.latency[0])
    latency = [[1e6 * value] for value in medians(pairs.latency)]
    bandwidth = [[8 * LARGE / value / 1e9] for value in medians(pairs.transfer)]
    return [
        Rate(f"latency, {P} ranks", "us", 0, lambda: None, where, up=False, batches=latency),
        Rate(f"bandwidth, {P} ranks", "GB/s", 0, lambda: None, where, batches=bandwidth),
    ]
