"""What chunks and payloads gain where ranks are joined by a slow link.

    python bench/slow_link.py --rate 1 --tokens 4096

Two gloo ranks, a thread and a core each, in a network of their own whose loopback passes so many Gbit/s, all directions
together (Linux's token bucket; wants `unshare`, `ip` and `tc`, and the right to use them).  Shape A, top-1, balanced,
so many tokens a rank.  Medians of rounds in turn, of the slower rank: exchange and experts alone, the layer with its
experts in chunks, and with other payloads.  `hidden`: what chunks save, over the smaller of exchange and experts, which
is all that could be hidden.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ranks import Calls

INSIDE = "SIGMA_SLOW_LINK"
LAYERS = [(payload, chunks) for payload in ("same", "bf16", "int8", "fp8") for chunks in (1, 2, 4)]


def calls_of(T: int, backward: bool) -> "Calls":
    """Of one rank; each returns the seconds that it took from a barrier on."""
    import torch  # here: not before there is the link
    import torch.distributed as dist
    from shapes import A

    import sigma_kernels as sk
    from sigma_kernels.distributed import ExpertParallelMoE, combine, dispatch

    torch.manual_seed(dist.get_rank())
    choices = torch.arange(T)[:, None] % A.E
    routing = sk.group_by_expert(choices.int(), A.E)
    x, grad = torch.randn(T, A.H, requires_grad=True), torch.randn(T, A.H)
    whole = ExpertParallelMoE(A.H, A.I, A.E)
    sent = dispatch(x.detach(), routing)
    rows, grad_rows = sent.rows.clone().requires_grad_(), torch.randn(sent.rows.shape)
    weights = whole.experts.gate_up_proj, whole.experts.down_proj

    def timed(call, of, grad):
        def run() -> float:
            dist.barrier()
            begin = time.perf_counter()
            out = call()
            if backward:
                torch.autograd.grad(out, of, grad)
            return time.perf_counter() - begin

        return run if backward else torch.no_grad()(run)

    def layer(payload: str, chunks: int):
        moe = ExpertParallelMoE(A.H, A.I, A.E, chunks=chunks, payload=payload)
        moe.experts = whole.experts
        return timed(lambda: moe.answered(x, routing), [x, *weights], grad)

    def exchange():
        there = dispatch(x, routing)
        return combine(there.rows, there)

    def experts():
        return sk.distributed.moe.experts_of_routing(rows, sent.routing, *weights)

    calls = {str(key): layer(*key) for key in LAYERS}
    calls["exchange"] = timed(exchange, [x], grad)
    calls["experts"] = timed(experts, [rows, *weights], grad_rows)

    def slower(call):
        def run() -> float:
            seconds = torch.tensor(call(), dtype=torch.float64)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            return float(seconds)

        return run

    return {name: slower(call) for name, call in calls.items()}


def race(T: int, backward: bool, rounds: int) -> dict[str, float]:
    from ranks import several

    with several(2, calls_of, T, backward) as calls:
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds + 1):
            for name, call in calls.items():
                found = call()
                if turn:  # the first warms up
                    seconds[name].append(found)
    return {name: statistics.median(found) for name, found in seconds.items()}


def enter(rate: float) -> None:
    """This command again, in a network of its own."""
    for tool, package in {"unshare": "util-linux", "ip": "iproute2", "tc": "iproute2"}.items():
        if shutil.which(tool) is None:
            sys.exit(f"slow_link: {tool} is not installed; the package {package} brings it")
    link = (
        f"ip link set lo up && tc qdisc add dev lo root tbf rate {rate * 1000:.0f}mbit burst 256kb latency 2s"
    )
    probe = subprocess.run(["unshare", "--net", "sh", "-c", link], capture_output=True, text=True)
    if probe.returncode:
        why = " ".join(probe.stderr.split())
        sys.exit(f"slow_link: no network of its own at {rate:g} Gbit/s, which root may make: {why}")
    code = subprocess.run(
        ["unshare", "--net", "sh", "-c", f'{link} && exec "$0" "$@"', sys.executable, *sys.argv],
        env={**os.environ, INSIDE: "1", "GLOO_SOCKET_IFNAME": "lo"},
    ).returncode
    sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, required=True, help="Gbit/s")
    parser.add_argument("--tokens", type=int, default=1024, help="of each rank")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if INSIDE not in os.environ:
        enter(arguments.rate)
    print(f"{arguments.rate:g} Gbit/s, {arguments.tokens} tokens a rank, {arguments.rounds} rounds\n")
    columns = (
        "direction",
        "exchange, ms",
        "experts, ms",
        "payload",
        "chunks",
        "layer, ms",
        "over same, 1",
        "hidden",
    )
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for backward in (False, True):
        ms = {name: s * 1e3 for name, s in race(arguments.tokens, backward, arguments.rounds).items()}
        whole, least = ms[str(("same", 1))], min(ms["exchange"], ms["experts"])
        for payload, chunks in LAYERS:
            took = ms[str((payload, chunks))]
            hidden = f"{(whole - took) / least:.0%}" if payload == "same" and chunks > 1 else ""
            cells = (
                f"forward{'+backward' * backward}", f"{ms['exchange']:.0f}", f"{ms['experts']:.0f}", payload, chunks,
                f"{took:.0f}", f"{took / whole:.2f}", hidden,
            )  # fmt: skip
            print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
