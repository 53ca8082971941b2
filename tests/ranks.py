"""What the ranks of tests/test_distributed.py compute and compare; in a module, as a spawned process imports it."""

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from support import assert_close, tolerance
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import sigma_kernels as sk
from sigma_kernels.distributed import ExpertParallelMoE, combine, dispatch
from sigma_kernels.distributed.moe import local

# Tokens of each rank: uneven, one, none.
TOKENS = {2: [(37, 20), (1, 0), (0, 0)], 4: [(20, 1, 33, 0), (5, 5, 5, 5)]}


def run(rank: int, checks: tuple[str, ...], ranks: int, path: str) -> None:
    """One rank of a group on gloo."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    try:
        for check in checks:
            torch.manual_seed(0)  # the same weights everywhere
            CHECKS[check](rank, ranks)
    finally:
        dist.destroy_process_group()


def tokens(counts: tuple[int, ...], rank: int, H: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Those of all ranks, which each of them knows, and the rank's own as a leaf."""
    everyone = [torch.randn(T, H).to(dtype) for T in counts]
    return everyone, everyone[rank].clone().requires_grad_()


def layer(rank: int, ranks: int) -> None:
    """Output and every gradient equal those of one process that has all experts and all tokens."""
    E, H, I = 4 * ranks, 24, 20
    for dtype in (torch.float32, torch.bfloat16):
        for k in (1, 3):
            for counts in TOKENS[ranks]:
                whole = sk.nn.MoE(H, I, E, k, score="sigmoid").to(dtype)
                part = ExpertParallelMoE.from_whole(whole)
                everyone, x = tokens(counts, rank, H, dtype)
                outs = [whole(t) for t in everyone]
                grads = [torch.randn(t.shape).to(dtype) for t in everyone]
                with torch.autocast("cpu", torch.bfloat16):  # tokens in f32 beside experts in another dtype
                    wide = everyone[rank].float()
                    assert part(wide).dtype == whole(wide).dtype == torch.float32
                    assert_close(part(wide), whole(wide), tolerance(dtype, 4))
                got = part(x)
                bound = tolerance(dtype, H if dtype == torch.float32 else 4)
                assert_close(got, outs[rank], bound)
                own = x.detach().clone().requires_grad_()
                (of_x, of_router) = torch.autograd.grad(
                    whole(own), [own, whole.router.weight], grads[rank], retain_graph=True
                )
                torch.autograd.backward(outs, grads)
                got.backward(grads[rank])
                assert_close(x.grad, of_x, bound)
                assert_close(part.router.weight.grad, of_router, bound)
                mine = slice(4 * rank, 4 * rank + 4)
                for name, parameter in part.experts.named_parameters():
                    want = getattr(whole.experts, name).grad[mine]
                    assert_close(parameter.grad, want, bound)


def crowded(rank: int, ranks: int) -> None:
    """All tokens of all ranks for one expert of the last: the others compute nothing and wait for nothing."""
    E, H = 2 * ranks, 16
    x = torch.randn(30 + rank, H)
    index = torch.full((x.shape[0], 1), E - 1)
    sent = dispatch(x, sk.group_by_expert(index, E))
    assert sent.rows.shape[0] == (sum(30 + r for r in range(ranks)) if rank == ranks - 1 else 0)
    assert sent.send == [0] * (ranks - 1) + [x.shape[0]]
    assert torch.equal(combine(sent.rows * 2, sent), 2 * x)


