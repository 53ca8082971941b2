"""`sigma neurons` on a small run: what it writes is what the library finds, and wrong input is one sentence."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from language_texts import write_texts
from rich.console import Console
from sigma_cli.commands import app
from sigma_neurons import measured, page
from sigma_neurons.ablation import deactivate
from sigma_neurons.identified import identify
from sigma_neurons.overlap import overlaps
from sigma_neurons.routed_experts import routed_experts
from sigma_neurons.sites import Site
from sigma_neurons.stats import ActivationStats
from sigma_train.by_language import batches_of_language
from sigma_train.config import Config
from sigma_train.errors import WrongInput
from sigma_train.folder import claimed
from sigma_train.loop import Trainer
from typer.testing import CliRunner


def settings(folder: Path) -> Config:
    return Config.from_dict(
        {
            "data": {
                "paths": [str(folder / "text")], "cache_dir": str(folder / "cache"), "val_fraction": 0.4,
                "languages": True,
            },
            "model": {
                "vocab_size": 300, "hidden_size": 16, "num_heads": 1, "num_kv_heads": 1, "head_dim": 16,
                "intermediate_size": 16, "num_experts": 4, "top_k": 2, "num_layers": 2, "max_seq_len": 32,
            },
            "optim": {"lr": 1e-2, "warmup_steps": 2},
            "train": {"seq_len": 32, "batch_size": 16, "steps": 12, "eval_batches": 1, "out": str(folder / "run")},
        }
    )  # fmt: skip


def trained(folder: Path) -> Path:
    write_texts(folder / "text")
    config = settings(folder)
    with claimed(folder / "run"):
        trainer = Trainer(config, Console(quiet=True), resume=False)
        with trainer.ledger:
            trainer.run()
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("neurons"))


def sigma(*args: str) -> str:
    """Standard output; what a command raises comes out."""
    result = CliRunner().invoke(
        app, ["neurons", *map(str, args)], catch_exceptions=False, standalone_mode=False
    )
    return result.output


def test_identify_writes_what_the_library_finds(run, tmp_path):
    out = sigma("identify", run, "--out", tmp_path, "--batches", 2, "--top-rate", 0.1)
    told = json.loads((tmp_path / "neurons.json").read_text())
    loaded = measured.load(run)
    stats = loaded.count("train", 2)
    want = identify(stats, 0.1)
    assert told["tokens"] == [2 * 16 * 32] * 3  # as many of each
    assert told["languages"] == ["aa", "bb", "cc"]
    assert told["lambda"] == want.kinds.lam
    assert told["totals"]["specific"] == int(want.kinds.specific.sum())
    assert np.array(told["layers"]["kinds"]).sum(0).tolist() == list(told["totals"].values())
    shares = np.array(told["share"]).reshape(2, 4, 3)
    assert shares.sum(1) == pytest.approx(2)  # top_k, in each layer and language
    assert "layer" in out
    by_name = {tuple(unit) for unit in told["named"]["bb"]}
    mask = want.mask(1, "specific", "related").view(2, 4, 16)
    assert by_name == {tuple(unit) for unit in mask.nonzero().tolist()}


def test_ablate_measures_and_report_shows(run, tmp_path):
    sigma("identify", run, "--out", tmp_path, "--batches", 2, "--top-rate", 0.2, "--tau", 0.3)
    sigma("ablate", run, "--out", tmp_path, "--batches", 1, "--controls", 2)
    told = json.loads((tmp_path / "ablation.json").read_text())
    loaded = measured.load(run)
    found = identify(loaded.count("train", 2), 0.2, tau=0.3)
    base = loaded.losses(1)
    assert told["sets"]["specific"]["base"] == list(base.values())
    for i in range(3):
        with deactivate(loaded.model, found.mask(i, "specific")):
            without = loaded.losses(1)
        rise = [without[name] - base[name] for name in base]
        assert told["sets"]["specific"]["rise"][i] == pytest.approx(rise, abs=1e-12)
    assert any(told["sets"]["specific"]["neurons"].values())
    sigma("report", run, "--out", tmp_path)
    report = (tmp_path / "report.html").read_text()
    assert {"kinds.png", "languages.png", "routing.png", "without-specific.png"} <= {
        p.name for p in tmp_path.iterdir()
    }
    assert "specific to one language" in report
    assert "Without specific" in report


@pytest.mark.parametrize("name", ["lambda", "tau"])
def test_lape_has_no_lambda_and_a_bar_of_its_own(tmp_path, name):
    with pytest.raises(WrongInput, match=f"neurons: {name} must be left out with score lape, .*, found 0.1"):
        sigma("identify", tmp_path / "nowhere", "--score", "lape", f"--{name}", 0.1)


def routed(*of_experts: list[int]) -> ActivationStats:
    """A dense layer and one of experts: rows of each expert by language, of 100 tokens of each."""
    rows = torch.tensor(of_experts).T
    sites = (Site("dense", 0, 1, 4, "gate"), Site("experts", 1, len(of_experts), 1, "ours"))
    fired = (torch.ones(2, 1, 4).long(), rows[:, :, None])
    return ActivationStats(
        ("a", "b"), sites, torch.tensor([100, 100]), (torch.tensor([[100], [100]]), rows), fired
    )


def test_experts_have_a_score_a_lambda_and_kinds_of_their_own():
    """Two of twenty, by hand.  Defends: the neurons' lambda, a dense layer as an expert of all languages."""
    stats = routed([30, 1], [2, 25], [20, 20], *[[3, 3]] * 17)
    found = identify(stats, 0.1, lam=9.0, tau=0.5).figures()["experts"]
    lam = 0.2 * math.log(2) / 0.75  # no expert is general: the end of the authors' range
    assert found["lambda"] == pytest.approx(lam)
    assert found["tau"] == 0.2  # the 38th of 40 shares
    assert found["places"] == [[1, e] for e in range(20)]
    assert found["named"] == {"a": [[1, 0]], "b": [[1, 1]]}
    assert found["totals"] == {"specific": 2, "related": 0, "general": 0}
    assert found["of_language"]["b"] == {"specific": 1, "related": 0, "general": 0}
    h = -(30 / 31) * math.log(30 / 31) - (1 / 31) * math.log(1 / 31)
    assert found["score"][0] == pytest.approx(h - lam * 0.3, abs=1e-12)
    assert found["score"][2] == pytest.approx(math.log(2) - lam * 0.2, abs=1e-12)


