"""Documents as packed batches of tokens: from text, jsonl, parquet, and RWKV-LM's .bin and .idx.

`read_documents` opens a file, `DocumentData` feeds its documents to a model. A step reads one row
of whole documents, one after the other, and `Pack.cu_seqlens` tells the model where each begins.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning
import numpy as np
import torch
from corpus import tokenizer_of
from text_data import share_of
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

if TYPE_CHECKING:
    from torch_rwkv6.models.tokenizers import Tokenizer

IGNORED = -100  # a target that nothing is learnt from; the default of cross_entropy
FORMATS = {
    ".txt": "text",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".bin": "binidx",  # RWKV-LM's; the others are names of `datasets`
    ".idx": "binidx",
}
# Of an .idx file, whose layout is that of Megatron-LM; the codes are those of its element types.
MAGIC = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little")  # and its version
ELEMENTS = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class Documents(NamedTuple):
    """Documents in tokens, which are read when they are needed."""

    lengths: np.ndarray  # [D], tokens of each
    prompts: np.ndarray  # [D], how many of them, at the beginning, are not to be learnt
    tokens: Callable[[int], np.ndarray]  # of one document


class Pack(NamedTuple):
    """What a model reads in a step: M pieces of documents in one row of T tokens."""

    tokens: Tensor  # [1, T] int64
    targets: Tensor  # [1, T] int64, the next token of the same document, or IGNORED
    cu_seqlens: Tensor  # [M + 1] int64, where each piece begins, and T
    weight: float  # of its loss in the mean over the packs of its step; 1 on average
    epoch: int
    row: int  # with epoch, where to read on: behind the step with its last pack, else before it


def format_of(path: str) -> str:
    """One of `FORMATS`.

    Raises:
        ValueError: the name of the file has another suffix.
    """
    suffix = Path(path).suffix
    if suffix not in FORMATS:
        raise ValueError(f"--data: expected a file of {', '.join(FORMATS)}, got {path}")
    return FORMATS[suffix]


def read_documents(
    path: str, tokenizer: str, vocab_size: int, sample_by: str = "paragraph", workers: int = 1
) -> Documents:
    """The documents of a file, in the tokens of a model.

    Args:
        path: .txt, with documents as ``sample_by`` says; .jsonl or .parquet, with a column "text",
            or "prompt" and "completion", of which the completion alone is to be learnt; or
            RWKV-LM's .bin or .idx, with the other one beside it, which is in tokens already.
        tokenizer: of `torch_rwkv6.models.load_tokenizer`. Its end of text ends every document.
        vocab_size: of the model.
        sample_by: "line", "paragraph" (ends at an empty line) or "document" (the whole file).
        workers: processes that turn text into tokens. The library `datasets` keeps the result in
            its cache and takes it from there the next time.

    Raises:
        ImportError, OSError, ValueError: as `tokenizer_of`; or the file has another format.
    """
    kind = format_of(path)
    file = Path(path).with_suffix(".bin") if kind == "binidx" else Path(path)
    if file.is_file() and file.stat().st_size == 0:
        raise ValueError(f"--data: expected documents, got the empty file {file}")
    if kind == "binidx":
        return _read_binidx(Path(path), vocab_size)
    import datasets  # a second, as it imports pandas
    from filelock import FileLock

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "torch_rwkv6.lock"):  # other processes of a run find what the first made
        return _read_rows(kind, path, tokenizer, vocab_size, sample_by, workers)


def _read_rows(
    kind: str, path: str, tokenizer: str, vocab_size: int, sample_by: str, workers: int
) -> Documents:
    """The documents of a file that `datasets` reads."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # the exception says it
    options = {"sample_by": sample_by} if kind == "text" else {}
    try:
        rows: Any = datasets.load_dataset(kind, data_files=path, split="train", **options)
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        raise ValueError(f"--data: {path}: {error.__cause__ or error}") from error
    columns = set(rows.column_names)
    if not ("text" in columns or {"prompt", "completion"} <= columns):
        raise ValueError(
            f'--data: expected a column "text", or "prompt" and "completion", in {path}, got '
            f"{', '.join(sorted(columns)) or 'none'}"
        )
    file = Path(tokenizer).stat() if tokenizer.endswith(".json") else None
    settings = {
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "changed": file and file.st_mtime_ns,  # another tokenizer under the same name
    }
    rows = rows.map(
        tokenise,
        batched=True,
        fn_kwargs=settings,
        remove_columns=rows.column_names,
        num_proc=workers if workers > 1 else None,
    ).with_format("numpy")
    lengths, prompts = (np.asarray(rows[name][:], np.int64) for name in ("length", "prompt"))
    return Documents(lengths, prompts, lambda i: rows[i]["tokens"])


@functools.cache
def tokenizer_for(name: str, vocab_size: int) -> Tokenizer:
    """As `tokenizer_of`, which is read once."""
    return tokenizer_of(vocab_size, name)


