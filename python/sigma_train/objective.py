"""What a step minimises: cross entropy over all tokens, or over those that [objective] selects.

A token's score decides: a random number, the student's own loss, or by how much it is above a teacher's.  The share
that is kept is of one micro-step, of all ranks' sequences together, and so is the mean: a run is the same on any number
of ranks.  Micro-steps are averaged as they are without a selection.
"""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_train.config import Config
from sigma_train.dataset import PreparedData
from sigma_train.ranks import Ranks
from sigma_train.selection import Selection, weighted_mean
from sigma_train.teacher_file import must_be_of, read_losses, text_of
from sigma_train.teacher_loss import gap


class Objective:
    """digest: of the teacher's losses, None without; `targets` [tokens of the split] are they, for our tokens."""

    def __init__(self, config: Config, data: PreparedData, ranks: Ranks) -> None:
        """Raises: WrongInput if the teacher's file is no sound one, or of another text."""
        self.config, self.data, self.ranks = config, data, ranks
        o = config.objective
        self.selection = Selection(o.keep_rate, o.unmapped, o.scope)
        self.digest: str | None = None
        self.targets: Tensor | None = None
        if o.teacher is not None:
            path, stats = Path(o.teacher), data.stats
            losses = read_losses(path, "objective.teacher")
            wanted = text_of(stats["corpus_digest"], config.data, stats["train_bytes"])
            must_be_of(losses, wanted, path)
            self.digest, self.targets = losses.digest, losses.targets(data.train, o.aggregate)
        self.begin()

    def begin(self) -> None:
        """A step."""
        self._of_all, self._kept = 0.0, 0.0

    def loss(self, logits: Tensor, targets: Tensor, batch: int) -> Tensor:
        """Of this rank's part of the batch, such that the mean over ranks is the batch's; a collective if it selects.

        Args: logits [B, S, vocabulary], targets [B, S], batch: its number, as `TokenDataset.batch` has it.
        """
        if self.config.objective.kind == "plain":
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(
            targets.shape
        )
        weights, total = self.weights(losses.detach(), batch)
        self._of_all += losses.mean().item()
        self._kept += weights.mean().item()
        return weighted_mean(losses, weights, total)

    def weights(self, losses: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """[B, S] of this rank's tokens by their losses, and the mean over ranks of their sum; a collective."""
        score, has_score = self._scores(losses, batch)
        own = torch.stack([score, has_score.float()], dim=1)  # [B, 2, S]
        score, has_score = self.ranks.rows(own).unbind(1)
        weights = self.selection.weights(score, has_score.bool())
        return weights.view(self.ranks.size, *losses.shape)[self.ranks.rank], weights.sum() / self.ranks.size

    def figures(self) -> dict[str, float]:
        """Sums over this rank's micro-steps since `begin`; nothing where all tokens count.

        loss_of_all: the mean over all tokens, kept or not; kept: the share that is.
        """
        if self.config.objective.kind == "plain":
            return {}
        return {"loss_of_all": self._of_all, "kept": self._kept}

    def _scores(self, losses: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """[B, S] both: the score, and where there is one."""
        kind, everywhere = self.config.objective.kind, torch.ones_like(losses, dtype=torch.bool)
        if kind == "student":
            return losses, everywhere
        if kind == "random":
            return self._drawn(losses.shape, batch), everywhere
        t = self.config.train
        places = self.data.train.target_places(
            batch, t.batch_size, t.seq_len, t.seed, self.ranks.rank, self.ranks.size
        )
        assert self.targets is not None
        return gap(losses, self.targets[places])

    def _drawn(self, shape: torch.Size, batch: int) -> Tensor:
        """Of the seed, the batch and a token's place in it alone; a state of torch's own is left as it was."""
        key = f"{self.config.train.seed}/objective/{batch}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(self.ranks.size, *shape, generator=generator)[self.ranks.rank]
