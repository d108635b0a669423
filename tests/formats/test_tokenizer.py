"""What formats/tokenizer.py promises: one face for every tokenizer, one spelling in tokens, damage named in a line."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import LINES, train_sentencepiece, write

from data import encode_pair, format_prompt, get_template, right_pad
from formats.tokenizer import Tokenizer, check_vocabulary, describe_tokenizer, load_tokenizer, template_in_words


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir) -> Tokenizer:
    return load_tokenizer(tokenizer_dir)


@pytest.mark.parametrize("text", ["Copper is a metal.", "two\n\nlines", "  spaces  kept", "naïve 漢字"])
def test_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text
    # Behind other text: nothing is added or lost at the seam.
    assert tokenizer.decode(tokenizer.encode("Copper:") + tokenizer.encode(text, bos=False)) == "Copper:" + text


@pytest.mark.parametrize("template", ["alpaca", "tiny"])
def test_prompt_and_response_apart_are_spelled_as_in_the_joint_text(tokenizer, template):
    example, response = {"instruction": "What is copper?"}, "Copper is a metal."
    prompt_ids, response_ids = encode_pair(example, response, tokenizer, template)
    joint = format_prompt(example, template) + get_template(template).before_response + response
    assert prompt_ids + response_ids == tokenizer.encode(joint, bos=True, eos=True)
    assert tokenizer.decode(response_ids) == response


def test_llama_has_no_pad_token_so_unk_stands_in(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (1, 2, 0, 340)


def test_decode_skips_special_ids_and_ids_past_the_vocabulary(tokenizer):
    ids = tokenizer.encode("Copper", bos=True, eos=True)
    assert tokenizer.decode(torch.tensor([0, 0, *ids, 340, 5000])) == "Copper"


SPECIALS = ["<s>", "</s>", "<unk>", "<pad>", "<|eot|>"]  # ids 0 to 4; the letters of byte-level BPE follow
CHATML = ("{% if messages[0]['role'] != 'system' %}<s>system\nBe kind.<|eot|>\n{% endif %}{% for m in messages %}"
          "<s>{{ m['role'] }}\n{{ m['content'] }}<|eot|>\n{% endfor %}"
          "{% if add_generation_prompt %}<s>assistant\n{% endif %}")
PLAIN_CHAT = ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
              "{% if m['role'] == 'assistant' %} </s>{% endif %}{% endfor %}>")


def write_fast(folder: Path, chat: str | None = None, begins_with_bos: bool = False, **config: object) -> Path:
    """A byte-level BPE with one merge, as transformers saves it; `config` is added to its tokenizer_config.json."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    fast = Fast(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[("a", "b")]))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if begins_with_bos:
        fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    hf = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>",
                                 extra_special_tokens=["<|eot|>"])
    hf.chat_template = chat
    hf.save_pretrained(folder)
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    write(folder, {**saved, **config}, "tokenizer_config.json")
    return folder


