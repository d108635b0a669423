"""Promises that hold for every input, tried on many: masks, GAE, whitening, merging, parsing, files cut off anywhere."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ppo
from data import load_instructions, load_preferences
from evaluation.judges import resumable
from evaluation.statistics import win_rate
from lora import add_lora, merge_lora, unmerge_lora
from training.folder import append_line, cut_after

EOS = 2
settings.register_profile("quiet", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("quiet")

responses = st.integers(1, 9).flatmap(lambda width: st.lists(st.lists(st.integers(0, 5), min_size=width, max_size=width),
                                                             min_size=1, max_size=6)).map(torch.tensor)
numbers = st.floats(-100, 100, width=32)


def like(mask: torch.Tensor) -> st.SearchStrategy:
    """Numbers in the mask's shape."""
    n = mask.numel()
    return st.lists(numbers, min_size=n, max_size=n).map(lambda x: torch.tensor(x).view(mask.shape))


@given(responses)
def test_a_mask_runs_through_the_first_eos_of_each_row(tokens):
    mask = ppo.response_mask(tokens, EOS)
    for row, real in zip(tokens.tolist(), mask.tolist(), strict=True):
        length = row.index(EOS) + 1 if EOS in row else len(row)
        assert real == [True] * length + [False] * (len(row) - length)


@given(st.data(), responses, st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_naive_sum_whatever_stands_in_padding(data, tokens, gamma, lam):
    mask = ppo.response_mask(tokens, EOS)
    rewards, values = data.draw(like(mask)), data.draw(like(mask))
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for b, length in enumerate(mask.sum(1).tolist()):
        v = [*values[b, :length].tolist(), 0.0]
        deltas = [rewards[b, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        naive = [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, length)) for t in range(length)]
        assert torch.allclose(advantages[b, :length], torch.tensor(naive), rtol=1e-3, atol=1e-2)
    assert torch.equal(advantages[~mask], torch.zeros(int((~mask).sum())))
    assert torch.allclose(returns, (advantages + values).masked_fill(~mask, 0), atol=1e-3)


@given(st.data(), responses, st.booleans())
def test_whitening_has_unit_deviation_and_never_sees_padding(data, tokens, shift):
    mask = ppo.response_mask(tokens, EOS)
    x = data.draw(like(mask))
    white = ppo.whiten(x, mask, shift_mean=shift)
    assert torch.equal(white, ppo.whiten(x.masked_fill(~mask, 1e6), mask, shift_mean=shift))
    real = white[mask]
    if x[mask].numel() > 1 and x[mask].std(correction=0) > 0.1:
        assert abs(real.std(correction=0).item() - 1) < 0.02
        assert not shift or abs(real.mean().item()) < 0.01
        assert shift or torch.allclose(real.mean(), x[mask].mean() / x[mask].std(correction=0), rtol=0.05, atol=0.05)


@given(st.data(), responses, numbers, st.floats(0, 2))
def test_the_score_lands_on_the_last_real_token_and_nothing_behind_it(data, tokens, score, beta):
    mask = ppo.response_mask(tokens, EOS)
    penalties = data.draw(like(mask))
    shaped = ppo.shape_rewards(torch.full((len(mask),), score), penalties, mask, beta)
    expected = (-beta * penalties).masked_fill(~mask, 0)
    for b, length in enumerate(mask.sum(1).tolist()):
        expected[b, length - 1] += score
    assert torch.allclose(shaped, expected, atol=1e-3)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.floats(0.1, 64), st.integers(0, 10**6))
def test_a_merged_adapter_computes_the_same_and_unmerging_restores_every_bit(inputs, outputs, rank, alpha, seed):
    torch.manual_seed(seed)
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(inputs, outputs)})
    before = model["q_proj"].weight.clone()
    add_lora(model, rank=rank, alpha=alpha, dropout=0.0)
    torch.nn.init.normal_(model["q_proj"].lora_B)
    x = torch.randn(5, inputs)
    adapted = model["q_proj"](x)
    merge_lora(merge_lora(model))
    assert torch.allclose(model["q_proj"](x), adapted, rtol=1e-3, atol=1e-3 * max(1.0, adapted.abs().max().item()))
    unmerge_lora(unmerge_lora(model))
    assert torch.equal(model["q_proj"].weight, before) and torch.equal(model["q_proj"](x), adapted)


texts = st.text(st.characters(blacklist_categories=("Cs",)), max_size=30)
named = texts.filter(lambda text: text.strip())


@given(st.lists(st.tuples(named, texts, st.sampled_from([1, 2])), min_size=1, max_size=5), st.booleans())
def test_whatever_text_is_written_is_read_again(records, as_lines):
    written = [{"instruction": a, "input": b, "output_1": a, "output_2": b, "preference": p} for a, b, p in records]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "data.json"
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in written)
        file.write_text(lines if as_lines else json.dumps(written, ensure_ascii=False), encoding="utf-8", newline="")
        assert [(r["instruction"], r["input"]) for r in load_instructions(file)] == [(a, b) for a, b, _ in records]
        assert [r["preference"] for r in load_preferences(file)] == [p for *_, p in records]


@given(st.binary(max_size=200))
def test_bytes_that_are_no_data_are_refused_in_one_line(content):
    with TemporaryDirectory() as folder:
        file = Path(folder) / "data.json"
        file.write_bytes(content)
        try:
            load_instructions(file)
        except ValueError as error:
            assert str(file) in str(error) and "\n" not in str(error)


@given(st.lists(st.sampled_from([1, 2, 0, 1.5, None]), min_size=1).filter(any))
def test_a_win_rate_and_the_opponents_add_up_to_a_hundred(preferences):
    rate, error = win_rate(preferences)
    turned, same_error = win_rate([None if p is None else 0 if p == 0 else 3 - p for p in preferences])
    assert 0 <= rate <= 100 and abs(rate + turned - 100) < 1e-9 and abs(error - same_error) < 1e-9


@given(st.integers(0, 400), st.lists(texts, min_size=1, max_size=6, unique=True))
def test_work_resumes_from_a_log_that_is_cut_off_anywhere(cut, items):
    with TemporaryDirectory() as folder:
        file, done = Path(folder) / "log.jsonl", []

        def call():
            return resumable(items, lambda x: done.append(x) or {"said": x}, lambda x: x, file=file)

        first = call()
        file.write_bytes(file.read_bytes()[:cut])
        kept = file.read_bytes().count(b"\n")
        done.clear()
        assert call() == first and len(done) == len(items) - kept


@given(st.integers(0, 300), st.integers(-1, 5), st.lists(texts, max_size=5))
def test_lines_of_later_steps_and_half_lines_go_and_the_rest_stays(cut, step, said):
    with TemporaryDirectory() as folder:
        file = Path(folder) / "metrics.jsonl"
        for n, text in enumerate(said, start=1):
            append_line(file, {"step": n, "text": text})
        content = file.read_bytes()[:cut] if file.exists() else b""
        file.write_bytes(content)
        whole = content.count(b"\n")
        cut_after(file, step)
        kept = [json.loads(line)["step"] for line in file.read_bytes().split(b"\n") if line]
        assert kept == list(range(1, min(whole, step) + 1))