def order(rank: int, ranks: int) -> None:
    """Rows come by rank, then by expert, then by token; strided tokens are sent as they are."""
    E, T = 2 * ranks, 10
    x = (1000.0 * rank + torch.arange(T))[:, None].expand(T, 3)
    index = torch.arange(T)[:, None] % E
    sent = dispatch(x, sk.group_by_expert(index, E))
    want = [
        1000.0 * r + t for r in range(ranks) for e in (2 * rank, 2 * rank + 1) for t in range(T) if t % E == e
    ]
    assert torch.equal(sent.rows, torch.tensor(want)[:, None].expand(-1, 3))
    local = [
        e - 2 * rank for r in range(ranks) for e in (2 * rank, 2 * rank + 1) for t in range(T) if t % E == e
    ]
    assert sent.routing.indices.flatten().tolist() == local
    assert sent.routing.counts.tolist() == [local.count(0), local.count(1)]


def visits(rank: int, ranks: int) -> None:
    """A token goes to a rank once, with what its experts there need to know; absent choices go nowhere."""
    E, H, T, k = 3 * ranks, 8, 30, 5
    x = torch.randn(T, H)
    routing = sk.route(torch.randn(T, E), k)
    limited, _ = sk.limit_rows(routing, 4)
    for each in (routing, limited):
        goes_to = each.indices // 3
        sent = dispatch(x, each)
        want = [[t for t in range(T) if (goes_to[t] == p).any()] for p in range(ranks)]
        assert sent.send == [len(tokens) for tokens in want], (
            "a token was sent twice, or where nobody waits for it"
        )
        everyone = [None] * ranks
        dist.all_gather_object(everyone, (x, each.indices, each.weights, want))
        rows, choices = [], {}
        for tokens, indices, weights, sends in everyone:
            for t in sends[rank]:
                mine = {
                    e - 3 * rank: w for e, w in zip(indices[t].tolist(), weights[t].tolist(), strict=True)
                }
                choices[len(rows)] = {e: w for e, w in mine.items() if 0 <= e < 3}
                rows.append(tokens[t])
        assert torch.equal(sent.rows, torch.stack(rows))
        got = sent.routing
        for r, want_of_row in choices.items():
            pairs = zip(got.indices[r].tolist(), got.weights[r].tolist(), strict=True)
            assert {e: w for e, w in pairs if e < 3} == want_of_row
        assert got.row_map.shape[0] == sum(map(len, choices.values())) == got.counts.sum()


def chunks(rank: int, ranks: int) -> None:
    """Experts in chunks say the same, in forward and backward, with choices that are left out too."""
    large = (
        1,
        1024,
        2100,
        torch.bfloat16,
    )  # 34 MB of a rank's gate and up in bf16: gradients lie in kept memory
    for k, H, I, dtype in (
        (1, 24, 16, torch.float32),
        (3, 24, 16, torch.float32),
        (2, 24, 16, torch.bfloat16),
        large,
    ):
        torch.manual_seed(k)
        whole = sk.nn.MoE(H, I, 4 * ranks, k, capacity_factor=1.2).to(dtype)
        parts = [ExpertParallelMoE.from_whole(whole, chunks=n) for n in (1, 2, 4)]
        _, x = tokens(TOKENS[ranks][0], rank, H, dtype)
        grad = torch.randn(x.shape).to(dtype)
        found = []
        for part in parts:
            out = part(x)
            found.append([out, *torch.autograd.grad(out, [x, *part.parameters()], grad)])
        bound = tolerance(dtype, 24 if dtype == torch.float32 else 4)
        for other in found[1:]:
            for got, want in zip(other, found[0], strict=True):
                assert_close(got, want, bound)
    assert "chunks must divide the 4 experts of a rank, found 3" in caught(
        ValueError, lambda: ExpertParallelMoE(16, 8, 4 * ranks, chunks=3)
    )
    assert "chunks must be an integer, found 2.0" in caught(
        TypeError, lambda: ExpertParallelMoE(16, 8, 4 * ranks, chunks=2.0)
    )


