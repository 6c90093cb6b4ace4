"""Forward + backward against every contender; backward alone against our forward.

Contenders that keep a state for every token need gigabytes on long sequences: they are raced on the
shortest shape only.
"""

from __future__ import annotations

import argparse

from benchmarks import figure
from benchmarks.contenders import CHUNKED, COMPILED_CHUNKED, OURS, RIVALS, SHORT_RIVALS, STREAM
from benchmarks.race import Entrant, Stable
from benchmarks.report import RACE_COLUMNS, Column, Report, Table, plural, times
from benchmarks.shapes import Shape, add_shape_option
from benchmarks.work import Work

SHAPES = [(1, 512, 32, 64), (1, 2048, 32, 64)]
SHORT = [(1, 256, 32, 64)]
FRUGAL = (CHUNKED, COMPILED_CHUNKED)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_option(parser)


def run(args: argparse.Namespace) -> None:
    report = Report(
        "backward", "Gradients: nanoseconds per token and head; errors against float64."
    )
    shapes = args.shape or (SHORT if args.short else SHAPES)
    shortest = min(T for _, T, _, _ in shapes)
    with Stable(args.rivals) as stable:
        for shape in shapes:
            for threads in args.threads:
                rivals = FRUGAL if shape[1] > shortest else SHORT_RIVALS if args.short else RIVALS
                report.add(_both(stable, shape, threads, rivals, args.seconds))
        figure.bars(report, args.out)
        for shape in shapes:
            for threads in args.threads:
                report.add(_alone(stable, shape, threads, args.seconds))
    report.save(args.out)


def _both(stable: Stable, shape: Shape, threads: int, rivals, seconds: float) -> Table:
    work = Work("forward + backward", *shape)
    entrants = [Entrant(contender, work, threads) for contender in (OURS, *rivals, STREAM)]
    results = stable.race(entrants, seconds)
    rows = [result.row(results[0]) for result in results]
    title = f"forward + backward, {work}, float32, {plural(threads, 'thread')}"
    return Table(title, RACE_COLUMNS, rows)


def _alone(stable: Stable, shape: Shape, threads: int, seconds: float) -> Table:
    forward, backward = Work("forward", *shape), Work("backward", *shape)
    entrants = [
        Entrant(OURS.named("forward"), forward, threads),
        Entrant(OURS.named("backward"), backward, threads),
        Entrant(CHUNKED.named("backward"), backward, threads),
        Entrant(STREAM.named("backward"), backward, threads),
    ]
    results = stable.race(entrants, seconds)
    rows = [result.row(results[0]) for result in results]
    columns = [
        Column("ratio", "to our forward", times) if c.key == "ratio" else c for c in RACE_COLUMNS
    ]
    return Table(f"backward alone, {forward}, {plural(threads, 'thread')}", columns, rows)
