"""What merging on disk promises: PEFT's logits, every layout of the base, one shard in memory, nothing half written."""

import json
import os
import re
import shutil
import subprocess
import sys
import weakref

import peft
import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_lora import IDS, Q, WritesAFile, adapted, edit, released, same, tiny

import formats.write
import lora
from formats import adapters
from lora import load_lora, lora_layers, merge_checkpoint, merge_lora, save_lora
from model import Llama


def write_base(folder, layout="model.safetensors", dtype=torch.float32, **changes):
    """A published model, in one file or two shards, with what lies beside it; a tied lm_head is stored twice."""
    model = tiny(**changes).to(dtype)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md", "adapter.json"):
        (folder / name).write_text("{}")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["lm_head.weight"] = model.lm_head.weight.detach()
    save = torch.save
    if layout.endswith(".safetensors"):
        tensors, save = {name: tensor.clone() for name, tensor in tensors.items()}, save_file
    if layout.startswith("two "):
        stem, _, suffix = layout.removeprefix("two ").partition(".")
        shards = {f"{stem}-0000{i + 1}-of-00002.{suffix}": sorted(tensors)[i::2] for i in range(2)}
        weight_map = {name: shard for shard, names in shards.items() for name in names}
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{layout.removeprefix('two ')}.index.json").write_text(json.dumps(index))
    else:
        shards = {layout: list(tensors)}
    for shard, names in shards.items():
        save({name: tensors[name] for name in names}, folder / shard)
    return folder


def merge(tmp_path, *options):
    """`python lora.py merge` on base, adapter and out in tmp_path."""
    folders = [f"--{name}={tmp_path / name}" for name in ("base", "adapter", "out")]
    return lora.main(["merge", *folders, *options])


