"""From a measurement to what is shown of it: the first screen, the page, JSON, and exit codes."""

import json
import re
from importlib.resources import files

import jsonschema
import numpy as np
import pytest
from noise_samples import write
from sigma_cli.commands import app
from sigma_noise import plots, screen
from sigma_noise.analysis import analyze
from sigma_noise.as_json import as_json
from sigma_noise.trace import Series, Trace, rank_file
from sigma_train.errors import WrongInput, verdict
from support import sigma
from typer.testing import CliRunner

QUANTUM_NS = 1_000_000


def quanta(seed: int, n: int, *, slow: float = 1.0, tail: float = 0.0, train_ns: int = 0) -> Series:
    """Fixed work of 1 ms with 1 % of noise; `tail`: share of quanta ten times as long; `train_ns`: 0.6 ms in every."""
    rng = np.random.default_rng(seed)
    took = QUANTUM_NS * slow * (1 + 0.01 * rng.exponential(size=n))
    took[rng.random(n) < tail] *= 10
    start = np.concatenate([[0], np.cumsum(took)[:-1]])
    if train_ns:
        pulses = np.floor((start + took) / train_ns) > np.floor(start / train_ns)
        took = took + 600_000 * pulses
        start = np.concatenate([[0], np.cumsum(took)[:-1]])
    begin = np.rint(start).astype(np.int64) + 7_000_000_000
    return Series(begin, begin + np.rint(took).astype(np.int64), np.ones(n))


def measured(ranks: dict[int, Series]) -> Trace:
    about = {r: {"host": f"node{r}", "warnings": [], "measured": {"spin": {"mode": "fwq"}}} for r in ranks}
    run = {
        "kernels": ["spin"],
        "modes": ["fwq"],
        "quantum_s": 1e-3,
        "threads": 1,
        "sizes": {},
        "backend": "cpu",
    }
    return Trace(run, about, {(r, "quantum", "spin"): s for r, s in ranks.items()})


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["noise", *map(str, arguments)])


def test_a_core_that_was_slowed_down_for_heat_is_told():
    """Defends: a hot CPU, which is nobody's detour, read and never said; one that was hot before is not now."""
    begin = np.arange(7000, 7400) * QUANTUM_NS
    trace = measured({r: Series(begin, begin + QUANTUM_NS, np.ones(400)) for r in range(2)})
    at = np.array([7, 8]) * 1_000_000_000
    trace.rows[0, "counter", "core_throttled_ns"] = Series(at, at, np.array([5e9, 5.25e9]))
    trace.rows[1, "counter", "core_throttled_ns"] = Series(at, at, np.array([5e9, 5e9]))
    told = [text for text in analyze(trace).warnings if "heat" in text]
    assert told == [
        "rank 0: its core was slowed down for heat for 250 ms of the measurement; let it cool, and measure again"
    ]


def test_the_rank_with_rare_long_detours_is_named():
    """Defends: a screen that shows medians alone, in which this rank is like all others."""
    trace = measured({r: quanta(r, 4000, tail=0.01 if r == 2 else 0.0) for r in range(4)})
    found = analyze(trace)
    assert found.scores.flagged == [2]
    assert found.worst.rank == 2
    lines = screen.lines(found)
    assert len(lines) <= 25
    assert "rank 2 stands out" in lines[0]
    assert any("rare long detours" in line for line in lines)


def test_a_period_is_shown_with_its_source():
    found = analyze(measured({0: quanta(0, 20_000, train_ns=100_000_000)}))
    (line,) = [line for line in screen.lines(found) if line.startswith("period")]
    assert "100 ms (10" in line or "9.9" in line
    assert "NCCL watchdog" in line


def test_noise_is_what_was_put_in():
    """Defends: shares of another denominator.  Of 1 % of quanta of 10 ms among quanta of 1 ms 9/109 is lost."""
    series = quanta(3, 10_000, tail=0.01)
    long = (series.end_ns - series.start_ns > 5 * QUANTUM_NS).mean()
    (found,) = analyze(measured({0: series})).series
    assert found.noise.burst == pytest.approx(9 * long / (1 + 9 * long), rel=0.03)
    assert found.share.low < found.noise.share < found.share.high