def write_gguf(file: Path, model: str, tokens: list[str], **fields: object) -> Path:
    """A .gguf file with a tokenizer and no weights. fields: what GGUFWriter.add_<name> takes."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def write_byte_level_gguf(file: Path, **fields: object) -> Path:
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    types = [3] * len(SPECIALS) + [1] * (len(letters) + 1)  # 3 control, 1 normal
    return write_gguf(file, "gpt2", [*SPECIALS, *letters, "ab"], token_merges=["a b"], token_types=types, bos_token_id=0,
                      eos_token_id=1, **fields)


def same_tokenizer(a: Tokenizer, b: Tokenizer) -> bool:
    texts = ["What is copper?", "ab\n\n  <s>ab</s> naïve 漢字"]
    ids = list(range(len(a)))
    return (describe_tokenizer(a) == describe_tokenizer(b) and a.end_of_turn_id == b.end_of_turn_id
            and [a.encode(text) for text in texts] == [b.encode(text) for text in texts]
            and a.decode(ids) == b.decode(ids)
            and (not a.render_chat or a.render_chat("hi") == b.render_chat("hi")))


def test_a_transformers_tokenizer_has_the_same_face(tmp_path):
    tokenizer = load_tokenizer(write_fast(tmp_path))
    assert len(tokenizer) == 262 and (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    # This tokenizer starts no text with BOS (SmolLM2's doesn't either), so asking for a beginning adds none.
    assert tokenizer.encode("hi", bos=True) == tokenizer.encode("hi", bos=False)
    assert tokenizer.encode("ab") == [261]
    assert tokenizer.decode(tokenizer.encode("a b\nc", eos=True)) == "a b\nc"


@pytest.mark.parametrize("config, pad", [
    ({"pad_token": "<pad>", "unk_token": "<unk>"}, 3), ({"pad_token": "</s>", "unk_token": "<unk>"}, 1),
    ({"unk_token": "<unk>"}, 2), ({}, 1)])
def test_padding_is_the_tokenizers_own_token_else_unk_else_eos(tmp_path, config, pad):
    tokenizer = load_tokenizer(write_fast(tmp_path, **config))
    assert tokenizer.pad_token_id == pad and len(tokenizer) == 262
    ids, mask = right_pad([tokenizer.encode("ab", eos=True), tokenizer.encode("x ab", eos=True)], pad)
    assert ids[0, 1] == 1 and mask[0].tolist() == [True, True, False, False]  # where pad = EOS the real EOS stays visible


@pytest.mark.parametrize("in_file, in_config, expected", [
    (True, None, True), (False, None, False), (True, False, False), (False, True, True)])
def test_a_text_begins_with_bos_where_the_tokenizers_files_say_so(tmp_path, in_file, in_config, expected):
    config = {} if in_config is None else {"add_bos_token": in_config}
    tokenizer = load_tokenizer(write_fast(tmp_path, begins_with_bos=in_file, **config))
    assert tokenizer.encode("ab") == ([0, 261] if expected else [261])
    assert tokenizer.encode("ab", bos=False) == [261]
    assert describe_tokenizer(tokenizer).count("bos 0 (not added)") == (not expected)


def test_a_tokenizer_without_bos_adds_none(tmp_path):
    fast = load_tokenizer(write_fast(tmp_path / "fast", bos_token=None, add_bos_token=True))
    train_sentencepiece(tmp_path / "pieces.model", bos_id=-1)
    pieces = load_tokenizer(tmp_path / "pieces.model")
    for tokenizer in (fast, pieces):
        assert tokenizer.bos_token_id is None and "no bos" in describe_tokenizer(tokenizer)
        assert tokenizer.encode("ab") and None not in tokenizer.encode("ab")
        assert tokenizer.decode(tokenizer.encode("ab")) == "ab"


def test_sentencepiece_adds_no_bos_where_its_config_says_so(tokenizer_dir, tokenizer, tmp_path):
    shutil.copy(tokenizer_dir / "tokenizer.model", tmp_path)
    write(tmp_path, {"add_bos_token": False}, "tokenizer_config.json")
    assert tokenizer.encode("Copper")[0] == 1
    assert load_tokenizer(tmp_path).encode("Copper") == tokenizer.encode("Copper")[1:]


def test_a_pad_token_added_to_sentencepiece_has_a_row_of_its_own(tokenizer_dir, tokenizer, tmp_path):
    """AlpacaFarm's folders: tokenizer.model, [PAD] in added_tokens.json, no tokenizer.json."""
    shutil.copy(tokenizer_dir / "tokenizer.model", tmp_path)
    write(tmp_path, {"[PAD]": 342}, "added_tokens.json")  # behind two ids that nothing has
    write(tmp_path, {"pad_token": "[PAD]", "eos_token": "</s>"}, "special_tokens_map.json")
    write(tmp_path, {"tokenizer_class": "LlamaTokenizer"}, "tokenizer_config.json")
    padded = load_tokenizer(tmp_path)
    assert (padded.pad_token_id, len(padded)) == (342, 343)
    assert padded.encode("Copper", eos=True) == tokenizer.encode("Copper", eos=True)
    assert padded.decode([340, 341, *padded.encode("Copper", eos=True), 342]) == "Copper"
    write(tmp_path, {"[PAD]": 342, "<|im_end|>": 343}, "added_tokens.json")
    with pytest.raises(ValueError, match=re.escape("adds <|im_end|> to tokenizer.model, which takes a tokenizer.json")):
        load_tokenizer(tmp_path)


# Chat templates


