"""What several test files share: a random miniature world on disk, and a machine that pretends to have two GPUs."""

import json
import os
import random
from dataclasses import asdict
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n: two workers with two threads each would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.overrides import TorchFunctionMode
from llm_server import Server

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("MPLBACKEND", "Agg")

SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             initializer_range=0.2, max_position_embeddings=512)


# --- a world on disk -----------------------------------------------------------------------------------------------


def make_tasks(n: int, seed: int) -> list[dict]:
    """n tasks of the miniature world, in the proportions of its splits."""
    from tiny.tasks import BUILDERS

    rng = random.Random(seed)
    builders = rng.choices(list(BUILDERS), list(BUILDERS.values()), k=n)
    return [asdict(builder(rng)) for builder in builders]


def write_tokenizer(tasks: list[dict], file: Path) -> None:
    """SentencePiece with byte fallback, as LLaMA's, trained on whole prompts, so that the template takes few pieces."""
    import sentencepiece

    from data import format_prompt

    texts = [text for task in tasks for text in (format_prompt(task, "tiny"), task["output"])]
    file.parent.mkdir(parents=True)
    with open(file, "wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=out, vocab_size=600, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1, minloglevel=2)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder like tiny/ after a build, with random weights: sft/, reward/ and data/{ppo,evaluation,about}.json."""
    from formats.tokenizer import load_tokenizer
    from model import Llama, LlamaConfig
    from reward import RewardModel
    from tiny.annotators import add_references
    from tiny.make import public
    from tiny.tasks import about_tasks

    folder = tmp_path_factory.mktemp("world")
    tasks = make_tasks(300, seed=0)
    about = [asdict(task) for task in about_tasks(random.Random(0))[:4]]
    write_tokenizer(tasks, folder / "sft" / "tokenizer.model")
    tokenizer = load_tokenizer(folder / "sft")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), **SIZES)
    Llama(config).save_pretrained(folder / "sft")
    RewardModel(Llama(config)).save_pretrained(folder / "reward")
    (folder / "reward" / "tokenizer.model").write_bytes((folder / "sft" / "tokenizer.model").read_bytes())
    (folder / "data").mkdir()
    splits = {"ppo": tasks[:60], "evaluation": add_references(tasks[60:72], seed=0),
              "about": add_references(about, seed=0)}
    for name, records in splits.items():
        text = json.dumps([public(record) for record in records], ensure_ascii=False)
        (folder / "data" / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


# --- files ----------------------------------------------------------------------------------------------------------


def write(folder: Path, content: object, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


# --- a tokenizer ----------------------------------------------------------------------------------------------------

LINES = ["Name the capital of Chile.", "The capital of Chile is Santiago.", "Copper is a metal.", "What is copper?",
         "### Instruction:", "### Input:", "### Response:", "Sort 3, 1 and 2: the answer is 1, 2, 3."]


def train_sentencepiece(file: Path, **settings: object) -> None:
    """LLaMA's settings: byte fallback, nothing normalised away."""
    import sentencepiece

    with open(file, "wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES * 20), model_writer=out, vocab_size=340, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2, **settings)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A directory with nothing but tokenizer.model."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(folder / "tokenizer.model")
    return folder


# --- an LLM to ask ---------------------------------------------------------------------------------------------------


@pytest.fixture
def serve():
    servers = []

    def start(*script, **settings):
        servers.append(Server(script, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


# --- two GPUs that aren't there --------------------------------------------------------------------------------------


def index_without_guard(x: Tensor, key) -> Tensor:
    """x[key] by the operators underneath: integers, slices and index tensors."""
    dimension, picked = 0, []
    for k in key if isinstance(key, tuple) else (key,):
        if isinstance(k, int):
            x = x.select(dimension, k)
            continue
        if isinstance(k, slice):
            x = torch.ops.aten.slice(x, dimension, *k.indices(x.shape[dimension]))
        elif k.device not in (x.device, torch.device("cpu")):
            raise RuntimeError(f"index on {k.device} for a tensor on {x.device}")  # fake tensors don't look at this one
        picked.append(k if isinstance(k, Tensor) else None)
        dimension += 1
    return torch.ops.aten.index(x, picked) if any(k is not None for k in picked) else x


class WithoutDeviceGuards(TorchFunctionMode):
    """x[...] and ~x switch the real GPU, even for a fake tensor: a torch built without CUDA, or a machine with one GPU
    where "cuda:1" is asked for, then fails. The operators that they call do not."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.__getitem__:
            return index_without_guard(*args)
        if function is Tensor.__invert__:
            return args[0].bitwise_not()
        return function(*args, **(kwargs or {}))


@pytest.fixture
def two_gpus(monkeypatch):
    """("cuda:0", "cuda:1") on any machine: all tensors of the test are fake, with shape and device but no numbers.

    Mixing devices raises, and so does reading a value back. Forward only: autograd asks the real GPU for its stream.
    """
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)  # it would touch the real GPU
    with torch.no_grad(), fake_tensor.FakeTensorMode(), WithoutDeviceGuards():
        yield "cuda:0", "cuda:1"


def place(build, device: str) -> torch.nn.Module:
    """The model with fake weights on `device`."""
    with torch.device("meta"):
        model = build()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, torch.nn.Parameter(fake, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
    return model
