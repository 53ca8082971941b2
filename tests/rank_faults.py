"""What befalls the processes of test_train_*.py and test_validate.py; in a module, as forked processes import it."""

import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from sigma_cli import pairs
from sigma_experiments import lab
from sigma_train import generate, launch, loop, report, selfcheck
from sigma_train import step as one_step
from sigma_train.config import Config
from sigma_train.ledger import Ledger
from sigma_train.model import LanguageModel
from sigma_train.ranks import Ranks
from sigma_train.sharded import Writer
from sigma_train.step import Step

from sigma_kernels.distributed.moe import local

AT_STEP = 4
RANK_1 = "1"


def no_bounds() -> None:
    """Of the machine, which take longer to time than a short run does."""
    loop.dense_tokens_per_s = lambda config: 1.0
    loop.product_flops_per_s = lambda dtype: 1e12


def no_sample() -> None:
    """Nor bounds: a run and its report."""
    no_bounds()
    generate.generate = lambda *_, **__: "no sample"


def nothing() -> None:
    """The run alone: no sample, no report, no dense twin."""
    no_sample()
    report.write_report = lambda *_: "no report"


def budget_of_two_steps() -> None:
    """Of time, whatever it is: spent when the second step is done."""
    nothing()
    step = loop.Trainer._train_step

    def now(trainer: loop.Trainer) -> Any:
        if trainer.step == 1:
            loop.time = SimpleNamespace(monotonic=lambda: math.inf)
        return step(trainer)

    loop.Trainer._train_step = now


def record_is_broken() -> None:
    """Before the report is made of it."""
    no_sample()
    noise_of = report.noise_of

    def now(run: Path) -> Any:
        (file,) = (run / "noise").glob("*.parquet")
        file.write_bytes(file.read_bytes()[:-1])
        return noise_of(run)

    report.noise_of = now


