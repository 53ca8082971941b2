"""`sigma doctor --validate`: a sound machine is fit, a kernel, a memory, a rate or a rank that is not is named."""

import faulthandler
import json
import os
import resource
import signal
import time
from importlib import import_module
from pathlib import Path

import forked
import pytest
import rank_faults
import torch
from sigma_cli import baseline, isolated, pairs, validate
from sigma_cli.baseline import Baseline, Known, Machine
from sigma_train.errors import Failure, WrongInput
from support import assert_one_sentence, sigma
from test_validate_kernels import wrong_ones

import sigma_kernels as sk
from sigma_kernels.validation import kernels, rates
from sigma_kernels.validation.inputs import SIZES, Size
from sigma_kernels.validation.rates import Rate
from sigma_kernels.validation.result import OK, SLOW, WRONG, Result

backends = import_module("sigma_kernels.backends")  # the package's attribute of that name is the function
QUICK = SIZES["quick"]
SMALL = Size("small", 96, 12, 256, 64)  # what the plain torch reference computes in no time
VALIDATE = ["doctor", "--validate", "--quick"]


def known(value: float, spread: float = 0.01) -> Known:
    return Known(unit="GB/s", median=value, spread=spread)


def a_rate(*batches: list[float], up: bool = True) -> Rate:
    return Rate("x", "GB/s", 1.0, lambda: None, up=up, batches=list(batches))


def test_a_rate_is_judged_by_its_best_batch():
    steady = a_rate([70.0, 70.0, 70.5])
    assert "70 GB/s is 70% of the baseline's speed, less than 85%" in baseline.lack(steady, known(100), 0.15)
    assert baseline.lack(a_rate([70.0] * 3, [99.0] * 3), known(100), 0.15) is None, "a neighbour's noise"
    assert baseline.lack(a_rate([86.0] * 3), known(100), 0.15) is None
    assert baseline.lack(steady, known(100, spread=0.11), 0.15) is None, "a baseline that was noisy itself"
    assert baseline.lack(a_rate([49.0] * 3), known(100, spread=9.0), 0.15), "half is slow whatever the noise"
    assert baseline.lack(a_rate([120.0] * 3, up=False), known(100), 0.15), "a latency"
    assert baseline.lack(a_rate([80.0] * 3, up=False), known(100), 0.15) is None


def of_this_machine(**rates: float) -> str:
    kept = {name.replace("_", " "): known(value) for name, value in rates.items()}
    return Baseline(machine=Machine.here(), rates=kept).model_dump_json()


def options(**given) -> validate.Options:
    usual = {
        "quick": True, "checks": frozenset(["rates"]), "seconds": 0.0, "memory": None, "nproc": None,
        "baseline": None, "save_baseline": None, "margin": 0.15, "json_file": None,
    }  # fmt: skip
    return validate.Options(**{**usual, **given})


def test_a_slowed_operation_is_measured_again_and_then_slow(monkeypatch):
    """Defends: a verdict by one moment; one that never comes.  The clock is the test's own."""
    now, calls = [0.0], {"steady": 0, "disturbed": 0, "slow": 0}
    takes = {"steady": lambda n: 1.0, "disturbed": lambda n: 2.0 if n < 6 else 1.0, "slow": lambda n: 2.0}
    monkeypatch.setattr(rates, "clock", lambda: now[0])
    monkeypatch.setattr(validate, "PAUSE_S", 0)

    def call(name: str) -> None:
        calls[name] += 1
        now[0] += takes[name](calls[name])

    found = [Rate(name, "GB/s", 100.0, lambda name=name: call(name)) for name in calls]
    kept = {f"{name}, cpu": known(100) for name in calls}
    results = validate.judge_rates(found, options(), Baseline(machine=Machine.here(), rates=kept))
    assert [x.result for x in results] == [OK, OK, SLOW]
    assert [len(rate.batches) for rate in found] == [1, 2, validate.BATCHES]
    assert validate.code_of(results) == 10
    assert validate.code_of([*results, Result("kernels", "x", "cpu", WRONG)]) == 11


