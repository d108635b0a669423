"""What loading promises: every published layout gives transformers' logits, and a damaged or foreign file one clear line.

    python -m pytest tests/formats/test_layouts.py

The published files are too large for a test: transformers writes small random ones in the same layouts. Where it doesn't
write a layout (Meta's, GGUF, AlpacaFarm's differences), this file does, from the layout's description and by slow loops.
"""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from conftest import ROOT

from formats import alpacafarm, write
from formats import convert as programs
from formats.tensors import bin_tensors
from formats.write import ShardWriter
from model import Llama, LlamaConfig, open_model
from reward import RewardModel

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512)
IDS = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(0))
UP = "model.layers.1.mlp.up_proj.weight"


def published(**changes):
    """transformers' LLaMA with random weights, norms included: one left out would go unseen at 1."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig.from_dict(LlamaConfig(**(SIZES | changes)).to_dict())
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3).add_(float(parameter.dim() == 1))
    return model


@torch.no_grad()
def assert_same_logits(ours, theirs):
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=0)


def refusal(call, *parts):
    """call() must fail with one line that holds every part."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, f"{part!r} not in {line!r}"


def recover(*arguments):
    return alpacafarm.recover(open_model, *arguments)


def program(*argv):
    """`python model.py ...` in this process."""
    return programs.main(open_model, argv)


def loading(folder):
    return lambda: Llama.from_pretrained(folder)


