"""examples/serve.py under load: tokens per second, time to the first token, memory over minutes.

The clients run on the same machine, in one other process. Each sends a request, reads its answer
token by token as it is streamed, and is done with its turn; no prompt is sent twice. A turn's speed
counts everything from the first request sent to the last token read, prompts too; by the clock, and
by the processor time of the server, which other programs on the machine change less.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch_rwkv6
from benchmarks import figure
from benchmarks.model import LAYERS, VOCAB, WIDTH, random_weights
from benchmarks.report import Column, Report, Table, number, plural, times
from torch_rwkv6.models import save

SERVER = Path(__file__).parents[1] / "examples" / "serve.py"
SAMPLES = 100  # of the memory
LEAVES = 4  # one request in so many is given up after its first token, while memory is measured
LINUX = sys.platform == "linux"  # which alone tells of another process what is asked here


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="checkpoint (12 layers, 768 wide, 65,536 tokens, random weights)"
    )
    parser.add_argument("--dtype", default="float32", help="of its parameters (%(default)s)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="(1 8 32)")
    parser.add_argument("--prompt", type=int, default=32, help="its tokens (%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer (%(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="how long to watch the server's memory (0)"
    )
    parser.add_argument(
        "--cache", type=int, default=64, help="MiB of the prefix cache, which fills (%(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    if args.minutes and not LINUX:
        sys.exit("serve: --minutes: Linux alone tells how much memory another process has")
    report = Report("serve", "examples/serve.py: tokens per second of all clients together.")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = args.model
        if path is None:
            path = folder / "model.safetensors"
            save(random_weights(VOCAB, LAYERS, WIDTH), path)
        threads = args.threads[:1] if args.short else args.threads
        options = ["--dtype", args.dtype, "--cache", str(args.cache)]
        options += ["--rows", str(max(args.clients))]
        servers = {
            n: stack.enter_context(running([str(path), *options], n, folder)) for n in threads
        }
        report.add(_speed(args, servers))
        if args.minutes:
            report.add(_memory(args, servers[threads[0]], threads[0]))
    figure.panels(_panels(report), args.out / "serve.png")
    report.save(args.out)


def _panels(report: Report) -> list[figure.Panel]:
    rows = report.tables[0].rows

    def over_clients(key: str) -> dict[str, tuple[list[float], list[float]]]:
        own = {
            n: [row for row in rows if row["threads"] == n] for n in (r["threads"] for r in rows)
        }
        return {
            plural(n, "thread"): ([row["clients"] for row in found], [row[key] for row in found])
            for n, found in own.items()
        }

    panels = [
        figure.Panel("tokens per second over clients", over_clients("median")),
        figure.Panel("ms to the first token over clients", over_clients("first_ms")),
    ]
    for table in report.tables[1:]:
        (row,) = table.rows
        line = {plural(row["clients"], "client"): (row["minutes"], row["megabytes"])}
        panels.append(figure.Panel("MB of the server over minutes", line, marker=""))
    return panels


# ---- the server and its clients


@dataclass(frozen=True)
class Server:
    pid: int
    name: str  # of the model
    address: str  # host:port

    @property
    def resident_bytes(self) -> int:
        """The physical memory that the process has. Linux only."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    @property
    def processor_seconds(self) -> float:
        """What it has computed so far, on all cores together; elsewhere than on Linux 0."""
        if not LINUX:
            return 0.0
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user, system


