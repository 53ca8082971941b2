"""`sigma doctor --validate`: whether this machine computes, holds, multiplies and answers as it should."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from sigma_train.console import say
from sigma_train.errors import Failure, WrongInput
from sigma_train.files import must_take_file, write_text
from sigma_train.launch import launch
from sigma_train.ranks import Ranks, is_launched, joined

from sigma_cli import pairs as pairs_
from sigma_cli import validate_table
from sigma_cli.baseline import Baseline, Machine, check_machine, key, lack, load, save
from sigma_cli.isolated import Died, Send, answer, messages
from sigma_kernels import _C
from sigma_kernels.validation import kernels, memory, rates
from sigma_kernels.validation.inputs import SIZES
from sigma_kernels.validation.rates import Rate
from sigma_kernels.validation.result import NOT_RUN, OK, SLOW, WRONG, Result

FIT, SLOW_CODE, WRONG_CODE = 0, 10, 11
HANG_S = 600.0  # without a word from a process that checks kernels
RANK_TIMEOUT_S = 120.0
BATCHES = 4  # at most, before a rate is called slow; each but the first after a pause
PAUSE_S = 1.0
MIB = 1 << 20


@dataclass(frozen=True)
class Options:
    """The command line."""

    quick: bool
    checks: frozenset[str]
    seconds: float
    memory: int | None
    nproc: int | None
    baseline: Path | None
    save_baseline: Path | None
    margin: float
    json_file: Path | None

    @property
    def num_bytes(self) -> int:
        return (self.memory or (128 if self.quick else 512)) * MIB

    @property
    def rounds(self) -> int:
        return 3 if self.quick else 7


@dataclass
class Report:
    """What was found; rates and pairs are of the first node."""

    machine: dict[str, Any]
    results: list[Result]
    rates: list[Rate]
    pairs: pairs_.Pairs | None
    known: Baseline | None


def run(options: Options) -> int:
    """Check, show, write; the exit code.

    Raises: WrongInput for what can't be read, written or compared, before anything is checked; Failure if a check could
        not be run.
    """
    known = prepared(options)
    begun = time.monotonic()
    is_speaker = int(os.environ.get("LOCAL_RANK", "0")) == 0  # each node is checked once
    results = list(kernel_results(options)) if is_speaker and "kernels" in options.checks else []
    found_pairs = None
    with joined(HANG_S) as ranks:
        of_node, found_rates = node_results(options, known) if is_speaker else ([], [])
        results += of_node
        if ranks.size > 1 and "ranks" in options.checks:
            found_pairs = pairs_.measure(ranks)
        elif options.nproc and "ranks" in options.checks:
            found_pairs = launched_pairs(options.nproc)
        if found_pairs is not None and ranks.is_first:
            found_rates += judge_pairs(found_pairs, results, options, known)
        results = gathered(ranks, results)
    if not ranks.is_first:
        return code_of(results)
    report = Report(Machine.here().model_dump(), results, found_rates, found_pairs, known)
    return told(report, options, time.monotonic() - begun)


def prepared(options: Options) -> Baseline | None:
    """The baseline, once everything that can be refused has been looked at."""
    for name, path in (("--save-baseline", options.save_baseline), ("--json", options.json_file)):
        must_take_file(name, path)
    if options.nproc and is_launched():
        raise WrongInput("--nproc starts ranks, and these have been started by torchrun; leave it out")
    if options.nproc and "ranks" not in options.checks:
        raise WrongInput("--nproc is of the check 'ranks', which --check leaves out")
    if named := os.environ.get("SIGMA_BACKEND"):
        raise WrongInput(
            f"--validate checks every backend that is here, and SIGMA_BACKEND={named} names one; unset it"
        )
    free = available()
    if "memory" in options.checks and free is not None and options.num_bytes > free:
        raise WrongInput(
            f"--memory must be at most what is free, {free // MIB} MiB, found {options.num_bytes // MIB}"
        )
    if os.environ.get("SIGMA_ISA"):
        _C.isa()  # one that this processor has not is refused here
    if options.baseline is None:
        return None
    known = load(options.baseline)
    answer(partial(check_machine, options.baseline, known))
    return known


def available() -> int | None:
    """Bytes that can be taken without swapping; None where the system does not say."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def kernel_results(options: Options) -> Iterator[Result]:
    """Every backend and instruction set that this machine has, each in a process of its own.

    The instruction set that a run would take gets the size of a real layer and the time; the others one repetition.
    """
    forced = os.environ.get("SIGMA_ISA")
    size, small = SIZES["quick" if options.quick else "full"], SIZES["quick"]
    seconds = 0.0 if options.quick else options.seconds
    for i, isa in enumerate(_C.supported_isas()):
        if forced not in (None, "", isa):
            yield Result("kernels", "all operations", f"cpu {isa}", NOT_RUN, f"SIGMA_ISA={forced}")
        elif i and not forced and options.quick:
            yield Result("kernels", "all operations", f"cpu {isa}", NOT_RUN, "--quick")
        elif i and not forced:
            yield from isolated("cpu", small, 0.0, "cpu", isa)
        else:
            yield from isolated("cpu", size, seconds, "cpu", isa)
    gpus = torch.cuda.device_count()
    for backend in ("triton", "cuda"):
        if not gpus:
            yield Result("kernels", "all operations", backend, NOT_RUN, "torch sees no GPU")
        for i in range(gpus):
            yield from isolated(backend, size, seconds, f"cuda:{i}")


