"""[objective]: which tokens a step is learned from, in the trainer, on one rank and on two."""

import shutil
from dataclasses import replace

import forked
import pytest
import rank_faults
import torch
import torch.nn.functional as F
from rich.console import Console
from sigma_train import loop
from sigma_train.config import ConfigError, load_config
from sigma_train.errors import WrongInput
from sigma_train.folder import claimed
from sigma_train.laid_over import Aligned
from sigma_train.loop import Trainer
from sigma_train.metrics import read_metrics
from sigma_train.ranks import Ranks
from sigma_train.step import Step
from sigma_train.teacher import RunTeacher
from sigma_train.teacher_cache import cache_losses
from sigma_train.teacher_file import read_losses, write_losses

SMALL = [
    "data.max_bytes=100000",
    "train.batch_size=4",
    "train.steps=4",
    "train.save_every=2",
    "train.threads=1",
]
KINDS = ["random", "student", "teacher_guided"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Losses of an untrained run with a vocabulary of its own, on the text of the others."""
    folder = tmp_path_factory.mktemp("teacher")
    patch = pytest.MonkeyPatch()
    patch.setattr(loop, "dense_tokens_per_s", lambda config: 1.0)
    cache = f"data.cache_dir={tmp_path_factory.getbasetemp() / 'cache'}"
    options = {"train": {"out": str(folder / "run")}, "model": {"vocab_size": 400}}
    config = load_config("smoke", None, [*SMALL, cache, "train.steps=1"], options)
    with claimed(folder / "run"):
        Trainer(config, Console(quiet=True), False).run()
    patch.undo()
    teacher, out = RunTeacher(folder / "run"), folder / "losses"
    cache_losses(teacher, config.data, out, None, None, 4096, "f32", Console(quiet=True), 64)
    losses = read_losses(out, "test")
    write_losses(folder / "others", replace(losses, loss=losses.loss.half()))
    write_losses(folder / "losses-alone", replace(losses, top=losses.top[:, :0]))
    return out


def of(kind: str, teacher) -> list[str]:
    named = [f"objective.teacher={teacher}"] if kind in ("teacher_guided", "uld") else []
    return [f"objective.kind={kind}", *named]


def rows(trainer: Trainer) -> list[dict]:
    return [row for row in read_metrics(trainer.out / "metrics.jsonl") if "loss" in row]


def before(step: Step, number: int, micro: int) -> torch.Tensor:
    """The loss as it was when all tokens counted and nothing else was known."""
    t = step.config.train
    inputs, targets = step.data.train.batch(number * t.grad_accum + micro, t.batch_size, t.seq_len, t.seed)
    step._set_top_k(step.experts.of_batch(number, micro))
    return F.cross_entropy(step.model(inputs).flatten(0, 1), targets.flatten())


def test_plain_is_the_same_bits(make_trainer, monkeypatch):
    """Defends: a mean over tokens that rounds otherwise, weights of a run that nobody asked a selection of."""
    settings = ("train.grad_accum=2", "train.steps=2")
    now = make_trainer("now", *settings)
    now.run()
    monkeypatch.setattr(Step, "_cross_entropy", before)
    then = make_trainer("then", *settings)
    then.run()
    assert [(r["loss"], r["grad_norm"]) for r in rows(now)] == [
        (r["loss"], r["grad_norm"]) for r in rows(then)
    ]
    assert all(map(torch.equal, now.model.parameters(), then.model.parameters()))
    assert not {"loss_of_all", "kept"} & rows(now)[0].keys()


def losses_of_first_step(trainer: Trainer) -> list[torch.Tensor]:
    """[B, S] of each micro-batch of a model that has learned nothing yet."""
    t, found = trainer.config.train, []
    for micro in range(t.grad_accum):
        inputs, targets = trainer.data.train.batch(micro, t.batch_size, t.seq_len, t.seed)
        with torch.no_grad():
            logits = trainer.model(inputs)
        found.append(
            F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        )
    return found


@pytest.mark.parametrize(
    ("scope", "alignment"), [("batch", "span"), ("sequence", "span"), ("batch", "chunk")]
)
def test_the_first_step_by_hand(make_trainer, teacher, scope, alignment):
    """Defends: targets of the tokens beside, a share of all micro-steps at once, a mean over what is left out.

    Another alignment that is not handed on.
    """
    trainer = make_trainer(
        "run",
        "train.grad_accum=2",
        f"objective.scope={scope}",
        "objective.unmapped=exclude",
        f"objective.alignment={alignment}",
        "objective.chunks=3",
        *of("teacher_guided", teacher),
    )
    t, data = trainer.config.train, trainer.data.train
    targets = read_losses(teacher, "test").targets(data, "max", Aligned(alignment, 3))
    want, kept = [], []
    for micro, nats in enumerate(losses_of_first_step(trainer)):
        _, tokens = data.batch(micro, t.batch_size, t.seq_len, t.seed)
        places = data.target_places(micro, t.batch_size, t.seq_len, t.seed)
        assert torch.equal(torch.from_numpy(data.tokens[places.numpy()].astype("int64")), tokens)
        gaps = nats - targets[places]
        chosen = []
        for part, own in ((gaps, nats),) if scope == "batch" else zip(gaps, nats, strict=True):
            pairs = sorted(
                ((g, i) for i, g in enumerate(part.flatten().tolist()) if g == g),
                key=lambda pair: (-pair[0], pair[1]),
            )
            chosen += [own.flatten()[i].item() for _, i in pairs[: round(0.4 * len(pairs))]]
        want.append(sum(chosen) / len(chosen))
        kept.append(len(chosen) / nats.numel())
    loss, _, _ = trainer.one_step.gradients(0)
    assert loss == pytest.approx(sum(want) / 2, rel=1e-5)
    everything = torch.stack(losses_of_first_step(trainer)).mean().item()
    assert trainer.one_step.figures == pytest.approx(
        {"loss_of_all": everything, "kept": sum(kept) / 2}, rel=1e-5
    )


@pytest.mark.parametrize("alignment", ["span", "index", "edit"])
def test_uld_by_hand(make_trainer, teacher, alignment):
    """Cross entropy of all, and the distance to the teacher's probabilities at the partner of each that has one."""
    trainer = make_trainer(
        "run",
        "train.grad_accum=2",
        "objective.uld_weight=0.7",
        f"objective.alignment={alignment}",
        *of("uld", teacher),
    )
    t, data = trainer.config.train, trainer.data
    losses = read_losses(teacher, "test")
    partners = losses.partners(data.train, Aligned(alignment, strings=data.tokenizer.pieces))
    of_all, distance = [], []
    for micro in range(2):
        inputs, targets = data.train.batch(micro, t.batch_size, t.seq_len, t.seed)
        places = data.train.target_places(micro, t.batch_size, t.seq_len, t.seed)
        with torch.no_grad():
            logits = trainer.model(inputs)
        of_all.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())
        total = 0.0
        for row, partner in zip(logits.flatten(0, 1), partners[places].flatten().tolist(), strict=True):
            if partner >= 0:
                p, q = row.softmax(-1).sort(descending=True).values, losses.top[partner].float()
                total += ((p[:64] - q).abs().sum() + p[64:].sum()).item()
        distance.append(total / targets.numel())
    loss, _, _ = trainer.one_step.gradients(0)
    assert loss == pytest.approx(sum(of_all) / 2 + 0.7 * sum(distance) / 2, rel=1e-5)
    assert trainer.one_step.figures == pytest.approx(
        {"loss_of_all": sum(of_all) / 2, "uld": sum(distance) / 2}, rel=1e-5
    )
    assert sum(distance) > 0.1


