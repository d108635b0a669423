# SPDX-License-Identifier: MIT
"""One thin face for the tokenizers that language models come with: SentencePiece's, transformers', and a GGUF file's.

    tokenizer = load_tokenizer("llama-7b").for_template("chat")
    ids = tokenizer.encode("Hello.", bos=True, eos=True)

Departures from the released code: a tokenizer without a pad token gets none added, as that would change the size of the
vocabulary: pad is unk, or else EOS. A text without BOS counts as the continuation of another, without the space that
SentencePiece puts before a new text, so that prompt and response tokenised apart are the joint text's ids.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from formats.gguf import gguf_file, stop_ids
from formats.read import refuse_unfinished

# What a tokenizer consists of on disk; each of the first three can hold a vocabulary, the last names what ends a response.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json")
HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?")  # org/name, or org/name@revision


@dataclass(eq=False)
class Tokenizer:
    """One thin face for SentencePiece and transformers' tokenizers.

    encode(text, bos=True, eos=False) -> ids; decode(ids) -> text; pieces(ids) -> each token's own spelling; bos_token_id
    (None where there is none), eos_token_id (what `encode` ends a text with), stop_ids (all that end a response, EOS first),
    pad_token_id; vocab_size, also len(). bos=True begins a text the way this tokenizer begins texts (SmolLM2's adds no
    BOS); bos=False continues one.
    """

    to_ids: Callable[[str], list[int]]  # the bare text, without BOS and EOS
    to_text: Callable[[list[int]], str]
    vocab_size: int  # the largest id and one
    bos_token_id: int | None
    eos_token_id: int
    pad_token_id: int
    adds_bos: bool = True
    render_chat: Callable[..., str] | None = None  # (text, system=None)
    end_of_turn_id: int | None = None  # what ends a turn in the chat template, where that isn't EOS: see for_template
    other_stops: tuple[int, ...] = ()  # what ends a response, too, by the model's own files (Llama 3 names several)
    pieces: Callable[[list[int]], list[str]] | None = None
    kind: str = "custom"
    save_files: Callable[[Path], object] | None = None  # writes its files into a folder
    home: Path | None = None  # the folder that it came from

    def __post_init__(self) -> None:
        self._newline = self.to_ids("\n")

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends a response: EOS, and what config.json and generation_config.json name beside it."""
        return tuple(dict.fromkeys((self.eos_token_id, *self.other_stops)))

    def for_template(self, template: Any, system: str | None = None) -> "Tokenizer":
        """This tokenizer with the EOS that ends a response to `template`; the tokenizer's own goes on ending one, too. system: a
        message that the chat template puts before every instruction.

        A chat model ends its turn with the template's token (Llama 3's <|eot_id|>). Where EOS is another one
        (<|end_of_text|>) it would never come: each response would run to the length limit and count as unfinished.
        """
        if system:
            if template != "chat" or self.render_chat is None:
                raise ValueError(f"--system {system!r}: goes with --prompt-template chat and a tokenizer with a chat template")
            return replace(self, render_chat=partial(self.render_chat, system=system)).for_template(template)
        chat = template == "chat" and self.end_of_turn_id is not None
        return replace(self, eos_token_id=self.end_of_turn_id, other_stops=self.stop_ids) if chat else self

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Token ids of `text`; `bos` starts a new text, `eos` ends it (never with two of them)."""
        ids = self.to_ids(text) if bos else self._continuation(text)
        # A chat template may have written BOS into the text already.
        if bos and self.adds_bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            ids = [self.bos_token_id, *ids]
        # An output may end in the text of EOS already: with two, a reward model would be trained on what no rollout holds.
        return [*ids, self.eos_token_id] if eos and ids[-1:] != [self.eos_token_id] else ids

    def _continuation(self, text: str) -> list[int]:
        """Ids of `text` as they stand inside a longer text. SentencePiece puts a space before whatever it is given;
        behind a newline the space goes to the newline, which is then cut off. Where the newline merges with the text
        (byte-level BPE) there is no such space to avoid."""
        ids, n = self.to_ids("\n" + text), len(self._newline)
        return ids[n:] if ids[:n] == self._newline else self.to_ids(text)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of `ids` without BOS, EOS and padding. Ids past the vocabulary (an embedding may have more rows) are
        skipped: a policy can sample them, and a run should not end there."""
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        skipped = {self.bos_token_id, self.eos_token_id, self.pad_token_id}
        return self.to_text([i for i in ids if i not in skipped and i < self.vocab_size])

    def save(self, directory: str | Path) -> None:
        """Write the files from which `load_tokenizer(directory)` gives this tokenizer again (before `for_template`).

        Each is replaced whole, and the folder it came from is left alone. Raises ValueError where the directory holds
        another tokenizer's file that would stay: the mixture would be a third tokenizer.
        """
        directory = Path(directory)
        if directory.resolve() == self.home:
            return
        if self.save_files is None:
            raise ValueError(f"{directory}: this tokenizer was not read from files, so it has none to save")
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".tokenizer-") as beside:
            self.save_files(Path(beside))
            files = {file.name: file for file in Path(beside).iterdir() if file.is_file()}
            others = [name for name in TOKENIZER_FILES if (directory / name).exists() and name not in files]
            if others:
                raise ValueError(f"{directory}: holds another tokenizer's {', '.join(others)}; give another directory")
            for name, file in files.items():
                os.replace(file, directory / name)


