"""More threads, and longer sequences: time and peak memory.

Peak memory is that of the inputs, one call and its results, in a process of its own; beside it the
size of inputs and outputs (with their gradients, for forward + backward) as the least there is.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import figure
from benchmarks.contenders import CHUNKED, OURS
from benchmarks.race import Entrant, Stable
from benchmarks.report import RACE_COLUMNS, Column, Report, Table, number, plural, times
from benchmarks.work import Work

CONTENDERS = (OURS, CHUNKED)
KINDS = ("forward", "forward + backward")
HEADS = (1, 4, 32)
LENGTHS, SHORT_LENGTHS = (1024, 4096, 16384, 65536), (1024, 4096)
CHUNKED_LONGEST = 4096  # its autograd keeps gigabytes beyond


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, help="of the thread table (2048, with --short 512)")
    parser.add_argument("--lengths", type=int, nargs="+", help="of the growth table")


def run(args: argparse.Namespace) -> None:
    report = Report("scaling", "Nanoseconds per token and head; memory in MB (10^6 bytes).")
    report.add(_threads(args))
    report.add(_growth(args))
    figure.growth(report.tables[-1].rows, args.out / "scaling.png")
    report.save(args.out)


def _threads(args: argparse.Namespace) -> Table:
    tokens = args.tokens or (512 if args.short else 2048)
    works = [Work(kind, 1, tokens, heads, 64) for kind in KINDS for heads in HEADS]
    rows = []
    with Stable(args.rivals) as stable:
        for work in works:
            results = stable.race([Entrant(OURS, work, n) for n in args.threads], args.seconds)
            row: dict[str, Any] = {"kind": work.kind, "heads": work.H, "T": work.T}
            for result in results:
                row[f"ns_{result.entrant.threads}"] = result.row(None)["min_ns"]
            first, last = (row[f"ns_{n}"] for n in (args.threads[0], args.threads[-1]))
            rows.append(row | {"speedup": first / last, "version": results[0].version})
    columns = (
        Column("kind", "", left=True),
        Column("heads", "B H"),
        *(Column(f"ns_{n}", f"ns, {plural(n, 'thread')}", number) for n in args.threads),
        Column("speedup", f"{args.threads[-1]} against {args.threads[0]}", times),
    )
    return Table(f"torch_rwkv6, T{tokens} N64, float32, threads", columns, rows)


def _growth(args: argparse.Namespace) -> Table:
    lengths = args.lengths or (SHORT_LENGTHS if args.short else LENGTHS)
    threads = args.threads[0]
    rows = []
    for contender in CONTENDERS:
        for kind in KINDS:
            for T in lengths:
                if contender is CHUNKED and CHUNKED_LONGEST < T:
                    continue
                work = Work(kind, 1, T, 4, 64)
                # A new process each: memory left by one length would hide what the next needs.
                with Stable(args.rivals) as stable:
                    (result,) = stable.race([Entrant(contender, work, threads)], args.seconds)
                rows.append(_memory(result.row(None), work))
    first = {(row["contender"], row["kind"]): row for row in reversed(rows)}
    for row in rows:
        shortest = first[row["contender"], row["kind"]]
        if "min_ns" in row and "min_ns" in shortest:
            row["growth"] = row["min_ns"] / shortest["min_ns"]
    columns = (
        RACE_COLUMNS[0],
        Column("kind", "", left=True),
        Column("T", "T"),
        Column("min_ns", "ns min", number),
        Column("growth", "to the shortest", times),
        Column("peak_mb", "peak MB", number),
        Column("least_mb", "tensors MB", number),
        Column("memory_ratio", "peak to tensors", times),
        RACE_COLUMNS[-1],
    )
    return Table(f"B1 H4 N64, float32, {plural(threads, 'thread')}, growth with T", columns, rows)


def _memory(row: dict[str, Any], work: Work) -> dict[str, Any]:
    row["least_mb"] = work.footprint / 1e6
    if row["peak_bytes"]:
        row["peak_mb"] = row["peak_bytes"] / 1e6
        row["memory_ratio"] = row["peak_mb"] / row["least_mb"]
    return row
