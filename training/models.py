# SPDX-License-Identifier: MIT
"""The four models of the third stage, the device of each, and the callables in which ppo.py sees them.

    run.policy_device, run.reference_device, line = resolve_devices("cuda:0", "cuda:1")     # or what there is
    models = build_models(run, tokenizer)
    actors = models.actors(run.ppo, generator)

The paper needs four models in memory (section 2.1, "Limitations"): policy and value on one device, reference and reward on the
other. On one device with LoRA the frozen weights stand in memory once: the reference is the policy with its adapter switched
off, the value model is the reward model's backbone with an adapter. That is exact and makes two models of four.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from formats.read import local_copy
from formats.tokenizer import check_vocabulary, describe_tokenizer, template_in_words, window_warning
from lora import (add_lora, load_lora, lora_cast, lora_disabled, lora_layers, lora_snapshot, lora_state_dict, lora_weights,
                  merge_lora, unmerge_lora)
from model import Llama, ValueModel
from ppo import Actors, PPOConfig
from reward import RewardModel
from training.config import RunConfig
from training.decode import rows_at_once
from training.devices import compile_layers, resolve_devices
from training.origin import file_digest, frozen_weights, weights_digest
from training.ranks import agreed, here
from training.rewards import Asked, LoadedReward, Record, load_reward
from training.shard import Shards, gathered, is_cut, sample


@dataclass
class Models:
    """The four models, and the tokenizer of the policy's texts."""

    policy: Llama
    value: ValueModel
    reference: Llama                  # the policy itself where frozen weights are shared
    rewards: LoadedReward | None      # a model or a rule; None: without a reward
    asked: Asked                      # which instructions are being answered, for rewards that read texts
    tokenizer: Any
    policy_device: str
    reference_device: str
    shared: bool                      # one device and LoRA: frozen weights stand in memory once
    shared_critic: bool               # the value model's backbone is the reward model's
    start: dict[str, Tensor]          # the adapter that a shared policy started from, which its reference keeps on
    notes: list[str]                  # what building them showed, for the program to print
    shards: Shards | None = None      # who holds which frozen weights (--shard); None: this process all
    sampled: list[tuple[Tensor, ...]] = field(default_factory=list)  # prompts, mask, responses since `actors`: for whoever looks
                                                                     # into a reward that failed on them

    def policy_logits(self, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
        """Of the last `keep` positions: (B, keep, V)."""
        return self.policy(input_ids, attention_mask, logits_to_keep=keep)

    def reference_logits(self, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
        """The same of the reference policy."""
        with self.as_it_started():
            return self.reference(input_ids, attention_mask, logits_to_keep=keep)

    def reward(self, input_ids: Tensor, attention_mask: Tensor, n: int) -> Tensor:
        """Scores (B,) of sequences whose last n positions are the response's."""
        with self.reward_as_stored():
            if self.shards and not self.rewards.model:  # a rule may fail in one process, and the others wait for its weights
                return agreed(lambda: self.rewards.score(input_ids, attention_mask, n))
            return self.rewards.score(input_ids, attention_mask, n)

    def score_texts(self, records: Sequence[Record], answers: Sequence[str], ended: Sequence[bool]) -> list[float]:
        """The same reward for answers as texts, of which some came to an end and some were cut off."""
        with self.reward_as_stored():
            return self.rewards.score_texts(records, answers, ended)

    def reward_as_stored(self) -> AbstractContextManager:
        """Inside, the reward model is without the value model's adapter."""
        return lora_disabled(self.value.backbone) if self.shared_critic else nullcontext()

    def as_it_started(self) -> AbstractContextManager:
        """Inside, a shared policy is its own reference: without its adapter, or with the one that it started from."""
        if not self.shared:
            return nullcontext()
        if not self.start:
            return lora_disabled(self.policy)
        inside = all(now.data_ptr() == self.start[name].data_ptr() for name, now in lora_state_dict(self.policy).items())
        return nullcontext() if inside else lora_weights(self.policy, self.start)

    @contextmanager
    def to_sample(self) -> Iterator[None]:
        """Inside, the policy is at its fastest for sampling: put together, if it is sharded and has room; its adapter folded."""
        with ExitStack() as stack:
            if self.shards and self.shards.whole:
                stack.enter_context(gathered(self.policy))
            stack.enter_context(folded(self.policy))
            yield

    def actors(self, config: PPOConfig, generator: torch.Generator | None = None) -> Actors:
        """As ppo.collect and ppo.update call them, for one rollout: what decides its samples is drawn for all of it at once from
        generator (on the policy's device; None: torch's own), so that they depend neither on how many are sampled at a time
        nor on who shares the work."""
        ends = {"eos_token_id": self.tokenizer.stop_ids, "pad_token_id": self.tokenizer.pad_token_id}
        team, draws = here(), []
        self.sampled.clear()

        def next_draws(n: int) -> Tensor:
            """(T, n) uniforms, for the next n of the prompts that this process answers."""
            if not draws:
                size = config.response_length, config.rollout_batch_size
                draws.append(torch.rand(size, generator=generator, device=self.policy_device)[:, team.rows(size[1])])
            left = draws.pop()
            if n < left.shape[1]:
                draws.append(left[:, n:])
            return left[:, :n]

        def answer(prompts: Tensor, prompt_mask: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            with self.to_sample():
                answers = sample(self.policy, prompts, prompt_mask, config.response_length, temperature=config.temperature,
                                 generator=next_draws(len(prompts)), return_logprobs=exact_sampler(self.policy), **ends)
            self.sampled.append((prompts, prompt_mask, answers[0] if isinstance(answers, tuple) else answers))
            return answers

        return Actors(self.policy_logits, self.value, self.reference_logits, self.reward, answer, **ends,
                      policy_device=self.policy_device, reference_device=self.reference_device, team=team)

    @cached_property
    def origin(self) -> dict[str, str]:
        """Digests of all that training leaves as it is."""
        found = {"policy": weights_digest(frozen_weights(self.reference))}
        if start := self.start or (lora_state_dict(self.reference) if lora_layers(self.reference) and not self.shared else {}):
            found["adapter"] = weights_digest(start.items())
        if self.rewards and self.rewards.file:
            found["rule"] = file_digest(self.rewards.file)
        elif self.rewards and self.rewards.model:
            found["reward"] = weights_digest([*frozen_weights(self.rewards.model), *self.rewards.model.named_buffers()])
        return found

    def trained(self) -> list[torch.nn.Parameter]:
        """Every parameter that the optimiser moves."""
        return [p for m in (self.policy, self.value) for p in m.parameters() if p.requires_grad]

    def mode(self, training: bool) -> None:
        """Dropout is on in updates and off in rollouts (released code)."""
        self.policy.train(training)
        self.value.train(training)


@contextmanager
def folded(policy: Llama) -> Iterator[None]:
    """For sampling: in float32 the adapter is folded into the weights, which saves its cost at every token; in bf16 the fold
    would round small updates away, so there it stays apart and is rounded by itself. Apart, too, from weights that are cut."""
    if not exact_sampler(policy) or is_cut(policy):
        with lora_cast(policy):
            yield
        return
    merge_lora(policy)
    try:
        yield
    finally:
        unmerge_lora(policy)


def exact_sampler(policy: Llama) -> bool:
    """Whether sampling computes log-probabilities as precisely as the update does: KV cache and folded adapter in float32."""
    return policy.lm_head.weight.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------- dtypes


def choose_dtype(run: RunConfig, device: str) -> torch.dtype:
    """Full fine-tuning needs float32 weights: at a learning rate of 1e-5 most bf16 updates round away."""
    if run.tuning == "full":
        return torch.float32
    name = run.dtype if run.dtype != "auto" else ("bfloat16" if device.startswith("cuda") else "float32")
    return getattr(torch, name)


def reference_dtype(run: RunConfig, dtype: torch.dtype) -> torch.dtype:
    """Of reference and reward, where the policy's weights are of `dtype`."""
    return dtype if run.reference_dtype == "same" else getattr(torch, run.reference_dtype)


# ------------------------------------------------------------------------------------------------------------- building


def build_models(run: RunConfig, tokenizer: Any, shards: Shards | None = None) -> Models:
    """Loads policy, value, reference and reward and puts each on its device; shards: over which processes (--shard)."""
    policy_device, reference_device, _ = resolve_devices(run.policy_device, run.reference_device)
    dtype = choose_dtype(run, policy_device)
    frozen_dtype = reference_dtype(run, dtype)
    shared = run.tuning == "lora" and policy_device == reference_device and frozen_dtype == dtype
    notes = [str(dtype).removeprefix("torch.")
             + (f", reference and reward {str(frozen_dtype).removeprefix('torch.')}" if frozen_dtype != dtype else "")
             + ("; one device: frozen weights are shared, two models instead of four" if shared else "")
             + (f"; {shards.in_words()}" if shards else "")
             + ("; layers are compiled in their first passes" if run.compile else "")]
    rows, frozen_rows = (shards and shards.rows(its, policy_device) for its in (dtype, frozen_dtype))

    policy = load_policy(run, tokenizer, notes, dtype=dtype, device=policy_device, part=rows)
    reference = policy
    if not shared:
        reference = Llama.from_pretrained(run.policy, frozen_dtype, reference_device, progress=True, part=frozen_rows)
        reference.requires_grad_(False)
    asked = Asked(tokenizer, run.prompt_template)
    rewards = load_reward(run, tokenizer, asked, notes, dtype=frozen_dtype, device=reference_device,
                          part=frozen_rows) if run.reward else None
    its_ids = rewards is not None and rewards.its_ids
    if not its_ids:
        notes.append("value: starts from the policy's weights, as there is no reward model with the policy's tokenizer")
        backbone = second_model(policy, own_weights=run.tuning == "full")
    elif shared:
        backbone = rewards.model.backbone
    else:
        backbone = RewardModel.from_pretrained(run.reward, dtype, policy_device, rows).backbone
    value = ValueModel(backbone)
    notes += window_warnings(run, policy.config, rewards.model.backbone.config if rewards and rewards.model else None)

    start = {}
    if run.adapter and not shared:
        start_from(run, reference)
    if run.tuning == "lora":
        # Only now: building four models draws more numbers than building two, and neither adapters nor dropout may depend on it.
        torch.manual_seed(run.seed)
        start = adapt_policy(run, policy, notes)
        add_lora(backbone, run.lora_rank, run.lora_alpha, run.lora_dropout, run.targets)
    else:
        backbone.requires_grad_(True)  # its output layer is the embedding, tied, and so trains with it
    reference.eval()
    policy.gradient_checkpointing = backbone.gradient_checkpointing = run.gradient_checkpointing
    frozen = [rewards.model.backbone] if rewards and rewards.model else []
    for model in {id(model): model for model in (policy, reference, backbone, *frozen)}.values():
        if shards:
            shards.cut(model)
        if run.compile:
            compile_layers(model)
    models = Models(policy, value, reference, rewards, asked, tokenizer, policy_device, reference_device, shared,
                    shared and its_ids, start, notes, shards)
    models.mode(training=False)
    if not run.ppo.rollout_micro_batch_size:  # equally many in every process
        length = run.query_length + run.ppo.response_length
        run.ppo.rollout_micro_batch_size = min(here().gather(lambda: rows_at_once(policy, length)))
    return models


def window_warnings(run: RunConfig, policy: Any, reward: Any) -> list[str]:
    """Lines about the longest texts that the run can come to, beside the models' configurations; reward None: none is known.
    Raises ValueError where the policy can't be computed that far."""
    tokens = run.query_length + max(run.ppo.response_length, run.evaluation_length or 0)
    flags = "--query-length + --response-length"
    if policy.longest is not None and tokens > policy.longest:
        raise ValueError(f"{flags}: {tokens} tokens, and --policy {run.policy} is computed up to {policy.longest} (its sliding "
                         "window, or where dynamic RoPE begins)")
    return [line for name, config in ((f"--policy {run.policy}", policy), (f"--reward {run.reward}", reward)) if config
            for line in window_warning(tokens, config.max_position_embeddings, f"{name}, {flags}")]


def load_policy(run: RunConfig, tokenizer: Any, notes: list[str], **how: Any) -> Llama:
    """The policy's model as it is stored, after a look at its tokenizer and at the layers that are to be adapted. how: dtype,
    device and part, as from_pretrained takes them."""
    policy = Llama.from_pretrained(run.policy, progress=True, **how)
    rows = policy.config.vocab_size
    unused = check_vocabulary(tokenizer, rows, f"--policy {run.policy}")
    notes.append(f"{describe_tokenizer(tokenizer)}; {rows:,} embedding rows in the policy"
                 + (f", {unused} unused" if unused else ""))
    notes += template_in_words(tokenizer, run.prompt_template)
    check_targets(policy, run.targets)
    return policy


def check_targets(model: Llama, targets: tuple[str, ...]) -> None:
    """A misspelt name would match nothing, and nobody would miss its adapters."""
    layers = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for target in targets:
        if target not in layers:
            raise ValueError(f"--lora-targets {target!r}: the model has no such layer; choose from {', '.join(sorted(layers))}")


def adapt_policy(run: RunConfig, policy: Llama, notes: list[str]) -> dict[str, Tensor]:
    """Gives the policy its adapter: a new one, or the one it starts from, which is returned as it is now."""
    if not run.adapter:
        add_lora(policy, run.lora_rank, run.lora_alpha, run.lora_dropout, run.targets)
        return {}
    start = start_from(run, policy)
    layers = lora_layers(policy).values()
    ranks, alphas = (" and ".join(sorted({f"{value:g}" for value in values})) for values in zip(
        *((layer.rank, layer.alpha) for layer in layers), strict=True))
    notes.append(f"policy: starts from the adapter {run.adapter} (rank {ranks}, alpha {alphas}, {len(layers)} layers); its "
                 "reference keeps that adapter")
    return start


def start_from(run: RunConfig, model: Llama) -> dict[str, Tensor]:
    """Puts the trained adapter on the model and returns it as it is now, since training goes on with the same one."""
    load_lora(model, local_copy(run.adapter), part="policy")
    for layer in lora_layers(model).values():
        layer.dropout = run.lora_dropout
    return lora_snapshot(model)


def second_model(model: Llama, own_weights: bool) -> Llama:
    """Another model on the same weights, for adapters of its own, or with a copy of them, for full fine-tuning."""
    return copy.deepcopy(model, {} if own_weights else {id(p): p for p in model.parameters()})