def tokenise(
    batch: dict[str, list[Any]], tokenizer: str, vocab_size: int, changed: int | None
) -> dict[str, list[Any]]:
    """Rows of a file as tokens: prompt, then the text to be learnt, then the end of the text."""
    chosen: Any = tokenizer_for(tokenizer, vocab_size)
    encode = getattr(chosen, "encode_batch", lambda texts: [chosen.encode(x) for x in texts])
    end = sorted(chosen.end_tokens)[:1]
    learnt = "completion" if {"prompt", "completion"} <= batch.keys() else "text"
    for name in ("prompt", learnt) if learnt == "completion" else (learnt,):
        for text in batch[name]:
            if not isinstance(text, str):
                raise ValueError(
                    f'--data: expected text in the column "{name}", got {type(text).__name__}'
                )
    texts = encode(batch[learnt])
    prompts = encode(batch["prompt"]) if learnt == "completion" else [[] for _ in texts]
    tokens = [[*p, *t, *end] for p, t in zip(prompts, texts, strict=True)]
    return {"tokens": tokens, "length": [*map(len, tokens)], "prompt": [*map(len, prompts)]}


def _read_binidx(file: Path, vocab_size: int) -> Documents:
    """The documents of a .bin file, as its .idx file says; the tokens stay on the disk.

    Source: ``MMapIndexedDataset`` in BlinkDL/RWKV-LM, RWKV-v5/src/binidx.py.
    """
    index, data = file.with_suffix(".idx"), file.with_suffix(".bin")
    content = index.read_bytes()
    code = content[len(MAGIC)] if len(content) > len(MAGIC) else 0
    if not content.startswith(MAGIC) or code not in ELEMENTS or len(content) < len(MAGIC) + 17:
        raise ValueError(f"--data: {index} is no index of version 1 of integers (MMIDIDX)")
    offset = len(MAGIC) + 1
    items, ends = np.frombuffer(content, "<i8", 2, offset).tolist()  # ends: D + 1
    offset += 16
    if len(content) != offset + 12 * items + 8 * ends or ends < 1:
        raise ValueError(f"--data: {index} is truncated")
    sizes = np.frombuffer(content, "<i4", items, offset)  # [items], in tokens
    pointers = np.frombuffer(content, "<i8", items, offset + 4 * items)  # [items], in bytes
    document = np.frombuffer(content, "<i8", ends, offset + 12 * items)  # [D + 1], in items
    tokens = np.memmap(data, ELEMENTS[code], "r")
    before = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])  # tokens before each item
    if not np.array_equal(pointers, before[:-1] * tokens.itemsize) or before[-1] > len(tokens):
        raise ValueError(f"--data: {index} does not fit {data}")
    begins = before[document]  # [D + 1]
    lengths = np.diff(begins)

    def read(i: int) -> np.ndarray:
        piece = tokens[begins[i] : begins[i + 1]]
        if len(piece) and not 0 <= piece.min() <= piece.max() < vocab_size:
            raise ValueError(
                f"--data: expected tokens from 0 to {vocab_size - 1}, as the model has, got "
                f"{piece.min()} to {piece.max()} in document {i} of {data}"
            )
        return piece

    return Documents(lengths, np.zeros_like(lengths), read)


