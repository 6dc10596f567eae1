"""Tiny random models that are complete: configuration, weights, tokenizer and chat template.

`build_tiny` writes a folder as transformers would; `write_gguf` writes the same weights as llama.cpp's
converter would. The vocabulary is byte-level BPE: 256 bytes, a few merges, three special tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BOS_ID, EOS_ID = 257, 258
MERGES = [
    *(
        "Ġ t",
        "Ġ a",
        "h e",
        "i n",
        "r e",
        "o n",
        "Ġt he",
        "e r",
        "Ġ s",
        "a t",
        "Ġ w",
        "Ġ o",
        "e n",
        "Ġ c",
        "i t",
    ),
    *("i s", "a n", "o r", "e s", "Ġ b", "e d", "Ġ f", "in g", "Ġ p", "o u", "Ġa n", "a l", "a r", "Ġt o"),
]
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS) + len(MERGES)  # 288, a multiple of the quantisation block
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_config(architecture: str, **overrides: Any) -> Any:
    """A transformers configuration of 2 layers, hidden size 64, 4 heads that share 2 kv heads of width 16.

    Mistral gets a sliding window of 8. Any of transformers' configuration keys can be overridden.
    """
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": None,
    }
    if architecture == "mistral":
        values["sliding_window"] = 8
    return _CONFIGS[architecture](**{**values, **overrides})


def build_tiny(
    tmp_path: Path,
    architecture: str = "llama",
    dtype: torch.dtype = torch.float64,
    *,
    seed: int = 0,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> tuple[Path, Any]:
    """Write a complete random model under `tmp_path`; returns its folder and the transformers model.

    Matrices and biases are normal with deviation 0.2, norms are 1 plus that, so that logits are not flat and
    no parameter can be left out unnoticed. `max_shard_size` (e.g. "50KB") splits the weights into shards.
    """
    config = tiny_config(architecture, **overrides)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise + 1 if "norm" in name else noise)
    folder = Path(tmp_path) / f"tiny-{architecture}"
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)
    return folder, model


def tiny_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE: ids 0..255 are bytes, then the special tokens, then the merges."""
    spelling = bytes_to_unicode()
    vocabulary = {spelling[byte]: byte for byte in range(256)}
    for token in (*SPECIAL_TOKENS, *(merge.replace(" ", "") for merge in MERGES)):
        vocabulary[token] = len(vocabulary)
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in MERGES)]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json (with the chat template) into a model folder."""
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    config = {**special, "chat_template": CHAT_TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor."""
    module, _, kind = name.rpartition(".")
    layer = ""
    if module.startswith("model.layers."):
        _, _, number, module = module.split(".", 3)
        layer = f"blk.{number}."
    return f"{layer}{_GGUF_NAMES[module]}.{kind}"


def permute_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows: the two halves of every head interleaved."""
    width = weight.shape[0] // num_heads
    return weight.reshape(num_heads, 2, width // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: Any, quantization: str = "F32") -> Path:
    """Write a tiny transformers model as GGUF, matrices in `quantization`; mistral becomes llama."""
    config = model.config
    architecture = "llama" if config.model_type == "mistral" else config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    if config.model_type == "mistral" and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    _add_tokenizer(writer)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        _add_tensor(writer, architecture, name, tensor.float().numpy(), config, quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tensor(
    writer: gguf.GGUFWriter, architecture: str, name: str, values: np.ndarray, config: Any, quantization: str
) -> None:
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        values = permute_rows(
            values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        )
    kind = GGMLQuantizationType[quantization if values.ndim == 2 else "F32"]
    writer.add_tensor(gguf_name(name), quantize(values, kind), raw_dtype=kind)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    vocabulary = sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token, _ in vocabulary])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)
    writer.add_unk_token_id(256)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
