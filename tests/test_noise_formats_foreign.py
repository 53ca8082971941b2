"""What other tools wrote becomes the right rows, and what nobody wrote is refused by a sentence."""

import contextlib
import gzip
import json
import tracemalloc

import numpy as np
import pytest
import torch
import torch.distributed as dist
from noise_samples import HIST, NETGAUGE, TOP, TRACER, kineto, written
from sigma_noise.formats import chrome, netgauge, perfetto, rtla, told_by
from sigma_noise.trace import Trace
from sigma_train.errors import WrongInput

BASE = 1790857026000000000


def rows(trace: Trace, rank: int, kind: str, name: str) -> list[tuple[int, int, float]]:
    """Begin, length, value."""
    series = trace.get(rank, kind, name)
    return list(
        zip(
            series.start_ns.tolist(),
            (series.end_ns - series.start_ns).tolist(),
            series.value.tolist(),
            strict=True,
        )
    )


def refused(read, path, **options) -> str:
    with pytest.raises(WrongInput) as error:
        read(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_steps_of_a_real_trace_are_those_of_the_profiler(tmp_path):
    """Defends: microseconds rounded, a base that is forgotten, steps of the warm-up, collectives that are lost."""
    model = torch.nn.Linear(32, 32)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        schedule = torch.profiler.schedule(wait=0, warmup=1, active=3, repeat=1)
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, schedule=schedule, acc_events=True) as profiler:
            for _ in range(5):
                with torch.profiler.record_function("forward"):
                    loss = model(torch.ones(8, 32)).sum()
                loss.backward()
                dist.all_reduce(model.weight.grad)
                profiler.step()
    finally:
        dist.destroy_process_group()
    profiler.export_chrome_trace(str(tmp_path / "t.json"))
    trace = chrome.read(tmp_path / "t.json")
    of_profiler = {
        event.name(): (event.start_ns(), event.duration_ns())
        for event in profiler.profiler.kineto_results.events()
    }
    steps = [(begin, took) for begin, took, _ in rows(trace, 0, "quantum", "step")]
    assert steps == [of_profiler[f"ProfilerStep#{number}"] for number in (1, 2, 3)]
    shown = [
        event.time_range.elapsed_us() for event in profiler.events() if event.name.startswith("ProfilerStep")
    ]
    assert [took / 1000 for _, took in steps] == pytest.approx(shown, abs=1e-3)
    assert len(trace.get(0, "quantum", "forward")) == 3
    assert len(trace.get(0, "quantum", "gloo:all_reduce")) >= 1
    assert trace.ranks[0]["clock"]["name"] == "CLOCK_REALTIME"
    operations = chrome.read(tmp_path / "t.json", events=["cpu_op/aten::lin*=linear"])
    assert operations.names() == ["linear"]
    assert len(operations.get(0, "quantum", "linear")) == 3


def test_events_of_a_gpu_job(tmp_path):
    """Defends: spans of the GPU among those of the CPU, kernels under one name, events left in the file's order."""
    path = tmp_path / "t.json.gz"
    path.write_bytes(gzip.compress(json.dumps(kineto()).encode()))
    trace = chrome.read(path)
    assert list(trace.ranks) == [3]
    assert trace.ranks[3]["host"] == "node7"
    assert trace.ranks[3]["clock"] == {"name": "CLOCK_REALTIME", "identity": "node7"}
    assert trace.ranks[3]["measured"]["step"] == {"mode": "fwq", "quantum_s": pytest.approx(2_000_500e-9)}
    assert trace.names() == [
        "forward",
        "gpu:forward",
        "gpu:step",
        "nccl:all_reduce",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgs)",
        "sm80_xmma_gemm_f32f32",
        "step",
    ]
    first = BASE + 4855857388000001
    assert rows(trace, 3, "quantum", "step") == [(first, 2_010_000, 1.0), (first + 2_010_124, 2_000_500, 1.0)]
    assert rows(trace, 3, "quantum", "sm80_xmma_gemm_f32f32") == [
        (first + 189_999, 5_000, 1.0),
        (first + 199_999, 45_015, 1.0),
    ]
    assert list(chrome.read(path, rank=6).ranks) == [6]
    chosen = chrome.read(path, events=["KERNEL/*gemm*=gemm", "cpu_op/aten::mm"])
    assert chosen.names() == ["aten::mm", "gemm"]
    assert chosen.names("event") == chosen.names("counter") == []


