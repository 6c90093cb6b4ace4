"""The package as installed: stable ABI, and a use without the binary that says what is missing."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_rwkv6

sys.path.insert(0, str(Path(__file__).parents[1] / "csrc/cuda"))
import nvcc

PACKAGE = Path(torch_rwkv6.__file__).parent

WITHOUT_BINARY = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch_rwkv6
    import torch_rwkv6
messages = [str(w.message) for w in caught if "torch_rwkv6" in str(w.message)]
assert len(messages) == 1, messages
for part in ("_C.abi3.so does not exist", "pip install", "reference"):
    assert part in messages[0], messages[0]
assert not torch_rwkv6.has_kernels

import sys
for slow in ("torch.distributed.tensor", "torch.utils.flop_counter"):
    assert slow not in sys.modules, slow

import torch
from torch_rwkv6 import reference, wkv, wkv_update
torch.manual_seed(0)
r, k, v, w = (torch.randn(2, 5, 2, 4, requires_grad=True) for _ in range(4))
u, state = torch.randn(2, 4, requires_grad=True), torch.randn(2, 2, 4, 4, requires_grad=True)
x = (r, k, v, w, u, state)
y, final = wkv(*x)
expected = reference.wkv(*x)
torch.testing.assert_close((y, final), expected)
grads = torch.autograd.grad(y.sum() + final.sum(), x)
torch.testing.assert_close(grads, torch.autograd.grad(sum(z.sum() for z in expected), x))
for op, args in ((torch.ops.rwkv6.wkv, (*x, None, None)),):
    torch.library.opcheck(op.default, args)
with torch.no_grad():
    pool = torch.randn(3, 2, 4, 4)
    before = pool.clone()
    y = wkv_update(r, k, v, w, u, pool, state_map=torch.tensor([2, -1]))
    expected_y, expected_state = wkv(r[:1], k[:1], v[:1], w[:1], u, before[2:])
    torch.testing.assert_close(y[:1], expected_y)
    torch.testing.assert_close(pool[2:], expected_state)
    assert (y[1] == 0).all() and torch.equal(pool[:2], before[:2])
    torch.library.opcheck(torch.ops.rwkv6.wkv_update.default, (r.detach(), k.detach(), v.detach(),
        w.detach(), u.detach(), pool, torch.tensor([2, 0]), None))
for bad in (torch.tensor([0, 3]), torch.tensor([-1, 0])):
    try:
        wkv(r, k, v, w, u, pool, state_map=bad)
    except RuntimeError as error:
        assert "state_map" in str(error)
    else:
        raise AssertionError("accepted")
try:
    wkv(r[:1], k[:1], v[:1], w[:1], u, cu_seqlens=torch.tensor([0, 4]))
except RuntimeError as error:
    assert "cu_seqlens" in str(error)
else:
    raise AssertionError("accepted")
compiled = torch.compile(wkv, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(*x), wkv(*x))
print("done")
"""


def test_import_without_the_binary_works_and_says_once_what_is_missing(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "torch_rwkv6", ignore=shutil.ignore_patterns("*.so"))
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_BINARY],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert result.stdout == "done\n", result.stderr


def test_the_binding_uses_only_torchs_stable_abi():
    audit = shutil.which("torch-abi-audit", path=Path(sys.executable).parent)
    result = subprocess.run(
        [audit, "--check", "torch", str(PACKAGE / "_C.abi3.so")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
    assert "STABLE" in result.stdout
    assert "Min torch:   2.10.0" in result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="versions of symbols are Linux's")
@pytest.mark.parametrize("name", ["librwkv6.so", "_C.abi3.so", "../keras_adapter/_xla.abi3.so"])
def test_the_binary_needs_no_newer_cpp_library_than_torch_and_shows_only_its_own_names(name):
    if not (PACKAGE / name).exists():
        pytest.skip("not built, as asked for")
    table = subprocess.run(
        ["objdump", "-T", str(PACKAGE / name)], capture_output=True, text=True, check=True
    ).stdout
    versions = re.findall(r"GLIBCXX_([\d.]+)", table)
    newest = max(tuple(map(int, version.split("."))) for version in versions)
    assert newest <= (3, 4, 24), "more than manylinux_2_28 has: see csrc/linux"
    defined = [line.split()[-1] for line in table.splitlines() if " .text" in line]
    assert all(symbol.startswith("rwkv6_") for symbol in defined), defined


def test_the_binary_needs_no_python_library():
    needed = subprocess.run(
        ["ldd", str(PACKAGE / "_C.abi3.so")], capture_output=True, text=True
    ).stdout
    assert "libpython" not in needed
    assert "librwkv6.so" in needed


@pytest.mark.skipif(os.environ.get("RWKV6_CUDA") == "0", reason="built without, as asked for")
def test_cuda_kernels_are_there_where_nvcc_is_though_torch_has_no_cuda():
    library = ctypes.CDLL(str(PACKAGE / "librwkv6.so"))
    library.rwkv6_cuda_architectures.restype = ctypes.c_char_p
    assert (library.rwkv6_cuda_architectures() is not None) == (nvcc.toolkit() is not None)
    assert torch_rwkv6.has_cuda_kernels <= (torch.version.cuda is not None)


def test_two_head_sizes_dtypes_and_lengths_share_one_process_without_compiling():
    code = (
        "import os, torch, torch_rwkv6\n"
        "os.environ['PATH'] = ''\n"  # no compiler to be found
        "for N in (64, 32):\n"
        "    for T in (1, 5000):\n"
        "        x = torch.randn(1, T, 1, N)\n"
        "        torch_rwkv6.wkv(x, x, x, x, x[0, 0])\n"
        "print('done')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "done\n", result.stderr