def payloads(rank: int, ranks: int) -> None:
    """Rows in fewer bytes are what they were to the rounding of a block's scale, gradients to that of bf16."""
    E, H, T = 2 * ranks, 300, 50  # two blocks of columns and a part
    for k in (1, 2):
        torch.manual_seed(k)
        routing = sk.route(torch.randn(T, E), k)
        x = (torch.randn(T, H) * torch.logspace(-20, 20, T)[:, None]).requires_grad_()
        grad = torch.randn(T, H)
        want = dispatch(x, routing).rows
        blocks = torch.nn.functional.pad(want.detach(), (0, 84)).view(-1, 3, 128).abs().amax(2)
        largest = blocks.repeat_interleave(128, 1)[:, :H]
        for payload, of_number, of_block in (
            ("bf16", 2**-8, 0.0),
            ("int8", 0.0, 0.5 / 127),
            ("fp8", 2**-4, 2**-10 / 448),
        ):
            sent = dispatch(x, routing, payload=payload)
            assert sent.rows.dtype == torch.float32
            assert (
                (sent.rows - want).abs() <= (of_number * want.abs() + of_block * largest) * 1.001
            ).all(), payload
            answers = (
                sent.rows
                if k == 1
                else sent.rows * (sent.routing.weights * (sent.routing.indices < 2)).sum(1, True)
            )
            (got,) = torch.autograd.grad(combine(answers, sent), x, grad)
            assert_close(got, grad * routing.weights.sum(1, keepdim=True), tolerance(torch.bfloat16, 4))
    part = ExpertParallelMoE(16, 8, 2 * ranks, payload="int8", chunks=2)
    part(torch.randn(5, 16)).sum().backward()
    assert "payload must be one of same, bf16, int8, fp8, found 'f16'" in caught(
        ValueError, lambda: dispatch(x, routing, payload="f16")
    )


def limited(rank: int, ranks: int) -> None:
    """A layer that leaves choices out says the same on ranks as on one, each rank's tokens having their own limit."""
    for k in (1, 2):
        torch.manual_seed(k)
        whole = sk.nn.MoE(24, 16, 2 * ranks, k, capacity_factor=0.7, drop="last")
        part = ExpertParallelMoE.from_whole(whole)
        everyone, x = tokens((20, 9, 0, 1), rank, 24, torch.float32)
        outs = [whole(t) for t in everyone]
        got = part(x)
        assert_close(got, outs[rank], tolerance(torch.float32, 24))
        outs_of_mine = whole(everyone[rank])
        assert torch.equal(part.last_dropped, whole.last_dropped)
        assert len(x) < 2 or part.last_dropped.sum() > 0
        grad = torch.randn(x.shape)
        (want,) = torch.autograd.grad(outs_of_mine, whole.router.weight, grad)
        torch.autograd.backward(
            outs, [torch.zeros_like(o) if r != rank else grad for r, o in enumerate(outs)]
        )
        got.backward(grad)
        assert_close(part.router.weight.grad, want, tolerance(torch.float32, 24))


def shuffled(E: int, seed: int) -> Tensor:
    """A placement that is not its own inverse."""
    found = torch.randperm(E, generator=torch.Generator().manual_seed(seed))
    assert not torch.equal(found[found], torch.arange(E))
    return found


