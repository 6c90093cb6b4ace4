"""Checkpoints of wrapped models, of other programs and in folders, and how files are written."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
import signal
import stat
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from checkpoints import VERSIONS, D, L, N, fla, hugging_face, random_model, web_rwkv
from safetensors.torch import save_file
from torch import Tensor, nn

from torch_rwkv6.__main__ import main
from torch_rwkv6.files import file_to_write, put_back, remove_parts, written
from torch_rwkv6.models import load, read, save
from torch_rwkv6.nn import RWKV, RWKV5, RWKV6

SUFFIXES = ["pth", "safetensors"]


def assert_same(found: RWKV, expected: RWKV) -> None:
    assert list(found.state_dict()) == list(expected.state_dict())
    for name, x in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], x), name


class Holder(nn.Module):
    """As a LightningModule holds a model."""

    def __init__(self, model: nn.Module, name: str = "model") -> None:
        super().__init__()
        self.add_module(name, model)


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_blocks(model: nn.Module) -> nn.Module:
    for i, block in enumerate(model.blocks):
        block.att = torch.compile(block.att, backend="eager")
        model.blocks[i] = torch.compile(block, backend="eager")
    return model


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


# ---- names


@pytest.mark.parametrize(
    "wrap",
    [
        compiled,
        compiled_in_place,
        compiled_blocks,
        nn.DataParallel,
        lambda model: compiled(nn.DataParallel(model)),
        lambda model: nn.DataParallel(compiled(compiled_blocks(model))),
        Holder,
        lambda model: Holder(model, "rwkv"),
        lambda model: Holder(Holder(nn.DataParallel(compiled(model)), "net"), "model"),
    ],
)
def test_wrapped_models_are_saved_under_the_official_names(
    wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    model, plain = random_model("6"), random_model("6")
    wrapped = wrap(model)
    save(wrapped, tmp_path / "model.pth")
    assert list(torch.load(tmp_path / "model.pth")) == list(plain.state_dict())
    assert_same(load(tmp_path / "model.pth"), plain)
    assert_same(load(wrapped.state_dict()), plain)  # as torch.save would write it


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module.", "_orig_mod.module.", "model.", "model._forward_module.x.", "rwkv."],
)
@pytest.mark.parametrize("convention", [dict, hugging_face, fla, web_rwkv])
def test_wrappers_around_every_convention(
    convention: Callable[[dict[str, Tensor]], dict[str, Tensor]], prefix: str, tmp_path: Path
) -> None:
    for version in ("6",) if convention is fla else VERSIONS:
        model = random_model(version)
        names = convention(model.state_dict())
        inside = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_orig_mod.")
        renamed = {}
        for i, (name, x) in enumerate(names.items()):
            first, _, rest = name.partition(".")
            renamed[f"{prefix}{first}.{inside[i % 3]}{rest}"] = x
        assert_same(load(renamed), model)
        save(renamed, tmp_path / "model.pth")
        assert set(torch.load(tmp_path / "model.pth")) == set(model.state_dict())


def test_sharded_models_are_gathered(tmp_path: Path) -> None:
    distributed = torch.distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = random_model("5.2")
        mesh = distributed.init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        save(fully_shard(model, mesh=mesh), tmp_path / "model.safetensors")
    finally:
        distributed.destroy_process_group()
    assert_same(load(tmp_path / "model.safetensors"), random_model("5.2"))


def test_names_that_no_model_has_are_not_saved(tmp_path: Path) -> None:
    path, weights = tmp_path / "model.pth", random_model("6").state_dict()
    lora = {f"base_model.model.{n}": x for n, x in weights.items()}
    lora["base_model.model.blocks.0.att.key.lora_A.default.weight"] = torch.zeros(2, 2)
    two = {f"a.{n}": x for n, x in weights.items()} | {f"b.{n}": x for n, x in weights.items()}
    for model, message in (
        (nn.Linear(2, 2), "model: expected the names of an RWKV's tensors, got weight, bias"),
        (lora, r"blocks.0.att.key.lora_A.default.weight \(a LoRA is merged first"),
        (weights | {"extra": torch.zeros(1)}, "got extra"),
        (weights | {"blocks.0.att.r_k": torch.zeros(1)}, "got blocks.0.att.r_k"),
        (two, "state_dict: expected one model, got several"),
        (weights | {"_orig_mod.emb.weight": torch.zeros(1)}, "got two tensors for emb.weight"),
        ({}, "got none"),
        (random_model("6").to("meta"), "emb.weight on the meta device|on the meta device"),
    ):
        with pytest.raises(ValueError, match=message):
            save(model, path)
    for wrong, message in (
        ({"emb.weight": torch.zeros(2, dtype=torch.int8)}, "got torch.int8 as emb.weight"),
        ({3: torch.zeros(2)}, "expected names of tensors, got 3"),
        (None, "expected a model or a state_dict, got NoneType"),
    ):
        with pytest.raises(TypeError, match=message):
            save(wrong, path)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_parts_of_models_are_named_when_loaded() -> None:
    weights = random_model("6").state_dict()
    lora = {"blocks.0.att.key.lora_A.weight": torch.zeros(2, 2)}
    tuned = {f"base_model.model.{n}": x for n, x in (weights | lora).items()}
    for tensors, message in (
        (lora, r"a LoRA alone .*load\(MODEL, lora=FOLDER\)"),
        (tuned, r"a LoRA that is not merged"),
        ({"blocks.0.att.time_state": torch.zeros(2, 2)}, r"tuned states alone .*MODEL, state=FILE"),
        (weights | {"teacher.blocks.0.att.key.weight": torch.zeros(1)}, "expected one model"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tensors)


@pytest.mark.parametrize("version", VERSIONS)
def test_files_of_web_rwkv(version: str, tmp_path: Path) -> None:
    model = random_model(version)
    save_file(web_rwkv(model.state_dict()), tmp_path / "model.st")
    assert_same(load(tmp_path / "model.st"), model)


def test_files_of_web_rwkv_of_one_head_and_with_tuned_states(tmp_path: Path) -> None:
    for model in (
        RWKV5(5, 1, 16, 16),
        RWKV6(5, 1, 16, 16, lora_mix=2, lora_decay=3),
        RWKV6(5, 2, 16, 8, lora_mix=2, lora_decay=3, train_state=True),
    ):
        for p in model.parameters():
            nn.init.normal_(p)
        save_file(web_rwkv(model.state_dict()), tmp_path / "model.st")
        assert_same(load(tmp_path / "model.st"), model)


# ---- what is added to a model


def tuned_states() -> dict[str, Tensor]:
    return {f"blocks.{i}.att.time_state": torch.randn(D // N, N, N) for i in range(L)}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tuned_states_are_loaded_with_their_model(suffix: str, tmp_path: Path) -> None:
    model, states = random_model("6"), tuned_states()
    base, path = tmp_path / "model.pth", tmp_path / f"state.{suffix}"
    save(model, base)
    save(states, path)
    wrapped = {"state_dict": {f"model._orig_mod.{n}": x for n, x in states.items()}}
    expected = load(model.state_dict() | states)
    for state in (path, str(path), states, wrapped, read(path)):
        assert_same(load(base, state=state), expected)
    assert_same(
        load(expected.state_dict(), state=dict.fromkeys(states, torch.zeros(4, 8, 8))),
        (load(base, train_state=True)),
    )
    # [value, key], where RWKVState is [key, value]
    start = load(base, state=path).initial_state(1).wkv[:, 0]
    assert torch.equal(start, torch.stack([x.mT for x in states.values()]))


def test_tuned_states_that_are_none(tmp_path: Path) -> None:
    base, states = random_model("6").state_dict(), tuned_states()
    start = random_model("6").initial_state(1)
    start.save(tmp_path / "start.pth")
    save_file(states, tmp_path / "state.st")
    (tmp_path / "text.pth").write_text("text")
    few = dict(list(states.items())[:-1])
    for state, error, message in (
        (base, ValueError, r"state: expected tuned states alone, .*, got blocks.0.ln0.weight, "),
        (base | states, ValueError, "state: expected tuned states alone"),
        ({}, ValueError, "got nothing"),
        (start._asdict(), ValueError, "an RWKVState: RWKVState.load reads it"),
        (tmp_path / "start.pth", ValueError, "an RWKVState: RWKVState.load reads it"),
        (tmp_path / "state.st", ValueError, r"state: expected \[value, key\], got web-rwkv's"),
        (tmp_path / "text.pth", ValueError, "text.pth is no checkpoint"),
        (tmp_path / "none.pth", FileNotFoundError, "no such file"),
        ("", ValueError, "state: expected a file or folder, got an empty path"),
        (start, TypeError, "state: expected a path or a mapping"),
        (few, ValueError, "missing blocks.2.att.time_state"),
        (dict.fromkeys(states, torch.zeros(2, 16, 16)), ValueError, r"expected \(4, 8, 8\), got"),
    ):
        with pytest.raises(error, match=message):
            load(base, state=state)
    with pytest.raises(ValueError, match="train_state: expected True or None beside state"):
        load(base, state=states, train_state=False)
    with pytest.raises(
        ValueError, match=r"do not fit RWKV-4:\n  unexpected blocks.0.att.time_state"
    ):
        load(random_model("4").state_dict(), state=states)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The folder of a LoRA of random values."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, lora_alpha=7, target_modules=["key", "output"], init_lora_weights=False
    )
    peft.get_peft_model(random_model("6"), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_lora_is_loaded_with_its_model(adapter: Path) -> None:
    weights, expected = random_model("6").state_dict(), random_model("6").state_dict()
    for name, a in read(adapter / "adapter_model.safetensors").items():
        if name.endswith(".lora_A.weight"):
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = read(adapter / "adapter_model.safetensors")[name.replace("lora_A", "lora_B")]
            expected[f"{layer}.weight"] = expected[f"{layer}.weight"] + 7 / 2 * b @ a
    model = load(weights, lora=adapter)
    assert list(model.state_dict()) == list(weights)
    assert all(
        type(module) is not nn.Linear or module.weight.requires_grad for module in model.modules()
    )
    for name, x in model.state_dict().items():
        torch.testing.assert_close(x, expected[name], rtol=1e-6, atol=1e-6)
    assert not torch.equal(model.head.weight, model.blocks[0].att.key.weight)
    half = load(weights, dtype=torch.bfloat16, lora=str(adapter))
    assert_same(half, model.bfloat16())  # merged before it is rounded


def test_a_lora_is_merged_by_the_command_line(adapter: Path, tmp_path: Path) -> None:
    base, merged = tmp_path / "base.pth", tmp_path / "merged.pth"
    save(random_model("6"), base)
    assert main(["convert", str(base), str(merged), "--lora", str(adapter)]) == 0
    assert_same(load(merged), load(base, lora=adapter))


def test_loras_that_are_none(adapter: Path, tmp_path: Path) -> None:
    weights = random_model("6").state_dict()
    (tmp_path / "empty").mkdir()
    for lora, error, message in (
        (tmp_path / "empty", ValueError, "lora: expected a folder with adapter_config.json"),
        (
            adapter / "adapter_model.safetensors",
            ValueError,
            "expected a folder with adapter_config",
        ),
        (tmp_path / "none", FileNotFoundError, "no such file"),
        ("", ValueError, "lora: expected a file or folder, got an empty path"),
        (weights, TypeError, "lora: expected a folder, got "),
    ):
        with pytest.raises(error, match=message):
            load(weights, lora=lora)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"holds a LoRA alone: .*load\(MODEL, lora=FOLDER\)"):
        load(adapter)
    with pytest.raises(ValueError, match="a LoRA alone"):
        load(adapter / "adapter_model.safetensors")
    small = RWKV6(5, 1, 16, 8, lora_mix=2, lora_decay=2).state_dict()
    with pytest.raises(ValueError, match="lora: expected one for this model, got another"):
        load(small, lora=adapter)
    tensors = read(adapter / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file(
        tensors | {"base_model.model.other.lora_A.weight": torch.zeros(1)},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match=r"1 tensors are missing or unexpected, such as .*other"):
        load(weights, lora=adapter)
    save_file(
        {n: x for n, x in tensors.items() if n != name}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match="1 tensors are missing or unexpected, such as"):
        load(weights, lora=adapter)
    config = (adapter / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="is no configuration of peft"):
        load(weights, lora=adapter)
    (adapter / "adapter_config.json").write_text(config)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no adapter_model.safetensors or adapter_model.bin"
    ):
        load(weights, lora=adapter)


# ---- files


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_checkpoints_of_training_programs(key: str, tmp_path: Path) -> None:
    model = random_model("6")
    content = {
        "epoch": 3,
        key: {f"model.{name}": x for name, x in model.state_dict().items()},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}],
    }
    torch.save(content, tmp_path / "last.ckpt")
    assert_same(load(tmp_path / "last.ckpt"), model)
    assert_same(load(content), model)


def test_suffixes_are_names_and_content_decides(tmp_path: Path) -> None:
    model = random_model("6")
    save(model, tmp_path / "a.safetensors")
    for name in ("a.SAFETENSORS", "a.st", "a.pth", "a", "a.ckpt"):
        (tmp_path / name).write_bytes((tmp_path / "a.safetensors").read_bytes())
        assert_same(load(tmp_path / name), model)
    save(model, tmp_path / "b.SAFETENSORS")
    assert (tmp_path / "b.SAFETENSORS").read_bytes()[8:9] == b"{"
    save(model, tmp_path / "b.pth")
    (tmp_path / "b.pth").rename(tmp_path / "b.safetensors")
    assert_same(load(tmp_path / "b.safetensors"), model)


def test_what_is_no_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(random_model("6"), "model.pth")  # "" must not mean the current folder
    os.mkfifo("pipe")
    for source, error, message in (
        ("", ValueError, "source: expected a file or folder, got an empty path"),
        (" ", ValueError, "got an empty path"),
        ("https://example.com/model.pth", ValueError, "the URL https://example.com/model.pth"),
        (Path("https://example.com/model.pth"), ValueError, "the URL"),
        ("s3://bucket/model.pth", ValueError, "the URL s3://bucket/model.pth: download it first"),
        ("RWKV/v6-Finch-1B6-HF", FileNotFoundError, "Hugging Face hub, download it first"),
        ("none.pth", FileNotFoundError, "no such file: none.pth$"),
        ("none/none.pth", FileNotFoundError, "no such file: none/none.pth$"),
        ("pipe", ValueError, "pipe is no checkpoint, but a device or pipe"),
        ("/dev/null", ValueError, "is no checkpoint, but a device or pipe"),
    ):
        with pytest.raises(error, match=message):
            load(source)


def test_files_of_other_programs_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    for content, message in (
        (b"GGUF\3\0\0\0", "a GGUF file of llama.cpp"),
        (b"fmgg\x65\0\0\0", "a file of rwkv.cpp"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"\x89HDF\r\n", "an HDF5 file"),
        (b"", "is no checkpoint, or a truncated one"),
        (b"hello world", "is no checkpoint, or a truncated one: its pickle cannot be read"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load(path)


class Program:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 1",)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_with_code_are_refused_without_advice_to_run_it(zipped: bool, tmp_path: Path) -> None:
    weights = random_model("6").state_dict()
    for content, name in (
        (weights | {"a": Program()}, "posix.system"),
        (random_model("6"), "torch_rwkv6.nn.versions.RWKV6"),
        ({"state_dict": weights, "args": argparse.Namespace()}, "argparse.Namespace"),
    ):
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match="can run any code") as error:
            load(tmp_path / "a.pth")
        assert name in str(error.value)
        assert "weights_only" not in str(error.value)
        assert "safe_globals" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_of_other_libraries_are_refused_without_that_advice(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    for write in (
        lambda file: np.save(file, np.zeros(3)),
        lambda file: np.savez(file, a=np.zeros(3)),
        lambda file: zipfile.ZipFile(file, "w").writestr("a", "b"),
        *(lambda file, n=n: pickle.dump({"a": np.zeros(3)}, file, n) for n in range(6)),
        *(lambda file, n=n: pickle.dump([1, 2], file, n) for n in range(6)),
        lambda file: file.write(b"\x80\x02" + bytes(100)),
        lambda file: file.write(b"PK\3\4" + bytes(100)),
        lambda file: file.write(bytes(8) + b"{" + bytes(100)),
    ):
        with path.open("wb") as file:
            write(file)
        with pytest.raises(ValueError, match=r"a.pth is no checkpoint") as error:
            load(path)
        for advice in ("weights_only", "safe_globals", "trust"):
            assert advice not in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_program(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "a.pth"))
    with pytest.raises(ValueError, match=r"is no checkpoint, but a TorchScript program$"):
        load(tmp_path / "a.pth")


# ---- folders


@pytest.mark.parametrize(
    "names",
    [
        ("a.pth", "b.pth"),
        ("a.safetensors", "b.safetensors"),
        ("a.pth", "b.safetensors"),
        ("a.bin", "b.pth"),
        ("model.safetensors", "model-2.safetensors"),
    ],
    ids=" ".join,
)
def test_a_folder_with_two_checkpoints(names: tuple[str, str], tmp_path: Path) -> None:
    for version, name in zip(("6", "5.2"), names, strict=True):
        save(random_model(version), tmp_path / name)
    with pytest.raises(ValueError, match=r"holds several checkpoints.*: load one of its files"):
        load(tmp_path)
    assert_same(load(tmp_path / names[0]), random_model("6"))


def test_two_checkpoints_under_different_names(tmp_path: Path) -> None:
    model = random_model("6")
    save(model, tmp_path / "a.pth")
    for convention in (hugging_face, compiled_names, held_names):
        torch.save(convention(model.state_dict()), tmp_path / "b.pth")
        with pytest.raises(ValueError, match=r"holds several checkpoints \(a.pth, b.pth\)"):
            load(tmp_path)


def held_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": x for name, x in weights.items()}


def compiled_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"_orig_mod.{name}": x for name, x in weights.items()}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "rwkv.pth"])
def test_what_lies_beside_a_model_is_not_read(name: str, tmp_path: Path) -> None:
    model = random_model("6")
    save(model, tmp_path / name)
    torch.save(argparse.Namespace(lr=1), tmp_path / "training_args.bin")
    torch.save({"state": {}}, tmp_path / "optimizer.bin")
    torch.save({"state": {}}, tmp_path / "scheduler.bin")
    torch.save({"cpu": torch.get_rng_state()}, tmp_path / "rng_state.pth")
    save({"emb.weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    save({"emb.weight": torch.zeros(1)}, tmp_path / "adapter_model.bin")
    (tmp_path / f".{name}").write_text("hidden")
    (tmp_path / "config.json").write_text("{}")
    assert_same(load(tmp_path), model)
    if name == "model.safetensors":  # the same model once more, as repositories have it
        save(model, tmp_path / "pytorch_model.bin")
        assert_same(load(tmp_path), model)


def test_a_model_in_several_files(tmp_path: Path) -> None:
    model = random_model("6")
    weights = list(hugging_face(model.state_dict()).items())
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    torch.save(dict(weights[:40]), tmp_path / files[0])
    torch.save(dict(weights[40:]), tmp_path / files[1])
    index = {n: files[i >= 40] for i, (n, _) in enumerate(weights)}
    path = tmp_path / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    save(random_model("5.2"), tmp_path / "other.bin")  # the index does not name it
    assert_same(load(tmp_path), model)
    assert_same(load(path), model)
    for content, error, message in (
        ({"weight_map": {"a": "none.bin"}}, FileNotFoundError, "none.bin, which pytorch_model.bin"),
        ({"weight_map": {"a": "../a.bin"}}, ValueError, "no index of checkpoint files"),
        ({"weight_map": {"a": 3}}, ValueError, "no index of checkpoint files"),
        ({"weight_map": []}, ValueError, "no index of checkpoint files"),
        ({}, ValueError, "no index of checkpoint files"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(error, match=message):
            load(tmp_path)


def test_parts_of_a_model_without_an_index(tmp_path: Path) -> None:
    model = random_model("6")
    weights = list(model.state_dict().items())
    for i in range(3):
        save(dict(weights[i::3]), tmp_path / f"model-0000{i + 1}-of-00003.safetensors")
    assert_same(load(tmp_path), model)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks part 2 of model-00001-of-00003"):
        load(tmp_path)


def test_a_tuned_state_beside_a_model_is_not_mixed_in(tmp_path: Path) -> None:
    model = random_model("6")
    save(model, tmp_path / "model.pth")
    state = {f"blocks.{i}.att.time_state": torch.ones(4, 8, 8) for i in range(model.n_layer)}
    torch.save(state, tmp_path / "state.pth")
    with pytest.raises(ValueError, match=r"several checkpoints \(model.pth, state.pth\)"):
        load(tmp_path)


def test_a_file_that_is_replaced_keeps_its_mode_and_its_link(tmp_path: Path) -> None:
    model = random_model("6")
    for suffix in ("pth", "safetensors"):
        target, link = tmp_path / f"real.{suffix}", tmp_path / f"link.{suffix}"
        save(random_model("5.2"), target)
        target.chmod(0o640)
        link.symlink_to(target)
        save(model, link)
        assert link.is_symlink()
        assert target.stat().st_mode & 0o777 == 0o640
        assert_same(load(target), model)


# ---- arguments


def test_arguments_of_load() -> None:
    weights = random_model("6").state_dict()
    for options, error in (
        ({"device": "cuda:99"}, ValueError),
        ({"device": "nothing"}, ValueError),
        ({"device": 1.5}, TypeError),
        ({"dtype": torch.int8}, TypeError),
        ({"dtype": "float16"}, TypeError),
        ({"ln_x_eps": -1.0}, ValueError),
        ({"ln_x_eps": float("nan")}, ValueError),
        ({"ln_x_eps": "1e-5"}, TypeError),
    ):
        with pytest.raises(error, match=f"^{next(iter(options))}: expected "):
            load(weights, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_default_device_plays_no_part(suffix: str, tmp_path: Path) -> None:
    save(random_model("6"), tmp_path / f"a.{suffix}")
    torch.set_default_device("meta")
    try:
        model = load(tmp_path / f"a.{suffix}", train_state=True)
        save(model, tmp_path / f"b.{suffix}")
    finally:
        torch.set_default_device(None)
    assert not model.blocks[0].att.time_state.any()
    assert_same(load(tmp_path / f"b.{suffix}"), model)


def test_no_initial_values_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device that takes more than a second, as torch imports its compiler for it."""
    models = [random_model(version) for version in VERSIONS]

    def draws(*args: object, **options: object) -> None:
        raise AssertionError

    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(Tensor, name, draws)
    for model in models:
        assert_same(load(model.state_dict()), model)


