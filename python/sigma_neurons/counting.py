"""How often each neuron is active, language by language."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import numpy as np
import torch
from sigma_train.errors import WrongInput
from torch import Tensor, nn

from sigma_kernels.routing import Routing
from sigma_neurons.sites import Site, check_not_spread, find_sites
from sigma_neurons.stats import ActivationStats
from sigma_neurons.watch import watch


class ActivationCounter:
    """Counts, over the batches of a block, where gates are above zero.

        with ActivationCounter(model, ["de", "en"]) as counter:
            with counter.batch("de", tokens):
                model(tokens)
        counter.stats.joint()

    The model computes what it would have computed.  Counts are int64.
    """

    def __init__(self, model: nn.Module, languages: Sequence[str]) -> None:
        """Raises: WrongInput if the model has no layer that is known, or languages repeat."""
        check_not_spread(model)
        self._model, self._undo = model, list[Callable[[], None]]()
        self.stats = ActivationStats.zeros(languages, find_sites(model))
        self._ids: Tensor | None = None  # [T], of the batch under way
        self._one: int | None = None  # the language of all of them, if it is one
        self._seen: list[tuple[int, Tensor, Tensor]] = []  # site, fired, routed

    def __enter__(self) -> Self:
        for number, site in enumerate(self.stats.sites):
            self._undo.append(watch(self._model, site, self._saw(number, site)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    @contextmanager
    def batch(self, language: str | Tensor, tokens: Tensor, mask: Tensor | None = None) -> Iterator[None]:
        """One forward of the model on `tokens` [...], all in `language`, or each in the one whose index it has there.

        Tokens with the index -1, or False in `mask`, are not counted: padding, a prompt.
        Raises: WrongInput for an unknown language, another shape or dtype, or if the block was not one forward.
        """
        ids = self._indices(language, tokens)
        if mask is not None:
            _check_as(tokens, "mask", mask, mask.dtype == torch.bool, "bool")
            ids = torch.where(mask.reshape(-1), ids, -1)
        self._ids, self._seen = ids, []  # what is seen counts when the forward is whole
        first = int(ids[0]) if len(ids) else -1
        self._one = first if first >= 0 and bool((ids == first).all()) else None
        try:
            yield
        finally:
            self._ids = None
        if sorted(number for number, *_ in self._seen) != list(range(len(self.stats.sites))):
            raise WrongInput(
                f"neurons: a batch is one forward of the model; it has {len(self.stats.sites)} layers of neurons, "
                f"{len(self._seen)} computed"
            )
        for number, fired, routed in self._seen:
            self.stats.fired[number].add_(fired)
            self.stats.routed[number].add_(routed)
        counted = ids[ids >= 0]
        self.stats.tokens.add_(torch.bincount(counted, minlength=len(self.stats.languages)).cpu())

    def _indices(self, language: str | Tensor, tokens: Tensor) -> Tensor:
        names = self.stats.languages
        if isinstance(language, str):
            if language not in names:
                raise WrongInput(f"neurons: language must be one of {', '.join(names)}, found {language!r}")
            return torch.full((tokens.numel(),), names.index(language), device=tokens.device)
        is_integer = not language.dtype.is_floating_point and language.dtype != torch.bool
        _check_as(tokens, "language", language, is_integer, "of integers")
        if language.numel() and not -1 <= int(language.min()) <= int(language.max()) < len(names):
            raise WrongInput(f"neurons: language must have indices from -1 to {len(names) - 1}")
        return language.reshape(-1).long()

    def _saw(self, number: int, site: Site) -> Callable[[Tensor, Routing | None], None]:
        def saw(gates: Tensor, routing: Routing | None) -> None:
            if self._ids is None:  # a forward outside of `batch` is nobody's
                return
            positive = gates > 0
            if routing is None:
                ends, order = self._dense(positive)
            else:
                ends, order = self._routed(routing, site.experts)
            if order is not None:
                positive = positive[order]
            fired = count_segments(positive, ends).view(-1, site.experts, site.units)
            routed = ends.diff(prepend=ends.new_zeros(1)).view(-1, site.experts)
            self._seen.append((number, fired, routed))

        return saw

    def _dense(self, positive: Tensor) -> tuple[Tensor, Tensor | None]:
        ids = self._ids
        if len(positive) != len(ids):
            raise WrongInput(
                f"neurons: a layer computes {len(positive)} rows of a batch of {len(ids)} tokens"
            )
        return self._segments(ids, len(self.stats.languages))

    def _routed(self, routing: Routing, experts: int) -> tuple[Tensor, Tensor | None]:
        """Segments of (language, expert), language by language."""
        languages = len(self.stats.languages)
        if len(routing.indices) != len(self._ids):
            raise WrongInput(
                f"neurons: a layer computes {len(routing.indices)} tokens of a batch of {len(self._ids)}"
            )
        if self._one is not None:  # rows are in expert order already
            counts = torch.zeros(languages, experts, dtype=torch.int64)
            counts[self._one] = routing.counts
            return counts.flatten().cumsum(0), None
        slots = routing.row_map.long()
        expert, language = routing.indices.reshape(-1)[slots].long(), self._ids[slots // routing.top_k]
        return self._segments(
            torch.where(language >= 0, language * experts + expert, -1), languages * experts
        )

    def _segments(self, keys: Tensor, number: int) -> tuple[Tensor, Tensor | None]:
        """Ends of the runs of equal keys and the rows in their order; keys of -1 are left out."""
        ends = torch.bincount(keys[keys >= 0], minlength=number).cumsum(0).cpu()
        if self._one is not None:
            return ends, None
        return ends, keys.argsort(stable=True)[int((keys < 0).sum()) :]


def _check_as(tokens: Tensor, name: str, found: Tensor, is_kind: bool, kind: str) -> None:
    if found.shape != tokens.shape or found.device != tokens.device or not is_kind:
        raise WrongInput(
            f"neurons: {name} must be {list(tokens.shape)} {kind} on {tokens.device} as tokens are, found "
            f"{list(found.shape)} {str(found.dtype).removeprefix('torch.')} on {found.device}"
        )


def count_segments(positive: Tensor, ends: Tensor) -> Tensor:
    """[segments, units] int64: in how many rows of each segment each unit is True; segments follow each other."""
    return _by_bytes(positive, ends) if positive.device.type == "cpu" else _by_index(positive, ends)


def _by_bytes(positive: Tensor, ends: Tensor) -> Tensor:
    """numpy adds columns of bytes, in 2,048 rows of 2,048, in 12 ms where torch takes 93 for bools."""
    rows, out = positive.numpy().view(np.uint8), np.zeros((len(ends), positive.shape[1]), dtype=np.int64)
    start = 0
    for segment, end in enumerate(ends.tolist()):
        if end > start:
            out[segment] = np.add.reduce(rows[start:end], axis=0, dtype=np.int32)
        start = end
    return torch.from_numpy(out)


def _by_index(positive: Tensor, ends: Tensor) -> Tensor:
    ends = ends.to(positive.device)
    segment = torch.repeat_interleave(ends.diff(prepend=ends.new_zeros(1)))
    out = torch.zeros(len(ends), positive.shape[1], dtype=torch.int64, device=positive.device)
    return out.index_add_(0, segment, positive.long()).cpu()