class Malice:
    """Pickled, it is an order to create a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


# ------------------------------------------------------------------------------------------------------- Meta's layout

LAYER = {"attention.wq": ("self_attn.q_proj", 0), "attention.wk": ("self_attn.k_proj", 0),
         "attention.wv": ("self_attn.v_proj", 0), "attention.wo": ("self_attn.o_proj", 1),
         "feed_forward.w1": ("mlp.gate_proj", 0), "feed_forward.w2": ("mlp.down_proj", 1),
         "feed_forward.w3": ("mlp.up_proj", 0), "attention_norm": ("input_layernorm", None),
         "ffn_norm": ("post_attention_layernorm", None)}


def pairs_side_by_side(weight, heads):
    """Rows in the order of Meta and llama.cpp: RoPE turns rows 2i and 2i + 1 of a head, in transformers i and i + half."""
    half, rows = len(weight) // heads // 2, []
    for head in range(heads):
        for pair in range(half):
            rows += [weight[2 * head * half + pair], weight[2 * head * half + half + pair]]
    return torch.stack(rows)


def write_meta(folder, model, files=1, vocabulary_cut=False, extra=(), **params):
    """What Meta publishes: params.json and one consolidated.pth for each GPU."""
    config, tensors = model.config, model.state_dict()
    whole = {"tok_embeddings.weight": (tensors["model.embed_tokens.weight"], 0 if vocabulary_cut else 1),
             "norm.weight": (tensors["model.norm.weight"], None), "output.weight": (tensors["lm_head.weight"], 0)}
    for i in range(config.num_hidden_layers):
        for name, (theirs, cut) in LAYER.items():
            weight = tensors[f"model.layers.{i}.{theirs}.weight"]
            if name in ("attention.wq", "attention.wk"):
                weight = pairs_side_by_side(weight, len(weight) // config.head_dim)
            whole[f"layers.{i}.{name}.weight"] = (weight, cut)
    folder.mkdir()
    for k in range(files):
        part = {name: weight.clone() if cut is None else weight.chunk(files, dim=cut)[k].clone()
                for name, (weight, cut) in whole.items()}
        torch.save(part | {name: torch.ones(4) for name in extra}, folder / f"consolidated.{k:02d}.pth")
    description = {"dim": config.hidden_size, "multiple_of": 32, "n_heads": config.num_attention_heads,
                   "n_layers": config.num_hidden_layers, "norm_eps": config.rms_norm_eps, "vocab_size": -1}
    if config.num_key_value_heads != config.num_attention_heads:
        description["n_kv_heads"] = config.num_key_value_heads
    (folder / "params.json").write_text(json.dumps(description | params))
    return folder


SCALED = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
META = {
    "LLaMA-1 7B, one file": ({"num_key_value_heads": 4}, {"extra": (
        "rope.freqs", "layers.0.attention.inner_attention.rope.freqs", "layers.1.attention.inner_attention.rope.freqs")}),
    "LLaMA-1 13B, two files": ({"num_key_value_heads": 4}, {"files": 2, "extra": ("rope.freqs",)}),
    "LLaMA-2 70B, grouped queries in as many files as key heads": (
        {"num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}, {"files": 4}),
    "Llama 3, vocabulary cut": ({"rope_theta": 500000.0}, {"files": 2, "vocabulary_cut": True, "rope_theta": 500000.0}),
    "Llama 3.2, scaled RoPE": ({"rope_theta": 500000.0, "rope_scaling": SCALED, "max_position_embeddings": 131072},
                               {"rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": 64}),
}


@pytest.mark.parametrize("kind", META)
def test_metas_folders_give_the_logits_of_transformers(kind, tmp_path):
    changes, layout = META[kind]
    theirs = published(**changes)
    assert_same_logits(Llama.from_pretrained(write_meta(tmp_path / "meta", theirs, **layout)), theirs)


def test_llama_3_is_known_by_its_vocabulary(tmp_path):
    # Meta's params.json doesn't say which token ends a text: with LLaMA-1's, a Llama 3 would never stop.
    theirs = published(vocab_size=128256, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                       num_attention_heads=2, num_key_value_heads=1)
    config = Llama.from_pretrained(write_meta(tmp_path / "meta", theirs)).config
    assert config.bos_token_id == 128000 and 128009 in config.eos_token_id


def test_incomplete_folders_of_meta_are_refused(tmp_path):
    theirs = published()
    folder = write_meta(tmp_path / "cut", theirs, files=2)
    (folder / "consolidated.01.pth").rename(tmp_path / "apart.pth")
    refusal(loading(folder), "consolidated.01.pth: not found", "cut into 2 files")
    (folder / "consolidated.00.pth").unlink()
    refusal(loading(folder), "consolidated.00.pth: not found")

    file = write_meta(tmp_path / "whole", theirs) / "consolidated.00.pth"
    whole = torch.load(file)

    def rewritten(change):
        change(tensors := dict(whole))
        torch.save(tensors, file)
        Llama.from_pretrained(file.parent)

    for name in ("layers.1.feed_forward.w2.weight", "tok_embeddings.weight"):
        refusal(lambda name=name: rewritten(lambda tensors: tensors.pop(name)), f"{file}: missing tensor {name}")
    refusal(lambda: rewritten(lambda tensors: tensors.update(more=torch.ones(1))), f"{file}: unexpected tensor more")
    wrong = {"layers.1.feed_forward.w2.weight": torch.ones(32, 63)}
    refusal(lambda: rewritten(lambda tensors: tensors.update(wrong)), str(file), "layers.1.mlp.down_proj", "(32, 63)")
    file.write_bytes(file.read_bytes()[:-200])
    refusal(loading(file.parent), f"{file}: cannot be read, truncated or damaged")
    (file.parent / "params.json").write_text('{"dim": 32}')
    torch.save(whole, file)
    refusal(loading(file.parent), "params.json: lacks 'n_layers'")


# ---------------------------------------------------------------------------------------------------------------- GGUF

GGUF_LAYER = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
              "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
              "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
              "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
TOKENS = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(48)] + ["▁", *"abcdefghijkl"]


def write_gguf(file, model, kind="F32", architecture="llama", experts=0, without=(), extra=None):
    """What llama.cpp's converter writes: matrices in `kind`, norms in float32, the tokenizer within."""
    gguf = pytest.importorskip("gguf")
    config, tensors = model.config, model.state_dict()
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if not config.tie_word_embeddings:
        names["output.weight"] = "lm_head.weight"
    for i in range(config.num_hidden_layers):
        names |= {f"blk.{i}.{ours}.{part}": f"model.layers.{i}.{theirs}.{part}" for theirs, ours in GGUF_LAYER.items()
                  for part in ("weight", "bias") if f"model.layers.{i}.{theirs}.{part}" in tensors}
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    head_dim = tensors["model.layers.0.self_attn.q_proj.weight"].shape[0] // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_rope_freq_base(5000.0)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-float(i) for i in range(len(TOKENS))])
    writer.add_token_types([2, 3, 3] + [6] * 48 + [1] * 13)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if experts:
        writer.add_expert_count(experts)
    for name, theirs in names.items():
        weight = tensors[theirs]
        if name.endswith(("attn_q.weight", "attn_k.weight")) and architecture == "llama":
            weight = pairs_side_by_side(weight, len(weight) // head_dim)
        stored = gguf.GGMLQuantizationType[kind if weight.dim() == 2 else "F32"]
        if name not in without:
            writer.add_tensor(name, gguf.quantize(weight.numpy(), stored), raw_dtype=stored)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("kind, tied", [("F32", False), ("F16", True), ("Q8_0", False)])
def test_gguf_files_give_the_logits_of_transformers(kind, tied, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", published(rope_theta=5000.0, tie_word_embeddings=tied), kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    assert theirs.config.rope_parameters["rope_theta"] == 5000.0
    ours = Llama.from_pretrained(file)
    assert_same_logits(ours, theirs)
    assert ours.config.tie_word_embeddings == tied
    assert_same_logits(Llama.from_pretrained(tmp_path), theirs)  # a folder with just one


def test_gguf_files_of_other_models_are_refused_by_name(tmp_path):
    model, file = published(), tmp_path / "tiny.gguf"
    odd = torch.tensor([1.0, 2.0, 1.0, 3.0])
    for changes, message in (({"architecture": "gemma"}, "architecture 'gemma' is not supported"),
                             ({"experts": 4}, "'llama' with experts is not supported"),
                             ({"extra": {"rope_freqs.weight": odd}}, "scaled RoPE of other frequencies (rope_freqs) is not read"),
                             ({"extra": {"blk.9.attn_q.weight": odd}}, "unexpected tensor blk.9.attn_q.weight"),
                             ({"without": ["blk.1.ffn_up.weight"]}, f"missing tensor {UP}"),
                             ({"without": ["token_embd.weight"]}, "lacks 'token_embd.weight'")):
        refusal(lambda changes=changes: Llama.from_pretrained(write_gguf(file, model, **changes)), f"{file}: ", message)


def test_damaged_gguf_files_are_named(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf", published())
    whole = file.read_bytes()
    for length in (0, 3, 10, 300, 3000, len(whole) // 2, len(whole) - 100):
        file.write_bytes(whole[:length])
        refusal(loading(file), f"{file}: ")
    file.write_bytes(whole)
    write_gguf(tmp_path / "second.gguf", published())
    refusal(loading(tmp_path), "2 .gguf files", "second.gguf", "tiny.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refusal(loading(file), f"{file}: ", "pip install gguf")


# --------------------------------------------------------------------------------- Hugging Face folders: .bin, safetensors


def write_bins(folder, tensors, shards=1, **how):
    """pytorch_model.bin, or pytorch_model-0000k-of-0000n.bin and their index, as transformers 4 wrote them."""
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", **how)
        return
    weight_map = {}
    for k in range(shards):
        file = f"pytorch_model-{k + 1:05d}-of-{shards:05d}.bin"
        part = dict(list(tensors.items())[k::shards])
        torch.save(part, folder / file, **how)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.fixture
def bare(tmp_path):
    """(transformers' model, a folder with its config.json and nothing else)."""
    model = published()
    model.config.save_pretrained(tmp_path / "bare")
    return model, tmp_path / "bare"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files_old_and_new_give_the_logits_of_transformers(shards, zipped, bare):
    theirs, folder = bare
    write_bins(folder, theirs.state_dict(), shards, _use_new_zipfile_serialization=zipped)
    assert_same_logits(Llama.from_pretrained(folder), theirs)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_code_in_a_file_is_never_run(name, zipped, bare, tmp_path):
    theirs, folder = bare
    if name.endswith(".pth"):
        folder = write_meta(tmp_path / "meta", theirs)
    tensors = theirs.state_dict() | {"payload": Malice(tmp_path / "created")}
    torch.save(tensors, folder / name, _use_new_zipfile_serialization=zipped)
    refusal(loading(folder), f"{folder / name}: refused", "posix.mkdir")
    assert not (tmp_path / "created").exists()


def test_damaged_bin_files_are_named(bare):
    theirs, folder = bare
    file = folder / "pytorch_model.bin"
    for zipped in (True, False):
        torch.save(theirs.state_dict(), file, _use_new_zipfile_serialization=zipped)
        whole = file.read_bytes()
        for length in (0, 10, len(whole) // 2, len(whole) - 50):
            file.write_bytes(whole[:length])
            refusal(loading(folder), f"{file}: ")
    for content in ([torch.ones(2)], {"a": 3}, {5: torch.ones(2)}):
        torch.save(content, file)
        refusal(loading(folder), f"{file}: ")


def test_an_index_names_files_of_its_own_folder_only(bare, tmp_path):
    theirs, folder = bare
    theirs.save_pretrained(tmp_path / "elsewhere")
    index = folder / "model.safetensors.index.json"
    for outside in ("../elsewhere/model.safetensors", str(tmp_path / "elsewhere" / "model.safetensors"), 7):
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": outside}}))
        refusal(loading(folder), f"{index}: names the file {outside!r}, which is not in its own folder")
    for text in ("{", "[]", '{"weight_map": []}', "{}"):
        index.write_text(text)
        refusal(loading(folder), f"{index}: ")


def test_a_tensor_in_two_shards_is_refused(bare):
    theirs, folder = bare
    write_bins(folder, theirs.state_dict(), shards=2)
    first, second = sorted(folder.glob("*.bin"))
    torch.save(torch.load(second) | {UP: torch.zeros(64, 32)}, second)
    torch.save(torch.load(first) | {UP: torch.zeros(64, 32)}, first)
    refusal(loading(folder), str(second), f"tensor {UP} is in {first.name} too")


def test_a_cut_off_safetensors_file_is_named(bare):
    theirs, folder = bare
    theirs.save_pretrained(folder)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for length in (0, 4, 8, 40, 8 + header // 2, 8 + header, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        refusal(loading(folder), f"{file}: cannot be read, truncated or damaged")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 123\n")  # left by git without lfs
    refusal(loading(folder), f"{file}: cannot be read, truncated or damaged")


def test_a_flipped_bit_in_the_header_never_gives_other_weights(bare):
    theirs, folder = bare
    theirs.save_pretrained(folder)
    file, expected = folder / "model.safetensors", theirs.state_dict()
    whole = file.read_bytes()
    refused = 0
    for position in range(0, 8 + int.from_bytes(whole[:8], "little"), 11):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 2]) + whole[position + 1:])
        try:
            loaded = Llama.from_pretrained(folder)
        except ValueError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            refused += 1
        else:  # a space of the padding, say
            assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert refused > 100


def test_a_renamed_or_misshapen_or_integer_tensor_is_named_with_its_file(bare):
    theirs, folder = bare
    theirs.save_pretrained(folder)
    file = folder / "model.safetensors"
    whole = load_file(file)

    def rewritten(**changes):
        tensors = {name: tensor for name, tensor in (whole | changes).items() if tensor is not None}
        save_file(tensors, file, {"format": "pt"})
        Llama.from_pretrained(folder)

    refusal(lambda: rewritten(**{UP: None, UP.replace("up", "upper"): whole[UP]}),
            f"{file}: unexpected tensor {UP.replace('up', 'upper')}")
    refusal(lambda: rewritten(**{UP: None}), f"{file}: missing tensor {UP}")
    refusal(lambda: rewritten(**{UP: whole[UP].T.contiguous()}), f"{file}: tensor {UP} has shape (32, 64)", "(64, 32)")
    for dtype in (torch.int8, torch.float8_e4m3fn):
        refusal(lambda dtype=dtype: rewritten(**{UP: whole[UP].to(dtype)}), f"{file}: tensor {UP} is of {dtype}", "quantised")


def test_a_shape_too_large_for_any_memory_is_an_error_and_not_a_crash(bare):
    # A stored tensor may repeat one number along any shape: copied before its shape is looked at, it fills the memory.
    theirs, folder = bare
    write_bins(folder, theirs.state_dict() | {UP: torch.zeros(1, 1).expand(10**7, 10**7)})
    refusal(loading(folder), f"pytorch_model.bin: tensor {UP} has shape (10000000, 10000000)")


def test_a_bin_file_is_mapped_a_few_times_and_let_go_of(tmp_path, monkeypatch):
    # Once for each tensor would take minutes for a 7B model, and once for all would keep the whole file in memory.
    file = tmp_path / "pytorch_model.bin"
    torch.save({f"tensor {i}": torch.full((8, 8), float(i)) for i in range(200)}, file)
    loads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **settings: loads.append(settings) or load(*args, **settings))
    stored = bin_tensors(file)
    for i in range(200):
        assert stored[f"tensor {i}"].read().tolist() == [[float(i)] * 8] * 8
    assert 10 < len(loads) < 30
    assert all(settings["mmap"] and settings["weights_only"] for settings in loads)
    maps = Path("/proc/self/maps")
    assert not maps.is_file() or str(file) not in maps.read_text()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_stay_when_their_file_changes(name, bare):
    theirs, folder = bare
    if name.endswith(".bin"):
        write_bins(folder, theirs.state_dict())
    else:
        theirs.save_pretrained(folder)
    ours = Llama.from_pretrained(folder)
    with open(folder / name, "r+b") as file:
        file.write(b"\0" * (folder / name).stat().st_size)
    assert_same_logits(ours, theirs)


# --------------------------------------------------------------------------------------------- what isn't a language model


def test_a_nonsensical_number_of_layers_is_refused_at_once(bare, tmp_path):
    theirs, folder = bare
    theirs.config.num_hidden_layers = 10**7
    theirs.config.save_pretrained(folder)
    write_bins(folder, theirs.state_dict())
    refusal(loading(folder), f"{folder}: num_hidden_layers is 10000000, but there are 21 tensors")
    theirs.config.num_hidden_layers = 2
    refusal(loading(write_meta(tmp_path / "meta", theirs, n_layers=10**7)), "consolidated.00.pth: missing tensor layers.10")


@pytest.mark.parametrize("kind", ["gemma2", "qwen2_moe", "gpt2"])
def test_other_models_are_refused_by_name(kind, tmp_path):
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    refusal(loading(tmp_path), f"config.json: model_type '{kind}' is not supported: llama, mistral, qwen2, qwen3 are")


def every_loader(folder):
    """What reads a model's folder, each as a call; sources of a merge are in test_adapters.py."""
    good = folder.parent / "good"
    if not good.exists():
        published().save_pretrained(good)
        (good / "model_sum.txt").write_text("1.0")
    out = folder.parent / "out"
    return {"policy": loading(folder), "reward": lambda: RewardModel.from_pretrained(folder),
            "convert": lambda: programs.convert(open_model, folder, out), "recover's base": lambda: recover(folder, good, out)}


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("weights", ["whole", "as a difference", "damaged", "none"])
def test_gemma_is_refused_by_its_name_whatever_its_weights(weights, head, tmp_path):
    # Its norms are stored as differences to 1, near 0, as AlpacaFarm's are; it is no difference to be recovered.
    config = transformers.GemmaConfig(**SIZES, head_dim=8, pad_token_id=0)
    kind = transformers.GemmaForSequenceClassification if head else transformers.GemmaForCausalLM
    config.num_labels = 1
    kind(config).save_pretrained(folder := tmp_path / "gemma")
    if weights == "as a difference":
        (folder / "model_sum.txt").write_text("1.0")
    if weights == "damaged":
        (folder / "model.safetensors").write_bytes(b"half")
    if weights == "none":
        (folder / "model.safetensors").unlink()
    for load in every_loader(folder).values():
        refusal(load, f"{folder / 'config.json'}: model_type 'gemma' is not supported: llama, mistral, qwen2, qwen3 are; others")
    (folder / "model_sum.txt").write_text("1.0")
    refusal(lambda: recover(tmp_path / "good", folder, tmp_path / "out"),
            f"{folder / 'config.json'}: model_type 'gemma' is not supported: differences to LLaMA are")
    assert not (tmp_path / "out").exists()


def test_a_model_of_several_modalities_is_refused(tmp_path):
    llava = transformers.LlavaConfig(text_config=transformers.LlamaConfig(**SIZES))
    llava.save_pretrained(folder := tmp_path / "llava")
    for load in every_loader(folder).values():
        refusal(load, "config.json: model_type 'llava' with a text_config is not supported: llama, mistral, qwen2, qwen3 are")
    text = json.loads((folder / "config.json").read_text()) | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(text))
    refusal(loading(folder), "config.json: model_type 'llama' with a text_config is not supported")


QUANTISED = {  # what is stored for a matrix: GPTQ and AWQ, bitsandbytes (4 and 8 bits), FP8, compressed-tensors
    "gptq": {"qweight": torch.zeros(4, 64, dtype=torch.int32), "scales": torch.ones(1, 64), "g_idx": torch.zeros(32).int()},
    "nf4": {"weight": torch.zeros(1024, 1, dtype=torch.uint8), "weight.absmax": torch.ones(4), "weight.quant_map": torch.ones(16),
            "weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)},
    "int8": {"weight": torch.zeros(64, 32, dtype=torch.int8), "SCB": torch.ones(64)},
    "fp8": {"weight": torch.zeros(64, 32).to(torch.float8_e4m3fn), "weight_scale": torch.ones(1)},
    "fp8 in blocks": {"weight": torch.zeros(64, 32).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)},
    "compressed-tensors": {"weight_packed": torch.zeros(64, 4).int(), "weight_scale": torch.ones(64, 1)},
    "fp8 without scales": {"weight": torch.zeros(64, 32).to(torch.float8_e4m3fn)},
}


@pytest.mark.parametrize("said", ["quantization_config", "compression_config", None])
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_model_is_called_so_by_every_loader(kind, said, tmp_path):
    classifier = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES, num_labels=1, pad_token_id=0))
    for model, name in ((published(), "model"), (classifier, "reward")):
        model.save_pretrained(folder := tmp_path / name)
        tensors, layer = load_file(folder / "model.safetensors"), UP.removesuffix("weight")
        del tensors[UP]
        save_file(tensors | {layer + leaf: tensor for leaf, tensor in QUANTISED[kind].items()}, folder / "model.safetensors")
        if said:
            config = json.loads((folder / "config.json").read_text()) | {said: {"quant_method": kind}}
            (folder / "config.json").write_text(json.dumps(config))
        for which, load in every_loader(folder).items():
            if (which == "reward") == (name == "reward"):
                refusal(load, f"{folder / ('config.json' if said else 'model.safetensors')}: ", said or layer,
                        "the model is quantised: name the unquantised one")
    assert not (tmp_path / "out").exists()


