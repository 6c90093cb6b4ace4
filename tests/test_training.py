"""examples/train.py and its data: what is learnt, that it can be resumed, and used afterwards."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from one_line import assert_refused
from torch.nn.functional import cross_entropy

for package in ("datasets", "lightning", "matplotlib", "peft"):
    pytest.importorskip(package, reason="the examples need torch_rwkv6[examples]")

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))  # as running a script does
import datasets  # noqa: E402
import documents  # noqa: E402
import memory  # noqa: E402
import text_model  # noqa: E402
import train  # noqa: E402
import train_lm  # noqa: E402
from documents import IGNORED, DocumentData, Packs, Pieces, read_documents  # noqa: E402

from torch_rwkv6.models import load, read, save  # noqa: E402

CHECKPOINT = Path(__file__).parent / "data" / "rwkv6-kjv.pth"
ROWS = [(f"What is {i} plus one? ", f"It is {i + 1}.") for i in range(120)]
STEPS = 8
SECONDS = 400  # for all cases of one launch
SMALL = ["--ctx-len", "64", "--tokens", "160", "--tokenizer", "bytes", "--val-every", "4"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    rows = ({"prompt": p, "completion": c} for p, c in rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "questions.jsonl", ROWS)


def binidx(prefix: Path, texts: list[bytes], items: list[int] | None = None) -> Path:
    """A .bin and .idx of documents of one item each, or of so many items, as RWKV-LM writes it."""
    sizes = [len(text) for text in texts]
    pointers = [0, *itertools.accumulate(2 * size for size in sizes)][:-1]
    index = [0, *itertools.accumulate(items or [1] * len(texts))]
    prefix.with_suffix(".bin").write_bytes(
        np.frombuffer(b"".join(texts), np.uint8).astype(np.uint16).tobytes()
    )
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, 8, len(sizes), len(index))
        + struct.pack(f"<{len(sizes)}i{len(sizes)}q{len(index)}q", *sizes, *pointers, *index)
    )
    return prefix.with_suffix(".bin")


class TestDocuments:
    TEXTS = (b"In the beginning", b"God created", b"the heaven\nand the earth")

    def write(self, folder: Path, suffix: str) -> Path:
        path = folder / f"data{suffix}"
        texts = [text.decode() for text in self.TEXTS]
        if suffix == ".txt":
            path.write_text("\n\n".join(texts))
        elif suffix == ".jsonl":
            path.write_text("".join(json.dumps({"text": x, "id": 0}) + "\n" for x in texts))
        elif suffix == ".parquet":
            datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
        else:
            binidx(path, list(self.TEXTS))
        return path

    @pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet", ".bin", ".idx"])
    def test_every_format_has_the_same_documents(self, suffix: str, tmp_path: Path) -> None:
        found = read_documents(str(self.write(tmp_path, suffix)), "bytes", 256)
        assert [bytes(found.tokens(i).tolist()) for i in range(3)] == list(self.TEXTS)
        assert found.lengths.tolist() == [len(x) for x in self.TEXTS]
        assert not found.prompts.any()

    @pytest.mark.parametrize(("sample_by", "count"), [("line", 6), ("document", 1)])
    def test_what_a_document_of_a_text_is(self, sample_by: str, count: int, tmp_path: Path) -> None:
        path = self.write(tmp_path, ".txt")
        assert len(read_documents(str(path), "bytes", 256, sample_by).lengths) == count

    def test_a_document_may_have_several_items(self, tmp_path: Path) -> None:
        path = binidx(tmp_path / "data", list(self.TEXTS), [2, 1])
        found = read_documents(str(path), "bytes", 256)
        assert bytes(found.tokens(0).tolist()) == self.TEXTS[0] + self.TEXTS[1]
        assert bytes(found.tokens(1).tolist()) == self.TEXTS[2]

    def test_a_name_with_dots(self, tmp_path: Path) -> None:
        binidx(tmp_path / "data.idx", [b"another corpus"])
        path = binidx(tmp_path / "data.v1.bin", list(self.TEXTS))
        found = read_documents(str(path), "bytes", 256)
        assert bytes(found.tokens(0).tolist()) == self.TEXTS[0]

    def test_tokens_of_another_vocabulary_are_refused(self, tmp_path: Path) -> None:
        path = binidx(tmp_path / "data", list(self.TEXTS))
        with pytest.raises(ValueError, match=r"--data: expected tokens from 0 to 99.* got 32 to"):
            read_documents(str(path), "bytes", 100).tokens(0)

    def test_prompts_and_the_end_of_text(self, questions: Path) -> None:
        pytest.importorskip("rwkv", reason="the World vocabulary needs torch_rwkv6[text]")
        found = read_documents(str(questions), "world", 65536)
        world = documents.tokenizer_for("world", 65536)
        prompt, completion = (world.encode(x) for x in ROWS[7])
        assert found.tokens(7).tolist() == [*prompt, *completion, 0]
        assert found.prompts[7] == len(prompt)
        assert found.lengths[7] == len(prompt) + len(completion) + 1

    def test_tokens_are_cached(self, questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = read_documents(str(questions), "bytes", 256)
        monkeypatch.setattr(documents, "tokenizer_for", None)
        again = read_documents(str(questions), "bytes", 256)
        assert again.tokens(3).tolist() == first.tokens(3).tolist()

    def test_several_processes(self, questions: Path) -> None:
        one = read_documents(str(questions), "bytes", 256)
        two = read_documents(str(questions), "bytes", 256, workers=2)
        for x, y in zip(one[:2], two[:2], strict=True):
            assert x.tolist() == y.tolist()
        assert all(one.tokens(i).tolist() == two.tokens(i).tolist() for i in range(len(ROWS)))

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("x.csv", b"text", "expected a file of .txt, .jsonl"),
            (
                "x.jsonl",
                b'{"words": 1}\n',
                'expected a column "text", or "prompt" and "completion"',
            ),
            ("x.jsonl", b'{"text": 1}\n', 'expected text in the column "text", got int'),
            ("x.jsonl", b'{"text"\n', "x.jsonl: "),
            ("x.txt", b"caf\xe9", "x.txt: 'utf-8' codec"),
            ("x.parquet", b"none", "x.parquet: "),
            ("x.idx", b"", "is no index of version 1"),
            ("x.idx", b"MMIDIDX\0\0" + struct.pack("<QBQQ", 2, 8, 0, 1), "no index of version 1"),
            ("x.idx", b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 6, 0, 1), "no index of version 1"),
            ("x.idx", b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 1, 2), "is truncated"),
            (
                "x.idx",
                b"MMIDIDX\0\0" + struct.pack("<QBQQiqqq", 1, 8, 1, 2, 9, 0, 0, 1)[:61],
                "does not fit",
            ),
        ],
        ids=itertools.count(),
    )
    def test_files_that_are_none(
        self, name: str, content: bytes, message: str, tmp_path: Path
    ) -> None:
        (tmp_path / "x.bin").write_bytes(b"1234")
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="--data: ") as raised:
            read_documents(str(tmp_path / name), "bytes", 256)
        assert message in str(raised.value)


def some_documents(seed: int = 0) -> documents.Documents:
    """Random documents of up to 40 tokens, some of them with prompts, some of them empty."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 41, 60)
    prompts = np.where(random.random(60) < 0.5, random.integers(0, lengths + 1), 0)
    tokens = [random.integers(0, 256, n) for n in lengths]
    return documents.Documents(lengths, prompts, tokens.__getitem__)


