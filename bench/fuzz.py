"""Mutates every kind of file that the programs read, thousands of times, and loads each: nothing may crash, hang or swell.

    python bench/fuzz.py                      # 3,000 mutations of each kind of file
    python bench/fuzz.py --only gguf --count 10000 --seed 1
    python bench/fuzz.py --only stage         # the kinds whose names begin so: flags, data and folders of sft.py and reward.py

A loader may succeed, or raise ValueError or OSError with a message of one line, which the programs print before they exit with
code 2. Stages 1 and 2 are run up to their first step: they must end with 0, or 1 or 2 and one line, and leave no file changed.
Anything else is a finding: another exception, a killed process, more than --seconds for one file, or a peak memory more than
--megabytes above that of the unmutated file. Each kind runs in a process of its own. Exit code 1 on findings.
"""

import argparse
import contextlib
import io
import json
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


# ----------------------------------------------------------------------------------------------------------- mutation

NASTY = [b"", b"\x00", b"\xff\xff\xff\xff", b"-1", b"999999999999", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'""',
         b"../../etc/passwd", b"/etc/passwd", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000,
         b"\xed\xa0\x80", b"\\ud800", b"\xe2\x80\xa8", b"__reduce__"]
NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")
NUMBERS = [b"0", b"-1", b"1", b"4294967297", b"1e308", b"null", b'"x"', b"[1]", b"1" * 30]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to three changes: bytes flipped, cut, doubled, moved, a number or a JSON value exchanged."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        # Headers decide what a loader does, so half of the changes fall into the first 2,000 bytes.
        reach = min(len(data), 2000) if rng.random() < 0.5 else len(data)
        at = rng.randrange(reach + 1)
        length = min(len(data) - at, rng.choice([1, 2, 4, 8, 50, 1000]))
        what = rng.randrange(8)
        if what == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            data[at:at + length] = rng.randbytes(length)
        elif what == 2:
            del data[at:at + length]
        elif what == 3:
            data[at:at] = data[at:at + length]
        elif what == 4:
            data = data[:at]
        elif what == 5:
            data[at:at + rng.choice([0, 1, 8])] = rng.choice(NASTY)
        elif what == 6 and (numbers := list(NUMBER.finditer(data[:reach]))):
            number = rng.choice(numbers)
            data[number.start():number.end()] = rng.choice(NUMBERS)
        elif what == 7:
            other = rng.randrange(len(data) + 1)
            data[at:at + length] = data[other:other + length]
    return bytes(data)


# --------------------------------------------------------------------------------------------------- files and loaders


