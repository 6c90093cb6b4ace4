"""The C interface from C++: tests/kernel_library, built against the installed library and run on
every instruction set of this CPU, and built together with the kernels under sanitizers. `make
test-neon` runs the same program for AArch64."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

import torch_rwkv6

ROOT = Path(__file__).parents[1]
LIBRARY = Path(torch_rwkv6.__file__).with_name("librwkv6.so")
LACKING = 2  # the program's exit status where the CPU lacks the instruction set
PROGRAM = sorted((ROOT / "tests/kernel_library").glob("*.cpp"))
INCLUDES = [f"-I{ROOT / 'csrc/include'}", *(f"-isystem{path}" for path in include_paths())]

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


def test_program_on_every_instruction_set(tmp_path):
    program = tmp_path / "kernel_library_test"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-Wl,-rpath,{LIBRARY.parent}"]
    subprocess.run(["g++", *flags, *INCLUDES, *PROGRAM, LIBRARY, "-o", program], check=True)
    ran = []
    for isa in ("baseline", "avx2", "avx512", "neon"):
        result = subprocess.run(
            [program], capture_output=True, text=True, env=os.environ | {"RWKV6_CPU_ISA": isa}
        )
        if result.returncode != LACKING:
            assert result.returncode == 0, result.stdout
            ran.append(isa)
    assert ran


def test_odd_sizes_under_sanitizers(tmp_path):
    """The kernels stay within what they borrow, whichever size is the larger one."""
    kernels = [*(ROOT / "csrc").glob("*.cpp"), ROOT / "csrc/cuda/absent.cpp"]
    kernels += [ROOT / f"csrc/cpu/{name}.cpp" for name in ("isa_baseline", "isa_neon", "select")]
    tests = [path for path in PROGRAM if path.stem in ("main", "sizes")]
    # What takes time is compiling. So nothing is optimised, checks of addresses are calls, and
    # undefined behaviour ends the program with SIGILL: `make sanitize` says what it is. Left to it
    # is what the processor finds as well, as it does null pointers and misaligned vectors, or what
    # takes optimisation to be found (object-size).
    flags = ["-std=c++20", "-O0", "-g1", "-DONLY_SIZES", f"-I{ROOT / 'csrc'}", *INCLUDES]
    flags += ["-fsanitize=address,undefined", "-fsanitize-undefined-trap-on-error"]
    flags += ["-fno-sanitize=null,alignment,object-size"]
    flags += ["--param", "asan-instrumentation-with-call-threshold=0"]

    def compiled(source: Path) -> Path:
        out = tmp_path / f"{source.parent.name}_{source.stem}.o"
        subprocess.run(["g++", *flags, "-c", source, "-o", out], check=True)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, [*kernels, *tests]))
    program = tmp_path / "sanitized"
    subprocess.run(["g++", *flags, *objects, "-o", program], check=True)
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    environment.pop("RWKV6_CPU_ISA", None)
    result = subprocess.run([program], capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
