"""Whether a model says here what it says in transformers: logits, and greedy answers token for token.

    python bench/parity.py --model SMOLLM2_DIR          # or its .gguf file

Prints the largest difference of any logit over a left-padded batch of prompts (float32), and for each prompt how many of
the greedy tokens are equal. Exit code 1 when a token differs or a logit is off by more than 1e-4.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from data import format_prompt, left_pad  # noqa: E402
from formats.tokenizer import load_tokenizer  # noqa: E402
from model import Llama, generate  # noqa: E402

INSTRUCTIONS = ["Name three animals and say where they live.", "What is the capital of France?",
                "Write one sentence about the sea.", "Explain in simple words why the sky looks blue during the day."]


def load_theirs(path: Path) -> torch.nn.Module:
    """transformers' model of a folder or a .gguf file, in float32."""
    from transformers import AutoModelForCausalLM

    where = {"gguf_file": path.name} if path.is_file() else {}
    return AutoModelForCausalLM.from_pretrained(path.parent if path.is_file() else path, dtype=torch.float32, **where)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder or .gguf file")
    parser.add_argument("--tokens", type=int, default=64, help="greedy tokens a prompt")
    args = parser.parse_args()
    ours, theirs = Llama.from_pretrained(args.model, dtype=torch.float32), load_theirs(args.model)
    tokenizer = load_tokenizer(args.model)
    template = "chat" if tokenizer.render_chat else "alpaca"
    prompts = [tokenizer.encode(format_prompt({"instruction": text}, template, tokenizer)) for text in INSTRUCTIONS]
    ids, mask = left_pad(prompts, tokenizer.pad_token_id)
    real = mask[..., None]
    logits, their_logits = ours(ids, mask), theirs(ids, attention_mask=mask.long()).logits
    gap = ((logits - their_logits) * real).abs().max().item()
    print(f"logits: largest difference {gap:.1e}, largest logit {(logits * real).abs().max():.1f}")
    same, eos, pad = True, tokenizer.eos_token_id, tokenizer.pad_token_id
    for text, prompt in zip(INSTRUCTIONS, prompts, strict=True):
        prompt = torch.tensor([prompt])
        mine = generate(ours, prompt, None, args.tokens, temperature=0, eos_token_id=eos)[0].tolist()
        yours = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=args.tokens, do_sample=False,
                                eos_token_id=eos, pad_token_id=pad)[0, prompt.shape[1]:].tolist()
        equal = sum(a == b for a, b in zip(mine, yours, strict=False))
        same &= mine == yours
        print(f"{equal} of {len(yours)} greedy tokens equal: {text} → {tokenizer.decode(mine)[:60]!r}")
    return 0 if same and gap < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