def tiny_files(folder: Path) -> None:
    """One small file of every kind."""
    import torch

    from lora import add_lora, save_lora
    from model import Llama, LlamaConfig, ValueModel
    from reward import RewardModel

    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1)
    model = Llama(LlamaConfig(**sizes))
    model.save_pretrained(folder / "model")
    RewardModel(Llama(LlamaConfig(**sizes))).save_pretrained(folder / "reward")
    shutil.copytree(folder / "model", folder / "binary")
    torch.save(dict(model.named_parameters()), folder / "binary" / "pytorch_model.bin")
    (folder / "binary" / "model.safetensors").unlink()
    shutil.copytree(folder / "model", folder / "sharded")
    (folder / "sharded" / "model.safetensors").rename(folder / "sharded" / "model-00001-of-00001.safetensors")
    index = {"weight_map": {name: "model-00001-of-00001.safetensors" for name in dict(model.named_parameters())}}
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "meta").mkdir()
    params = {"dim": 8, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "norm_eps": 1e-6, "vocab_size": 40,
              "multiple_of": 4}
    (folder / "meta" / "params.json").write_text(json.dumps(params))
    torch.save(renamed(model, METAS), folder / "meta" / "consolidated.00.pth")
    add_lora(model, rank=2)
    save_lora(model, folder / "adapter", base_model_name_or_path="model")
    torch.save({name: p for name, p in model.named_parameters() if "lora" in name}, folder / "released.bin")
    optimizer = torch.optim.Adam(ValueModel(model).head.parameters())
    torch.save({"step": 3, "beta": 0.02, "stream": {"seed": 0}, "optimizer": optimizer.state_dict(),
                "random": {"torch": torch.get_rng_state()}}, folder / "state.pt")
    shutil.copytree(ROOT / "tiny" / "sft", folder / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    records = [{"instruction": f"Say {i}.", "input": "x" if i % 2 else "", "output": "yes", "output_1": "a", "output_2": "b",
                "preference": 1 + i % 2, "key": f"k{i}"} for i in range(20)]
    (folder / "list.json").write_text(json.dumps(records, indent=1))
    (folder / "lines.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    template = {"prompt_inputs": "{instruction} {input}:", "prompt_noinputs": "{instruction}:"}
    (folder / "template.json").write_text(json.dumps(template))
    passages = [{"title": f"T{i}", "text": "some words " * 9} for i in range(9)]
    (folder / "passages.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    pool = [{"model": "m", "name": "a", "temperature": 0.5, "prompt": "{instruction}{output_1}{output_2}"}]
    (folder / "pool.json").write_text(json.dumps(pool))
    (folder / "run").mkdir()
    (folder / "run" / "manifest.json").write_text(json.dumps({"../lines.jsonl": {"bytes": 3, "sha256": "0"}}))
    try:
        write_gguf(folder / "model.gguf", Llama.from_pretrained(folder / "model"))
    except ImportError:
        print("gguf left out: pip install gguf")


STAGES = {"sft": ["--model", "--validation=0.2"], "reward": ["--base", "--held-out=0.2"]}


def stage_files(folder: Path) -> None:
    """The flags of both stages, one a line, and of each a training that was stopped behind its second step."""
    import torch

    from model import Llama, LlamaConfig
    from training import stages

    shutil.copytree(folder / "tokenizer", folder / "base")
    torch.manual_seed(0)
    Llama(LlamaConfig(vocab_size=2560, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
          ).save_pretrained(folder / "base")
    (folder / "records.json").write_text((folder / "list.json").read_text())
    for name, (base, share) in STAGES.items():
        flags = [f"{base}={folder / 'base'}", f"--data={folder / 'records.json'}", f"--out={folder}/stage-{name}", share,
                 "--prompt-template=tiny", "--epochs=2", "--batch-size=4", "--micro-batch-size=2", "--learning-rate=0.001",
                 "--warmup=0.03", "--seed=1", "--max-tokens=512", "--lora-rank=2", "--lora-alpha=64", "--lora-dropout=0.1",
                 "--device=cpu", "--save-every=2"]
        (folder / f"{name}.flags").write_text("\n".join(flags))
        honest, stages.Stage.__call__ = stages.Stage.__call__, stop_behind(2)
        with contextlib.suppress(Through), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            __import__(name).main(flags)
        stages.Stage.__call__ = honest
        assert (folder / f"stage-{name}" / "step-0002" / "state.pt").is_file()


class Through(BaseException):
    """As far as a program is to go."""


def stop_behind(step: int) -> Callable:
    """For stages.Stage.__call__."""
    from training.stages import Stage

    honest = Stage.__call__

    def call(stage, loop):
        honest(stage, loop)
        if loop.step >= step:
            raise Through

    return call


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def to_first_step(folder: Path, name: str, argv: list[str]) -> None:
    """A program of stage 1 or 2 up to its first step. Raises ValueError where it refuses."""
    from training.stages import Stage, exit_code

    program, before, said = __import__(name), files_of(folder), io.StringIO()

    def run() -> None:
        try:
            args = program.parse_args(argv)
            if not args.resume:
                args.out = str(folder / "new")  # wherever the mutated flag points
            program.run(args)
        except (Through, SystemExit) as error:  # --help
            assert not getattr(error, "code", 0), "argparse's own exit"

    honest, Stage.__call__ = Stage.__call__, stop_behind(0)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = exit_code(f"{name}.py", run)
    finally:
        Stage.__call__ = honest
    assert files_of(folder) == before, "files were left or changed"
    lines = [line for line in re.split("[\r\n]", said.getvalue()) if line.strip() and "%|" not in line]
    assert code in (0, 1, 2) and len(lines) == bool(code), f"exit code {code}: {lines}"
    if code:
        raise ValueError(lines[0])


def resume(folder: Path, name: str) -> None:
    """The stopped training whose checkpoint was changed: by someone who writes a manifest that fits."""
    from training.folder import MANIFEST, describe

    checkpoint = folder / f"stage-{name}" / "step-0002"
    described = {file.name: describe(file) for file in sorted(checkpoint.iterdir()) if file.name != MANIFEST}
    (checkpoint / MANIFEST).write_text(json.dumps(described))
    to_first_step(folder, name, ["--resume", f"--out={folder}/stage-{name}"])


def stage_kinds() -> dict[str, tuple[str, Callable[[Path], object]]]:
    def flags(name: str) -> Callable[[Path], object]:
        return lambda folder: to_first_step(folder, name, [
            word for word in (folder / f"{name}.flags").read_bytes().decode(errors="replace").split("\n") if word])

    def resumed(name: str) -> Callable[[Path], object]:
        return lambda folder: to_first_step(folder, name, ["--resume", f"--out={folder}/stage-{name}"])

    def rewritten(name: str) -> Callable[[Path], object]:
        return lambda folder: resume(folder, name)

    found: dict = {}
    for name, n in (("sft", 1), ("reward", 2)):
        checkpoint = f"stage-{name}/step-0002"
        found |= {f"stage {n} flags": (f"{name}.flags", flags(name)), f"stage {n} data": ("records.json", flags(name)),
                  f"stage {n} record": (f"stage-{name}/training.json", resumed(name)),
                  f"stage {n} manifest": (f"{checkpoint}/manifest.json", resumed(name)),
                  f"stage {n} state": (f"{checkpoint}/state.pt", rewritten(name)),
                  f"stage {n} weights": (f"{checkpoint}/trained.safetensors", rewritten(name))}
    return found


OURS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
        "mlp.down_proj", "post_attention_layernorm", "input_layernorm", "embed_tokens", "lm_head", "model.norm", "model."]
METAS = ["attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w3",
         "feed_forward.w2", "ffn_norm", "attention_norm", "tok_embeddings", "output", "norm", ""]
GGUFS = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "ffn_norm", "attn_norm", "token_embd",
         "output", "output_norm", ""]


def renamed(model, names: list[str]) -> dict:
    """The tensors of a model under the names of another format."""
    found = {}
    for name, tensor in model.named_parameters():
        for ours, theirs in zip(OURS, names, strict=True):
            name = name.replace(ours, theirs)
        found[name] = tensor.detach()
    return found


def write_gguf(file: Path, model) -> None:
    """The smallest GGUF file that open_gguf reads."""
    import gguf

    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(64), writer.add_embedding_length(8), writer.add_block_count(2), writer.add_feed_forward_length(12)
    writer.add_head_count(2), writer.add_head_count_kv(1), writer.add_layer_norm_rms_eps(1e-6), writer.add_vocab_size(40)
    for name, tensor in renamed(model, GGUFS).items():
        writer.add_tensor(name.replace("layers.", "blk."), tensor.numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()


def read_answer(folder: Path) -> None:
    """A judge's answer is text: whatever it is, it is read as a verdict or as none."""
    from evaluation.factuality import read_facts, read_truth
    from evaluation.judges import read_verdict

    text = (folder / "answer.txt").read_bytes().decode("utf-8", errors="replace")
    assert read_verdict(text) in (1, 1.5, 2, None) and read_truth(text) in (True, False, None)
    assert isinstance(read_facts(text), list | None)


def load_adapter(path: Path) -> None:
    import torch

    from lora import load_lora
    from model import Llama

    torch.manual_seed(0)
    load_lora(Llama.from_pretrained(path.parent / "model"), path)


def kinds() -> dict[str, tuple[str, Callable[[Path], object]]]:
    """kind: (the file that is mutated, how it is loaded); the folder is given."""
    import data
    from evaluation import factuality, judges
    from formats.tokenizer import load_tokenizer
    from model import Llama
    from reward import RewardModel
    from training.checkpoint import read_state
    from training.folder import damage, read_lines

    def load(name: str) -> Callable[[Path], object]:
        return lambda folder: Llama.from_pretrained(folder / name)

    return {
        "config": ("model/config.json", load("model")), "safetensors": ("model/model.safetensors", load("model")),
        "index": ("sharded/model.safetensors.index.json", load("sharded")), "bin": ("binary/pytorch_model.bin", load("binary")),
        "meta params": ("meta/params.json", load("meta")), "meta weights": ("meta/consolidated.00.pth", load("meta")),
        "gguf": ("model.gguf", load("model.gguf")),
        "reward config": ("reward/config.json", lambda folder: RewardModel.from_pretrained(folder / "reward")),
        "reward scale": ("reward/reward_config.json", lambda folder: RewardModel.from_pretrained(folder / "reward")),
        "adapter config": ("adapter/adapter_config.json", lambda folder: load_adapter(folder / "adapter")),
        "adapter": ("adapter/adapter_model.safetensors", lambda folder: load_adapter(folder / "adapter")),
        "released adapter": ("released.bin", lambda folder: load_adapter(folder / "released.bin")),
        "trainer state": ("state.pt", lambda folder: read_state(folder / "state.pt")),
        "manifest": ("run/manifest.json", lambda folder: damage(folder / "run")),
        "sentencepiece": ("tokenizer/tokenizer.model", lambda folder: load_tokenizer(folder / "tokenizer").encode("Hello.")),
        "instructions": ("list.json", lambda folder: data.load_instructions(folder / "list.json")),
        "instruction lines": ("lines.jsonl", lambda folder: data.load_instructions(folder / "lines.jsonl")),
        "preferences": ("list.json", lambda folder: data.load_preferences(folder / "list.json")),
        "template": ("template.json", lambda folder: data.format_prompt({"instruction": "a"}, str(folder / "template.json"))),
        "annotations": ("list.json", lambda folder: judges.read_annotations(folder / "list.json")),
        "judgements": ("lines.jsonl", lambda folder: judges.read_records(folder / "lines.jsonl")),
        "pool": ("pool.json", lambda folder: judges.load_pool(folder / "pool.json", lambda **settings: None)),
        "passages": ("passages.jsonl", lambda folder: factuality.load_passages(folder / "passages.jsonl")),
        "metrics": ("lines.jsonl", lambda folder: read_lines(folder / "lines.jsonl")),
        "judge's answer": ("answer.txt", read_answer),
    } | stage_kinds()


# ---------------------------------------------------------------------------------------------------------- one kind


def fuzz(kind: str, folder: Path, count: int, seed: int, seconds: int, megabytes: int) -> Counter:
    """Loads `count` mutations; prints findings; returns how often each outcome was seen."""
    file, load = kinds()[kind]
    file = folder / file
    if not file.exists() and kind == "judge's answer":
        file.write_text("- A fact.\nThe first is right. Verdict: 1\nTrue")
    if not file.exists():
        return Counter()
    original, outcomes = file.read_bytes(), Counter()
    load(folder)  # the file as it was is good, or the mutations would show nothing
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def too_slow(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_slow)
    for i in range(count):
        rng = random.Random(f"{kind} {seed} {i}")
        file.write_bytes(mutate(original, rng))
        signal.alarm(seconds)
        try:
            load(folder)
            outcomes["loaded"] += 1
        except TimeoutError:
            outcomes["HUNG"] += 1
            print(f"{kind}, mutation {i}: more than {seconds} s", flush=True)
        except (ValueError, OSError) as error:
            outcomes["refused"] += 1
            if "\n" in str(error):
                outcomes["MANY LINES"] += 1
                print(f"{kind}, mutation {i}: a message of many lines: {str(error)!r:.300}", flush=True)
        except BaseException as error:
            outcomes["CRASHED"] += 1
            print(f"{kind}, mutation {i}: {type(error).__name__}: {str(error)!r:.300}", flush=True)
        finally:
            signal.alarm(0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
        if grown > megabytes:
            outcomes["SWELLED"] += 1
            print(f"{kind}, mutation {i}: {grown:.0f} MiB more than before", flush=True)
            base += int(grown * 1024)
    grown = max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
    print(f"{kind}: peak memory {grown:.0f} MiB above the start", flush=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=3000, help="mutations of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=10, help="for loading one file")
    parser.add_argument("--megabytes", type=int, default=300, help="above the memory before")
    parser.add_argument("--only", default="", help="kinds whose names begin so")
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        outcomes = fuzz(args.only, args.folder, args.count, args.seed, args.seconds, args.megabytes)
        print("outcomes " + json.dumps(outcomes))
        return 0
    bad = 0
    for kind in [kind for kind in kinds() if kind == args.only] or [kind for kind in kinds() if kind.startswith(args.only)]:
        with tempfile.TemporaryDirectory() as folder:
            tiny_files(Path(folder))
            if kind.startswith("stage"):
                stage_files(Path(folder))
            command = [sys.executable, __file__, "--folder", folder, "--only", kind]
            for name in ("count", "seed", "seconds", "megabytes"):
                command += [f"--{name}", str(getattr(args, name))]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        lines = done.stdout.splitlines()
        through = bool(lines) and lines[-1].startswith("outcomes ")
        found = json.loads(lines[-1].removeprefix("outcomes ")) if through else {"KILLED": done.returncode}
        findings = {k: v for k, v in found.items() if k.isupper()}
        bad += bool(findings)
        print("\n".join(lines[:-1][-6:]))
        said = ", ".join(f"{n:,} {what}" for what, n in found.items())
        print(f"{kind:<18} {said}{'   <-- FINDING' if findings else ''}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
