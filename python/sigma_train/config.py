"""The settings of a run: typed, validated, frozen; defaults < preset < file < `--set section.key=value`."""

import difflib
import json
import tomllib
import warnings
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sigma_train.config_words import fields_of, nearest, sentence
from sigma_train.errors import WrongInput
from sigma_train.kinds import (
    Aggregate,
    Alignment,
    Betas,
    Count,
    EvenSize,
    Folder,
    Kept,
    NonNegative,
    OpenShare,
    OptionalBytes,
    OptionalCount,
    OptionalFile,
    OptionalFolder,
    OptionalPositive,
    OptionalThreads,
    Paths,
    Phases,
    Positive,
    Scope,
    Seed,
    Share,
    Size,
    Sizes,
    TopK,
    Unmapped,
    Vocabulary,
    Whole,
)


class ConfigError(WrongInput):
    """A wrong setting, in one sentence."""


class ConfigWarning(UserWarning):
    """A legal setting that seldom does what was meant."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    vocab_size: Vocabulary = 4096
    hidden_size: Size = 256
    num_layers: Size = 4
    num_heads: Size = 4
    num_kv_heads: Size = 2
    head_dim: EvenSize = 64  # even: rotary embeddings turn pairs
    intermediate_size: Size = 256  # of one expert; a dense MLP is intermediate_size * top_k wide
    num_experts: Size = 96  # 1 is a dense SwiGLU MLP without a router
    top_k: TopK = 1
    max_seq_len: Size = 256
    rope_theta: Positive = 10000.0
    norm_eps: Positive = 1e-6
    tie_embeddings: bool = Field(True, strict=True)
    init_std: Positive = 0.02
    expert_init_std: OptionalPositive = None  # none: init_std

    @property
    def layer_top_k(self) -> tuple[int, ...]:
        """top_k of each layer."""
        return self.top_k if isinstance(self.top_k, tuple) else (self.top_k,) * self.num_layers

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads must be a multiple of model.num_kv_heads, "
                f"found {self.num_heads} and {self.num_kv_heads}"
            )
        if len(self.layer_top_k) != self.num_layers:
            raise ConfigError(
                f"model.top_k must have one entry for each of model.num_layers = {self.num_layers} layers, "
                f"found {len(self.layer_top_k)}"
            )
        if self.num_experts > 1 and max(self.layer_top_k) > self.num_experts:
            raise ConfigError(
                f"model.top_k must not exceed model.num_experts = {self.num_experts}, "
                f"found {max(self.layer_top_k)}"
            )
        return self


class RouterConfig(_Section):
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = Field(False, strict=True)  # weights of the chosen divided by their sum
    normalize_one: bool = Field(False, strict=True)  # of one alone as well, in a run that has such layers
    balance: Literal["loss", "global", "top1", "bias", "none"] = "loss"
    top1_temperature: Positive = 0.1  # of the balance "top1", whose sums are over all ranks
    balance_coef: NonNegative = 1e-2
    z_coef: NonNegative = 0.0
    bias_rate: NonNegative = 1e-3
    output_scale: Positive = 1.0  # multiplies what the experts add
    aux_score: Literal["softmax", "sigmoid"] = "softmax"  # the score that the balance loss reads


class SparsityConfig(_Section):
    """Experts a token over the run, instead of model.top_k: by phases, the last of which is model.top_k, or drawn."""

    phases: Phases = ()
    sample: Sizes = ()  # of these each micro-batch, or each layer of one, has one; validation has model.top_k
    granularity: Literal["global", "micro-batch", "layer"] = "layer"
    distribution: Literal["uniform", "capacity"] = "uniform"
    temperature: Positive = 1.0  # of the distribution "capacity"
    budget: OptionalCount = None  # of the drawn k of all layers together


class DataConfig(_Section):
    paths: Paths = ()  # empty: the Python standard library's source on this machine
    languages: bool = Field(False, strict=True)  # each file is LANG.txt: see languages.py
    val_fraction: OpenShare = 0.02
    cache_dir: OptionalFolder = None  # none: $SIGMA_CACHE, else ~/.cache/sigma-kernels
    max_bytes: OptionalBytes = None


class OptimConfig(_Section):
    lr: Positive = 1e-3
    expert_lr_scale: Positive = 1.0
    router_lr_scale: Positive = 1.0
    min_lr_ratio: Share = 0.1
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: Whole = 50
    decay_fraction: Share = 0.2  # of the steps, at their end; wsd only
    betas: Betas = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    grad_clip: Positive = 1.0


class TrainConfig(_Section):
    steps: Count = 600
    batch_size: Size = 8  # sequences of one rank and one micro-step
    seq_len: Size = 256
    grad_accum: Count = 1
    seed: Seed = 0
    eval_every: Count = 50
    eval_batches: Count = 20
    log_every: Count = 10
    save_every: Count = 200
    keep: Count = 2
    async_save: bool = Field(True, strict=True)  # written by a thread while the next steps are computed
    sample_every: Whole = 0  # 0: never
    time_budget_s: OptionalPositive = None
    out: Folder = "runs/default"
    threads: OptionalThreads = None
    init_from: OptionalFolder = None  # a run or a checkpoint whose weights this one begins with, at step 0
    init_optimizer: bool = Field(False, strict=True)  # and with the moments of its optimizer
    expert_ranks: OptionalCount = None  # that share the experts, each such group all of them; none: all ranks
    shard_ranks: OptionalCount = (
        None  # that share the rest of the model, each such group all of it; none: all ranks
    )
    place_every: Whole = 0  # checkpoints between re-placements of experts by their load; 0: never
    rank_timeout_s: Positive = 600.0  # of a rank that others wait for: then it is taken for lost
    dtype: Literal["f32", "bf16"] = "f32"  # of matrix products; weights and moments of Adam are f32 in both
    noise: bool = Field(False, strict=True)  # when each phase of a step was, of every rank, in its folder
    prometheus: OptionalFile = None  # where the ledger's figures are left for a textfile collector


class GuardConfig(_Section):
    """What is done about a step that is not fit to be learned from; `guard.py` says how it is told."""

    on_nonfinite: Literal["stop", "skip", "rollback", "lower_rate"] = "stop"
    on_spike: Literal["keep", "stop", "skip", "rollback", "lower_rate"] = (
        "keep"  # keep: it is written down alone
    )
    spike: Positive = 10.0  # robust deviations above the median of what was seen
    window: Count = 100  # steps that are remembered
    most: Whole = 20  # steps that are left out; the next ends the run
    lower_by: OpenShare = 0.5
    check_every: Whole = 0  # steps between checks for silent corruption; 0: never
    stats_every: Whole = 0  # steps between statistics of each layer; 0: never


class ObjectiveConfig(_Section):
    """Which tokens are learned from; `objective.py` says how they are chosen."""

    kind: Literal["plain", "random", "student", "teacher_guided", "uld"] = "plain"
    teacher: OptionalFile = None  # of `sigma teacher cache`; its content shapes a run, wherever it lies
    alignment: Alignment = "span"
    chunks: Count = 16
    keep_rate: Kept = 0.4
    aggregate: Aggregate = "max"
    unmapped: Unmapped = "include"
    scope: Scope = "batch"
    uld_weight: NonNegative = 1.5


class Config(_Section):
    model: ModelConfig = ModelConfig()
    router: RouterConfig = RouterConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    guard: GuardConfig = GuardConfig()
    sparsity: SparsityConfig = SparsityConfig()
    objective: ObjectiveConfig = ObjectiveConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        s = self.sparsity
        if (s.phases or s.sample) and self.model.num_experts == 1:
            raise ConfigError("sparsity wants experts: model.num_experts is 1")
        if s.phases and s.sample:
            raise ConfigError("sparsity.phases and sparsity.sample cannot both be given")
        if s.budget is not None and (not s.sample or s.granularity != "layer"):
            raise ConfigError('sparsity.budget is of sparsity.sample with sparsity.granularity = "layer"')
        if s.phases and s.phases[-1][1] != self.model.layer_top_k:
            raise ConfigError(
                f"sparsity.phases must end with model.top_k, {list(self.model.layer_top_k)}, "
                f"found {list(s.phases[-1][1])}"
            )
        most = max([k for phase in s.phases for k in phase[1]] + list(s.sample), default=0)
        if most > self.model.num_experts:
            raise ConfigError(
                f"sparsity must not exceed model.num_experts = {self.model.num_experts}, found {most}"
            )
        if (self.objective.kind in ("teacher_guided", "uld")) != (self.objective.teacher is not None):
            raise ConfigError(
                "objective.kind = teacher_guided, or uld, and objective.teacher, a file of `sigma teacher cache`, "
                "go together; "
                f"found kind {self.objective.kind!r} and teacher {self.objective.teacher or 'none'}"
            )
        if self.train.init_optimizer and self.train.init_from is None:
            raise ConfigError("train.init_optimizer wants train.init_from, found none")
        if self.train.seq_len > self.model.max_seq_len:
            raise ConfigError(
                f"train.seq_len must not exceed model.max_seq_len = {self.model.max_seq_len}, "
                f"found {self.train.seq_len}"
            )
        is_asked = self.router.normalize and not self.router.normalize_one
        if is_asked and self.model.num_experts > 1 and 1 in self.model.layer_top_k:
            warnings.warn(
                "router.normalize = true with model.top_k = 1 would make every routing weight 1, "
                "so that the router gets no gradient from the task loss: weights there are not divided; "
                "router.normalize_one = true divides them",
                ConfigWarning,
                stacklevel=2,
            )
        return self

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Self:
        """Validate nested settings; raises ConfigError where the constructor raises pydantic's error."""
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise ConfigError(sentence(error, settings, cls)) from None

    def to_toml(self) -> str:
        """All settings as TOML that `load_config` reads back to an equal Config (none is left out)."""
        tables = []
        for section, settings in self.model_dump().items():
            lines = [f"{key} = {_toml(value)}\n" for key, value in settings.items() if value is not None]
            tables.append(f"[{section}]\n" + "".join(lines))
        return "\n".join(tables)


