"""`analysis.schema.json` says what is in an analysis: all of it, and nothing else."""

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from noise_samples import everything, spun
from sigma_cli.commands import app
from sigma_noise import fitness, host, selftest
from sigma_noise.analysis import analyze
from sigma_noise.as_json import as_json, of_training
from sigma_noise.attribution import STOPPED
from sigma_noise.formats.rank_detours import facts
from sigma_noise.loops import clock_cost
from sigma_noise.step_causes import late
from sigma_noise.step_ranks import step_ranks
from sigma_noise.steps import step_noise
from sigma_noise.trace import Series, Trace
from test_noise_step_matched import WORST, Stopped, random_stops, recorded
from typer.testing import CliRunner

SCHEMA = json.loads((files("sigma_noise") / "analysis.schema.json").read_text())
CHECK = jsonschema.Draft202012Validator(SCHEMA)
MAPS = {"hosts", "run", "machines", "clocks", "files", "by_decade", "unread"}  # whose keys are data


def made(trace: Trace) -> Any:
    return json.loads(
        json.dumps(as_json(analyze(trace, digests={"rank00000.parquet": "0f" * 32})), allow_nan=False)
    )


@pytest.fixture(scope="module")
def full() -> Any:
    return made(everything(2))


def shortened(of: Any) -> Any:
    """Two numbers of each list of them: a schema is asked a thousand times."""
    match of:
        case dict():
            return {name: shortened(value) for name, value in of.items()}
        case [dict(), *_]:
            return [shortened(value) for value in of]
        case list():
            return of[:2]
    return of