@pytest.mark.parametrize("begins_with_bos", [True, False])
@pytest.mark.parametrize("chat", [CHATML, PLAIN_CHAT])
def test_a_chat_prompt_begins_with_bos_once_whoever_writes_it(tmp_path, chat, begins_with_bos):
    tokenizer = load_tokenizer(write_fast(tmp_path, chat, begins_with_bos))
    prompt, _ = encode_pair({"instruction": "Add.", "input": "1"}, "2", tokenizer, "chat")
    expected = format_prompt({"instruction": "Add.", "input": "1"}, "chat", tokenizer)
    assert "Add.\n\n1" in expected
    if begins_with_bos or chat == CHATML:
        assert prompt[0] == 0 and prompt[1] != 0
    assert tokenizer.decode(prompt) == re.sub(r"<s>|</s>|<\|eot\|>", "", expected)


def test_a_default_system_prompt_is_kept(tmp_path):
    tokenizer = load_tokenizer(write_fast(tmp_path, CHATML))
    assert format_prompt({"instruction": "Add."}, "chat", tokenizer) == (
        "<s>system\nBe kind.<|eot|>\n<s>user\nAdd.<|eot|>\n<s>assistant\n")


@pytest.mark.parametrize("chat, eos, end_of_turn", [
    (CHATML, "</s>", 4), (CHATML, "<|eot|>", None), (PLAIN_CHAT, "</s>", None), ("<|eot|>nothing", "</s>", None),
    ("{% for m in messages %}{{ m['content'] }}\n### {% endfor %}", "</s>", None), (None, "</s>", None)])
def test_a_chat_response_ends_as_the_template_ends_a_turn(tmp_path, chat, eos, end_of_turn):
    tokenizer = load_tokenizer(write_fast(tmp_path, chat, eos_token=eos))
    assert tokenizer.end_of_turn_id == end_of_turn
    if chat:
        last = 4 if chat == CHATML else 1
        assert tokenizer.for_template("chat").eos_token_id == last
        assert encode_pair({"instruction": "Add."}, "ab", tokenizer, "chat")[1] == [261, last]
    assert tokenizer.for_template("alpaca") is tokenizer
    assert encode_pair({"instruction": "Add."}, "ab", tokenizer, "alpaca")[1] == [261, tokenizer.eos_token_id]


def test_a_system_message_stands_before_every_instruction(tmp_path):
    tokenizer = load_tokenizer(write_fast(tmp_path, CHATML))
    brief = tokenizer.for_template("chat", "Be brief.")
    plain, with_system = (format_prompt({"instruction": "Add."}, "chat", t) for t in (tokenizer.for_template("chat"), brief))
    assert with_system.index("Be brief.") < with_system.index("Add.") and "Be brief." not in plain
    assert brief.eos_token_id == tokenizer.for_template("chat").eos_token_id
    assert encode_pair({"instruction": "Add."}, "ab", brief, "chat")[0] == brief.encode(with_system, bos=True)
    for template, one in (("alpaca", tokenizer), ("chat", load_tokenizer(write_fast(tmp_path / "bare", None)))):
        with pytest.raises(ValueError, match="--system 'Be brief.': goes with --prompt-template chat"):
            one.for_template(template, "Be brief.")


def test_a_chat_template_that_is_not_used_is_said(tmp_path):
    tokenizer, bare = load_tokenizer(write_fast(tmp_path, CHATML)), load_tokenizer(write_fast(tmp_path / "bare", None))
    [line] = template_in_words(tokenizer, "alpaca")
    assert "template alpaca" in line and "--prompt-template chat takes" in line
    assert template_in_words(tokenizer, "chat") == template_in_words(bare, "alpaca") == []


def test_a_chat_template_that_fails_stops_only_those_who_use_it(tmp_path):
    tokenizer = load_tokenizer(write_fast(tmp_path, "{{ raise_exception('two\nlines') }}"))
    assert tokenizer.encode("ab") == [261]
    with pytest.raises(ValueError, match=r"the chat template fails \(TemplateError: two lines\)"):
        format_prompt({"instruction": "Add."}, "chat", tokenizer)


# Where tokenizers come from


