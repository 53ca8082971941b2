"""Two tokenisations of one text: which teacher tokens cover a student token, and byte spans that are right."""

import json
import random
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sigma_train.alignment import align_spans, alignment_ios, alignment_iou, chunk_align
from sigma_train.dataset import TokenDataset
from sigma_train.laid_over import Aligned
from sigma_train.mined_align import edit_distance, mined_align
from sigma_train.spans import OffsetError, byte_starts, spans_of_lengths, spans_of_offsets
from sigma_train.tokenizer import train_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.utils._python_dispatch import TorchDispatchMode

SAMPLE = [
    "hello there, my dear friend\n",
    "für alle Fälle 東京 e\u0301 🙂🙂\n",
    "for x in range(10):\n    return x\n",
] * 4
PROFESSOR = torch.tensor([[0, 0], [0, 3], [3, 7], [7, 9], [0, 0]]), torch.tensor([[0, 4], [4, 9]])


def test_the_professor():
    """Pro|fess|or between special tokens against Prof|essor."""
    want = [[-1, -1], [0, 0], [0, 1], [1, 1], [-1, -1]]
    assert align_spans(*PROFESSOR).tolist() == want


def test_bytes_against_a_word_and_a_word_against_bytes():
    bytes_, word = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4]]), torch.tensor([[0, 4]])
    assert align_spans(bytes_, word).tolist() == [[0, 0]] * 4
    assert align_spans(torch.tensor([[0, 6]]), torch.tensor([[0, 1], [1, 3], [3, 6]])).tolist() == [[0, 2]]


def test_equal_tokenisations_are_mapped_one_to_one():
    spans = torch.from_numpy(spans_of_lengths(np.array([3, 1, 4, 1, 5])))
    assert align_spans(spans, spans).tolist() == [[i, i] for i in range(5)]


def test_what_is_not_covered_is_unmapped():
    """Defends: the neighbour across a gap, an empty side, the token after the last."""
    student = torch.tensor([[0, 2], [2, 4], [4, 6], [6, 8]])
    teacher = torch.tensor([[0, 2], [4, 5]])
    assert align_spans(student, teacher).tolist() == [[0, 0], [-1, -1], [1, 1], [-1, -1]]
    assert align_spans(student, teacher[:0]).tolist() == [[-1, -1]] * 4
    assert align_spans(student[:0], teacher).tolist() == []
    empty = torch.tensor([[0, 0], [1, 1], [2, 2]])
    assert align_spans(student[:2], empty).tolist() == [[1, 1], [-1, -1]]


@pytest.mark.parametrize(("teacher", "words"), [
    ([[0, 4], [4, 9], [0, 0]], r"begins of teacher spans must not fall, found \[0, 0\] after \[4, 9\] at token 2"),
    ([[0, 9], [4, 5]], r"ends of teacher spans must not fall, found \[4, 5\] after \[0, 9\] at token 1"),
])  # fmt: skip
def test_teacher_spans_that_fall_are_refused(teacher, words):
    """Defends: binary searches in what is not sorted, which answer anything."""
    with pytest.raises(ValueError, match=words):
        align_spans(torch.tensor([[0, 1]]), torch.tensor(teacher))


def by_loop(student: list[list[int]], teacher: list[list[int]]) -> list[list[int]]:
    """The definition: teacher tokens that share a byte."""
    found = []
    for a, b in student:
        over = [j for j, (begin, end) in enumerate(teacher) if max(a, begin) < min(b, end)]
        found.append([over[0], over[-1]] if over else [-1, -1])
    return found


def test_vectorised_equals_the_loop():
    """On 1000 cases, with gaps, overlaps and empty spans of the student."""
    drawn = random.Random(0)
    for _ in range(1000):
        size = drawn.randint(1, 30)
        student, teacher = ([sorted(drawn.choices(range(size + 1), k=2)) for _ in range(8)] for _ in range(2))
        begins, ends = (sorted(column) for column in zip(*teacher, strict=True))
        teacher = [[begin, max(begin + 1, end)] for begin, end in zip(begins, ends, strict=True)]
        got = align_spans(torch.tensor(student), torch.tensor(teacher))
        assert got.tolist() == by_loop(student, teacher), (student, teacher)