def isolated(
    backend: str, size: Any, seconds: float, device: str, isa: str | None = None
) -> Iterator[Result]:
    """kernels.check in a process of its own; an operation that kills or stops it is wrong."""

    def work(send: Send) -> None:
        if isa is not None:
            os.environ["SIGMA_ISA"] = isa
        take_all_cores()
        try:
            for result in kernels.check(
                backend, size, seconds, device=device, begin=lambda *running: send(running)
            ):
                send(result)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate" not in str(error):
                raise
            raise Failure(f"not enough memory to check the kernels on {device}; --quick takes less") from None

    running = ("the first operation", "")
    try:
        for message in messages(work, HANG_S):
            if isinstance(message, Result):
                yield message
            else:
                running = message
    except Died as death:
        op, dtype = running
        yield Result("kernels", op, f"{backend} {isa or device}", WRONG, str(death), dtype)


def node_results(options: Options, known: Baseline | None) -> tuple[list[Result], list[Rate]]:
    """Memory and rates of this node's devices."""
    results, found = [], []
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    take_all_cores()
    if "memory" in options.checks:
        for device in devices:
            fault = memory.failing_bits(options.num_bytes, device)
            name = f"pattern test of {options.num_bytes // MIB} MiB"
            results.append(Result("memory", name, device, WRONG if fault else OK, fault or ""))
    if "rates" in options.checks:
        for device in devices:
            of_device = rates.rates(device)
            results += judge_rates(of_device, options, known)
            found += of_device
    return results, found


def take_all_cores() -> None:
    """Of the node, however many ranks torchrun has made room for."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def judge_rates(found: list[Rate], options: Options, known: Baseline | None) -> list[Result]:
    """A rate is slow if it was so in every batch; one that is to be saved has all batches."""
    rates.warm_up(found)
    left = found
    for number in range(BATCHES):
        if number:
            time.sleep(PAUSE_S)
        rates.measure(left, options.rounds)
        if not options.save_baseline:
            left = [rate for rate in left if beside(rate, options, known).result == SLOW]
        if not left:
            break
    return [beside(rate, options, known) for rate in found]


def beside(rate: Rate, options: Options, known: Baseline | None) -> Result:
    """A rate beside its baseline, if there is one."""
    if known is None or key(rate) not in known.rates:
        why = "no baseline was given" if known is None else "the baseline has no such rate"
        return Result("rates", rate.name, rate.device, NOT_RUN, f"only measured, {why}")
    slow = lack(rate, known.rates[key(rate)], options.margin)
    return Result("rates", rate.name, rate.device, SLOW if slow else OK, slow or "", "", len(rate.values))


def judge_pairs(
    found: pairs_.Pairs, results: list[Result], options: Options, known: Baseline | None
) -> list[Rate]:
    where = "nccl" if torch.cuda.device_count() else "gloo"
    results += pairs_.results(found, where)
    as_rates = pairs_.as_rates(found, where)
    results += [beside(rate, options, known) for rate in as_rates]
    return as_rates


def launched_pairs(nproc: int) -> pairs_.Pairs:
    """What ranks found that are started for it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "pairs.json")
        arguments = ["doctor", "--validate", "--pairs", str(file)]
        launch(nproc, 0, arguments, lambda text: None, None, module="sigma_cli")
        return pairs_.Pairs(**json.loads(file.read_text()))


def write_pairs(file: Path) -> None:
    """As one of the ranks of `launched_pairs`."""
    with joined(RANK_TIMEOUT_S) as ranks:
        found = pairs_.measure(ranks)
        if ranks.is_first:
            write_text(file, json.dumps(asdict(found)))


def gathered(ranks: Ranks, results: list[Result]) -> list[Result]:
    """Those of all nodes, on all ranks; a collective."""
    if ranks.size == 1:
        return results
    told = ranks.gathered(results)
    nodes = [r for r, of_rank in enumerate(told) if any(x.check != "ranks" for x in of_rank)]
    if len(nodes) <= 1:
        return [x for of_rank in told for x in of_rank]
    return [
        x if x.check == "ranks" else Result(**{**asdict(x), "where": f"{x.where}, node of rank {r}"})
        for r, of_rank in enumerate(told)
        for x in of_rank
    ]


def code_of(results: list[Result]) -> int:
    found = {x.result for x in results}
    return WRONG_CODE if WRONG in found else SLOW_CODE if SLOW in found else FIT


def sentence(results: list[Result], took_s: float) -> str:
    """The verdict."""
    for result in (WRONG, SLOW):
        if bad := [x for x in results if x.result == result]:
            more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
            return f"{result}: {bad[0]}{more}"
    done = [x for x in results if x.result == OK]
    repeated = sum(x.repetitions for x in done if x.check == "kernels")
    also = f", {repeated} computations of kernels" if repeated else ""
    return f"fit: {len(done)} checks in {took_s:.0f} s{also}"


def told(report: Report, options: Options, took_s: float) -> int:
    """Show and write a report; the exit code."""
    code = code_of(report.results)
    verdict = sentence(report.results, took_s)
    if options.save_baseline is not None:
        if code == WRONG_CODE:
            verdict += f"; {options.save_baseline} was not written"
        else:
            save(options.save_baseline, report.rates)
    if options.json_file is not None:
        write_text(options.json_file, json.dumps(as_json(report, code, verdict), indent=1) + "\n")
    console = Console()
    validate_table.show(console, report.results, report.rates, report.known, report.pairs)
    say(console, verdict)
    return code


def as_json(report: Report, code: int, verdict: str) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "exit_code": code,
        "verdict": verdict,
        "machine": report.machine,
        "results": [asdict(x) for x in report.results],
        "rates": {
            key(r): {"unit": r.unit, "median": median(r.values), "best": r.best, "spread": r.spread}
            for r in report.rates
        },
        "pairs": None if report.pairs is None else asdict(report.pairs),
    }
