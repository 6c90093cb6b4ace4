"""Machine code of CUDA kernels, looked at without a GPU.

    for kernel in compile_and_inspect(Path("kernel.cu"), "90", ["--use_fast_math"]):
        assert kernel.spill_bytes == 0 and kernel.stack_bytes == 0
        assert kernel.count("LDG.128") > 0 and kernel.count("LD") == 0 and kernel.count("HMMA") > 0
        print(kernel.name, kernel.registers, kernel.occupancy(threads=128, dynamic_shared=65536))

inspect(path) does the same for a cubin, or for all that a shared library has embedded. As a
program it prints a table:  python -m ptxcpu.sass FILE [--arch 80 90] [--flags=-O3]
"""

import argparse
import collections
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import build

# /*0040*/ @!P0 LDG.E.128 R4, [R2.64] ; /* control word, low half */
_INSTRUCTION = re.compile(
    r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)\b([^;]*);"
    r"\s*(?:\})?\s*/\* 0x[0-9a-f]{16} \*/"
)
_HIGH_HALF = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_SECTION = re.compile(r"\s*\.section\s+\.text\.(\S+?),")
_USAGE = re.compile(r" Function (\S+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass
class Instruction:
    opcode: str  # LDG.E.128
    operands: str = ""  # R4, [R2.64]
    stall: int = 0  # cycles until the next instruction of the warp issues, at least
    waits: int = 0  # a bit for each of six scoreboards that it waits for
    done: int | None = None  # the scoreboard that is told when there is a result
    read: int | None = None  # and that which is told when the operands have been read


@dataclass
class Loop:
    """From the target of a backward branch to the branch."""

    instructions: list[Instruction]

    @property
    def issue_cycles(self) -> int:
        """The least that a warp needs for one turn, by the stall counts of ptxas."""
        return sum(max(each.stall, 1) for each in self.instructions)

    @property
    def waits(self) -> int:
        return sum(each.waits != 0 for each in self.instructions)

    def count(self, pattern: str) -> int:
        return _count(self.instructions, pattern)


@dataclass(frozen=True)
class Occupancy:
    blocks: int  # of a multiprocessor
    warps: int
    fraction: float  # of the warps that it could hold
    limit: str  # "warps", "blocks", "registers" or "shared memory"


@dataclass
class Kernel:
    symbol: str  # as the compiler mangles it
    name: str  # demangled: tells the instances of a template apart
    arch: str  # "80"
    registers: int
    stack_bytes: int
    shared_bytes: int  # static
    spill_bytes: int | None = None  # loads and stores; None: not compiled here
    instructions: list[Instruction] = field(default_factory=list)
    loops: list[Loop] = field(default_factory=list)

    def count(self, pattern: str) -> int:
        """Instructions of that kind: "LDG" with any modifiers, "LDG.128" with that among them."""
        return _count(self.instructions, pattern)

    def opcodes(self) -> collections.Counter[str]:
        return collections.Counter(each.opcode for each in self.instructions)

    @property
    def main_loop(self) -> Loop | None:
        """That with the most issue cycles."""
        return max(self.loops, key=lambda loop: loop.issue_cycles, default=None)

    def occupancy(self, threads: int, dynamic_shared: int = 0) -> Occupancy:
        return occupancy(self.arch, threads, self.registers, self.shared_bytes + dynamic_shared)


def _count(instructions: Sequence[Instruction], pattern: str) -> int:
    base, *modifiers = pattern.split(".")
    total = 0
    for each in instructions:
        its_base, *its_modifiers = each.opcode.split(".")
        total += its_base == base and set(modifiers) <= set(its_modifiers)
    return total


# Threads, blocks and bytes of shared memory that a multiprocessor holds.
MULTIPROCESSORS = {
    "80": (2048, 32, 164 << 10),
    "86": (1536, 16, 100 << 10),
    "87": (1536, 16, 164 << 10),
    "89": (1536, 24, 100 << 10),
    "90": (2048, 32, 228 << 10),
    "100": (2048, 32, 228 << 10),
    "103": (2048, 32, 228 << 10),
    "120": (1536, 24, 100 << 10),
}


def occupancy(arch: str, threads: int, registers: int, shared_bytes: int) -> Occupancy:
    """What cuda_occupancy.h computes, for a kernel that is allowed all shared memory."""
    most_threads, most_blocks, most_shared = MULTIPROCESSORS[re.sub(r"\D", "", arch)]
    warps = -(-threads // 32)
    # registers are given to warps in units of 256; a quarter of the warps shares a quarter of them
    registers_of_warp = -(-registers * 32 // 256) * 256
    warps_by_registers = 65536 // 4 // registers_of_warp * 4 if registers else most_threads // 32
    shared = -(-(shared_bytes + 1024) // 128) * 128  # the system takes 1 kB a block
    if registers_of_warp * -(-warps // 4) * 4 > 65536:
        warps_by_registers = 0
    blocks, limit = min(
        (most_threads // 32 // warps, "warps"),
        (most_blocks, "blocks"),
        (warps_by_registers // warps, "registers"),
        (most_shared // shared, "shared memory"),
        key=lambda pair: pair[0],
    )
    return Occupancy(blocks, blocks * warps, blocks * warps / (most_threads // 32), limit)


def _demangled(symbols: Sequence[str]) -> list[str]:
    if not symbols:
        return []
    return build.run(["c++filt", *symbols]).stdout.splitlines()


def _fill_in(kernels: dict[str, Kernel], disassembly: str) -> None:
    """The instructions and loops."""
    kernel: Kernel | None = None
    labels: dict[str, int] = {}
    for line in disassembly.splitlines():
        if section := _SECTION.match(line):
            kernel, labels = kernels.get(section[1]), {}
        elif kernel is None:
            continue
        elif label := _LABEL.match(line):
            labels[label[1]] = len(kernel.instructions)
        elif found := _INSTRUCTION.match(line):
            kernel.instructions.append(Instruction(found[1], found[2].strip()))
            target = _TARGET.search(found[2])
            last = len(kernel.instructions) - 1
            # only what is above has its label yet; behind its end a kernel branches to itself
            begin = labels.get(target[1], last) if target else last
            if found[1].startswith("BRA") and begin < last:
                kernel.loops.append(Loop(kernel.instructions[begin:]))
        elif (high := _HIGH_HALF.match(line)) and kernel.instructions:
            control = int(high[1], 16) >> 41  # bits 105 to 125 of the instruction's 128
            last_one = kernel.instructions[-1]
            last_one.stall, last_one.waits = control & 15, control >> 11 & 63
            done, read = control >> 5 & 7, control >> 8 & 7  # 7: none
            last_one.done = done if done < 7 else None
            last_one.read = read if read < 7 else None


def _inspect_cubin(cubin: Path) -> list[Kernel]:
    usage = build.run([build.tool("cuobjdump"), "-res-usage", cubin]).stdout
    disassembly = build.run([build.tool("nvdisasm"), "-c", "-hex", cubin]).stdout
    target = re.search(r"\.target\s+sm_(\w+)", disassembly)
    if not target:
        raise ValueError(f"nvdisasm names no target of {cubin}")
    found = [(match[1], *map(int, match.groups()[1:])) for match in _USAGE.finditer(usage)]
    names = _demangled([symbol for symbol, *_ in found])
    # from sm_90 on the tool counts the shared memory that the system takes, if there is any other
    taken = 1024 if int(re.sub(r"\D", "", target[1])) >= 90 else 0
    kernels = {
        symbol: Kernel(symbol, name, target[1], registers, stack, max(shared - taken, 0))
        for (symbol, registers, stack, shared, _), name in zip(found, names)
    }
    _fill_in(kernels, disassembly)
    return [kernel for kernel in kernels.values() if kernel.instructions]


def inspect(path: Path, arch: str = "") -> list[Kernel]:
    """The kernels of a cubin, or of all cubins embedded in an object, library or program; arch:
    of those for sm_<arch> alone."""
    if path.suffix == ".cubin":
        return _inspect_cubin(path)
    with tempfile.TemporaryDirectory() as folder:
        command = [build.tool("cuobjdump"), "-xelf", "all", path.resolve()]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        cubins = sorted(Path(folder).glob(f"*.sm_{arch}.cubin" if arch else "*.cubin"))
        return [kernel for cubin in cubins for kernel in _inspect_cubin(cubin)]


def compile_and_inspect(
    source: Path, arch: str, flags: Sequence[str | Path] = (), depends: Sequence[Path] = ()
) -> list[Kernel]:
    """The kernels of a .cu file compiled for sm_<arch>; kept until source, flags or a file of
    depends changes."""
    command = [build.tool("nvcc"), "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin"]
    command += ["-Xptxas=-v", *flags, source]

    def make(folder: Path) -> None:
        report = build.run([*command, "-o", folder / "kernel.cubin"]).stderr
        (folder / "ptxas").write_text(report)

    folder = build.cached(f"{source.stem}-sm{arch}", command, [source, *depends], make)
    kernels = _inspect_cubin(folder / "kernel.cubin")
    spills = {}
    for part in (folder / "ptxas").read_text().split("Compiling entry function '")[1:]:
        if found := _SPILLS.search(part):
            spills[part[: part.index("'")]] = int(found[2]) + int(found[3])
    for kernel in kernels:
        kernel.spill_bytes = spills.get(kernel.symbol)
    return kernels


_COLUMNS = "LDG.128 LDG STG.128 STG LDS STS LDSM LDGSTS LD ST HMMA FFMA FMUL MUFU BAR LDL STL"


def table(kernels: Sequence[Kernel], threads: int = 128) -> str:
    lines = []
    for kernel in kernels:
        at = kernel.occupancy(threads)
        counts = " ".join(f"{each} {n}" for each in _COLUMNS.split() if (n := kernel.count(each)))
        line = f"sm_{kernel.arch} {kernel.name}: {kernel.registers} registers, "
        line += f"spills {kernel.spill_bytes}, stack {kernel.stack_bytes}, "
        line += f"shared {kernel.shared_bytes}, {at.warps} warps by {at.limit} "
        line += f"({threads} threads), {len(kernel.instructions)} instructions: {counts}"
        if loop := kernel.main_loop:
            line += f"; main loop {len(loop.instructions)} instructions, "
            line += f"{loop.issue_cycles} issue cycles, {loop.waits} waits"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help=".cu, .cubin, .o or .so")
    parser.add_argument("--arch", nargs="+", default=["80"], help="for a .cu")
    parser.add_argument("--flags", default="", help="of nvcc")
    parser.add_argument("--threads", type=int, default=128, help="of a block, for the occupancy")
    arguments = parser.parse_args()
    if arguments.file.suffix == ".cu":
        flags = arguments.flags.split()
        found = [
            kernel
            for arch in arguments.arch
            for kernel in compile_and_inspect(arguments.file, arch, flags)
        ]
    else:
        found = inspect(arguments.file)
    print(table(found, arguments.threads))


if __name__ == "__main__":
    main()
