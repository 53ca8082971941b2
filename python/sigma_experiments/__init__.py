"""`sigma experiment NAME`: published findings tried at the size of a small machine; a module each, `run(lab)`.

lab.py trains, page.py writes; everything else is the experiment's own.
"""

EXPERIMENTS = {
    "balance": "one expert of many: how uneven plain loss, bias, Top-1 loss and the schedule leave each layer",
    "bias": "the selection bias at several rates: how fast it balances each layer, whether it runs away",
    "collapse": "bytes and a weak loss: lower layers that stay uneven to the end, and what is tried against it",
    "trade-off": "each balance loss at several strengths: validation over the busiest expert",
    "teacher": "tokens chosen by a teacher of another vocabulary, where part of the text is noise",
    "token-bound": "what the commonest token alone forces on each layer, for several vocabularies",
    "growth": "more layers or experts from a trained model against not growing and against scratch, by FLOPs",
    "matryoshka": "one model for every k: drawn for each step, micro-batch or layer, beside specialists of one k",
    "planted-languages": "neurons of four invented languages, what each loses without its own, and planted ones",
    "guide-languages": "neurons of 19 languages of one book, what each loses without its own, and what moves them",
}
