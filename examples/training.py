"""What train_lm.py and train.py share: the options of a run, how it is resumed, and its trainer."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cli
import lightning
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator, XLAAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from text_model import TextModel, stopping
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from torch_rwkv6.files import put_back, remove_parts, written
from torch_rwkv6.models.checkpoint import read
from torch_rwkv6.models.sharded import read_sharded
from torch_rwkv6.nn import RWKV

# The screen is for the run: no tips of Lightning, and nothing about its and Matplotlib's insides.
warnings.filterwarnings("ignore", module=r"lightning\.")
warnings.filterwarnings("ignore", "Detected an existing checkpoint")  # as it is meant to be
warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # views: nothing changes them in place
for name in ("lightning.pytorch", "lightning.fabric", "torch.distributed.tensor", "matplotlib"):
    logging.getLogger(name).setLevel(logging.ERROR)

ACCELERATORS = {"cuda": CUDAAccelerator, "mps": MPSAccelerator, "tpu": XLAAccelerator}
PROCESSES = ("strategy", "devices", "num_nodes", "tensor_parallel")  # options of `share_out`
# A checkpoint is a file, or of fsdp2 a folder to which every process has written its part. Runs of
# all kinds go on with both.
FILE, FOLDER = "last.ckpt", "last.dcp"
META = "meta.pt"  # in the folder: all but the model's and the optimizer's state


def add_run_options(parser: cli.Parser, steps: int, val_every: int) -> None:
    """The options that every run has; the numbers are defaults."""
    add = parser.add_argument
    parser.add_output_folder("--out", default="run", help="folder for all results")
    add("--resume", type=resumable, help=f"a {FILE} or {FOLDER}, to go on with the run's settings")
    add("--steps", type=cli.positive, default=steps, help="optimiser steps, of the whole run")
    add("--max-seconds", type=cli.seconds, help="stop after this time, whatever the step")
    add("--val-every", type=cli.positive, default=val_every, help="steps between validations")
    add("--precision", choices=("32-true", "bf16-mixed"), default="32-true", help="of Lightning")
    add("--accelerator", type=accelerator, default="cpu", help="cpu, gpu, auto: of Lightning")
    add("--strategy", choices=("auto", "ddp", "fsdp2"), default="auto", help="of several processes:"
        " ddp, as auto, gives each the whole model; fsdp2 shares it out")  # fmt: skip
    add("--devices", type=cli.positive, help="processes of a machine: 1, or as torchrun starts")
    add("--num-nodes", type=cli.positive, help="machines: 1, or as torchrun starts")
    add("--tensor-parallel", type=cli.positive, default=1, help="of --strategy fsdp2: processes "
        "that share every layer, and read the same")  # fmt: skip


def accelerator(text: str) -> str:
    """An argparse type: an accelerator that Lightning finds on this machine."""
    here = ["auto", "cpu"]
    for name, kind in ACCELERATORS.items():
        if kind.is_available():
            here += [name] if name == "tpu" else [name, "gpu"]
    if text not in here:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(here)}, got {text!r}")
    return text


def resumable(text: str) -> str:
    """An argparse type: a checkpoint of a run, a file or a folder."""
    put_back(cli.path(text))
    if not Path(text).is_dir():
        return cli.input_file(text)
    if not Path(text, META).is_file():
        raise argparse.ArgumentTypeError(
            f"expected a training checkpoint of this program ({FILE} or {FOLDER}), got the folder "
            f"{text}"
        )
    return text


def share_out(args: argparse.Namespace) -> int:
    """Completes the options of processes; returns how many replicas there are.

    A replica is what reads data of its own: a process, or a tensor-parallel group of them.

    Raises:
        ValueError: they contradict one another, torchrun, or this machine.
    """
    torchrun = torch.distributed.is_torchelastic_launched()
    started = {"devices": 1, "num_nodes": 1}
    if torchrun:
        local, every = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        started = {"devices": local, "num_nodes": every // local}
    for name, value in started.items():
        found = getattr(args, name)
        if found is None:
            setattr(args, name, value)
        elif found != value and torchrun:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: expected {value}, as torchrun has started, got {found}")
    if args.num_nodes > 1 and not torchrun and not SLURMEnvironment.detect():
        raise ValueError(
            f"--num-nodes: expected to be started by torchrun or srun on each of {args.num_nodes} "
            "machines, got one process"
        )
    if args.accelerator != "cpu":
        counts = [x.auto_device_count() for x in ACCELERATORS.values() if x.is_available()]
        if counts and args.devices > max(counts):
            raise ValueError(
                f"--devices: expected at most {max(counts)}, as this machine has, got "
                f"{args.devices}"
            )
    processes = args.devices * args.num_nodes
    if args.strategy == "auto" and processes > 1:
        args.strategy = "ddp"
    if args.tensor_parallel > 1 and args.strategy != "fsdp2":
        raise ValueError("--tensor-parallel: it is for --strategy fsdp2")
    if processes % args.tensor_parallel:
        raise ValueError(
            f"--tensor-parallel: expected a divisor of {processes} processes, got "
            f"{args.tensor_parallel}"
        )
    return processes // args.tensor_parallel


def check_batch_size(batch_size: int, replicas: int) -> None:
    """Raises ValueError if the replicas cannot share a batch evenly."""
    if batch_size % replicas:
        raise ValueError(
            f"--batch-size: expected a multiple of the {replicas} processes that share it, got "
            f"{batch_size}"
        )


def check_layers(model: RWKV, args: argparse.Namespace) -> None:
    """Raises ValueError if tensor_parallel processes cannot share the layers of the model."""
    att, ffn = model.blocks[0].att, model.blocks[0].ffn
    sizes = {"heads": att.n_head, "hidden channels": ffn.key.out_features}
    for name, size in sizes.items():
        if size % args.tensor_parallel:
            raise ValueError(
                f"--tensor-parallel: expected a divisor of the model's {size} {name}, got "
                f"{args.tensor_parallel}"
            )


def given(parser: cli.Parser, argv: list[str] | None, names: Iterable[str]) -> dict[str, Any]:
    """Those of the arguments that are not left to their defaults."""
    defaults = {name: parser.get_default(name) for name in names}
    parser.set_defaults(**dict.fromkeys(defaults))
    values = {name: getattr(parser.parse_args(argv), name) for name in defaults}
    parser.set_defaults(**defaults)
    return {name: value for name, value in values.items() if value is not None}


def settings_of(
    parser: cli.Parser,
    argv: list[str] | None,
    args: argparse.Namespace,
    names: Iterable[str],
    moved: Iterable[str] = (),
) -> dict[str, Any]:
    """What the results of a run depend on: ``names`` of the arguments, or as a resumed run has it.

    ``args.steps`` becomes that of the run.

    Args:
        names: they are kept in the run's checkpoints; among them is "steps".
        moved: those of them that a resumed run may be given anew, such as paths.

    Raises:
        OSError, ValueError: --resume is no checkpoint of such a run, or it has reached its end, or
            another argument contradicts it.
    """
    names = list(names)
    if args.resume is None:
        return {name: getattr(args, name) for name in names}
    file = Path(args.resume)
    checkpoint = read(file / META if file.is_dir() else file)
    settings = checkpoint.get("hyper_parameters")
    if not isinstance(settings, dict) or settings.keys() != set(names):
        raise ValueError(
            f"--resume: expected a training checkpoint of this program ({FILE}), got "
            f"{args.resume}, which has weights at most"
        )
    anew = given(parser, argv, names)
    for name, value in anew.items():
        if value != settings[name] and name not in ("steps", *moved):
            raise ValueError(
                f"--{name.replace('_', '-')}: expected {settings[name]}, as the run of --resume "
                f"has, got {value}"
            )
    settings = settings | anew
    done = checkpoint["global_step"]
    if settings["steps"] <= done:
        raise ValueError(
            f"--steps: expected more than the {done} steps that {args.resume} has done, got "
            f"{settings['steps']}"
        )
    args.steps = settings["steps"]
    return settings


class Files(TorchCheckpointIO):
    """Reads checkpoints of both forms for a process that has the whole model, and writes files."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        remove_parts(Path(path).parent)
        with written(Path(path)) as part:
            torch.save(checkpoint, part)

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        folder = Path(path)
        if not folder.is_dir():
            return read(folder)
        state = read_sharded(folder, lambda names: names["state_dict"])
        return {**read(folder / META), "state_dict": state, "optimizer_states": []}


