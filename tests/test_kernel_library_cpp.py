"""The C interface from C++: tests/kernel_library, built against the installed library and run on
every instruction set of this CPU. `make test-neon` runs the same program for AArch64."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

import torch_rwkv6

ROOT = Path(__file__).parents[1]
LIBRARY = Path(torch_rwkv6.__file__).with_name("librwkv6.so")
LACKING = 2  # the program's exit status where the CPU lacks the instruction set


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_cpp_program_on_every_instruction_set(tmp_path):
    program = tmp_path / "kernel_library_test"
    sources = sorted((ROOT / "tests/kernel_library").glob("*.cpp"))
    includes = [f"-I{ROOT / 'csrc/include'}", *(f"-isystem{path}" for path in include_paths())]
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", f"-Wl,-rpath,{LIBRARY.parent}"]
    subprocess.run(["g++", *flags, *includes, *sources, LIBRARY, "-o", program], check=True)
    ran = []
    for isa in ("baseline", "avx2", "avx512", "neon"):
        result = subprocess.run(
            [program], capture_output=True, text=True, env=os.environ | {"RWKV6_CPU_ISA": isa}
        )
        if result.returncode != LACKING:
            assert result.returncode == 0, result.stdout
            ran.append(isa)
    assert ran