# These change what a run reports, keeps or costs, never the numbers that it computes.
_NOT_SHAPING = {
    "data": {"cache_dir"},
    "guard": {
        "check_every",
        "on_nonfinite",
        "on_spike",
        "most",
        "stats_every",
    },  # what they did is in a checkpoint
    "objective": {"teacher"},  # the digest of what it holds stands for it
    "train": {
        *("eval_every", "eval_batches", "log_every", "save_every", "sample_every"),
        *("keep", "async_save", "time_budget_s", "out", "threads", "rank_timeout_s", "noise", "prometheus"),
        *("expert_ranks", "shard_ranks", "place_every"),
    },
}


def shaping_settings(cfg: Config) -> dict[str, Any]:
    """`section.key` of everything that shapes the trained weights, as JSON has it; equal ones may resume each other."""
    sections = cfg.model_dump(mode="json", exclude=_NOT_SHAPING)
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}


def preset_names() -> list[str]:
    folder = resources.files(__package__) / "presets"
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def load_config(
    preset: str | None,
    config_file: Path | None,
    overrides: list[str],
    options: Mapping[str, dict[str, Any]] | None = None,
) -> Config:
    """Defaults, preset, file, each `section.key=value`, then `options` by section; the later over the former.

    A value is read as TOML, else taken as a plain string; `none` clears a setting that may be none.
    Raises: ConfigError, one sentence that names the key.
    """
    layers = []
    if preset is not None:
        layers.append(_read_preset(preset))
    if config_file is not None:
        layers.append(_read_file(Path(config_file)))
    layers += [*map(_parse_override, overrides), options or {}]
    merged: dict[str, Any] = {}
    for layer in layers:
        for section, settings in layer.items():
            former = merged.get(section, {})
            if isinstance(former, dict):  # what is no table stays until Config names it
                merged[section] = former | settings if isinstance(settings, dict) else settings
    return Config.from_dict(merged)