def objects(of: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """All objects whose names are ours, each with its place."""
    match of:
        case dict():
            yield path, of
            for name, value in of.items():
                if name not in MAPS:
                    yield from objects(value, f"{path}.{name}")
        case list():
            for value in of:
                yield from objects(value, path)


def places(of: Any) -> dict[str, dict[str, Any]]:
    """One object of each place."""
    return dict(reversed(list(objects(of))))


def test_analyses_are_of_the_schema(full):
    """Defends: a name, a type or a null that the schema does not have."""
    CHECK.check_schema(SCHEMA)
    CHECK.validate(full)
    CHECK.validate(made(everything(1)))
    lone = {(0, "quantum", "spin"): spun(np.random.default_rng(2), 40)}
    CHECK.validate(made(Trace({}, {0: {"host": "a"}}, lone)))
    loop = everything(1)
    CHECK.validate(made(Trace({}, loop.ranks, {k: s for k, s in loop.rows.items() if k[2] == "detour"})))
    quiet = {0: {"measured": {"detour": facts((0, 10**6))}}}
    events = {(0, "event", "detour"): Series(*np.empty((2, 0), np.int64), np.empty(0))}
    CHECK.validate(made(Trace({}, quiet, events)))


def test_the_analysis_has_all_that_the_schema_tells(full):
    """Defends: parts that no analysis of this file has, so that the next test would not see them."""
    assert {s["kernel"] for s in full["series"]} == {"spin", "spin_ftq", "a2a_local"}
    assert full["collectives"]["steps"] == 1500
    assert full["idle_loop"][0]["noise"]["detours"] == 60
    assert len(full["scores"]["ranks"]) == 2
    of_spin = full["series"][[s["kernel"] for s in full["series"]].index("spin")]
    assert of_spin["changes"][0]["clocks"]
    assert full["idle_loop"][0]["periods"]
    assert of_spin["causes"]["shares"]
    assert of_spin["causes"]["unread"]
    assert full["projections"][1]["tails"]


def test_nothing_may_be_missing_or_under_another_name(full):
    """Defends: an object of the schema that takes any."""
    whole, full = full, shortened(full)
    assert places(full).keys() == places(whole).keys()
    for place, found in places(full).items():
        for name in list(found):
            value = found.pop(name)
            assert not CHECK.is_valid(full), f"{place}.{name} may be missing"
            found[f"{name}_"] = value
            assert not CHECK.is_valid(full), f"{place}.{name} may have another name"
            found[name] = found.pop(f"{name}_")
        found["further"] = 1
        assert not CHECK.is_valid(full), f"{place} may have more"
        del found["further"]
    CHECK.validate(full)
    assert len(places(full)) > 20


def test_nothing_may_be_of_another_type(full):
    """Defends: a schema that has a name and no type."""
    full = shortened(full)
    CHECK.validate(full)
    for place, found in places(full).items():
        for name, value in found.items():
            found[name] = "NaN" if isinstance(value, bool) else False
            assert not CHECK.is_valid(full), f"{place}.{name}"
            found[name] = value
    CHECK.validate(full)


def test_an_analysis_tells_where_it_was_measured():
    """Defends: figures of a clock, a governor or versions that nobody can look up any more."""
    about = host.described(clock_cost(), None)
    about["clock"]["offsets"] = [{"offset_ns": 0, "residual_ns": 40}] * 2
    spin = spun(np.random.default_rng(2), 40)
    told = made(Trace({}, {0: about, 3: {}}, {(r, "quantum", "spin"): spin for r in (0, 3)}))
    CHECK.validate(told)
    assert told["machines"]["0"] == {
        "clock": about["clock"],
        "cpu": about["cpu"],
        "versions": about["versions"],
        "imported": None,
    }
    assert told["machines"]["3"] == dict.fromkeys(["clock", "cpu", "versions", "imported"])
    del told["machines"]["3"]["versions"]
    assert not CHECK.is_valid(told)


def validator(name: str) -> jsonschema.Draft202012Validator:
    found = json.loads((files("sigma_noise") / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


def refuses_changes(check: jsonschema.Draft202012Validator, told: Any) -> None:
    """Each name of each object is wanted, has a type, and no other is taken."""
    for place, found in places(told).items():
        for name in list(found):
            value = found.pop(name)
            assert not check.is_valid(told), f"{place}.{name} may be missing"
            found[name] = {}
            assert not check.is_valid(told), f"{place}.{name} may be of any type"
            found[name] = value
        found["further"] = 1
        assert not check.is_valid(told), f"{place} may have more"
        del found["further"]
    check.validate(told)


def test_a_doctors_findings_are_of_their_schema(monkeypatch):
    """Defends: a check of another name, or a value that a reader does not expect; a machine that shows nothing."""
    monkeypatch.setattr(fitness, "baseline_noise", lambda *_: 0.3)
    check = validator("doctor")
    told = CliRunner().invoke(app, ["noise", "doctor", "--json", "--duration", "1ms"])
    found = json.loads(told.output)
    assert told.exit_code == 4
    assert found["fit"] is False
    refuses_changes(check, found)
    blank = [
        fitness.clock_source(Path("/none")),
        fitness.governor(0, Path("/none")),
        fitness.quota(Path("/none")),
    ]
    check.validate(json.loads(json.dumps(fitness.to_json(blank), allow_nan=False)))


def test_a_self_test_is_of_its_schema(monkeypatch, tmp_path):
    """Defends: cells of which nothing was injected or found, which are null and not NaN."""
    nan = float("nan")
    cells = [
        selftest.Cell(0.02, 2.0, 6, 1.0, 0.6, 1.0, 6, 1.0, 0.0204, 1e-4),
        selftest.Cell(0.02, 10.0, 0, nan, nan, nan, 0, nan, nan, nan),
    ]
    monkeypatch.setattr(selftest, "curve", lambda *_, **__: cells)
    told = CliRunner().invoke(app, ["noise", "selftest", "--json", str(tmp_path / "c.json")])
    assert told.exit_code == 0, told.output
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["limits"] == [{"rate_hz": 2.0, "length_s": 0.02}, {"rate_hz": 10.0, "length_s": None}]
    refuses_changes(validator("selftest"), found)


def test_a_training_is_of_its_schema():
    """Defends: a name that the schema has and the file has not, or the other way round; an interval without an end."""
    schema = json.loads((files("sigma_noise") / "training.schema.json").read_text())
    check = jsonschema.Draft202012Validator(schema)
    check.check_schema(schema)
    stops = random_stops(1)
    ran = Stopped(1, stops)
    ran.stops = stops[stops + ran.length_ns < ran.ended.max()]
    trace = recorded(ran)
    noise, why = step_noise(trace, warm_up=0), late(trace, warm_up=0)
    beside, digests = step_ranks(trace, warm_up=0), {"rank00000.parquet": "0f" * 32}
    told = json.loads(json.dumps(of_training(noise, why, beside, digests), allow_nan=False))
    check.validate(told)
    assert told["noise"]["worst"] == told["late"]["rank"] == WORST
    assert told["late"]["regained_s"][STOPPED]["by_steps"]["seconds"] > 0
    check.validate(json.loads(json.dumps(of_training(noise, None, beside, digests), allow_nan=False)))
    for name in told["late"]:
        with pytest.raises(jsonschema.ValidationError):
            check.validate(told | {"late": {k: v for k, v in told["late"].items() if k != name}})
