"""The turns of each family, as its chat template writes them: prompts spelled by hand, the end of a turn among the stop ids.

The templates are ours, after what the families document of their turns; their own files say more (tools, dates), to no other end.
"""

from pathlib import Path

import pytest

from data import encode_pair, format_prompt
from formats.tokenizer import load_tokenizer

LLAMA3 = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}"
          "<|eot_id|>{% endfor %}"
          "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
QWEN = ("{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
MISTRAL = ("{% if messages[0]['role'] == 'system' %}"
           "{% set system = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}"
           "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
           "{{ bos_token }}{% for m in turns %}{% if m['role'] == 'user' %}[INST] {{ system }}{{ m['content'] }} [/INST]"
           "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}")
# (template, BOS, EOS, further special tokens, prompt, prompt after a system message, the token that ends a turn)
FAMILIES = {
    "llama 3": (LLAMA3, "<|begin_of_text|>", "<|end_of_text|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
                "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nAdd.<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
                "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\nAdd.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
                "<|eot_id|>"),
    "qwen": (QWEN, None, "<|endoftext|>", ["<|im_start|>", "<|im_end|>"],
             "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n",
             "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "mistral": (MISTRAL, "<s>", "</s>", ["[INST]", "[/INST]"],
                "<s>[INST] Add. [/INST]", "<s>[INST] Be brief.\n\nAdd. [/INST]", "</s>"),
}


def write_tokenizer(folder: Path, family: str) -> Path:
    """A byte-level BPE without a merge, with the family's special tokens and template."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    template, bos, eos, more, *_ = FAMILIES[family]
    pieces = [*filter(None, (bos, eos)), *more, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    fast = Fast(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    hf = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token=bos, eos_token=eos, extra_special_tokens=more)
    hf.chat_template = template
    hf.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_spelled_as_the_family_spells_it(tmp_path, family):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, family))
    *_, prompt, with_system, _ = FAMILIES[family]
    assert format_prompt({"instruction": "Add."}, "chat", tokenizer.for_template("chat")) == prompt
    assert format_prompt({"instruction": "Add."}, "chat", tokenizer.for_template("chat", "Be brief.")) == with_system


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_a_turn_ends_a_response(tmp_path, family):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, family)).for_template("chat")
    _, bos, eos, *_, end = FAMILIES[family]
    [last] = tokenizer.encode(end)
    assert tokenizer.eos_token_id == last and set(tokenizer.stop_ids) == {last, *tokenizer.encode(eos)}
    prompt, response = encode_pair({"instruction": "Add."}, "3", tokenizer, "chat")
    assert response[-1] == last and tokenizer.decode(response) == "3"
    if bos:  # once, though the template writes it and a tokenizer may add it
        assert [prompt.count(i) for i in tokenizer.encode(bos)] == [1] and prompt[0] == tokenizer.encode(bos)[0]