def test_a_gguf_file_holds_the_same_tokenizer_as_its_folder(tmp_path):
    fast = load_tokenizer(write_fast(tmp_path / "fast", CHATML, pad_token="<pad>", unk_token="<unk>"))
    gguf = write_byte_level_gguf(tmp_path / "model.gguf", chat_template=CHATML, add_bos_token=False, pad_token_id=3)
    assert same_tokenizer(load_tokenizer(gguf), fast)
    assert same_tokenizer(load_tokenizer(tmp_path), fast)  # a folder with one .gguf file
    write_byte_level_gguf(tmp_path / "other.gguf")
    with pytest.raises(FileNotFoundError, match="of its 2 .gguf files one must be named"):
        load_tokenizer(tmp_path)


def test_a_gguf_tokenizer_has_the_files_tokens_and_no_others(tmp_path):
    """transformers adds an <|endoftext|> of its own, for which the model has no embedding row."""
    tokenizer = load_tokenizer(write_byte_level_gguf(tmp_path / "model.gguf"))
    assert check_vocabulary(tokenizer, 262, "model.gguf") == 0 and tokenizer.pad_token_id == 1
    assert max(tokenizer.encode("a<|endoftext|>b<|eot|>")) < 262 and tokenizer.encode("<|eot|>") == [4]


def test_a_gguf_file_is_read_whatever_lies_beside_it(tmp_path):
    write_fast(tmp_path, eos_token="<|eot|>")
    tokenizer = load_tokenizer(write_byte_level_gguf(tmp_path / "model.gguf", add_bos_token=True))
    assert tokenizer.eos_token_id == 1 and tokenizer.encode("ab") == [0, 261]


def test_a_llama_gguf_spells_as_sentencepiece_does(tokenizer_dir, tokenizer, tmp_path):
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_dir / "tokenizer.model"))
    ids = range(len(tokenizer))
    types = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1 for i in ids]
    gguf = load_tokenizer(write_gguf(
        tmp_path / "model.gguf", "llama", [pieces.id_to_piece(i) for i in ids], token_types=types,
        token_scores=[pieces.get_score(i) for i in ids], bos_token_id=1, eos_token_id=2, unk_token_id=0))
    assert (gguf.bos_token_id, gguf.eos_token_id, gguf.pad_token_id, len(gguf)) == (1, 2, 0, 340)
    for text in ["Copper is a metal.", "two\n\nlines", "naïve 漢字", *LINES]:
        for bos in (True, False):
            assert gguf.encode(text, bos) == tokenizer.encode(text, bos)
        assert gguf.decode(gguf.encode(text)) == text


@pytest.mark.parametrize("version", ["4.57.1", "5.4.0", "5.22.2"])
def test_a_transformers_that_misreads_gguf_is_refused(tmp_path, monkeypatch, version):
    gguf = write_byte_level_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(ValueError, match=f"transformers {version} misreads the special tokens of .gguf files; pip install"):
        load_tokenizer(gguf)
    monkeypatch.setattr("transformers.__version__", "6.0.0.dev0")
    assert load_tokenizer(gguf).eos_token_id == 1


