"""A teacher from a folder of transformers: its own pieces of a text, and folders that hold no causal model."""

import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from sigma_train.config import load_config
from sigma_train.dataset import prepare
from sigma_train.errors import WrongInput
from sigma_train.teacher import open_teacher
from sigma_train.teacher_cache import cache_losses
from sigma_train.teacher_file import read_losses
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertLMHeadModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

TEXT = "für alle Fälle 東京 e\u0301 🙂🙂\n\ndef f(x):\n    return x * 2\n"
TINY = ["model.hidden_size=16", "model.head_dim=8", "model.num_experts=4", "model.intermediate_size=8"]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A folder as others make them: SentencePiece-like, with what stands around a text."""
    folder, special = tmp_path_factory.mktemp("foreign") / "hf", "<s>"
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", special], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special} $A {special}", special_tokens=[(special, tokenizer.token_to_id(special))]
    )
    tokenizer.enable_truncation(8)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special, unk_token="<unk>").save_pretrained(
        folder
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3Config(
        **sizes,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=32,
    )
    torch.manual_seed(1)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_model_of_transformers_with_its_own_pieces(foreign, tmp_path):
    """Defends: special tokens around a text, a text that is cut, spaces that belong to nothing."""
    teacher = open_teacher(foreign)
    text = f"  für <s> e\u0301 {TEXT}"
    ((ids, spans),) = teacher.encode([text])
    assert len(ids) == len(spans) > 20
    assert (spans[0, 0], spans[-1, 1]) == (0, len(text.encode()))
    assert (spans[1:, 0] <= spans[:-1, 1]).all()
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(9):
        (corpus / f"{i}.txt").write_text(f"{i} {TEXT}{text}" * (1 + i % 3))
    own = [*TINY, "model.vocab_size=300", "train.seq_len=16", "data.val_fraction=0.2"]
    paths = {"data": {"paths": [str(corpus)], "cache_dir": str(tmp_path / "cache")}}
    config, out = load_config("smoke", None, own, paths), tmp_path / "losses"
    cache_losses(teacher, config.data, out, None, None, 256, "f32", Console(quiet=True))
    found, data = read_losses(out, "test"), prepare(config)
    assert not found.loss.isnan().any()
    assert found.record["reading"] == {"context": 32, "overlap": 8, "dtype": "f32", "top": 0}
    targets = found.targets(data.train, "max")
    assert torch.equal(targets.isnan(), torch.from_numpy(data.train.tokens == data.tokenizer.eos_id))


def without_a_weight(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})


def encoder(folder):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    BertLMHeadModel(BertConfig(vocab_size=150, **sizes)).save_pretrained(folder)


@pytest.mark.parametrize(("damage", "words"), [
    (lambda folder: (folder / "config.json").write_text('{"model_type": "none"}'), "transformers cannot load"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "transformers cannot load"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"half"), "transformers cannot load"),
    (without_a_weight, "must have all weights of its model, it lacks model.layers.0.mlp.down_proj.weight"),
    (encoder, "must be causal, it sees the token that it predicts"),
])  # fmt: skip
def test_a_folder_that_is_no_causal_model_is_refused(foreign, tmp_path, damage, words):
    """Defends: weights that transformers draws at random, and a model that is told the answer: both only warn."""
    folder = tmp_path / "hf"
    shutil.copytree(foreign, folder)
    damage(folder)
    with pytest.raises(WrongInput, match=f"--teacher: .*{words}") as refused:
        open_teacher(folder)
    assert "\n" not in str(refused.value)
