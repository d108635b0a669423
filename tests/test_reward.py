"""What reward.py promises: scores are read where the text ends, groups equal pairs, checkpoints keep scores."""

import io
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import reward
from lora import add_lora, merge_lora
from model import Llama, LlamaConfig
from reward import (Group, RewardModel, TrainingConfig, accuracy, group_preferences, pairwise_loss, same_ids, standardise,
                    train_reward)
from training.rewards import is_rule, load_rule

EOS = 2


def tiny_llama(seed: int = 0) -> Llama:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    return Llama(config)


@pytest.fixture
def model() -> RewardModel:
    return RewardModel(tiny_llama()).eval()


class Echo(torch.nn.Module):
    """A backbone whose hidden state at a position is that position's token id: the score tells where it was read."""

    config = SimpleNamespace(hidden_size=1)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def hidden(self, input_ids, attention_mask=None):
        return input_ids[..., None].float() * self.weight


def echo() -> RewardModel:
    model = RewardModel(Echo())
    torch.nn.init.ones_(model.score.weight)
    return model


# Reading the score


def test_the_score_is_read_at_the_last_real_token_on_either_side():
    ids = torch.tensor([[7, 8, 9, 0, 0], [0, 0, 7, 8, 9], [5, 6, 7, 8, 9], [4, 0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    assert echo()(ids, mask).tolist() == [9, 9, 9, 4]
    assert echo()(ids, mask.bool()).tolist() == [9, 9, 9, 4]


def test_the_score_is_read_at_eos_itself_where_pad_is_eos():
    # Prompt pads, prompt, response, EOS, pads, all pads being EOS: the hidden state must be the real EOS's, position 4.
    model = RewardModel(Echo())
    model.backbone.hidden = lambda ids, mask=None: torch.arange(ids.shape[1]).expand(ids.shape)[..., None].float()
    torch.nn.init.ones_(model.score.weight)
    ids = torch.tensor([[EOS, EOS, 7, 8, EOS, EOS, EOS]])
    assert model(ids, torch.tensor([[0, 0, 1, 1, 1, 0, 0]])).tolist() == [4]


def test_padding_never_changes_a_score(model):
    ids, pad = [5, 9, 11, 4, EOS], [17, 3, EOS]
    bare = model(torch.tensor([ids]), torch.ones(1, 5))
    left = model(torch.tensor([pad + ids]), torch.tensor([[0] * 3 + [1] * 5]))
    right = model(torch.tensor([ids + pad]), torch.tensor([[1] * 5 + [0] * 3]))
    both = model(torch.tensor([pad + ids + pad]), torch.tensor([[0] * 3 + [1] * 5 + [0] * 3]))
    for padded in (left, right, both):
        torch.testing.assert_close(padded, bare, atol=1e-5, rtol=1e-5)


def test_scores_and_head_are_float32_over_a_bfloat16_backbone():
    model = RewardModel(tiny_llama().to(torch.bfloat16))
    assert model.score.weight.dtype == torch.float32
    assert model(torch.tensor([[5, 6]]), torch.ones(1, 2)).dtype == torch.float32


def test_the_forward_pass_runs_on_tensors_without_data(model):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        scores = model(torch.ones(3, 6, dtype=torch.long), torch.ones(3, 6, dtype=torch.bool))
    assert scores.shape == (3,) and scores.dtype == torch.float32


class Letters:
    """A tokenizer of single letters: BOS 1, EOS 2, then the alphabet given."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __init__(self, alphabet: str):
        self.letters = "___" + alphabet

    def __len__(self):
        return len(self.letters)

    def encode(self, text, bos=True, eos=False):
        return [1] * bos + [self.letters.index(c) for c in text] + [2] * eos

    def decode(self, ids):
        return "".join(self.letters[i] for i in ids if i > 2)

    def pieces(self, ids):
        return [self.letters[i] for i in ids]


def test_token_ids_are_scored_as_they_are_only_where_they_mean_the_same(model):
    ids, mask = torch.tensor([[0, 1, 3, 4, EOS], [1, 3, 3, 5, 0]]), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert same_ids(Letters("abc"), Letters("abcd")) and not same_ids(Letters("abc"), Letters("cba"))
    assert torch.equal(reward.scorer(model)(ids, mask, 2), model(ids, mask))


def test_where_they_mean_something_else_both_texts_are_spelt_anew(model):
    ids, mask = torch.tensor([[0, 1, 3, 4, EOS], [1, 3, 3, 5, 0]]), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    model.mean.fill_(0.5), model.std.fill_(2.0)

    def respell(prompt, response):
        assert (prompt, response) in [([1, 3], [4, EOS]), ([1, 3, 3], [5])]
        return [{3: 5, 5: 3}.get(i, i) for i in prompt + response]

    respelled = torch.tensor([[0, 1, 5, 4, EOS], [1, 5, 5, 3, 0]])
    torch.testing.assert_close(reward.retokenising_scorer(model, respell, 0)(ids, mask, 2), model(respelled, mask))


def test_the_score_is_read_where_the_model_was_trained_to_be_read():
    """At its own EOS, whichever token the policy ended with, or at the last word; a prompt's special tokens stay as they are."""
    ids, mask = torch.tensor([[9, 7, 8, 5], [9, 7, 8, EOS], [9, 7, 8, 6], [9, 7, 9, 0]]), torch.ones(4, 4)
    mask[3, 3] = 0
    model = echo()
    assert reward.scorer(model, stop_ids=(EOS, 9), eos_token_id=EOS)(ids, mask, 2).tolist() == [5, EOS, 6, EOS]
    model.ends_with_eos = False
    assert reward.scorer(model, stop_ids=(EOS, 9), eos_token_id=EOS)(ids, mask, 2).tolist() == [5, 8, 6, 7]


def test_a_stored_model_says_what_it_was_trained_to_read(model, tmp_path):
    def about():
        read = RewardModel.from_pretrained(tmp_path)
        return read.ends_with_eos, read.prompt_template

    model.save_pretrained(tmp_path)
    assert about() == (True, None)
    model.ends_with_eos, model.prompt_template = False, "alpaca"
    model.save_pretrained(tmp_path)
    assert about() == (False, "alpaca")
    stored = json.loads((tmp_path / "reward_config.json").read_text())
    (tmp_path / "reward_config.json").write_text(json.dumps({"mean": stored["mean"], "std": stored["std"]}))
    assert about() == (True, None)  # as ours wrote it before it said so
    (tmp_path / "reward_config.json").unlink()
    assert about() == (None, None)  # anybody's sequence classifier
    (tmp_path / "reward_config.json").write_text(json.dumps(stored | {"eos": "yes"}))
    with pytest.raises(ValueError, match="reward_config.json: eos is 'yes': must be true or false"):
        about()


def test_a_rule_reads_prompt_and_response_as_texts(tmp_path):
    file = tmp_path / "rules.py"
    file.write_text("def short(prompts, responses):\n    return [10 * len(p) - len(r) for p, r in zip(prompts, responses)]\n")
    assert is_rule(f"{file}:short") and not is_rule(str(tmp_path))
    score = reward.rule_scorer(load_rule(f"{file}:short"), Letters("abc"))
    ids = torch.tensor([[0, 1, 3, 4, EOS], [1, 3, 3, 5, 0]])  # prompts "a" and "aa", responses "b" and "c"
    assert score(ids, torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]), 2).tolist() == [9.0, 19.0]


@pytest.mark.parametrize("rule, message", [
    (lambda p, r: [1.0], "2 finite numbers, one for each response; it returned 1"),
    (lambda p, r: [1.0, math.nan], "it returned 2, 1 of them finite"),
    (lambda p, r: None, "must return a list of numbers"),
    (lambda p, r: ["good", "bad"], "must return a list of numbers")])
def test_a_rule_that_returns_something_else_is_told_what_to_return(rule, message):
    with pytest.raises(ValueError, match=message):
        reward.rule_scorer(rule, Letters("abc"))(torch.tensor([[1, 3, 4], [1, 4, 3]]), torch.ones(2, 3), 1)


@pytest.mark.parametrize("name, message", [("nowhere.py:f", "nowhere.py: no such file"), ("rules.py:long", "it has short")])
def test_a_rule_that_is_not_there_is_named(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.py").write_text("def short(prompts, responses):\n    return [0.0] * len(responses)\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_rule(name)


# Loss and groups


def test_pairwise_loss_by_hand_and_far_out():
    # Margins 0 and ln 3: -log(1/2) = ln 2 and -log(3/4) = ln(4/3); their mean is ln(8/3) / 2.
    loss = pairwise_loss(torch.tensor([1.0, math.log(3)]), torch.tensor([1.0, 0.0]))
    assert loss.item() == pytest.approx(math.log(8 / 3) / 2)
    assert pairwise_loss(torch.tensor([-500.0]), torch.tensor([500.0])).item() == pytest.approx(1000)
    assert pairwise_loss(torch.tensor([500.0]), torch.tensor([-500.0])).item() == 0


def random_groups(seed: int, sizes: list[int]) -> list[Group]:
    draw = torch.Generator().manual_seed(seed)
    groups = []
    for k in sizes:
        lengths = torch.randint(2, 9, (k,), generator=draw).tolist()
        sequences = [torch.randint(3, 40, (n,), generator=draw).tolist() for n in lengths]
        groups.append(Group(sequences, [(i, j) for i in range(k) for j in range(i)]))
    return groups


@pytest.mark.parametrize("micro_batch_size", [4, 3, 1])
def test_group_loss_and_gradient_equal_the_naive_loop_over_pairs(model, micro_batch_size):
    groups = random_groups(1, [2, 4, 3, 2])  # 1 + 6 + 3 + 1 = 11 pairs
    losses = []
    for group in groups:
        for winner, loser in group.pairs:
            chosen, rejected = (torch.tensor([group.sequences[i]]) for i in (winner, loser))
            margin = model.raw(chosen, torch.ones_like(chosen)) - model.raw(rejected, torch.ones_like(rejected))
            losses.append(-F.logsigmoid(margin))
    naive = sum(losses) / 11
    naive.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    micro_batches = [groups[i:i + micro_batch_size] for i in range(0, len(groups), micro_batch_size)]
    loss, right = reward._accumulate(model, micro_batches, 11, pad_token_id=EOS)
    assert loss == pytest.approx(naive.item(), abs=1e-5)
    assert right == sum(loss.item() < math.log(2) for loss in losses)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


def test_preferences_of_one_instruction_become_one_group():
    def record(instruction, output_1, output_2, preference):
        outputs = {"output_1": output_1, "output_2": output_2}
        return {"instruction": instruction, "input": "", **outputs, "preference": preference}

    def encode(record, output):
        return [ord(record["instruction"]), *map(ord, output)]

    records = [record("a", "x", "yy", 2), record("b", "x", "z", 1), record("a", "zzz", "yy", 1),
               record("a", "x", "x", 1), record("a", "x", "too long", 1)]
    groups, dropped = group_preferences(records, encode, max_tokens=4)
    a, b, x, y, z = map(ord, "abxyz")
    assert groups == [Group([[a, x], [a, y, y], [a, z, z, z]], [(1, 0), (2, 1)]), Group([[b, x], [b, z]], [(0, 1)])]
    assert dropped == 2


def test_accuracy_leaves_ties_out_and_clusters_its_error():
    # Scores are the last tokens: right, wrong, tie in the first group; right in the second. 2 of 3 = 0.667.
    groups = [Group([[5], [4], [3], [4]], [(0, 1), (2, 1), (1, 3)]), Group([[9], [8]], [(0, 1)])]
    result = accuracy(echo(), groups)
    assert (result.n, result.value) == (3, pytest.approx(2 / 3))
    # Residuals right - value * n: 1 - 4/3 = -1/3 and 1 - 2/3 = 1/3. sqrt((1/9 + 1/9) * 2/1) / 3 = 2/9.
    assert result.standard_error == pytest.approx(2 / 9)


def test_accuracy_of_single_pairs_has_the_usual_standard_error():
    groups = [Group([[5], [4]], [(0, 1)])] * 6 + [Group([[4], [5]], [(0, 1)])] * 2
    outcomes = torch.tensor([1.0] * 6 + [0.0] * 2)
    result = accuracy(echo(), groups)
    assert result.value == 0.75 and result.standard_error == pytest.approx(outcomes.std().item() / math.sqrt(8))


# Training


def test_training_learns_to_prefer_a_pattern_and_leaves_held_out_data_out():
    draw = random.Random(0)

    def sequence(mark: int) -> list[int]:
        return [1, *(draw.randrange(5, 40) for _ in range(draw.randrange(3, 8))), mark, EOS]

    groups = [Group([sequence(3), sequence(4)], [(0, 1)]) for _ in range(96)]
    model = RewardModel(tiny_llama())
    before = accuracy(model, groups[64:])
    history = train_reward(model, groups[:64], TrainingConfig(8, 16, 1e-2), held_out=groups[64:], progress=False)
    assert before.value < 0.8
    assert history[-1]["held_out"].value > 0.95 and history[-1]["held_out"].n == 32
    assert history[-1]["loss"] < 0.2 < history[0]["loss"]


def test_training_is_repeatable_and_lora_trains_adapter_and_head_only():
    groups = random_groups(3, [3, 2, 2, 4])
    runs = []
    for _ in range(2):
        model = RewardModel(tiny_llama())
        add_lora(model.backbone, dropout=0.0)
        before = {name: p.clone() for name, p in model.named_parameters()}
        train_reward(model, groups, TrainingConfig(1, 2, 1e-2), progress=False)
        runs.append(dict(model.named_parameters()))
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == {n for n in before if n.endswith((".lora_A", ".lora_B"))} | {"score.weight"}
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_the_loop_is_adamw_whose_rate_rises_in_a_line_and_falls_as_half_a_cosine():
    """Bit for bit what torch's own scheduler makes of the same batches."""
    groups, config = random_groups(4, [2, 3, 2, 4, 2]), TrainingConfig(3, 2, 1e-2, warmup=0.3, weight_decay=0.01, seed=5)
    model, other = RewardModel(tiny_llama()), RewardModel(tiny_llama())
    other.load_state_dict(model.state_dict())
    train_reward(model, groups, config, progress=False)

    parameters, draw = list(other.parameters()), torch.Generator().manual_seed(5)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: reward.warmup_cosine(step, 9, 3))
    for _ in range(3):
        for batch in reward.length_batches([max(map(len, group.sequences)) for group in groups], 2, draw):
            n = sum(len(groups[i].pairs) for i in batch)
            reward._accumulate(other, [[groups[i] for i in batch]], n, 0)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step(), optimizer.zero_grad(set_to_none=True), schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("left", range(1, 7))
def test_a_loop_left_after_any_step_goes_on_in_another_process(left):
    """Through a file that holds no code; dropout is on."""
    groups, config, states = random_groups(4, [2, 3, 2, 4, 2]), TrainingConfig(2, 2, 1e-2), {}

    def build() -> RewardModel:
        model = RewardModel(add_lora(tiny_llama(), dropout=0.5))
        model.backbone.requires_grad_(True)
        return model

    def keep(loop: reward.Loop) -> None:
        states[loop.step] = io.BytesIO()
        torch.save([loop.state_dict(), whole.state_dict()], states[loop.step])

    whole = build()
    history = train_reward(whole, groups, config, held_out=groups, progress=False, on_step=keep)
    states[left].seek(0)
    state, weights = torch.load(states[left], weights_only=True)
    again = build()
    again.load_state_dict(weights)
    assert sorted(states) == list(range(7)) and history == train_reward(
        again, groups, config, held_out=groups, progress=False, on_step=lambda loop: loop.step or loop.load_state_dict(state))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_never_reaches_a_weight(model):
    groups, before = random_groups(4, [2, 2]), [p.detach().clone() for p in model.parameters()]
    model.score.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(FloatingPointError, match="step 1: grad_norm is .*; stopped before the optimiser step"):
        train_reward(model, groups, TrainingConfig(1, 2, 1e-2), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    with torch.no_grad():
        model.score.weight.fill_(torch.nan)
    for measure in (accuracy, lambda *a: standardise(model, [[5, 6], [7, 8]])):
        with pytest.raises(FloatingPointError, match="scores are NaN or infinite"):
            measure(model, groups)


def test_nothing_to_train_on_is_named(model):
    with pytest.raises(ValueError, match="no labelled pairs"):
        train_reward(model, [Group([[1], [2]], [])], progress=False)
    with pytest.raises(ValueError, match="no parameter requires gradients"):
        train_reward(model.requires_grad_(False), [Group([[1], [2]], [(0, 1)])], progress=False)


def test_standardised_scores_have_mean_zero_and_deviation_one(model):
    sequences = [s for group in random_groups(5, [6, 6]) for s in group.sequences]
    raw = reward.score_all(model, sequences)
    mean, std = standardise(model, sequences)
    assert mean == pytest.approx(raw.mean().item(), abs=1e-6)
    assert std == pytest.approx(raw.std(correction=0).item(), abs=1e-6)
    scores = torch.cat([model(torch.tensor([s]), torch.ones(1, len(s))) for s in sequences])
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="cannot standardise: 2 sequences"):
        standardise(model, [[5, 6], [5, 6]])


# Checkpoints


IDS = torch.tensor([[5, 9, 11, 4, EOS, 0, 0], [8, 3, EOS, 0, 0, 0, 0], [5, 9, 11, 4, 7, 6, EOS]])
MASK = IDS != 0


def test_save_and_load_keep_scores_raw_and_standardised(tmp_path, model):
    model.mean.fill_(0.3), model.std.fill_(2.5)
    model.save_pretrained(tmp_path / "reward")
    loaded = RewardModel.from_pretrained(tmp_path / "reward")
    assert torch.equal(loaded(IDS, MASK), model(IDS, MASK)) and torch.equal(loaded.raw(IDS, MASK), model.raw(IDS, MASK))
    assert not loaded.training
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "reward/model.safetensors").read_bytes()