def test_a_slow_node_ends_with_10_and_is_told(monkeypatch, tmp_path, capsys):
    """Against the baseline that it saved itself, once with an operation that sleeps."""
    naps = {"sum": 0.0, "product": 0.0}

    def found(device: str) -> list[Rate]:
        x = torch.ones(1000, device=device)
        return [Rate(name, "GB/s", 1.0, lambda name=name: (x.sum(), time.sleep(naps[name]))) for name in naps]

    monkeypatch.setattr(rates, "rates", found)
    monkeypatch.setattr(validate, "PAUSE_S", 0)
    base, out = tmp_path / "base.json", tmp_path / "out.json"
    naps.update(sum=0.005, product=0.005)  # more than what a busy machine adds
    assert validate.run(options(save_baseline=base)) == 0
    assert set(json.loads(base.read_text())["rates"]) == {"sum, cpu", "product, cpu"}
    assert validate.run(options(baseline=base, margin=0.9)) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("fit: 2 checks in ")
    naps["product"] = 0.1
    assert validate.run(options(baseline=base, json_file=out)) == 10
    assert "slow: product, cpu: " in capsys.readouterr().out.splitlines()[-1]
    report = json.loads(out.read_text())
    assert report["exit_code"] == 10
    assert "product" in [x["name"] for x in report["results"] if x["result"] == SLOW]


def test_a_node_that_is_wrong_becomes_no_baseline(tmp_path, capsys):
    report = validate.Report({}, [Result("memory", "x", "cpu", WRONG, "a bit")], [], None, None)
    assert validate.told(report, options(save_baseline=tmp_path / "base.json"), 1.0) == 11
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"wrong: x, cpu: a bit; {tmp_path}/base.json was not written"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("isa", sk._C.supported_isas())
def test_every_instruction_set_is_fit(cache, tmp_path, isa):
    """And nothing else is claimed to have been looked at."""
    out = tmp_path / "out.json"
    args = ["--check", "kernels", "--check", "memory", "--memory", "1", "--json", str(out)]
    result = sigma(*VALIDATE, *args, env={**cache, "SIGMA_ISA": isa})
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads(out.read_text())["results"]
    places = {x["where"] for x in results if x["check"] == "kernels" and x["result"] == OK}
    assert places == {f"cpu {isa}"}
    assert all(x["why"] for x in results if x["result"] != OK)


def test_ranks_of_this_machine(cache, tmp_path):
    out = tmp_path / "out.json"
    result = sigma(*VALIDATE, "--check", "ranks", "--nproc", "2", "--json", str(out), env=cache)
    report = json.loads(out.read_text())
    assert result.returncode in (0, 10), "two ranks on two busy cores"
    assert [len(m) for m in report["pairs"]["latency"]] == [2] * pairs.BATCHES
    assert report["results"][0] == {**report["results"][0], "name": "content of answers", "result": OK}
    assert "slowest pair by latency: rank " in result.stdout


BASELINES = [
    ("", "is no baseline: Invalid JSON: EOF while parsing a value at line 1 column 0"),
    ('{"schema_version": 2}', "is no baseline: schema_version: Input should be 1"),
    (
        of_this_machine(x=1).replace('"median":1.0', '"median":-1'),
        "rates.x.median: Input should be greater than",
    ),
    (of_this_machine(x=1)[:-20], "is no baseline: Invalid JSON: "),
    (of_this_machine(x=1).replace('"cores":', '"cores":9'), "is of another kind of machine: cores 9"),
]


@pytest.mark.parametrize("content, message", BASELINES, ids=[message for _, message in BASELINES])
def test_a_baseline_that_does_not_fit_is_refused_first(cache, tmp_path, content, message):
    path = tmp_path / "base.json"
    path.write_text(content)
    result = sigma(*VALIDATE, "--baseline", str(path), env=cache)
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert result.stderr.startswith(f"error: --baseline: {path} is ")
    assert message in result.stderr


def test_wrong_input_is_named_before_anything_is_checked(cache, tmp_path):
    for args, message in (
        (["--baseline", "/no/such"], "--baseline: cannot read /no/such: No such file or directory"),
        (
            ["--json", "/no/such/x"],
            "--json: cannot write in /no/such: No such file or directory; name another folder",
        ),
        (["--check", "rates", "--nproc", "2"], "--nproc is of the check 'ranks', which --check leaves out"),
    ):
        assert_one_sentence(sigma(*VALIDATE, *args, env=cache), 2, message)
    result = sigma(*VALIDATE, "--memory", str(1 << 29), env=cache)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --memory must be at most what is free, ")
    message = "--validate checks every backend that is here, and SIGMA_BACKEND=cpu names one; unset it"
    assert_one_sentence(sigma(*VALIDATE, env=cache, fault=rank_faults.backend_is_forced), 2, message)
    message = "--quick is an option of --validate, which was not given"
    assert_one_sentence(sigma("doctor", "--quick", env=cache), 2, message)


