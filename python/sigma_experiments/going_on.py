"""A trained model trained further in this process, on text that `train.init_from` refuses: other than its run's.

The tokens are of the run's own vocabulary, the steps those of `sigma train`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sigma_neurons.measured import Run
from sigma_train.config import Config
from sigma_train.dataset import TokenDataset
from sigma_train.layer_statistics import LayerStatistics
from sigma_train.objective import Objective
from sigma_train.optim import learning_rate, make_optimizer, set_learning_rate
from sigma_train.ranks import Ranks
from sigma_train.step import Step
from sigma_train.step_noise import NoRecord


def go_on(run: Run, settings: Mapping[str, dict[str, Any]], text: TokenDataset | None = None) -> None:
    """Train the model of `run` for `train.steps` of `settings`, on `text` or on its own; the optimizer begins anew."""
    before = run.config.model_dump()
    config = Config.from_dict(before | {name: before[name] | own for name, own in settings.items()})
    data = run.data if text is None else dataclasses.replace(run.data, train=text)
    model, ranks = run.model.train(), Ranks()
    looks, objective = LayerStatistics(model, config, data), Objective(config, data, ranks)
    step = Step(config, model, data, None, ranks, looks, NoRecord(), objective)
    optimizer = make_optimizer(model, config.optim)
    for number in range(config.train.steps):
        set_learning_rate(optimizer, learning_rate(number, config))
        _, _, counts = step.gradients(number)
        step.learn(optimizer, counts)
    model.eval()
