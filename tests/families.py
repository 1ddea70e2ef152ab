"""Tiny randomly initialised models of many families, and a byte tokenizer, all built in memory: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch

WIDTH, LAYERS, VOCAB = 32, 3, 96
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "head_dim": 8}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}

# name: (configuration class, model class, settings)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_GROUPED, "sliding_window": 64}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_GROUPED, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_SMALL, "use_parallel_residual": True}),
    "gpt_neox_sequential": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_SMALL, "use_parallel_residual": False}),
    "opt": ("OPTConfig", "OPTForCausalLM", {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": WIDTH}),
    "opt_post_norm": (
        "OPTConfig",
        "OPTForCausalLM",
        {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": WIDTH, "do_layer_norm_before": False},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_GROUPED, "sliding_window": None}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _GROUPED),
    "bert": ("BertConfig", "BertForMaskedLM", _SMALL),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GROUPED),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_GROUPED, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "falcon": ("FalconConfig", "FalconForCausalLM", {**_SMALL, "multi_query": True, "parallel_attn": True, "alibi": False}),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**_GPT2, "rotary_dim": 4}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_GROUPED, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**_GROUPED, **_EXPERTS}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {**_GROUPED, "residual_multiplier": 0.22, "embedding_multiplier": 12.0}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 4}),
}
ASKED = ["llama", "qwen3", "mistral", "gemma3", "gpt2", "gpt_neox", "gpt_neox_sequential", "opt", "phi3", "olmo2", "bert"]


def build(family: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A fresh model in evaluation mode; its weights are drawn from N(0, 0.2) so that no branch is negligible."""
    import transformers

    config_name, model_name, settings = FAMILIES[family]
    config = getattr(transformers, config_name)(**{**settings, **changes})
    model: torch.nn.Module = getattr(transformers, model_name)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            center = 1.0 if "norm" in name.lower() or ".ln_" in name else 0.0
            weight.copy_(center + 0.2 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def causal(family: str) -> bool:
    """True for families that can generate."""
    return family != "bert"


def build_tokenizer(chat: bool = True) -> Any:
    """A tokenizer of one token per character over a small alphabet, with `<pad> <bos> <end>` and, if wanted, a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?'|-_()[]{}/\n"
    vocab = {token: index for index, token in enumerate(["<pad>", "<bos>", "<end>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<end>", unk_token="<unk>")
    if chat:
        turn = "<bos>{{ m['role'] }}:{{ m['content'] }}<end>"
        prompt = "{% if add_generation_prompt %}<bos>assistant:{% endif %}"
        wrapped.chat_template = "{% for m in messages %}" + turn + "{% endfor %}" + prompt
    return wrapped