def stored(folder):
    """Every tensor of a folder of safetensors, once."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        shard = load_file(file)
        assert not shard.keys() & tensors.keys()
        tensors |= shard
    return tensors


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["model.safetensors", "two model.safetensors", "pytorch_model.bin",
                                    "two pytorch_model.bin"])
def test_a_merged_folder_has_in_transformers_the_logits_of_pefts_own_merge(layout, tied, tmp_path, capsys):
    base = write_base(tmp_path / "base", layout, tie_word_embeddings=tied)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_rslora=tied, init_lora_weights=False)
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    theirs.save_pretrained(tmp_path / "adapter")
    assert merge(tmp_path) == 0
    assert f"wrote {tmp_path / 'out'}: 14 layers merged, 0.1 MB" in capsys.readouterr().out
    merged, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(merged(IDS).logits, theirs.merge_and_unload()(IDS).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(Llama.from_pretrained(tmp_path / "out")(IDS), merged(IDS).logits, atol=1e-4, rtol=1e-4)
    tensors = stored(tmp_path / "out")
    assert ("lm_head.weight" in tensors) is not tied
    beside = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert all((base / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in beside)
    weights = ["model.safetensors"]
    if layout.startswith("two "):
        shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        weights = [*shards, "model.safetensors.index.json"]
        index = json.loads((tmp_path / "out" / weights[2]).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert index["weight_map"] == {name: shard for shard in shards for name in load_file(tmp_path / "out" / shard)}
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(beside + weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_merged_weights_are_those_of_merge_lora_bit_for_bit_and_all_else_is_the_bases(dtype, tmp_path):
    base = write_base(tmp_path / "base", dtype=dtype)
    save_lora(adapted(seed=3), tmp_path / "adapter")
    model = Llama.from_pretrained(base)
    load_lora(model, tmp_path / "adapter")
    expected = {name: tensor for name, tensor in merge_lora(model).state_dict().items() if "lora" not in name}
    assert merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out") == (
        8, sum(tensor.nbytes for tensor in expected.values()))
    before, after = stored(base), stored(tmp_path / "out")
    assert same(after, expected) and {tensor.dtype for tensor in after.values()} == {dtype}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in lora_layers(model)}


def test_dtype_rounds_the_float32_merge_once_and_config_json_says_so(tmp_path):
    base = write_base(tmp_path / "base")
    edit(base / "config.json", torch_dtype="float32", dtype="float32")
    save_lora(adapted(seed=3), tmp_path / "adapter")
    assert merge(tmp_path) == 0
    wide = stored(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "wide")
    assert merge(tmp_path, "--dtype", "bfloat16") == 0
    assert same(stored(tmp_path / "out"), {name: tensor.to(torch.bfloat16) for name, tensor in wide.items()})
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "out"))
    assert after == before | {"torch_dtype": "bfloat16", "dtype": "bfloat16"}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16


def test_an_old_bin_whose_tensors_share_memory_or_are_strided_merges_as_well(tmp_path):
    base = write_base(tmp_path / "base", "pytorch_model.bin")
    tensors = torch.load(base / "pytorch_model.bin")
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"], f"{Q}.weight": tensors[f"{Q}.weight"].T}
    torch.save(tensors, base / "pytorch_model.bin", _use_new_zipfile_serialization=False)  # as before torch 1.6
    save_lora(adapted(seed=3, targets=("k_proj",)), tmp_path / "adapter")
    assert merge(tmp_path) == 0
    merged = stored(tmp_path / "out")
    assert merged.keys() == tensors.keys()
    assert {name for name in tensors if not torch.equal(merged[name], tensors[name])} == {
        f"model.layers.{i}.self_attn.k_proj.weight" for i in range(2)}


def test_the_papers_released_policy_merges_with_alpha_64(tmp_path):
    policy = adapted(seed=1)
    write_base(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    torch.save(released(policy, adapted(seed=2)), tmp_path / "adapter" / "pytorch_model.bin")
    assert merge(tmp_path) == 0
    torch.testing.assert_close(Llama.from_pretrained(tmp_path / "out")(IDS), policy(IDS), atol=1e-4, rtol=1e-4)


def test_merging_says_nothing_but_what_it_wrote_and_makes_the_folders_it_needs(tmp_path):
    write_base(tmp_path / "base")
    save_lora(adapted(), tmp_path / "adapter")
    command = [sys.executable, str(ROOT / "lora.py"), "merge", "--base", "base", "--adapter", "adapter", "--out", "new/out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "wrote new/out: 8 layers merged, 0.1 MB\n"), done.stderr
    assert done.stderr == "" and Llama.from_pretrained(tmp_path / "new" / "out")


def test_only_one_shard_of_the_base_is_held_at_a_time(tmp_path, monkeypatch):
    base = write_base(tmp_path / "base", "two pytorch_model.bin")
    save_lora(adapted(), tmp_path / "adapter")
    read, write, held = adapters.read_tensor, adapters.write_tensors, []

    def watched_read(stored, name):
        tensor = read(stored, name)
        held.append((stored.file, weakref.ref(tensor)))
        return tensor

    def watched_write(file, tensors):
        assert len({source for source, tensor in held if tensor() is not None}) <= 1
        write(file, tensors)

    monkeypatch.setattr(adapters, "read_tensor", watched_read)
    monkeypatch.setattr(adapters, "write_tensors", watched_write)
    assert merge(tmp_path) == 0
    assert len(held) == 21 and {source.parent for source, _ in held} == {base}
    assert not any(tensor() is not None for _, tensor in held)


def rewrite(file, **changes):
    """Replace tensors of a safetensors file, or with None take them out."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}, file)


def refused(tmp_path, capsys, message, *options):
    """Exit code 2, one line with the message, and nothing new on disk."""
    before = sorted(tmp_path.rglob("*"))
    assert merge(tmp_path, *options) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "tensor/s" not in line]  # no bar
    assert len(lines) == 1 and lines[0].startswith("lora.py: ")
    assert re.search(message, lines[0]), lines[0]
    assert sorted(tmp_path.rglob("*")) == before