def test_uld_lowers_the_distance(make_trainer, teacher):
    """Defends: a distance without a gradient, or with one the wrong way."""
    found = {}
    for weight in (0, 20):
        trainer = make_trainer(str(weight), f"objective.uld_weight={weight}", *of("uld", teacher))
        trainer.run()
        found[weight] = [row["uld"] for row in rows(trainer)]
    assert found[0][0] == found[20][0]
    assert found[20][-1] < found[0][-1]


def test_what_the_kinds_keep(make_trainer, teacher):
    """The student's own loss: the highest; at random: as many, of the mean's size; and other ones in another batch."""
    loss, of_all = {}, set()
    for kind in KINDS:
        step = make_trainer(kind, *of(kind, teacher)).one_step
        loss[kind], _, _ = step.gradients(0)
        assert step.figures["kept"] == pytest.approx(0.4, abs=0.01)
        of_all.add(step.figures["loss_of_all"])
    assert len(of_all) == 1
    assert loss["student"] > loss["teacher_guided"]
    assert loss["student"] > loss["random"]
    assert loss["random"] == pytest.approx(*of_all, rel=0.05)


def test_draws_are_of_the_batch_and_of_no_rank(make_trainer):
    """Defends: draws that ranks repeat, or that are other ones on more of them; the same in each batch."""
    objective = make_trainer("run", *of("random", None)).objective
    state = torch.get_rng_state()
    whole, other = (objective._scores(torch.empty(4, 64), batch)[0] for batch in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert (whole != other).float().mean() > 0.99
    parts = []
    for rank in (0, 1):
        objective.ranks = Ranks(rank, 2)
        parts.append(objective._scores(torch.empty(2, 64), 0)[0])
    assert torch.equal(torch.cat(parts), whole)


def test_all_tokens_kept_is_plain(make_trainer, teacher):
    """Defends: a mean that is divided by something else."""
    everything = make_trainer("all", "objective.keep_rate=1", *of("teacher_guided", teacher))
    plain = make_trainer("plain")
    got, want = everything.one_step.gradients(0), plain.one_step.gradients(0)
    assert got[:2] == pytest.approx(want[:2], rel=1e-5)
    assert everything.one_step.figures["kept"] == 1


def test_a_run_goes_on_with_the_same_teacher_alone(make_trainer, teacher, tmp_path):
    """Defends: a teacher changed on the way; a file that may not be moved."""
    whole = make_trainer("whole", *of("teacher_guided", teacher))
    whole.run()
    shutil.copytree(tmp_path / "whole", tmp_path / "again", ignore=shutil.ignore_patterns("step-*4"))
    shutil.copy(teacher, tmp_path / "moved")
    again = make_trainer("again", *of("teacher_guided", tmp_path / "moved"), resume=True)
    assert again.step == 2
    again.run()
    assert [row["loss"] for row in rows(again)] == [row["loss"] for row in rows(whole)]
    with pytest.raises(ConfigError, match=r"objective\.teacher was '[0-9a-f]{64}' and is '[0-9a-f]{64}'"):
        make_trainer("again", *of("teacher_guided", teacher.with_name("others")), resume=True)
    with pytest.raises(ConfigError, match=r"objective\.alignment was 'span' and is 'index'"):
        make_trainer("again", *of("teacher_guided", teacher), "objective.alignment=index", resume=True)
    with pytest.raises(ConfigError, match=r"objective\.kind was 'teacher_guided' and is 'plain'"):
        make_trainer("again", resume=True)


@pytest.mark.parametrize(("settings", "error", "words"), [
    (["data.max_bytes=300000"], WrongInput, "losses of another text than the training split: corpus_digest is"),
    (["data.val_fraction=0.2"], WrongInput, "val_fraction is 0.1 there and 0.2 here"),
    (["objective.kind=random"], ConfigError, "go together; found kind 'random' and teacher /"),
    (["objective.teacher=none"], ConfigError, "go together; found kind 'teacher_guided' and teacher none"),
    (["objective.keep_rate=0"], ConfigError, "keep_rate must be a number above 0 and at most 1, found 0"),
    (["objective.kind=uld", "objective.teacher={alone}"], WrongInput,
     "losses-alone must hold probabilities for objective.kind = uld, found losses alone"),
    (["objective.alignment=words"], ConfigError, "objective.alignment must be 'span' or 'index' or 'chunk' or 'edit'"),
    (["objective.teacher={missing}"], WrongInput, "missing; `sigma teacher cache` makes it"),
])  # fmt: skip
def test_what_does_not_fit_is_told(make_trainer, teacher, tmp_path, settings, error, words):
    """Defends: losses of other tokens, which train as well as any."""
    alone = teacher.with_name("losses-alone")
    more = [setting.format(missing=tmp_path / "missing", alone=alone) for setting in settings]
    with pytest.raises(error, match=words) as refused:
        make_trainer("run", *of("teacher_guided", teacher), *more)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run" / "config.toml").exists()


@pytest.mark.parametrize(("kind", "figure"), [("teacher_guided", "kept"), ("uld", "uld")])
def test_two_ranks_learn_what_one_does(make_trainer, cache, teacher, tmp_path, kind, figure):
    """Defends: a share of each rank's own, targets of another rank's tokens, a sum of weights of one of them."""
    common = ["router.balance=global", "objective.unmapped=exclude", "train.steps=2", *of(kind, teacher)]
    one = make_trainer("one", *common)
    one.run()
    args = ["train", "--preset", "smoke", "--out", str(tmp_path / "two")]
    for setting in (*SMALL, *common, "train.batch_size=2"):
        args += ["--set", setting]
    results = forked.on_ranks(2, args, cache, rank_faults.nothing)
    assert [result.returncode for result in results] == [0, 0], results
    found = [row for row in read_metrics(tmp_path / "two" / "metrics.jsonl") if "loss" in row]
    for got, want in zip(found, rows(one), strict=True):
        for name, bound in (("loss", 1e-5), ("loss_of_all", 1e-5), ("grad_norm", 1e-3), (figure, 1e-5)):
            assert got[name] == pytest.approx(want[name], rel=bound), name
