"""The fast sampler gives what model.generate gives, its slow twin: every family, adapter and dtype, rows ending at any time."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SIZES

from lora import add_lora, lora_disabled, lora_layers
from model import KVCache, Llama, LlamaConfig, generate
from training import decode
from training.models import folded

V, EOS, PAD = 60, 2, 0
KIN = {
    "llama": {}, "tied": {"tie_word_embeddings": True}, "biased": {"attention_bias": True, "mlp_bias": True},
    "one head each": {"num_key_value_heads": 4}, "qwen2": {"model_type": "qwen2"}, "qwen3": {"model_type": "qwen3"},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}},
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def llama(targets: tuple[str, ...] = ATTENTION, **fields) -> Llama:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=V, eos_token_id=EOS, pad_token_id=PAD, **SIZES | fields))
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases and norms: at 0 and 1 one left out would go unseen
            torch.nn.init.normal_(parameter, std=0.3, mean=parameter.mean().item())
    if targets:
        add_lora(model, targets=targets, dropout=0.5)
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.05)
    return model


def prompts(rows: int = 7, width: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    mask = (torch.arange(width) >= width - torch.randint(1, width + 1, (rows, 1), generator=draw)).long()
    return torch.randint(3, V, (rows, width), generator=draw) * mask, mask


def both(model: Llama, tokens: int = 12, stops: tuple[int, ...] = (EOS, 5, 6, 7, 8), **how):
    """(generate's responses and logprobs, ours)."""
    ids, mask = prompts()
    draws = torch.rand(tokens, len(ids), generator=torch.Generator().manual_seed(1))
    how = dict(generator=draws, eos_token_id=stops, pad_token_id=PAD, return_logprobs=how.get("temperature", 1) != 0) | how
    return generate(model, ids, mask, tokens, **how), decode.sample(model, ids, mask, decode.Choice(**how))


@pytest.mark.parametrize("kin", KIN)
def test_responses_and_logprobs_are_generates(kin):
    with folded(model := llama(**KIN[kin])):
        (responses, logprobs), (ours, its) = both(model)
    assert torch.equal(ours, responses)
    torch.testing.assert_close(its, logprobs, atol=1e-5, rtol=0)
    assert len({int((row != PAD).sum()) for row in responses}) > 2  # rows ended at different times


@pytest.mark.parametrize("targets", [(), ("q_proj",), ("k_proj", "down_proj"),
                                     (*ATTENTION, "gate_proj", "up_proj", "down_proj")])
@pytest.mark.parametrize("how", [(), (folded,), (lora_disabled,), (lora_disabled, folded)])
def test_any_layers_may_carry_adapters_in_any_state(targets, how):
    """Beside the weights, folded into them, switched off, and folded while they are switched off."""
    model = llama(targets)
    if lora_disabled in how and not targets:
        return
    with ExitStack() as stack:
        for state in how:
            stack.enter_context(state(model))
        (responses, logprobs), (ours, its) = both(model)
    assert torch.equal(ours, responses)
    torch.testing.assert_close(its, logprobs, atol=1e-5, rtol=0)


def test_greedy_answers_are_generates():
    first, second = both(llama(), temperature=0)
    assert torch.equal(first, second)


def test_a_temperature_divides_the_logits():
    (responses, logprobs), (ours, its) = both(llama(), temperature=0.3)
    assert torch.equal(ours, responses)
    torch.testing.assert_close(its, logprobs, atol=1e-5, rtol=0)


def test_more_rows_may_end_at_once_than_are_left():
    (responses, _), (ours, _) = both(llama(), stops=tuple(range(40)))
    assert torch.equal(ours, responses)
    lengths = sorted(int((row != PAD).sum()) for row in responses)
    assert lengths[3] == 1 and lengths[-1] > 2


def test_no_stop_ids_means_never_to_stop():
    (responses, _), (ours, _) = both(llama(), stops=())
    assert ours.shape == (7, 12) and torch.equal(ours, responses)


def test_one_token_is_a_response():
    (responses, _), (ours, _) = both(llama(), tokens=1)
    assert torch.equal(ours, responses)


@torch.no_grad()
def test_in_bf16_a_step_is_as_near_to_float32_as_generates():
    """Token for token the two part sooner or later: a rounding decides a draw."""
    def logits(model: Llama) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the token behind the prompts and one more: plainly, and by a step."""
        ids, mask = prompts()
        cache = KVCache(model.config, len(ids), 16, model.lm_head.weight.dtype, ids.device)
        more = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        with folded(model.eval()):
            model.hidden(ids, mask, cache)
            plain = model.hidden(ids[:, -1:], more, cache)[:, 0]
            rows = decode.Rows(model, ids, mask, decode.Choice(torch.rand(4, len(ids)), [EOS], PAD))
            rows.token.copy_(ids[:, -1])
            found = []
            rows.draw = found.append
            rows.step(ids.shape[1] + 1)
        return model.lm_head(plain).float(), model.lm_head(found[0]).float()

    exact, again = logits(model := llama())
    torch.testing.assert_close(again, exact, atol=1e-4, rtol=0)
    model.to(torch.bfloat16)
    for layer in lora_layers(model).values():
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
    usual, ours = ((x - exact).abs().mean() for x in logits(model))
    assert 0 < usual and ours < 1.5 * usual


def test_logits_that_are_not_finite_are_an_error_that_names_the_token():
    model = llama()
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(FloatingPointError, match="at response token 0"):
        decode.sample(model, *prompts(), decode.Choice(torch.rand(4, 7), (EOS,), PAD))


@pytest.mark.parametrize("every", [1, 3, 8])
def test_as_a_gpu_looks_now_and_then_nothing_changes(monkeypatch, every):
    """Its way on a CPU: rows that ended stay for a while and write padding, and whole blocks of the cache are looked at."""
    recorded = []

    def record(step, device):
        recorded.append(step)
        return SimpleNamespace(replay=step)

    for name, value in {"EVERY": every, "COLUMNS": 4, "replays": lambda device: True, "record": record}.items():
        monkeypatch.setattr(decode, name, value)
    (responses, logprobs), (ours, its) = both(llama())
    assert torch.equal(ours, responses)
    torch.testing.assert_close(its, logprobs, atol=1e-5, rtol=0)
    assert 2 < len(recorded) < 10  # a graph for each block, and for each time that rows left


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_starts_at_most_twenty_operations_of_a_token(dtype, monkeypatch):
    """Each takes a GPU some 10 µs to be told of, and a layer of 7B a tenth of a millisecond to compute."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from launches import count, fast, plain

    ours, plainly = count(fast, dtype)[1], count(plain, dtype)[1]
    assert ours <= 20 < plainly and ours < 0.7 * plainly


def test_a_step_is_one_graph_without_a_break(monkeypatch):
    """What torch.compile takes whole a CUDA graph can take: no shape that changes, no number read back."""
    monkeypatch.setattr(decode, "replays", lambda device: True)  # or the columns to come would hold anything
    ids, mask = prompts()
    draws = torch.rand(6, len(ids), generator=torch.Generator().manual_seed(1))
    with folded(model := llama()), torch.no_grad():
        choice = decode.Choice(draws, [EOS], PAD, return_logprobs=True)
        eager, compiled = (decode.Rows(model.eval(), ids, mask, choice) for _ in range(2))
        step = torch.compile(compiled.step, backend="aot_eager", fullgraph=True, dynamic=False)
        for _ in range(5):
            eager.step(16)
            step(16)
    assert torch.equal(eager.responses, compiled.responses) and int(compiled.t) == 6
