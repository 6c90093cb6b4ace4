"""What train_lm.py and train.py share: the options of a run, how it is resumed, and its trainer."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import cli
import lightning
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator, XLAAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from text_model import fit

from torch_rwkv6.models.checkpoint import read

# The screen is for the run: no tips of Lightning, and nothing about its and Matplotlib's insides.
warnings.filterwarnings("ignore", module=r"lightning\.")
for name in ("lightning.pytorch", "matplotlib"):
    logging.getLogger(name).setLevel(logging.ERROR)


def add_run_options(parser: cli.Parser, steps: int, val_every: int) -> None:
    """The options that every run has; the numbers are defaults."""
    add = parser.add_argument
    parser.add_output_folder("--out", default="run", help="folder for all results")
    add("--resume", type=cli.input_file, help="a .ckpt of a run, to go on with its settings")
    add("--steps", type=cli.positive, default=steps, help="optimiser steps, of the whole run")
    add("--max-seconds", type=cli.seconds, help="stop after this time, whatever the step")
    add("--val-every", type=cli.positive, default=val_every, help="steps between validations")
    add("--precision", choices=("32-true", "bf16-mixed"), default="32-true", help="of Lightning")
    add("--accelerator", type=accelerator, default="cpu", help="cpu, gpu, auto: of Lightning")


def accelerator(text: str) -> str:
    """An argparse type: an accelerator that Lightning finds on this machine."""
    here = ["auto", "cpu"]
    for name, kind in (("cuda", CUDAAccelerator), ("mps", MPSAccelerator), ("tpu", XLAAccelerator)):
        if kind.is_available():
            here += [name] if name == "tpu" else [name, "gpu"]
    if text not in here:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(here)}, got {text!r}")
    return text


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
    checkpoint = read(args.resume)
    settings = checkpoint.get("hyper_parameters")
    if not isinstance(settings, dict) or settings.keys() != set(names):
        raise ValueError(
            f"--resume: expected a training checkpoint of this program (last.ckpt), got "
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


def trainer_of(args: argparse.Namespace) -> lightning.Trainer:
    """The trainer that the options of `add_run_options` ask for."""
    val_every = min(args.val_every, args.steps)
    last = ModelCheckpoint(
        args.out, "last", every_n_train_steps=val_every, enable_version_counter=False
    )
    return lightning.Trainer(
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        max_steps=args.steps,
        max_time=None if args.max_seconds is None else timedelta(seconds=args.max_seconds),
        val_check_interval=val_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        logger=CSVLogger(args.out, name="log"),
        callbacks=[last],
        enable_model_summary=False,
    )


def train(
    trainer: lightning.Trainer,
    args: argparse.Namespace,
    module: lightning.LightningModule,
    data: lightning.LightningDataModule,
) -> type[KeyboardInterrupt] | None:
    """Trains, and validates at the end; returns as `fit`, whether it was interrupted.

    Writes last.ckpt, from which a run can be resumed, and the losses as log/*/metrics.csv.
    """
    interrupted = fit(trainer, module, datamodule=data, ckpt_path=args.resume)
    trainer.save_checkpoint(args.out / "last.ckpt")
    validated = not interrupted and trainer.global_step % trainer.val_check_interval == 0
    if not validated or "val_loss" not in trainer.callback_metrics:
        trainer.validate(module, datamodule=data, verbose=False)
    return interrupted
