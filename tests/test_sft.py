"""What sft.py promises: the loss is the response's alone, EOS included; batches cost little padding; it learns."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import sft
from lora import add_lora, load_lora, merge_lora
from model import Llama, LlamaConfig, generate
from reward import TrainingConfig, length_batches, warmup_cosine
from sft import collate, response_loss, train_sft, validation_loss

EOS = 2
PAIRS = [([1, 5, 6], [7, 8, EOS]), ([1, 9], [10, EOS]), ([1, 11, 12, 13], [14, 15, 16, 17, EOS])]


def tiny_llama(seed: int = 0, vocab_size: int = 40) -> Llama:
    torch.manual_seed(seed)
    return Llama(LlamaConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64))


def naive_loss(model: Llama, pairs) -> tuple[torch.Tensor, int]:
    """One sequence and one response token at a time, from full logits."""
    total, n = torch.zeros(()), 0
    for prompt, response in pairs:
        logits = model(torch.tensor([prompt + response]))[0]
        for t, token in enumerate(response):
            total = total + F.cross_entropy(logits[len(prompt) + t - 1][None], torch.tensor([token]))
            n += 1
    return total, n


def test_collate_marks_the_positions_that_predict_response_and_eos():
    ids, predicts = collate(PAIRS[:2], pad_token_id=EOS)
    assert ids.tolist() == [[1, 5, 6, 7, 8, EOS], [1, 9, 10, EOS, EOS, EOS]]
    assert predicts.int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]


@pytest.mark.parametrize("pad_token_id", [0, EOS, 33])
def test_the_loss_is_that_of_the_response_tokens_alone_whatever_stands_in_padding(pad_token_id):
    model = tiny_llama()
    expected, n = naive_loss(model, PAIRS)
    loss, counted = response_loss(model, PAIRS, pad_token_id)
    assert counted == n == 10
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    assert validation_loss(model, PAIRS, pad_token_id, batch_size=2) == pytest.approx(expected.item() / 10, abs=1e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_micro_batches_give_the_gradient_of_the_full_batch(micro_batch_size):
    model = tiny_llama()
    total, n = naive_loss(model, PAIRS)
    expected = torch.autograd.grad(total / n, list(model.parameters()))
    micro_batches = [PAIRS[i:i + micro_batch_size] for i in range(0, len(PAIRS), micro_batch_size)]
    assert sft._accumulate(model, micro_batches, n, pad_token_id=0) == pytest.approx(total.item() / n, abs=1e-5)
    for parameter, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def test_batches_hold_every_index_once_and_similar_lengths_in_seeded_random_order():
    lengths = torch.randint(1, 100, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = length_batches(lengths, 8, torch.Generator().manual_seed(1))
    assert sorted(i for batch in batches for i in batch) == list(range(1000)) and len(batches) == 125
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)  # batches drawn blindly: about 1.8
    first = [max(lengths[i] for i in batch) for batch in batches]
    assert first != sorted(first)
    assert batches == length_batches(lengths, 8, torch.Generator().manual_seed(1))
    assert batches != length_batches(lengths, 8, torch.Generator().manual_seed(2))


def test_the_learning_rate_rises_in_a_line_and_falls_as_half_a_cosine():
    factors = [warmup_cosine(step, total=14, warmup=4) for step in range(15)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[9] == pytest.approx(0.5) and factors[14] == pytest.approx(0)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_three_examples_are_learned_by_heart_and_end_with_eos():
    model = tiny_llama()
    history = train_sft(model, PAIRS, TrainingConfig(60, 3, 1e-2), validation=PAIRS, progress=False)
    assert history[0]["loss"] > 3 and history[-1]["loss"] < 0.05
    assert history[-1]["validation_loss"] < 0.05 and history[-1]["tokens_per_second"] > 0
    for prompt, response in PAIRS:
        ids = torch.tensor([prompt])
        answer = generate(model, ids, torch.ones_like(ids), max_new_tokens=8, temperature=0, eos_token_id=EOS,
                          pad_token_id=0)
        assert answer[0, :len(response)].tolist() == response


def test_training_is_repeatable_and_another_seed_is_another_run():
    def weights(seed: int) -> torch.Tensor:
        model = tiny_llama()
        train_sft(model, PAIRS, TrainingConfig(2, 1, 1e-3, seed=seed), progress=False)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


def test_lora_trains_the_adapter_alone_and_gives_the_mode_back():
    model = add_lora(tiny_llama().eval())
    before = {name: p.clone() for name, p in model.named_parameters()}
    train_sft(model, PAIRS, TrainingConfig(1, 128, 1e-2), progress=False)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.endswith((".lora_A", ".lora_B")) for name in changed) and not model.training


@pytest.mark.parametrize("pairs, says", [([], "at least one sequence"), ([([1], [])], "a response of at least a token"),
                                         ([([], [2])], "a prompt and")])
def test_nothing_to_learn_is_an_error(pairs, says):
    with pytest.raises(ValueError, match=says):
        train_sft(tiny_llama(), pairs, progress=False)
    with pytest.raises(ValueError, match="no parameter of the model requires gradients"):
        train_sft(tiny_llama().requires_grad_(False), PAIRS, progress=False)


# The program


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("base")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Name a colour and a metal.", "Red, green, blue, copper, tin."] * 10),
        model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", minloglevel=2)
    tiny_llama(vocab_size=300).save_pretrained(folder)
    return folder


def arguments(tmp_path: Path, model_dir: Path, *more: str) -> list[str]:
    records = [{"instruction": "Name a colour", "input": str(i), "output": "Red."} for i in range(9)]
    (tmp_path / "data.json").write_text(json.dumps([*records, {"instruction": "Name " * 100, "output": "tin"}]))
    return ["--model", str(model_dir), "--data", str(tmp_path / "data.json"), "--out", str(tmp_path / "out"),
            "--prompt-template", "tiny", "--max-tokens", "250", "--validation", "0.2", "--epochs", "3", "--batch-size", "4",
            "--learning-rate", "1e-2", "--device", "cpu", *more]


def test_full_tuning_writes_a_model_with_its_tokenizer_and_says_what_it_dropped(tmp_path, model_dir, capsys):
    assert sft.main(arguments(tmp_path, model_dir, "--tuning", "full")) == 0
    printed = capsys.readouterr().out
    assert "7 sequences to train on, 2 held out, 1 dropped (over 250 tokens)" in printed and "epoch 3: loss" in printed
    assert (tmp_path / "out/tokenizer.model").read_bytes() == (model_dir / "tokenizer.model").read_bytes()
    tuned, base = Llama.from_pretrained(tmp_path / "out"), Llama.from_pretrained(model_dir)
    assert not torch.equal(tuned.model.embed_tokens.weight, base.model.embed_tokens.weight)


def test_lora_writes_the_merged_model_and_the_adapter(tmp_path, model_dir):
    assert sft.main(arguments(tmp_path, model_dir, "--tuning", "lora")) == 0
    merged, adapted = Llama.from_pretrained(tmp_path / "out"), Llama.from_pretrained(model_dir)
    load_lora(adapted, tmp_path / "out/adapter")
    ids = torch.tensor([[1, 7, 8, 9]])
    before = Llama.from_pretrained(model_dir)(ids)
    torch.testing.assert_close(merged(ids), merge_lora(adapted)(ids))
    assert not torch.allclose(merged(ids), before)


@pytest.mark.parametrize("flags, says", [
    (["--data", "nowhere.json"], "nowhere.json: no such data file"),
    (["--prompt-template", "none"], "template 'none'"),
    (["--max-tokens", "3"], "--max-tokens 3.*no sequence left"),
    (["--model", "nowhere"], "nowhere: no such tokenizer"),
])
def test_bad_input_is_exit_code_2_and_one_line(tmp_path, model_dir, capsys, flags, says):
    assert sft.main(arguments(tmp_path, model_dir, *flags)) == 2
    error = capsys.readouterr().err
    assert re.match("sft.py: .*" + says, error) and error.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_said_before_the_training(tmp_path, model_dir, capsys, monkeypatch):
    """What was trained would be lost, and so it was once."""
    monkeypatch.setattr(sft, "train_sft", lambda *a, **k: pytest.fail("trained first"))
    (tmp_path / "file").write_text("mine")
    assert sft.main(arguments(tmp_path, model_dir, "--out", str(tmp_path / "file" / "x"))) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sft.py: --out {tmp_path / 'file' / 'x'}: no such folder can be made") and error.count("\n") == 1


def test_a_bf16_base_loses_nothing_of_what_was_trained_when_it_is_merged(tmp_path, model_dir):
    """A short training's update is as small as bf16's last bit: merged in bf16, much of it would be rounding."""
    assert sft.main(arguments(tmp_path, model_dir, "--dtype", "bfloat16", "--learning-rate", "1e-6")) == 0
    stored = Llama.from_pretrained(tmp_path / "out")
    adapted = Llama.from_pretrained(model_dir, dtype=torch.bfloat16).float()
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    load_lora(adapted, tmp_path / "out/adapter")
    for name, weight in merge_lora(adapted).named_parameters():
        if not name.endswith(("lora_A", "lora_B")):
            assert torch.equal(stored.get_parameter(name), weight), name
    q = "model.layers.0.self_attn.q_proj.weight"
    update, rounded = stored.get_parameter(q) - before[q], stored.get_parameter(q).bfloat16().float() - before[q]
    assert update.norm() > 0 and (rounded - update).norm() > 0.2 * update.norm()  # so it matters
