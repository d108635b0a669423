"""Shapes of published LLaMAs, for measurements with random weights: `SHAPES["smollm2-135m"]()` is a model.LlamaConfig.

LLaMA-7B, the paper's model, is the default of LlamaConfig itself.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import LlamaConfig  # noqa: E402



def miniature(width: int) -> LlamaConfig:
    """The miniature world's model, or one as deep of another width."""
    return LlamaConfig(vocab_size=2560, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=4,
                       num_attention_heads=width // 32, max_position_embeddings=4096, rms_norm_eps=1e-5,
                       tie_word_embeddings=True, pad_token_id=0, initializer_range=0.05)


SHAPES = {
    "miniature": partial(miniature, 128),
    "miniature-64": partial(miniature, 64),
    "miniature-256": partial(miniature, 256),
    "miniature-512": partial(miniature, 512),
    "toy": partial(LlamaConfig, vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
    "smollm2-135m": partial(LlamaConfig, vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                            num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5,
                            rope_theta=100000.0, tie_word_embeddings=True, pad_token_id=2, initializer_range=1 / 24),
    "tinyllama-1b": partial(LlamaConfig, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                            num_attention_heads=32, num_key_value_heads=4, rms_norm_eps=1e-5),
    "llama-7b": LlamaConfig.llama_7b,
    "llama-13b": partial(LlamaConfig, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
    "llama3-8b": partial(LlamaConfig, vocab_size=128256, intermediate_size=14336, num_key_value_heads=8,
                         max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=500000.0, bos_token_id=128000,
                         eos_token_id=128001),
    "llama3-70b": partial(LlamaConfig, vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                          num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=8192, rms_norm_eps=1e-5,
                          rope_theta=500000.0, bos_token_id=128000, eos_token_id=128001),
}
