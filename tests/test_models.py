"""Checkpoints of every version in and out, and the one interface that all models share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import VERSIONS, D, L, N, V, fla, hugging_face, random_model, random_tokens
from safetensors.torch import load_file
from torch import Tensor

from torch_rwkv6.models import load, save
from torch_rwkv6.nn import RWKV, RWKVState

ALL = list(VERSIONS)


def assert_states_close(a: RWKVState, b: RWKVState, **tolerance: float) -> None:
    for name, x, y in zip(RWKVState._fields, a, b, strict=True):
        torch.testing.assert_close(x, y, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def assert_same_weights(a: RWKV, b: RWKV) -> None:
    expected = b.state_dict()
    assert list(a.state_dict()) == list(expected)
    for name, x in a.state_dict().items():
        assert x.dtype == expected[name].dtype, name
        assert torch.equal(x, expected[name]), name


# ---- in and out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("version", ALL)
def test_saved_and_loaded_byte_for_byte(
    version: str, suffix: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = random_model(version, dtype)
    path = tmp_path / f"model.{suffix}"
    save(model, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    again = load(path)
    assert again.version == version
    assert_same_weights(again, model)
    assert all(p.requires_grad for p in again.parameters())
    save(again.state_dict(), tmp_path / f"again.{suffix}")
    assert_same_weights(load(str(tmp_path / f"again.{suffix}")), model)


def test_official_names_of_rwkv_4_and_5() -> None:
    att = {"key.weight", "value.weight", "receptance.weight", "output.weight", "time_decay"}
    norm = {"ln_x.weight", "ln_x.bias"}
    expected = {
        "4": att | {"time_first", "time_mix_k", "time_mix_v", "time_mix_r"},
        "5.0": att | norm | {"time_first", "time_mix_k", "time_mix_v", "time_mix_r"},
    }
    expected["5.1"] = expected["5.0"] | {"gate.weight", "time_mix_g"}
    expected["5.2"] = expected["5.1"] - {"time_first"} | {"time_faaaa"}
    ffn = {"key.weight", "value.weight", "receptance.weight", "time_mix_k", "time_mix_r"}
    for version, names in expected.items():
        weights = random_model(version).state_dict()
        one = {n.split(".", 2)[2] for n in weights if n.startswith("blocks.1.")}
        norms = {f"ln{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
        assert one == norms | {f"att.{n}" for n in names} | {f"ffn.{n}" for n in ffn}
        shape = {"4": (D,), "5.0": (D // N,), "5.1": (D // N,), "5.2": (D // N, N)}[version]
        assert weights["blocks.0.att.time_decay"].shape == shape
        assert weights["blocks.0.att.time_mix_k"].shape == (1, 1, D)


@pytest.mark.parametrize("version", ALL)
def test_hugging_face_names(version: str) -> None:
    model = random_model(version)
    renamed = hugging_face(model.state_dict())
    assert not set(renamed) & set(model.state_dict()) - {"head.weight"}
    assert_same_weights(load(renamed), model)


def test_fla_names() -> None:
    model = random_model("6")
    weights = fla(model.state_dict())
    assert "model.layers.0.attn.x_bias" in weights
    found = load(weights)
    assert_same_weights(found, model)
    assert found.blocks[0].att.ln_x.eps == 64e-5  # not the 1e-5 of its configuration


def test_a_hugging_face_folder_in_several_files(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = random_model("6")
    weights = list(hugging_face(model.state_dict()).items())
    safetensors.save_file(dict(weights[:40]), tmp_path / "model-1-of-2.safetensors")
    safetensors.save_file(dict(weights[40:]), tmp_path / "model-2-of-2.safetensors")
    assert_same_weights(load(tmp_path), model)
    index = '{"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert_same_weights(load(tmp_path), model)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="no index of checkpoint files"):
        load(tmp_path)


def test_dimensions_of_size_one_may_be_left_out() -> None:
    for version in ALL:
        model = random_model(version)
        assert_same_weights(load({n: x.squeeze() for n, x in model.state_dict().items()}), model)


def test_dtype_and_a_copy_of_the_tensors() -> None:
    model = random_model("5.2")
    half = load(model.state_dict(), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    again = load(model.state_dict())
    assert again.emb.weight.data_ptr() != model.emb.weight.data_ptr()


def test_a_file_of_the_format_before_torch_1_6(tmp_path: Path) -> None:
    model = random_model("4")
    torch.save(model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same_weights(load(tmp_path / "old.pth"), model)


# ---- what is refused


@pytest.mark.parametrize(
    ("names", "version"),
    [
        (["att.r_k", "att.w0", "att.x_r"], "RWKV-7"),
        (["att.time_maa_w1", "att.gate_w1"], "x060a"),
        (["att.time_maa_rkvw_w1", "att.time_maa_x"], "x060b or x060c"),
    ],
)
@pytest.mark.parametrize("rename", [dict, hugging_face], ids=["official", "Hugging Face"])
def test_versions_that_we_do_not_have_are_named(
    names: list[str], version: str, rename: object
) -> None:
    weights = {f"blocks.0.{name}": torch.zeros(4, 4) for name in names}
    weights["emb.weight"] = torch.zeros(V, 4)
    with pytest.raises(ValueError, match=f"expected RWKV-4, RWKV-5 or RWKV-6.*got .*{version}"):
        load(rename(weights))  # type: ignore[operator]


@pytest.mark.parametrize("version", ALL)
def test_all_that_does_not_fit_is_listed(version: str) -> None:
    weights = random_model(version).state_dict()
    del weights["ln_out.bias"], weights["blocks.1.ffn.value.weight"]
    weights["blocks.2.att.output.weight"] = torch.zeros(D, 2)
    weights["blocks.0.att.extra"] = torch.zeros(2)
    with pytest.raises(ValueError) as error:
        load(weights)
    lines = str(error.value).splitlines()
    assert lines[0] == f"state_dict: 4 tensors do not fit RWKV-{version}:"
    assert {line.strip().split(" (")[0] for line in lines[1:]} == {
        "missing ln_out.bias",
        "missing blocks.1.ffn.value.weight",
        "blocks.2.att.output.weight expected",
        "unexpected blocks.0.att.extra",
    }


def test_a_missing_layer_is_missing() -> None:
    weights = random_model("6").state_dict()
    weights = {n: x for n, x in weights.items() if not n.startswith("blocks.1.")}
    with pytest.raises(ValueError, match="expected layers 0 to 2, got nothing of layer 1"):
        load(weights)
    weights["blocks.1000000000000.ln1.weight"] = torch.zeros(1)  # not so many are made
    with pytest.raises(ValueError, match="got nothing of layer 1"):
        load(weights)


def test_a_long_list_of_what_is_missing_is_cut_short() -> None:
    weights = random_model("6").state_dict()
    kept = ("blocks.1.ln1.weight", "blocks.2.ln1.weight")
    weights = {
        n: x for n, x in weights.items() if n[:8] not in ("blocks.1", "blocks.2") or n in kept
    }
    with pytest.raises(ValueError, match="54 tensors do not fit") as caught:
        load(weights)
    assert str(caught.value).count("missing blocks.") == 20
    assert str(caught.value).endswith("and 34 more")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"model.{suffix}"
    save(random_model("6"), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"is no checkpoint, or a truncated one"):
        load(path)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match=r"no .*safetensors.* in the folder"):
        load(tmp_path)
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no tensors by name, but list"):
        load(tmp_path / "list.pth")
    with pytest.raises(TypeError, match="source: expected a path"):
        load(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got torch.int8 as head.weight"):
        load({"head.weight": torch.zeros(2, dtype=torch.int8)})
    with pytest.raises(ValueError, match=r"ln_x_eps: not for RWKV-4"):
        load(random_model("4").state_dict(), ln_x_eps=1e-5)


def test_a_failed_save_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    save(random_model("4"), path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="model: expected floating-point tensors, got str as emb"):
        save({"emb.weight": "no tensor"}, path)  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="expected a model or a state_dict"):
        save([1], path)  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


# ---- one interface


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 6], [0, 11, 1]], ids=str)
@pytest.mark.parametrize("version", ALL)
def test_any_split_and_in_place(version: str, pieces: list[int]) -> None:
    model, tokens = random_model(version), random_tokens(3, 12)
    with torch.no_grad():
        whole, last = model(tokens)
        state, logits = None, []
        own = model.initial_state(3)
        for piece in tokens.split(pieces, 1):
            out, state = model(piece, state)
            logits.append(out)
            if piece.shape[1]:
                torch.testing.assert_close(model.forward_(piece, own), out[:, -1])
        alone, _ = model(tokens[1:2])
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-4)
    assert_states_close(state, last, rtol=1e-4, atol=1e-4)
    assert_states_close(own, last, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone, whole[1:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", ALL)
def test_the_initial_state_is_what_none_stands_for(version: str) -> None:
    model, tokens = random_model(version), random_tokens(2, 5)
    logits, state = model(tokens)
    same, same_state = model(tokens, model.initial_state(2))
    torch.testing.assert_close(same, logits)
    assert_states_close(same_state, state)
    assert state.wkv.shape == (L, 2, *model.state_shape)


@pytest.mark.parametrize("version", ALL)
def test_state_rows_and_files(version: str, tmp_path: Path) -> None:
    model, tokens = random_model(version), random_tokens(3, 6)
    with torch.no_grad():
        _, state = model(tokens)
        _, expected = model(tokens[[2, 0]])
    assert_states_close(state.select([2, 0]), expected, rtol=1e-5, atol=1e-5)
    assert_states_close(RWKVState.cat([state.select([i]) for i in range(3)]), state)
    for name in ("state.pt", "state.safetensors"):
        state.select([2, 0]).save(tmp_path / name)
        state.save(tmp_path / name)
        found = RWKVState.load(tmp_path / name)
        assert_states_close(found, state, rtol=0, atol=0)
        content = (tmp_path / name).read_bytes()
        model.forward_(random_tokens(3, 1), found)  # in place, which leaves the file alone
        assert (tmp_path / name).read_bytes() == content
    assert set(load_file(tmp_path / "state.safetensors")) == set(RWKVState._fields)
    assert set(torch.load(tmp_path / "state.pt")) == set(RWKVState._fields)
    assert len(list(tmp_path.iterdir())) == 2
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no saved RWKVState: expected the keys"):
        RWKVState.load(tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(ValueError, match="no saved RWKVState"):
        RWKVState.load(tmp_path / "text.pt")


@pytest.mark.parametrize("version", ALL)
def test_bfloat16_models_keep_a_float32_state(version: str) -> None:
    tokens = random_tokens(2, 8)
    model, half = random_model(version), random_model(version, torch.bfloat16)
    with torch.no_grad():
        logits, _ = model(tokens)
        state = half.initial_state(2)
        found = torch.stack([half.forward_(token, state) for token in tokens.split(1, 1)], 1)
    assert state.wkv.dtype == torch.float32
    assert state.att_shift.dtype == found.dtype == torch.bfloat16
    error = (found.float() - logits).square().mean() / logits.square().mean()
    assert error.sqrt() < 0.05


@pytest.mark.parametrize("version", ALL)
def test_gradients_of_all_parameters_through_carried_states(version: str) -> None:
    model, tokens = random_model(version).double(), random_tokens(2, 9)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def gradients(pieces: list[int]) -> tuple[Tensor, ...]:
        state, total = None, torch.zeros((), dtype=torch.float64)
        for piece in tokens.split(pieces, 1):
            logits, state = model(piece, state)
            total = total + logits.square().sum()
        return torch.autograd.grad(total, parameters)

    for name, found, expected in zip(names, gradients([4, 1, 4]), gradients([9]), strict=True):
        assert expected.any(), name
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8, msg=name)


def test_rwkv_5_decays_all_tokens_from_one_row_of_memory() -> None:
    for version in ("5.0", "5.2"):
        att = random_model(version).blocks[0].att
        w = att._inputs(torch.randn(2, 7, D), None)[3]
        assert w.shape == (2, 7, D // N, N)
        assert w.stride() == (0, 0, N, 1)


def test_compiles_as_one_graph() -> None:
    for version in ("4", "5.2"):
        torch._dynamo.reset()
        model, tokens = random_model(version, n_layer=2), random_tokens(2, 6)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        expected, state = model(tokens)
        found, compiled_state = compiled(tokens)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert_states_close(compiled_state, state, rtol=1e-4, atol=1e-4)


def test_vmap_over_a_model_that_decodes() -> None:
    model, tokens = random_model("6"), random_tokens(3, 1)
    with torch.no_grad():
        found = torch.vmap(lambda t: model(t[None])[0][0])(tokens)
        torch.testing.assert_close(found, model(tokens)[0])


def test_in_place_calls_that_do_not_fit() -> None:
    model, tokens = random_model("6"), random_tokens(2, 3)
    with pytest.raises(TypeError, match="state: expected an RWKVState to update"):
        model.forward_(tokens, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one token"):
        model.forward_(tokens[:, :0], model.initial_state(2))
    with pytest.raises(ValueError, match=r"state.att_shift: expected \[L, B, D\]"):
        model.forward_(tokens, model.initial_state(1))
    with pytest.raises(ValueError, match=r"state.wkv: expected \[L, B, 3, D\] = \(3, 2, 3, 32\)"):
        random_model("4").forward_(tokens, model.initial_state(2))
