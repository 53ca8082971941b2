"""What placing experts by load does to ranks of skewed load, and what moving them costs.

    python bench/placement.py --ranks 4 --skew 1.2
    python bench/placement.py --reach

Shape A over gloo, top-1, Zipf-skewed choices, with hot experts beside one another and anywhere: the busiest rank's
load over the mean, a layer's forward and backward on all ranks (median and range of rounds in turn), and the bytes of
weights and moments that a rank sends to others while experts move.  A thread a rank: where ranks are more than cores
they take turns, so that times gain less than loads do.  `--reach` is the loads alone, by skew and number of ranks,
without a process.
"""

import argparse
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from ranks import Calls, several
from shapes import A

import sigma_kernels as sk
from sigma_kernels.distributed import ExpertParallelMoE, balanced_placement, rank_load


def calls_of(skew: float, are_neighbours: bool, T: int) -> Calls:
    """Of one rank: a step in order of numbers and one placed, experts that move, and loads."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    share = torch.arange(1, A.E + 1, dtype=torch.float64) ** -skew
    share = share if are_neighbours else share[torch.randperm(A.E, generator=generator)]
    choices = torch.multinomial(share, ranks * T, replacement=True, generator=generator)
    load = choices.bincount(minlength=A.E)
    routing = sk.group_by_expert(choices.view(ranks, T, 1)[rank], A.E)
    moe = ExpertParallelMoE(A.H, A.I, A.E)
    optimizer = torch.optim.AdamW(moe.experts.parameters(), lr=1e-4, fused=True)
    x = torch.randn(T, A.H)
    placement = balanced_placement(load, ranks)

    def step() -> None:
        moe.answered(x, routing).sum().backward()
        for parameter in moe.experts.parameters():
            parameter.grad = None
        dist.barrier()

    def learned() -> None:
        moe.answered(x, routing).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def place(places: torch.Tensor | None) -> int:
        dist.barrier()
        sent = torch.tensor(moe.place(places, optimizer))
        dist.all_reduce(sent)
        return int(sent)

    return {
        "learned": learned,
        "step": step,
        "placed": lambda: place(placement),
        "in order": lambda: place(None),
        "told": lambda: (rank_load(load, ranks), rank_load(load, ranks, placement), placement),
    }


def reach(draws: int = 20, choices: int = 16_384) -> None:
    """Mean over draws of the busiest rank's load over the mean, beside what no placement goes below."""
    generator = torch.Generator().manual_seed(0)
    print(
        "| skew | ranks | in order, hot ones beside one another | in order, hot ones anywhere | placed | bound |"
    )
    print("|---" * 6 + "|")
    for skew, ranks in ((0.5, 4), (0.5, 16), (1.0, 4), (1.0, 8), (1.2, 4), (1.2, 8)):
        share = torch.arange(1, A.E + 1, dtype=torch.float64) ** -skew
        found = []
        for _ in range(draws):
            drawn = torch.multinomial(share, choices, replacement=True, generator=generator)
            load = drawn.bincount(minlength=A.E)
            anywhere = load[torch.randperm(A.E, generator=generator)]
            placed = rank_load(anywhere, ranks, balanced_placement(anywhere, ranks)).max()
            least = load.max() + load.sort().values[: A.E // ranks - 1].sum()
            most = [rank_load(load, ranks).max(), rank_load(anywhere, ranks).max(), placed, least]
            found.append([x.item() * ranks / choices for x in most])
        *three, bound = torch.tensor(found).clamp(min=1).mean(0).tolist()
        print(f"| {skew} | {ranks} | " + " | ".join(f"{x:.2f}" for x in (*three, bound)) + " |")


def seconds(call: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    found = call()
    return time.perf_counter() - began, found


def middle(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values) * 1e3:.0f} ms ({low * 1e3:.0f} to {high * 1e3:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--skew", type=float, default=1.2)
    parser.add_argument("--tokens", type=int, default=512, help="of each rank")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--reach", action="store_true", help="what placements reach, in a table")
    args = parser.parse_args()
    if args.reach:
        reach()
        return
    for are_neighbours in (True, False):
        with several(args.ranks, calls_of, args.skew, are_neighbours, args.tokens) as calls:
            calls["learned"]()
            before, after, placement = calls["told"]()
            steps: dict[str, list[float]] = {"in order": [], "placed": []}
            moves, sent = [], 0
            for _ in range(args.rounds):
                for name, times in steps.items():
                    took, sent = seconds(calls[name])
                    moves.append(took)
                    calls["step"]()
                    times += [seconds(calls["step"])[0] for _ in range(2)]
            moves = moves[1:]  # the first had nothing to move
        moved = int((placement != torch.arange(A.E)).sum())
        each = sent / args.ranks
        print(f"hot experts {'beside one another' if are_neighbours else 'anywhere'}:")
        for name, loads in (("in order", before), ("placed", after)):
            ratio = loads.max().item() * args.ranks / loads.sum().item()
            print(f"  {name}: busiest rank {ratio:.2f} of the mean, step {middle(steps[name])}")
        print(
            f"  {moved} of {A.E} experts move, {each / 1e6:.0f} MB from each rank in {middle(moves)}, "
            f"{each / statistics.median(moves) / 1e9:.2f} GB/s a rank"
        )


if __name__ == "__main__":
    main()
