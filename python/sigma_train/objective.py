"""What a step minimises: cross entropy over all tokens, over those that [objective] selects, or beside a distance.

A token's score decides: a random number, the student's own loss, or by how much it is above a teacher's.  The share
that is kept is of one micro-step, of all ranks' sequences together, and so is the mean: a run is the same on any number
of ranks.  Micro-steps are averaged as they are without a selection.

Kind uld is what selection is compared with, and leaves no token out (arXiv 2402.12030):

    L = mean over all tokens of (l_s + uld_weight * sum_i |sort(p)_i - sort(q)_i|),  q the teacher's at the partner
"""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_train.alignment import UNMAPPED
from sigma_train.config import Config
from sigma_train.dataset import PreparedData
from sigma_train.laid_over import Aligned
from sigma_train.ranks import Ranks
from sigma_train.selection import Selection, weighted_mean
from sigma_train.teacher_file import must_be_of, must_have_top, read_losses, text_of
from sigma_train.teacher_loss import gap
from sigma_train.uld import uld_to_highest


class Objective:
    """digest: of the teacher's file, None without.

    targets [tokens of the split]: the teacher's loss for each of our tokens; partners: with kind uld, the teacher's
    token that it goes with.
    """

    def __init__(self, config: Config, data: PreparedData, ranks: Ranks) -> None:
        """Raises: WrongInput if the teacher's file is no sound one, or of another text."""
        self.config, self.data, self.ranks = config, data, ranks
        o = config.objective
        self.selection = Selection(o.keep_rate, o.unmapped, o.scope)
        self.digest: str | None = None
        self.targets: Tensor | None = None
        self.partners: Tensor | None = None
        if o.teacher is not None:
            path, stats = Path(o.teacher), data.stats
            losses = read_losses(path, "objective.teacher")
            wanted = text_of(stats["corpus_digest"], config.data, stats["train_bytes"])
            must_be_of(losses, wanted, path)
            aligned = Aligned(o.alignment, o.chunks, data.tokenizer.pieces)
            self.digest = losses.digest
            if o.kind == "uld":
                self.top, self.partners = must_have_top(losses, path), losses.partners(data.train, aligned)
            else:
                self.targets = losses.targets(data.train, o.aggregate, aligned)
        self.begin()

    def begin(self) -> None:
        """A step."""
        self._of_all, self._kept, self._uld = 0.0, 0.0, 0.0

    def loss(self, logits: Tensor, targets: Tensor, batch: int) -> Tensor:
        """Of this rank's part of the batch, such that the mean over ranks is the batch's; a collective if it selects.

        Args: logits [B, S, vocabulary], targets [B, S], batch: its number, as `TokenDataset.batch` has it.
        """
        if self.config.objective.kind == "plain":
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        if self.config.objective.kind == "uld":
            return self._beside_uld(logits, targets, batch)
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

        loss_of_all: the mean over all tokens, kept or not; kept: the share that is; uld: the mean distance.
        """
        if self.config.objective.kind == "plain":
            return {}
        if self.config.objective.kind == "uld":
            return {"loss_of_all": self._of_all, "uld": self._uld}
        return {"loss_of_all": self._of_all, "kept": self._kept}

    def _beside_uld(self, logits: Tensor, targets: Tensor, batch: int) -> Tensor:
        assert self.partners is not None
        partner = self.partners[self._places(batch)].flatten()
        has_one = partner != UNMAPPED
        expected = logits.flatten(0, 1)[has_one].float().softmax(-1)
        distance = uld_to_highest(expected, self.top[partner[has_one]].float()).sum() / targets.numel()
        of_all = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self._of_all += of_all.item()
        self._uld += distance.item()
        return of_all + self.config.objective.uld_weight * distance

    def _scores(self, losses: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """[B, S] both: the score, and where there is one."""
        kind, everywhere = self.config.objective.kind, torch.ones_like(losses, dtype=torch.bool)
        if kind == "student":
            return losses, everywhere
        if kind == "random":
            return self._drawn(losses.shape, batch), everywhere
        assert self.targets is not None
        return gap(losses, self.targets[self._places(batch)])

    def _places(self, batch: int) -> Tensor:
        """[B, S]: of this rank's targets in the split."""
        t = self.config.train
        return self.data.train.target_places(
            batch, t.batch_size, t.seq_len, t.seed, self.ranks.rank, self.ranks.size
        )

    def _drawn(self, shape: torch.Size, batch: int) -> Tensor:
        """Of the seed, the batch and a token's place in it alone; a state of torch's own is left as it was."""
        key = f"{self.config.train.seed}/objective/{batch}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(self.ranks.size, *shape, generator=generator)[self.ranks.rank]
