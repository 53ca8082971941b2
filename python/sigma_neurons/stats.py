"""Counts of activations as int64, and the probabilities that they are."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from sigma_train.errors import WrongInput
from sigma_train.files import atomic_file
from torch import Tensor

from sigma_neurons.sites import Site

VERSION = "1"


@dataclass(frozen=True)
class ActivationStats:
    """Of K languages at L sites: tokens [K]; of each site routed [K, E], rows of each expert, and fired [K, E, I].

    Neurons are numbered through: site by site, expert by expert, unit by unit; N in all.
    """

    languages: tuple[str, ...]
    sites: tuple[Site, ...]
    tokens: Tensor
    routed: tuple[Tensor, ...]
    fired: tuple[Tensor, ...]

    @classmethod
    def zeros(cls, languages: Sequence[str], sites: Sequence[Site]) -> Self:
        """Raises: WrongInput if a language is named twice or none is."""
        if not languages or len({*languages}) != len(languages):
            raise WrongInput(
                f"neurons: languages must be distinct names, found {', '.join(languages) or 'none'}"
            )
        K = len(languages)
        return cls(
            tuple(languages),
            tuple(sites),
            torch.zeros(K, dtype=torch.int64),
            tuple(torch.zeros(K, site.experts, dtype=torch.int64) for site in sites),
            tuple(torch.zeros(K, site.experts, site.units, dtype=torch.int64) for site in sites),
        )

    def joint(self) -> Tensor:
        """[N, K] f64: the share of a language's tokens at which a neuron is active.

        Of an expert's it is P(routed there and active), which is what compares with a dense layer.
        """
        flat = torch.cat([fired.flatten(1) for fired in self.fired], dim=1)
        return (flat.double() / self.tokens.clamp(min=1)[:, None]).t()

    def conditional(self, least: int = 1) -> Tensor:
        """[N, K] f64: P(active, given that the token is routed to the neuron's expert).

        All zero, hence in no selection, are neurons of experts that some language went to less than `least` times: of
        few tokens nothing is known.
        """
        parts = []
        for fired, routed in zip(self.fired, self.routed, strict=True):
            p = fired.double() / routed.clamp(min=1)[..., None]
            parts.append((p * (routed >= least).all(0)[None, :, None]).flatten(1))
        return torch.cat(parts, dim=1).t()

    def routing(self) -> Tensor:
        """[experts of all sites, K] f64: the share of a language's tokens that goes to each expert."""
        return (torch.cat(self.routed, dim=1).double() / self.tokens.clamp(min=1)[:, None]).t()

    def site_of_neurons(self) -> Tensor:
        """[N] int64, indices into `sites`."""
        return torch.cat([torch.full((site.size,), i) for i, site in enumerate(self.sites)])

    def layer_of_neurons(self) -> Tensor:
        """[N] int64."""
        return torch.tensor([site.layer for site in self.sites])[self.site_of_neurons()]

    def merge(self, other: "ActivationStats") -> "ActivationStats":
        """Of both together, as if counted in one pass.  Raises: WrongInput if they are of other models or languages."""
        return self._with(other, torch.add)

    def minus(self, other: "ActivationStats") -> "ActivationStats":
        """Without what `other` counted, as a prompt of the whole.  Raises: WrongInput, also if it counted more."""
        out = self._with(other, torch.sub)
        if min(int(counts.min()) for counts in (out.tokens, *out.routed, *out.fired)) < 0:
            raise WrongInput(
                "neurons: counts that are taken away must be part of the counts, found more of them"
            )
        return out

    def _with(
        self, other: "ActivationStats", combine: Callable[[Tensor, Tensor], Tensor]
    ) -> "ActivationStats":
        if (self.languages, self.sites) != (other.languages, other.sites):
            raise WrongInput("neurons: counts must be of the same languages and layers")
        return ActivationStats(
            self.languages,
            self.sites,
            combine(self.tokens, other.tokens),
            tuple(map(combine, self.routed, other.routed)),
            tuple(map(combine, self.fired, other.fired)),
        )

    def write(self, path: Path) -> None:
        """A safetensors file, whole or absent."""
        tensors = {"tokens": self.tokens}
        for i, (routed, fired) in enumerate(zip(self.routed, self.fired, strict=True)):
            tensors |= {f"{i}.routed": routed, f"{i}.fired": fired}
        about = {
            "version": VERSION,
            "languages": json.dumps(self.languages),
            "sites": json.dumps([asdict(site) for site in self.sites]),
        }
        with atomic_file(path) as file:
            file.write(save(tensors, about))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises: WrongInput if it is no file that `write` wrote."""
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("version") != VERSION:
                    raise WrongInput(
                        f"{path} must be counts of version {VERSION}, found {about.get('version')}"
                    )
                sites = tuple(Site(**site) for site in json.loads(about["sites"]))
                routed, fired = (
                    tuple(file.get_tensor(f"{i}.{name}") for i in range(len(sites)))
                    for name in ("routed", "fired")
                )
                return cls(
                    tuple(json.loads(about["languages"])), sites, file.get_tensor("tokens"), routed, fired
                )
        except FileNotFoundError:
            raise WrongInput(f"{path} is missing; `sigma neurons identify` writes it") from None
        except SafetensorError as error:
            raise WrongInput(f"{path} is no file of counts: {error}") from None
