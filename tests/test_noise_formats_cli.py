"""`sigma noise import` and `export`: files in, a measurement out and back, and options that would not apply."""

import hashlib
import json

import numpy as np
import pytest
import typer
from noise_samples import NETGAUGE, TRACER, kineto, same, written
from prometheus_client.parser import text_string_to_metric_families
from sigma_noise import formats_cli
from sigma_noise.trace import Series, Trace, read
from sigma_train.errors import WrongInput
from typer.testing import CliRunner

app = typer.Typer()
app.command("import")(formats_cli.import_)
app.command("export")(formats_cli.export)


def run(*args: object) -> str:
    """What it prints.  Raises what it raises."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*args: object) -> str:
    with pytest.raises(WrongInput) as error:
        run(*args)
    return str(error.value)


def measurement() -> Trace:
    rng = np.random.default_rng(3)
    rows = {}
    for rank in (0, 2):
        took = 50_000 + rng.integers(0, 500, 4000) + 400_000 * (rng.random(4000) < 0.01)
        ends = 7_000_000_000 + np.cumsum(took)
        rows[rank, "quantum", "spin"] = Series(ends - took, ends, np.ones(4000))
        rows[rank, "counter", "run_delay_ns"] = Series(ends[:9], ends[:9], np.arange(9.0))
        rows[rank, "event", "gc"] = Series(ends[:2], ends[1:3], np.array([2.0, 2.0]))
    return Trace({"seed": 3}, {0: {"host": "a"}, 2: {"host": "b"}}, rows)


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_through_chrome_json_and_back(tmp_path, name):
    """Defends: ranks that change, rows of one rank in the file of another."""
    trace = measurement()
    trace.write(tmp_path / "m.parquet")
    assert run("export", tmp_path / "m.parquet", tmp_path / name).startswith(f"{tmp_path / name}: ")
    said = run("import", tmp_path / name, tmp_path / "back")
    assert said == f"{tmp_path / 'back'}: 8,000 quantum rows, 18 counter rows, 4 event rows of 2 ranks\n"
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == ["rank00000.parquet", "rank00002.parquet"]
    back = read(tmp_path / "back")
    assert back.run == trace.run
    digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert back.ranks[2] == {"host": "b", "imported": {"file": name, "sha256": digest}}
    assert back.rows.keys() == trace.rows.keys()
    assert all(same(back.rows[key], trace.rows[key]) for key in trace.rows)


def test_a_folder_of_ranks(tmp_path):
    """Defends: ranks by the order of files; a second trace of a rank that takes the place of the first."""
    (tmp_path / "job").mkdir()
    for rank in (7, 3):
        written(
            tmp_path / "job" / f"{9 - rank}.json",
            kineto(distributedInfo={"rank": rank}, host_name=f"n{rank}"),
        )
    run(
        "import",
        tmp_path / "job",
        tmp_path / "all.parquet",
        "--events",
        "*/ProfilerStep*=s",
        "--events",
        "kernel/*=k",
    )
    back = read(tmp_path / "all.parquet")
    assert {rank: facts["host"] for rank, facts in back.ranks.items()} == {3: "n3", 7: "n7"}
    assert back.names() == ["k", "s"]
    written(tmp_path / "job" / "x.json", kineto())
    assert "x.json: rank 3 is in 6.json as well" in refused("import", tmp_path / "job", tmp_path / "twice")
    assert "--rank is for one file" in refused("import", tmp_path / "job", tmp_path / "twice", "--rank", 1)
    assert not (tmp_path / "twice").exists()


def test_noise_of_linux_goes_on_to_loggopsim(tmp_path):
    """Defends: a tool between two others that loses a nanosecond."""
    run("import", written(tmp_path / "osnoise_trace.txt", TRACER), tmp_path / "m")
    run("export", tmp_path / "m", tmp_path / "n.tsv", "--rank", 9, "--name", "detour")
    rows = [line for line in (tmp_path / "n.tsv").read_text().split("\n") if not line.startswith("#")]
    assert rows == ["21000\t7000", "28000\t0"]  # since the first of all that CPU 9 saw, at 5789.89998
    run("import", tmp_path / "n.tsv", tmp_path / "again")
    again = read(tmp_path / "again")
    assert again.get(9, "event", "detour").start_ns.tolist() == [21000]
    run("import", written(tmp_path / "ng.0", NETGAUGE), tmp_path / "ng", "--rank", 5)
    assert len(read(tmp_path / "ng").get(5, "event", "detour")) == 3


def test_export_for_prometheus(tmp_path):
    """Defends: a threshold that goes nowhere; noise that misses the injected 1 % of 400 us."""
    measurement().write(tmp_path / "m.parquet")
    run("export", tmp_path / "m.parquet", tmp_path / "n.prom", "--threshold", 1e-4, "--per-rank")
    families = {f.name: f for f in text_string_to_metric_families((tmp_path / "n.prom").read_text())}
    threshold = families["sigma_noise_detour_threshold_seconds"].samples
    assert [s.value for s in threshold] == pytest.approx([1e-4])
    trace = measurement()
    for sample in families["sigma_noise_ratio"].samples:
        took = trace.get(int(sample.labels["rank"]), "quantum", "spin").seconds
        noise = np.maximum(took - np.quantile(took, 0.05), 0).sum() / took.sum()
        assert sample.value == pytest.approx(noise, rel=1e-12)
        assert 0.05 < sample.value < 0.12
    count = next(s for s in families["sigma_noise_detour_seconds"].samples if s.name.endswith("_count"))
    injected = sum(int((s.seconds > 1e-4).sum()) for (_, k, _), s in trace.rows.items() if k == "quantum")
    assert count.value == injected


def test_export_as_hdr_log(tmp_path):
    pytest.importorskip("hdrh.log")
    measurement().write(tmp_path / "m.parquet")
    run("export", tmp_path / "m.parquet", tmp_path / "t.hlog", "--interval", 0.1)
    lines = (tmp_path / "t.hlog").read_text().splitlines()
    assert sum(line.startswith("Tag=rank0.spin,") for line in lines) == 3
    assert sum(line.startswith("Tag=") for line in lines) == 6


def test_what_does_not_apply_or_fit_is_refused(tmp_path):
    """Defends: options that are passed over, and files that are written over."""
    measurement().write(tmp_path / "m.parquet")
    m, x = tmp_path / "m.parquet", tmp_path / "x"
    trace = written(tmp_path / "t.json", kineto())
    text = written(tmp_path / "t.txt", TRACER)
    assert "--rank does not apply to the format rtla" in refused("import", text, x, "--rank", 1)
    assert "--events does not apply to the format rtla" in refused("import", text, x, "--events", "a/b")
    assert "--per-rank does not apply to the format hdr" in refused(
        "export", m, tmp_path / "a.hdr", "--per-rank"
    )
    assert "--threshold does not apply to the format chrome" in refused(
        "export", m, tmp_path / "a.json", "--threshold", 1
    )
    assert "--interval does not apply to the format netgauge" in refused(
        "export", m, tmp_path / "a.tsv", "--interval", 1
    )
    result = CliRunner().invoke(app, ["export", str(m), str(tmp_path / "a.tsv"), "--threshold", "-1"])
    assert result.exit_code == 2
    assert "is no time such as 250us" in " ".join(result.output.split())
    assert "--format wants one of chrome, rtla, netgauge, found 'hdr'" in refused(
        "import", trace, x, "--format", "hdr"
    )
    assert "--format wants one of chrome, netgauge, prometheus, hdr, found 'rtla'" in refused(
        "export", m, x, "--format", "rtla"
    )
    assert "its name tells no format" in refused("export", m, tmp_path / "a.docx")
    assert "its content and name tells no format" in refused("import", written(tmp_path / "a.docx", "PK"), x)
    assert "CATEGORY/NAME" in refused("import", trace, x, "--events", "kernel")
    assert "a measurement is there already" in refused("import", trace, tmp_path)
    assert "a measurement is there already" in refused("import", trace, m)
    assert "an empty folder" in refused("import", (tmp_path / "empty").mkdir() or tmp_path / "empty", x)
    assert "export: cannot write in" in refused("export", m, tmp_path / "no" / "a.json")
    run("export", m, tmp_path / "back.json")
    assert "are for foreign traces" in refused("import", tmp_path / "back.json", x, "--rank", 1)
    assert not x.exists()
    assert json.loads((tmp_path / "back.json").read_text())["sigma_noise"]["run"] == {"seed": 3}
