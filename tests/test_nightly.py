"""`.ci/nightly`, on a `pytest` that only writes down how it was called."""

import os
import subprocess
from pathlib import Path

import pytest

NIGHTLY = Path(__file__).parents[1] / ".ci/nightly"
TOLD = """#!/bin/sh
echo "$SIGMA_FRESH_SEED $*" >>"$CALLS"
case "$*" in *"-m acceptance") exit "$OF_ACCEPTANCE";; esac
exit "$OF_USUAL"
"""


def nightly(
    tmp_path: Path, *arguments: str, acceptance: int = 0, usual: int = 0
) -> tuple[int, str, list[str]]:
    """Exit code, output, and calls of pytest."""
    tool = tmp_path / "pytest"
    tool.write_text(TOLD)
    tool.chmod(0o755)
    calls = tmp_path / "calls"
    codes = {"OF_ACCEPTANCE": str(acceptance), "OF_USUAL": str(usual), "CALLS": str(calls)}
    env = {**os.environ, **codes, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run([NIGHTLY, *arguments], env=env, capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stdout, calls.read_text().splitlines()


def test_all_that_takes_long_and_all_statistics_run_with_the_seed_that_is_printed(tmp_path):
    """Defends: a day such as 041 taken for octal; a failure that cannot be repeated; live tests at night."""
    code, told, calls = nightly(tmp_path, "041")
    assert code == 0
    assert told.count("SIGMA_FRESH_SEED=41") == 3
    names = " ".join(
        sorted(f"tests/{path.name}" for path in NIGHTLY.parents[1].glob("tests/test_noise_*.py"))
    )
    usual = "not faults and not live and not acceptance"
    assert calls == [
        "41 -q -m acceptance",
        f"41 -q -m {usual} {names}",
    ]


@pytest.mark.parametrize("seed", ["abc", "-1", "1.5", "", "1 2", "1" * 30])
def test_a_seed_that_is_no_number_is_refused(seed):
    ended = subprocess.run(
        [NIGHTLY, seed], capture_output=True, text=True, timeout=60, env={"PATH": "/nowhere:/bin:/usr/bin"}
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"SEED must be a number of at most nine digits, found {seed}\n"


def test_the_seed_is_the_day(tmp_path):
    _, _, calls = nightly(tmp_path)
    assert 1 <= int(calls[0].split()[0]) <= 366


@pytest.mark.parametrize(("acceptance", "usual"), [(1, 0), (0, 2), (5, 1)])
def test_a_failure_of_either_is_one_of_both(tmp_path, acceptance, usual):
    code, told, calls = nightly(tmp_path, "7", acceptance=acceptance, usual=usual)
    assert code == 1
    assert len(calls) == 2
    assert ".ci/nightly 7 repeats it" in told
