"""An exported run is what transformers reads: same logits, same tokens."""

import pytest
import torch
from sigma_train.checkpoint import save_checkpoint
from sigma_train.config import ConfigError, load_config
from sigma_train.errors import WrongInput
from sigma_train.export import export_to_transformers
from sigma_train.files import atomic_folder
from sigma_train.model import LanguageModel
from sigma_train.tokenizer import train_tokenizer


def make_run(folder, *settings):
    config = load_config("smoke", None, ["model.vocab_size=300", *settings])
    model = LanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1))
    folder.mkdir()
    (folder / "config.toml").write_text(config.to_toml())
    train_tokenizer(["some text to learn from, and some more of it " * 50], 300).save(
        folder / "tokenizer.json"
    )
    save_checkpoint(folder / "checkpoints", 1, model.state_dict(), {}, {}, keep=1)
    return model


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["model.num_experts=1"],
        ["model.num_experts=1", "model.top_k=2", "model.tie_embeddings=false"],
        ["model.top_k=2", "router.normalize=true", "router.output_scale=3.0"],
    ],
    ids=str,
)
def test_logits_and_tokens_survive(tmp_path, settings):
    """Defends: names, order of gate and up, the folded scale, the rope base, tied embeddings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = make_run(tmp_path / "run", "model.rope_theta=500.0", *settings)
    export_to_transformers(tmp_path / "run", tmp_path / "out")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.randint(0, 300, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-3, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "some naïve text"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    "setting, message",
    [
        ("router.score=sigmoid", "export: Qwen3-MoE routes by softmax only; router.score is 'sigmoid'"),
        ("model.top_k=[1,2]", "export: Qwen3 has one top_k for all layers, found [1, 2]"),
        ("router.balance=bias", "export: Qwen3-MoE has no selection bias; router.balance is 'bias'"),
    ],
)
def test_what_qwen3_cannot_express_is_named(tmp_path, setting, message):
    make_run(tmp_path / "run", setting)
    with pytest.raises(ConfigError) as error:
        export_to_transformers(tmp_path / "run", tmp_path / "out")
    assert str(error.value) == message
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for out in (tmp_path, tmp_path / "link"):
        with pytest.raises(WrongInput, match=f"^export: {out} exists; name a new folder$"):
            export_to_transformers(tmp_path, out)


def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path):
    """Defends: a rename over the work of another, or a temporary folder in its name."""
    out = tmp_path / "out"

    def write() -> None:
        with atomic_folder(out, "--out") as temporary:
            (temporary / "mine").touch()
            out.mkdir()
            (out / "another's").touch()

    with pytest.raises(OSError, match=f"^cannot write {out}: Directory not empty$"):
        write()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "another's"]
