"""The fault campaign: one training on two ranks for each kind of fault, hurt at random moments while it works.

    pytest tests -m faults --kills 20 --page docs/results/faults.md

Every run must end with the losses of the one that nobody disturbed, bit for bit, from its last good step on.
"""

import contextlib
import os
import random
import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from outcomes import Outcome
from sigma_train.checkpoint import latest_checkpoint
from sigma_train.metrics import read_metrics
from support import SIGMA

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

STEPS, SAVE_EVERY, RANKS = 240, 3, 2
SETTINGS = {
    "train.batch_size": 16,
    "train.save_every": SAVE_EVERY,
    "train.eval_every": 50,
    "train.log_every": 50,
    "train.rank_timeout_s": 8,
    "train.keep": 3,
}
RESUMED = re.compile(r"resumed \S+ at step (\d+)")


def command(out: Path, *more: str, **settings: object) -> list[str]:
    both = SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
    overrides = [part for key, value in both.items() for part in ("--set", f"{key}={value}")]
    ranks = ["--nproc", str(RANKS), "--max-restarts", "100"]
    what = ["train", "--preset", "smoke", "--steps", str(STEPS)]
    return [*SIGMA, *what, *overrides, *ranks, "--out", str(out), *more]


class Run:
    """A training under way, its output in files."""

    def __init__(self, out: Path, env: dict[str, str], *more: str, **settings: object) -> None:
        self.out = out
        self.log = out.with_name(f"{out.name}.log")
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                command(out, *more, **settings), env=env, stdout=log, stderr=log, text=True
            )

    def steps(self) -> int:
        metrics = self.out / "metrics.jsonl"
        rows = read_metrics(metrics) if metrics.exists() else []
        return max((row["step"] for row in rows if "loss" in row), default=0)

    def is_writing(self) -> bool:
        return any((self.out / "checkpoints").glob(".tmp-*"))

    def wait_for(self, what: str, is_there) -> None:
        until = time.monotonic() + 120
        while not is_there():
            assert self.process.poll() is None, (
                f"the run ended before {what}:\n{self.log.read_text()[-2000:]}"
            )
            assert time.monotonic() < until, f"{what} took over two minutes"
            time.sleep(0.002)

    def pids(self) -> dict[int, int]:
        """Processes by rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if b"sigma_train" not in words or str(self.out).encode() not in words:
                    continue
                names = (folder / "environ").read_bytes().split(b"\0")
                found |= {rank: int(folder.name) for rank in range(RANKS) if f"RANK={rank}".encode() in names}
        return found

    def end(self, timeout_s: float = 600) -> tuple[int, str]:
        """Exit code and all that was said."""
        code = self.process.wait(timeout_s)
        return code, self.log.read_text()


def losses(out: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row}


def gone_on(run: Run, env: dict[str, str], reached: int, **settings: object) -> str:
    """What is said by a run that goes on from one which has ended, to its last step."""
    again = Run(run.out, env, "--resume", **settings)
    again.wait_for("recovery", lambda: again.steps() > reached)
    code, said = again.end()
    assert code == 0, said
    return said


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("cache")
    return {
        **os.environ,
        "SIGMA_CACHE": str(folder),
        "OMP_NUM_THREADS": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2",
        "COLUMNS": "400",  # no path is broken
        "PYTHONPATH": str(Path(__file__).with_name("hurt")),
    }


@pytest.fixture(scope="module")
def undisturbed(env, tmp_path_factory) -> Path:
    run = Run(tmp_path_factory.mktemp("undisturbed") / "run", env)
    code, said = run.end()
    assert code == 0, said
    return run.out


@pytest.fixture
def run(env, tmp_path) -> Iterator[Run]:
    started = Run(tmp_path / "run", env)
    yield started
    started.process.kill()


def moments(count: int, seed: int) -> list[tuple[str, int, float]]:
    """When to kill whom: a quarter inside of a checkpoint's write, a quarter while ranks start, half at any time."""
    draw = random.Random(seed)
    kinds = (["write"] * (count // 4) + ["start"] * (count // 4) + ["any"] * count)[:count]
    draw.shuffle(kinds)
    return [(kind, draw.randrange(RANKS), draw.random()) for kind in kinds]


def test_killed_ranks(run, undisturbed, outcome, request):
    """SIGKILL: nothing is lost but the steps since the newest checkpoint that was whole."""
    count = request.config.getoption("--kills")
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    lost, hit = [], {"write": 0, "start": 0, "any": 0}
    for kind, rank, share in moments(count, seed):
        before = run.steps()
        if kind == "start":
            run.wait_for("ranks", lambda: len(run.pids()) == RANKS)
            time.sleep(6 * share)
        else:
            run.wait_for("a step", lambda before=before: run.steps() > before)
            if kind == "any":
                time.sleep(1.5 * share)
            else:
                run.wait_for("a write", run.is_writing)
        reached, pid = run.steps(), run.pids().get(rank)
        assert run.process.poll() is None, "the work was done before all kills"
        if pid is None:
            continue
        newest = max((int(p.name[5:]) for p in (run.out / "checkpoints").glob("step-*")), default=0)
        is_writing = run.is_writing()
        os.kill(pid, signal.SIGKILL)
        hit["write" if is_writing else kind] += 1
        run.wait_for("its end", lambda pid=pid: not Path(f"/proc/{pid}").exists())
        run.wait_for("recovery", lambda pid=pid: len(p := run.pids()) == RANKS and pid not in p.values())
        lost.append(reached - newest)
    code, said = run.end()
    assert code == 0, said
    assert losses(run.out) == losses(undisturbed)
    resumed = list(map(int, RESUMED.findall(said)))
    bound = 2 * SAVE_EVERY  # a checkpoint may still be on its way to the disk
    assert max(lost) <= bound, (lost, bound)
    assert all(step % SAVE_EVERY == 0 for step in resumed)
    names = ("in a write", "while starting", "elsewhere")
    where = ", ".join(f"{n} {name}" for name, n in zip(names, hit.values(), strict=True))
    outcome(
        Outcome(
            f"SIGKILL of a rank at a random moment ({where})", len(lost), "the agent: the rank ended by signal 9",
            "by itself, from the newest checkpoint", lost, "the same, bit for bit",
        )
    )  # fmt: skip


def test_a_rank_that_hangs(run, undisturbed, outcome):
    run.wait_for("ten steps", lambda: run.steps() >= 10)
    reached, pid = run.steps(), run.pids()[1]
    os.kill(pid, signal.SIGSTOP)
    run.wait_for("its end", lambda: not Path(f"/proc/{pid}").exists())
    run.wait_for("recovery", lambda: run.steps() > reached)
    code, said = run.end()
    assert code == 0, said
    assert losses(run.out) == losses(undisturbed)
    assert "another rank is lost" in said
    (resumed,) = map(int, RESUMED.findall(said))
    outcome(
        Outcome(
            "SIGSTOP of a rank: it hangs", 1, f"the other waited for longer than {SETTINGS['train.rank_timeout_s']} s",
            "by itself, from the newest checkpoint", [reached - resumed], "the same, bit for bit",
        )
    )  # fmt: skip


def test_a_full_disk(run, env, undisturbed, outcome):
    """A limit on the size of files stands for the disk."""
    run.wait_for("ten steps", lambda: run.steps() >= 10)
    pid = run.pids()[0]
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    reached = run.steps()
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (20_000, hard))
    code, said = run.end()
    assert code == 1, said
    assert "cannot write" in said
    sound = int(latest_checkpoint(run.out / "checkpoints").name[5:])
    assert not any((run.out / "checkpoints").glob(".tmp-*"))
    gone_on(run, env, reached)
    assert losses(run.out) == losses(undisturbed)
    outcome(
        Outcome(
            "no room for a checkpoint", 1, "exit 1, the file is named", "by `--resume`, once there is room",
            [reached - min(sound, reached)], "the same, bit for bit",
        )
    )  # fmt: skip


def test_a_flipped_bit_in_a_checkpoint(run, env, undisturbed, outcome):
    run.wait_for("ten steps", lambda: run.steps() >= 10)
    run.process.send_signal(signal.SIGTERM)
    code, said = run.end()
    assert code == 143, said
    newest = max((run.out / "checkpoints").glob("step-*"))
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    draw = random.SystemRandom()
    path = draw.choice(files)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    reached = run.steps()
    said = gone_on(run, env, reached)
    assert f"{newest.name} is damaged" in said.replace("\n", " ")
    assert losses(run.out) == losses(undisturbed)
    (again,) = map(int, RESUMED.findall(said))
    outcome(
        Outcome(
            "a flipped bit in the newest checkpoint", 1, "its digest differs: a warning names it",
            "the one before is used", [reached - again], "the same, bit for bit",
        )
    )  # fmt: skip


def test_a_number_that_one_rank_lacks(env, tmp_path, undisturbed, outcome):
    """NaN in a gradient of one rank at step 20: gone back on, and left out."""
    found = {}
    for policy in ("rollback", "skip"):
        hurt = {**env, "SIGMA_HURT": "nan", "SIGMA_HURT_RANK": "1", "SIGMA_HURT_STEP": "20"}
        run = Run(tmp_path / policy, hurt, guard__on_nonfinite=policy)
        code, said = run.end()
        assert code == 0, said
        assert f"{policy}: step 20 is left out" in said
        found[policy] = losses(run.out)
    assert found["rollback"] == found["skip"]
    before = {step: loss for step, loss in losses(undisturbed).items() if step < 20}
    assert before.items() <= found["skip"].items()
    assert sorted(found["skip"]) == [step for step in range(1, STEPS + 1) if step != 20]
    outcome(
        Outcome(
            "NaN in one rank's gradient", 1, "before the step is taken, on all ranks",
            "all go back to the newest checkpoint; the step is left out", [19 % SAVE_EVERY],
            "that of a run without the step, bit for bit",
        )
    )  # fmt: skip


def test_a_flipped_sign_in_an_experts_output(env, tmp_path, undisturbed, outcome):
    hurt = {**env, "SIGMA_HURT": "sign", "SIGMA_HURT_RANK": "1", "SIGMA_HURT_STEP": "20"}
    run = Run(tmp_path / "run", hurt, guard__check_every=3)
    code, said = run.end()
    assert code == 1, said
    (told,) = set(re.findall(r"step (\d+): rank 1: layer (\d), expert (\d+): the output is off", said))
    reached, sound = run.steps(), int(latest_checkpoint(run.out / "checkpoints").name[5:])
    assert sound < 20 <= int(told[0])
    gone_on(run, env, reached, guard__check_every=3)
    assert losses(run.out) == losses(undisturbed)
    outcome(
        Outcome(
            "a flipped sign in every expert's output of one rank", 1,
            f"exit 1 at the next check: rank 1, layer {told[1]}, expert {told[2]}",
            "by `--resume` on a sound node; nothing unsound was saved", [reached - sound], "the same, bit for bit",
        )
    )  # fmt: skip