def test_reading_a_gguf_tokenizer_takes_no_gguf_package(tmp_path, monkeypatch):
    gguf = write_byte_level_gguf(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert load_tokenizer(gguf).encode("ab") == [261]


@pytest.mark.parametrize("name, revision", [("org/Some-7B.v2", None), ("org/Some-7B@refs/pr/1", "refs/pr/1")])
def test_a_hub_name_downloads_the_tokenizers_files_and_nothing_else(tokenizer_dir, tokenizer, monkeypatch, name, revision):
    asked = {}

    def snapshot_download(repo, **settings):
        asked.update(settings, repo=repo)
        return str(tokenizer_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert same_tokenizer(load_tokenizer(name), tokenizer)
    assert (asked["repo"], asked["revision"]) == (name.partition("@")[0], revision)
    assert "tokenizer.json" in asked["allow_patterns"] and not any("safetensors" in p for p in asked["allow_patterns"])


def test_a_hub_that_cannot_be_reached_is_one_line_with_the_name(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="^org/no-such-model: neither a folder here nor to be had from") as error:
        load_tokenizer("org/no-such-model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["nowhere", "no/such/folder", "./no/folder", "../nowhere", "models/llama.gguf"])
def test_a_missing_path_that_is_no_hub_name_is_not_looked_up(monkeypatch, path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("looked up"))
    with pytest.raises(FileNotFoundError, match="no such tokenizer; give a folder"):
        load_tokenizer(path)


def test_metas_layout_has_its_tokenizer_beside_the_weights_or_above_them(tokenizer_dir, tokenizer, tmp_path):
    (tmp_path / "7B").mkdir()
    write(tmp_path / "7B", {"dim": 4096}, "params.json")
    with pytest.raises(FileNotFoundError, match="7B: holds neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path / "7B")
    shutil.copy(tokenizer_dir / "tokenizer.model", tmp_path)
    assert same_tokenizer(load_tokenizer(tmp_path / "7B"), tokenizer)
    shutil.move(tmp_path / "tokenizer.model", tmp_path / "7B")
    assert same_tokenizer(load_tokenizer(tmp_path / "7B"), tokenizer)


def test_llama_3_in_metas_layout_is_told_where_its_tokenizer_is(tmp_path):
    write(tmp_path, {"dim": 4096}, "params.json")
    write(tmp_path, "IQ== 0\nIg== 1\nIw== 2\n", "tokenizer.model")
    with pytest.raises(ValueError, match="tokenizer.model: not a SentencePiece model but tiktoken's.*tokenizer.json"):
        load_tokenizer(tmp_path)


# Damaged tokenizers


@pytest.mark.parametrize("name, content, says", [
    ("tokenizer.json", '{"version": "1.0", "trunca', "no tokenizer that transformers can read"),
    ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}', "no tokenizer that transf"),
    ("tokenizer_config.json", "{", "tokenizer_config.json: not a JSON object"),
    ("tokenizer_config.json", "[]", "tokenizer_config.json: not a JSON object"),
    ("tokenizer_config.json", "{}", "has no EOS token"),
    ("tokenizer_config.json", '{"eos_token": 3}', "no tokenizer that transformers can read"),
    ("added_tokens.json", "garbage", "no tokenizer that transformers can read"),
])
def test_a_damaged_fast_tokenizer_is_one_line_that_names_it(tmp_path, name, content, says):
    write_fast(tmp_path)
    write(tmp_path, content, name)
    with pytest.raises(ValueError, match=says) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, content, says", [
    ("tokenizer.model", "not a model", "tokenizer.model: not a SentencePiece model"),
    ("tokenizer.model", "", "tokenizer.model: not a SentencePiece model"),
    ("added_tokens.json", "garbage", "added_tokens.json: not a JSON object"),
    ("added_tokens.json", '{"[PAD]": "last"}', "the tokenizer's JSON files are damaged"),
    ("tokenizer_config.json", '{"added_tokens_decoder": 3}', "the tokenizer's JSON files are damaged"),
    ("tokenizer_config.json", '{"pad_token": {"text": "[PAD]"}}', "the tokenizer's JSON files are damaged"),
])
def test_a_damaged_sentencepiece_tokenizer_is_one_line_that_names_it(tokenizer_dir, tmp_path, name, content, says):
    shutil.copy(tokenizer_dir / "tokenizer.model", tmp_path)
    write(tmp_path, content, name)
    with pytest.raises(ValueError, match=says) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_a_truncated_gguf_file_is_one_line_that_names_it(tmp_path):
    gguf = write_byte_level_gguf(tmp_path / "model.gguf")
    gguf.write_bytes(gguf.read_bytes()[:2000])
    with pytest.raises(ValueError, match="model.gguf: no tokenizer that transformers can read") as error:
        load_tokenizer(gguf)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("classes", [["code.Mine", None], "code.Mine"])
def test_code_in_a_folder_is_neither_run_nor_asked_about(tmp_path, monkeypatch, classes):
    write_fast(tmp_path, auto_map={"AutoTokenizer": classes}, tokenizer_class="Mine")
    write(tmp_path, f"open({str(tmp_path / 'it ran')!r}, 'w')\nclass Mine: pass\n", "code.py")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ValueError, match="no tokenizer that transformers can read.*custom code") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "it ran").exists()


# Saving


