# SPDX-License-Identifier: MIT
"""Sampling in few, large operations: the fast twin of model.generate, for rollouts and evaluations.

    with folded(policy):
        responses = sample(policy, input_ids, attention_mask, Choice(draws, eos_token_id=[2], pad_token_id=0))

A GPU reads the 13 GB of LLaMA-7B in a few milliseconds a token, and needs longer than that to be told of generate's fifty
operations a layer one by one. Here a layer takes at most twenty: one product for q, k, v and the low-rank halves of their
adapters, residuals added by the product that makes them. Nothing in a step has a shape that changes or is read back, so that a
CUDA graph, recorded once for a number of rows and a width, replays it whole. What a row draws, and the tokens that it gets, are
generate's; only roundings differ.

Shapes: B batch, P prompt, T response, N rows still sampled, D hidden, H query heads, Hkv key and value heads, Dh size of a head,
r rank of the adapters, S columns of the cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import LoRALinear
from model import Block, KVCache, Llama, attention_bias, check_generate, eval_mode, position_ids, rope_tables, sample_tokens

COLUMNS = 64   # a graph is recorded for so many columns more of the cache
EVERY = 8      # tokens between two looks on a GPU at what has ended or gone wrong: each look waits for it
LEAVING = 1 / 8  # of its rows must have ended on a GPU until they leave: fewer rows are another graph
latest: dict[torch.device, tuple[Any, Any]] = {}  # the last graph of each GPU, and the stream on which it was recorded


@dataclass
class Choice:
    """How tokens are drawn: arguments of model.generate."""

    generator: Tensor  # the draws themselves, (T, B)
    eos_token_id: Sequence[int]
    pad_token_id: int
    temperature: float = 1.0
    return_logprobs: bool = False


@torch.no_grad()
def sample(model: Llama, input_ids: Tensor, attention_mask: Tensor, choice: Choice) -> Tensor | tuple[Tensor, Tensor]:
    """What model.generate gives for these prompts (B, P) and arguments: responses, or (responses, logprobs), (B, up to T).

    Raises FloatingPointError for logits that are NaN or infinite, on a GPU up to EVERY tokens later.
    """
    check_generate(input_ids, attention_mask, len(choice.generator), choice.temperature, top_p=1.0)
    with eval_mode(model):
        rows = Rows(model, input_ids, attention_mask, choice)
        while rows.drawn < len(choice.generator) and rows.look():
            rows.advance()
        rows.check()
    length = int(rows.longest)
    responses = rows.responses[:, :length]
    return (responses, rows.logprobs[:, :length]) if choice.return_logprobs else responses


class Rows:
    """The batch as it is sampled. `step` writes all of it in place and reads no number back."""

    def __init__(self, model: Llama, input_ids: Tensor, attention_mask: Tensor, choice: Choice):
        (B, P), T, device, dtype = input_ids.shape, len(choice.generator), input_ids.device, model.lm_head.weight.dtype
        self.model, self.choice, self.gpu = model, choice, replays(device)
        self.layers = [Layer(block) for block in model.model.layers]
        self.stops = torch.tensor(list(choice.eos_token_id), dtype=torch.long, device=device)
        self.responses = torch.full((B, T), choice.pad_token_id, dtype=torch.long, device=device)
        self.logprobs = torch.zeros((B, T), device=device)
        self.t = torch.zeros(1, dtype=torch.long, device=device)  # the token to draw next
        self.longest = torch.zeros_like(self.t)                   # tokens of the longest answer
        self.broken = torch.full_like(self.t, T)                  # the first whose logits were not finite
        # of the N rows that are still sampled:
        self.place = torch.arange(B, device=device)               # which of responses they are
        self.draws = choice.generator.to(device).t().contiguous()   # (N, T)
        self.finished = torch.zeros(B, dtype=torch.bool, device=device)
        self.token = torch.zeros(B, dtype=torch.long, device=device)  # drawn last
        S = -(-(P + T) // 8) * 8  # attention's fast kernels want rows of the mask to begin at multiples of 16 bytes
        self.cache = KVCache(model.config, B, S, dtype, device)
        if self.gpu:  # which looks at whole blocks of columns: what stands in those to come must be numbers
            self.cache.store.zero_()
        self.bias = F.pad(attention_bias(attention_mask, 1, dtype), (0, S - P), value=-torch.inf)  # (N, 1, 1, S)
        self.position = position_ids(attention_mask)[:, -1:] + 1  # (N, 1) of the token drawn last
        self.column = torch.full_like(self.t, P)                  # of the cache, for it
        self.drawn, self.recorded, self.graph = 0, None, None
        self.draw(model.hidden(input_ids, attention_mask, self.cache)[:, -1])
        self.drawn += 1

    def advance(self) -> None:
        """One token more. On a GPU the first of its shape is computed step by step, then recorded for those that follow."""
        self.drawn += 1
        self.cache.length += 1
        if not self.gpu:
            self.step(self.cache.length)
            return
        width = min(-(-self.cache.length // COLUMNS) * COLUMNS, self.bias.shape[-1])
        if self.recorded == (len(self.token), width):
            self.graph.replay()
            return
        self.step(width)
        self.graph, self.recorded = record(lambda: self.step(width), self.token.device), (len(self.token), width)

    def step(self, width: int) -> None:
        """Reads the token drawn last, looking back at `width` columns of the cache, and draws the next."""
        self.bias.index_fill_(3, self.column, 0)
        rope = [table[:, 0] for table in rope_tables(self.model.config, self.position)]  # (N, 1, Dh)
        x = self.model.model.embed_tokens(self.token)
        for layer, store in zip(self.layers, self.cache.store, strict=True):
            x = layer(x, rope, self.bias[..., :width], store[:, : len(x)], self.column)
        self.column += 1
        self.position += 1
        self.draw(self.model.model.norm(x))

    def draw(self, hidden: Tensor) -> None:
        """The next token of each row, from the last hidden states (N, D)."""
        logits = self.model.lm_head(hidden).float()
        finite = logits.amax(-1).isfinite().all()
        self.broken.copy_(torch.where(finite, self.broken, torch.minimum(self.broken, self.t)))
        token = sample_tokens(logits, self.draws.index_select(1, self.t)[:, 0], self.choice.temperature)
        token = token.clamp(max=logits.shape[1] - 1)  # of NaN comes a token that isn't: until it is looked at, any other will do
        going, t = ~self.finished, self.t.expand_as(token)
        if self.choice.return_logprobs:
            scaled = logits / self.choice.temperature
            logprobs = scaled.gather(1, token[:, None])[:, 0] - scaled.logsumexp(-1)
            self.logprobs[self.place, t] = logprobs * going
        token = torch.where(going, token, self.choice.pad_token_id)
        self.responses[self.place, t] = token
        self.token.copy_(token)
        self.t += 1
        self.longest.copy_(torch.where(going.any(), self.t, self.longest))
        self.finished |= (token.unsqueeze(1) == self.stops).any(1)

    def look(self) -> bool:
        """Whether any row is still going. Those that have ended leave, on a GPU many at once."""
        if self.gpu and self.drawn % EVERY:
            return True
        self.check()
        left = int((~self.finished).sum())
        ended = len(self.finished) - left
        if left and ended >= (LEAVING * len(self.finished) if self.gpu else 1):
            order = self.cache.drop(self.finished)
            for name in ("place", "draws", "finished", "token", "bias", "position"):
                setattr(self, name, getattr(self, name)[order])
            self.recorded = None
        return left > 0

    def check(self) -> None:
        """Raises FloatingPointError for the first token whose logits were NaN or infinite."""
        t = int(self.broken)
        if t < self.responses.shape[1]:
            raise FloatingPointError(f"the policy's logits at response token {t} are NaN or infinite: it can't be sampled")


class Layer:
    """A layer's weights as a step reads them: q, k and v as one product, with the halves A of their adapters below."""

    def __init__(self, block: Block):
        self.block, attention = block, block.self_attn
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        low = [halves(projection) for projection in projections]
        self.weight = torch.cat([weight_of(p) for p in projections] + [A for A, _ in low])
        self.outputs = sum(p.out_features for p in projections)
        self.bias = None
        if attention.q_proj.bias is not None:
            self.bias = F.pad(torch.cat([p.bias for p in projections]), (0, len(self.weight) - self.outputs))
        self.up = torch.block_diag(*(B for _, B in low)).t() if len(self.weight) > self.outputs else None  # (r + r + r, outputs)
        self.others = {p: (weight_of(p), *halves(p)) for p in (attention.o_proj, *block.mlp.children())}

    def __call__(self, x: Tensor, rope: Sequence[Tensor], bias: Tensor, store: Tensor, column: Tensor) -> Tensor:
        """(N, D) → (N, D), of the one token of each row whose keys and values go to `column` of store (2, N, Hkv, S, Dh)."""
        block, attention = self.block, self.block.self_attn
        N, Dh, keys = len(x), attention.head_dim, store.shape[2]
        qkv = F.linear(block.input_layernorm(x), self.weight, self.bias)
        if self.up is not None:
            qkv = qkv[:, : self.outputs].addmm_(qkv[:, self.outputs :], self.up)
        heads = qkv.view(N, -1, Dh)
        q, k, v = heads.split((heads.shape[1] - 2 * keys, keys, keys), dim=1)
        turned = heads[:, :-keys] if isinstance(attention.q_norm, nn.Identity) else \
            torch.cat((attention.q_norm(q), attention.k_norm(k)), dim=1)
        q, k = turn(turned, rope).split((q.shape[1], keys), dim=1)
        store[0].index_copy_(2, column, k.unsqueeze(2))
        store[1].index_copy_(2, column, v.unsqueeze(2))
        k, v = store[..., : bias.shape[-1], :]
        seen = F.scaled_dot_product_attention(q.reshape(N, keys, -1, Dh), k, v, attn_mask=bias)  # as Attention with one query
        x = self.add(x, seen.reshape(N, -1), attention.o_proj)
        h = block.post_attention_layernorm(x)
        h = F.silu(self.product(h, block.mlp.gate_proj)).mul_(self.product(h, block.mlp.up_proj))
        return self.add(x, h, block.mlp.down_proj)

    def product(self, x: Tensor, layer: nn.Module) -> Tensor:
        """(N, in) → (N, out)."""
        weight, A, B = self.others[layer]
        out = F.linear(x, weight, layer.bias)
        return out.addmm_(F.linear(x, A), B.t()) if len(A) else out

    def add(self, x: Tensor, h: Tensor, layer: nn.Module) -> Tensor:
        """x (N, out) plus the product, in place."""
        weight, A, B = self.others[layer]
        x.addmm_(h, weight.t())
        if layer.bias is not None:
            x += layer.bias
        return x.addmm_(F.linear(h, A), B.t()) if len(A) else x