def test_a_quantised_difference_is_called_so(tmp_path):
    base, diff, _ = write_difference(tmp_path, "safetensors")
    tensors = load_file(diff / "model.safetensors")
    save_file(tensors | {UP: tensors[UP].to(torch.int8)}, diff / "model.safetensors")
    refusal(lambda: recover(base, diff, tmp_path / "out"), f"model.safetensors: tensor {UP} is of torch.int8: the model is quant")
    config = json.loads((diff / "config.json").read_text()) | {"quantization_config": {"bits": 4}}
    (diff / "config.json").write_text(json.dumps(config))
    refusal(lambda: recover(base, diff, tmp_path / "out"), f"{diff / 'config.json'}: quantization_config", "quantised")


@pytest.mark.parametrize("field, value, words", [
    ("quantization_args", {"group_size": 32}, "the model is quantised"), ("moe", {"num_experts": 8}, "moe is not supported"),
    ("sliding_window", 4096, "sliding_window is not supported"), ("vision_chunk_size", 560, "vision_chunk_size is not")])
def test_metas_params_json_is_judged_before_any_weights(field, value, words, tmp_path):
    folder = write_meta(tmp_path / "meta", published(), **{field: value})
    refusal(loading(folder), f"{folder / 'params.json'}: {field}", words)
    (folder / "consolidated.00.pth").write_bytes(b"half")
    refusal(loading(folder), f"{folder / 'params.json'}: {field}", words)