def test_of_experts_one_at_least_is_selected_and_a_general_one_leaves_lambda_at_zero():
    found = routed_experts(routed([50, 30], [40, 30], *[[1, 1]] * 38), 0.001, "finer")
    assert (found.top_rate, found.kinds.lam) == (1 / 40, 0)
    assert found.kinds.selected.nonzero().tolist() == [[0]]
    assert found.kinds.general.nonzero().tolist() == [[0], [1]]
    assert routed_experts(routed([7, 7]), 0.5, "finer") is None


def test_experts_are_shown(run, tmp_path):
    out = sigma("identify", run, "--out", tmp_path, "--batches", 2, "--top-rate", 0.1)
    told = json.loads((tmp_path / "neurons.json").read_text())["experts"]
    assert "experts" in out
    assert "the lowest 12.50% of 8 by H - " in " ".join(out.split())
    sigma("report", run, "--out", tmp_path)
    report = (tmp_path / "report.html").read_text()
    for name, own in told["of_language"].items():
        named = ", ".join(f"{expert} of layer {site}" for site, expert in told["named"][name])
        cells = [name, own["specific"], own["related"], own["general"], named]
        assert f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" in report


def test_a_checkpoint_that_was_not_counted_is_refused(run, tmp_path):
    with pytest.raises(WrongInput, match=r"neurons.json is missing; `sigma neurons identify` writes it"):
        sigma("ablate", run, "--out", tmp_path)
    sigma("identify", run, "--out", tmp_path, "--batches", 1)
    file = tmp_path / "neurons.json"
    told = page.read(file, "identify")
    page.write(file, told | {"counts_sha256": "0"})
    with pytest.raises(
        WrongInput, match=r"counts.safetensors is not what .* was made of; run identify again"
    ):
        sigma("ablate", run, "--out", tmp_path)
    page.write(file, told | {"text": ["0", "1"]})
    with pytest.raises(WrongInput, match="is of another text, of other languages or cut otherwise"):
        sigma("ablate", run, "--out", tmp_path)
    page.write(file, told | {"checkpoint": "other", "checkpoint_sha256": "0"})
    with pytest.raises(WrongInput, match="is of other; run identify on"):
        sigma("ablate", run, "--out", tmp_path)
    page.write(tmp_path / "ablation.json", {"neurons_sha256": "1"})
    with pytest.raises(WrongInput, match=r"is of other neurons than neurons.json; run .sigma neurons ablate"):
        page.write_page(tmp_path)
    file.write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(WrongInput, match="must be of schema_version 3"):
        page.write_page(tmp_path)


