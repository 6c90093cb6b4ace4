"""Trains RWKV-6 on documents, with Lightning: from scratch, a whole model, a LoRA, or states alone.

    pip install torch_rwkv6[examples,text]
    python examples/train.py --data my.jsonl --n-layer 12 --n-embd 768          # from scratch
    python examples/train.py --data my.jsonl --model MODEL.pth                  # all parameters
    python examples/train.py --data my.jsonl --model MODEL.pth --train lora     # Hu et al., 2021
    python examples/train.py --data my.jsonl --model MODEL.pth --train state
    python examples/train.py --resume run/last.ckpt                  # after Ctrl-C or SIGTERM
    python examples/train.py --data my.jsonl --devices 2             # two processes (DDP)
    torchrun --nproc-per-node 4 examples/train.py --data my.jsonl --strategy fsdp2 \
        --tensor-parallel 2                                          # FSDP2 x tensor parallel

Data are .txt, .jsonl, .parquet or RWKV-LM's .bin: see documents.py. Every step reads whole
documents, packed one after the other; each begins from the model's initial state. Of a file with
the columns "prompt" and "completion" the completions are learnt.

A step reads --batch-size packs. What is learnt does not depend on whether one process reads them
one after the other or several share them: a run may be resumed on another number of processes.

A state is what a recurrent model knows of what it has read, so a tuned initial state is a prompt,
the best of its size, which costs nothing when the model is used.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import cli
import lightning
import torch
from corpus import WORLD, tokenizer_name
from documents import IGNORED, DocumentData, Pack, format_of, read_documents, tokenizer_for
from text_model import SCHEDULES, TextModel, loss_of, official_factor, scheduled
from torch import Tensor, nn
from training import (
    PROCESSES,
    add_run_options,
    check_batch_size,
    check_layers,
    checkpoint_of,
    gathered,
    given,
    settings_of,
    share_out,
    train,
    trainer_of,
)

from torch_rwkv6.models import load, load_tokenizer, save
from torch_rwkv6.nn import RWKV6, parameter_groups

# What is trained: the learning rate at first and at last. Scratch and state are RWKV-LM's defaults
# (RWKV-v5/train.py and README.md), LoRA is RWKV-PEFT's (scripts/run_lora.sh).
RATES = {"scratch": (6e-4, 1e-5), "full": (1e-5, 1e-6), "lora": (2e-5, 2e-5), "state": (1.0, 0.01)}
SIZES = ("n_layer", "n_embd", "head_size")
# of the time mixing, and of the channel mixing, which has key, value and receptance too
LORA_LAYERS = ["receptance", "key", "value", "gate", "output"]


class DocumentModel(TextModel):
    """Next-token prediction on packed documents.

    Args:
        model: perhaps with a LoRA.
        settings: of `settings_of`; kept in the checkpoint.
    """

    def __init__(self, model: RWKV6, settings: dict[str, Any]) -> None:
        super().__init__(model, settings["lr"], settings["steps"])
        self.save_hyperparameters(settings)
        self.strict_loading = False  # what is not trained is not in the checkpoints
        self.of_step: list[Tensor] = []  # the losses of its packs until now

    def training_step(self, batch: Pack, index: int) -> Tensor:
        loss = self.loss(batch) * batch.weight
        self.of_step.append(loss.detach())
        if (index + 1) % self.trainer.accumulate_grad_batches == 0:
            self.record(torch.stack(self.of_step).mean())
            self.of_step.clear()
        self.trainer.datamodule.place = (batch.epoch, batch.row)
        return loss

    def validation_step(self, batch: Pack, _: int) -> None:
        loss, learnt = self.loss(batch), int((batch.targets != IGNORED).sum())
        if learnt == 0:  # the mean of nothing is nan
            loss = torch.zeros_like(loss)
        # Lightning takes the mean of these numbers over the processes, rounded down
        weight = learnt * self.trainer.world_size
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=weight)

    def loss(self, batch: Pack) -> Tensor:
        return loss_of(self.model, batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens)[0]

    def configure_optimizers(self) -> dict[str, Any]:
        hp = self.hparams
        groups = parameter_groups(self.model, hp["lr"], hp["weight_decay"])
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8)
        final = hp["lr_final"] / hp["lr"]
        factor = official_factor(hp["schedule"], hp["steps"], hp["warmup"], final)
        return scheduled(optimizer, factor)

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        state = super().state_dict(*args, **options)
        return {name: x for name, x in state.items() if name in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counts the batches of the steps done as this run does, whose processes may be others."""
        done = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        batches = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        for counts in (done["total"], done["current"]):
            more = batches - counts["ready"]
            counts.update({name: count + more for name, count in counts.items()})


