"""The loss that a teacher of another vocabulary guides: aggregates, gaps, what is kept, gradients."""

import math
import random
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sigma_train.alignment import align_spans, byte_share
from sigma_train.kinds import Aggregate
from sigma_train.selection import Selection, weighted_mean
from sigma_train.spans import spans_of_lengths
from sigma_train.teacher_loss import TeacherGuidedLoss, aggregate_teacher_loss, gap
from sigma_train.uld import uld_loss, uld_to_highest

STUDENT, TEACHER = torch.tensor([2.0, 3.0, 1.0]), torch.tensor([0.5, 2.0])
RANGES = torch.tensor([[0, 0], [0, 1], [1, 1]])  # of "Professor", without the special tokens
EXPECTED = {  # aggregate: the teacher's losses, the gaps, L with one token of three
    "max": ([0.5, 2, 2], [1.5, 1, -1], 2.0),
    "mean": ([0.5, 1.25, 2], [1.5, 1.75, -1], 3.0),
    "sum": ([0.5, 2.5, 2], [1.5, 0.5, -1], 2.0),
    "first": ([0.5, 0.5, 2], [1.5, 2.5, -1], 3.0),
}


@pytest.mark.parametrize("how", EXPECTED)
def test_aggregates_gaps_and_the_kept_token(how):
    targets, gaps, loss = EXPECTED[how]
    got = aggregate_teacher_loss(TEACHER, RANGES, how)
    assert got.tolist() == targets
    assert gap(STUDENT, got)[0].tolist() == gaps
    assert TeacherGuidedLoss(0.4, aggregate=how)(STUDENT, TEACHER, RANGES).item() == loss


def test_identical_tokenisations_leave_the_plain_difference():
    """Whatever the aggregate: gap_i is l_s[i] - l_t[i], exactly."""
    spans = torch.from_numpy(spans_of_lengths(np.array([3, 1, 4, 1, 5])))
    ranges = align_spans(spans, spans)
    student, teacher = torch.tensor([2.5, 0.125, 3, 7, 1]), torch.tensor([1.25, 4, 3, 0.5, 0.75])
    for how in get_args(Aggregate):
        share = byte_share(spans, spans, ranges) if how == "bytes" else None
        gaps, has_one = gap(student, aggregate_teacher_loss(teacher, ranges, how, share))
        assert gaps.tolist() == [1.25, -3.875, 0, 6.5, 0.25]
        assert has_one.all()


def test_losses_by_bytes():
    """Pro|fess|or against Prof|essor: 0.5 over 4 bytes, 2.5 over 9, 2 over 5.  A character in three parts is 3 bytes.

    Defends: a share of tokens instead of bytes, bytes that a token shares counted twice, a special token with a share.
    """
    student, teacher = torch.tensor([[0, 0], [0, 3], [3, 7], [7, 9]]), torch.tensor([[0, 4], [4, 9]])
    ranges = align_spans(student, teacher)
    share = byte_share(student, teacher, ranges)
    assert share.isnan().tolist() == [True, False, False, False]
    got = aggregate_teacher_loss(TEACHER.double(), ranges, "bytes", share)[1:]
    assert got.tolist() == pytest.approx([0.375, 10 / 9, 0.8], rel=1e-15)
    loss = TeacherGuidedLoss(0.4, "exclude", aggregate="bytes")
    assert loss(torch.tensor([9.0, 2, 3, 1]), TEACHER, ranges, share).item() == 3
    parts, whole = torch.tensor([[0, 3], [0, 3], [0, 3]]), torch.tensor([[0, 3]])
    ranges = align_spans(whole, parts)
    share = byte_share(whole, parts, ranges)
    assert aggregate_teacher_loss(torch.tensor([1.0, 2, 4]), ranges, "bytes", share).tolist() == [7]


def test_an_unmapped_token_is_included_or_not():
    student = torch.cat([STUDENT, torch.tensor([4.0])])
    ranges = torch.cat([RANGES, torch.tensor([[-1, -1]])])
    assert TeacherGuidedLoss(0.4)(student, TEACHER, ranges).item() == 3.0
    assert TeacherGuidedLoss(0.4, unmapped="exclude")(student, TEACHER, ranges).item() == 2.0