class Counted(TorchDispatchMode):
    """Operations, and elements that they made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.elements = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append(function.overloadpacket.__name__)
        self.elements += sum(x.numel() for x in (out if isinstance(out, tuple | list) else [out]))
        return out


def test_work_is_two_binary_searches_a_token():
    """Defends: a scan of all teacher tokens, a loop in Python: counted, since a clock tells of other programs."""
    counts = []
    for size in (1_000, 10_000, 100_000):
        student, teacher = (
            torch.from_numpy(spans_of_lengths(np.full(n, s))) for n, s in ((size, 6), (2 * size, 3))
        )
        with Counted() as counted:
            ranges = align_spans(student, teacher)
        assert ranges[-1].tolist() == [2 * size - 2, 2 * size - 1]
        assert counted.calls.count("searchsorted") == 2
        assert counted.elements < 40 * size
        counts.append(counted.calls)
    assert counts[0] == counts[1] == counts[2]


def test_chunks_of_equal_count():
    assert chunk_align(4, 6, 2).tolist() == [[0, 2], [0, 2], [3, 5], [3, 5]]
    assert chunk_align(5, 3, 1).tolist() == [[0, 2]] * 5
    for n, m, chunks in ((7, 5, 3), (10, 23, 9), (3, 3, 3)):
        first, last = chunk_align(n, m, chunks).unbind(1)
        edges = torch.unique(torch.stack([first, last + 1]))
        assert (edges[0], edges[-1], len(edges)) == (0, m, chunks + 1)
    for chunks in (0, 1.5, 4):
        with pytest.raises(ValueError, match="chunks must be an integer from 1 to 3"):
            chunk_align(3, 9, chunks)


def test_spans_keep_what_chunks_lose():
    """The mapped range covers a student token; equal counts do the less so the finer they are."""
    drawn = np.random.default_rng(0)
    student, teacher = (
        np.diff(np.sort(drawn.choice(999, n, replace=False)), prepend=-1, append=999) for n in (299, 199)
    )
    student, teacher = (torch.from_numpy(spans_of_lengths(lengths)) for lengths in (student, teacher))
    ours = align_spans(student, teacher)
    assert (alignment_ios(student, teacher, ours) == 1).all()
    ious = [alignment_iou(student, teacher, ours).mean()]
    coverage = []
    for chunks in (10, 50, 199):
        ranges = chunk_align(300, 200, chunks)
        coverage.append(alignment_ios(student, teacher, ranges).mean())
        ious.append(alignment_iou(student, teacher, ranges).mean())
    assert 1 > coverage[0] > coverage[1] > coverage[2]
    assert ious[0] == max(ious)


def test_shares_of_the_professor():
    ranges = align_spans(*PROFESSOR)
    torch.testing.assert_close(
        alignment_iou(*PROFESSOR, ranges)[1:4], torch.tensor([3 / 4, 4 / 9, 2 / 5], dtype=torch.float64)
    )
    assert alignment_ios(*PROFESSOR, ranges).isnan().tolist() == [True, False, False, False, True]
    assert alignment_ios(*PROFESSOR, torch.tensor([[1, 1]] * 5))[1:4].tolist() == [0, 3 / 4, 1]


def test_edit_distance():
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("abc", "abc"))] == [
        3,
        3,
        0,
    ]


def test_alignment_by_edit_distance():
    """Each range follows the one before, and equal sequences are mapped one to one."""
    assert mined_align(["a", "bc", "d"], ["a", "bc", "d"]).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert mined_align(["Pro", "fess", "or"], ["Prof", "essor"]).tolist() == [[0, 0], [1, 1], [1, 1]]
    assert mined_align(["ab"], ["a", "b"]).tolist() == [[0, 1]]
    whole, cut = ["xxxxxxxx", "longpiece", "yyyyyyyy"], ["xxxxxxxx", "long", "piece", "yyyyyyyy"]
    assert mined_align(whole, cut).tolist() == [[0, 0], [1, 2], [3, 3]]
    assert mined_align(cut, whole).tolist() == [[0, 0], [1, 1], [1, 1], [2, 2]]
    ranges = mined_align([*"the cat sat"], ["the", " cat", " sat"])
    assert ranges[0, 0] == 0
    assert ranges[-1, 1] == 2
    assert ((ranges[1:, 0] - ranges[:-1, 1]) <= 1).all()
    assert (ranges[1:, 0] >= ranges[:-1, 1]).all()
    with pytest.raises(ValueError, match="both must have a token"):
        mined_align([], ["a"])


def mined_by_loop(student: list[str], teacher: list[str]) -> list[list[int]]:
    """The recurrence as it stands, and the path back."""

    def before(i: int, j: int) -> list[tuple[int, int]]:
        return [(p, q) for p, q in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if p >= 0 and q >= 0]

    cost = {}
    for i, mine in enumerate(student):
        for j, theirs in enumerate(teacher):
            least = min((cost[place] for place in before(i, j)), default=0)
            cost[i, j] = edit_distance(mine, theirs) + least
    path = [(len(student) - 1, len(teacher) - 1)]
    while steps := before(*path[-1]):
        path.append(min(steps, key=cost.__getitem__))
    return [
        [min(j for p, j in path if p == i), max(j for p, j in path if p == i)] for i in range(len(student))
    ]


@settings(max_examples=300, deadline=None)
@given(*[st.lists(st.text("ab ", max_size=4), min_size=1, max_size=12)] * 2)
def test_edit_distance_in_rows_equals_the_loop(student, teacher):
    assert mined_align(student, teacher).tolist() == mined_by_loop(student, teacher)


@pytest.mark.parametrize(("args", "words"), [
    (("words",), "kind must be span, index, chunk, edit, found 'words'"),
    (("edit",), "kind = edit must have strings of the student's vocabulary, found none"),
    (("chunk", 0), "chunks must be at least 1, found 0"),
])  # fmt: skip
def test_an_alignment_that_cannot_be_is_refused(args, words):
    with pytest.raises(ValueError, match=words):
        Aligned(*args)


def test_a_token_without_bytes_moves_no_other():
    """Defends: an empty span of a teacher's that shifts those who are paired by their number."""
    dataset = TokenDataset("train", np.array([1, 1, 0, 1, 1, 0], np.uint16), 4, np.array([0, 1]))
    spans = torch.tensor([[0, 1], [1, 2], [2, 2], [2, 3], [3, 4]])
    pieces = list(Aligned("index").over(dataset, *spans.T.contiguous()))
    assert [teacher for _, teacher, _ in pieces] == [slice(0, 2), slice(2, 5)]
    assert [ranges[:, 0].tolist() for _, _, ranges in pieces] == [[0, 1, -1], [1, 2, -1]]


