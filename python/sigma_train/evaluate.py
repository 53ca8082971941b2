"""What a model makes of text that it is not trained on."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_train.config import Config
from sigma_train.dataset import TokenDataset
from sigma_train.model import LanguageModel, precision
from sigma_train.ranks import Ranks, hold_shards


@torch.no_grad()
def evaluate(model: LanguageModel, data: TokenDataset, config: Config, ranks: Ranks = Ranks()) -> float:  # noqa: B008
    """Bits per byte on the first eval_batches batches of each rank of the validation split."""
    t = config.train
    batches = data.eval_batches(t.batch_size, t.seq_len, t.eval_batches * ranks.size)
    nats, num_bytes = 0.0, 0
    while group := list(itertools.islice(batches, ranks.size)):
        # Who has none left computes another's again, as the others wait for its part of the experts.
        inputs, targets = group[min(ranks.rank, len(group) - 1)]
        of_batch = batch_nats(model, inputs, targets, config)
        if ranks.rank < len(group):
            nats += of_batch
            num_bytes += data.count_bytes(targets)
    hold_shards(model, ranks)
    nats, num_bytes = ranks.summed(nats, num_bytes)
    return nats / math.log(2) / num_bytes


@torch.no_grad()
def batch_nats(model: LanguageModel, inputs: Tensor, targets: Tensor, config: Config) -> float:
    """The sum over tokens of -ln of what the model gave the one that came."""
    with precision(config):
        logits = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