def test_all_tokens_are_plain_cross_entropy():
    logits, targets = torch.randn(2, 9, 11), torch.randint(11, (2, 9))
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 9)
    ranges = torch.arange(18)[:, None].repeat(1, 2)
    ranges[7] = -1
    got = TeacherGuidedLoss(1.0)(loss, torch.rand(18), ranges)
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    exact = torch.tensor([[1, 0.5, 2.25, 3.75], [0.125, 4, 0.375, 8]])  # whose sums no order of adding rounds
    for scope in ("batch", "sequence"):
        assert TeacherGuidedLoss(1.0, scope=scope)(exact, torch.rand(18), ranges[4:12]).item() == 2.5


def test_gradients_are_of_kept_tokens_alone():
    """Defends: a gradient through the gap, or into the teacher; and one of what is left out."""
    student = torch.tensor([2.0, 3.0, 1.0, 4.0], requires_grad=True)
    teacher = torch.tensor([0.5, 2.0], requires_grad=True)
    ranges = torch.cat([RANGES, torch.tensor([[-1, -1]])])
    TeacherGuidedLoss(0.4)(student, teacher, ranges).backward()
    assert student.grad.tolist() == [0.5, 0, 0, 0.5]
    assert teacher.grad is None
    assert not gap(student, torch.zeros(4))[0].requires_grad


def test_what_is_left_out_may_be_infinite():
    """Defends: 0 * inf, which is no number, in the sum or in the gradient."""
    loss = torch.tensor([[1.0, math.inf]], requires_grad=True)
    mean = weighted_mean(loss, torch.tensor([[1.0, 0.0]]))
    mean.backward()
    assert (mean.item(), loss.grad.tolist()) == (1.0, [[1.0, 0.0]])
    assert weighted_mean(loss, torch.zeros(1, 2)).item() == 0


def test_a_loss_that_is_no_number_is_kept():
    """Defends: a selection that hides a model that has diverged."""
    score = torch.tensor([[1.0, math.nan, 3.0, 2.0]])
    assert Selection(0.25).weights(score, torch.ones(1, 4, dtype=torch.bool)).tolist() == [[0, 1, 0, 0]]


def test_the_share_is_of_the_batch_or_of_each_sequence():
    score = torch.tensor([[9.0, 8, 7, 6], [1, 2, 3, 4]])
    all_of = torch.ones(2, 4, dtype=torch.bool)
    assert Selection(0.5).weights(score, all_of).tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert Selection(0.5, scope="sequence").weights(score, all_of).tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    none = torch.zeros(2, 4, dtype=torch.bool)
    none[0, 2] = True
    assert Selection(0.1, "exclude", "sequence").weights(score, none).tolist() == [[0, 0, 1, 0], [0] * 4]


def test_the_share_is_of_the_tokens_that_have_a_score():
    """Defends: a share of all, special tokens too; of equal scores any."""
    score, has_score = torch.ones(1, 12), torch.arange(12)[None] >= 2
    for rate, count in ((0.4, 4), (0.01, 1), (1.0, 10), (0.25, 2), (0.26, 3)):
        kept = Selection(rate, "exclude").weights(score, has_score)[0]
        assert kept.nonzero()[:, 0].tolist() == list(range(2, 2 + count)), rate
    assert Selection(0.4).weights(score, has_score).sum() == 6
    many = torch.ones(1, 5000)
    assert Selection(0.5).weights(many, many.bool())[0].nonzero()[:, 0].tolist() == list(range(2500))