class OptimizerOfFolder(lightning.Callback):
    """Reads the optimizer's state, which `Files` does not, for a run that goes on with a folder."""

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        folder = trainer.ckpt_path
        if folder is None or not Path(folder).is_dir():
            return
        (optimizer,) = trainer.optimizers
        state = {"optimizer_0": get_optimizer_state_dict(module, optimizer)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that no other process takes part
            dcp.load(state, checkpoint_id=folder, no_dist=True)
        set_optimizer_state_dict(module, optimizer, state["optimizer_0"])


class Folders(ModelParallelStrategy):
    """FSDP2 and tensor parallel. Reads checkpoints of both forms, and writes folders."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        whole: Any = contextlib.nullcontext()
        if self.is_global_zero:
            remove_parts(Path(filepath).parent)
            whole = written(Path(filepath), folder=True)
        with whole as part:
            try:
                super().save_checkpoint(checkpoint, self.broadcast(part), storage_options)
            except dcp.api.CheckpointException as error:  # which is no Exception
                why, _ = next(iter(error.failures.values()))
                raise why from error
            self.barrier()  # now every process has written

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        if Path(path).is_dir():
            return super().load_checkpoint(path, *args, **options)
        checkpoint = read(path)
        whole = StateDictOptions(full_state_dict=True, strict=self.lightning_module.strict_loading)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=whole)
        (optimizer,), (state,) = self.optimizers, checkpoint["optimizer_states"]
        # files number the parameters in the optimizer's order, which is not the model's
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        order = [names[p] for group in optimizer.param_groups for p in group["params"]]
        groups = [g | {"params": [order[i] for i in g["params"]]} for g in state["param_groups"]]
        moments = {order[i]: x for i, x in state["state"].items()}
        by_name = {"state": moments, "param_groups": groups}
        set_optimizer_state_dict(self.model, optimizer, by_name, options=whole)
        return checkpoint


class Steps(TQDMProgressBar):
    """Shows the steps that are done, of all of the run; documents and lanes of text have no end."""

    def on_train_epoch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        bar = self.train_progress_bar
        bar.reset(trainer.max_steps)
        bar.n = bar.initial = trainer.global_step
        bar.set_description("Step")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, *batch: Any
    ) -> None:
        super().on_train_batch_end(trainer, module, *batch[:-1], trainer.global_step - 1)


def trainer_of(args: argparse.Namespace, accumulate: int = 1) -> lightning.Trainer:
    """The trainer that the options of `add_run_options` ask for.

    Args:
        args: complete, by `share_out`.
        accumulate: batches whose gradients a step takes the mean of, in each process.
    """
    val_every = min(args.val_every, args.steps)
    last = ModelCheckpoint(
        args.out, "last", every_n_train_steps=val_every, enable_version_counter=False
    )
    last.FILE_EXTENSION = Path(checkpoint_of(args)).suffix
    callbacks, plugins = [last, Steps()], []
    strategy: Any = args.strategy
    if strategy == "fsdp2":
        groups = args.devices * args.num_nodes // args.tensor_parallel
        strategy = Folders(groups, args.tensor_parallel)
    else:
        callbacks.append(OptimizerOfFolder())
        plugins.append(Files())
    return lightning.Trainer(
        accelerator=args.accelerator,
        strategy=strategy,
        devices=args.devices,
        num_nodes=args.num_nodes,
        precision=args.precision,
        max_steps=args.steps,
        accumulate_grad_batches=accumulate,
        val_check_interval=val_every * accumulate,  # in batches
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        logger=CSVLogger(args.out, name="log"),
        callbacks=callbacks,
        plugins=plugins,
        enable_model_summary=False,
    )


def checkpoint_of(args: argparse.Namespace) -> Path:
    """Where the run's checkpoint is written."""
    return args.out / (FOLDER if args.strategy == "fsdp2" else FILE)


def train(
    trainer: lightning.Trainer,
    args: argparse.Namespace,
    module: TextModel,
    data: lightning.LightningDataModule,
    validate_first: bool = False,
) -> tuple[float | None, type[KeyboardInterrupt] | None]:
    """Trains, and validates at the end.

    Writes `checkpoint_of`, from which a run can be resumed, and the losses as log/*/metrics.csv.

    Returns:
        The validation loss at first, if it was asked for and the run is not resumed; and why the
        run was interrupted, if it was: see `stopping`.
    """
    before = None
    with stopping(trainer, args.max_seconds) as stop:
        if validate_first and args.resume is None:
            (losses,) = trainer.validate(module, datamodule=data, verbose=False)
            before = losses["val_loss"]
        trainer.fit(module, datamodule=data, ckpt_path=args.resume)
    trainer.save_checkpoint(checkpoint_of(args))
    val_every = trainer.val_check_interval // trainer.accumulate_grad_batches
    validated = not stop.reason and trainer.global_step % val_every == 0
    if not validated or "val_loss" not in trainer.callback_metrics:
        trainer.validate(module, datamodule=data, verbose=False)
    return before, stop.reason


def gathered(model: torch.nn.Module) -> dict[str, Tensor]:
    """What is trained of a model, whole and on the CPU; all processes call it, the first has it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)
