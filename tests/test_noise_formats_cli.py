"""`sigma noise import` and `export`: files in, a measurement out and back, and options that would not apply."""

import hashlib
import json

import numpy as np
import pytest
import typer
from noise_samples import HIST, NETGAUGE, TOP, TRACER, everything, kineto, same, written
from prometheus_client.parser import text_string_to_metric_families
from sigma_noise import analyze_cli, formats_cli
from sigma_noise.trace import Series, Trace, read
from sigma_train.errors import WrongInput
from typer.testing import CliRunner

app = typer.Typer()
app.command("import")(formats_cli.import_)
app.command("export")(formats_cli.export)
app.command("analyze")(analyze_cli.analyze)


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


def analyzed(source, folder, *options: object) -> tuple[dict, str]:
    """Figures and first screen of an imported file."""
    run("import", source, folder / "m", *options)
    screen = run("analyze", folder / "m", "--json", folder / "a.json")
    return json.loads((folder / "a.json").read_text()), screen


def test_steps_of_a_profiler_are_analyzed(tmp_path):
    """Defends: an import that `analyze` has no use for.  40 steps of 2 ms, one of which took 3 ms more."""
    step = {"ph": "X", "cat": "user_annotation", "pid": 17, "tid": 17}
    took = [2000 + 3000 * (i == 17) for i in range(40)]
    events = [{**step, "name": f"ProfilerStep#{i}", "ts": 5000 * i, "dur": us} for i, us in enumerate(took)]
    found, screen = analyzed(written(tmp_path / "t.json", kineto(traceEvents=events)), tmp_path)
    (of_steps,) = found["series"]
    assert (of_steps["rank"], of_steps["kernel"], of_steps["quanta"]) == (3, "step", 40)
    assert of_steps["is_fixed_time"] is False
    assert of_steps["noise"]["share"] == pytest.approx(3 / 83)
    assert of_steps["noise"]["longest_s"] == pytest.approx(3e-3)
    assert "verdict     noisy: 3.61 % of the time of step is noise" in screen


def test_what_the_osnoise_tracer_says_is_analyzed(tmp_path):
    """Defends: periods without the length of their quanta, detours without a least gap or a threshold.

    40 periods of 0.9 s in each second: in one 90 ms were lost, in all others nothing; that one has a detour of 6 us.
    """
    lines = ["# tracer: osnoise"]
    for i in range(40):
        if i == 30:
            lines.append(
                f" osnoise/2-961 [002] .... {i}.500000: sample_threshold: start {i}.400000000 duration 6000 ns "
                "interferences 2"
            )
        noise, available = (90_000, "90.00000") if i == 30 else (0, "100.00000")
        lines.append(f" osnoise/2-961 [002] .... {i}.900000: 900000 {noise} {available} 9 0 0 1 1 1")
    found, screen = analyzed(written(tmp_path / "t.txt", "\n".join(lines)), tmp_path)
    (periods,) = found["series"]
    assert periods["is_fixed_time"] is True
    assert periods["noise"]["observed_s"] == pytest.approx(36)
    assert periods["noise"]["share"] == pytest.approx(0.09 / 36)
    assert periods["noise"]["longest_s"] == pytest.approx(0.09)
    (loop,) = found["idle_loop"]
    assert (loop["rank"], loop["noise"]["detours"], loop["noise"]["tau_s"]) == (2, 1, 5e-6)
    assert loop["noise"]["burst"] == pytest.approx(6e-6 / 39.9)
    assert "idle loop   rank 2:" in screen
    table, screen = analyzed(written(tmp_path / "top.txt", TOP), tmp_path / "top")
    assert table["series"] == []
    assert "rank 3: fewer than 30 quanta of osnoise_ftq" in screen
    assert "found none" in refused_import(written(tmp_path / "hist.txt", HIST), tmp_path / "hist")


def refused_import(source, folder) -> str:
    run("import", source, folder)
    return refused("analyze", folder)


def test_detours_of_netgauge_are_analyzed(tmp_path):
    """Defends: lengths that lack the least gap, compared with a threshold of gaps, which drops the shortest."""
    text = NETGAUGE.replace("2000004.29\t351.50", "2000004.29\t200.00")  # a gap of 224.5 ns, above 220.5
    found, screen = analyzed(written(tmp_path / "ng", text), tmp_path, "--rank", 5)
    (loop,) = found["idle_loop"]
    assert (loop["rank"], loop["noise"]["detours"]) == (5, 3)
    assert loop["noise"]["tau_s"] == pytest.approx(220.5e-9)
    assert loop["noise"]["longest_s"] == pytest.approx(1403e-9)
    assert loop["noise"]["burst"] == pytest.approx((1211 + 1403 + 200) / 2000228)
    assert "no quanta were measured" in screen
    bare = "0\t7\n5000\t9000\n10000\t0"  # of which nobody knows the threshold
    found, _ = analyzed(written(tmp_path / "bare", bare), tmp_path / "b")
    assert found["idle_loop"][0]["noise"]["detours"] == 2
    assert found["idle_loop"][0]["noise"]["burst"] == pytest.approx(0.9007)