def test_a_saved_sentencepiece_tokenizer_is_read_again_with_what_stood_beside_it(tokenizer_dir, tokenizer, tmp_path):
    source, target = tmp_path / "source", tmp_path / "runs" / "target"
    shutil.copytree(tokenizer_dir, source)
    write(source, {"add_bos_token": False}, "tokenizer_config.json")
    write(source, {"eos_token_id": [2, 7]}, "generation_config.json")  # what ends a response goes along
    load_tokenizer(source).save(target)
    files = ["generation_config.json", "tokenizer.model", "tokenizer_config.json"]
    assert sorted(file.name for file in target.iterdir()) == files
    assert load_tokenizer(target).stop_ids == (2, 7)
    assert same_tokenizer(load_tokenizer(target), load_tokenizer(source))
    shutil.copy(source / "tokenizer.model", tmp_path / "llama.model")  # a file by itself
    load_tokenizer(tmp_path / "llama.model").save(tmp_path / "bare")
    assert [file.name for file in (tmp_path / "bare").iterdir()] == ["tokenizer.model"]
    assert same_tokenizer(load_tokenizer(tmp_path / "bare"), tokenizer)


def test_a_saved_transformers_tokenizer_is_read_again(tmp_path):
    source = load_tokenizer(write_fast(tmp_path / "source", CHATML, True, pad_token="<pad>", add_bos_token=False))
    source.for_template("chat").save(tmp_path / "target")
    assert same_tokenizer(load_tokenizer(tmp_path / "target"), source)
    for file in (tmp_path / "target").iterdir():  # byte for byte: transformers 5 would write what 4 can't read
        assert file.read_bytes() == (tmp_path / "source" / file.name).read_bytes()


@pytest.mark.parametrize("add_bos", [True, False])
def test_a_gguf_tokenizer_is_saved_as_files_beside_a_llamas_config(tmp_path, add_bos):
    gguf = load_tokenizer(write_byte_level_gguf(tmp_path / "model.gguf", chat_template=CHATML, add_bos_token=add_bos))
    target = tmp_path / "target"
    gguf.save(target)
    write(target, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "config.json")
    assert same_tokenizer(load_tokenizer(target), gguf)


def test_saving_leaves_other_files_alone_and_can_be_repeated(tokenizer, tmp_path):
    write(tmp_path, {"model_type": "llama"}, "config.json")
    tokenizer.save(tmp_path)
    tokenizer.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "tokenizer.model"]


def test_a_file_that_is_being_read_is_replaced_not_overwritten(tokenizer, tmp_path):
    train_sentencepiece(tmp_path / "tokenizer.model", bos_id=-1)
    before = (tmp_path / "tokenizer.model").read_bytes()
    with open(tmp_path / "tokenizer.model", "rb") as reader:
        tokenizer.save(tmp_path)
        assert reader.read() == before != (tmp_path / "tokenizer.model").read_bytes()


