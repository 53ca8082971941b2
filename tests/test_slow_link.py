"""bench/slow_link.py where there is no slow link to be had: one sentence, at once."""

import subprocess
import sys
from pathlib import Path

import pytest

SLOW_LINK = Path(__file__).parents[1] / "bench" / "slow_link.py"
REFUSES = "#!/bin/sh\necho 'unshare: unshare failed:\nOperation not permitted' >&2\nexit 1\n"


@pytest.mark.parametrize(
    "missing, told",
    [
        ("unshare", "slow_link: unshare is not installed; the package util-linux brings it\n"),
        ("tc", "slow_link: tc is not installed; the package iproute2 brings it\n"),
        (
            "",
            "slow_link: no network of its own at 2.5 Gbit/s, which root may make: "
            "unshare: unshare failed: Operation not permitted\n",
        ),
    ],
)
def test_a_link_that_cannot_be_made_is_one_sentence(tmp_path, missing, told):
    for tool in {"unshare", "ip", "tc"} - {missing}:
        (tmp_path / tool).write_text(REFUSES)
        (tmp_path / tool).chmod(0o755)
    result = subprocess.run(
        [sys.executable, SLOW_LINK, "--rate", "2.5"],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path), "PYTHONPATH": str(without_torch(tmp_path))},
    )
    assert (result.returncode, result.stdout, result.stderr) == (1, "", told)


def without_torch(folder: Path) -> Path:
    """Where importing it fails: what takes seconds must not come before the sentence."""
    (folder / "torch.py").write_text("raise AssertionError\n")
    return folder
