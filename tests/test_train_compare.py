"""`sigma compare`: same tokens, several seeds, one picture; goes on where it stopped."""

import pytest
from rich.console import Console
from sigma_train import loop
from sigma_train.compare import Runs, compare, page, validation
from sigma_train.config import ConfigError
from sigma_train.metrics import read_metrics
from support import sigma


@pytest.fixture(autouse=True)
def runs_alone(monkeypatch):
    """Bounds of the machine take longer to time than a run does."""
    monkeypatch.setattr(loop, "dense_tokens_per_s", lambda config: 1.0)
    monkeypatch.setattr(loop, "product_flops_per_s", lambda dtype: 1e12)


TINY = ["train.steps=6", "train.eval_every=2", "data.max_bytes=200000", "train.keep=1"]


def test_two_presets_two_seeds_and_again(tmp_path, tmp_path_factory):
    settings = [*TINY, f"data.cache_dir={tmp_path_factory.getbasetemp() / 'cache'}"]
    console = Console(quiet=True)
    runs = compare(["smoke", "smoke-dense"], 2, settings, tmp_path / "out", console)
    assert runs is not None
    assert [run.preset for run in runs] == ["smoke", "smoke-dense"]
    assert runs[0].active < runs[0].parameters
    assert runs[1].active == runs[1].parameters
    for run in runs:
        assert len(set(run.final)) == 2, "seeds differ"
        assert [tokens for tokens, _ in validation(run.rows[0])] == [2 * 512, 4 * 512, 6 * 512]
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert f"{sum(runs[0].final) / 2:.4f}" in (tmp_path / "out" / "compare.md").read_text()
    metrics = tmp_path / "out" / "smoke-seed1" / "metrics.jsonl"
    before = list(read_metrics(metrics))
    again = compare(["smoke", "smoke-dense"], 2, settings, tmp_path / "out", console)
    assert again is not None
    assert [run.final for run in again] == [run.final for run in runs]
    assert list(read_metrics(metrics)) == before, "a finished run is kept as it is"


@pytest.mark.parametrize(
    "presets, message",
    [
        (["smoke", "tiny-96"], "same data and number of tokens"),
        (["smoke", "smoke"], "compare wants different presets, found smoke, smoke"),
        (["smoke", "smok"], "unknown preset 'smok'; did you mean 'smoke'?"),
    ],
)
def test_wrong_presets_exit_2(cache, tmp_path, presets, message):
    result = sigma("compare", *presets, "--out", str(tmp_path / "out"), env=cache)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_settings_that_changed_are_not_mixed(tmp_path, tmp_path_factory):
    settings = [*TINY, f"data.cache_dir={tmp_path_factory.getbasetemp() / 'cache'}"]
    console = Console(quiet=True)
    compare(["smoke"], 1, settings, tmp_path / "out", console)
    with pytest.raises(ConfigError, match="other settings"):
        compare(["smoke"], 1, [*settings, "optim.lr=1e-4"], tmp_path / "out", console)


def test_runs_that_left_steps_out_are_not_said_to_have_seen_the_same():
    def run(preset: str, tokens: int) -> Runs:
        rows = [{"step": 1, "tokens": tokens, "val_bits_per_byte": 1.5}, {"step": 1, "tokens_per_s": 9.0}]
        return Runs(preset, 10, 5, [rows])

    assert "Validation after the same tokens, one seed;" in page([run("a", 2048), run("b", 2048)], 1)
    told = page([run("a", 2048), run("b", 1024)], 1)
    assert "Validation after 1,024 to 2,048 tokens, as steps were left out, one seed;" in told