def test_saving_into_its_own_folder_changes_nothing(tokenizer_dir, tmp_path, monkeypatch):
    shutil.copy(tokenizer_dir / "tokenizer.model", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    monkeypatch.setattr("os.replace", lambda *_: pytest.fail("written"))
    monkeypatch.chdir(tmp_path)
    tokenizer.save(".")


def test_two_tokenizers_are_never_mixed_in_one_folder(tokenizer, tmp_path):
    """tokenizer.model beside the other's tokenizer.json would be read as the other."""
    write_fast(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds another tokenizer's tokenizer.json, tokenizer_config.json"):
        tokenizer.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_failed_save_keeps_the_last_good_file(tokenizer_dir, tmp_path, monkeypatch):
    tokenizer, target = load_tokenizer(tokenizer_dir), tmp_path / "target"
    tokenizer.save(target)

    def disk_full(source, to):
        Path(to).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("shutil.copyfile", disk_full)
    with pytest.raises(OSError, match="no space left"):
        tokenizer.save(target)
    assert [file.name for file in target.iterdir()] == ["tokenizer.model"]
    assert (target / "tokenizer.model").read_bytes() == (tokenizer_dir / "tokenizer.model").read_bytes()


def test_a_tokenizer_made_by_hand_has_no_files_to_save(tmp_path):
    letters = Tokenizer(lambda text: [ord(c) for c in text], lambda ids: "".join(map(chr, ids)), 256, 1, 2, 0)
    with pytest.raises(ValueError, match="not read from files"):
        letters.save(tmp_path)


# What a run says of its tokenizer, and checks


def test_a_tokenizer_is_described_in_one_line(tokenizer, tmp_path):
    assert describe_tokenizer(tokenizer) == (
        "tokenizer: SentencePiece, 340 tokens, bos 1, eos 2, pad 0, no chat template")
    fast = load_tokenizer(write_fast(tmp_path, CHATML))
    assert describe_tokenizer(fast) == (
        "tokenizer: transformers, 262 tokens, bos 0 (not added), eos 1, pad = eos, chat template")
    assert "eos 4 (the end of a turn) or 1, pad 1" in describe_tokenizer(fast.for_template("chat"))


def test_a_model_may_have_more_rows_than_its_tokenizer_and_never_fewer(tokenizer):
    assert check_vocabulary(tokenizer, 384, "runs/policy") == 44  # 340 padded to a multiple of 64
    assert check_vocabulary(tokenizer, 340, "runs/policy") == 0
    with pytest.raises(ValueError, match="runs/policy: 339 embedding rows, but the tokenizer's largest id is 339"):
        check_vocabulary(tokenizer, 339, "runs/policy")


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("i", [256, -1])
def test_a_special_id_without_a_row_is_named(name, i):
    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, name: i}
    letters = Tokenizer(lambda text: [ord(c) for c in text], lambda ids: "".join(map(chr, ids)), 256, **ids)
    with pytest.raises(ValueError, match=f"model: 256 embedding rows, but the tokenizer's {name} is {i}"):
        check_vocabulary(letters, 256, "model")


# What ends a response, and what is no text


def test_what_ends_a_response_is_the_union_of_all_files(tokenizer_dir, tokenizer, tmp_path):
    """transformers' generate stops at config.json's and generation_config.json's ids; Llama 3 names several there."""
    assert tokenizer.stop_ids == (2,)
    for folder in (shutil.copytree(tokenizer_dir, tmp_path / "pieces"), write_fast(tmp_path / "fast", CHATML)):
        write(folder, {"eos_token_id": [2, 9]}, "config.json")
        write(folder, {"eos_token_id": 11, "temperature": 0.6}, "generation_config.json")
        named = load_tokenizer(folder)
        assert set(named.stop_ids) == {named.eos_token_id, 2, 9, 11} and named.stop_ids[0] == named.eos_token_id
    chat = load_tokenizer(tmp_path / "fast").for_template("chat")
    assert chat.eos_token_id == 4 and chat.stop_ids == (4, 1, 2, 9, 11)
    assert chat.decode([9, 4]) == named.decode([9])  # a piece that ends a response is text all the same


def test_the_eos_of_tokenizer_config_ends_a_response_beside_that_of_tokenizer_model(tokenizer_dir, tmp_path):
    folder = shutil.copytree(tokenizer_dir, tmp_path / "pieces")
    write(folder, {"eos_token": {"content": "."}}, "tokenizer_config.json")
    named = load_tokenizer(folder)
    assert named.pieces(list(named.stop_ids)) == ["</s>", "."]


@pytest.mark.parametrize("value", ["</s>", True, [2, "3"], {"id": 2}])
def test_an_end_that_is_no_id_is_refused_by_name(tokenizer_dir, tmp_path, value):
    folder = shutil.copytree(tokenizer_dir, tmp_path / "pieces")
    write(folder, {"eos_token_id": value}, "generation_config.json")
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id is .* it must be a token's id"):
        load_tokenizer(folder)


def test_padding_with_a_piece_of_text_takes_nothing_out_of_a_text(tmp_path):
    """Where somebody needed any token for padding and took "!"."""
    folder = write_fast(tmp_path / "a", pad_token="!")
    text = "ab! ab!"
    read = load_tokenizer(folder)
    assert read.decode(read.encode(text, bos=False, eos=True)) == text and read.pad_token_id == read.eos_token_id
    saved = json.loads((folder / "tokenizer.json").read_text())
    i = saved["model"]["vocab"]["!"]
    saved["added_tokens"].append(saved["added_tokens"][0] | {"id": i, "content": "!", "special": True})
    write(folder, saved, "tokenizer.json")
    with pytest.raises(ValueError, match="pad_token '!' is a piece of ordinary text"):
        load_tokenizer(folder)


def test_a_text_that_ends_in_eos_gets_no_second_one(tmp_path):
    read = load_tokenizer(write_fast(tmp_path))
    assert read.encode("ab</s>", bos=False, eos=True) == read.encode("ab", bos=False, eos=True)