@pytest.mark.parametrize("changed", [{"languages": ["xx"]}, {"named": None}, {"sha256": "0"}])
def test_a_file_that_was_edited_is_told(tmp_path, changed):
    """Defends: a KeyError for a key that is gone, figures that nobody measured."""
    file = tmp_path / "neurons.json"
    page.write(file, {"languages": ["de", "en"], "named": {}})
    assert page.read(file, "identify")["languages"] == ["de", "en"]
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(WrongInput, match="is damaged or was edited; run `sigma neurons identify` again"):
        sigma("overlap", tmp_path, tmp_path)


def test_overlap_compares_two_results(run, tmp_path):
    """Defends: neurons of equal unit in other experts taken for the same, results of other models compared."""
    folders = [tmp_path / name for name in ("few", "many")]
    for folder, rate in zip(folders, (0.1, 0.2), strict=True):
        sigma(
            "identify", run, "--out", folder, "--batches", 1, "--top-rate", rate, "--lambda", 0, "--tau", 0.3
        )
    few, many = (json.loads((folder / "neurons.json").read_text()) for folder in folders)
    found = overlaps(few, many)
    assert [(o.first, o.both) for o in found.values()] == [(len(few["named"][n]),) * 2 for n in found]
    assert sum(o.second for o in found.values()) > sum(o.first for o in found.values()) > 0
    assert "100.0%" in sigma("overlap", *folders)
    moved = {name: [[site, (e + 1) % 4, unit] for site, e, unit in own] for name, own in few["named"].items()}
    assert sum(o.both for o in overlaps(few, few | {"named": moved}).values()) < sum(
        o.both for o in overlaps(few, few).values()
    )
    with pytest.raises(WrongInput, match="both results must be of the same sites, found others"):
        overlaps(few, many | {"sites": []})


def test_a_number_that_is_none_is_refused_before_any_work(tmp_path):
    with pytest.raises(WrongInput, match=r"^--lambda must be a number, found inf"):
        sigma("identify", tmp_path / "nowhere", "--lambda", "inf")


def test_a_checkpoint_is_named_from_inside_too(run, monkeypatch):
    monkeypatch.chdir(run / "checkpoints" / "step-00000012")
    assert measured.load(Path(".")).step == 12


def test_a_run_without_languages_or_its_text_is_refused(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    toml = (other / "config.toml").read_text()
    (other / "config.toml").write_text(toml.replace("languages = true", "languages = false"))
    with pytest.raises(WrongInput, match=r"wants a run with data.languages = true, .* has false"):
        sigma("identify", other)
    text = run.parent / "text" / "aa.txt"
    before = text.read_text()
    text.write_text(before + "abc\n" * 9)
    try:
        with pytest.raises(WrongInput, match=r"is not what .* was trained on"):
            sigma("identify", run, "--out", tmp_path)
    finally:
        text.write_text(before)
    assert not (tmp_path / "neurons.json").exists()


def test_languages_of_unequal_text_are_counted_equally(run):
    """Defends: the quantile of the language with the most text."""
    loaded = measured.load(run)
    windows = dict.fromkeys(loaded.languages, 0)
    for name, tokens in loaded.batches("val", 10**6):
        windows[name] += len(tokens)
    assert len({*windows.values()}) == 1
    most = [len(list(batches_of_language(loaded.data.val, name, 1, 32))) for name in loaded.languages]
    assert set(windows.values()) == {min(most)}


def test_conditional_probabilities_want_tokens_of_each_language(run):
    stats = measured.load(run).count("train", 2)
    assert identify(stats, 0.1, "conditional").p.shape == (128, 3)
    for routed in stats.routed:
        routed[0] = 0
    with pytest.raises(WrongInput, match="no expert has 100 tokens of each language"):
        identify(stats, 0.1, "conditional")
    assert torch.equal(identify(stats, 0.1).p, stats.joint())
    with pytest.raises(WrongInput, match=r"a share of 0.001 of 128 neurons selects none"):
        identify(stats, 0.001)