def byte_level(**kwargs) -> Tokenizer:
    return Tokenizer.from_str(train_tokenizer(SAMPLE, 300)._serialized, **kwargs)


def metaspace(scheme: str = "never") -> Tokenizer:
    """As SentencePiece has it: pieces of the text with its spaces, and bytes for what is in none."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    described = json.loads(tokenizer.to_str())
    described["model"]["byte_fallback"] = True
    described["model"]["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
    return Tokenizer.from_str(json.dumps(described))


BYTE_LEVEL, METASPACE, PREPENDED = byte_level(), metaspace(), metaspace("always")
LIKELY = "he tor\n\u0301\u0300é東京🙂👩\u200d"
TEXT = st.text(st.one_of(st.sampled_from(LIKELY), st.characters(exclude_categories=["Cs"])), max_size=40)


def spans(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    return torch.from_numpy(spans_of_offsets(text, tokenizer.encode(text).offsets))


@settings(max_examples=150, deadline=None)
@given(TEXT)
def test_offsets_of_all_kinds_cover_the_text_in_order(text):
    """Byte-level BPE, SentencePiece-like with and without its dummy space, bytes: combining marks, CJK, emoji."""
    size = len(text.encode())
    every_byte = torch.from_numpy(spans_of_lengths(np.ones(size, dtype=np.int64)))
    for tokenizer in (BYTE_LEVEL, METASPACE, PREPENDED):
        found = spans(tokenizer, text)
        assert len(found) == len(tokenizer.encode(text))
        if text:
            assert (alignment_ios(every_byte, found, align_spans(every_byte, found)) == 1).all()
            assert int(found[-1, 1]) == size
    exact = torch.from_numpy(spans_of_lengths(piece_bytes(text)))
    for student, teacher in (
        (exact, spans(METASPACE, text)),
        (spans(PREPENDED, text), exact),
        (every_byte, exact),
    ):
        ranges = align_spans(student, teacher)
        assert ranges.tolist() == by_loop(student.tolist(), teacher.tolist())
        assert (alignment_ios(student, teacher, ranges) == 1).all()


def piece_bytes(text: str) -> np.ndarray:
    """Of byte-level BPE, whose alphabet has a character for each byte."""
    return np.array([len(token) for token in BYTE_LEVEL.encode(text).tokens], dtype=np.int64)


@settings(max_examples=150, deadline=None)
@given(TEXT)
def test_spans_hold_what_the_pieces_say(text):
    """Defends: characters taken for bytes, a space on the wrong side."""
    content = text.encode()
    for piece, (begin, end) in zip(
        METASPACE.encode(text).tokens, spans(METASPACE, text).tolist(), strict=True
    ):
        if not piece.startswith("<0x"):
            assert content[begin:end].decode() in (piece.replace("▁", " "), piece)
    byte_pieces = [piece for piece in METASPACE.encode(text).tokens if piece.startswith("<0x")]
    for piece, (begin, end) in zip(
        METASPACE.encode(text).tokens, spans(METASPACE, text).tolist(), strict=True
    ):
        if piece in byte_pieces:
            assert int(piece[3:5], 16) in content[begin:end]


def test_characters_to_bytes():
    assert byte_starts("aé東🙂").tolist() == [0, 1, 3, 6, 10]
    assert spans_of_offsets("aé東🙂", [(0, 2), (2, 4)]).tolist() == [[0, 3], [3, 10]]
    assert spans_of_offsets("", []).tolist() == []


def test_trimmed_spaces_go_to_the_token_that_follows():
    """Defends: a student's space that is unmapped; and an accent that a normaliser has taken away."""
    assert spans_of_offsets("ab cd ", [(0, 2), (3, 5)]).tolist() == [[0, 2], [2, 6]]
    assert spans_of_offsets(" ab  cd", [(1, 3), (5, 7)]).tolist() == [[0, 3], [3, 7]]
    assert spans_of_offsets("e\u0301 x", [(0, 1), (3, 4)]).tolist() == [[0, 3], [3, 5]]
    composed = [(0, 1), (0, 1), (2, 3), (3, 4), (3, 4)]  # of two bytes each
    assert spans_of_offsets("e\u0301 e\u0301", composed).tolist() == [[0, 3], [0, 3], [3, 4], [4, 7], [4, 7]]
    stripped = Tokenizer.from_str(BYTE_LEVEL.to_str())
    stripped.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Strip()]
    )
    text = "  fu\u0308r e\u0301 x\n"
    found = spans(stripped, text)
    assert (found[0, 0], found[-1, 1]) == (0, len(text.encode()))
    assert (found[1:, 0] == found[:-1, 1]).all()


