"""How many experts a token goes to in each layer, `[sparsity]`: by a schedule over the run, or drawn."""

from collections.abc import Mapping
from typing import Any

from sigma_kernels.nn import ExpertCountSampler, SparsitySchedule
from sigma_train.config import Config, ConfigError

MOST_STEPS = 10_000  # that a mean is of


class ExpertCounts:
    """By step, from 0, and micro-batch; the same on every rank and after a restart.

    Raises: ConfigError for phases that do not follow one another, or numbers to draw from that do not rise.
    """

    def __init__(self, config: Config) -> None:
        s, t = config.sparsity, config.train
        self._of_model = config.model.layer_top_k
        self._schedule = self._sampler = None
        try:
            if s.phases:
                self._schedule = SparsitySchedule(s.phases, t.steps)
            if s.sample:
                self._sampler = ExpertCountSampler(
                    s.sample, s.granularity, s.distribution, s.temperature, t.seed, s.budget
                )
                self.of_batch(0, 0)  # a budget that is too small is an error now
        except ValueError as error:
            text = str(error).replace("SparsitySchedule: ", "sparsity.")
            text = text.replace("ExpertCountSampler: top_k", "sparsity.sample")
            raise ConfigError(text.replace("ExpertCountSampler: ", "sparsity.")) from None

    def of_step(self, step: int) -> tuple[int, ...]:
        """What the run is at: `model.top_k` where nothing is scheduled, and in validation where it is drawn."""
        return self._of_model if self._schedule is None else self._schedule.top_k(step)

    def of_batch(self, step: int, micro: int) -> tuple[int, ...]:
        if self._sampler is None:
            return self.of_step(step)
        return self._sampler.sample(step, micro, len(self._of_model))

    def mean(self, begin: int, end: int) -> tuple[float, ...]:
        """Of each layer over steps begin..end - 1, of what is drawn by its law; of a long run by a step in so many.

        What a budget makes of the law is the mean over steps too.
        """
        if self._sampler is not None and self._sampler.budget is None:
            law = zip(self._sampler.top_k, self._sampler.probabilities, strict=True)
            return (sum(k * p for k, p in law),) * len(self._of_model)
        if (self._schedule is None and self._sampler is None) or begin >= end:
            return self.of_step(begin)
        steps = [self.of_batch(step, 0) for step in range(begin, end, 1 + (end - begin) // MOST_STEPS)]
        return tuple(sum(layer) / len(steps) for layer in zip(*steps, strict=True))

    def seen(self, steps: int) -> tuple[frozenset[int], ...]:
        """The k that each layer has had, or could have been drawn, in so many steps."""
        if self._sampler is not None:
            budget, ks, others = self._sampler.budget, self._sampler.top_k, len(self._of_model) - 1
            within = [k for k in ks if budget is None or k + others * ks[0] <= budget]
            return (frozenset(within),) * len(self._of_model)
        if self._schedule is None:
            return tuple(frozenset([k]) for k in self._of_model)
        had = {self._schedule.top_k(step) for step in range(steps)} or {self.of_step(0)}
        return tuple(frozenset(layer) for layer in zip(*had, strict=True))


def same_past(then: Mapping[str, Any], now: Mapping[str, Any], step: int) -> bool:
    """Whether two runs' settings, by `section.key`, have the same schedule in all steps before this one."""

    def past(settings: Mapping[str, Any]) -> list[tuple[int, ...]]:
        if settings["sparsity.phases"]:
            schedule = SparsitySchedule(settings["sparsity.phases"], settings["train.steps"])
            return [schedule.top_k(s) for s in range(step)]
        top_k = settings["model.top_k"]
        return [tuple(top_k) if isinstance(top_k, list) else (top_k,) * settings["model.num_layers"]] * step

    keys = ("sparsity.phases", "model.top_k", "train.steps", "model.num_layers")
    return all(then[key] == now[key] for key in keys) or past(then) == past(now)