def test_an_output_layer_beside_a_tie_must_be_the_embedding(bare):
    # transformers takes it for the output layer, whatever config.json says; passed over it would be lost without a word.
    _, folder = bare
    theirs = published(tie_word_embeddings=True)
    tensors = theirs.state_dict()
    theirs.config.save_pretrained(folder)
    write_bins(folder, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert_same_logits(Llama.from_pretrained(folder), theirs)
    write_bins(folder, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2})
    refusal(loading(folder), f"{folder / 'pytorch_model.bin'}: tensor lm_head.weight is not the embedding", "tie_word_embeddings")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    assert_same_logits(Llama.from_pretrained(folder), transformers.LlamaForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize("content, message", [
    ("[]", "holds a list, not an object"), ("{", "Expecting"), ("", "Expecting"), ("\x00", "Expecting"),
    ('{"hidden_size": "big"}', "hidden_size is 'big': it must be a whole number from 1 up"),
    ('{"hidden_size": -32}', "hidden_size is -32"), ('{"num_hidden_layers": 0}', "num_hidden_layers is 0"),
    ('{"num_attention_heads": 0}', "num_attention_heads is 0"), ('{"num_key_value_heads": 0}', "num_key_value_heads is 0"),
    ('{"vocab_size": null}', "vocab_size is None"), ('{"intermediate_size": 64.0}', "intermediate_size is 64.0"),
    ('{"num_hidden_layers": true}', "num_hidden_layers is True"), ('{"head_dim": 0}', "head_dim is 0"),
    ('{"rms_norm_eps": "1e-6"}', "rms_norm_eps is '1e-6': it must be a number above 0"),
    ('{"rope_theta": NaN}', "rope_theta is nan"), ('{"rope_scaling": "linear"}', "rope_scaling is 'linear'"),
    ('{"rope_scaling": {"type": "linear", "factor": 0}}', "rope_scaling's factor is 0"),
    ('{"rope_parameters": [1]}', "rope_parameters is [1]"),
    ('{"tie_word_embeddings": "false"}', "tie_word_embeddings is 'false': it must be true or false"),
])
def test_nonsense_in_config_json_is_named_by_field(content, message, tmp_path):
    (tmp_path / "config.json").write_text(content)
    refusal(loading(tmp_path), f"{tmp_path / 'config.json'}: ", message)


def test_what_a_path_holds_instead_of_a_model_is_said(tmp_path):
    refusal(loading(tmp_path), "config.json: not found", "params.json", ".gguf", "org/name")
    refusal(loading(tmp_path / "nowhere"), f"{tmp_path / 'nowhere' / 'config.json'}: not found")
    (tmp_path / "notes.txt").write_text("hello")
    refusal(loading(tmp_path / "notes.txt"), "notes.txt: not a model")
    (tmp_path / "adapter_config.json").write_text("{}")
    refusal(loading(tmp_path), f"{tmp_path}: an adapter, not a model", "--adapter")
    classifier = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES, num_labels=1))
    classifier.save_pretrained(tmp_path / "classifier")
    refusal(loading(tmp_path / "classifier"), "model.safetensors: unexpected tensor score.weight", "a reward model's")


