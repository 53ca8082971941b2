"""The Top-1 balancing loss, beside the plain one that it replaces at one expert a token."""

import forked
import pytest
import torch
from support import tolerance, top1_balance_rank

import sigma_kernels as sk
from sigma_kernels import nn

E = 96


def defined(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """The equation, token by token in its words."""
    q = (logits / temperature).softmax(-1)
    return q.shape[1] * q.mean(0).square().sum() / q.max(-1).values.mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 7, 4096])
def test_equals_its_equation(T, dtype):
    """Defends: the squares, the temperature, sums in f32 of narrow logits, dtypes of value and gradient."""
    logits = torch.randn(T, E).to(dtype).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    loss, want = nn.top1_balancing_loss(logits, 0.3), defined(wide, 0.3)
    bound = tolerance(torch.promote_types(dtype, torch.float32), T)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(loss.double(), want, rtol=bound, atol=0)
    loss.backward()
    want.backward()
    assert logits.grad.dtype == dtype
    if dtype in (torch.float32, torch.float64):  # of rounded logits several are the largest: no one gradient
        size = wide.grad.abs().max().item()
        torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=bound, atol=bound * size)


def test_values_by_hand():
    """1 at its best, E at both of its worst, and a case between: q = (3/4, 1/4), (1/4, 3/4), (3/4, 1/4)."""
    one_each = 1e3 * torch.eye(E)
    assert nn.top1_balancing_loss(one_each).item() == 1
    assert nn.top1_balancing_loss(torch.zeros(50, E)).item() == pytest.approx(E)
    assert nn.top1_balancing_loss(one_each[:1].expand(50, E)).item() == E
    logits = torch.tensor([[3.0, 1.0], [1.0, 3.0], [3.0, 1.0]]).log()
    assert nn.top1_balancing_loss(logits, 1.0).item() == pytest.approx(2 * (7**2 + 5**2) / 12**2 / (3 / 4))
    assert nn.top1_balancing_loss(2 * logits, 2.0).item() == nn.top1_balancing_loss(logits, 1.0).item()
    assert nn.top1_balancing_loss(torch.randn(50, 1)).item() == 1


def test_no_tokens_have_no_imbalance():
    """Defends: 0 / 0, in the value and in the gradient."""
    logits = torch.zeros(0, E, requires_grad=True)
    loss = nn.top1_balancing_loss(logits)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.shape == (0, E)


def test_gradient_in_f64():
    logits = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    for temperature in (1.0, 0.1):
        assert torch.autograd.gradcheck(lambda l, t=temperature: nn.top1_balancing_loss(l, t), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_tensor_of_the_size_of_the_logits_is_kept(dtype):
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    logits = torch.randn(512, E, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        nn.top1_balancing_loss(logits).backward()
    assert sum(kept.values()) < 1.1 * 512 * E * 4


@pytest.mark.parametrize(
    "lean, whole, at_a_hundredth",
    [(torch.eye(E)[0], 1.05, 1e-3), (2 * torch.linspace(-1, 1, E), 2.0, 2e-2)],
    ids=["one expert", "a slope"],
)
def test_the_plain_loss_is_blind_where_this_one_is_not(lean, whole, at_a_hundredth):
    """Smaller logits choose the same, as unevenly: the plain loss falls to its least, this one rises to its worst.

    Of logits g z it is 1 + g sum_i f_i lean_i to first order: at g = 0.01 within 1e-3 of 1 where the load leans to one
    expert, and 0.016 above it where it leans to half of them.
    """
    logits = torch.randn(4096, E) + lean
    counts = sk.route(logits).counts
    uneven = counts.max().item() * E / 4096
    assert uneven > 4
    plain, top1 = [], []
    for scale in (1.0, 0.3, 0.1, 0.01):
        routing = sk.route(scale * logits)
        assert torch.equal(routing.counts, counts)
        plain.append(nn.load_balancing_loss(scale * logits, routing.counts).item())
        top1.append(nn.top1_balancing_loss(scale * logits, 1.0).item())
    assert plain == sorted(plain, reverse=True)
    assert plain[0] > whole
    assert plain[-1] == pytest.approx(1.0, abs=at_a_hundredth)
    assert nn.load_balancing_loss(1e-4 * logits, counts).item() == pytest.approx(1.0, abs=1e-3)
    assert top1 == sorted(top1)
    assert nn.top1_balancing_loss(1e-4 * logits, 1.0).item() == pytest.approx(E, rel=1e-2)


def test_global_loss_of_ranks_is_that_of_the_whole(tmp_path):
    """Defends: a gradient of the rank's own share alone, ranks with fewer tokens or none, means of means."""
    logits = torch.randn(8, 5, dtype=torch.float64)
    whole = logits.clone().requires_grad_()
    loss = nn.top1_balancing_loss(whole, 0.5)
    loss.backward()
    assert torch.equal(nn.top1_balancing_loss(logits, 0.5, is_global=True), loss.detach())
    forked.spawn(top1_balance_rank, (str(tmp_path / "store"), logits, loss.item(), whole.grad.tolist()), 3)


@pytest.mark.parametrize(
    "call, kind, told",
    [
        (lambda: nn.top1_balancing_loss(torch.zeros(4)), ValueError, r"logits must be \[T, E\], found \[4\]"),
        (lambda: nn.top1_balancing_loss(torch.zeros(4, 2).int()), TypeError, "logits must be floating point"),
        *(
            (
                lambda t=t: nn.top1_balancing_loss(torch.zeros(4, 2), t),
                ValueError,
                f"temperature must be a finite number above 0, found {t}",
            )
            for t in (0, -1.0, float("inf"), float("nan"))
        ),
    ],
)
def test_errors_name_the_argument(call, kind, told):
    with pytest.raises(kind, match=f"top1_balancing_loss: {told}"):
        call()