A, W = f"base_model.model.{Q}.lora_A.weight", f"{Q}.weight"
DAMAGE = {  # what happens to the folders base and adapter: what the line says
    "no adapter": (lambda b, a: shutil.rmtree(a), "adapter: no adapter_config.json"),
    "no adapter config": (lambda b, a: (a / "adapter_config.json").unlink(), "adapter: no adapter_config.json"),
    "no base": (lambda b, a: shutil.rmtree(b), "base: not a Hugging Face folder: no config.json"),
    "no config": (lambda b, a: (b / "config.json").unlink(), "base: not a Hugging Face folder: no config.json"),
    "bad config": (lambda b, a: (b / "config.json").write_text("{"), "base/config.json: "),
    "quantised": (lambda b, a: edit(b / "config.json", quantization_config={"bits": 4}),
                  "config.json: quantization_config: the model is quantised: name the unquantised one"),
    "quantised, compressed-tensors": (lambda b, a: edit(b / "config.json", compression_config={"format": "x"}),
                                      "config.json: compression_config: the model is quantised"),
    "quantised, no word in config.json": (lambda b, a: rewrite(b / "model.safetensors", **{
        W: torch.ones(32, 32).to(torch.float8_e4m3fn), f"{W}_scale": torch.ones(1)}),
        f"base/model.safetensors: tensor {W}_scale: the model is quantised"),
    "quantised before damaged": (lambda b, a: (edit(b / "config.json", quantization_config={"bits": 4}),
                                               (b / "model.safetensors").unlink()), "config.json: quantization_config"),
    "a difference": (lambda b, a: rewrite(b / "model.safetensors", **{"model.norm.weight": torch.zeros(32)}),
                     "base: holds the difference to another model's weights"),
    "another output layer than the tie": (lambda b, a: edit(b / "config.json", tie_word_embeddings=True),
                                          "base/model.safetensors: tensor lm_head.weight is not the embedding"),
    "truncated base": (lambda b, a: os.truncate(b / "model.safetensors", 5000), "base/model.safetensors: cannot be"),
    "truncated adapter": (lambda b, a: os.truncate(a / "adapter_model.safetensors", 5000),
                          "adapter_model.safetensors: cannot be read"),
    "weight missing": (lambda b, a: rewrite(b / "model.safetensors", **{W: None}),
                       f"adapter_model.safetensors: unexpected tensor {Q}.lora_A: .*base has no weight of its own"),
    "weight of integers": (lambda b, a: rewrite(b / "model.safetensors", **{W: torch.ones(32, 32).int()}),
                           f"base/model.safetensors: tensor {W} is of torch.int32: the model is quantised"),
    "weight of float8": (lambda b, a: rewrite(b / "model.safetensors", **{W: torch.ones(32, 32).to(torch.float8_e4m3fn)}),
                         f"base/model.safetensors: tensor {W} is of torch.float8_e4m3fn: the model is quantised"),
    "weight of another shape": (lambda b, a: rewrite(b / "model.safetensors", **{W: torch.ones(16, 32)}),
                                rf"adapter_model.safetensors: tensor {Q}.lora_B has shape \(32, 8\), not \(16, 8\)"),
    "half an adapter": (lambda b, a: rewrite(a / "adapter_model.safetensors", **{A: None}),
                        f"adapter_model.safetensors: missing tensor {Q}.lora_A"),
    "infinite": (lambda b, a: rewrite(a / "adapter_model.safetensors", **{A: torch.full((8, 32), torch.inf)}),
                 f"adapter_model.safetensors: tensor {Q}.lora_A .* holds NaN, infinity"),
    "NaN": (lambda b, a: rewrite(a / "adapter_model.safetensors", **{A: torch.full((8, 32), torch.nan)}),
            f"adapter_model.safetensors: tensor {Q}.lora_A .* holds NaN"),
    "nothing": (lambda b, a: save_file({}, a / "adapter_model.safetensors"), "adapter_model.safetensors: holds no adapter"),
    "too large": (lambda b, a: (rewrite(a / "adapter_model.safetensors", **{A: torch.full((8, 32), 3e38)}),
                                edit(a / "adapter_config.json", lora_alpha=1e9)),
                  f"base/model.safetensors: tensor {W} is infinite or NaN"),  # seen only after writing has begun
}