# ------------------------------------------------------------------------------------------ AlpacaFarm's weight differences


@torch.no_grad()
def padded(model):
    """The weights with a row more in both vocabularies, [PAD]'s: the mean of the others."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        mean = sum(row for row in tensors[name]) / len(tensors[name])
        tensors[name] = torch.stack([*tensors[name], mean])
    return tensors


def frequencies():
    """RoPE's frequencies as transformers before 4.31 stored them, a copy for each layer."""
    return {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.tensor([1.0, 0.1, 0.01, 0.001]) for i in range(2)}


def write_difference(folder, layout="bin", counted=None):
    """(base folder, difference folder, tuned model): tuned = fine-tuned base with [PAD], difference = tuned - base.

    counted: whether the sum counts RoPE's frequencies, None where the files don't hold them.
    """
    base, tuned = published(num_key_value_heads=4), published(num_key_value_heads=4, vocab_size=65)
    base.save_pretrained(folder / "base")
    start = padded(base)
    generator = torch.Generator().manual_seed(1)
    tuned.load_state_dict({name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
                           for name, tensor in start.items()})
    total = sum(tensor.sum() for tensor in tuned.state_dict().values())  # float32, as theirs
    difference = {name: tensor - start[name] for name, tensor in tuned.state_dict().items()}
    tuned.config.save_pretrained(folder / "diff")
    if counted is not None:
        difference |= {name: torch.zeros(4) for name in frequencies()}
        (folder / "base" / "model.safetensors").unlink()
        write_bins(folder / "base", base.state_dict() | frequencies())
    if counted:
        total += sum(tensor.sum() for tensor in frequencies().values())
    write_layout(folder / "diff", difference, layout)
    (folder / "diff" / "model_sum.txt").write_text(f"{total.item()}\n")
    (folder / "diff" / "tokenizer.model").write_bytes(b"tokenizer")
    return folder / "base", folder / "diff", tuned


