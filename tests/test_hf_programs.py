"""What others' programs do with the models for transformers: Trainer, peft, pipelines."""

from __future__ import annotations

import pickle

import pytest
import torch
from checkpoints import D, N, V, random_tokens

transformers = pytest.importorskip("transformers")
pytest.importorskip("rwkv", reason="the World vocabulary comes from it")

import peft  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from torch_rwkv6.hf import RWKV6Config, RWKV6ForCausalLM, RWKV6Tokenizer  # noqa: E402
from torch_rwkv6.models import load, load_tokenizer  # noqa: E402

# scripts without spaces, joined emoji, combining marks, controls, private use, the last code point
HARD = [
    "",
    "In the beginning",
    "世界、नमस्ते ไทย ﷺ",
    "e\u0301 👩‍👩‍👧‍👦 🤗\u200d\ufe0f",
    " \x00\x7f\u2028\ufeff\r\n\t  x  ",
    "\ue000\U00012345\U0010ffff\ufffd",
    "é" * 50,
]


def small(**settings) -> RWKV6ForCausalLM:
    sizes = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "head_size": N}
    torch.manual_seed(0)
    return RWKV6ForCausalLM(RWKV6Config(**{**sizes, "lora_mix": 4, "lora_decay": 4, **settings}))


def test_the_trainer_trains_and_goes_on(tmp_path):
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in random_tokens(4, 12)]

    def run(model, **settings):
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            per_device_train_batch_size=2,
            logging_steps=1,
            save_steps=4,
            gradient_checkpointing=True,
            **settings,
        )
        return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)

    trainer = run(small(), max_steps=8)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    assert trainer.evaluate()["eval_loss"] < losses[0] - 0.5
    assert trainer.predict(rows).predictions.shape == (4, 12, V)  # logits alone: no states
    resumed = run(small(), max_steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    expected = trainer.model.state_dict()
    for name, x in resumed.model.state_dict().items():
        torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=1e-5)


def test_peft_adapts_it_and_load_merges_the_adapter(tmp_path):
    model = small()
    model.save_pretrained(tmp_path / "model")
    tokens = random_tokens(2, 6)
    before = model(tokens).logits.detach()
    names = ["receptance", "key", "value", "output", "gate"]
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    )
    tuned(tokens, labels=tokens).loss.backward()
    moved = [n for n, p in tuned.named_parameters() if p.grad is not None]
    assert moved
    assert all("lora_" in name for name in moved)
    tuned.eval().save_pretrained(tmp_path / "lora")
    after = tuned(tokens).logits
    assert (after - before).abs().max() > 1e-3
    merged = load(tmp_path / "model", lora=tmp_path / "lora")
    torch.testing.assert_close(merged(tokens)[0], after, rtol=1e-4, atol=1e-4)
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "lora"
    )
    torch.testing.assert_close(again(tokens).logits, after, rtol=1e-4, atol=1e-4)
    written = again.generate(input_ids=tokens, max_new_tokens=3, do_sample=False)
    assert written.shape == (2, 9)


def test_prompt_tuning_is_a_longer_prompt():
    model = small().eval()
    tokens = random_tokens(2, 4)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(model, config).eval()
    found = tuned(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    prompt = tuned.get_prompt(2)
    whole = torch.cat((prompt, model.emb(tokens)), 1)
    torch.testing.assert_close(found[:, -4:], model(inputs_embeds=whole).logits[:, -4:])
    found.sum().backward()
    assert next(tuned.prompt_encoder.parameters()).grad.abs().max() > 0
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    written = tuned.generate(input_ids=tokens, use_cache=False, **options)
    assert torch.equal(written[:, 4:], model.generate(inputs_embeds=whole, **options))
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(TypeError, match="past_key_values: expected a cache for linear attention"):
        peft.get_peft_model(small(), config)(input_ids=tokens)


@pytest.fixture(scope="module")
def tokenizer() -> RWKV6Tokenizer:
    return RWKV6Tokenizer()


def test_texts_come_back_as_they_were(tokenizer, tmp_path):
    world = load_tokenizer("world")
    tokenizer.save_pretrained(tmp_path)
    for same in (tokenizer, RWKV6Tokenizer.from_pretrained(tmp_path), _pickled(tokenizer)):
        for text in HARD:
            assert same.encode(text) == world.encode(text)
            assert same.decode(same.encode(text)) == text
    ids = tokenizer.encode("a<|endoftext|>b")
    assert ids == [98, 0, 99]
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"
    assert tokenizer.decode([229 + 1]) == "\ufffd"  # half a character
    assert tokenizer.decode([65535]) == ""
    batch = tokenizer(["a", "In the beginning"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert len(tokenizer) == tokenizer.vocab_size == 65530


def _pickled(tokenizer):
    return pickle.loads(pickle.dumps(tokenizer))


def test_a_pipeline_writes_what_generate_does(tokenizer, tmp_path):
    model = small(vocab_size=65536, num_hidden_layers=1).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is RWKV6Tokenizer
    write = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    options = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    texts = ["In the beginning", "a"]
    found = [row[0]["generated_text"] for row in write(texts, batch_size=2, **options)]
    for text, written in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer.encode(text)])
        expected = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        assert written == tokenizer.decode(expected, skip_special_tokens=True)