@contextlib.contextmanager
def running(arguments: Sequence[str], threads: int, folder: Path) -> Iterator[Server]:
    """A server in a process of its own, which computes with so many threads."""
    paths = os.pathsep.join(filter(None, [str(SERVER.parents[1]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)}
    environment.pop("RWKV_API_KEY", None)  # which it would ask the clients for
    log = folder / f"server{threads}.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, str(SERVER), *arguments, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
        )
    with process:
        try:
            assert process.stdout is not None
            name, _, url = process.stdout.readline().strip().partition(": ")
            if not url:
                sys.exit(f"serve: {log.read_text(errors='replace').strip()[-500:]}")
            yield Server(process.pid, name, urlsplit(url).netloc)
        finally:
            process.kill()


@dataclass(frozen=True)
class Answer:
    first: float  # seconds from the request to its first event
    tokens: int


def ask(server: Server, prompt: list[int], tokens: int, *, leaves: bool = False) -> Answer:
    """A streamed completion; a client who leaves closes the connection after the first event."""
    asked = {"model": server.name, "prompt": prompt, "max_tokens": tokens, "stream": True}
    body = json.dumps(asked | {"stream_options": {"include_usage": True}})
    start = time.perf_counter()
    connection = http.client.HTTPConnection(server.address)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", body, headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"serve: status {response.status}: {response.read().decode()}")
        line = response.readline()
        first = time.perf_counter() - start
        if leaves:
            return Answer(first, 1)
        usage: dict[str, int] = {}
        while line != b"data: [DONE]\n":
            if line.startswith(b"data: "):
                event = json.loads(line[len(b"data: ") :])
                if "error" in event:
                    raise RuntimeError(f"serve: {event['error']['message']}")
                usage = event["usage"] or usage
            elif not line:
                raise RuntimeError("serve: the stream ended before the answer")
            line = response.readline()
    return Answer(first, usage["completion_tokens"])


def prompt_of(length: int, chance: random.Random) -> list[int]:
    """Tokens that every vocabulary has."""
    return [chance.randrange(1, 256) for _ in range(length)]


# ---- what is measured


def _speed(args: argparse.Namespace, servers: dict[int, Server]) -> Table:
    """Turns of every number of clients and threads, one after the other, until time is up."""
    chance = random.Random(0)
    rows: list[dict[str, Any]] = [
        _who(threads, clients) for threads in servers for clients in args.clients
    ]
    speeds: list[list[float]] = [[] for _ in rows]
    firsts: list[list[float]] = [[] for _ in rows]
    tokens, worked = [0] * len(rows), [0.0] * len(rows)
    with ThreadPoolExecutor(max(args.clients)) as pool:

        def turn(server: Server, clients: int) -> tuple[float, list[Answer]]:
            prompts = [prompt_of(args.prompt, chance) for _ in range(clients)]
            start = time.perf_counter()
            answers = list(pool.map(lambda prompt: ask(server, prompt, args.tokens), prompts))
            return time.perf_counter() - start, answers

        for server in servers.values():
            turn(server, 1)  # warms up
        end = time.perf_counter() + args.seconds * len(rows)
        while not speeds[-1] or time.perf_counter() < end:
            for i, row in enumerate(rows):
                server = servers[row["threads"]]
                before = server.processor_seconds
                seconds, answers = turn(server, row["clients"])
                worked[i] += server.processor_seconds - before
                count = sum(answer.tokens for answer in answers)
                tokens[i] += count
                speeds[i].append(count / seconds)
                firsts[i] += [answer.first * 1e3 for answer in answers]
    for i, row in enumerate(rows):
        row["turns"] = len(speeds[i])
        row["best"], row["median"] = max(speeds[i]), statistics.median(speeds[i])
        row["per_cpu_second"] = tokens[i] / worked[i] if worked[i] else None
        row["first_ms"], row["last_first_ms"] = statistics.median(firsts[i]), max(firsts[i])
    for row in rows:
        alone = next(r for r in rows if r["threads"] == row["threads"])
        row["ratio"] = row["median"] / alone["median"]
    columns = (
        Column("contender", "", left=True),
        Column("best", "tokens/s best", number),
        Column("median", "median", number),
        Column("ratio", f"to {plural(args.clients[0], 'client')}", times),
        Column("per_cpu_second", "tokens per processor second", number),
        Column("first_ms", "first token, ms median", number),
        Column("last_first_ms", "longest", number),
    )
    model = Path(args.model).stem if args.model else "12 x 768"
    title = f"serve, {model}, {args.dtype}, prompts of {args.prompt}, answers of {args.tokens}"
    return Table(title, columns, rows)


def _memory(args: argparse.Namespace, server: Server, threads: int) -> Table:
    """The server's memory while clients ask without a pause, for requests of all lengths."""
    clients, seconds = max(args.clients), args.minutes * 60
    start = time.monotonic()

    def client(seed: int) -> int:
        chance, count = random.Random(seed), 0
        while time.monotonic() < start + seconds:
            prompt = prompt_of(chance.randint(1, 2 * args.prompt), chance)
            tokens = chance.randint(1, 2 * args.tokens)
            ask(server, prompt, tokens, leaves=not chance.randrange(LEAVES))
            count += 1
        return count

    minutes, megabytes = [], []
    with ThreadPoolExecutor(clients) as pool:
        counts = [pool.submit(client, seed) for seed in range(clients)]
        for i in range(SAMPLES):
            time.sleep(max(0.0, start + i * seconds / (SAMPLES - 1) - time.monotonic()))
            minutes.append((time.monotonic() - start) / 60)
            megabytes.append(server.resident_bytes / 1e6)
        requests = sum(count.result() for count in counts)
    half = SAMPLES // 2
    row = _who(threads, clients) | {
        "requests": requests,
        "first_mb": megabytes[0],
        "half_mb": statistics.median(megabytes[half - 5 : half + 5]),
        "last_mb": statistics.median(megabytes[-10:]),
        "most_mb": max(megabytes),
        "slope": statistics.linear_regression(minutes[half:], megabytes[half:]).slope,
        "minutes": minutes,
        "megabytes": megabytes,
    }
    columns = (
        Column("contender", "", left=True),
        Column("requests", "requests", "{:,}".format),
        Column("first_mb", "MB at first", number),
        Column("half_mb", "after half the time", number),
        Column("last_mb", "at the end", number),
        Column("most_mb", "most", number),
        Column("slope", "MB per minute, second half", "{:+.2f}".format),
    )
    return Table(f"the server's memory over {args.minutes:g} minutes", columns, [row])


def _who(threads: int, clients: int) -> dict[str, Any]:
    """The beginning of a row."""
    return {
        "contender": f"{plural(clients, 'client')}, {plural(threads, 'thread')}",
        "threads": threads,
        "clients": clients,
        "version": f"torch_rwkv6 {torch_rwkv6.__version__}",
    }
