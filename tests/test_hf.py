"""The models for transformers: they compute what `torch_rwkv6.nn.RWKV6` does, in its own loops."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
from checkpoints import D, L, N, V, fla, hugging_face, random_model, random_tokens
from test_gradient_checkpointing import Counted

transformers = pytest.importorskip("transformers")

from transformers import AutoModel, AutoModelForCausalLM, DynamicCache  # noqa: E402

import torch_rwkv6.hf  # noqa: E402
from torch_rwkv6.hf import RWKV6Config, RWKV6ForCausalLM, RWKV6Model  # noqa: E402
from torch_rwkv6.hf.cache import read_states  # noqa: E402
from torch_rwkv6.models import generate, load, save  # noqa: E402
from torch_rwkv6.nn import RWKV6, quantize_int8_  # noqa: E402

SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": L,
    "head_size": N,
    "lora_mix": 4,
    "lora_decay": 6,
    "pad_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture(scope="module")
def ours() -> RWKV6:
    return random_model("6")


def wrapped(ours: RWKV6, **settings) -> RWKV6ForCausalLM:
    model = RWKV6ForCausalLM(RWKV6Config(**{**SIZES, **settings}))
    model.load_state_dict(ours.state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def model(ours) -> RWKV6ForCausalLM:
    return wrapped(ours)


def padded(rows, side: str, total: int):
    """The rows as a batch, with noise as padding, and its mask."""
    tokens, mask = random_tokens(len(rows), total), torch.zeros(len(rows), total, dtype=torch.int64)
    for i, row in enumerate(rows):
        n = len(row)
        place = {"left": slice(total - n, total), "right": slice(n)}[side]
        tokens[i, place], mask[i, place] = row, 1
    return tokens, mask


def close(found, expected, tolerance=2e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_logits_features_and_states_are_ours(ours, model):
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        expected, state = ours(tokens)
        found = model(tokens, output_hidden_states=True)
        close(found.logits, expected)
        close(found.hidden_states[-1], ours.features(tokens)[0])
        assert len(found.hidden_states) == L + 1
        assert torch.equal(model.base_model(tokens)[0], found.hidden_states[-1])
        first = model(tokens[:, :4])
        for i in range(4, 9):  # one by one, from the same cache
            step = model(tokens[:, i : i + 1], past_key_values=first.past_key_values)
            close(step.logits[:, 0], expected[:, i])
        for i, wkv in enumerate(state.wkv):
            close(read_states(first.past_key_values, i)[1], wkv)
        close(model(inputs_embeds=ours.emb(tokens), logits_to_keep=2).logits, expected[:, -2:])
        assert model(tokens, use_cache=False).past_key_values is None
        assert len(model(tokens, return_dict=False)) == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(ours, model, side):
    rows = [random_tokens(1, n)[0] for n in (3, 7, 5)]
    tokens, mask = padded(rows, side, 8)
    found = model(tokens, attention_mask=mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0) * mask  # 0 for padding too, as many count them
    assert torch.equal(
        model(tokens, attention_mask=mask, position_ids=positions).logits, found.logits
    )
    then = random_tokens(3, 4)
    mask_then = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    going_on = model(
        then,
        attention_mask=torch.cat((mask, mask_then), 1),
        past_key_values=found.past_key_values,
    )
    for i, row in enumerate(rows):
        expected, state = ours(row[None])
        close(found.logits[i][mask[i].bool()], expected[0])
        close(found.logits[i, -1], expected[0, -1])  # what generate goes on from
        rest = then[i][mask_then[i].bool()]
        expected, state = ours(rest[None], state)
        close(going_on.logits[i][mask_then[i].bool()], expected[0])
        for layer, wkv in enumerate(state.wkv):
            close(read_states(going_on.past_key_values, layer)[1][i], wkv[0])


def test_padding_changes_no_gradient(model):
    rows = [random_tokens(1, n)[0] for n in (3, 7)]
    tokens, mask = padded(rows, "left", 8)
    labels = tokens.masked_fill(mask.cumsum(1) < 2, -100)  # nothing tells the first token
    found = gradients(model, model(tokens, attention_mask=mask, labels=labels).loss)
    # the mean is over 2 and 6 predictions
    alone = [model(row[None], labels=row[None]).loss * (len(row) - 1) / 8 for row in rows]
    expected = gradients(model, sum(alone))
    for name, gradient in expected.items():
        close(found[name], gradient, 1e-4)


def test_texts_packed_into_rows_do_not_see_each_other(ours, model):
    tokens = random_tokens(2, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [3, 4, 0, 0, 1, 0, 1, 2]])
    texts = [
        tokens[0, :3],
        tokens[0, 3:],
        *(tokens[1, a:b] for a, b in ((0, 2), (2, 3), (3, 5), (5, 8))),
    ]
    found = model(tokens, position_ids=positions)
    alone = [ours(text[None]) for text in texts]
    expected = torch.cat([logits for logits, _ in alone], 1).view(2, 8, V)
    close(found.logits, expected)
    for layer in range(L):
        wkv = read_states(found.past_key_values, layer)[1]
        close(wkv, torch.cat([alone[1][1].wkv[layer], alone[5][1].wkv[layer]]))
    gradient = gradients(model, found.logits.square().mean())
    ours.zero_grad()
    expected.square().mean().backward()
    for name, p in ours.named_parameters():
        close(gradient[name], p.grad, 1e-4)
    ours.zero_grad()
    close(model(tokens, position_ids=torch.arange(8)[None]).logits, ours(tokens)[0])


def test_generate_writes_what_ours_does(ours, model):
    rows = [random_tokens(1, n)[0] for n in (3, 7)]
    expected = list(zip(*generate(ours, rows, 6, temperature=0), strict=True))
    for side in ("left", "right"):
        tokens, mask = padded(rows, side, 7)
        found = model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False)
        assert [tuple(row) for row in found[:, 7:].tolist()] == expected
    tokens, mask = padded(rows, "left", 7)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    beams = model.generate(tokens, attention_mask=mask, **options)
    alone = [model.generate(row[None], **options)[0, len(row) :] for row in rows]
    assert beams[:, 7:].tolist() == [row.tolist() for row in alone]
    with torch.no_grad():  # the best of three is no worse than the greedy one

        def likelihood(row, text):
            whole = torch.cat((row, torch.as_tensor(text)))
            logits = ours(whole[None])[0].log_softmax(2)
            return logits[0, len(row) - 1 : -1].gather(1, whole[len(row) :, None]).sum()

        for row, text, greedy in zip(rows, alone, expected, strict=True):
            assert likelihood(row, text) >= likelihood(row, greedy) - 1e-4
    uncached = model.generate(rows[0][None], use_cache=False, max_new_tokens=6, do_sample=False)
    assert tuple(uncached[0, 3:].tolist()) == expected[0]
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(model.generate(rows[1][None], do_sample=True, max_new_tokens=6).tolist())
    assert draws[0] == draws[1]
    assert max(draws[0][0]) < V


def test_gradients_flow_through_cache_and_checkpoints(ours):
    model = wrapped(ours).train()
    tokens = random_tokens(2, 8)
    loss = model(tokens, labels=tokens, use_cache=False).loss
    close(loss, torch.nn.functional.cross_entropy(ours(tokens)[0][:, :-1].mT, tokens[:, 1:]))
    expected = gradients(model, loss)
    first = model(tokens[:, :3], use_cache=True)
    second = model(tokens[:, 3:], past_key_values=first.past_key_values)
    logits = torch.cat((first.logits, second.logits), 1)
    pieces = gradients(model, torch.nn.functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:]))
    model.gradient_checkpointing_enable()
    runs = []
    hook = model.blocks[1].register_forward_pre_hook(lambda *_: runs.append(1))
    loss = model(tokens, labels=tokens).loss
    with Counted() as backward:
        recomputed = gradients(model, loss)
    hook.remove()
    assert len(runs) == 2  # once more in the backward pass, but not WKV
    assert "sigmoid" in backward.calls
    assert not {"wkv", "wkv_checkpointed"} & backward.calls.keys()
    for name, gradient in expected.items():
        close(pieces[name], gradient, 1e-4)
        close(recomputed[name], gradient, 1e-4)


def test_our_folders_whole_and_in_shards(ours, model, tmp_path):
    tokens = random_tokens(1, 5)
    for folder, size in ((tmp_path / "whole", "1GB"), (tmp_path / "shards", "20KB")):
        model.save_pretrained(folder, max_shard_size=size)
        found = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
        assert type(found) is RWKV6ForCausalLM
        for name, x in ours.state_dict().items():
            assert torch.equal(found.state_dict()[name], x), name
        close(load(folder)(tokens)[0], model(tokens).logits)  # the official names
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    base = AutoModel.from_pretrained(tmp_path / "shards", dtype=torch.bfloat16)
    assert type(base) is RWKV6Model
    assert base.dtype == torch.bfloat16
    assert read_states(base(tokens).past_key_values, 0)[1].dtype == torch.float32


FOREIGN = {
    # as the config.json of RWKV/v6-Finch-1B6-HF and fla-hub/rwkv6-1.6B-finch have them
    "RWKV": (
        hugging_face,
        {
            "attention_hidden_size": D,
            "auto_map": {"AutoConfig": "configuration_rwkv6.Rwkv6Config"},
            "head_size": N,
            "num_attention_heads": 64,
            "rescale_every": 6,
        },
    ),
    "fla": (fla, {"num_heads": D // N, "norm_eps": 1e-5, "proj_low_rank_dim": 4}),
}


@pytest.mark.parametrize("naming", FOREIGN)
def test_folders_of_other_namings(ours, tmp_path, naming):
    rename, settings = FOREIGN[naming]
    settings |= {"model_type": "rwkv6", "vocab_size": V, "hidden_size": D, "num_hidden_layers": L}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7}))
    weights = rename(ours.state_dict())
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}  # fmt: skip # noqa: E501
    from safetensors.torch import save_file

    for file, some in parts.items():
        save_file({name: weights[name].clone().contiguous() for name in some}, tmp_path / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = random_tokens(2, 6)
    close(found(tokens).logits, ours(tokens)[0])
    assert found.generation_config.max_new_tokens == 7
    assert found.name_or_path == str(tmp_path)
    found.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert found.config.num_attention_heads == D // N
    close(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(tokens).logits, ours(tokens)[0])


KEYS = {  # what the code that reads each naming has no right default for
    "RWKV": {"attention_hidden_size": D, "head_size": N, "head_size_divisor": 8},
    "fla-hub": {
        "expand_k": 1.0,
        "gate_low_rank_dim": 6,
        "norm_eps": 64e-5,
        "num_heads": D // N,
        "proj_low_rank_dim": 4,
    },
}


@pytest.mark.parametrize("naming", KEYS)
def test_folders_are_written_in_other_namings(ours, model, tmp_path, naming):
    from safetensors.torch import load_file

    model.save_pretrained(tmp_path, naming=naming, max_shard_size="20KB")
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        found |= load_file(file)
    expected = (hugging_face if naming == "RWKV" else fla)(ours.state_dict())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    settings = json.loads((tmp_path / "config.json").read_text())
    shared = {"model_type": "rwkv6", "vocab_size": V, "hidden_size": D, "num_hidden_layers": L}
    shared |= {"intermediate_size": 96, "bos_token_id": 0, "tie_word_embeddings": False}
    for name, value in (shared | KEYS[naming]).items():
        assert settings[name] == value, name
    assert not {"lora_mix", "ln_x_eps", "train_state"} & settings.keys()
    tokens = random_tokens(2, 6)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_what_other_namings_lack(ours, tmp_path):
    tied = RWKV6ForCausalLM(RWKV6Config(**SIZES, tie_word_embeddings=True))
    tied.save_pretrained(tmp_path, naming="fla-hub")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.emb.weight, tied.emb.weight)
    assert again.head.weight is again.emb.weight
    for naming, settings, message in (
        ("fla", {}, "naming: expected RWKV or fla-hub, got fla"),
        ("RWKV", {"train_state": True}, "naming: RWKV has no name for tuned states"),
        ("fla-hub", {"ln_x_eps": 1e-5}, "naming: fla-hub has ln_x_eps 64e-5, the model 1e-05"),
    ):
        with pytest.raises(ValueError, match=message):
            RWKV6Model(RWKV6Config(**SIZES, **settings)).save_pretrained(tmp_path, naming=naming)


def test_int8_is_not_saved(ours, tmp_path):
    model = quantize_int8_(wrapped(ours))
    with pytest.raises(TypeError, match="model: expected floating-point matrices, got int8"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_single_files_and_wrong_versions(ours, tmp_path):
    save(ours, tmp_path / "finch.pth")
    found = RWKV6ForCausalLM.from_pretrained(tmp_path / "finch.pth")
    tokens = random_tokens(1, 4)
    close(found(tokens).logits, ours(tokens)[0])
    save(random_model("5.2"), tmp_path / "eagle.pth")
    with pytest.raises(ValueError, match=r"expected RWKV-6, got RWKV-5\.2"):
        RWKV6ForCausalLM.from_pretrained(tmp_path / "eagle.pth")


def test_initial_values_are_the_official_ones(tmp_path):
    torch.manual_seed(0)
    base = RWKV6Model(RWKV6Config(**SIZES))
    torch.manual_seed(0)
    expected = RWKV6(V, L, D, N, lora_mix=4, lora_decay=6).state_dict()
    for name, x in base.state_dict().items():
        assert torch.equal(x, expected[name]), name
    base.save_pretrained(tmp_path)
    # What the folder does not have, and nothing else, is initialised when it is loaded.
    full = RWKV6ForCausalLM.from_pretrained(tmp_path, train_state=True)
    for name, x in base.state_dict().items():
        assert torch.equal(full.state_dict()[name], x), name
    assert full.blocks[0].att.time_state.abs().max() == 0
    products = full.head.weight.T @ full.head.weight  # orthogonal columns, of the official gain
    close(products, 0.25 * V / D * torch.eye(D), 1e-4)


def test_tied_and_resized_embeddings(ours, tmp_path):
    tied = RWKV6ForCausalLM(RWKV6Config(**SIZES, tie_word_embeddings=True))
    assert tied.head.weight is tied.emb.weight
    tied.save_pretrained(tmp_path / "tied")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert again.head.weight is again.emb.weight
    assert torch.equal(again.emb.weight, tied.emb.weight)
    model = wrapped(ours)
    model.resize_token_embeddings(V + 9)
    tokens = random_tokens(1, 5)
    logits = model(tokens).logits
    assert logits.shape[2] == V + 9
    close(logits[..., :V], ours(tokens)[0])
    model.save_pretrained(tmp_path / "longer")
    close(AutoModelForCausalLM.from_pretrained(tmp_path / "longer")(tokens).logits, logits)


def test_it_compiles_as_one_graph():
    torch.compiler.reset()
    model = RWKV6ForCausalLM(RWKV6Config(**{**SIZES, "num_hidden_layers": 1})).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    tokens, mask = padded([random_tokens(1, n)[0] for n in (3, 6)], "left", 6)
    with torch.no_grad():
        found, expected = [], []
        for f, results in ((compiled, found), (model, expected)):
            cache = DynamicCache(config=model.config)
            model(tokens, attention_mask=mask, past_key_values=cache)
            results.append(f(tokens, attention_mask=mask, past_key_values=cache).logits)
            results += read_states(cache, 0)
    for x, y in zip(found, expected, strict=True):
        close(x, y)
    options = {"position_ids": torch.tensor([[0, 1, 0, 1, 2, 3]]), "attention_mask": mask**0}
    broken = torch.compile(model, backend="eager")  # where texts begin is no part of a graph
    close(broken(tokens, **options).logits, model(tokens, **options).logits)


def test_what_is_refused(model):
    tokens = random_tokens(1, 4)
    with pytest.raises(ValueError, match="input_ids: expected either these or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"attention_mask: expected \[B, S\] with B = 1, got \(2"):
        model(tokens, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="attention_mask: expected a column for each of 4 tokens"):
        model(tokens, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"position_ids: expected \[B, T\] with T = 4, got \(1, 3"):
        model(tokens, position_ids=torch.zeros(1, 3))
    positions = torch.tensor([[0, 1, 0, 1]])
    with pytest.raises(ValueError, match="position_ids: expected one text in each row that has pa"):
        model(tokens, position_ids=positions, attention_mask=torch.tensor([[1, 1, 1, 0]]))
    cache = model(tokens).past_key_values
    with pytest.raises(ValueError, match="position_ids: expected one text in each row beside past"):
        model(tokens, position_ids=positions, past_key_values=cache)
    with pytest.raises(TypeError, match="past_key_values: expected a cache for linear attention"):
        model(tokens, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        model.generate(tokens, assistant_model=model, max_new_tokens=2)


def test_without_a_transformers_that_fits(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["transformers"], "__version__", "4.57.0")
        with pytest.raises(ImportError, match=r"needs transformers 5\.6 or newer, below 6, got 4"):
            importlib.reload(torch_rwkv6.hf)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install torch_rwkv6\[hf\]"):
        importlib.reload(torch_rwkv6.hf)
