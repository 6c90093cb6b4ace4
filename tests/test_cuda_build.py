"""Building the CUDA kernels: which nvcc, for which GPUs, and what is said where that cannot be."""

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

from torch_rwkv6.registration import fallback

sys.path.insert(0, str(Path(__file__).parents[1] / "csrc/cuda"))
import nvcc


def codes(names):
    return nvcc.architecture_options(names)[1::2]


def test_architectures_as_torch_writes_them():
    assert codes("8.0;9.0a 12.0+PTX") == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90a,code=sm_90a",
        "arch=compute_120,code=sm_120",
        "arch=compute_120,code=compute_120",
    ]


def test_architectures_without_what_the_kernels_need_are_left_out(capsys):
    assert codes("7.5 8.6") == ["arch=compute_86,code=sm_86"]
    assert "no CUDA kernels for 7.5: they need 8.0 or later" in capsys.readouterr().out


def test_kernels_are_the_same_on_every_gpu():
    """The tests run the PTX of one architecture, and say what it takes on all."""
    for source in Path(nvcc.__file__).parent.iterdir():
        if source.is_file():
            text = source.read_text()
            assert not re.search(r"__CUDA_ARCH__|NV_IF|__bfloat162float\(", text), source.name


@pytest.mark.parametrize("names", ["Hopper", "8.0,9.0", "sm_80", "80"])
def test_unknown_architectures_are_refused(names):
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: expected compute capabilities"):
        nvcc.architecture_options(names)


def test_only_old_architectures_are_refused():
    with pytest.raises(SystemExit, match=r"the CUDA kernels need 8\.0 or later, got 7\.0 7\.5"):
        nvcc.architecture_options("7.0 7.5")


def test_the_nvcc_of_cuda_home_comes_first(tmp_path, monkeypatch):
    for place in ("home", "path"):
        (tmp_path / place / "bin").mkdir(parents=True)
        (tmp_path / place / "bin/nvcc").touch()
    monkeypatch.setenv("PATH", str(tmp_path / "path/bin"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert nvcc.toolkit().nvcc == tmp_path / "home/bin/nvcc"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert nvcc.toolkit().nvcc == tmp_path / "path/bin/nvcc"


def test_an_nvcc_that_does_not_work_says_why(tmp_path):
    program = tmp_path / "nvcc"
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libcudart_static.a").touch()
    program.write_text(
        f'#!/bin/sh\necho "#$ TOP={tmp_path}\nunsupported GNU version!" >&2\nexit 1\n'
    )
    program.chmod(0o755)
    with pytest.raises(nvcc.UnusableError, match=r"nvcc says: .*\nunsupported GNU version!"):
        nvcc.Toolkit(program).check([], tmp_path / "probe")
    (tmp_path / "lib/libcudart_static.a").unlink()
    with pytest.raises(nvcc.UnusableError, match=r"no libcudart_static\.a in"):
        nvcc.Toolkit(program).check([], tmp_path / "probe")


def test_the_reference_on_a_gpu_says_once_what_is_missing():
    fallback._say_what_is_missing.cache_clear()
    kernel = fallback.slow_on_gpus(fallback.KERNELS["wkv"])
    x = torch.randn(1, 3, 2, 4)
    with pytest.warns(RuntimeWarning, match="no CUDA kernels.*RWKV6_CUDA=1"):
        y, _ = kernel(x, x, x, x, x[0, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, _ = kernel(x, x, x, x, x[0, 0])
    assert torch.equal(y, again)