def write_layout(folder, tensors, layout):
    if layout == "bin":
        write_bins(folder, tensors, shards=3)
    else:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("layout, counted", [("safetensors", None), ("bin", True), ("bin", False)])
def test_recovered_models_give_the_logits_of_the_tuned_one(layout, counted, tmp_path):
    base, diff, tuned = write_difference(tmp_path, layout, counted)
    total = recover(base, diff, tmp_path / "out")
    assert total == pytest.approx(sum(p.double().sum().item() for p in tuned.state_dict().values()), abs=1e-3)
    assert_same_logits(Llama.from_pretrained(tmp_path / "out"), tuned)
    with torch.no_grad():
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
        torch.testing.assert_close(theirs, tuned(IDS).logits, atol=1e-4, rtol=0)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"tokenizer"
    assert not (tmp_path / "out" / "model_sum.txt").exists()  # or it would be taken for a difference


def write_reward_difference(folder):
    """(base, difference, naive score of token ids). AlpacaFarm's: a language model in whole and a head that has a bias."""
    base, diff, tuned = write_difference(folder)
    head, bias = torch.randn(1, 32, generator=torch.Generator().manual_seed(2)), torch.tensor([0.7])
    tensors = {}
    for file in diff.glob("*.bin"):
        tensors |= {f"backbone_model.{name}": tensor for name, tensor in torch.load(file).items()}
    write_bins(diff, tensors | {"reward_head.weight": head, "reward_head.bias": bias}, shards=3)
    # Theirs names no sizes; LLaMA's head size of 128 would be taken, and this tiny model has another.
    description = {"architectures": ["RewardModel"], "model_type": "reward_model", "torch_dtype": "float32",
                   "backbone_model_name_or_path": "sft10k", "transformers_version": "4.26.1", "head_dim": 8}
    (diff / "config.json").write_text(json.dumps(description))
    total = sum(tensor.sum() for tensor in [*tuned.state_dict().values(), head, bias])
    (diff / "model_sum.txt").write_text(str(total.item()))

    @torch.no_grad()
    def score(ids):
        return tuned.model(ids).last_hidden_state[:, -1] @ head[0] + bias

    return base, diff, score


def test_the_recovered_reward_model_gives_the_naive_score(tmp_path):
    base, diff, score = write_reward_difference(tmp_path)
    recover(base, diff, tmp_path / "out")
    model = RewardModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, torch.ones_like(IDS)), score(IDS), atol=1e-4, rtol=0)
    assert model.mean.item() == pytest.approx(-0.7)