def template_in_words(tokenizer: Tokenizer, template: Any) -> list[str]:
    """A line where prompts are rendered otherwise than the tokenizer's own chat template would."""
    if tokenizer.render_chat is None or template == "chat":
        return []
    return [f"prompts: template {template if isinstance(template, str) else 'of a file'}, by --prompt-template or its default; "
            "the tokenizer has a chat template of its own, which --prompt-template chat takes"]


def describe_tokenizer(tokenizer: Tokenizer) -> str:
    """One line for a run to print: kind, size, special ids, chat template or not."""
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return ", ".join([
        f"tokenizer: {tokenizer.kind}, {len(tokenizer):,} tokens",
        "no bos" if bos is None else f"bos {bos}" if tokenizer.adds_bos else f"bos {bos} (not added)",
        (f"eos {eos} (the end of a turn)" if eos == tokenizer.end_of_turn_id else f"eos {eos}")
        + "".join(f" or {other}" for other in tokenizer.stop_ids[1:]),
        "pad = eos" if pad == eos else f"pad {pad}", "chat template" if tokenizer.render_chat else "no chat template"])


def check_vocabulary(tokenizer: Tokenizer, rows: int, what: str) -> int:
    """How many of a model's embedding rows no token uses: 0, or a few where the vocabulary was padded to a round number.

    Raises ValueError where the tokenizer has an id that the model, named by `what`, has no row for: on a GPU looking it
    up ends the run without a word about ids.
    """
    for name, i in (("largest id", len(tokenizer) - 1), ("bos_token_id", tokenizer.bos_token_id),
                    ("eos_token_id", tokenizer.eos_token_id), ("pad_token_id", tokenizer.pad_token_id)):
        if i is not None and not 0 <= i < rows:
            raise ValueError(f"{what}: {rows} embedding rows, but the tokenizer's {name} is {i}; give the tokenizer that "
                             "the model was trained with")
    return rows - len(tokenizer)


def window_warning(tokens: int, window: int, what: str) -> list[str]:
    """A line where so many tokens are more than the positions that the model was trained on; to be printed."""
    if tokens <= window:
        return []
    return [f"warning: {what}: {tokens} tokens are more than its {window} positions (max_position_embeddings in config.json); "
            "what stands beyond them it was never trained to read"]