def weight_of(layer: nn.Module) -> Tensor:
    """As the layer would use it: of a merged one that is switched off, the base's."""
    return layer.base_weight if isinstance(layer, LoRALinear) and layer.merged and not layer.enabled else layer.weight


def halves(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """(A (r, in), scaling · B (out, r)) in the weight's dtype; r is 0 where there is nothing to add to the weight."""
    if not isinstance(layer, LoRALinear) or layer.merged or not layer.enabled:
        return layer.weight.new_empty(0, layer.in_features), layer.weight.new_empty(layer.out_features, 0)
    return layer.cast or (layer.lora_A.to(layer.weight.dtype), (layer.scaling * layer.lora_B).to(layer.weight.dtype))


def turn(x: Tensor, rope: Sequence[Tensor]) -> Tensor:
    """model.rotate of x (N, heads, Dh), in fewer operations."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin, out=torch.empty_like(x))


def rows_at_once(model: Llama, length: int) -> int:
    """How many rows of so many tokens have room for what sampling keeps of them: in 4 GiB on a CPU, in half of what a GPU has
    free; at most 256 and 1024."""
    config, weight = model.config, model.lm_head.weight
    a_row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length * weight.element_size()
    a_row += 6 * 4 * config.vocab_size  # logits, probabilities, their sums, in float32
    most, room = (1024, free_bytes(weight.device) // 2) if weight.is_cuda else (256, 4 * 2**30)
    return max(1, min(most, room // a_row))


def free_bytes(device: torch.device) -> int:
    """What a GPU has for new tensors: unused, or kept by torch for them."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def has_room(model: Llama, rows: int, length: int) -> bool:
    """Whether the copies of q, k and v fit beside keys and values of so many rows of so many tokens, with a tenth to spare."""
    config, size = model.config, model.lm_head.weight.element_size()
    keys = 2 * config.num_key_value_heads * config.head_dim
    copies = (config.num_attention_heads * config.head_dim + keys) * config.hidden_size
    return 1.1 * size * config.num_hidden_layers * (copies + keys * rows * length) < free_bytes(model.lm_head.weight.device)


def replays(device: torch.device) -> bool:
    """Whether steps are recorded there."""
    return device.type == "cuda"


def record(step: Callable[[], None], device: torch.device) -> Any:
    """What step would start on the GPU, to be replayed. (torch.cuda.graph would also give back all memory that torch keeps.)

    A recording's tensors have memory of their own, which nothing else gets before memory is short. No step needs those of
    another, so each recording takes over the last one's, and its stream, for which products keep room to work in.
    """
    with torch.cuda.device(device):
        graph, now = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        pool, stream = (last[0].pool(), last[1]) if (last := latest.get(device)) else (None, torch.cuda.Stream())
        stream.wait_stream(now)
        with torch.cuda.stream(stream):
            graph.capture_begin(pool)
            step()
            graph.capture_end()
        now.wait_stream(stream)
    latest[device] = graph, stream
    return graph