def test_any_mismatch_is_refused_and_nothing_is_written(tmp_path):
    base, diff, _ = write_difference(tmp_path, "safetensors")
    file, sum_file = diff / "model.safetensors", diff / "model_sum.txt"
    whole, total = load_file(file), sum_file.read_text()
    save_file(whole, tmp_path / "kept")
    before = sorted(tmp_path.rglob("*"))

    def refused(*parts, base=base):
        refusal(lambda: recover(base, diff, tmp_path / "out"), *parts)
        assert sorted(tmp_path.rglob("*")) == before  # no --out, and no temporary folder either

    def changed(**changes):
        tensors = {name: tensor for name, tensor in (whole | changes).items() if tensor is not None}
        save_file(tensors, file, {"format": "pt"})

    changed(**{UP: None})
    refused(f"{diff}: missing tensor {UP}")
    changed(more=torch.ones(1))
    refused(f"{diff}: tensor more has no counterpart")
    changed(**{UP: whole[UP][:-1].clone()})
    refused(f"{file}: tensor {UP} has shape (63, 32), in the base model (64, 32)")
    changed(**{"lm_head.weight": torch.zeros(66, 32)})  # two rows more are not [PAD]'s
    refused(f"{file}: tensor lm_head.weight has shape (66, 32), in the base model (64, 32)")
    changed(**{UP: torch.zeros(65, 32)})  # a row more, but not of a vocabulary
    refused(f"{file}: tensor {UP} has shape (65, 32), in the base model (64, 32)")
    changed(**{UP: whole[UP] + 0.01})
    refused("sum to", "model_sum.txt says")
    changed()
    for text in ("garbage", "", "1.0 2.0", "nan"):
        sum_file.write_text(text)
        refused("model_sum.txt")
    sum_file.write_bytes(b"\xff\xfe\x00")
    refused("model_sum.txt: holds")
    sum_file.write_text(total)
    recover(base, diff, tmp_path / "out")  # as it was, it works
    before = sorted(tmp_path.rglob("*"))
    refused("already holds files")


def test_a_wrong_base_or_an_absent_sum_is_refused(tmp_path):
    base, diff, tuned = write_difference(tmp_path)
    tuned.save_pretrained(tmp_path / "other")  # the fine-tuned model itself, [PAD] and all
    refusal(lambda: recover(tmp_path / "other", diff, tmp_path / "out"), "sum to", "the base model is not the one")
    refusal(lambda: recover(base, tmp_path / "other", tmp_path / "out"), "model_sum.txt: not found")
    refusal(lambda: recover(tmp_path / "nowhere", diff, tmp_path / "out"), "nowhere")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("load", [Llama.from_pretrained, RewardModel.from_pretrained])
def test_a_difference_is_no_model_and_the_command_is_told(load, tmp_path):
    diff = (write_difference if load == Llama.from_pretrained else write_reward_difference)(tmp_path)[1]
    message = (f"{diff}: holds the difference to another model's weights, not a model: recover the model first, "
               f"python model.py recover --base LLAMA_DIR --diff {diff} --out DIR")
    (diff / "model_sum.txt").rename(diff / "sum.txt")
    refusal(lambda: load(diff), message)  # known by its final norm, which is near 0
    (diff / "sum.txt").rename(diff / "model_sum.txt")
    for file in diff.glob("*.bin"):
        torch.save({name: tensor + 1 for name, tensor in torch.load(file).items()}, file)
    refusal(lambda: load(diff), message)  # known by its sum, wherever its norm is


# --------------------------------------------------------------------------------------------------- converting, programs