def test_a_smaller_dtype_on_disk_leaves_the_head_in_float32(tmp_path, model):
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded = RewardModel.from_pretrained(tmp_path)
    assert loaded.backbone.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.score.weight, model.score.weight)
    assert model.backbone.model.embed_tokens.weight.dtype == torch.float32


def test_transformers_reads_our_layout_and_agrees(tmp_path, model):
    transformers = pytest.importorskip("transformers")
    model.backbone.config.pad_token_id = 0
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == "LlamaForSequenceClassification"
    with torch.no_grad():
        logits = theirs(input_ids=IDS, attention_mask=MASK.long()).logits[:, 0]
    torch.testing.assert_close(model.raw(IDS, MASK).detach(), logits, atol=1e-4, rtol=0)


def test_we_read_transformers_layout_and_agree(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                      num_attention_heads=4, initializer_range=0.3, num_labels=1, pad_token_id=0)
    theirs = transformers.LlamaForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        logits = theirs(input_ids=IDS, attention_mask=MASK.long()).logits[:, 0]
    torch.testing.assert_close(RewardModel.from_pretrained(tmp_path)(IDS, MASK).detach(), logits, atol=1e-4, rtol=0)


def test_alpacafarms_layout_keeps_its_bias_and_needs_no_sizes_in_its_config(tmp_path):
    torch.manual_seed(0)
    backbone = Llama(LlamaConfig(vocab_size=33, hidden_size=256, intermediate_size=32, num_hidden_layers=2,
                                 num_attention_heads=2))
    weight, bias = torch.randn(1, 256) / 16, torch.tensor([0.7])
    state = {f"backbone_model.{name}": tensor for name, tensor in backbone.state_dict().items()}
    state |= {"reward_head.weight": weight, "reward_head.bias": bias}
    state["backbone_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(64)  # old files hold it
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = {"model_type": "reward_model", "backbone_model_name_or_path": "sft10k"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = RewardModel.from_pretrained(tmp_path)
    assert model.ends_with_eos is False and model.prompt_template == "alpaca"  # as AlpacaFarm trained it
    expected = F.linear(backbone.hidden(IDS[2:]), weight, bias)[:, -1, 0]
    torch.testing.assert_close(model(IDS[2:], MASK[2:]), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_is_saved_merged_or_refused(tmp_path, model):
    add_lora(model.backbone)
    torch.nn.init.normal_(model.backbone.model.layers[0].self_attn.q_proj.lora_B)
    with pytest.raises(ValueError, match="adapter that is not merged"):
        model.save_pretrained(tmp_path)
    merge_lora(model.backbone)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(RewardModel.from_pretrained(tmp_path)(IDS, MASK), model.eval()(IDS, MASK))


def test_a_folder_that_is_no_reward_model_says_so(tmp_path, model):
    with pytest.raises(FileNotFoundError, match="config.json: not found"):
        RewardModel.from_pretrained(tmp_path)
    model.backbone.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither score.weight nor reward_head.weight.*`python reward.py` trains one"):
        RewardModel.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_are_an_error_never_a_skip(tmp_path, model):
    from safetensors.torch import load_file, save_file

    model.save_pretrained(tmp_path)
    file, good = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")
    save_file({name: tensor for name, tensor in good.items() if name != "model.norm.weight"}, file)
    with pytest.raises(ValueError, match="missing tensor model.norm.weight"):
        RewardModel.from_pretrained(tmp_path)
    save_file({**good, "model.extra": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="unexpected tensor model.extra"):
        RewardModel.from_pretrained(tmp_path)
    save_file({**good, "model.norm.weight": torch.ones(5)}, file)
    with pytest.raises(ValueError, match=r"tensor model.norm.weight has shape \(5,\), its configuration asks for \(16,\)"):
        RewardModel.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_last_good_file(tmp_path, model, monkeypatch):
    import safetensors.torch

    model.save_pretrained(tmp_path)
    good = (tmp_path / "model.safetensors").read_bytes()

    def full_disk(tensors, file, metadata=None):
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == good
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors", "reward_config.json"]


# The program


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory) -> Path:
    """An SFT model in miniature with its tokenizer."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sft")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Say hello to the moon.", "Hello, good evening, moon!", "No."] * 10),
        model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", minloglevel=2)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                         num_attention_heads=2)
    Llama(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_program_trains_standardises_saves_and_reports(tmp_path, base_dir, capsys, tuning):
    pair = {"input": "", "output_1": "Hello, moon!", "output_2": "No.", "preference": 1}
    (tmp_path / "pairs.json").write_text(json.dumps([{"instruction": f"Say hello {i}", **pair} for i in range(12)]))
    argv = ["--base", str(base_dir), "--data", str(tmp_path / "pairs.json"), "--out", str(tmp_path / "out"),
            "--prompt-template", "tiny", "--tuning", tuning, "--held-out", "0.25", "--epochs", "10", "--batch-size", "4",
            "--learning-rate", "2e-2", "--device", "cpu"]
    assert reward.main(argv) == 0
    printed = capsys.readouterr().out
    assert "9 instructions to train on, 3 held out; 0 pairs dropped" in printed
    assert "held out 100.0% ± 0.0% of 3 pairs" in printed and "standardised on 6 samples" in printed
    loaded = RewardModel.from_pretrained(tmp_path / "out")
    assert loaded.std.item() != 1 and (tmp_path / "out/tokenizer.model").is_file()


def test_bad_input_is_exit_code_2_and_one_line(tmp_path, base_dir, capsys):
    (tmp_path / "pairs.json").write_text("[]")
    argv = ["--base", str(base_dir), "--data", str(tmp_path / "pairs.json"), "--out", str(tmp_path / "out")]
    assert reward.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("reward.py: ") and "pairs.json: the list holds no records" in error
    assert error.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_said_before_the_training(tmp_path, base_dir, capsys, monkeypatch):
    monkeypatch.setattr(reward, "train_reward", lambda *a, **k: pytest.fail("trained first"))
    (tmp_path / "file").write_text("mine")
    argv = ["--base", str(base_dir), "--data", "x", "--out", str(tmp_path / "file" / "x")]
    assert reward.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"reward.py: --out {tmp_path / 'file' / 'x'}: no such folder") and error.count("\n") == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scores_are_standardised_as_they_are_stored(tmp_path, base_dir, capsys, dtype):
    """A bf16 base and an adapter score otherwise than what they are merged to: mean and deviation must be the latter's."""
    pair = {"input": "", "output_1": "Hello, moon!", "output_2": "No.", "preference": 1}
    (tmp_path / "pairs.json").write_text(json.dumps([{"instruction": f"Say hello {i}", **pair} for i in range(8)]))
    argv = ["--base", str(base_dir), "--data", str(tmp_path / "pairs.json"), "--out", str(tmp_path / "out"), "--held-out", "0.5",
            "--prompt-template", "tiny", "--epochs", "4", "--learning-rate", "1e-2", "--device", "cpu", "--dtype", dtype]
    assert reward.main(argv) == 0
    from formats.tokenizer import load_tokenizer

    _, held_out = reward.load_groups(reward.parse_args(argv), load_tokenizer(base_dir))
    loaded = RewardModel.from_pretrained(tmp_path / "out")
    raw = reward.score_all(loaded, [sequence for group in held_out for sequence in group.sequences]).double()
    assert loaded.mean.item() == pytest.approx(raw.mean().item(), abs=1e-5)
    assert loaded.std.item() == pytest.approx(raw.std(correction=0).item(), abs=1e-5)