NORMALIZERS = {
    "lower": (normalizers.Lowercase(), str.lower),
    "nfkc": (normalizers.NFKC(), lambda text: unicodedata.normalize("NFKC", text)),
}


@pytest.mark.parametrize("kind", NORMALIZERS)
@pytest.mark.parametrize("base", [BYTE_LEVEL, METASPACE], ids=["bytes", "metaspace"])
def test_normalisers_that_change_and_add_characters(base, kind):
    """Lower case of more bytes or characters, ligatures and fractions of several: spans are of the text as it was.

    Defends: offsets of the normalised text, a character that is spread over the spans of what it has become.
    """
    normalizer, normalised = NORMALIZERS[kind]
    tokenizer = Tokenizer.from_str(base.to_str())
    tokenizer.normalizer = normalizer
    for text in ("HELLO İstanbul ẞ Ǆ\n", "ﬁne ½ … ﷺ x", "㍿ ア e\u0301 ﬃ", " \u00a0①② Ⅷ"):
        content, found = text.encode(), spans(tokenizer, text)
        every_byte = torch.from_numpy(spans_of_lengths(np.ones(len(content), dtype=np.int64)))
        assert (alignment_ios(every_byte, found, align_spans(every_byte, found)) == 1).all()
        if base is METASPACE:
            for piece, (begin, end) in zip(tokenizer.encode(text).tokens, found.tolist(), strict=True):
                told = normalised(content[begin:end].decode())
                if piece.startswith("<0x"):
                    assert int(piece[3:5], 16) in told.encode()
                else:
                    assert piece.replace("▁", " ") in told


def test_a_character_that_becomes_several_is_the_span_of_each():
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    assert tokenizer.encode("ﬃ ⅧX").tokens == ["f", "f", "i", "Ġ", "v", "i", "i", "i", "x"]
    assert spans(tokenizer, "ﬃ ⅧX").tolist() == [[0, 3]] * 3 + [[3, 4]] + [[4, 7]] * 4 + [[7, 8]]


@pytest.mark.parametrize(("offsets", "words"), [
    ([(0, 2), (1, 4)], "outside of the text's 3 characters"),
    ([(2, 3), (0, 1)], r"fall, \(0, 1\) after \(2, 3\) at token 1"),
    ([(0, 3), (1, 2)], r"fall, \(1, 2\) after \(0, 3\) at token 1"),
])  # fmt: skip
def test_offsets_that_cannot_be_are_refused(offsets, words):
    with pytest.raises(OffsetError, match=words):
        spans_of_offsets("abc", offsets)
