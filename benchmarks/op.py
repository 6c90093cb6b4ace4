"""The operator forward: against every contender and the machine's limits.

Then what it costs at other head sizes, and with its kernels held to lesser instruction sets.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from benchmarks import figure
from benchmarks.contenders import FMA, OURS, RIVALS, SHORT_RIVALS, STREAM, at_level
from benchmarks.race import Entrant, Stable
from benchmarks.report import RACE_COLUMNS, Column, Report, Table, number, plural, times
from benchmarks.shapes import Shape, add_shape_option
from benchmarks.work import Work

SHAPES = [(1, 2048, 32, 64), (4, 512, 32, 64)]
SHORT = [(1, 512, 32, 64)]
HEAD_SIZES = (32, 64, 80, 128)
LEVELS = ("avx512", "avx2", "baseline")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_option(parser)


def run(args: argparse.Namespace) -> None:
    report = Report("op", "Forward: nanoseconds per token and head; errors against float64.")
    shapes = args.shape or (SHORT if args.short else SHAPES)
    with Stable(args.rivals) as stable:
        for shape in shapes:
            for threads in args.threads:
                report.add(_contenders(stable, shape, threads, args))
        figure.bars(report, args.out)
        report.add(_head_sizes(stable, shapes[0], args))
        report.add(_levels(stable, shapes[0], args))
    report.save(args.out)


def _contenders(stable: Stable, shape: Shape, threads: int, args: argparse.Namespace) -> Table:
    work = Work("forward", *shape)
    half = replace(work, dtype="bfloat16")
    entrants = [Entrant(OURS, work, threads), Entrant(OURS.named("bfloat16"), half, threads)]
    rivals = SHORT_RIVALS if args.short else RIVALS
    entrants += [Entrant(rival, work, threads) for rival in (*rivals, STREAM)]
    entrants += [Entrant(STREAM.named("bfloat16"), half, threads), Entrant(FMA, work, threads)]
    results = stable.race(entrants, args.seconds)
    rows = [result.row(results[0]) for result in results]
    return Table(f"forward, {work}, float32, {plural(threads, 'thread')}", RACE_COLUMNS, rows)


def _head_sizes(stable: Stable, shape: Shape, args: argparse.Namespace) -> Table:
    """Each on about the same number of state elements."""
    B, T, H, N = shape
    threads = args.threads[0]
    works = [Work("forward", B, T, max(1, H * N // size), size) for size in HEAD_SIZES]
    results = stable.race([Entrant(OURS, work, threads) for work in works], args.seconds)
    rows = [result.row(None) for result in results]
    for row in rows:
        row["element_ns"] = row["min_ns"] / row["N"] ** 2
    usual = next(row["element_ns"] for row in rows if row["N"] == 64)
    for row in rows:
        row["to_64"] = row["element_ns"] / usual
    columns = (
        Column("N", "head size"),
        Column("H", "heads"),
        *RACE_COLUMNS[1:3],
        Column("element_ns", "ns per state element", "{:.4f}".format),
        Column("to_64", "to N = 64", times),
    )
    return Table(f"torch_rwkv6 forward, B{B} T{T}, {plural(threads, 'thread')}", columns, rows)


def _levels(stable: Stable, shape: Shape, args: argparse.Namespace) -> Table:
    threads = args.threads[0]
    work = Work("forward", *shape)
    results = stable.race([Entrant(at_level(x), work, threads) for x in LEVELS], args.seconds)
    rows = [result.row(None) for result in results]
    best = min(row["min_ns"] for row in rows if "min_ns" in row)
    for row in rows:
        row["speed"] = best / row["min_ns"] if "min_ns" in row else None
    columns = (*RACE_COLUMNS[:3], Column("speed", "speed to the best", number), RACE_COLUMNS[-1])
    return Table(f"instruction sets, {work}, {plural(threads, 'thread')}", columns, rows)