def test_cells_of_few_chunks_say_nothing_where_nothing_is():
    """Defends: bursts, periods and lines of the beat between a chunk of 205 us and a cell of 1 ms."""
    count = np.diff(np.arange(3001) * 1000 // 205).astype(np.float64)
    start = QUANTUM_NS * np.arange(3000)
    about = {"host": "a", "measured": {"gemm_ftq": {"mode": "ftq"}}}
    cells = Series(start, start + QUANTUM_NS, count)
    trace = Trace({}, {0: about}, {(0, "quantum", "gemm_ftq"): cells})
    found = analyze(trace)
    (quiet,) = found.series
    assert (quiet.share.low, quiet.share.estimate, quiet.share.high) == (0, 0, 0)
    assert (len(quiet.noise.detours), quiet.periods) == (0, ())
    assert plots.lines(trace, found) is None
    count[2::100] -= 3
    (struck,) = analyze(trace).series
    assert len(struck.noise.detours) == 30
    assert struck.periods[0].period_s == pytest.approx(0.1, rel=0.01)
    assert struck.share.low > 0


def test_json_is_of_the_published_schema(tmp_path):
    """Defends: a field that was renamed, NaN in JSON."""
    schema = json.loads((files("sigma_noise") / "analysis.schema.json").read_text())
    write(measured({r: quanta(r, 3000, tail=0.01 * r) for r in range(2)}), tmp_path / "run")
    out = tmp_path / "a.json"
    result = invoke("analyze", tmp_path / "run", "--json", out)
    assert result.exit_code == 0, result.output
    jsonschema.validate(json.loads(out.read_text()), schema)
    lone = as_json(analyze(measured({0: quanta(0, 40)})))
    jsonschema.validate(json.loads(json.dumps(lone, allow_nan=False)), schema)


OUTWARD = re.compile(
    r"""(?:src|srcset|href|action|poster|data)\s*=\s*["']?(?!["']?data:)[^\s>]*"""  # with quotes or without
    r"""|url\(\s*["']?(?!["']?data:)[^)]*\)|@import[^;]*""",
    re.IGNORECASE,
)


@pytest.mark.parametrize(
    "text",
    [
        '<img src="a.png">', "<img src='a.png'>", "<script src=//cdn/x.js>", "<a href = https://x.org>",
        "body { background: url(http://x/y.png) }", 'div { background: URL("y.png") }', "@import 'a.css';",
        "@import url(a.css);", '<img srcset="a.png 2x">',
    ],
)  # fmt: skip
def test_what_reaches_out_is_seen(text):
    """Defends: a check of a page that sees double quotes alone."""
    assert OUTWARD.search(text)
    assert not OUTWARD.search('<img src="data:image/png;base64,AA=="> url(data:font/woff;base64,AA)')


def test_the_page_needs_no_network(tmp_path):
    write(measured({r: quanta(r, 3000, tail=0.01 * r) for r in range(2)}), tmp_path / "run")
    result = invoke("analyze", tmp_path / "run", "--report", tmp_path / "out")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert not OUTWARD.search(page)
    assert page.count("<img") == len(list((tmp_path / "out").glob("*.png"))) >= 4
    assert "rare long detours" in page


def test_project_refuses_and_flags(tmp_path):
    """Defends: a number for 16,384 ranks from windows that do not hold one."""
    write(measured({0: quanta(0, 2000)}), tmp_path / "run")
    result = invoke("project", tmp_path / "run", "--window", "1ms", "--model", "ecdf", "--ranks", "8,16384")
    assert result.exit_code == 0, result.output
    assert "extrapolated" in result.output
    assert "lies beyond all" in " ".join(result.output.split())
    result = invoke(
        "project",
        tmp_path / "run",
        "--window",
        "1ms",
        "--model",
        "ecdf",
        "--ranks",
        "8",
        "--budget",
        "1.0001",
    )
    assert result.exit_code == 1
    assert "over the budget" in result.output


def arms(tmp_path, slow: float, runs: int = 5, **options: float) -> tuple:
    for arm, factor in (("a", 1.0), ("b", slow)):
        for run in range(runs):
            wobble = 1 + 0.002 * np.random.default_rng(100 * run + len(arm) + ord(arm)).normal()
            series = quanta(run + 50 * ord(arm), 2000, slow=factor * wobble, **options)
            write(measured({0: series}), tmp_path / arm / f"run{run}")
    return tmp_path / "a", tmp_path / "b"


@pytest.mark.parametrize(("slow", "runs", "code", "word"), [
    (1.0, 5, 0, "equivalent"), (1.10, 5, 1, "regressed"), (0.9, 5, 0, "improved"), (1.10, 3, 3, "inconclusive"),
])  # fmt: skip
def test_compare_ends_with_the_code_of_its_verdict(tmp_path, slow, runs, code, word):
    a, b = arms(tmp_path, slow, runs)
    result = invoke("compare", a, b, "--metric", "median_s", "--json", tmp_path / "c.json")
    assert result.exit_code == code, result.output
    told = json.loads((tmp_path / "c.json").read_text())
    assert told["verdict"] == word
    assert told["exit"] == code
    assert told["shape"]["wasserstein_log"] == pytest.approx(abs(np.log(slow)), abs=0.01)
    assert f"{told['shape']['similarity']:.3f} similar" in " ".join(result.output.split())


def test_compare_of_a_noisy_base_is_unfit(tmp_path):
    a, b = arms(tmp_path, 1.0, tail=0.1)
    result = invoke("compare", a, b)
    assert result.exit_code == 4, result.output
    assert "quieten the machine" in result.output


def test_wrong_input_is_a_sentence_and_code_2(tmp_path, cache):
    write(measured({0: quanta(0, 2000)}), tmp_path / "run")
    for arguments, words in (
        (("analyze", tmp_path / "none"), "no measurement here"),
        (("analyze", tmp_path / "run", "--kernel", "gemm"), "kernel must be one of spin"),
        (("project", tmp_path / "run", "--model", "magic"), "--model must be of"),
        (("compare", tmp_path, tmp_path / "none"), "no runs here"),
        (("compare", tmp_path, tmp_path, "--margin", "median_s"), "--margin must be like"),
    ):
        result = invoke(*arguments)
        assert words in str(result.exception), (arguments, result.output, result.exception)
        assert verdict(result.exception) == (2, str(result.exception))
    for arguments in (("analyze", str(tmp_path / "none")), ("analyze",), ("project", "--rank", "8")):
        ended = sigma("noise", *arguments, env=cache)
        assert ended.returncode == 2, ended.stderr


def test_a_record_of_a_training_is_told_by_its_steps(tmp_path):
    """Defends: phases of a step that are taken for quanta of the same work."""
    begin = np.arange(60) * 10_000_000
    late = np.where(np.arange(60) % 6 == 5, 3_000_000, 0)
    for rank in range(2):
        arrives, ends = begin + 5_000_000 + late * (rank == 1), begin + 9_000_000
        rows = {
            (rank, "quantum", "step"): Series(begin, ends, np.ones(60)),
            (rank, "counter", "step"): Series(begin, begin, np.arange(60.0)),
            (rank, "quantum", "blocked"): Series(arrives, ends, np.ones(60)),
        }
        about = {rank: {"host": "a", "boot": "b", "groups": {}, "collectives": {}}}
        (tmp_path / "noise").mkdir(exist_ok=True)
        Trace({}, about, rows).write(rank_file(tmp_path / "noise", rank))
    result = invoke("analyze", tmp_path / "noise")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "rank 1 computed" in result.output
    assert invoke("analyze", tmp_path / "noise", "--json", tmp_path / "t.json").exit_code == 0
    assert json.loads((tmp_path / "t.json").read_text())["noise"]["worst"] == 1
    assert "whose report.html has this" in str(
        invoke("analyze", tmp_path / "noise", "--report", tmp_path).exception
    )
    for option, value in (("kernel", "spin"), ("tau", "1ms"), ("window", "1ms")):
        error = invoke("analyze", tmp_path / "noise", f"--{option}", value).exception
        assert isinstance(error, WrongInput), option
        assert f"whose steps take no --{option}; leave it out" in str(error)