def outcome(part: ExpertParallelMoE, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients, those of experts by the experts' numbers."""
    out = part(x)
    leaves = [x, part.router.weight, *part.experts.parameters()]
    of_x, of_router, *of_experts = torch.autograd.grad(out, leaves, grad)
    return [out, of_x, of_router, *(by_number(part, rows) for rows in of_experts)]


def by_number(part: ExpertParallelMoE, rows: Tensor) -> Tensor:
    """Rows of all ranks' experts, in the order of their numbers."""
    ranks = dist.get_world_size()
    everyone = [torch.empty_like(rows) for _ in range(ranks)]
    dist.all_gather(everyone, rows.contiguous())
    in_places = torch.cat(everyone)
    if part.placement is None:
        return in_places
    return torch.stack([in_places[place] for place in part.placement.tolist()])


def placed(rank: int, ranks: int) -> None:
    """Wherever experts stand the layer is the same, with one choice bit for bit, and what it shows is by number."""
    E = 4 * ranks
    for k, options in (
        (1, {}),
        (1, {"capacity_factor": 0.8, "drop": "last"}),
        (2, {}),
        (3, {"capacity_factor": 1.2}),
    ):
        torch.manual_seed(k)
        whole = sk.nn.MoE(24, 16, E, k, **options)
        _, x = tokens(TOKENS[ranks][0], rank, 24, torch.float32)
        grad = torch.randn(x.shape)
        places = shuffled(E, k)
        for wire in ({}, {"chunks": 2}, {"payload": "int8"}):
            part = ExpertParallelMoE.from_whole(whole, **wire)
            other = ExpertParallelMoE.from_whole(whole, placement=places.int(), **wire)
            assert [int(places[e]) for e in other.held] == [*range(4 * rank, 4 * rank + 4)]
            assert torch.equal(other.experts.down_proj, whole.experts.down_proj[other.held])
            for got, want in zip(outcome(other, x, grad), outcome(part, x, grad), strict=True):
                if k == 1:
                    assert torch.equal(got, want), (wire, options)
                else:
                    bound = torch.bfloat16 if "payload" in wire else torch.float32
                    assert_close(got, want, tolerance(bound, 24))
            for got, want in zip(other.last_routing, part.last_routing, strict=True):
                assert torch.equal(got, want)
        again = ExpertParallelMoE(24, 16, E, k, placement=places, **options)
        again.load_state_dict(other.state_dict())
        assert torch.equal(again(x), ExpertParallelMoE.from_whole(whole, placement=places)(x))
        assert "placement" not in part.state_dict()


def moved(rank: int, ranks: int) -> None:
    """A layer whose experts move while it learns is the one whose experts stay, moments and all, bit for bit."""
    E = 4 * ranks
    mesh = init_device_mesh("cpu", (ranks,))
    for group in (None, mesh):
        torch.manual_seed(1)
        whole = sk.nn.MoE(24, 16, E)
        layers = [ExpertParallelMoE.from_whole(whole, group) for _ in range(2)]
        for moe in layers:
            moe.router.requires_grad_(False)  # of each rank's own tokens
        optimizers = [torch.optim.AdamW(moe.experts.parameters(), lr=0.1, fused=True) for moe in layers]
        still, goes = layers
        for step, places in enumerate([None, shuffled(E, 1), None, shuffled(E, 2), torch.arange(E)]):
            x = torch.randn(ranks, 40, 24)[rank]
            for moe, optimizer in zip(layers, optimizers, strict=True):
                moe(x).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                moe(x).sum().backward()  # a gradient to be there when experts move, and to be added to
            if step:
                before = list(goes.experts.parameters())
                leaving = [e for e in goes.held if (e if places is None else int(places[e])) // 4 != rank]
                sent = goes.place(places, optimizers[1])
                assert sent == len(leaving) * 4 * 3 * 16 * 24 * 4, "bytes of weight, gradient and two moments"
                assert all(a is b for a, b in zip(before, goes.experts.parameters(), strict=True))
        assert "placement" not in goes.state_dict()
        for a, b in zip(still.experts.parameters(), goes.experts.parameters(), strict=True):
            states = [optimizer.state[p] for optimizer, p in zip(optimizers, (a, b), strict=True)]
            for want, got in ((a, b), (a.grad, b.grad), *((states[0][n], states[1][n]) for n in states[0])):
                want, got = (local(t.detach()) for t in (want, got))
                assert torch.equal(got, want)


def group_of_two(rank: int, ranks: int) -> None:
    """Experts shared by pairs: a group that is not everyone, in which a rank has another place."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    whole = sk.nn.MoE(16, 8, 6)
    part = ExpertParallelMoE.from_whole(whole, groups[rank // 2])
    x = torch.randn(4, 9, 16)[rank]
    assert_close(part(x), whole(x), tolerance(torch.float32, 16))
    assert part.experts.down_proj.shape[0] == 3


def refused(rank: int, ranks: int) -> None:
    """Before anything is sent, so that no rank waits for one that raised."""
    for call in (
        lambda: ExpertParallelMoE(16, 8, 2 * ranks + 1),
        lambda: dispatch(torch.randn(4, 8), sk.route(torch.randn(4, 2 * ranks + 1))),
    ):
        message = caught(ValueError, call)
        assert f"must be a multiple of the {ranks} ranks, found E={2 * ranks + 1}" in message, message
    plane = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("a", "b"))
    assert "of one dimension, found 2" in caught(ValueError, lambda: ExpertParallelMoE(16, 8, 4, group=plane))
    assert "must be a ProcessGroup, found str" in caught(
        TypeError, lambda: ExpertParallelMoE(16, 8, 4, group="x")
    )
    E = 2 * ranks
    whole = sk.nn.MoE(16, 8, E)
    part, in_order = ExpertParallelMoE.from_whole(whole), torch.arange(E)
    optimizer = torch.optim.SGD(part.parameters())
    optimizer.state[part.experts.down_proj]["rows"] = torch.ones(3, 5)
    for kind, placement, told in (
        (TypeError, in_order.tolist(), "placement must be a Tensor, found list"),
        (TypeError, in_order.float(), "placement must be int32 or int64, found torch.float32"),
        (ValueError, in_order[1:], f"placement must be [{E}], found [{E - 1}]"),
        (ValueError, in_order + 1, f"place of its own in 0..{E - 1}, found {E} at expert {E - 1}"),
        (ValueError, in_order // 2, f"place of its own in 0..{E - 1}, found 0 a second time at expert 1"),
    ):
        for call in (
            lambda placement=placement: ExpertParallelMoE(16, 8, E, placement=placement),
            lambda placement=placement: ExpertParallelMoE.from_whole(whole, placement=placement),
            lambda placement=placement: part.place(placement),
        ):
            message = caught(kind, call)
            assert message.startswith("ExpertParallelMoE: placement must ")
            assert told in message, message
    message = caught(ValueError, lambda: part.place(in_order.flip(0), optimizer))
    assert "the optimizer's rows of down_proj must have a row for each of 2 experts, found [3, 5]" in message
    message = caught(TypeError, lambda: part.place(in_order.flip(0), "adam"))
    assert message == "ExpertParallelMoE.place: optimizer must be one, found str"
    assert part.placement is None
    routing = sk.route(torch.randn(4, 2 * ranks))
    if rank == 0:  # alone: the others must not be left waiting
        assert "x must be [4, H], found [5, 8]" in caught(
            ValueError, lambda: dispatch(torch.randn(5, 8), routing)
        )
        assert "not int32" in caught(RuntimeError, lambda: dispatch(torch.ones(4, 8).int(), routing))
        several = sk.route(torch.randn(4, 2 * ranks), 2)
        for fields, told in (
            ({"weights": several.weights[:2]}, "dispatch: routing.weights must be [4, 2], found [2, 2]"),
            ({"indices": several.indices + 99}, f"dispatch: expert indices must lie in 0..{2 * ranks - 1} "),
        ):
            message = caught(
                ValueError, lambda fields=fields: dispatch(torch.randn(4, 8), several._replace(**fields))
            )
            assert told in message, message
    sent = dispatch(torch.randn(4, 8), routing)
    message = caught(ValueError, lambda: combine(torch.randn(sent.rows.shape[0] + 1, 8), sent))
    assert f"y must be [{sent.rows.shape[0]}, H]" in message, message


def caught(kind: type[Exception], call: Callable[[], object]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


CHECKS = {
    f.__name__: f
    for f in (
        *(layer, crowded, order, visits, chunks, payloads, limited, placed, moved, group_of_two, refused),
    )
}
