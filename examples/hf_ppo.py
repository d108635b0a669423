# SPDX-License-Identifier: MIT
"""PPO with LoRA on any causal model of Hugging Face and any reward function, by ppo.py, lora.py and divergences.py.

    python examples/hf_ppo.py Qwen/Qwen2.5-0.5B-Instruct adapter     # peft.PeftModel.from_pretrained(base, "adapter") reads it

Put your prompts and your reward in the place of those here.
"""
import copy
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo  # noqa: E402
from divergences import get_estimator  # noqa: E402
from lora import add_lora, lora_disabled, save_lora  # noqa: E402

PROMPTS = [f"Write a sentence about {thing}." for thing in ("rain", "rivers", "bread", "the moon", "tea", "cats", "snow")]


def brief(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward is any numbers, of a deviation near 1."""
    return [2.0 - len(response.split()) / 10 for response in responses]


def train(hf, tokenizer, prompts, reward, config: ppo.PPOConfig, steps: int, estimator: str = "bregman"):
    """Adapts hf in place and gives each step's figures. ratio_error is rounding, or else masks or positions are wrong."""
    critic = copy.deepcopy(hf, {id(p): p for p in hf.parameters()})  # a second model on the same frozen weights
    head = nn.Linear(critic.config.hidden_size, 1, device=hf.device)
    nn.init.zeros_(head.weight)
    add_lora(hf), add_lora(critic)

    def read(model, ids, mask, **keep):  # rows are padded on the left: positions come from the mask
        return model(ids, attention_mask=mask, position_ids=(mask.long().cumsum(1) - 1).clamp(min=0), **keep)

    def policy(ids, mask, keep):
        return read(hf, ids, mask, logits_to_keep=keep).logits

    reference = lora_disabled(hf)(policy)  # inside, hf is its base

    def value(ids, mask):
        return head(read(critic.base_model, ids, mask).last_hidden_state.float()).squeeze(-1)

    def score(ids, mask, n):
        texts = [[tokenizer.decode(row[real.bool()], skip_special_tokens=True) for row, real in zip(part, its, strict=True)]
                 for part, its in ((ids[:, :-n], mask[:, :-n]), (ids[:, -n:], mask[:, -n:]))]
        return torch.tensor(reward(*texts), dtype=torch.float32, device=hf.device)

    ends = hf.generation_config.eos_token_id or tokenizer.eos_token_id  # chat models have several
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    sampling = GenerationConfig(do_sample=True, top_k=0, temperature=config.temperature, max_new_tokens=config.response_length,
                                eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)  # PPO could not follow top-p or penalties

    def generate(ids, mask):
        return hf.generate(ids, attention_mask=mask, generation_config=sampling)[:, ids.shape[1]:]

    actors = ppo.Actors(policy, value, reference, score, generate, ends, tokenizer.pad_token_id, hf.device, hf.device)
    optimizer = torch.optim.Adam([p for m in (hf, critic, head) for p in m.parameters() if p.requires_grad], config.learning_rate)
    for step in range(steps):
        texts = [prompts[(step * config.rollout_batch_size + i) % len(prompts)] for i in range(config.rollout_batch_size)]
        batch = tokenizer(texts, return_tensors="pt", padding=True).to(hf.device)
        hf.eval(), critic.eval()
        rollout = ppo.collect(actors, get_estimator(estimator), batch["input_ids"], batch["attention_mask"], config)
        found = ppo.rollout_stats(rollout) | ppo.self_check(policy, rollout, config)
        hf.train(), critic.train()
        yield found | ppo.update(actors, rollout, optimizer, config)


if __name__ == "__main__":
    base, out = sys.argv[1:] if len(sys.argv) == 3 else sys.exit(__doc__)
    device, tokens = "cuda" if torch.cuda.is_available() else "cpu", AutoTokenizer.from_pretrained(base)
    policy = AutoModelForCausalLM.from_pretrained(base, dtype="auto").to(device)
    chats = [tokens.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
             .removeprefix(tokens.bos_token or "") for text in PROMPTS] if tokens.chat_template else PROMPTS  # BOS comes again
    for found in train(policy, tokens, chats, brief, ppo.PPOConfig(response_length=64), steps=20):
        print("  ".join(f"{name} {found[name]:.3g}" for name in ("score_mean", "kl_k3", "length", "ratio_error")), flush=True)
    save_lora(policy, out)