@pytest.mark.parametrize("ctx_len", [1, 7, 64])
def test_every_token_to_learn_is_learnt_once(ctx_len: int) -> None:
    found = some_documents()
    expected = [
        (tuple(found.tokens(d)[(i - 1) // ctx_len * ctx_len : i]), found.tokens(d)[i])
        for d in range(60)
        for i in range(max(1, found.prompts[d]), found.lengths[d])
    ]
    learnt = []
    for pack in Packs(found, Pieces.of(found, ctx_len), 64):
        assert 0 < pack.tokens.shape[1] <= 64
        tokens, targets = pack.tokens[0].tolist(), pack.targets[0].tolist()
        for begin, end in itertools.pairwise(pack.cu_seqlens.tolist()):
            assert end > begin
            for i in range(begin, end):
                if targets[i] != IGNORED:
                    learnt.append((tuple(tokens[begin : i + 1]), targets[i]))
    assert learnt == expected  # with all that was read before it, of its piece


def test_packs_are_as_full_as_whole_pieces_make_them() -> None:
    found = some_documents()
    packs = itertools.islice(Packs(found, Pieces.of(found, 64), 64, seed=3), 100)
    for pack, after in itertools.pairwise(x for x in packs if x.epoch == 0):
        assert pack.cu_seqlens[-1] + after.cu_seqlens[1] > 64


def test_the_order_is_another_in_each_epoch_and_goes_on_anywhere() -> None:
    found = some_documents()
    pieces = Pieces.of(found, 16)

    def packs(*place: int) -> list[documents.Pack]:
        every = Packs(found, pieces, 64, 5, *place)
        return list(itertools.takewhile(lambda pack: pack.epoch < 3, every))

    whole = packs()
    content = [sorted(torch.cat([p.tokens[0] for p in whole if p.epoch == e])) for e in range(3)]
    assert content[0] == content[1] == content[2]
    first = [next(p.tokens for p in whole if p.epoch == e) for e in range(3)]
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])
    for i, pack in enumerate(whole):
        rest = packs(pack.epoch, pack.row)
        assert len(rest) == len(whole) - i - 1
        for x, y in zip(rest, whole[i + 1 :], strict=True):
            assert torch.equal(x.tokens, y.tokens)
            assert x[3:] == y[3:]


@pytest.mark.parametrize(("step", "num_replicas"), [(1, 1), (3, 1), (2, 2), (6, 3)])
def test_processes_share_out_the_packs_of_each_step(step: int, num_replicas: int) -> None:
    found = some_documents()
    pieces = Pieces.of(found, 16)
    place = (1, 2)  # of a run that goes on
    one_by_one = iter(Packs(found, pieces, 64, 5, *place))
    shares = [
        iter(Packs(found, pieces, 64, 5, *place, step=step, rank=rank, num_replicas=num_replicas))
        for rank in range(num_replicas)
    ]
    for _ in range(20):  # steps, through several epochs
        whole = list(itertools.islice(one_by_one, step))
        packs = [list(itertools.islice(share, step // num_replicas)) for share in shares]
        for pack in itertools.chain(*packs):
            assert any(torch.equal(pack.tokens, other.tokens) for other in whole)
        for own in packs:
            assert {x[-2:] for x in own[:-1]} <= {place}
            assert own[-1][-2:] == whole[-1][-2:]
        place = whole[-1][-2:]
        # the mean of the packs' means, by their weights, is the mean over what is learnt in a step
        targets = [x.targets[x.targets != IGNORED].double() for x in whole]
        means = [
            x.weight * x.targets[x.targets != IGNORED].double().mean()
            for x in itertools.chain(*packs)
        ]
        assert sum(means) / step == pytest.approx(torch.cat(targets).mean().item())


def test_processes_validate_on_all_packs_and_as_many_each() -> None:
    found = some_documents()
    pieces = Pieces.of(found, 16)
    whole = [x.targets for x in Packs(found, pieces, 64)]
    assert len(whole) % 3 == 1
    shares = [list(Packs(found, pieces, 64, step=3, rank=i, num_replicas=3)) for i in range(3)]
    assert {len(x) for x in shares} == {len(whole) // 3 + 1}
    learnt = [x.targets for share in shares for x in share if (x.targets != IGNORED).any()]
    assert sorted(x.tolist() for x in learnt) == sorted(x.tolist() for x in whole)


def test_a_document_in_a_pack_has_the_loss_and_gradient_that_it_has_alone(questions: Path) -> None:
    found = read_documents(str(questions), "bytes", 256)
    pack = next(iter(Packs(found, Pieces.of(found, 64), 160)))
    assert len(pack.cu_seqlens) == 6
    model = load(CHECKPOINT, dtype=torch.float64)
    packed, _ = text_model.loss_of(model, *pack[:2], cu_seqlens=pack.cu_seqlens)
    learnt = (pack.targets != IGNORED).sum()
    alone = []
    for prompt, completion in ROWS[:5]:
        tokens = torch.tensor([list((prompt + completion).encode())])
        logits, _ = model(tokens[:, :-1])
        of_completion = slice(len(prompt) - 1, None)
        alone.append(
            cross_entropy(logits[0, of_completion], tokens[0, 1:][of_completion], reduction="sum")
        )
    assert learnt == sum(len(completion) for _, completion in ROWS[:5])
    assert packed.item() == pytest.approx((sum(alone) / learnt).item(), rel=1e-6)  # in float32
    gradients = [
        torch.autograd.grad(loss, [*model.parameters()]) for loss in (packed, sum(alone) / learnt)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_learning_rates_are_those_of_rwkv_lm() -> None:
    """Against values worked out by hand from RWKV-v5/src/trainer.py."""
    for kind, arguments, expected in (
        ("exponential", (100, 0, 0.01), {0: 0.01**0.01, 49: 0.1, 99: 0.01, 200: 0.01}),
        ("linear", (100, 0, 0.0), {0: 0.99, 49: 0.5, 99: 0.0}),
        ("cosine", (100, 20, 0.1), {0: 0.2, 10: 0.6, 20: 1.0, 60: 0.55, 100: 0.1}),
        ("exponential", (30, 10, 1.0), {0: 0.2, 5: 0.6, 10: 1.0, 29: 1.0}),
    ):
        factor = text_model.official_factor(kind, *arguments)
        assert {step: factor(step) for step in expected} == pytest.approx(expected)


def run(out: Path, *arguments: str | Path) -> int:
    return train.main([*SMALL, "--out", str(out), "--steps", str(STEPS), *map(str, arguments)])


def bits(output: str) -> list[float]:
    """What the program reports: before and after."""
    lines = output[output.index("validation loss") :].splitlines()[1:]
    return [float(line.rpartition(": ")[2]) for line in lines if line.startswith("  ")]


def test_from_scratch(questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--n-layer", "2", "--n-embd", "32", "--head-size", "16", "--weight-decay", "0.1"]
    options = ["--lr", "2e-2", "--steps", "40", "--warmup", "4"]
    assert run(tmp_path, "--data", questions, *sizes, *options) == 0
    before, after = bits(capsys.readouterr().out)
    assert before == pytest.approx(8, abs=0.5)  # of 256 tokens none is likelier
    assert after < 5
    model = load(tmp_path / "model.pth")
    assert (model.n_layer, model.n_embd, model.vocab_size) == (2, 32, 256)
    groups = read(tmp_path / "last.ckpt")["optimizer_states"][0]["param_groups"]
    rates = {g["name"]: (g["initial_lr"], g["weight_decay"]) for g in groups}
    assert rates == {"decay_speed": (4e-2, 0), "matrices": (2e-2, 0.1), "rest": (2e-2, 0)}
    assert groups[1]["lr"] == pytest.approx(2e-2 / 60)


# what is trained, with a learning rate for a few steps
MODES = {
    "full": ["--lr", "1e-3"],
    "lora": ["--train", "lora", "--lr", "1e-2", "--rank", "4"],
    "state": ["--train", "state"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in float32."""
    path = tmp_path_factory.mktemp("base") / "base.pth"
    save(load(CHECKPOINT, dtype=torch.float32), path)
    return path


@pytest.fixture(scope="module")
def whole(
    questions: Path, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of an uninterrupted run of each mode."""
    done: dict[str, Path] = {}

    def of(mode: str) -> Path:
        if mode not in done:
            out = tmp_path_factory.mktemp(mode)
            options = ["--data", questions, "--model", base, *MODES[mode]]
            assert run(out, *options) == 0
            done[mode] = out
        return done[mode]

    return of


def written(out: Path) -> dict[str, torch.Tensor]:
    """All tensors of the result."""
    files = [*out.glob("*.pth"), *out.glob("lora/*.safetensors")]
    return {f"{file.name} {name}": x for file in files for name, x in read(file).items()}


def val_losses(out: Path) -> list[float]:
    """All that the run, and those that went on with it, have logged."""
    losses = []
    for log in sorted(out.glob("log/version_*/metrics.csv")):
        rows = [row.split(",") for row in log.read_text().splitlines()]
        column = rows[0].index("val_loss")
        losses += [float(row[column]) for row in rows[1:] if row[column]]
    return losses


@pytest.mark.parametrize(
    ("mode", "number", "code"),
    [("full", signal.SIGINT, 130), *((mode, signal.SIGTERM, 143) for mode in MODES)],
)
def test_resuming_equals_not_having_stopped(
    mode: str,
    number: int,
    code: int,
    whole: Callable[[str], Path],
    base: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = written(whole(mode))
    batches: list[documents.Pack] = []
    stop_at = STEPS // 2 - 1
    training_step = train.DocumentModel.training_step

    def step(module: train.DocumentModel, batch: documents.Pack, index: int) -> torch.Tensor:
        batches.append(batch)
        if module.global_step == stop_at:
            signal.raise_signal(number)
        return training_step(module, batch, index)

    monkeypatch.setattr(train.DocumentModel, "training_step", step)
    options = ["--data", questions, "--model", base, *MODES[mode]]
    assert run(tmp_path, *options) == code
    assert "train.py: interrupted; what was learnt until then is written" in capsys.readouterr().err
    assert len(batches) == STEPS // 2
    stop_at = -1
    assert train.main(["--resume", str(tmp_path / "last.ckpt"), "--out", str(tmp_path)]) == 0
    assert len(batches) == STEPS  # as many as the run was asked for
    found = written(tmp_path)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name

    settings = read(tmp_path / "last.ckpt")["hyper_parameters"]
    data = DocumentData(
        read_documents(str(questions), "bytes", 256),
        settings["tokens"],
        settings["ctx_len"],
        settings["seed"],
        settings["val_share"],
    )
    for batch, other in zip(batches, data.train_dataloader(), strict=False):
        assert torch.equal(batch.tokens, other.tokens)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    whole: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "last.ckpt"
    shutil.copy(whole("state") / "last.ckpt", file)
    (tmp_path / ".last.ckpt.99.part").write_text("of a process that was killed")
    before = file.read_bytes()

    def full(_: object, path: Path) -> None:
        assert Path(path).parent == tmp_path  # where it can be renamed
        Path(path).write_bytes(before[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with mock.patch.object(torch, "save", full):
        resume = ["--resume", str(file), "--out", str(tmp_path), "--steps", "9"]
        assert train.main(resume) == 2
    message = capsys.readouterr().err
    assert "train.py: error: [Errno 28] cannot be written: No space left on device: " in message
    assert file.read_bytes() == before
    assert not [*tmp_path.glob(".*")]


def test_progress_is_of_all_steps(
    whole: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--resume", str(whole("state") / "last.ckpt"), "--steps", "10"]
    assert train.main([*options, "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "Epoch" not in output
    for step in ("8/10", "9/10", "10/10"):
        assert step in output


def test_validation_never_takes_all(questions: Path) -> None:
    data = DocumentData(read_documents(str(questions), "bytes", 256), 256, 128, 0, val_share=1.0)
    assert next(iter(data.train_dataloader())).tokens.numel()
    assert next(iter(data.val_dataloader())).tokens.numel()


def test_a_lora_loads_back(whole: Callable[[str], Path], base: Path) -> None:
    tokens = torch.arange(97, 123)[None]
    with torch.no_grad():
        before = load(base)(tokens)[0]
        merged = load(whole("lora") / "model.pth")(tokens)[0]
        beside = load(base, lora=whole("lora") / "lora")(tokens)[0]
    torch.testing.assert_close(beside, merged, rtol=1e-4, atol=1e-4)
    assert (merged - before).abs().max() > 0.1
    names = {name for name in written(whole("lora")) if "lora_" in name}
    assert len(names) == 2 * 2 * 8  # A and B, layers, matrices
    trained = read(whole("lora") / "last.ckpt")["state_dict"]
    assert len(trained) == len(names)  # and not the model


def test_states_load_back(whole: Callable[[str], Path], base: Path) -> None:
    states = read(whole("state") / "state.pth")
    assert {name: tuple(x.shape) for name, x in states.items()} == {
        f"blocks.{i}.att.time_state": (2, 32, 32) for i in range(2)
    }
    tokens = torch.arange(97, 123)[None]
    with torch.no_grad():
        before = load(base)(tokens)[0]
        tuned = load(base, state=whole("state") / "state.pth")(tokens)[0]
    assert (tuned - before).abs().max() > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_what_is_reported_is_what_the_files_do(
    mode: str, whole: Callable[[str], Path], base: Path
) -> None:
    source, options = whole(mode) / "model.pth", {}
    if mode == "state":
        source, options = base, {"state": whole(mode) / "state.pth"}
    losses = []
    for model in (load(base), load(source, **options)):
        bits = [], []
        for prompt, completion in ROWS[-2:]:  # 2 % of 120
            tokens = torch.tensor([list((prompt + completion).encode())])
            with torch.no_grad():
                logits = model(tokens[:, :-1])[0][0, len(prompt) - 1 :]
            bits[0].append(cross_entropy(logits, tokens[0, len(prompt) :], reduction="sum"))
            bits[1].append(len(completion))
        losses.append(float(sum(bits[0])) / sum(bits[1]))
    assert losses[1] < losses[0] - 0.02
    reported = val_losses(whole(mode))
    assert [reported[0], reported[-1]] == pytest.approx(losses, rel=1e-4)


def test_the_loss_of_a_step_is_the_mean_over_what_is_learnt_in_all_its_packs(
    base: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []
    record = train.DocumentModel.record
    monkeypatch.setattr(
        train.DocumentModel,
        "record",
        lambda module, loss: (losses.append(loss.item()), record(module, loss)),
    )
    options = ["--model", base, "--batch-size", "3", "--steps", "1", "--tokens", "70"]
    assert run(tmp_path, "--data", questions, *options) == 0
    found = read_documents(str(questions), "bytes", 256)
    packs = DocumentData(found, 70, 64, seed=0, val_share=0.02).train_dataloader()
    model, sums, learnt = load(base), [], []
    for pack in itertools.islice(packs, 3):
        with torch.no_grad():
            logits, _ = model(pack.tokens, cu_seqlens=pack.cu_seqlens)
        sums.append(cross_entropy(logits[0], pack.targets[0], reduction="sum").item())
        learnt.append(int((pack.targets != IGNORED).sum()))
    expected = sum(sums) / sum(learnt)
    of_means = sum(x / n for x, n in zip(sums, learnt, strict=True)) / 3
    assert of_means != pytest.approx(expected, rel=1e-4)
    assert losses == [pytest.approx(expected, rel=1e-6)]


def test_gradient_checkpointing(
    whole: Callable[[str], Path], base: Path, questions: Path, tmp_path: Path
) -> None:
    options = ["--data", questions, "--model", base, *MODES["full"], "--grad-cp"]
    assert run(tmp_path, *options) == 0
    expected = written(whole("full"))
    for name, x in written(tmp_path).items():
        torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=1e-6)

    tokens = torch.randint(97, 123, (4, 257))
    peaks = []
    for recompute in (False, True):
        model = load(base)
        model.gradient_checkpointing = recompute

        def step(model=model) -> None:
            model.features(tokens)[0].sum().backward()

        peaks.append(memory.peak_memory(step))
    assert peaks[1] < 0.7 * peaks[0]


def test_the_compiled_model_is_what_is_trained(
    whole: Callable[[str], Path],
    base: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the seconds of a compiler; tests/test_packed_models.py compiles a model."""
    calls = []

    def compile(call: Callable[..., object], **options: bool) -> Callable[..., object]:
        assert options == {"dynamic": True}  # rows have as many tokens as fit

        def compiled(*args: object, **options: object) -> object:
            calls.append(torch.is_grad_enabled())
            return call(*args, **options)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    options = ["--data", questions, "--model", base, *MODES["lora"], "--compile"]
    assert run(tmp_path, *options) == 0
    assert (calls.count(True), calls.count(False)) == (STEPS, 3)  # validated at first, 4 and 8
    expected = written(whole("lora"))
    assert all(torch.equal(x, expected[name]) for name, x in written(tmp_path).items())


def test_other_data_are_refused_on_resuming(
    whole: Callable[[str], Path], questions: Path, tmp_path: Path, capsys
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(questions.read_text().splitlines(keepends=True)[1:]))
    resume = ["--resume", str(whole("state") / "last.ckpt"), "--steps", "20"]
    assert train.main([*resume, "--data", str(other), "--out", str(tmp_path)]) == 2
    assert "--data: expected that of the run, with 120 pieces, got 119" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_training(
    base: Path, questions: Path, tmp_path: Path, capsys
) -> None:
    assert run(tmp_path, "--data", questions, "--model", base, "--lr", "1e20") == 2
    assert "try a smaller --lr" in capsys.readouterr().err
    assert not (tmp_path / "model.pth").exists()


# ---- several processes

DDP, FSDP2, HEADS = (
    ["--strategy", "ddp"],
    ["--strategy", "fsdp2"],
    ["--strategy", "fsdp2", "--tensor-parallel", "2"],
)


Steps = list[tuple[float, float]]  # the loss of each, and the norm of its gradient


class Runs:
    """Runs of a program by this process, by one alone and as torchrun starts several."""

    def __init__(self, main: Callable[[list[str]], int], folder: Path, options: list[str]) -> None:
        self.main, self.folder = main, folder / main.__module__
        self.start = [*options, "--val-every", "2", "--lr", "3e-2", "--steps", "4", "--out"]
        alone: Steps = []
        if dist.get_rank() == 0:
            assert self.run([*self.start, str(self.folder / "one")], alone) == 0
        dist.barrier()
        self.expected = every(alone)[0]
        losses, norms = zip(*self.expected, strict=True)
        assert len(losses) == 4
        assert losses[-1] < losses[0] - 1
        assert max(norms) > 1.5 * min(norms) > 1.5  # of gradients, which are clipped to 1

    def run(self, arguments: list[str], steps: Steps, stop_at: int = -1) -> int:
        """Notes the steps; the second process is told to stop in the step ``stop_at``."""
        rank, size = dist.get_rank(), dist.get_world_size()
        record, clip = text_model.TextModel.record, torch.nn.utils.clip_grad_norm_
        losses: list[float] = []

        def recorded(module: text_model.TextModel, loss: torch.Tensor) -> None:
            if rank == 1 and module.global_step == stop_at:
                signal.raise_signal(signal.SIGTERM)
            record(module, loss)
            losses.append(module.losses[-1])

        def clipped(*arguments: object, **options: object) -> torch.Tensor:
            norm = clip(*arguments, **options)
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            steps.append((losses[-1], whole.item()))
            return norm

        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        launched = {n: str(x) for n, x in ranks.items()} | {"TORCHELASTIC_RUN_ID": "0"}
        with (
            mock.patch.dict(os.environ, launched if "--strategy" in arguments else {}),
            mock.patch.object(text_model.TextModel, "record", recorded),
            mock.patch.object(torch.nn.utils, "clip_grad_norm_", clipped),
        ):
            return self.main(arguments)

    def stop(self, options: list[str]) -> tuple[Path, Steps]:
        """The folder of a run that was stopped in its second step, and its steps."""
        out = self.folder / options[1]
        steps: Steps = []
        code = self.run([*self.start, str(out), *options], steps, stop_at=1)
        assert code == (143, 0)[dist.get_rank()]
        assert len(steps) == 2  # both stopped
        return out, steps

    def go_on(self, stopped: tuple[Path, Steps], name: str, options: list[str]) -> Path:
        """The folder of a run that goes on with a checkpoint, and learns what one process has.

        Without options it is one process.
        """
        resumed, steps = stopped[0], stopped[1].copy()
        out = resumed.with_name(" ".join([resumed.name, "to", *options]))
        whole = self.folder / "one"
        if dist.get_rank() == 0:
            shutil.copytree(resumed, out)
        dist.barrier()
        resume = ["--resume", str(out / name), "--val-every", "2", "--out", str(out)]
        resume += self.start[:2]  # --data
        if options or dist.get_rank() == 0:
            assert self.run([*resume, *options], steps) == 0
        dist.barrier()
        found = every(steps)
        assert found[0] == found[1] or not options
        for one, expected in zip(found[0], self.expected, strict=True):
            assert one == pytest.approx(expected, rel=1e-4)
        assert val_losses(out)[-2:] == pytest.approx(val_losses(whole)[-2:], rel=1e-4)
        weights = read(whole / "model.pth")
        learnt = read(out / "model.pth")
        assert learnt.keys() == weights.keys()
        for key, x in learnt.items():
            torch.testing.assert_close(x, weights[key], rtol=1e-3, atol=1e-4)
        return out


def a_folder() -> Path:
    """The same for all processes."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    return Path(folder[0])


def documents_are_learnt_as_by_one_process() -> None:
    folder = a_folder()
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    if dist.get_rank() == 0:
        # as long as one another: torch plans for every number of tokens once
        rows = [(f"What is {i} plus one? ", f"It is {i + 1}.") for i in range(100, 220)]
        write_rows(folder / "questions.jsonl", rows)
    sizes = ["--n-layer", "1", "--n-embd", "32", "--head-size", "16", "--batch-size", "4"]
    options = ["--data", str(folder / "questions.jsonl"), *SMALL, *sizes, "--val-share", "0.1"]
    runs = Runs(train.main, folder, options)
    stopped = runs.stop(DDP)
    first = val_losses(stopped[0])[0]
    assert first == pytest.approx(val_losses(runs.folder / "one")[0], rel=1e-5)
    runs.go_on(stopped, "last.ckpt", DDP)
    runs.go_on(stopped, "last.ckpt", HEADS)
    stopped = runs.stop(FSDP2)
    a_disk_gets_full(runs, stopped[0])
    runs.go_on(stopped, "last.dcp", DDP)
    runs.go_on(stopped, "last.dcp", [])
    out = runs.go_on(stopped, "last.dcp", HEADS)
    weights = read(out / "model.pth")
    model = load(out / "last.dcp")
    assert all(torch.equal(x, weights[name]) for name, x in model.named_parameters())
    a_lora_is_learnt_over_fsdp2(folder, runs)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


def a_lora_is_learnt_over_fsdp2(folder: Path, runs: Runs) -> None:
    """Two steps of two processes have the LoRA and the merged model of one process."""
    one, two, base = folder / "lora of one", folder / "lora", runs.folder / "one" / "model.pth"
    options = ["--data", str(folder / "questions.jsonl"), *SMALL, "--batch-size", "4", "--steps"]
    options += ["2", "--model", str(base), "--train", "lora", "--rank", "2", "--lr", "1e-2"]
    if dist.get_rank() == 0:
        assert runs.run([*options, "--out", str(one)], []) == 0
    dist.barrier()
    assert runs.run([*options, "--out", str(two), *FSDP2], []) == 0
    dist.barrier()
    expected, found = written(one), written(two)
    assert found.keys() == expected.keys()
    assert any("lora_B" in name for name in found)
    before = read(base)
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-3, atol=1e-5)
        if ".att.key.weight" in name and "model.pth" in name:
            assert (x - before[name.removeprefix("model.pth ")]).abs().max() > 1e-4


def a_disk_gets_full(runs: Runs, out: Path) -> None:
    """While the second process writes its part of a checkpoint: the one before it stays."""

    write_data = dcp.FileSystemWriter.write_data

    def full(*arguments: object) -> object:
        if dist.get_rank() == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_data(*arguments)

    def content() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in out.glob("last.dcp/**/*") if file.is_file()}

    before = content()
    resume = ["--resume", str(out / "last.dcp"), "--out", str(out), "--val-every", "2"]
    errors = io.StringIO()
    with (
        mock.patch.object(dcp.FileSystemWriter, "write_data", full),
        contextlib.redirect_stderr(errors),
    ):
        assert runs.run([*resume, *runs.start[:2], *FSDP2], []) == 2
    assert "No space left on device" in errors.getvalue()
    dist.barrier()
    assert content() == before
    assert not [*out.glob(".*")]


def lanes_are_learnt_as_by_one_process() -> None:
    folder = a_folder()
    if dist.get_rank() == 0:
        (folder / "text.txt").write_text("one two three four five six seven eight nine ten\n" * 40)
    sizes = ["--n-layer", "1", "--n-embd", "32", "--head-size", "16", "--batch-size", "4"]
    options = ["--data", str(folder / "text.txt"), *sizes, "--lora-mix", "4", "--length", "8"]
    with mock.patch.object(train_lm, "generate_text", return_value=["a sample"]):
        runs = Runs(train_lm.main, folder, options)
        out = runs.go_on(runs.stop(FSDP2), "last.dcp", HEADS)
    states = (
        read(x)["train_state"] for x in (out / "last.dcp/meta.pt", runs.folder / "one/last.ckpt")
    )
    for x, y in zip(*states, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


def every(x: Steps) -> list[Steps]:
    """That of every process."""
    found: list[Steps] = [[]] * dist.get_world_size()
    dist.all_gather_object(found, x)
    return found


CASES = {
    2: {
        x.__name__: x
        for x in (documents_are_learnt_as_by_one_process, lanes_are_learnt_as_by_one_process)
    }
}


@pytest.mark.parametrize("name", CASES[2])
def test_over_processes(name: str, errors: dict[int, dict[str, str]]) -> None:
    assert not errors[2][name], errors[2][name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: expected an integer of at least 1, got '0'"),
        (["--lr", "nan"], "--lr: expected a finite number > 0, got 'nan'"),
        (["--lr-final", "0"], "--lr-final: expected a number > 0 with --schedule exponential"),
        (["--alpha", "nan"], "--alpha: expected a finite number > 0, got 'nan'"),
        (["--val-share", "0"], "--val-share: expected a finite number > 0 and <= 1"),
        (["--rank", "0"], "--rank: expected an integer of at least 1, got '0'"),
        (["--tokens", "100"], "--tokens: expected at least --ctx-len 1024, got 100"),
        (["--resume", CHECKPOINT], "--resume: expected a training checkpoint of this program"),
        (["--resume", "no.ckpt"], "--resume: no such file: no.ckpt"),
        (["--out", __file__], "--out: cannot be written"),
        (["--data", "no.txt"], "--data: no such file: no.txt"),
        (["--data", "."], "--data: expected a file, got the folder ."),
        (["--data", "x.csv"], "--data: expected a file of .txt"),
        (["--data", "one.txt"], "--data: expected at least 2 pieces"),
        (["--train", "lora"], "--train: lora needs a --model"),
        (["--train", "all"], "--train: invalid choice: 'all'"),
        (["--model", "no.pth"], "no such file: no.pth"),
        (["--model", "x.csv"], "x.csv is no checkpoint"),
        (["--model", CHECKPOINT, "--n-embd", "64"], "--n-embd: it is that of --model"),
        (["--model", CHECKPOINT, "--tokenizer", "world"], "--tokenizer: expected one of at most"),
        (["--tokenizer", "foo"], "tokenizer: expected bytes, world or a .json file"),
        (
            ["--devices", "2", "--batch-size", "3"],
            "--batch-size: expected a multiple of the 2 proc",
        ),
        (["--strategy", "all"], "--strategy: invalid choice: 'all'"),
        (["--tensor-parallel", "2"], "--tensor-parallel: it is for --strategy fsdp2"),
        (["--num-nodes", "2"], "--num-nodes: expected to be started by torchrun or srun on each"),
        ([*FSDP2, "--devices", "3", "--tensor-parallel", "2"], "expected a divisor of 3 processes"),
        (
            [
                *FSDP2,
                "--devices",
                "3",
                "--tensor-parallel",
                "3",
                "--data",
                "x.txt",
                "--n-embd",
                "128",
            ],
            "--tensor-parallel: expected a divisor of the model's 2 heads, got 3",
        ),
        (
            [*HEADS, "--devices", "2", "--compile"],
            "--tensor-parallel: it is not for --compile",
        ),
        (
            [*HEADS, "--devices", "2", "--model", CHECKPOINT, "--train", "lora"],
            "--tensor-parallel: it is not for --train lora",
        ),
        (["--data", "empty.jsonl"], "--data: expected documents, got the empty file empty.jsonl"),
        (["--resume", "."], "--resume: expected a training checkpoint of this program"),
        (["--n-embd", "100"], "--head-size: expected a divisor of --n-embd 100, got 64"),
    ],
    ids=lambda x: (
        " ".join(map(str, x)).replace(str(CHECKPOINT), "MODEL") if list is type(x) else ""
    ),
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.csv").write_text("text")
    Path("one.txt").write_text("five")
    Path("x.txt").write_text("one\n\ntwo")
    Path("empty.jsonl").touch()
    start = ["--data", "one.txt", "--tokenizer", "bytes"]  # what comes later counts
    assert_refused(train.main, "train.py", [*start, *map(str, arguments)], message, capsys)
