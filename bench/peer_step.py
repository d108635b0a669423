"""The other side of bench/ppo_step.py: a PPO step of TRL with PEFT adapters, timed phase by phase in this process.

    python -m venv peer && peer/bin/pip install torch==2.13.0 transformers peft accelerate datasets sentencepiece
    peer/bin/pip install --no-deps trl==1.12.0          # the last release that has PPO

TRL runs as it is. Only names in its trainer's module are wrapped, to see where a phase ends: `generate` is
batch_generation, `score` all up to the first forward pass that keeps gradients, `update` the rest of the step. Policy and
value get adapters of rank 8 and alpha 64 on q, k, v and o, the value's head trains too, the reference is the policy with
its adapter off. Models are float32, or bfloat16 with TRL's own --bf16. TRL sets LoRA's dropout to 0 by itself.
"""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch  # noqa: E402

try:
    import trl.experimental.ppo.ppo_trainer as trainer_module
    from datasets import Dataset
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding,
                              TrainerCallback)
except ImportError as error:
    sys.exit(f"peer_step.py: {error}: needs trl==1.12.0 and peft; its first lines tell how to make such an environment")

ADAPTERS = {"r": 8, "lora_alpha": 64, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


class Clock(TrainerCallback):
    """Marks of the step that runs, and the seconds of those that are over."""

    def __init__(self):
        self.steps, self.tokens = [], [0, 0]
        self.start = self.generated = self.scored = None

    def on_train_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        end = time.perf_counter()
        self.steps.append({"step": end - self.start, "generate": self.generated - self.start,
                           "score": self.scored - self.generated, "update": end - self.scored, "rest": 0.0})
        self.start, self.scored = time.perf_counter(), None

    def watch(self) -> None:
        """Wraps the trainer's functions."""
        sample, forward = trainer_module.batch_generation, trainer_module.forward

        def watched_sample(model, queries, *rest):
            found = sample(model, queries, *rest)
            self.generated = time.perf_counter()
            self.tokens = [queries.numel(), found[0].numel() - queries.numel()]
            return found

        def watched_forward(*all_of_it):
            if self.scored is None and torch.is_grad_enabled():
                self.scored = time.perf_counter()
            return forward(*all_of_it)

        trainer_module.batch_generation, trainer_module.forward = watched_sample, watched_forward


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("batch", 32), ("step-batch", 16), ("prompt-length", 48), ("response-length", 64), ("steps", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("model", "prompts", "device"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--micro-batch", type=int, default=0, help="0: a whole minibatch at once")
    parser.add_argument("--natural", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # TRL takes every pad token for padding, EOS too
    dtype = getattr(torch, args.dtype)
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    value, reward = (AutoModelForSequenceClassification.from_pretrained(args.model, dtype=dtype, num_labels=1) for _ in range(2))
    reward.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(**ADAPTERS), value)
    for name, parameter in value.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("score"))

    texts = [json.loads(line)["prompt"] for line in Path(args.prompts).read_text(encoding="utf-8").splitlines()]
    ids = [tokenizer(text).input_ids for text in texts]
    padding = {}
    if not args.natural:
        ids = [one for one in ids if len(one) <= args.prompt_length]
        padding = {"padding": "max_length", "max_length": args.prompt_length}
    config = trainer_module.PPOConfig(
        output_dir="peer-out", per_device_train_batch_size=args.micro_batch or args.batch,
        gradient_accumulation_steps=args.batch // (args.micro_batch or args.batch),
        num_mini_batches=args.batch // args.step_batch, num_ppo_epochs=2, total_episodes=args.batch * (args.steps + 1),
        response_length=args.response_length, temperature=1.0, kl_coef=0.02, learning_rate=1e-5,
        local_rollout_forward_batch_size=args.batch, num_sample_generations=0, stop_token="eos" if args.natural else None,
        gradient_checkpointing=False, bf16=args.dtype == "bfloat16", use_cpu=args.device == "cpu", report_to="none",
        save_strategy="no", disable_tqdm=True)
    clock = Clock()
    clock.watch()
    trainer = trainer_module.PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward, value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": ids}), data_collator=DataCollatorWithPadding(tokenizer, **padding),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **ADAPTERS), callbacks=[clock])
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if args.device.startswith("cuda") else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"steps": clock.steps[1:], "peak": peak, "tokens": clock.tokens}))


if __name__ == "__main__":
    main()
