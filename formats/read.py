# SPDX-License-Identifier: MIT
"""A model on disk, whatever its layout: Hugging Face's folder, Meta's, a GGUF file, or a name on the hub.

    config, stored = open_checkpoint("llama-7b", LlamaConfig.from_dict)

The paper (section 2.1) starts from AlpacaFarm's models, which are published as Hugging Face folders of weight differences
(alpacafarm.py); LLaMA itself came in Meta's layout.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from formats.gguf import gguf_file, open_gguf
from formats.meta import open_meta
from formats.tensors import Stored, first_line, parse_json, read_tensor, stored_tensors


ON_THE_HUB = r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?"  # org/name, org/name@revision


def open_checkpoint(path: str | os.PathLike, build: Callable[[dict[str, Any]], Any]) -> tuple[Any, dict[str, Stored]]:
    """(build(fields of a config.json), every tensor under its Hugging Face name) of a model on disk, none of which is held.

    build makes the configuration and complains of bad values with ValueError, which then names the file. Raises
    FileNotFoundError or ValueError with one line that says what the path is instead of a model.
    """
    path = local_copy(path)
    refuse_unfinished(path)
    if (path / "config.json").is_file():
        config, stored = parse_json(path / "config.json", build), stored_tensors(path)
        if config.tie_word_embeddings:
            check_tie(stored, "model.embed_tokens.weight")
        return config, stored
    if (path / "params.json").is_file():
        return open_meta(path, build)
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"{path}: an adapter, not a model; name its base model and the adapter apart (train.py: --policy "
                         "BASE --adapter DIR), or merge them: python lora.py merge")
    if gguf_file(path):
        return open_gguf(gguf_file(path), build)
    if path.is_file():
        raise ValueError(f"{path}: not a model; give its folder, or a .gguf file")
    if several := sorted(file.name for file in path.glob("*.gguf")):
        raise ValueError(f"{path}: holds {len(several)} .gguf files, name one of them: {', '.join(several)}")
    raise FileNotFoundError(f"{path / 'config.json'}: not found; a model is a folder with config.json and "
                            "model.safetensors, a folder of Meta's with params.json, a .gguf file, or org/name on the hub")


def open_config(path: str | os.PathLike, build: Callable[[dict[str, Any]], Any]) -> Any:
    """build(fields of config.json) alone: of a folder that has no weights yet, or of a model on the hub before it is downloaded.
    Where there is no config.json it is open_checkpoint's."""
    folder = Path(path)
    if not folder.exists() and re.fullmatch(ON_THE_HUB, str(path)):
        from huggingface_hub import hf_hub_download

        name, _, revision = str(path).partition("@")
        with contextlib.suppress(Exception):  # its own kinds; open_checkpoint says what is wrong
            folder = Path(hf_hub_download(name, "config.json", revision=revision or None)).parent
    if (folder / "config.json").is_file():
        return parse_json(folder / "config.json", build)
    return open_checkpoint(path, build)[0]


def refuse_unfinished(folder: Path) -> None:
    """ValueError for the folder of a training of sft.py or reward.py that has not come to its end: it holds no model yet."""
    if (folder / "training.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: holds a training that isn't finished; python sft.py (or reward.py, whichever began it) "
                         f"--resume --out {folder} goes on with it")


def check_tie(stored: dict[str, Stored], embedding: str | None) -> None:
    """Raises ValueError where a tied model's files hold an output layer that is not the embedding: it would be lost."""
    name = "lm_head.weight"
    if embedding not in stored or name not in stored:
        return
    head, tied_to = read_tensor(stored[name], name), read_tensor(stored[embedding], embedding)
    if head.shape != tied_to.shape or not torch.equal(head, tied_to.to(head.dtype)):
        raise ValueError(f"{stored[name].file}: tensor {name} is not the embedding, to which config.json ties it: set "
                         "tie_word_embeddings to false there")


def local_copy(path: str | os.PathLike) -> Path:
    """The path itself, or for `org/name` (`org/name@revision`) that isn't a local one, the hub's files in its cache.

    Raises FileNotFoundError with one line where the hub can't be reached or has no such model.
    """
    if Path(path).exists() or not re.fullmatch(ON_THE_HUB, str(path)):
        return Path(path)
    from huggingface_hub import HfApi, snapshot_download

    name, _, revision = str(path).partition("@")
    fetch = partial(snapshot_download, name, revision=revision or None, allow_patterns=[
        "*.json", "*.safetensors", "*.bin", "*.pth", "*.model", "*.jinja", "*.txt"])
    others = ["*.bin", "*.pth", "*/*"]
    try:
        # Not list_repo_files: without a network it retries for half a minute and prints a line each time.
        files = HfApi().model_info(name, revision=revision or None, timeout=10).siblings or []
        # Many repositories hold their weights twice: safetensors is the one worth the traffic.
        twice = any(file.rfilename.endswith(".safetensors") for file in files)
        return Path(fetch(ignore_patterns=others if twice else ["*/*"]))
    except Exception as error:  # its own kinds, httpx's and the operating system's
        with contextlib.suppress(Exception):  # what an earlier run fetched serves without a network
            return Path(fetch(ignore_patterns=others, local_files_only=True))
        raise FileNotFoundError(f"{path}: no such folder here, and the hub gave no such model "
                                f"({type(error).__name__}: {first_line(error)})") from error
