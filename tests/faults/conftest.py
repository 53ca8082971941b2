"""Options of the campaign, and where its outcomes are kept until the end."""

from pathlib import Path

import pytest
from outcomes import Outcome, write_page

OUTCOMES: list[Outcome] = []


@pytest.fixture
def outcome():
    return OUTCOMES.append


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    page = session.config.getoption("--page")
    if page is not None and OUTCOMES and exitstatus == 0:
        from test_campaign import RANKS, SAVE_EVERY, STEPS

        what = (
            f"A training of {STEPS} steps on {RANKS} ranks (preset smoke, a checkpoint every {SAVE_EVERY} steps) "
            "for each row, hurt while it works."
        )
        write_page(Path(page), OUTCOMES, what)