def test_figures_are_those_of_the_first_screen(tmp_path):
    """Defends: exports with floors or thresholds of their own: after 20 % more, all would be noise to one floor."""
    rng = np.random.default_rng(9)
    took = (1_000_000 * (1 + 0.001 * rng.random(4000))).astype(np.int64)
    took[2000:] = 1.2 * took[2000:]
    took[rng.random(4000) < 0.01] += 400_000
    ends = np.cumsum(took)
    count = np.where(rng.random(500) < 0.02, 400.0, 1000.0)
    begins = 1_000_000 * np.arange(500)
    gaps = Series(begins[::50], begins[::50] + 9_000, np.full(10, 8_950e-9))
    loop = {"mode": "detours", "threshold_s": 1e-6, "observed_s": 0.5, "least_gap_s": 50e-9}
    about = {0: {"host": "a", "measured": {"detour": loop}}}
    rows = {
        (0, "quantum", "spin"): Series(ends - took, ends, np.ones(4000)),
        (0, "quantum", "spin_ftq"): Series(begins, begins + 1_000_000, count),
        (0, "event", "detour"): gaps,
    }
    Trace({"quantum_s": 1e-3}, about, rows).write(tmp_path / "m.parquet")
    run("analyze", tmp_path / "m.parquet", "--json", tmp_path / "a.json")
    shown = json.loads((tmp_path / "a.json").read_text())
    noises = {s["kernel"]: s["noise"] for s in shown["series"]} | {"detour": shown["idle_loop"][0]["noise"]}
    assert noises["spin"]["share"] < 0.005
    run("export", tmp_path / "m.parquet", tmp_path / "n.prom")
    families = text_string_to_metric_families((tmp_path / "n.prom").read_text())
    samples = {(s.name, s.labels.get("kernel")): s.value for f in families for s in f.samples}
    assert noises.keys() == {"spin", "spin_ftq", "detour"}
    for kernel, noise in noises.items():
        assert samples["sigma_noise_ratio", kernel] == pytest.approx(noise["share"], rel=1e-12)
        assert samples["sigma_noise_detour_threshold_seconds", kernel] == noise["tau_s"]
        assert samples["sigma_noise_detour_seconds_count", kernel] == noise["detours"]
        run("export", tmp_path / "m.parquet", tmp_path / "n.tsv", "--name", kernel)
        text = (tmp_path / "n.tsv").read_text()
        lengths = [int(line.split("\t")[1]) for line in text.split("\n") if line[0] != "#"]
        assert len(lengths) == noise["detours"] + 1
        assert sum(lengths) * 1e-9 == pytest.approx(noise["burst"] * noise["observed_s"], rel=1e-6)


def test_what_collectives_tell_is_not_of_another_kernel(tmp_path):
    """Defends: S(N) of local times before collectives under the name of the first kernel."""
    everything(2).write(tmp_path / "m.parquet")
    run("export", tmp_path / "m.parquet", tmp_path / "n.prom")
    families = {f.name: f for f in text_string_to_metric_families((tmp_path / "n.prom").read_text())}
    for name in ("projected_slowdown_ratio", "straggler_what_if_ratio"):
        found = families[f"sigma_noise_{name}"].samples
        assert {s.labels["kernel"] for s in found} == {"a2a_local"}, name
    assert {s.labels["kernel"] for s in families["sigma_noise_ratio"].samples} == {
        "a2a_local", "detour", "spin", "spin_ftq",
    }  # fmt: skip


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
    begins = [line.split(",")[1] for line in lines if line.startswith("Tag=rank0.spin,")]
    assert begins == ["0.000000", "0.100000", "0.200000"]
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
    for text in ("-1", "nan", "inf"):
        result = CliRunner().invoke(app, ["export", str(m), str(tmp_path / "a.tsv"), "--threshold", text])
        assert result.exit_code == 2
        assert "is no time such as 250us" in " ".join(result.output.split())
    for name in ("a.tsv", "a.prom"):
        assert refused("export", m, tmp_path / name, "--threshold", "0us") == (
            "--threshold must be more than 0 s, found 0; leave it out for the usual one"
        )
    assert "--interval must be positive" in refused("export", m, tmp_path / "a.hdr", "--interval", 0)
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
