"""The trainer: it survives a kill, names what is wrong, and its model is the one that transformers has."""

import json
import math
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import rank_faults
import torch
import typer
from sigma_cli.commands import app
from sigma_train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from sigma_train.config import load_config, preset_names
from sigma_train.metrics import read_metrics
from sigma_train.model import LanguageModel
from support import sigma


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row}


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_killed_run_resumes_bit_for_bit(cache, tmp_path, dtype):
    """Defends: state missing from the checkpoint; weights rounded in it; a step that stands twice in the metrics."""
    args = ["train", "--preset", "smoke", "--steps", "10", "--set", "train.save_every=3", "--dtype", dtype]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = sigma(*args, "--out", str(whole), env=cache, fault=rank_faults.nothing)
    assert result.returncode == 0, result.stderr
    killed = sigma(*args, "--out", str(cut), env=cache, fault=rank_faults.killed_in_step_8)
    assert killed.returncode == -signal.SIGKILL
    assert max(losses(cut)) == 7
    again = sigma(*args, "--out", str(cut), "--resume", env=cache, fault=rank_faults.nothing)
    assert again.returncode == 0, again.stderr
    assert "resumed" in again.stdout
    assert losses(cut) == losses(whole)
    steps = [row["step"] for row in read_metrics(cut / "metrics.jsonl") if "loss" in row]
    assert steps == [*range(1, 11)]
    ends = [run / "checkpoints" / "step-00000010" / "__0_0.distcp" for run in (cut, whole)]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_sigterm_saves_and_exits_0(cache, tmp_path):
    args = ["train", "--preset", "smoke", "--steps", "5000", "--out", str(tmp_path / "run")]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with forked.Running(args, cache, fault=rank_faults.no_sample) as process:
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    latest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert load_checkpoint(latest).step == max(losses(tmp_path / "run"))


def test_a_run_without_a_report_draws_one_when_it_is_asked_for(cache, tmp_path):
    args = ["train", "--preset", "smoke", "--steps", "2", "--out", str(tmp_path / "run"), "--resume"]
    result = sigma(*args, "--no-report", env=cache, fault=rank_faults.no_bounds)
    assert result.returncode == 0, result.stderr
    assert "went into useful steps" in result.stdout
    assert "sample" not in result.stdout
    assert not list((tmp_path / "run").glob("*.[hp][tn][mg]*"))
    assert sigma(*args, env=cache, fault=rank_faults.no_bounds).returncode == 0
    for name in ("report.html", "loss.png", "throughput.png", "expert-load.png"):
        assert (tmp_path / "run" / name).stat().st_size > 5000
    text = sigma("generate", str(tmp_path / "run"), "--max-tokens", "5", env=cache)
    assert text.stdout.startswith("def ")