def _read_preset(name: str) -> dict[str, Any]:
    names = preset_names()
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(names)}"
        raise ConfigError(f"unknown preset {name!r}; {hint}")
    return tomllib.loads((resources.files(__package__) / "presets" / f"{name}.toml").read_text())


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}") from None
    except ValueError as error:  # of the syntax, of UTF-8, or of an integer of thousands of digits
        raise ConfigError(f"config file {path} is not valid TOML: {error}") from None


def _parse_override(text: str) -> dict[str, Any]:
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals:
        raise ConfigError(f"--set wants section.key=value, found {text!r}")
    if not dot:
        raise ConfigError(f"--set wants section.key=value, found {text!r}; {nearest(name.strip(), Config)}")
    field = fields_of(section, Config).get(key) if section in Config.model_fields else None
    if value.strip().lower() == "none" and field and type(None) in get_args(field.annotation):
        return {section: {key: None}}
    return {section: {key: _parse_value(value.strip())}}


def _parse_value(text: str) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")
    except ValueError:
        return text
    # A date or a second line is no setting of ours, but may be a name such as runs of that day.
    return (
        value["value"]
        if len(value) == 1 and isinstance(value["value"], bool | int | float | str | list)
        else text
    )


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON escapes are TOML escapes; DEL is the one character TOML escapes and JSON not.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return repr(value)