def options() -> cli.Parser:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--data", type=cli.input_file, help="documents: .txt, .jsonl, .parquet, or .bin with .idx")
    add("--sample-by", choices=("line", "paragraph", "document"), default="paragraph", help="what "
        "a document of a .txt is; paragraphs end at empty lines")  # fmt: skip
    add("--workers", type=cli.positive, default=1, help="processes that turn text into tokens")
    add("--val-share", type=cli.share, default=0.02, help="of the text, at its end, to validate on")
    add("--model", help="checkpoint of RWKV-6 to start from; without it, a new model is trained")
    add("--train", choices=("full", "lora", "state"), default="full", help="what of --model")
    add("--tokenizer", help=f"{cli.TOKENIZER} (of a new model: world)")
    add_run_options(parser, steps=1000, val_every=500)
    add("--n-layer", type=cli.positive, default=6, help="layers of a new model")
    add("--n-embd", type=cli.positive, default=512, help="width of a new model")
    add("--head-size", type=cli.positive, default=64, help="width of a head of a new model")
    add("--rank", type=cli.positive, default=32, help="of the LoRA")
    add("--alpha", type=cli.number(above=0), default=32, help="it is scaled by alpha / rank")
    add("--ctx-len", type=cli.positive, default=1024, help="longer documents are cut into pieces")
    add("--tokens", type=cli.positive, default=4096, help="of a pack of documents, at most")
    add("--batch-size", type=cli.positive, help="packs of a step, of all processes together; by "
        "default one for each that reads its own")  # fmt: skip
    rates = ", ".join(f"{first:g} ({name})" for name, (first, _) in RATES.items())
    add("--lr", type=cli.rate, help=f"first learning rate; by default {rates}")
    finals = ", ".join(f"{last / first:.2g}" for first, last in RATES.values())
    add("--lr-final", type=cli.number(least=0), help=f"last one; by default {finals} of --lr")
    add("--schedule", choices=SCHEDULES, default="exponential", help="from the first to the last")
    add("--warmup", type=cli.integer(0), default=0, help="steps in which it rises from a fifth")
    add("--weight-decay", type=cli.number(least=0), default=0.0, help="of the matrices")
    add("--grad-cp", action="store_true", help="recompute layers in the backward pass: less memory")
    add("--compile", action="store_true", help="by torch.compile: slow to start")
    return parser


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any], int]:
    """The arguments, and those of them that the result depends on, as the run of --resume has them.

    The third is how many processes read data of their own.

    Raises:
        OSError, ValueError: an argument is wrong, or contradicts another one.
    """
    parser = options()
    args = parser.parse_args(argv)
    replicas = share_out(args)
    free = ("out", "resume", "max_seconds", "val_every", "precision", "accelerator", "workers",
            "grad_cp", "compile", *PROCESSES)  # fmt: skip
    names = vars(args).keys() - set(free)
    settings = settings_of(parser, argv, args, sorted(names), moved=("data", "model", "tokenizer"))
    if settings["data"] is None:
        raise ValueError("--data: expected a file to learn from, got none")
    format_of(settings["data"])
    if settings["batch_size"] is None:
        settings["batch_size"] = replicas
    check_batch_size(settings["batch_size"], replicas)
    if args.tensor_parallel > 1 and args.compile:
        # torch 2.13 fails at the sizes of DTensors in a graph for any number of tokens
        raise ValueError("--tensor-parallel: it is not for --compile; fsdp2 without it is")
    if args.tensor_parallel > 1 and settings["train"] == "lora":
        raise ValueError("--tensor-parallel: it is not for --train lora; fsdp2 without it is")
    if settings["model"] is None and settings["train"] != "full":
        raise ValueError(f"--train: {settings['train']} needs a --model to start from")
    for name in SIZES if settings["model"] is not None else ():
        if given(parser, argv, [name]):
            raise ValueError(f"--{name.replace('_', '-')}: it is that of --model")
    if settings["n_embd"] % settings["head_size"]:
        raise ValueError(
            f"--head-size: expected a divisor of --n-embd {settings['n_embd']}, got "
            f"{settings['head_size']}"
        )
    if settings["ctx_len"] > settings["tokens"]:
        raise ValueError(
            f"--tokens: expected at least --ctx-len {settings['ctx_len']}, got {settings['tokens']}"
        )
    first, last = RATES["scratch" if settings["model"] is None else settings["train"]]
    if settings["lr"] is None:
        settings["lr"] = first
    if settings["lr_final"] is None:
        settings["lr_final"] = settings["lr"] * last / first
    if settings["lr_final"] == 0 and settings["schedule"] == "exponential":
        raise ValueError("--lr-final: expected a number > 0 with --schedule exponential, got 0")
    return args, settings, replicas