def befall(method: str, rank: str, fault: Callable[[], None]) -> None:
    """Have `fault` come before this method of the writer of step 4, on this rank."""
    nothing()
    then = getattr(Writer, method)

    def now(writer: Writer, *args: Any, **named: Any) -> Any:
        if writer.step == AT_STEP and os.environ.get("RANK", "0") == rank:
            fault()
        return then(writer, *args, **named)

    setattr(Writer, method, now)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_step_8() -> None:
    """Between its gradients and what is learned from them."""
    nothing()
    learn, calls = Step.learn, [0]

    def now(step: Step, *args: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 8:
            killed()
        return learn(step, *args, **named)

    Step.learn = now


def writes_a_ledger(file: Path, resumed: int) -> None:
    """And does nothing else, until it is killed."""
    book = Ledger(file, True)
    book.begin(book.now(), 1, resumed, "m", 1, 1)
    step = resumed
    print("ready")
    while True:
        step += 1
        book.step(step, True)
        if step % 5 == 0:
            with book.pause("checkpoint"):
                pass


def backend_is_forced() -> None:
    """After the import of what reads it."""
    os.environ["SIGMA_BACKEND"] = "cpu"


def starts_a_training(args: list[str], log: Path) -> None:
    """As an experiment does, and waits for ever."""
    print(lab.started(args, log).pid)
    time.sleep(600)


def trains_in_a_lab(out: Path, run: lab.Run) -> None:
    """And tells the step of the last validation, or why there is none."""
    (trained,) = lab.Lab(out, 1, True, 1, Console()).train([run]).values()
    print(trained.validation[-1][0])
    sys.exit()


def disk_is_full() -> None:
    """For a part; a line of metrics fits."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def heed_signals() -> None:
    """A run obeys what its parent ignores, and a script's `&` ignores SIGINT: tests may run under one."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def refused_by_all_ranks() -> None:
    """Another program is in their place, which knows none of the options and ends with 2 at once."""
    launch.launch = partial(launch.launch, module="json.tool")


def signalled_while_the_bound_is_timed() -> None:
    loop.dense_tokens_per_s = lambda config: os.kill(os.getpid(), signal.SIGTERM)


killed_before_a_part = partial(befall, "write_data", "0", killed)
killed_before_the_record = partial(befall, "finish", "0", killed)
rank_1_is_killed = partial(befall, "write_data", "1", killed)
disk_of_rank_1_is_full = partial(befall, "write_data", "1", disk_is_full)


def other_weight(name: str, rank: str) -> None:
    """Before the check of step 3 a weight of this rank is another than it was."""
    nothing()
    check = selfcheck.check

    def now(model: LanguageModel, config: Config, step: int, ranks: Ranks) -> None:
        if step == 3 and os.environ["RANK"] == rank:
            local(model.get_parameter(name).detach())[-1].mul_(1.5)
        check(model, config, step, ranks)

    selfcheck.check = now


another_expert_of_rank_3 = partial(other_weight, "layers.0.mlp.experts.down_proj", "3")
another_embedding_of_rank_1 = partial(other_weight, "embed_tokens.weight", RANK_1)
another_embedding_of_rank_2 = partial(other_weight, "embed_tokens.weight", "2")


def infinite_expert_7_in_a_copy() -> None:
    """In the third step, in the second layer, on the second of two pairs of ranks, whichever holds it."""
    nothing()
    gradients = Step.gradients

    def now(step: Step, number: int) -> Any:
        if number == 2:
            moe = step.model.moe_layers()[1]
            assert moe.placement is not None, "nobody has moved"
            holder, row = divmod(int(moe.placement[7]), 4)
            if int(os.environ["RANK"]) == 2 + holder:
                local(moe.experts.gate_up_proj.detach())[row].fill_(math.inf)
        return gradients(step, number)

    Step.gradients = now


def no_number_in_an_experts_gradient() -> None:
    """On rank 1, in the sixth step."""
    nothing()
    clip, calls = one_step.clip, [0]

    def hurt(model: LanguageModel, most: float) -> Any:
        calls[0] += 1
        if calls[0] == 6 and os.environ["RANK"] == RANK_1:
            next(model.moe_layers()[0].experts.parameters()).grad.mul_(math.nan)
        return clip(model, most)

    one_step.clip = hurt


def infinite_weight_of_an_expert() -> None:
    """On rank 1, in the third step, in the second layer."""
    nothing()
    step = loop.Trainer._train_step

    def hurt(trainer: loop.Trainer) -> Any:
        if trainer.step == 2 and os.environ["RANK"] == RANK_1:
            local(trainer.model.layers[1].mlp.experts.down_proj.data)[2] = math.inf
        return step(trainer)

    loop.Trainer._train_step = hurt


def late_and_wrong() -> None:
    """Rank 1 answers others late, and not what they asked for."""
    pairs.ASKS[pairs.SMALL] = 5
    answer, content = pairs.Partners.answer, pairs.Partners.content

    def late(self: pairs.Partners, other: int, turn: int, size: int) -> Any:
        time.sleep(0.1 if size == pairs.SMALL else 0)
        return answer(self, other, turn, size)

    def spoilt(self: pairs.Partners, of: int, to: int, turn: int, size: int) -> Any:
        right = content(self, of, to, turn, size)
        return right + 1 if of == self.ranks.rank else right

    if os.environ["RANK"] == RANK_1:
        pairs.Partners.answer, pairs.Partners.content = late, spoilt


def goes_back_past_a_placement() -> None:
    """In the sixth step the norm is no number, and the newest checkpoint is damaged."""
    nothing()
    train_step, gradients = loop.Trainer._train_step, Step.gradients

    def damages(trainer: loop.Trainer) -> Any:
        if trainer.step == 5:
            trainer.saver.wait()
        if trainer.step == 5 and trainer.ranks.is_first:
            part = trainer.checkpoints / "step-00000004" / "__0_0.distcp"
            part.write_bytes(part.read_bytes()[:-1])
        return train_step(trainer)

    def now(step: Step, number: int) -> Any:
        loss, norm, counts = gradients(step, number)
        return loss, math.nan if number == 5 else norm, counts

    loop.Trainer._train_step, Step.gradients = damages, now