def test_vectorised_equals_the_loop():
    """On 1000 cases, with tokens that had no context; ranges of all lengths."""
    drawn = random.Random(0)
    by = {"max": max, "sum": sum, "mean": lambda x: sum(x) / len(x), "first": lambda x: x[0]}
    for case in range(1000):
        loss = [drawn.choice([drawn.random() * 9, math.nan, 3.0]) for _ in range(drawn.randint(1, 40))]
        ranges = [sorted(drawn.choices(range(len(loss)), k=2)) for _ in range(6)] + [[-1, -1]]
        how = (*by,)[case % 4]
        got = aggregate_teacher_loss(torch.tensor(loss, dtype=torch.float64), torch.tensor(ranges), how)
        for (a, b), value in zip(ranges, got.tolist(), strict=True):
            part = loss[a : b + 1] if how != "first" else loss[a : a + 1]
            want = math.nan if a < 0 or any(map(math.isnan, part)) else by[how](part)
            assert value == pytest.approx(want, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize(("arguments", "words"), [
    ((TEACHER, RANGES, "median"), "how must be max, mean, sum, first or bytes, found 'median'"),
    ((TEACHER, RANGES, "bytes"), r"share must be \[N\] with how = bytes and none with others, found none with bytes"),
    ((TEACHER, RANGES, "bytes", TEACHER), r"found one of \[2\] for 3 ranges with bytes"),
    ((TEACHER, RANGES, "max", STUDENT), r"found one of \[3\] for 3 ranges with max"),
    ((TEACHER[None], RANGES), r"shape \[M\], .* found torch.float32 \[1, 2\] and \[3, 2\]"),
    ((TEACHER.long(), RANGES), "loss must be floating-point .* found torch.int64"),
    ((TEACHER, RANGES[0]), r"ranges of shape \[N, 2\], found .* and \[2\]"),
    ((TEACHER, RANGES + 1), r"must lie in 0..1, .* found \[1, 2\]"),
    ((TEACHER, RANGES.flip(1)), r"the first not after the last, found \[1, 0\]"),
])  # fmt: skip
def test_what_is_no_range_of_losses_is_refused(arguments, words):
    """Defends: memory that nobody has written, of a range that ends before it begins."""
    with pytest.raises(ValueError, match=f"aggregate_teacher_loss: .*{words}"):
        aggregate_teacher_loss(*arguments)


@pytest.mark.parametrize(("settings", "words"), [
    ({"keep_rate": 0}, "keep_rate must be above 0 and at most 1, found 0"),
    ({"keep_rate": 1.1}, "keep_rate must be above 0 and at most 1, found 1.1"),
    ({"keep_rate": math.nan}, "keep_rate must be above 0 and at most 1, found nan"),
    ({"unmapped": "keep"}, "unmapped must be include or exclude, found 'keep'"),
    ({"scope": "token"}, "scope must be batch or sequence, found 'token'"),
])  # fmt: skip
def test_a_selection_that_cannot_be_is_refused(settings, words):
    """Defends: a wrong word that is taken for the other right one."""
    with pytest.raises(ValueError, match=words):
        TeacherGuidedLoss(**settings)


@pytest.mark.parametrize(
    "student", [STUDENT[:2], STUDENT[None, None], STUDENT[0]], ids=lambda x: str(list(x.shape))
)
def test_a_range_belongs_to_each_token(student):
    with pytest.raises(ValueError, match=r"must be \[S\] or \[B, S\] with a range for each token"):
        TeacherGuidedLoss()(student, TEACHER, RANGES[: 3 if student.dim() else 1])


def test_no_ranges_and_no_teacher():
    assert aggregate_teacher_loss(TEACHER, RANGES[:0]).tolist() == []
    assert aggregate_teacher_loss(TEACHER[:0], torch.tensor([[-1, -1]])).isnan().all()


def test_universal_logit_distillation():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.6, 0.4])
    assert uld_loss(p, q).item() == pytest.approx(0.4, abs=1e-7)
    assert uld_loss(q, p).item() == pytest.approx(0.4, abs=1e-7)
    with pytest.raises(ValueError, match=r"the same positions, found \[2, 3\] and \[2\]"):
        uld_loss(torch.stack([p, p]), q)
    assert uld_loss(torch.stack([p, p]), torch.stack([p[[2, 0, 1]], p])).tolist() == [0, 0]


@pytest.mark.parametrize(("V", "K"), [(50, 8), (8, 50), (8, 8), (3, 1)])
def test_uld_to_the_highest_sorts_no_more_than_they(V, K):
    """The definition with all sorted, and its gradient."""
    generator = torch.Generator().manual_seed(V)
    logits = torch.randn(5, V, generator=generator, dtype=torch.float64)
    top = torch.rand(5, K, generator=generator, dtype=torch.float64).sort(descending=True).values / K
    found = []
    for sorted_ in (False, True):
        x = logits.clone().requires_grad_()
        p = x.softmax(-1)
        if sorted_:
            size = max(V, K)
            p, q = (F.pad(y, (0, size - y.shape[-1])) for y in (p.sort(descending=True).values, top))
            distance = (p - q).abs().sum(-1)
        else:
            distance = uld_to_highest(p, top)
        distance.sum().backward()
        found.append((distance.detach(), x.grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