def loaded(settings: dict[str, Any]) -> RWKV6:
    """The model to start from, in float32.

    Raises:
        OSError, TypeError, ValueError: as `load`; or it is no RWKV-6.
    """
    states = True if settings["train"] == "state" else None
    model = load(settings["model"], dtype=torch.float32, train_state=states)
    if not isinstance(model, RWKV6):
        raise ValueError(f"--model: expected RWKV-6, got RWKV-{model.version}")
    return model


def vocabulary(tokenizer: str | None, model: RWKV6 | None) -> tuple[str, int]:
    """The name of the tokenizer, and how many tokens its model has.

    Raises:
        ImportError, OSError, ValueError: as `tokenizer_name` and `tokenizer_for`.
    """
    if model is not None:
        name, size = tokenizer or tokenizer_name(model.vocab_size), model.vocab_size
    else:
        name = tokenizer or "world"
        size = WORLD.stop - 1 if name == "world" else load_tokenizer(name).vocab_size
    tokenizer_for(name, size)  # it fits
    return name, size


def with_lora(model: RWKV6, rank: int, alpha: float) -> nn.Module:
    """Puts a LoRA beside every matrix of the model's layers, in place; the LoRA alone is trained.

    Returns:
        peft's model around it, which can write the LoRA.
    """
    from peft import LoraConfig, get_peft_model  # seconds, as it imports transformers

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=LORA_LAYERS)
    return get_peft_model(model, config)


def write(
    trained: dict[str, Tensor], settings: dict[str, Any], adapted: nn.Module | None, out: Path
) -> str:
    """Writes what was trained; returns the files' names.

    Args:
        trained: its tensors, whole.
        adapted: of `with_lora`, if a LoRA was trained.
    """
    if settings["train"] == "state":
        save(trained, out / "state.pth")
        return "state.pth"
    if adapted is None:
        save(trained, out / "model.pth")
        return "model.pth"
    prefix = "base_model.model."  # peft's, of the names of the model inside
    tensors = {prefix + name: x for name, x in trained.items()}
    adapted.save_pretrained(out / "lora", state_dict=tensors, save_embedding_layers=False)
    merged = load(settings["model"], dtype=torch.float32, lora=out / "lora")
    save(merged, out / "model.pth")
    return "lora, model.pth (merged)"


@cli.command
def main(argv: list[str] | None = None) -> None:
    args, settings, replicas = parse(argv)
    lightning.seed_everything(settings["seed"], verbose=False)
    model = None if settings["model"] is None else loaded(settings)
    tokenizer, vocab_size = vocabulary(settings["tokenizer"], model)
    documents = read_documents(
        settings["data"], tokenizer, vocab_size, settings["sample_by"], args.workers
    )
    names = ("tokens", "ctx_len", "seed", "val_share", "batch_size")
    data = DocumentData(documents, *(settings[name] for name in names))
    if model is None:
        model = RWKV6(vocab_size, *(settings[name] for name in SIZES))
    check_layers(model, args)
    model.gradient_checkpointing = args.grad_cp
    adapted = None
    if settings["train"] == "lora":
        adapted = with_lora(model, settings["rank"], settings["alpha"])
    if settings["train"] == "state":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(".att.time_state"))
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if args.compile:
        model.compile(dynamic=True)
    module = DocumentModel(model, settings)

    trainer = trainer_of(args, settings["batch_size"] // replicas)
    before, interrupted = train(trainer, args, module, data, validate_first=True)
    trained = gathered(model)
    if not trainer.is_global_zero:
        return
    files = write(trained, settings, adapted, args.out)
    after = float(trainer.callback_metrics["val_loss"])
    checkpoint = checkpoint_of(args)
    print("validation loss, in bits per token")
    if before is not None:
        print(f"  before: {before / math.log(2):.3f}")
    print(
        f"  step {trainer.global_step}, {numbers:,} numbers trained: {after / math.log(2):.3f}\n"
        f"written to {args.out}: {files}, {checkpoint.name}, log"
    )
    if interrupted:
        raise interrupted(f"{cli.EARLY}: go on with --resume {checkpoint}")


if __name__ == "__main__":
    sys.exit(main())
