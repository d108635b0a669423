"""What data.py promises: readable errors, exact prompts, one spelling in tokens, honest padding, resumable order."""

import json

import pytest

from conftest import write

from data import (PromptStream, Template, format_prompt, get_template, left_pad, load_instructions, load_preferences,
                  right_pad, tokenize_prompts)
from formats.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir) -> Tokenizer:
    return load_tokenizer(tokenizer_dir)


# Data files


def test_json_list_and_json_lines_give_the_same_records(tmp_path):
    records = [{"instruction": "Add.", "input": "1 2", "output": "3"},
               {"instruction": "Line\u2028break", "input": None}]
    as_list = load_instructions(write(tmp_path, records))
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n"
    as_lines = load_instructions(write(tmp_path, lines, "data.jsonl"))
    assert as_list == as_lines
    assert as_list[1] == {"instruction": "Line\u2028break", "input": ""}


def test_other_fields_are_kept(tmp_path):
    assert load_instructions(write(tmp_path, [{"instruction": "Add.", "family": "sums"}]))[0]["family"] == "sums"


@pytest.mark.parametrize("content, says", [
    ("", "file is empty"),
    ("[]", "holds no records"),
    ("[{]", "not JSON.*line 1, column 3"),
    ("hello", "neither a JSON list nor JSON lines.*line 1"),
    ('{"instruction": "a"}\n{"instruction"', "neither a JSON list nor JSON lines.*line 2"),
    ('["a"]', "record 0: expected an object.*found str"),
    ([{"instruction": "a"}, {"input": "b"}], "record 1: field 'instruction' is missing; found input"),
    ([{"instruction": 3}], "record 0: field 'instruction' is int; it must be a string"),
    ([{"instruction": " "}], "record 0: field 'instruction' is empty"),
    ([{"instruction": "a", "input": ["b"]}], "record 0: field 'input' is list; it must be a string"),
    ([{"instruction": "a", "output": 7}], "record 0: field 'output' is int; it must be a string"),
])
def test_a_bad_instruction_file_gives_one_line_that_names_file_record_and_field(tmp_path, content, says):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=says) as error:
        load_instructions(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_missing_file_and_a_binary_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.json: no such data file"):
        load_instructions(tmp_path / "nowhere.json")
    (tmp_path / "binary").write_bytes(b"\x80\x03")
    with pytest.raises(ValueError, match="binary: not UTF-8 text"):
        load_instructions(tmp_path / "binary")


def test_output_is_demanded_only_where_it_is_needed(tmp_path):
    path = write(tmp_path, [{"instruction": "a", "output": None}])
    assert load_instructions(path)[0]["output"] is None
    with pytest.raises(ValueError, match="record 0: field 'output' is NoneType"):
        load_instructions(path, need_output=True)


@pytest.mark.parametrize("change, says", [
    ({"preference": 0}, "'preference' is 0; it must be 1 or 2"),
    ({"preference": None}, "'preference' is None"),
    ({"preference": True}, "'preference' is True"),
    ({"preference": "1"}, "'preference' is '1'"),
    ({"output_2": None}, "'output_2' is NoneType"),
])
def test_a_bad_preference_is_named(tmp_path, change, says):
    good = {"instruction": "a", "input": "", "output_1": "x", "output_2": "y", "preference": 2}
    assert load_preferences(write(tmp_path, [good])) == [good]
    with pytest.raises(ValueError, match="record 1: field " + says):
        load_preferences(write(tmp_path, [good, {**good, **change}]))


# Prompts


def test_alpaca_prompts_match_the_published_text():
    assert format_prompt({"instruction": "Add {these}.", "input": "1 2"}) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd {these}.\n\n### Input:\n1 2\n\n### Response:")
    assert format_prompt({"instruction": "Rest.", "input": ""}) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nRest.\n\n### Response:")


def test_a_template_file_in_alpacafarms_form_is_read(tmp_path):
    path = write(tmp_path, {"prompt_inputs": "{instruction}|{input}>", "prompt_noinputs": "{instruction}>"})
    assert format_prompt({"instruction": "a", "input": "b"}, str(path)) == "a|b>"
    assert format_prompt({"instruction": "a"}, str(path)) == "a>"


@pytest.mark.parametrize("content", [
    "{", [1], {"prompt_inputs": "{instruction}"}, {"prompt_inputs": "{inst}", "prompt_noinputs": ""}])
def test_a_bad_template_file_says_what_one_looks_like(tmp_path, content):
    with pytest.raises(ValueError, match="a template file is JSON with prompt_inputs"):
        get_template(str(write(tmp_path, content)))


def test_an_unknown_template_lists_what_exists(tokenizer):
    with pytest.raises(ValueError, match="'alpacca': neither a file nor one of alpaca, tiny, chat"):
        format_prompt({"instruction": "a"}, "alpacca")
    with pytest.raises(ValueError, match="no chat template"):
        format_prompt({"instruction": "a"}, "chat", tokenizer)


# Tokenizers


def test_long_prompts_are_dropped_never_cut(tokenizer):
    examples = [{"instruction": "copper"}, {"instruction": "copper " * 30}, {"instruction": "metal"}]
    bare = Template("{instruction}{input}", "{instruction}")
    prompts = tokenize_prompts(examples, tokenizer, bare, max_tokens=12)
    assert prompts.examples == [examples[0], examples[2]] and prompts.dropped == 1
    assert prompts.ids == [tokenizer.encode("copper"), tokenizer.encode("metal")]
    with pytest.raises(ValueError, match="max_tokens 1: all 3 prompts are longer"):
        tokenize_prompts(examples, tokenizer, bare, max_tokens=1)


# Batches


def test_padding_goes_to_the_named_side_and_the_mask_tells_pad_from_eos():
    ids, mask = left_pad([[5, 6, 2], [7]], pad_id=2)
    assert ids.tolist() == [[5, 6, 2], [2, 2, 7]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]
    ids, mask = right_pad([[5, 6, 2], [7]], pad_id=2)
    assert ids.tolist() == [[5, 6, 2], [7, 2, 2]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]


def test_nothing_to_pad_is_an_error():
    with pytest.raises(ValueError, match="no sequences"):
        left_pad([], 0)
    with pytest.raises(ValueError, match="without tokens"):
        right_pad([[1], []], 0)


def test_every_epoch_visits_every_instruction_once_in_a_new_order():
    stream = PromptStream(10, seed=3)
    drawn = [i for _ in range(5) for i in stream.next_batch(4)]  # 20 draws, the third batch reaches into epoch 1
    first, second = drawn[:10], drawn[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second != list(range(10))


def test_a_stream_resumes_exactly_where_it_was_saved():
    stream = PromptStream(7, seed=5)
    for _ in range(4):
        stream.next_batch(3)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = PromptStream(7, seed=0)
    resumed.load_state_dict(state)
    assert [resumed.next_batch(3) for _ in range(9)] == [stream.next_batch(3) for _ in range(9)]


def test_a_stream_refuses_a_checkpoint_over_other_data():
    with pytest.raises(ValueError, match="the checkpoint counts 7 instructions, the data has 8"):
        PromptStream(8).load_state_dict(PromptStream(7).state_dict())
