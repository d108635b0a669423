"""What model.py promises: transformers' LLaMA number for number, exact cached sampling, checkpoints that never lie.

    python -m pytest tests/test_model.py
"""

import json
import math
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import model as model_module
from model import (KVCache, Llama, LlamaConfig, RMSNorm, ValueModel, attend, attention_bias, generate, position_ids,
                   sample_tokens)

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
VARIANTS = {
    "plain": {},
    "grouped queries": {"num_key_value_heads": 2},
    "one key head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim apart from hidden_size": {"head_dim": 12, "num_key_value_heads": 2},
    "llama3 rope": {"rope_scaling": LLAMA3, "rope_theta": 5000.0},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
}


def tiny(seed=0, **changes):
    """A random LLaMA of 5K parameters; biases and norms are random too, or leaving one out would go unseen."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "initializer_range": 0.3, "pad_token_id": 0}
    built = Llama(LlamaConfig(**(sizes | changes))).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return built


def prompts(pads=(0, 3, 6), width=9, vocab=61):
    """Left-padded prompts (B, P) and their mask."""
    ids = torch.randint(3, vocab, (len(pads), width), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(width) >= torch.tensor(pads)[:, None]).long()
    return ids * mask, mask


def in_transformers(ours, folder):
    ours.save_pretrained(folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


# ------------------------------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_left_padded_or_not(variant, tmp_path):
    ours = tiny(**VARIANTS[variant])
    theirs = in_transformers(ours, tmp_path)
    ids, mask = prompts(width=40)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(ours(ids, mask)[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


def test_left_padding_never_changes_logits():
    ours = tiny(num_key_value_heads=2)
    ids, mask = prompts()
    logits = ours(ids, mask)
    for row, pad in enumerate((0, 3, 6)):
        torch.testing.assert_close(logits[row, pad:], ours(ids[row : row + 1, pad:])[0], atol=1e-5, rtol=1e-5)


def test_positions_count_real_tokens_and_padding_sees_only_itself():
    mask = torch.tensor([[0, 0, 1, 1]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1]]
    seen = (attention_bias(mask, 4, torch.float32) == 0).int()
    assert seen.tolist() == [[[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]]
    assert torch.equal(attention_bias(mask, 1, torch.float32), attention_bias(mask, 4, torch.float32)[:, :, 3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_never_nan_in_logits_or_gradients(dtype):
    ours = tiny().to(dtype)
    ids, mask = prompts(pads=(0, 8, 9))  # the last row is nothing but padding
    logits = ours(ids, mask)
    assert logits.dtype == dtype and logits.isfinite().all()
    logits[mask.bool()].float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in ours.parameters())


def test_bfloat16_keeps_rope_exact_at_far_positions():
    # bf16 cannot hold the position 1001: angles computed in it would be off by whole turns.
    config = LlamaConfig(hidden_size=8, num_attention_heads=1)
    cos, _ = model_module.rope_tables(config, torch.tensor([[1001]]))
    assert cos.dtype == torch.float32
    assert cos[0, 0, 0, 0].item() == pytest.approx(math.cos(1001), abs=1e-4)
    assert cos[0, 0, 0, 1].item() == pytest.approx(math.cos(1001 * 10000 ** (-2 / 8)), abs=1e-4)


def test_the_norm_rounds_to_bfloat16_once():
    x = torch.randn(4, 999, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = x.double()
    expected = (wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16()
    assert (RMSNorm(999, 1e-6).bfloat16()(x) == expected).float().mean() > 0.999


def test_logits_to_keep_gives_the_last_positions():
    ours = tiny()
    ids, mask = prompts()
    torch.testing.assert_close(ours(ids, mask, logits_to_keep=2), ours(ids, mask)[:, -2:], atol=1e-6, rtol=1e-6)


def test_hidden_states_are_what_the_output_layer_reads():
    ours = tiny(tie_word_embeddings=True)
    ids, mask = prompts()
    by_hand = ours.hidden(ids, mask) @ ours.model.embed_tokens.weight.T
    torch.testing.assert_close(ours(ids, mask), by_hand, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    ours = tiny()
    ids, mask = prompts()

    def gradient():
        ours.zero_grad()
        ours(ids, mask).square().mean().backward()
        return ours.model.layers[0].self_attn.q_proj.weight.grad.clone()

    plain = gradient()
    ours.gradient_checkpointing = True
    torch.testing.assert_close(gradient(), plain, atol=1e-7, rtol=1e-5)


def test_a_new_model_is_normal_with_initializer_range():
    torch.manual_seed(0)
    ours = Llama(LlamaConfig(vocab_size=500, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                             num_attention_heads=4, initializer_range=0.05, attention_bias=True))
    assert ours.model.embed_tokens.weight.std().item() == pytest.approx(0.05, rel=0.03)
    assert ours.lm_head.weight.std().item() == pytest.approx(0.05, rel=0.03)
    assert not ours.model.layers[0].self_attn.q_proj.bias.any()
    assert (ours.model.norm.weight == 1).all()


def test_forward_runs_on_fake_devices_that_the_machine_lacks():
    with torch.device("meta"):
        ours = Llama(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                 num_attention_heads=4, num_key_value_heads=2, rope_scaling=LLAMA3))
    with FakeTensorMode(), torch.no_grad():
        for module in ours.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape, device="cuda:0")))
        ids = torch.zeros(2, 5, dtype=torch.long, device="cuda:0")
        mask = torch.ones(2, 5, dtype=torch.long, device="cuda:0")
        assert ours(ids, mask, logits_to_keep=3).shape == (2, 3, 64)
        values = ValueModel(ours)(ids, mask)
        assert values.shape == (2, 5) and str(values.device) == "cuda:0"


def test_one_thread_alone_makes_the_first_call_of_mkls_vector_functions():
    """Of two that make it together one may get kernels of 4 digits (docs/reliability.md): no later test could see that."""
    code = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

class Vectors(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket.__name__ in ("sin", "cos", "exp", "log", "sqrt", "tanh", "erf", "logsumexp"):
            print(op.overloadpacket.__name__, args[0].numel())
        return op(*args, **(kwargs or {}))

with Vectors():
    import model
    config = model.LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model.Llama(config)(torch.ones(2, 3, dtype=torch.long))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["sin 1", "sin 12"]  # 12 angles: 3 positions of 4 pairs


# ----------------------------------------------------------------------------------------------------------- sampling


def eos_that_ends_some_rows(ours, ids, mask, length=12):
    """A token that greedy decoding produces early in one row, to serve as EOS."""
    free = generate(ours, ids, mask, length, temperature=0, eos_token_id=())
    return int(free[1, 3])


@pytest.mark.parametrize("variant", ["plain", "grouped queries", "one key head, tied", "llama3 rope"])
def test_greedy_generation_equals_transformers_token_for_token(variant, tmp_path):
    ours = tiny(**VARIANTS[variant])
    ids, mask = prompts(pads=(0, 3, 6, 1))
    eos = eos_that_ends_some_rows(ours, ids, mask)
    theirs = in_transformers(ours, tmp_path)
    theirs.generation_config.eos_token_id = eos
    expected = theirs.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12, pad_token_id=0)
    responses = generate(ours, ids, mask, 12, temperature=0, eos_token_id=eos, pad_token_id=0)
    assert responses.tolist() == expected[:, ids.shape[1] :].tolist()


def test_cached_steps_equal_full_recompute():
    ours = tiny(num_key_value_heads=2)
    ids, mask = prompts(width=12)
    with torch.no_grad():
        full = ours.hidden(ids, mask)
        cache = KVCache(ours.config, len(ids), 12, torch.float32, ids.device)
        pieces = [ours.hidden(ids[:, a:b], mask[:, :b], cache) for a, b in ((0, 7), (7, 8), (8, 11), (11, 12))]
    torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()], full[mask.bool()], atol=1e-5, rtol=1e-5)


def test_dropped_rows_leave_the_others_cache_in_place():
    cache = KVCache(LlamaConfig(hidden_size=2, num_attention_heads=1, num_hidden_layers=2), 6, 3, torch.float32, "cpu")
    cache.store.copy_(torch.arange(6.0)[:, None, None, None].expand_as(cache.store))  # each row holds its own number
    cache.length = 2
    order = cache.drop(torch.tensor([True, False, False, True, False, False]))
    assert sorted(order.tolist()) == [1, 2, 4, 5] and cache.rows == 4
    assert (cache.store[:, :, :4, :, :2] == order[:, None, None, None]).all()


def test_the_samplers_log_probabilities_are_those_of_a_whole_forward_pass():
    ours = tiny()
    ids, mask = prompts(pads=(0, 3, 6, 1, 2, 0), width=8)
    eos = eos_that_ends_some_rows(ours, ids, mask)
    draw = torch.Generator().manual_seed(0)
    responses, logprobs = generate(ours, ids, mask, 12, temperature=0.7, eos_token_id=eos, pad_token_id=0, generator=draw,
                                   return_logprobs=True)
    again = generate(ours, ids, mask, 12, 0.7, eos_token_id=eos, pad_token_id=0, generator=draw.manual_seed(0))
    assert torch.equal(responses, again)
    is_eos = (responses == eos).long()
    real = is_eos.cumsum(1) - is_eos == 0
    logits = ours(torch.cat((ids, responses), 1), torch.cat((mask, real.long()), 1))[:, ids.shape[1] - 1 : -1]
    expected = (logits / 0.7).log_softmax(-1).gather(-1, responses[..., None])[..., 0]
    torch.testing.assert_close(logprobs[real], expected[real], atol=1e-5, rtol=0)
    assert (logprobs[~real] == 0).all()
    with pytest.raises(ValueError, match="top_p 0.5"):
        generate(ours, ids, mask, 12, top_p=0.5, return_logprobs=True)


@pytest.mark.parametrize("masked", [True, False])
def test_attention_is_that_of_repeated_heads_whichever_way_it_is_computed(masked):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, generator=draw, dtype=torch.float64) for heads in (6, 2, 2))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]) if masked else torch.ones(2, 5, dtype=torch.long)
    bias = attention_bias(mask, 5, torch.float64)
    scores = q @ k.repeat_interleave(3, 1).transpose(-1, -2) / 8**0.5 + bias
    expected = scores.softmax(-1) @ v.repeat_interleave(3, 1)
    torch.testing.assert_close(attend(q, k, v, bias if masked else None), expected)
    narrow = [x.to(torch.bfloat16).requires_grad_() for x in (q, k, v)]
    found = attend(*narrow, bias.to(torch.bfloat16) if masked else None)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, atol=0.05, rtol=0.05)


def test_rows_that_finish_leave_the_batch_and_change_nothing():
    ours = tiny()
    ids, mask = prompts(pads=(0, 3, 6, 1, 2, 0), width=8)
    eos, rows_left = eos_that_ends_some_rows(ours, ids, mask), []
    together = generate(ours, ids, mask, 12, temperature=0, eos_token_id=eos, pad_token_id=0, progress=rows_left.append)
    assert rows_left == sorted(rows_left, reverse=True) and rows_left[-1] < len(ids)
    for row in range(len(ids)):
        alone = generate(ours, ids[row : row + 1], mask[row : row + 1], 12, temperature=0, eos_token_id=eos)[0]
        assert together[row, : len(alone)].tolist() == alone.tolist()
        assert (together[row, len(alone) :] == 0).all()


def test_responses_end_at_the_longest_and_pad_may_be_eos():
    ours = tiny()
    ids, mask = prompts()
    free = generate(ours, ids[:1], mask[:1], 6, temperature=0, eos_token_id=())
    eos = int(free[0, 0])
    ended = generate(ours, ids[:1], mask[:1], 6, temperature=0, eos_token_id=[eos, 60], pad_token_id=eos)
    assert ended.tolist() == [[eos]]


def test_equal_generator_states_give_equal_samples():
    ours = tiny()
    ids, mask = prompts()

    def sample(seed, **settings):
        return generate(ours, ids, mask, 8, generator=torch.Generator().manual_seed(seed), **settings).tolist()

    assert sample(3) == sample(3) != sample(4)
    assert sample(3, top_p=0.8) == sample(3, top_p=0.8)


def test_a_row_draws_by_its_own_uniforms_whichever_rows_are_with_it():
    ours = tiny()
    ids, mask = prompts()
    uniforms = torch.rand(8, len(ids), generator=torch.Generator().manual_seed(3))
    drawn = generate(ours, ids, mask, 8, eos_token_id=(), generator=torch.Generator().manual_seed(3))
    assert torch.equal(generate(ours, ids, mask, 8, eos_token_id=(), generator=uniforms), drawn)
    some = slice(1, 3)
    assert torch.equal(generate(ours, ids[some], mask[some], 8, eos_token_id=(), generator=uniforms[:, some]), drawn[some])
    with pytest.raises(ValueError, match=r"draws \(8, \d\) must be \(max_new_tokens, B\) = \(7, "):
        generate(ours, ids, mask, 7, generator=uniforms)


def test_a_rows_samples_do_not_depend_on_when_another_ends():
    ours = tiny()
    ids, mask = prompts(pads=(0, 0, 0, 0))
    free = generate(ours, ids, mask, 10, eos_token_id=(), generator=torch.Generator().manual_seed(3))
    eos = int(free[0, 1])
    ended = generate(ours, ids, mask, 10, eos_token_id=eos, pad_token_id=0, generator=torch.Generator().manual_seed(3))
    for row in range(4):
        through_eos = (free[row] == eos).long().cumsum(0) - (free[row] == eos).long() == 0
        length = min(int(through_eos.sum()), ended.shape[1])
        assert ended[row, :length].tolist() == free[row, :length].tolist()


def test_sampled_frequencies_match_softmax_at_the_temperature():
    ours = tiny(vocab_size=7, initializer_range=0.5)
    ids, mask = prompts(pads=(2,), vocab=7)
    N = 20000
    with torch.no_grad():
        expected = torch.softmax(ours(ids, mask)[0, -1] / 0.7, -1)
    samples = generate(ours, ids.expand(N, -1), mask.expand(N, -1), 1, temperature=0.7, eos_token_id=(),
                       generator=torch.Generator().manual_seed(0))
    frequencies = torch.bincount(samples[:, 0], minlength=7) / N
    deviation = (expected * (1 - expected) / N).sqrt()
    assert ((frequencies - expected).abs() < 4 * deviation + 1e-9).all()


def test_top_p_keeps_the_nucleus_and_its_proportions():
    # .6 is passed by the two likeliest, .5 + .3: they are left with 5/8 and 3/8.
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log().expand(4, -1)
    uniforms = torch.tensor([0.0, 0.62, 0.63, 0.999])
    assert sample_tokens(logits, uniforms, top_p=0.6).tolist() == [1, 1, 3, 3]
    assert sample_tokens(logits, uniforms, top_p=0.4).tolist() == [1, 1, 1, 1]


def test_the_uniform_inverts_the_distribution_function():
    # Tokens 0 to 3 fill [0, .05), [.05, .55), [.55, .7), [.7, 1).
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log().expand(6, -1)
    assert sample_tokens(logits, torch.tensor([0.04, 0.06, 0.54, 0.56, 0.69, 0.71])).tolist() == [0, 1, 1, 2, 2, 3]


def test_a_token_of_probability_zero_is_never_sampled():
    logits = torch.full((2, 5), -torch.inf)
    logits[:, 2] = 3.0
    edges = torch.tensor([0.0, 1 - 2**-24])  # the smallest and the largest number torch.rand gives
    assert sample_tokens(logits, edges).tolist() == [2, 2]
    assert sample_tokens(logits, edges, top_p=0.9).tolist() == [2, 2]
    # Probabilities that sum to a little more or less than 1 must not let the largest uniform through either.
    many = torch.randn(500, 300, generator=torch.Generator().manual_seed(0))
    many[:, -1] = -torch.inf
    assert (sample_tokens(many, edges[1].expand(500)) < 299).all()


def test_generate_has_no_dropout_and_gives_the_models_modes_back():
    ours = tiny()
    ours.model.norm = torch.nn.Sequential(ours.model.norm, torch.nn.Dropout(0.9))
    ids, mask = prompts()
    expected = generate(ours, ids, mask, 5, temperature=0)
    ours.train()
    ours.lm_head.eval()
    assert generate(ours, ids, mask, 5, temperature=0).tolist() == expected.tolist()
    assert ours.training and ours.model.norm[1].training and not ours.lm_head.training


def test_generate_refuses_what_it_cannot_sample_from():
    ours = tiny()
    ids, mask = prompts()
    for changes, message in (({"temperature": -1.0}, "temperature is -1.0"), ({"top_p": 0.0}, "top_p is 0.0"),
                             ({"max_new_tokens": 0}, "max_new_tokens is 0"),
                             ({"attention_mask": mask.flip(1)}, "padded on the left"),
                             ({"attention_mask": mask[:, 1:]}, "one shape")):
        with pytest.raises(ValueError, match=message):
            generate(ours, **({"input_ids": ids, "attention_mask": mask, "max_new_tokens": 3} | changes))
    with torch.no_grad():
        ours.lm_head.weight[5, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="response token 0 are NaN"):
        generate(ours, ids, mask, 3)


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("variant", VARIANTS)
def test_folders_of_transformers_load_with_equal_logits(variant, tmp_path):
    ours = tiny(**VARIANTS[variant])
    theirs = in_transformers(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = Llama.from_pretrained(tmp_path / "theirs")
    ids, mask = prompts()
    assert torch.equal(loaded(ids, mask), ours(ids, mask)) and not loaded.training
    assert loaded.config == ours.config


def test_sharded_and_bin_folders_load(tmp_path):
    ours = tiny()
    theirs = in_transformers(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text((tmp_path / "ours" / "config.json").read_text())
    tensors = ours.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin")
    for folder in ("shards", "bin"):
        loaded = Llama.from_pretrained(tmp_path / folder).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in ours.state_dict().items())


def test_dtype_is_the_stored_one_unless_asked(tmp_path):
    tiny().to(torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {p.dtype for p in Llama.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in Llama.from_pretrained(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


def test_a_tied_head_is_stored_once_and_stays_tied(tmp_path):
    tiny(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = Llama.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_config_json_of_transformers_4_and_5_are_read_alike():
    old = {"model_type": "llama", "rope_theta": 5000.0, "rope_scaling": dict(LLAMA3), "use_cache": True}
    new = {"model_type": "llama", "rope_parameters": LLAMA3 | {"rope_theta": 5000.0}}
    expected = LlamaConfig(rope_theta=5000.0, rope_scaling=LLAMA3)
    assert LlamaConfig.from_dict(old) == LlamaConfig.from_dict(new) == expected
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    assert LlamaConfig.from_dict(plain) == LlamaConfig(rope_theta=500.0)
    several_ends = LlamaConfig(eos_token_id=[128001, 128009], rope_scaling=LLAMA3)
    assert LlamaConfig.from_dict(several_ends.to_dict()) == several_ends


def test_a_pad_id_of_minus_1_means_none():
    assert LlamaConfig.from_dict({"model_type": "llama", "pad_token_id": -1}).pad_token_id is None


def test_published_shapes_have_the_published_parameter_counts():
    from bench.shapes import SHAPES

    published = {"llama-7b": 6738415616, "llama-13b": 13015864320, "tinyllama-1b": 1100048384,
                 "smollm2-135m": 134515008, "llama3-8b": 8030261248, "llama3-70b": 70553706496}
    for name, count in published.items():
        with torch.device("meta"):
            built = Llama(SHAPES[name]())
        assert sum(parameter.numel() for parameter in built.parameters()) == count, name


@pytest.mark.parametrize("field, value, message", [
    ("num_attention_heads", 5, "hidden_size 4096 must be a multiple of num_attention_heads 5"),
    ("num_key_value_heads", 3, "num_attention_heads 32 must be a multiple of num_key_value_heads 3"),
    ("head_dim", 7, "head_dim 7 must be even"),
    ("hidden_act", "gelu", "hidden_act 'gelu' is not supported"),
    ("rope_scaling", {"rope_type": "longrope", "factor": 2.0}, "rope_scaling type 'longrope' is not supported"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}, "rope_scaling of type 'yarn' with mscale"),
    ("rope_scaling", {"rope_type": "yarn"}, "lacks factor"),
    ("rope_scaling", {"rope_type": "linear"}, "lacks factor"),
    ("model_type", "gemma", "model_type 'gemma' is not supported"),
])
def test_configurations_that_would_compute_something_else_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict({field: value})


def test_broken_folders_are_named_file_and_tensor(tmp_path):
    ours = tiny()
    name, file = "model.layers.1.mlp.up_proj.weight", tmp_path / "model.safetensors"

    def reloading(change):
        ours.save_pretrained(tmp_path)
        change(tensors := load_file(file))
        save_file(tensors, file)
        Llama.from_pretrained(tmp_path)

    with pytest.raises(ValueError, match=f"missing tensor {name}"):
        reloading(lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match="model.safetensors: unexpected tensor extra"):
        reloading(lambda tensors: tensors.update(extra=torch.ones(1)))
    with pytest.raises(ValueError, match=rf"model.safetensors: tensor {name} has shape \(48, 31\).*\(48, 32\)"):
        reloading(lambda tensors: tensors.update({name: torch.ones(48, 31)}))


def test_truncated_and_absent_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        Llama.from_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors: cannot be read"):
        Llama.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        Llama.from_pretrained(tmp_path)
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="model-00001-of-00002.safetensors"):
        Llama.from_pretrained(tmp_path)


def test_a_failed_write_leaves_the_last_good_file(tmp_path, monkeypatch):
    tiny(seed=0).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def disk_full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(model_module, "save_file", disk_full)
    with pytest.raises(OSError, match="no space"):
        tiny(seed=1).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


# -------------------------------------------------------------------------------------------------------------- value


def test_the_value_model_starts_at_zero_and_learns_in_float32():
    backbone = tiny().to(torch.bfloat16)
    backbone.lm_head = None  # its output layer is never computed
    value = ValueModel(backbone)
    ids, mask = prompts()
    values = value(ids, mask)
    assert values.shape == ids.shape and values.dtype == torch.float32 and not values.any()
    assert value.head.weight.dtype == torch.float32 and value.head.weight.shape == (1, 32)
    (values - 1).square().mean().backward()
    assert value.head.weight.grad.abs().sum() > 0 and value.head.bias.grad.item() == pytest.approx(-2)