@pytest.mark.parametrize("case", DAMAGE)
def test_bad_input_ends_in_one_line_and_writes_nothing(case, tmp_path, capsys):
    base, adapter = write_base(tmp_path / "base"), tmp_path / "adapter"
    save_lora(adapted(), adapter)
    damage, message = DAMAGE[case]
    damage(base, adapter)
    refused(tmp_path, capsys, message)


def test_shards_that_are_absent_or_outside_the_base_are_refused(tmp_path, capsys):
    base = write_base(tmp_path / "base", "two model.safetensors")
    save_lora(adapted(), tmp_path / "adapter")
    index, shard = base / "model.safetensors.index.json", "model-00001-of-00002.safetensors"
    shutil.copy(base / shard, tmp_path / shard)
    for name in (f"../{shard}", str(tmp_path / shard), f"sub/../{shard}"):
        edit(index, weight_map={W: name})
        refused(tmp_path, capsys, f"index.json: names the file .*{shard}.*, which is not in its own folder")
    edit(index, weight_map={W: "model-00003-of-00002.safetensors"})
    refused(tmp_path, capsys, "base/model-00003-of-00002.safetensors: not found, but model.safetensors.index.json")
    edit(index, weight_map=[])
    refused(tmp_path, capsys, "model.safetensors.index.json: ")


