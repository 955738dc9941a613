"""Where the bits of WikiText-2 go: python reports/h200/marks_of_wikitext.py RUN wikitext2_test.txt

RUN is a run's folder, or the folder of a saved model. Windows do not overlap; what a symbol costs is spread evenly over its bytes.
"""

import re
import sys

import numpy as np

from stlm.data.corpora import open_corpus
from stlm.evaluate.benchmarks import open_model
from stlm.infer.scoring import token_logprobs, windows

KINDS = {"<unk>": r" ?<unk>", "@-@ and the like": r" @[-,.]@ ", "a space before , . 's": r" (?=[,.;:?!)]|'s|n't)"}

model, tokenizer, _ = open_model(sys.argv[1], "cpu")
names = [*KINDS, "all else"]
bits, size = np.zeros(len(names)), np.zeros(len(names))
for text in open_corpus(f"file:{sys.argv[2]}").documents():
    raw, context = text.encode(), model.config.context
    kind = np.full(len(raw) + 1, len(KINDS))  # of each byte, and of the end
    for number, pattern in enumerate(KINDS.values()):
        for found in re.finditer(pattern.encode(), raw):
            kind[found.start():found.end()] = number
    symbols = np.array([tokenizer.eot_id, *tokenizer.encode(text), tokenizer.end_id])
    parts = list(windows(len(symbols), context, context))
    scored = token_logprobs(model, [symbols[start:stop] for start, _, stop in parts], [first - start for start, first, _ in parts])
    cost = -np.concatenate(list(scored)) / np.log(2)  # (T,) bits of every symbol but the first
    n_bytes = tokenizer.token_bytes[symbols[1:]]
    owner = np.repeat(np.arange(len(cost)), n_bytes)  # (bytes,) the symbol of each byte
    of_bytes = np.append(cost[owner] / n_bytes[owner], cost[n_bytes == 0].sum())
    bits += np.bincount(kind, of_bytes, len(names))
    size += np.bincount(kind[:-1], minlength=len(names))
for name, cost, n in zip(names, bits, size, strict=True):
    shares = f"{n / size.sum():6.1%} of the bytes, {cost / bits.sum():6.1%} of the bits"
    print(f"{name:22} {shares}: {cost / size.sum():.3f} bits per byte of all, {cost / n:.2f} per byte of its own")
print(f"{'together':22} {bits.sum() / size.sum():.4f} bits per byte of {size.sum():,.0f}")