class Pieces(NamedTuple):
    """Documents cut into pieces, of which every one is read from the initial state.

    The last token of a document follows on others and nothing on it, so it is a target only; every
    other token is read, and has a target, in exactly one piece.
    """

    document: np.ndarray  # [P]
    start: np.ndarray  # [P], its first token in the document
    length: np.ndarray  # [P], tokens that are read
    learnt: np.ndarray  # [P], how many targets are no part of a prompt: the last ones

    @classmethod
    def of(cls, documents: Documents, ctx_len: int) -> Pieces:
        """Pieces of at most ctx_len tokens; those with nothing to learn are left out."""
        read = np.maximum(documents.lengths - 1, 0)
        counts = -(-read // ctx_len)
        document = np.repeat(np.arange(len(read)), counts)
        start = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * ctx_len
        length = np.minimum(read[document] - start, ctx_len)
        prompt = np.maximum(documents.prompts[document] - start - 1, 0)  # of the targets
        pieces = cls(document, start, length, length - prompt)
        return pieces.select(pieces.learnt > 0)

    def select(self, index: Any) -> Pieces:
        return Pieces(*(x[index] for x in self))


class Packs(IterableDataset[Pack]):
    """Pieces packed one after the other, as many whole ones as fit, in packs of ``size`` tokens.

    Several packs are the data of a step, which the processes of a run share out among them. Their
    mean loss, each by its weight, is the mean over all targets that are learnt in the step, however
    these are spread over packs and processes.

    Args:
        documents, pieces: no piece is longer than ``size``.
        size: tokens of a pack at most.
        seed: of the order, which is another one in each epoch; None keeps that of the pieces, and
            ends after one epoch.
        epoch, row: where to begin. The order depends on the seed and the epoch alone, so this is
            all that a resumed run needs to know.
        step: packs of a step; a multiple of num_replicas.
        rank: of the process, whose share of every step is yielded. Where the last step of all has
            none for it, it is given a pack from which nothing is learnt, so that all processes
            have as many.
        num_replicas: how many processes share a step.
    """

    def __init__(
        self,
        documents: Documents,
        pieces: Pieces,
        size: int,
        seed: int | None = None,
        epoch: int = 0,
        row: int = 0,
        *,
        step: int = 1,
        rank: int = 0,
        num_replicas: int = 1,
    ) -> None:
        self.documents, self.pieces, self.size, self.seed = documents, pieces, size, seed
        self.epoch, self.row = epoch, row
        self.step, self.rank, self.num_replicas = step, rank, num_replicas

    def __iter__(self) -> Iterator[Pack]:
        place = self.epoch, self.row
        packs = self.packs()
        while step := list(itertools.islice(packs, self.step)):
            learnt = [int(self.pieces.learnt[index].sum()) for index, *_ in step]
            before, place = place, step[-1][1:]
            for i in range(self.rank, len(step), self.num_replicas):
                weight = learnt[i] * len(step) / sum(learnt)
                done = i + self.num_replicas >= len(step)
                yield self.pack(step[i][0], weight, *(place if done else before))
            if self.rank >= len(step):
                pack = self.pack(step[0][0])
                yield pack._replace(targets=torch.full_like(pack.targets, IGNORED))

    def packs(self) -> Iterator[tuple[np.ndarray, int, int]]:
        """The pieces of each pack, and the epoch and row behind it."""
        row = self.row
        for epoch in itertools.count(self.epoch):
            order = np.arange(len(self.pieces.document))
            if self.seed is not None:
                order = np.random.default_rng([self.seed, epoch]).permutation(order)
            ends = np.cumsum(self.pieces.length[order])
            bounds = [0]  # of packs, in pieces
            while bounds[-1] < len(order):
                before = ends[bounds[-1] - 1] if bounds[-1] else 0
                bounds.append(int(np.searchsorted(ends, before + self.size, "right")))
            for i in range(row, len(bounds) - 1):
                yield order[bounds[i] : bounds[i + 1]], epoch, i + 1
            if self.seed is None:
                return
            row = 0

    def pack(self, index: np.ndarray, weight: float = 1.0, epoch: int = 0, row: int = 0) -> Pack:
        """The pieces of these indices."""
        pieces = self.pieces.select(index)
        tokens, targets = [], []
        for document, start, length, learnt in zip(*pieces, strict=True):
            piece = self.documents.tokens(document)[start : start + length + 1].astype(np.int64)
            tokens.append(piece[:-1])
            targets.append(np.where(np.arange(length) < length - learnt, IGNORED, piece[1:]))
        ends = np.concatenate([[0], np.cumsum(pieces.length)])
        row_of = (torch.from_numpy(np.concatenate(x))[None] for x in (tokens, targets))
        return Pack(*row_of, torch.from_numpy(ends), weight, epoch, row)


class DocumentData(lightning.LightningDataModule):
    """Training on most pieces of the documents, validation on the last.

    ``place`` is that of the next pack: whoever trains on a pack sets it to the one after. It goes
    into Lightning's checkpoints, so that a resumed run reads on where it was.

    Args:
        size: tokens of a pack at most.
        ctx_len: tokens of a piece at most; not above ``size``.
        val_share: of the pieces, for validation; at least one, and not all.
        batch_size: packs of a step, of all processes together.

    Raises:
        ValueError: there are not two pieces.
    """

    def __init__(
        self,
        documents: Documents,
        size: int,
        ctx_len: int,
        seed: int,
        val_share: float,
        batch_size: int = 1,
    ) -> None:
        super().__init__()
        pieces = Pieces.of(documents, ctx_len)
        count = len(pieces.document)
        if count < 2:
            raise ValueError(
                f"--data: expected at least 2 pieces of text to learn from, one of them for "
                f"validation, got {count}"
            )
        cut = max(1, count - max(1, round(count * val_share)))
        parts = (pieces.select(part) for part in (slice(cut), slice(cut, None)))
        self.train_packs, self.val_packs = (
            functools.partial(Packs, documents, part, size) for part in parts
        )
        self.seed, self.batch_size = seed, batch_size
        self.size_of_data = {"pieces": count, "tokens": int(pieces.length.sum())}
        self.place = (0, 0)  # epoch, row

    def train_dataloader(self) -> DataLoader[Pack]:
        packs = self.train_packs(self.seed, *self.place, step=self.batch_size, **share_of(self))
        return DataLoader(packs, batch_size=None)

    def val_dataloader(self) -> DataLoader[Pack]:
        share = share_of(self)
        packs = self.val_packs(step=share["num_replicas"], **share)
        return DataLoader(packs, batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        return {"place": list(self.place), **self.size_of_data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in self.size_of_data.items():
            if state[name] != value:
                raise ValueError(
                    f"--data: expected that of the run, with {state[name]:,} {name}, got {value:,}"
                )
        epoch, row = state["place"]
        self.place = (epoch, row)