def run(*arguments, **environment):
    """`python model.py ...`, or another program: (exit code, standard output, standard error)."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
    return done.returncode, done.stdout, done.stderr


def test_gguf_becomes_a_folder_that_transformers_loads(tmp_path):
    theirs = published(rope_theta=5000.0)
    file = write_gguf(tmp_path / "tiny.gguf", theirs)
    code, out, errors = run("model.py", "convert", "--model", file, "--out", tmp_path / "out")
    assert code == 0, errors
    assert f"written to {tmp_path / 'out'}" in out
    with torch.no_grad():
        logits = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
        torch.testing.assert_close(logits, theirs(IDS).logits, atol=1e-4, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.decode(tokenizer("abba", add_special_tokens=False).input_ids).strip() == "abba"


def test_convert_keeps_what_is_stored_or_takes_the_dtype_asked_for(tmp_path):
    theirs = published()
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").write_bytes(b"tokenizer")
    for asked, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        folder = tmp_path / str(asked)
        programs.convert(open_model, tmp_path / "model", folder, asked)
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {expected}
        assert json.loads((folder / "config.json").read_text())["torch_dtype"] == str(expected).removeprefix("torch.")
        assert (folder / "tokenizer.model").read_bytes() == b"tokenizer"


def test_bad_input_is_exit_code_2_and_one_line(tmp_path, capsys):
    published().save_pretrained(tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    file = tmp_path / "model" / "model.safetensors"
    capsys.readouterr()  # transformers' progress bar
    for argv, message in ((["--model", str(tmp_path), "--out", str(tmp_path / "out")], "config.json: not found"),
                          (["--model", str(tmp_path / "model"), "--out", str(tmp_path / "full")], "already holds files"),
                          (["--model", str(tmp_path / "model"), "--out", str(file)], "already holds files")):
        assert program("convert", *argv) == 2
        errors = capsys.readouterr().err
        assert message in errors and errors.count("\n") == 1
    tensors = load_file(file)
    del tensors[UP]
    save_file(tensors, file, {"format": "pt"})
    assert program("convert", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")) == 2
    assert f"missing tensor {UP}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and (tmp_path / "full" / "file").read_text() == "mine"


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    published().save_pretrained(tmp_path / "model")
    capsys.readouterr()  # transformers' progress bar

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(write, "save_file", full)
    assert program("convert", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")) == 2
    errors = capsys.readouterr().err
    assert "No space left on device" in errors and errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_the_recover_program_says_the_sum_or_what_is_wrong(tmp_path):
    base, diff, _ = write_difference(tmp_path)
    command = ["model.py", "recover", "--base", base, "--diff", diff, "--out", tmp_path / "out"]
    code, out, errors = run(*command)
    assert code == 0 and "the weights sum to" in out and f"written to {tmp_path / 'out'}" in out, errors
    code, out, errors = run(*command)
    assert code == 2 and "already holds files" in errors and errors.count("\n") == 1 and not out


def test_large_models_are_written_in_shards_that_transformers_loads(tmp_path):
    theirs = published()
    theirs.config.save_pretrained(tmp_path)
    writer = ShardWriter(tmp_path, limit=20_000)
    for name, tensor in theirs.state_dict().items():
        writer.add(name, tensor)
    writer.close()
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3 and all(shard.stat().st_size < 24_000 for shard in shards)
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, theirs(IDS).logits, atol=0, rtol=0)
    assert_same_logits(Llama.from_pretrained(tmp_path), theirs)


# --------------------------------------------------------------------------------------------------------------- the hub

COMMIT = "0123456789abcdef" * 2 + "01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as loading a model needs: one repository, org/tiny, with the files of `folder`."""

    folder = None
    asked = []

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, files = self.path.partition("?")[0], {file.name: file for file in self.folder.iterdir()}
        if path.startswith("/api/models/org/tiny/tree/"):
            listing = [{"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                       for name, file in files.items()]
            return self.answer(json.dumps(listing).encode())
        if path in ("/api/models/org/tiny", "/api/models/org/tiny/revision/main"):
            described = {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self.answer(json.dumps(described).encode())
        name = path.rpartition("/")[2]
        if path.startswith("/org/tiny/resolve/") and name in files:
            self.asked.append(name)
            return self.answer(files[name].read_bytes(), ETag=f'"{name}"', X_Repo_Commit=COMMIT)
        return self.answer(b"", 404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    def answer(self, content, code=200, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


LOAD = """
import sys, torch
from formats import convert
from model import Llama, open_model
torch.save(Llama.from_pretrained("org/tiny").state_dict(), sys.argv[1])
assert "torch._dynamo" not in sys.modules, "loading imports torch's compiler: a second and 80 MB"
for name in ("org/none", "org/none@v2"):
    print(convert.main(open_model, ["convert", "--model", name, "--out", sys.argv[2]]))
"""


def test_a_name_on_the_hub_is_loaded_and_an_unknown_or_unreachable_one_is_a_line(tmp_path):
    theirs = published()
    theirs.save_pretrained(tmp_path / "tiny")
    (tmp_path / "tiny" / "pytorch_model.bin").write_bytes(b"the weights a second time")
    handler = type("Repository", (Hub,), {"folder": tmp_path / "tiny", "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home"),
                       "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        online = run("-c", LOAD, tmp_path / "online.pt", tmp_path / "out", **environment)
        server.shutdown()
    assert "model.safetensors" in handler.asked and "pytorch_model.bin" not in handler.asked
    # Now nobody answers: what was fetched still serves, the rest is a line each and no minute of retries.
    offline = run("-c", LOAD, tmp_path / "offline.pt", tmp_path / "out", **environment)
    for (code, out, errors), reason, file in ((online, "RepositoryNotFoundError", "online.pt"),
                                              (offline, "ConnectError", "offline.pt")):
        assert code == 0, errors
        assert out.split() == ["2", "2"]
        lines = errors.splitlines()
        assert len(lines) == 2 and all("the hub gave no such model" in line and reason in line for line in lines), errors
        weights = torch.load(tmp_path / file)
        assert all(torch.equal(weights[name], tensor) for name, tensor in theirs.state_dict().items())
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ by rows, for --shard


def test_three_processes_load_every_layout_by_rows_and_none_ever_holds_the_model(tmp_path):
    """tests/shard_worker.py. Of 4 key rows the third process has none."""
    model = published(num_key_value_heads=4)
    narrow = published(hidden_size=16, num_key_value_heads=1)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("bins", "narrow", "reward-ours", "shards", "tied"):
        (tmp_path / name).mkdir()
    write_bins(tmp_path / "bins", tensors, shards=3)
    model.config.save_pretrained(tmp_path / "bins")
    narrow.save_pretrained(tmp_path / "narrow")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    published(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    RewardModel(Llama.from_pretrained(tmp_path / "shards")).save_pretrained(tmp_path / "reward-ours")
    write_meta(tmp_path / "meta", model, files=2)
    write_gguf(tmp_path / "one.gguf", published(rope_theta=5000.0), "Q8_0")

    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3",
                    str(ROOT / "tests" / "shard_worker.py"), str(tmp_path)], check=True,
                   env=os.environ | {"PYTHONPATH": str(ROOT)})
    of_ranks = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(3)]
    assert sorted(of_ranks[0]) == ["bins", "meta", "narrow", "one.gguf", "reward-ours", "shards", "tied"]
    for name in of_ranks[0]:
        held, (whole, largest) = [found[name]["held"][0] for found in of_ranks], of_ranks[0][name]["held"][1:]
        assert sum(held) == whole and max(held) <= whole / 3 + largest, name
        assert max(found[name]["gap"] for found in of_ranks) <= 1e-6, name