# ---- folders of torch.distributed.checkpoint; several processes: tests/test_parallelize.py


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
def test_a_folder_of_torch_distributed_checkpoint(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    import torch.distributed.checkpoint as dcp

    model = random_model("6")
    weights = model.state_dict()
    names = {f"model.{name}": x for name, x in weights.items()}  # of a LightningModule
    forms = {
        "flat": weights,
        "trainer": {"model": weights, "optimizer": {"state": {"step": 3, "m": weights}}},
        "Lightning": {"state_dict": names, "optimizer_0": {"state": [torch.ones(2)]}},
    }
    for form, content in forms.items():
        dcp.save(content, checkpoint_id=tmp_path / form, no_dist=True)
    recwarn.clear()
    for form in forms:
        assert_same(load(tmp_path / form), model)
    assert not recwarn.list
    found = read(tmp_path / "Lightning")
    assert found.keys() == {"state_dict", "optimizer_0"}
    assert torch.equal(found["optimizer_0"]["state"]["0"], torch.ones(2))

    folder = tmp_path / "flat"
    metadata, (part,) = folder / ".metadata", folder.glob("*.distcp")
    good = metadata.read_bytes()
    metadata.write_bytes(pickle.dumps(argparse.Namespace(planner_data=None)))
    with pytest.raises(ValueError, match=r"flat is .*Python objects \(argparse.Namespace\)"):
        load(folder)
    metadata.write_bytes(good[:-100])
    with pytest.raises(ValueError, match="flat is no checkpoint, or a damaged one: "):
        load(folder)
    metadata.write_bytes(good)
    for error in (
        MemoryError("no more"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        with (
            mock.patch.object(torch, "load", side_effect=error),
            pytest.raises(type(error)) as raised,
        ):
            load(folder)
        assert raised.value is error
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(ValueError, match="flat is no checkpoint, or a damaged one: "):
        load(folder)


# ---- writing


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_a_kill_at_any_moment_leaves_all_of_the_old_or_of_the_new(
    folder: bool, tmp_path: Path
) -> None:
    target = tmp_path / "target"

    def write(content: str) -> None:
        with written(target, folder=folder) as part:
            for file in (part / "a", part / "b") if folder else (part,):
                file.write_text(content)

    def found() -> set[str]:
        return {x.read_text() for x in ((target / "a", target / "b") if folder else (target,))}

    def kill_at(moment: int) -> int:
        """Has a process write the new one until it is about to open, rename or remove a file."""
        child = os.fork()
        if child == 0:
            moments = itertools.count()

            def hook(event: str, _: object) -> None:
                touches = event == "open" or event.startswith(("os.", "shutil."))
                if touches and next(moments) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            write("new")
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    outcomes = []
    for moment in itertools.count():
        write("old")
        assert [p.name for p in tmp_path.iterdir()] == ["target"]
        code = kill_at(moment)
        put_back(target)
        outcomes.append(found())
        remove_parts(tmp_path)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    news = outcomes.index({"new"})
    assert news >= 4
    assert outcomes == [{"old"}] * news + [{"new"}] * (len(outcomes) - news)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_mode_of_a_file_is_that_of_any_other(suffix: str, tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        path = tmp_path / f"{mode}.{suffix}"
        before = os.umask(mask)
        try:
            save(random_model("4"), path)
        finally:
            os.umask(before)
        found = stat.S_IMODE(path.stat().st_mode)
        assert found == mode, oct(found)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_where_no_file_can_be(suffix: str, tmp_path: Path) -> None:
    model = random_model("4")
    (tmp_path / f"folder.{suffix}").mkdir()
    (tmp_path / "file").write_text("")
    for path, error, message in (
        (tmp_path / "none" / f"a.{suffix}", FileNotFoundError, "no folder .*none to write a file"),
        (tmp_path / "file" / f"a.{suffix}", FileNotFoundError, "no folder .*file to write a file"),
        (tmp_path / f"folder.{suffix}", IsADirectoryError, "a folder, where a file is to be"),
        ("/dev/null", ValueError, "path: expected the name of a file, got the device"),
        ("", ValueError, "path: expected the name of a file, got an empty one"),
        (None, TypeError, "path: expected a path, got NoneType"),
        (tmp_path / f"{'n' * 300}.{suffix}", OSError, "too long"),
    ):
        with pytest.raises(error, match=message):
            save(model, path)  # type: ignore[arg-type]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", f"folder.{suffix}"]
    assert file_to_write(str(tmp_path / "file")) == tmp_path / "file"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_disk_that_is_full(suffix: str, tmp_path: Path) -> None:
    import resource

    path = tmp_path / f"model.{suffix}"
    save(random_model("4"), path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot be written: ") as error:
            save(random_model("6"), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.filename == str(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert set(read(path)) == set(random_model("4").state_dict())
