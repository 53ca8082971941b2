"""All documents of a training split through a teacher, into the file of `teacher_file`."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sigma_train.config import DataConfig
from sigma_train.corpus import Document
from sigma_train.errors import WrongInput
from sigma_train.files import must_be_writable, must_take_files
from sigma_train.languages import files_of, splits_of
from sigma_train.reading import Reading, read_texts
from sigma_train.teacher import Teacher
from sigma_train.teacher_file import TeacherLosses, read_losses, text_of, write_losses

GROUP = 64  # documents, of at most 4 MiB, between two steps of the progress bar
MOST_CONTEXT = 2048  # where nothing else is said: logits of more are large
DTYPES = {"f16": torch.float16, "f32": torch.float32}


def cache_losses(
    teacher: Teacher,
    data: DataConfig,
    out: Path,
    context: int | None,
    overlap: int | None,
    batch_tokens: int,
    dtype: str,
    console: Console,
    top: int = 0,
) -> str:
    """Write `out`, or find that it is there; what was done, in words.

    Raises: WrongInput if `out` is of something else, or a setting or the text is wrong.
    """
    reading = reading_of(teacher, context, overlap, batch_tokens, top)
    with must_be_writable("--out", out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    must_take_files("--out", out.parent)
    corpus, documents, _ = splits_of(files_of(data), data)
    num_bytes = sum(document.size for document in documents)
    record = {
        "text": text_of(corpus.digest, data, num_bytes),
        "teacher": {
            "digest": teacher.digest,
            "parameters": sum(p.numel() for p in teacher.model.parameters()),
        },
        "reading": {"context": reading.context, "overlap": reading.overlap, "dtype": dtype, "top": top},
    }
    if out.exists():
        return there_already(out, record)
    began = time.monotonic()
    loss, spans, highest = _read(teacher, documents, reading, console)
    losses = TeacherLosses(
        torch.from_numpy(loss).to(DTYPES[dtype]),
        *torch.from_numpy(spans).T.contiguous(),
        torch.from_numpy(highest),
        record,
    )
    write_losses(out, losses)
    return (
        f"wrote {out}: {len(loss):,} tokens of {num_bytes:,} bytes, {losses.bits_per_byte:.4f} bits per byte, "
        f"{out.stat().st_size / 1e6:.1f} MB, {len(loss) / (time.monotonic() - began):,.0f} tokens a second"
    )


def reading_of(
    teacher: Teacher, context: int | None, overlap: int | None, batch_tokens: int, top: int = 0
) -> Reading:
    """Raises: WrongInput if the teacher cannot read so much, or would read nothing new."""
    context = min(teacher.context, MOST_CONTEXT) if context is None else context
    if context > teacher.context:
        raise WrongInput(
            f"--context must be at most {teacher.context}, what the teacher can read, found {context}"
        )
    overlap = context // 4 if overlap is None else overlap
    if overlap >= context:
        raise WrongInput(f"--overlap must be less than the context of {context} tokens, found {overlap}")
    if top > teacher.vocabulary:
        raise WrongInput(f"--top must be at most {teacher.vocabulary}, the teacher's vocabulary, found {top}")
    return Reading(context, overlap, batch_tokens, top)


def there_already(out: Path, record: dict[str, Any]) -> str:
    """Raises: WrongInput if the file holds anything else than what was asked for."""
    found = read_losses(out, "--out").record
    for part, wanted in record.items():
        for key, value in wanted.items():
            if found[part][key] != value:
                raise WrongInput(
                    f"--out: {out} holds other losses: {part} {key} is {found[part][key]} there and {value} here; "
                    "name another file"
                )
    return f"{out} is there already, of this text and teacher"


def _read(
    teacher: Teacher, documents: list[Document], reading: Reading, console: Console
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses [M] f32, spans [M, 2] int64, highest probabilities [M, top] f16: of all documents in their order."""
    loss, top = [np.empty(0, np.float32)], [np.empty((0, reading.top), np.float16)]
    spans, at = [np.empty((0, 2), np.int64)], 0
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("the teacher reads", total=sum(document.size for document in documents))
        for first in range(0, len(documents), GROUP):
            group = documents[first : first + GROUP]
            encoded = teacher.encode([document.read() for document in group])
            found = read_texts(teacher, [ids for ids, _ in encoded], reading)
            loss += [each.loss for each in found]
            top += [each.top for each in found]
            for document, (_, of_document) in zip(group, encoded, strict=True):
                spans.append(of_document + at)
                at += document.size
            bar.update(task, completed=at)
    return np.concatenate(loss), np.concatenate(spans), np.concatenate(top)
