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
    ({"preference": 3}, "'preference' is 3; it must be 1 or 2"),
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


# --- records of other habits -----------------------------------------------------------------------------------------

TURN, ANSWER = {"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "3"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("record", [
    {"instruction": "Add 1 and 2.", "input": "", "output": "3"}, {"prompt": "Add 1 and 2.", "output": "3"},
    {"messages": [TURN, ANSWER]}, {"prompt": [TURN], "output": "3"}])
def test_instructions_are_read_whatever_their_fields_are_called(tmp_path, record):
    [found] = load_instructions(write(tmp_path, [record]), need_output=True)
    assert (found["instruction"], found["input"], found["output"]) == ("Add 1 and 2.", "", "3")


def test_conversations_of_several_turns_are_left_out_and_system_messages_said(tmp_path):
    path = write(tmp_path, [{"messages": [SYSTEM, TURN, ANSWER]}, {"messages": [TURN, ANSWER, TURN, ANSWER]},
                            {"messages": [ANSWER]}])
    found = load_instructions(path)
    assert [record["output"] for record in found] == ["3"]
    assert found.note == (f"{path}: 1 of 3 rows; 2 left out: conversations of several turns; not read: system messages (1 rows)")


@pytest.mark.parametrize("record", [
    {"instruction": "Add 1 and 2.", "input": "", "output_1": "3", "output_2": "4", "preference": 1},
    {"prompt": "Add 1 and 2.", "chosen": "3", "rejected": "4"},
    {"prompt": [TURN], "chosen": [ANSWER], "rejected": [ANSWER | {"content": "4"}]},
    {"chosen": [TURN, ANSWER], "rejected": [TURN, ANSWER | {"content": "4"}], "score_chosen": 9.0, "score_rejected": 2.0}])
def test_preferences_are_read_as_pairs_or_as_chosen_and_rejected(tmp_path, record):
    found = load_preferences(write(tmp_path, [record]))
    assert [(r["instruction"], r["output_1"], r["output_2"], r["preference"]) for r in found] == [("Add 1 and 2.", "3", "4", 1)]
    assert ("not read: margins (1 rows)" in found.note) == ("score_chosen" in record)


def test_ties_are_left_out_and_said(tmp_path):
    pair = {"instruction": "a", "output_1": "x", "output_2": "y"}
    records = [pair | {"preference": p} for p in (2, 0, 1.5, None)] + [{"prompt": "a", "chosen": "x", "rejected": "x"}]
    path = write(tmp_path, records)
    found = load_preferences(path)
    assert [r["preference"] for r in found] == [2] and found.note == f"{path}: 1 of 5 rows; 4 left out: ties"
    with pytest.raises(ValueError, match="0 of 1 rows; 1 left out: ties: none is left"):
        load_preferences(write(tmp_path, [pair | {"preference": 0}]))


@pytest.mark.parametrize(("record", "says"), [
    ({"messages": [{"role": "user"}]}, "a conversation must be"),
    ({"prompt": "a", "chosen": [TURN], "rejected": "b"}, "field 'chosen' ends with a turn of 'user', not of the assistant"),
    ({"chosen": "a", "rejected": "b"}, "field 'instruction' is missing"),
    ({"chosen": [TURN, ANSWER], "rejected": [TURN | {"content": "Other."}, ANSWER]}, "answer different prompts"),
    ({"prompt": "a", "chosen": "b"}, "a conversation must be")])
def test_what_is_neither_is_one_line(tmp_path, record, says):
    load = load_preferences if "chosen" in record else load_instructions
    with pytest.raises(ValueError, match=says) as caught:
        load(write(tmp_path, [record]))
    assert "record 0" in str(caught.value) and "\n" not in str(caught.value)


def test_csv_is_read_with_line_breaks_and_quotes_in_its_fields(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('instruction,output_1,output_2,preference\n"Say ""hi"",\nplease",hi,no,1\nb,x,y,\n', encoding="utf-8-sig")
    found = load_preferences(path)
    assert [(r["instruction"], r["preference"]) for r in found] == [('Say "hi",\nplease', 1)] and "1 left out: ties" in found.note
    path.write_text("instruction,input\na,b,c\n")
    with pytest.raises(ValueError, match="record 0: has more fields than the first row names"):
        load_instructions(path)
    path.write_text("instruction,input\na\n")
    with pytest.raises(ValueError, match="record 0: has fewer fields"):
        load_instructions(path)


def test_parquet_is_read_and_a_damaged_file_is_one_line(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "chats.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": [TURN, ANSWER]}]), path)
    assert load_instructions(path, need_output=True)[0]["output"] == "3"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="chats.parquet: no Parquet file, or a damaged one"):
        load_instructions(path)


def test_a_file_of_a_dataset_on_the_hub_is_fetched_once_by_its_name(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repository, file, repo_type, revision):
        asked.append((repository, file, repo_type, revision))
        return str(write(tmp_path, [{"prompt": "a"}]))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load_instructions("hf://datasets/org/name@v1.0/data/train.json")[0]["instruction"] == "a"
    assert load_instructions("hf://datasets/org/name/train.json") and asked == [
        ("org/name", "data/train.json", "dataset", "v1.0"), ("org/name", "train.json", "dataset", None)]
    with pytest.raises(FileNotFoundError, match="must be hf://datasets/org/name/path"):
        load_instructions("hf://org/name")