def test_gguf_files_and_metas_folders_are_sent_to_model_py_convert(tmp_path, capsys):
    save_lora(adapted(), tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    for name, kind in (("params.json", "Meta"), ("llama.gguf", "GGUF")):
        (tmp_path / "base" / name).touch()
        refused(tmp_path, capsys, f"base: {kind} format.* `python model.py convert --model {tmp_path}/base --out DIR`")
    with pytest.raises(ValueError, match=r"llama.gguf: GGUF format"):
        merge_checkpoint(tmp_path / "base" / "llama.gguf", tmp_path / "adapter", tmp_path / "out")


def test_an_out_folder_that_holds_files_is_refused_and_an_empty_one_is_filled(tmp_path, capsys):
    write_base(tmp_path / "base")
    save_lora(adapted(), tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    refused(tmp_path, capsys, "--out .*out: already holds files")
    (tmp_path / "out" / "precious").unlink()
    assert merge(tmp_path) == 0


@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj", "lm_head")])
@pytest.mark.parametrize("layout", ["model.safetensors", "two model.safetensors", "pytorch_model.bin", "two pytorch_model.bin"])
def test_a_tied_output_layer_that_is_adapted_gets_a_weight_of_its_own(layout, targets, tmp_path):
    base = write_base(tmp_path / "base", layout, tie_word_embeddings=True)
    model = adapted(tiny(tie_word_embeddings=True), targets=targets)
    save_lora(model, tmp_path / "adapter")
    assert merge(tmp_path) == 0
    tensors = stored(tmp_path / "out")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert after == before | {"tie_word_embeddings": False}
    assert torch.equal(tensors["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    torch.testing.assert_close(Llama.from_pretrained(tmp_path / "out")(IDS), model(IDS), atol=1e-5, rtol=0)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(theirs(IDS).logits, model(IDS), atol=1e-4, rtol=0)
    if layout.startswith("two "):
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_an_output_layer_that_is_missing_and_not_tied_is_not_made_up(tmp_path, capsys):
    base = write_base(tmp_path / "base")
    rewrite(base / "model.safetensors", **{"lm_head.weight": None})
    save_lora(adapted(targets=("q_proj", "lm_head")), tmp_path / "adapter")
    refused(tmp_path, capsys, "unexpected tensor lm_head.lora_A: .*base has no weight of its own for that layer")


@pytest.mark.parametrize("targets", [["q_proj"], ["down_proj", "lm_head"]])
def test_another_familys_model_merges_as_peft_merges_it(targets, tmp_path):
    # Gemma's norms are near 0 without its weights being a difference, and it is tied without a word in config.json.
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
    torch.manual_seed(0)
    transformers.GemmaForCausalLM(transformers.GemmaConfig(**sizes)).save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert load_file(tmp_path / "base" / "model.safetensors")["model.norm.weight"].abs().max() < 0.02
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
                                 peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    assert merge(tmp_path) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(merged(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=1e-4)


def test_ranks_and_alphas_of_single_layers_merge_as_they_load(tmp_path):
    write_base(tmp_path / "base")
    model = adapted(rank=4, alpha=8)
    lora_layers(model)[Q].set_scaling(40, use_rslora=True)
    replace = lora_layers(model)["model.layers.1.self_attn.o_proj"]
    replace.rank = 2
    replace.lora_A, replace.lora_B = torch.nn.Parameter(torch.randn(2, 32)), torch.nn.Parameter(torch.randn(32, 2))
    replace.set_scaling(3)
    save_lora(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    assert merge(tmp_path) == 0
    torch.testing.assert_close(Llama.from_pretrained(tmp_path / "out")(IDS), model(IDS), atol=1e-4, rtol=1e-4)


def test_an_update_that_rounding_would_take_is_written_in_float32_or_said_to_be_lost(tmp_path, capsys):
    write_base(tmp_path / "base", dtype=torch.bfloat16)
    model = adapted(Llama.from_pretrained(tmp_path / "base", dtype=torch.float32))
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.mul_(1e-3)
    save_lora(model, tmp_path / "adapter")
    assert merge(tmp_path) == 0
    said = capsys.readouterr().out
    assert re.search(r"rounding to what the base is stored in takes \d+% of the update: written in float32", said), said
    merged = Llama.from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight.dtype == torch.float32
    torch.testing.assert_close(merged(IDS), model(IDS), atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    shutil.rmtree(tmp_path / "out")
    assert merge(tmp_path, "--dtype", "bfloat16") == 0  # as asked for
    assert "rounding to torch.bfloat16 takes" in capsys.readouterr().out
    assert {tensor.dtype for tensor in stored(tmp_path / "out").values()} == {torch.bfloat16}
    save_lora(lora.add_lora(Llama.from_pretrained(tmp_path / "base")), tmp_path / "adapter")  # changes nothing
    shutil.rmtree(tmp_path / "out")
    assert merge(tmp_path) == 0 and "of the update" not in capsys.readouterr().out
    assert same(stored(tmp_path / "out"), stored(tmp_path / "base"))


def test_code_in_a_bin_base_is_refused_and_never_run(tmp_path, capsys):
    base = write_base(tmp_path / "base", "pytorch_model.bin")
    save_lora(adapted(), tmp_path / "adapter")
    torch.save({"x": WritesAFile(tmp_path / "created")}, base / "pytorch_model.bin")
    refused(tmp_path, capsys, "base/pytorch_model.bin: refused, and none of it was run")


def test_a_weight_too_large_for_float16_is_refused(tmp_path, capsys):
    base = write_base(tmp_path / "base", dtype=torch.bfloat16)
    save_lora(adapted(), tmp_path / "adapter")
    rewrite(base / "model.safetensors", **{"model.norm.weight": torch.full((32,), 1e5)})
    refused(tmp_path, capsys, "tensor model.norm.weight is infinite .* torch.float16", "--dtype", "float16")


def test_a_crash_between_two_shards_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    write_base(tmp_path / "base", "two model.safetensors")
    save_lora(adapted(), tmp_path / "adapter")
    write = formats.write.save_file

    def disk_full(tensors, file, metadata):
        if "00002-of" in file.name:
            file.write_bytes(b"half")
            raise OSError("no space left on device")
        write(tensors, file, metadata)

    monkeypatch.setattr(formats.write, "save_file", disk_full)
    refused(tmp_path, capsys, "no space left on device")