def test_stamps_of_the_epoch_keep_their_nanoseconds(tmp_path):
    """Defends: ts as f64, where 1.8e15 us has steps of 250 ns; a head that comes after the events; a bare list."""
    event = '{"ph": "X", "cat": "user_annotation", "name": "a", "ts": 1795712909452323.533, "dur": 0.0015, "pid": 1}'
    path = written(tmp_path / "t.json", f'{{"traceEvents": [{event}], "distributedInfo": {{"rank": 5}}}}')
    assert rows(chrome.read(path), 5, "quantum", "a") == [(1795712909452323533, 2, 1.0)]
    trace = chrome.read(written(tmp_path / "t.json", f"[{event},\n{event.replace('9452', '9453')},"))
    assert rows(trace, 0, "quantum", "a") == [(1795712909452323533, 2, 1.0), (1795712909453323533, 2, 1.0)]
    assert trace.ranks[0]["clock"] == {"name": "unknown", "identity": "t.json"}


def test_events_that_a_chunk_cuts_in_two(tmp_path, monkeypatch):
    """Defends: numbers, escapes and literals of which half is there, and events longer than what is read at once."""
    args = '{"a": [true, false, null], "b": -1.25e-07, "c": "\\u00e9\\"\\\\", "d": NaN, "e": -Infinity}'
    event = f'{{"cat": "kernel", "name": "k\\u00e9", "args": {args}, "ph": "X", "ts": 1234.567, "dur": 89}}'
    path = written(
        tmp_path / "t.json", f'{{"a": 7, "traceEvents": [{event}, {event}], "baseTimeNanoseconds": 12000}}'
    )
    for chunk in range(1, 2 * len(event)):
        monkeypatch.setattr("sigma_noise.formats.json_stream.CHUNK", chunk)
        assert rows(chrome.read(path), 0, "quantum", "k\u00e9") == [(1_246_567, 89_000, 1.0)] * 2