# -------------------------------------------------------------------------------------------------------------- reading


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model folder (Hugging Face's layout or Meta's), a .gguf file, a SentencePiece file, or a name
    on the Hugging Face hub (org/name, org/name@revision), of which the tokenizer's files alone are downloaded.

    Padding: the tokenizer's own token, else unk, else EOS. Unk comes before EOS because LLaMA never emits it, so
    padding stays recognisable. Code that a model brings along is never run. Raises FileNotFoundError or ValueError.
    """
    where, hub = Path(path), HUB_NAME.fullmatch(str(path))
    if where.is_dir():
        refuse_unfinished(where)
        return _from_folder(where)
    if where.is_file():
        return _gguf_tokenizer(where) if where.suffix == ".gguf" else _sentencepiece_tokenizer(where)
    if hub and where.suffix not in (".gguf", ".model", ".json"):
        return _from_folder(_download(*hub.groups()))
    raise FileNotFoundError(f"{path}: no such tokenizer; give a folder with tokenizer.model or tokenizer.json, a .gguf "
                            "file, or a model's name on the Hugging Face hub (org/name)")


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*TOKENIZER_FILES, "config.json"]))
    except Exception as error:  # the hub's errors, HTTP's and the disk's have nothing narrower in common
        raise FileNotFoundError(f"{name}{f'@{revision}' if revision else ''}: neither a folder here nor to be had from "
                                f"the Hugging Face hub ({_one_line(error)})") from None


def _from_folder(folder: Path) -> Tokenizer:
    """transformers reads tokenizer.json. tokenizer.model alone is read by sentencepiece, LLaMA's own way: there
    transformers 5 needs the protobuf package and leaves BOS out."""
    files = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not set(files) & set(TOKENIZER_FILES[:3]):
        return replace(_without_tokenizer_files(folder), home=folder.resolve())
    config = _read_json(folder / "tokenizer_config.json")
    adds_bos = config.get("add_bos_token")  # beside a tokenizer.json transformers 5 overlooks it
    if "tokenizer.model" in files and "tokenizer.json" not in files:
        pad = _added_pad(folder, config)
        tokenizer = _sentencepiece_tokenizer(folder / "tokenizer.model", adds_bos is not False, pad)
    else:
        from transformers import AutoTokenizer

        # Not the default, None: it asks at the terminal whether to run code that lies in the folder.
        tokenizer = _transformers_tokenizer(
            lambda **changes: AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **changes), folder, adds_bos)
    return replace(tokenizer, home=folder.resolve(), other_stops=_named_stops(folder, config, tokenizer),
                   save_files=lambda to: [shutil.copyfile(folder / name, to / name) for name in files])


def _named_stops(folder: Path, config: dict, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends a response by the files beside the tokenizer: transformers' generate stops there, and so does everything here."""
    named = []
    for name in ("config.json", "generation_config.json"):
        ids = _read_json(folder / name).get("eos_token_id")
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        for i in ids:
            if type(i) is not int:
                raise ValueError(f"{folder / name}: eos_token_id is {ids!r}: it must be a token's id, a list of them, or null")
        named += ids
    token = config.get("eos_token")  # tokenizer.model has an EOS of its own, which need not be this one
    token = token.get("content") if isinstance(token, dict) else token
    known = tokenizer.pieces(list(range(len(tokenizer)))) if token and tokenizer.kind == "SentencePiece" else []
    named += [known.index(token)] if token in known else []
    return tuple(i for i in named if 0 <= i < len(tokenizer))


def _without_tokenizer_files(folder: Path) -> Tokenizer:
    """Of a folder with one .gguf file, or with one size of LLaMA in Meta's layout (tokenizer.model lies above it)."""
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return _gguf_tokenizer(ggufs[0])
    if (folder / "params.json").is_file() and (folder.parent / "tokenizer.model").is_file():
        return _sentencepiece_tokenizer(folder.parent / "tokenizer.model")
    several = f"; of its {len(ggufs)} .gguf files one must be named" if ggufs else " nor a .gguf file"
    raise FileNotFoundError(f"{folder}: holds neither tokenizer.json nor tokenizer.model{several}")


