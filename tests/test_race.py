"""bench/native/race.cpp on versions that are made for it: it refuses what is not the same, and takes turns."""

import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[1] / "bench" / "native"
VERSION = """
#include <algorithm>
#include <cstdio>
#include "schedules.h"
extern "C" void run(const Product& p) {
  std::fputs(NAME, stderr);
  if (!p.is_outer) std::fill_n(p.y, p.offsets[p.E] * p.N - UNWRITTEN, VALUE);
}
"""

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def built(source: Path, out: Path, *options: str) -> Path:
    command = [
        "c++",
        "-std=c++20",
        "-O1",
        "-Wno-missing-field-initializers",
        f"-I{NATIVE}",
        source,
        "-o",
        out,
    ]
    subprocess.run([*command, *options], check=True)
    return out


@pytest.fixture(scope="module")
def race(tmp_path_factory) -> Path:
    return built(NATIVE / "race.cpp", tmp_path_factory.mktemp("race") / "race", "-ldl")


def version(folder: Path, name: str, value: float, unwritten: int = 0) -> Path:
    source = folder / "version.cpp"
    source.write_text(VERSION)
    macros = {"NAME": f'"{name}"', "VALUE": f"{value:.12f}f", "UNWRITTEN": unwritten}
    return built(
        source, folder / f"{name}.so", "-shared", "-fPIC", *(f"-D{key}={x}" for key, x in macros.items())
    )


@pytest.mark.parametrize(
    "value, unwritten, found",
    [(1 + 2**-23, 0, "1 before and 1.00000012 after at 0"), (1.0, 1, "1 before and nan")],
)
def test_versions_that_are_not_the_same_end_the_race(race, tmp_path, value, unwritten, found):
    """Defends: a version that is fast because it is wrong, or leaves out what memory has from the other."""
    versions = version(tmp_path, "b", 1.0), version(tmp_path, "a", value, unwritten)
    result = subprocess.run([race, *versions, "1"], capture_output=True, text=True)
    assert result.returncode == 1
    told = result.stderr.removeprefix("ba")
    assert told.startswith("race: x @ W.T of E=96 N=1024 K=1024 must be the same, found ")
    assert found in told
    assert told.count("\n") == 1


def test_versions_come_first_in_turns(race, tmp_path):
    """Defends: the same one first in all rounds."""
    versions = version(tmp_path, "b", 1.0), version(tmp_path, "a", 1.0)
    with subprocess.Popen(
        [race, *versions, "4"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        _, _, row = (process.stdout.readline() for _ in range(3))
        process.kill()
        calls = process.stderr.read()
    assert row.startswith("| x @ W.T | 96 | 1024 | 1024 | 2048 | 2 | ")
    assert calls.startswith("ba" + "ba" + "ab" + "ba" + "ab")
