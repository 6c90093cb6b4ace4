"""Decoding: one token a call, the state updated in place; against reading and writing the state."""

from __future__ import annotations

import argparse

from benchmarks import figure
from benchmarks.contenders import C_INTERFACE, COMPILED, EAGER, GGML, JAX, OURS, RWKV_OPS, STATE
from benchmarks.race import Entrant, Stable
from benchmarks.report import RACE_COLUMNS, Report, Table, plural
from benchmarks.shapes import Shape, add_shape_option
from benchmarks.work import Work

SHAPES = [(1, 1, 32, 64), (8, 1, 32, 64)]
CONTENDERS = (OURS, C_INTERFACE, EAGER, COMPILED, JAX, RWKV_OPS, GGML, STATE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_option(parser)


def run(args: argparse.Namespace) -> None:
    about = "Decoding, `wkv_update`: nanoseconds per head, whole calls; errors against float64."
    report = Report("decode", about)
    threads = args.threads[:1] if args.short else args.threads
    with Stable(args.rivals) as stable:
        for shape in args.shape or SHAPES:
            for count in threads:
                report.add(_contenders(stable, shape, count, args.seconds))
    figure.bars(report, args.out)
    report.save(args.out)


def _contenders(stable: Stable, shape: Shape, threads: int, seconds: float) -> Table:
    work = Work("decode", *shape)
    results = stable.race([Entrant(c, work, threads) for c in CONTENDERS], seconds)
    rows = [result.row(results[0]) for result in results]
    return Table(f"decode, {work}, float32, {plural(threads, 'thread')}", RACE_COLUMNS, rows)