def test_memory_does_not_grow_with_events_that_are_not_chosen(tmp_path):
    """Defends: a trace that is held as a whole."""
    step = {"ph": "X", "cat": "user_annotation", "name": "a", "ts": 1, "dur": 2}
    event = json.dumps({**step, "cat": "cpu_op", "args": {"Call stack": "model.py;" * 1000}})
    with open(tmp_path / "t.json", "w") as file:
        file.write("[" + (event + ",\n") * 1000 + json.dumps(step) + "]")
    assert (tmp_path / "t.json").stat().st_size > 9e6
    chrome.read(tmp_path / "t.json")  # imports
    tracemalloc.start()
    chrome.read(tmp_path / "t.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4.5e6  # a chunk as bytes, as text, and joined with what is left


def test_lines_of_the_tracer(tmp_path):
    """Defends: gross for net, a stamp of the line for the start, a task's name cut at its colon, CPUs mixed up."""
    trace = rtla.read(written(tmp_path / "t.txt", TRACER))
    assert rows(trace, 8, "event", "detour") == [(5789858404555, 8812, 8812e-9)]
    assert rows(trace, 9, "event", "detour") == [(5789900001000, 7000, 7e-6)]
    assert rows(trace, 8, "event", "irq:local_timer") == [
        (5789857529929, 1845, 236.0),
        (5789858404871, 2848, 236.0),
    ]
    assert rows(trace, 8, "event", "thread:migration/8") == [(5789858409300, 3068, 54.0)]
    assert rows(trace, 9, "event", "softirq:SCHED") == [(5789899990000, 992, 7.0)]
    assert rows(trace, 9, "event", "thread:Web Content:q") == [(5789899980000, 9, 77.0)]
    assert rows(trace, 9, "event", "nmi") == [(5789900000000, 512, 0.0)]
    assert rows(trace, 8, "quantum", "osnoise_ftq") == [
        (5789000001000, 10**9, 999_810.0),
        (5790000001000, 10**9, 999_344.0),
    ]
    assert rows(trace, 8, "counter", "osnoise_irq") == [
        (5790000001000, 0, 1007.0),
        (5791000001000, 0, 2013.0),
    ]
    assert rows(trace, 8, "counter", "osnoise_noise_us")[-1] == (5791000001000, 0, 846.0)
    assert {rank: facts["lost_events"] for rank, facts in trace.ranks.items()} == {8: 17, 9: 0}
    assert trace.ranks[9]["measured"]["detour"]["window_ns"] == [5789899980000, 5789900008000]
    assert trace.ranks[8]["measured"]["osnoise_ftq"] == {"mode": "ftq", "kernel": "osnoise", "quantum_s": 1.0}
    assert trace.ranks[8]["measured"]["detour"]["threshold_s"] == 5e-6
    assert trace.ranks[9]["measured"]["detour"]["least_gap_s"] == 0
    assert "osnoise_ftq" not in trace.ranks[9]["measured"]
    causes = "\n".join(line for line in TRACER.splitlines() if "sample_threshold" not in line)
    assert "detour" not in rtla.read(written(tmp_path / "t.txt", causes)).ranks[8]["measured"]


def test_table_of_rtla_top(tmp_path):
    """Defends: the first of the tables that it prints again and again; colours; hwnoise, which has fewer columns."""
    former = "\x1bc" + TOP.replace("304896", "0").replace("99.42580", "100.00000")
    for text in (TOP, former + "\x1bc\x1b[2;30;47m" + TOP.replace("CPU Period", "\x1b[2;30;47mCPU Period")):
        trace = rtla.read(written(tmp_path / "t.txt", text))
        assert rows(trace, 0, "quantum", "osnoise_ftq") == [(0, 53_100_000_000, 53_100_000 - 304_896.0)]
        assert rows(trace, 3, "counter", "osnoise_irq") == [(0, 0, 0.0), (53_100_000_000, 0, 53_156.0)]
        assert rows(trace, 0, "counter", "osnoise_noise_us")[1][2] == 304_896
        assert trace.ranks[0]["measured"]["osnoise_ftq"]["quantum_s"] == pytest.approx(53.1)
        assert trace.ranks[3]["osnoise"] == {"periods": 59, "max_noise_us": 6251, "max_single_us": 33}
    end = TOP.splitlines()[2].index("NMI") + 3
    trace = rtla.read(written(tmp_path / "t.txt", "\n".join(line[:end] for line in TOP.splitlines())))
    assert trace.names("counter") == ["osnoise_hw", "osnoise_nmi", "osnoise_noise_us"]
    assert rows(trace, 0, "counter", "osnoise_hw")[1][2] == 549


def test_table_of_rtla_hist(tmp_path):
    """Defends: columns of one CPU under another, `over` lost."""
    trace = rtla.read(written(tmp_path / "t.log", HIST))
    assert rows(trace, 11, "counter", "detours") == [(0, 0, 0.0), (60 * 10**9, 0, 54829.0)]
    assert trace.ranks[0]["histogram"] == {
        "unit_ns": 1000, "edges": [0, 10, 20], "counts": [42982, 12224, 8],
        "over": 1, "count": 55215, "min": 0, "avg": 2.21, "max": 312,
    }  # fmt: skip


def test_netgauge(tmp_path):
    """Defends: a threshold in per cent for one in ns, decimals cut, lengths without the least gap for gaps."""
    trace = netgauge.read(written(tmp_path / "noise.dat", NETGAUGE), rank=2)
    assert rows(trace, 2, "event", "detour") == [
        (0, 1211 + 24, 1.211e-6),
        (999871, 1403 + 24, 1403e-9),
        (2000004, 352 + 24, 352e-9),
    ]
    alone = netgauge.read(written(tmp_path / "one.dat", "0\t5\n"))
    assert rows(alone, 0, "event", "detour") == [(0, 5, 5e-9)]
    assert alone.ranks[0]["measured"]["detour"]["window_ns"] == [0, 5]
    assert trace.ranks[2]["measured"]["detour"] == {
        "mode": "detours",
        "threshold_s": pytest.approx(24.5e-9 * 9),
        "least_gap_s": 24e-9,
        "observed_s": 2000380e-9,
        "window_ns": [0, 2000380],
    }


def test_formats_are_told_by_content_then_by_name(tmp_path):
    """Defends: a name that outweighs the content."""
    from sigma_noise.formats import FORMATS

    for text, name in [(json.dumps(kineto()), "chrome"), (TRACER, "rtla"), (TOP, "rtla"), (HIST, "rtla"),
                       (NETGAUGE, "netgauge"), ("12\t5\n", "netgauge")]:  # fmt: skip
        assert told_by(written(tmp_path / "x.bin", text), None, to_write=False) is FORMATS[name]
        path = tmp_path / "y.json"
        path.write_bytes(gzip.compress(text.encode()))
        assert told_by(path, None, to_write=False) is FORMATS[name]
    assert told_by(written(tmp_path / "x.tsv", "x"), None, to_write=False) is FORMATS["netgauge"]
    assert told_by(tmp_path / "x.prom", None, to_write=True) is FORMATS["prometheus"]


def step(**changed) -> dict:
    return {"ph": "X", "cat": "user_annotation", "name": "a", "ts": 1.5, "dur": 2.0} | changed


GARBAGE = [
    (chrome.read, "", "it is empty"),
    (chrome.read, b"\x7fELF\x02\x01\x00\x00", "JSON begins with { or ["),
    (chrome.read, b"\x1f\x8b\x08\x00 and then nothing that is packed", "gzip stream is damaged or cut short"),
    (chrome.read, gzip.compress(json.dumps(kineto()).encode())[:300], "gzip stream is damaged or cut short"),
    (chrome.read, json.dumps(kineto())[:900], "broken JSON in event 5, character 900: the file ends here"),
    (chrome.read, json.dumps(kineto())[:-1], "the file ends here"),
    (chrome.read, json.dumps(kineto()) + "]", "after its end comes ']'"),
    (chrome.read, '{"traceEvents": [{"ph": "X",, }]}', "broken JSON in event 0, character 2"),
    (chrome.read, '{"traceEvents": [{"ph": "X"} {}]}', "broken JSON in event 1, character 29: wanted ',', found '{'"),
    (chrome.read, "[" * 200_000, "it is nested too deeply"),
    (chrome.read, '{"a": ' + "9" * 5000 + "}", "broken JSON in its head"),
    (chrome.read, {"traceEvents": []}, "it has no events"),
    (chrome.read, {"a": 1}, "it has no events"),
    (chrome.read, [{"ph": "B", "name": "x"}], "none of its 1 events is complete"),
    (chrome.read, [step(cat="cpu_op"), step(cat="python")], "among the categories cpu_op (1), python (1)"),
    (chrome.read, [step(), step(dur=-0.001)], "event 1 ('a'): a duration must not be negative, found -1 ns"),
    (chrome.read, [step(ts=float("nan"))], "event 0 ('a'): ts must be a number of microseconds, found 'NaN'"),
    (chrome.read, [step(ts=float("inf"))], "event 0 ('a'): ts must be a number of microseconds, found 'Infinity'"),
    (chrome.read, [step(ts="7")], "ts must be a number of microseconds, found '7'"),
    (chrome.read, [step(ts=True)], "ts must be a number of microseconds"),
    (chrome.read, [step(ts=10**30)], "ts must be a number of microseconds"),
    (chrome.read, '[{"ph":"X","cat":"kernel","name":"k","ts":1e999999,"dur":1}]', "ts must be a number of micros"),
    (chrome.read, [{"ph": "X", "cat": "kernel", "name": "k", "ts": 1}], "event 0 ('k'): dur must be a number"),
    (chrome.read, [7], "event 0: an event must be an object, found '7'"),
    (chrome.read, kineto(baseTimeNanoseconds=2**62), "baseTimeNanoseconds must be an integer of ns"),
    (chrome.read, kineto(distributedInfo={"rank": -1}), "distributedInfo.rank must be a rank, found '-1'"),
    (chrome.read, kineto(distributedInfo={"rank": "x"}), "distributedInfo.rank must be a rank, found 'x'"),
    (chrome.read, [step(cat="sigma.quantum", pid="x", args={})], "pid must be a rank"),
    (chrome.read, [step(cat="sigma.quantum", pid=-1, args={})], "a rank must lie in 0.."),
    (chrome.read, [step(cat="sigma.q", pid=1, args={})], "of a quantum, counter or event, found 'q'"),
    (chrome.read, [step(cat="sigma.event", pid=1, args={"value": "1"})], "args.value must be a number, found '1'"),
    (chrome.read, '[{"ph":"X","cat":"kernel","name":"\\ud800","ts":1,"dur":1}]', "a name must be text, found half"),
    (netgauge.read, "", "no detour is in it"),
    (netgauge.read, "# Selfish Benchmark\n", "no detour is in it"),
    (netgauge.read, "0\t5\n7 5\n", "line 2: wanted start<TAB>duration"),
    (netgauge.read, "0\t5\t6\n", "line 1: wanted start<TAB>duration"),
    (netgauge.read, "0\t-5\n", "line 1: wanted start<TAB>duration, ns that are not negative, found '0\\t-5'"),
    (netgauge.read, "0\tnan\n", "line 1: wanted start<TAB>duration"),
    (netgauge.read, "10\t1\n10\t1\n", "line 2: starts must rise, found 10 ns after 10"),
    (netgauge.read, "10\t1\n9\t1\n", "line 2: starts must rise, found 9 ns after 10"),
    (netgauge.read, "999999999999999999\t1\n9999999999999999999\t1\n", "line 2: wanted start<TAB>duration"),
    (netgauge.read, "# Fixed Work Quantum Benchmark\n0   100\n", "line 1: netgauge measured fixed quanta"),
    (netgauge.read, "# rank: x\n0\t1\n", "line 1: the rank must be a number, found 'x'"),
    (netgauge.read, "# threshold_s: -1\n0\t1\n", "line 1: wanted a number that is not negative, found '-1'"),
    (netgauge.read, b"0\t5\n\x00\x01\x02\x03", "line 2: this is no text, but binary"),
    (netgauge.read, "7" * 70_000, "line 1: this is no text, but binary"),
    (rtla.read, "", "no line of the osnoise tracer"),
    (rtla.read, "hello\nworld\n", "no line of the osnoise tracer"),
    (rtla.read, TRACER.replace("1845 ns", "-1845 ns"), "line 6: wanted irq_noise: NAME:NUMBER start S.NS duration"),
    (rtla.read, TRACER.replace("512 ns", "5"), "line 13: wanted nmi_noise"),
    (rtla.read, TRACER.replace("8812 ns", "nan ns"), "line 9: wanted sample_threshold: start S.NS duration D ns"),
    (rtla.read, TRACER.replace("[008] d.h.", "8 d.h."), "line 6: wanted TASK-PID [CPU] STAMP:"),
    (rtla.read, TRACER.replace("99.98100", "98.98100"), "noise 190 us of 1000000 us is not 98.98100 % available"),
    (rtla.read, TOP.replace("304896", "305896"), "line 4: noise 305896 us of 53100000 us is not 99.42580 %"),
    (rtla.read, TOP.replace("        1590           13", ""), "line 4: wanted 10 numbers after #PERIODS, found 8"),
    (rtla.read, TOP.replace("#59         5", "#59         -"), "line 4: wanted CPU #PERIODS and 10 numbers"),
    (rtla.read, TOP.replace("           13\n", "1" * 300 + "x\n"), "line 4: wanted CPU #PERIODS and 10 numbers"),
    (rtla.read, HIST.replace("count:    55215     54829\n", ""), "its last table: a histogram wants all of over"),
    (rtla.read, HIST.replace("count:    55215     54829", "count: 0"), "line 9: wanted 2 numbers after count:"),
    (rtla.read, "# RTLA osnoise histogram\nIndex\nover: 0\ncount: 0\n", "CPUs, which had samples"),
    (rtla.read, HIST + HIST[HIST.index("Index") :], "line 13: wanted columns CPU-000 after Index"),
    (rtla.read, HIST.replace("42982", "42983"), "the buckets of CPU 0 sum to 55215, its count is 55215"),
    (rtla.read, HIST.replace("      2413", ""), "line 6: wanted 2 numbers after 10, found 12224"),
    (rtla.read, HIST.replace("12224", "nan"), "line 6: wanted 2 numbers after 10, found nan 2413"),
    (rtla.read, HIST.replace("\n20  ", "\n5   "), "line 7: buckets must rise, found 5 after 10"),
    (rtla.read, HIST.replace("(us)", "(fortnights)"), "line 2: wanted a time unit of (us) or (ns)"),
    (rtla.read, HIST.replace("CPU-011", "eleven"), "line 4: wanted columns CPU-000 after Index"),
    (rtla.read, HIST.replace("# Duration:   0 00:01:00\n", ""), "a histogram wants time unit, duration and columns"),
]  # fmt: skip


@pytest.mark.parametrize("read, content, message", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_refused_by_a_sentence_that_names_the_place(tmp_path, read, content, message):
    path = written(tmp_path / "x", content)
    found = refused(read, path)
    assert found.startswith(f"{path}: ")
    assert message in found


def test_names_are_bounded(tmp_path, monkeypatch):
    """Defends: a measurement of a million names, where addresses or numbers got into them."""
    monkeypatch.setattr("sigma_noise.formats.rows.MAX_NAMES", 3)
    path = written(tmp_path / "x", [step(name=f"n{i}") for i in range(4)])
    assert "event 3 ('n3'): this is name number 4; choose fewer" in refused(chrome.read, path)
    assert len(chrome.read(path, events=["*/n*=n"]).get(0, "quantum", "n")) == 4


def test_files_cut_or_damaged_anywhere_are_read_or_refused(tmp_path):
    """Defends: a traceback.  A prefix of JSON is refused; one of lines may be a shorter measurement."""
    rng = np.random.default_rng(11)
    chosen = chrome.read(written(tmp_path / "x", kineto()))
    perfetto.write(Trace({"seed": 1, "sizes": [1]}, chosen.ranks, chosen.rows), tmp_path / "ours.json")
    for read, text in [
        (chrome.read, json.dumps(kineto(), indent=1)),
        (chrome.read, (tmp_path / "ours.json").read_text().rstrip()),
        (rtla.read, TRACER),
        (rtla.read, TOP),
        (rtla.read, HIST),
        (netgauge.read, NETGAUGE),
    ]:
        data = text.encode()
        for _ in range(60):
            cut = data[: rng.integers(len(data))]
            flipped = bytearray(data)
            flipped[rng.integers(len(data))] = rng.integers(256)
            for broken in (cut, bytes(flipped)):
                path = written(tmp_path / "x", broken)
                if broken is cut and read is chrome.read:
                    refused(read, path)
                    continue
                with contextlib.suppress(WrongInput):
                    read(path)


def test_a_file_that_is_not_there(tmp_path):
    for read in (chrome.read, rtla.read, netgauge.read):
        assert refused(read, tmp_path / "none").endswith(
            "none: No such file or directory; import wants a file"
        )
        assert "Is a directory" in refused(read, tmp_path)