def _added_pad(folder: Path, config: dict) -> int | None:
    """The id of the pad token that a folder adds to its tokenizer.model, as AlpacaFarm's does; None without one."""
    added, named = _read_json(folder / "added_tokens.json"), _read_json(folder / "special_tokens_map.json")
    try:
        added = {name: int(i) for name, i in added.items()}
        added |= {token["content"]: int(i) for i, token in (config.get("added_tokens_decoder") or {}).items()}
        pad = config.get("pad_token") or named.get("pad_token")
        pad_id = added.pop(pad["content"] if isinstance(pad, dict) else pad, None)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: the tokenizer's JSON files are damaged ({_one_line(error)})") from None
    others = sorted(added.keys() - {"<unk>", "<s>", "</s>"})  # the model's own, which newer files list again
    if others:
        raise ValueError(f"{folder}: adds {', '.join(others)} to tokenizer.model, which takes a tokenizer.json: "
                         "transformers' AutoTokenizer writes one (save_pretrained, with the protobuf package)")
    return pad_id


def _read_json(file: Path) -> dict:
    """The object in a JSON file; {} where there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict):
            raise ValueError(f"holds a {type(content).__name__}, not an object")
        return content
    except (ValueError, OSError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: not a JSON object ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _sentencepiece_tokenizer(file: Path, adds_bos: bool = True, added_pad: int | None = None) -> Tokenizer:
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, ValueError, OSError) as error:
        tiktoken = re.match(rb"[A-Za-z0-9+/]+=* \d+\s", file.read_bytes()[:200])
        raise ValueError(f"{file}: not a SentencePiece model " + (
            "but tiktoken's, as in Meta's layout of Llama 3; give the model's Hugging Face folder, with tokenizer.json"
            if tiktoken else f"({_one_line(error)})")) from None
    n, bos, eos = pieces.vocab_size(), pieces.bos_id(), pieces.eos_id()
    if eos < 0:
        raise ValueError(f"{file}: the SentencePiece model has no EOS; responses could not end")
    pad = next(i for i in (added_pad, pieces.pad_id(), pieces.unk_id(), eos) if i is not None and i >= 0)
    return Tokenizer(pieces.encode, lambda ids: pieces.decode([i for i in ids if i < n]),
                     max(n, pad + 1), None if bos < 0 else bos, eos, pad, adds_bos, kind="SentencePiece",
                     pieces=lambda ids: [pieces.id_to_piece(i) if i < n else "" for i in ids],
                     save_files=lambda to: shutil.copyfile(file, to / "tokenizer.model"))


def _gguf_tokenizer(file: Path) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast  # AutoTokenizer first spends 4 s on what is said of the model
    from transformers import __version__ as version

    if [int(n) for n in version.split(".")[:2]] < [5, 23]:  # SmolLM2's EOS, <|im_end|>, comes out as <|im_start|>
        raise ValueError(f"{file}: transformers {version} misreads the special tokens of .gguf files; "
                         "pip install 'transformers>=5.23'")

    def read(**changes: Any) -> Any:
        # Alone in a folder: beside a tokenizer.json transformers would read that instead of the file's own vocabulary.
        with tempfile.TemporaryDirectory() as alone:
            (Path(alone) / file.name).symlink_to(file.resolve())
            hf = PreTrainedTokenizerFast.from_pretrained(alone, gguf_file=file.name, **changes)
        backend = json.loads(hf.backend_tokenizer.to_str())
        last = max(backend["model"]["vocab"].values())
        own = [token for token in backend["added_tokens"] if token["id"] <= last]
        if len(own) == len(backend["added_tokens"]):
            return hf
        # transformers adds GPT-2's <|endoftext|> where a file has none, as Llama 3's: an id without an embedding row.
        backend = type(hf.backend_tokenizer).from_str(json.dumps(backend | {"added_tokens": own}))
        return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=hf.chat_template, **hf.special_tokens_map)

    tokenizer = _transformers_tokenizer(read, file)
    return replace(tokenizer, other_stops=tuple(i for i in stop_ids(file) if i < len(tokenizer)))


def _transformers_tokenizer(read: Callable[..., Any], path: Path, adds_bos: bool | None = None) -> Tokenizer:
    """A Tokenizer around the one that `read` gives, with changed fields. adds_bos None: as that one does it by itself."""
    try:
        hf = read()
        text = hf.pad_token if _pad_is_text(hf) else None
        hf = hf if text is None else read(pad_token=None)
    except Exception as error:  # the tokenizers library has nothing narrower for a damaged file
        raise ValueError(f"{path}: no tokenizer that transformers can read ({_one_line(error)})") from None
    if hf.eos_token_id is None:
        raise ValueError(f"{path}: the tokenizer has no EOS token; responses could not end")
    if text is not None and not hf.decode(hf.convert_tokens_to_ids([text]), skip_special_tokens=True):
        raise ValueError(f"{path}: pad_token {text!r} is a piece of ordinary text, and listed as special it would be cut out of "
                         "every answer: take it out of tokenizer.json's added_tokens, and name another pad_token or none")

    def render_chat(text: str, system: str | None = None) -> str:
        turns = [{"role": "system", "content": system}] if system else []
        try:
            return hf.apply_chat_template([*turns, {"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, and can fail in any way
            raise ValueError(f"{path}: the chat template fails ({_one_line(error)})") from None

    return Tokenizer(
        to_ids=lambda text: hf(text, add_special_tokens=False)["input_ids"],
        to_text=lambda ids: hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        vocab_size=max(hf.get_vocab().values()) + 1, bos_token_id=hf.bos_token_id, eos_token_id=hf.eos_token_id,
        pad_token_id=next(i for i in (hf.pad_token_id, hf.unk_token_id, hf.eos_token_id) if i is not None),
        adds_bos=hf("a")["input_ids"][:1] == [hf.bos_token_id] if adds_bos is None else adds_bos,
        render_chat=render_chat if hf.chat_template else None, end_of_turn_id=_end_of_turn(hf),
        pieces=hf.convert_ids_to_tokens, kind="transformers", save_files=hf.save_pretrained)


def _pad_is_text(hf: Any) -> bool:
    """Whether padding is a piece that texts are made of, as "!" is where somebody needed any token for it: once it is called
    special, transformers takes it out of whatever it decodes."""
    pad = hf.pad_token
    if pad is None or pad in (hf.eos_token, hf.bos_token, hf.unk_token) or re.fullmatch(r"[<\[|｜].*[>\]|｜]", pad, re.DOTALL):
        return False
    if not hasattr(hf, "backend_tokenizer"):
        return False
    vocabulary = json.loads(hf.backend_tokenizer.to_str())["model"].get("vocab", {})
    return pad in (vocabulary if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary})


def _end_of_turn(hf: Any) -> int | None:
    """The token that the chat template writes behind an assistant's words; None where that is EOS or no one token."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "WORDS"}]
    try:
        _, words, behind = hf.apply_chat_template(turns, tokenize=False).rpartition("WORDS")
    except Exception:  # no template, or one that fails: render_chat says so to those who want it
        return None
    first = hf(behind.strip(), add_special_tokens=False)["input_ids"][:1] if words else []
    return first[0] if first and first[0] in hf.added_tokens_decoder and first[0] != hf.eos_token_id else None


# -------------------------------------------------------------------------------------------------------------- copying


def copy_tokenizer(source: Path, directory: Path) -> None:
    """The tokenizer's files; out of a GGUF file they are made."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    if not (source / "config.json").is_file() and gguf_file(source):
        load_tokenizer(source).save(directory)