def test_a_disk_that_is_full(tmp_path):
    """A limit on the size of files stands for the disk."""
    report = validate.Report({}, [Result("rates", "x", "cpu", OK)], [], None, None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match=f"cannot write {tmp_path}/out.json: File too large"):
            validate.told(report, options(json_file=tmp_path / "out.json"), 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_kernel_that_kills_its_process_is_named():
    """Defends: a validation that dies of what it was to find."""

    def work(send):
        send(("moe_experts", "bf16"))
        faulthandler.disable()  # pytest's, of the parent
        os.kill(os.getpid(), signal.SIGILL)

    with pytest.raises(isolated.Died, match="its process died of SIGILL"):
        list(isolated.messages(work, 60))
    with pytest.raises(Failure, match="was killed, perhaps for want of memory"):
        list(isolated.messages(lambda send: os.kill(os.getpid(), signal.SIGKILL), 60))
    with pytest.raises(isolated.Died, match="nothing came of it for 0 s"):
        list(isolated.messages(lambda send: time.sleep(60), 0.2))
    with pytest.raises(WrongInput, match="so it is"):
        isolated.answer(lambda: (_ for _ in ()).throw(WrongInput("so it is")))


def test_what_killed_it_is_told(monkeypatch):
    def dying(*args, begin, **kwargs):
        yield Result("kernels", "route", "cpu x", OK)
        begin("moe_experts", "bf16")
        faulthandler.disable()  # pytest's, of the parent
        os.kill(os.getpid(), signal.SIGSEGV)

    monkeypatch.setattr(kernels, "check", dying)
    results = list(validate.isolated("cpu", QUICK, 0.0, "cpu", "avx2"))
    assert wrong_ones(results) == ["moe_experts, bf16, cpu avx2: its process died of SIGSEGV"]


def test_a_signal_ends_it_at_once_and_leaves_nothing(cache, tmp_path):
    args = ["doctor", "--validate", "--check", "kernels", "--seconds", "1000"]
    with forked.Running(
        [*args, "--json", str(tmp_path / "out.json")], cache, fault=rank_faults.heed_signals
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (pids := children.read_text().split()):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        result = process.result(200)
    told = "error: stopped by SIGTERM before the work was done\n"
    assert (result.returncode, result.stderr) == (143, told)
    assert not any(Path("/proc", pid).exists() for pid in pids)
    assert not list(tmp_path.iterdir())


def test_each_rank_meets_each_other_once():
    for P in (2, 3, 4, 7, 8):
        found = [pair for pairs_ in pairs.rounds(P) for pair in pairs_]
        assert sorted(found) == [(i, j) for i in range(P) for j in range(i + 1, P)]
        assert all(len({r for pair in p for r in pair}) == 2 * len(p) for p in pairs.rounds(P))


def matrix(P: int, **slow: float) -> pairs.Matrix:
    """All alike but for asks_R and answers_R."""
    return [
        [0.0 if i == j else slow.get(f"asks_{i}", 1.0) * slow.get(f"answers_{j}", 1.0) for j in range(P)]
        for i in range(P)
    ]


def test_the_slow_rank_is_named():
    for P in (2, 3, 4, 8):
        assert pairs.slow_ranks(matrix(P)) == []
        assert pairs.slow_ranks(matrix(P, answers_1=5.0)) == [(1, 5.0)]
        assert pairs.slow_ranks(matrix(P, answers_1=1.5)) == []
        assert pairs.slow_ranks(matrix(P, answers_1=5.0), floor=10.0) == []
    assert pairs.slow_ranks(matrix(4, asks_2=5.0)) == [(2, 5.0)]
    assert pairs.slow_ranks(matrix(4, asks_2=3.0, answers_2=3.0)) == [(2, 3.0)]
    one_pair = matrix(4)
    one_pair[1][3] = 50.0
    assert pairs.slow_ranks(one_pair) == [], "one slow pair is no slow rank"
    assert pairs.slowest(one_pair) == (1, 3)


def test_a_rank_that_is_late_and_wrong_is_named(cache, tmp_path):
    """Defends: a wrong answer that only times are taken of; the wrong one of two ranks."""
    args = ["doctor", "--validate", "--check", "ranks", "--json", str(tmp_path / "out.json")]
    results = forked.on_ranks(2, args, cache, rank_faults.late_and_wrong)
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["exit_code"] == 11, results
    assert report["verdict"] == "wrong: content of answers, gloo: rank 0 was answered wrongly by rank 1"
    slow = [x["why"] for x in report["results"] if x["result"] == SLOW and x["name"] == "latency"]
    assert [why.partition(" takes ")[0] for why in slow] == ["rank 1"]
    assert results[0].returncode == 11