def test_a_run_reports_loads_and_samples(cache, tmp_path):
    result = sigma(
        "train", "--preset", "smoke", "--steps", "6", "--set", "train.sample_every=3",
        "--out", str(tmp_path / "run"), env=cache, fault=rank_faults.nothing,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert [row["step"] for row in rows if "sample" in row] == [3, 6]
    assert all(sum(layer) == 8 * 64 for row in rows if "load" in row for layer in row["load"])


def test_help_names_every_preset():
    (preset,) = (p for p in typer.main.get_command(app).commands["train"].params if p.name == "preset")
    assert sorted(preset.help.split(": ")[1].split(", ")) == preset_names()


def test_help_imports_no_torch():
    code = "import sys, sigma_cli, sigma_cli.commands; assert 'torch' not in sys.modules; sigma_cli.main()"
    result = subprocess.run(
        [sys.executable, "-P", "-c", code, "--help"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "train" in result.stdout
    assert "doctor" in result.stdout


def tensors() -> dict[str, torch.Tensor]:
    weight = torch.randn(3, 4)
    return {"a": weight, "b": torch.arange(5.0), "tied": weight}


def test_checkpoint_round_trip_and_keep(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, tensors(), {"m": torch.ones(2)}, {"tokens_seen": step}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    checkpoint = load_checkpoint(latest_checkpoint(tmp_path))
    assert (checkpoint.step, checkpoint.extra) == (3, {"tokens_seen": 3})
    assert set(checkpoint.model_state) == {"a", "b"}
    assert checkpoint.optim_state["m"].tolist() == [1, 1]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, name, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, tensors(), {}, {}, keep=2)
    victim = tmp_path / "step-00000002" / name
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        victim.unlink()
    else:
        victim.write_bytes(content if damage == "flip" else content[:-7])
    with pytest.warns(UserWarning, match="step-00000002 is damaged.*using the one before"):
        assert latest_checkpoint(tmp_path).name == "step-00000001"


@pytest.mark.parametrize(
    "moments, extra, limit",
    [(5, {}, 100), (50_000, {}, 100_000), (5, {"long": "x" * 20000}, 15000)],
    ids=["part", "within a tensor", "record"],
)
def test_a_full_disk_leaves_the_former_checkpoint(tmp_path, moments, extra, limit):
    """A limit on the size of files stands for the disk, on which the tensors do not fit, or the record not any more."""
    save_checkpoint(tmp_path, 1, tensors(), {}, {}, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"^cannot write .*step-00000002: File too large$"):
            save_checkpoint(tmp_path, 2, tensors(), {"m": torch.ones(moments)}, extra, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_no_sound_checkpoint_is_no_fresh_start(cache, tmp_path):
    """Defends: a run that begins anew over the damaged remains of another."""
    run = tmp_path / "run"
    args = ["train", "--preset", "smoke", "--steps", "2", "--out", str(run)]
    assert sigma(*args, env=cache, fault=rank_faults.nothing).returncode == 0
    (checkpoint,) = (run / "checkpoints").iterdir()
    (checkpoint / "__0_0.distcp").write_bytes(b"damaged")
    for more in [], ["--resume"]:
        result = sigma(*args, *more, env=cache)
        assert result.returncode == 2
        assert "step-00000002 is damaged" in result.stderr
        assert result.stderr.strip().endswith("a new run needs another folder")


def test_changed_text_is_not_resumed(cache, tmp_path):
    """Defends: a run that goes on with other tokens under the old step number."""
    text, run = tmp_path / "text.py", tmp_path / "run"
    text.write_text("\n\n".join(f"def f{i}(x):\n    return x * {i}" for i in range(4000)))
    data = ["--data", str(text), "--set", "data.val_fraction=0.2"]
    args = ["train", "--preset", "smoke", "--steps", "2", *data, "--out", str(run)]
    first = sigma(*args, env=cache, fault=rank_faults.nothing)
    assert first.returncode == 0, first.stderr
    before = (run / "tokenizer.json").read_bytes()
    text.write_text(text.read_text().replace("return x", "yield x"))
    again = sigma(*args, "--resume", env=cache)
    assert again.returncode == 2, again.stderr
    assert "the text of data.paths is not what" in again.stderr
    assert (run / "tokenizer.json").read_bytes() == before


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_loss_that_is_no_number_stops_the_run(cache, tmp_path, dtype):
    """Defends: checkpoints full of NaN in the place of sound ones."""
    run = tmp_path / "run"
    result = sigma(
        "train", "--preset", "smoke", "--steps", "40", "--set", "optim.lr=1e30", "--set", "optim.warmup_steps=1",
        "--set", "train.save_every=1", "--dtype", dtype, "--out", str(run), env=cache, fault=rank_faults.nothing,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.startswith("error: step ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert all(math.isfinite(loss) for loss in losses(run).values())


def test_logits_equal_transformers():
    """Defends: rotary convention, norm placement, head grouping, order of gate and up, routing weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = load_config("smoke", None, [])
    c = config.model
    ours = LanguageModel(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1))
    theirs = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            moe_intermediate_size=c.intermediate_size,
            num_experts=c.num_experts,
            num_experts_per_tok=1,
            norm_topk_prob=False,
            rms_norm_eps=c.norm_eps,
            rope_theta=c.rope_theta,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
    ).eval()
    state = {}
    for name, tensor in ours.state_dict().items():
        name = name.replace("mlp.router.weight", "mlp.gate.weight")
        state[name if name.startswith("lm_head") else f"model.{name}"] = tensor
    theirs.load_state_dict(state)
    tokens = torch.randint(0, c.vocab_size, (2, 33))
    with torch.no_grad():
        want = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens), want, rtol=1e-4, atol=1e-4)


def test_metrics_drop_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1]
