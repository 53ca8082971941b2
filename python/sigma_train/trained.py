"""A checkpoint of a run as what reads it wants it: its settings, its model, and the text that it was trained on."""

from dataclasses import dataclass
from pathlib import Path

from sigma_train.checkpoint import named_checkpoint, read_record, run_of
from sigma_train.config import Config
from sigma_train.dataset import PreparedData, prepare
from sigma_train.errors import WrongInput
from sigma_train.generate import load_model
from sigma_train.model import LanguageModel


@dataclass(frozen=True)
class Trained:
    """corpus_digest: of the text, as the checkpoint has it."""

    checkpoint: Path
    step: int
    config: Config
    model: LanguageModel
    corpus_digest: str | None

    def text(self) -> PreparedData:
        """Raises: WrongInput if it is not there as it was."""
        data = prepare(self.config)
        if self.corpus_digest != data.stats["corpus_digest"]:
            raise WrongInput(
                f"the text of data.paths is not what {self.checkpoint} was trained on; have it there again"
            )
        return data


def load_trained(place: Path) -> Trained:
    """The newest model of a run, or one checkpoint of it.  Raises: CheckpointError if there is none."""
    checkpoint = named_checkpoint(place)
    record = read_record(checkpoint)
    config, model, _ = load_model(run_of(checkpoint), checkpoint)
    return Trained(checkpoint, record["step"], config, model, record["extra"].get("corpus_digest"))
