"""What counting neurons costs an evaluation of the same batch: one language, or one drawn for each token."""

from collections.abc import Callable

import pytest
import torch
from sigma_neurons.counting import ActivationCounter
from sigma_train.config import load_config
from sigma_train.model import LanguageModel

LANGUAGES = [f"language-{k}" for k in range(4)]


@pytest.mark.parametrize("preset", ["tiny-96", "tiny-dense"])
@pytest.mark.parametrize("text", ["one", "mixed"])
def test_counting_of_neurons(race, device, pytestconfig, preset, text):
    if device.type != "cpu":
        pytest.skip("the trainer runs on a CPU")
    if pytestconfig.getoption("--tiny"):
        preset = "smoke"
    config = load_config(preset, None, [])
    m, t = config.model, config.train
    model = LanguageModel(config).eval()
    tokens = torch.randint(m.vocab_size, (t.batch_size, t.seq_len))
    language = LANGUAGES[0] if text == "one" else torch.randint(len(LANGUAGES), tokens.shape)

    @torch.no_grad()
    def plain() -> torch.Tensor:
        return model(tokens)

    @torch.no_grad()
    def counted() -> torch.Tensor:
        with ActivationCounter(model, LANGUAGES) as counter, counter.batch(language, tokens):
            return model(tokens)

    race(
        f"counting_of_neurons/{text}",
        counted,
        shape=f"{preset}, {t.batch_size} x {t.seq_len} tokens",
        check=equals(plain()),
        bound_without=plain,
    )


def equals(want: torch.Tensor) -> Callable[[str, torch.Tensor], None]:
    def check(who: str, logits: torch.Tensor) -> None:
        assert torch.equal(logits, want), who

    return check
