"""A small Llama that is trained to recall: plain torch in, a safetensors folder out (see kv_retrieval.py).

A sequence is `BOS k v k v ... ASK k1 .. km TELL k1 v1 .. km vm`: pairs of a key and a value, the keys of some
of them, and those keys again with their values. The loss is at every key behind ASK: it finds its value. And
at every value of the pairs: it names its key, so that a value's place holds what it is to be found by.

From random weights such a model answers with any value of the context for thousands of steps before it finds
out how to recall (millions of tokens more than a benchmark has time for), so two of its heads begin with
roughly what that takes: in the first layer one that looks at the token before, in the second one that looks
for what the token before a place was. The rest is learned, in about 300 steps.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

KEYS, VALUES = range(0, 128), range(128, 256)
BOS, ASK, TELL, VOCAB = 256, 257, 258, 320
LAYERS, WIDTH, FEED, HEADS, KV_HEADS, HEAD_DIM = 4, 128, 256, 4, 2, 32
THETA, EPS, CONTEXT = 1e6, 1e-5, 1024  # half of a head's frequencies hardly turn within the context
CODE = range(0, 32)  # of the hidden size: of a token, what later layers find it by
BEFORE = range(64, 96)  # that of the token before


@dataclass(frozen=True)
class Recall:
    """One sequence: the pairs, then `asked` and `told` as they follow."""

    context: list[int]
    asked: list[int]
    told: list[int]


def draw(size: int, pairs: int, questions: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys and values, other keys in each row, `[size, pairs, 2]`, and those asked for, `[size, m, 2]`."""
    keys = torch.rand(size, len(KEYS), generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(VALUES.start, VALUES.stop, (size, pairs), generator=generator)
    some = torch.rand(size, pairs, generator=generator).argsort(1)[:, :questions]
    both = torch.stack((keys, values), 2)
    return both, both.gather(1, some[..., None].expand(-1, -1, 2))


def sample(pairs: int, questions: int, generator: torch.Generator) -> Recall:
    """Pairs of different keys, and questions for some of them."""
    both, some = (part[0] for part in draw(1, pairs, questions, generator))
    return Recall([BOS, *both.flatten().tolist()], [ASK, *some[:, 0].tolist(), TELL], some.flatten().tolist())


def batch(size: int, pairs: int, questions: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens `[size, n]`, and for each what should be found there, -100 where nothing is."""
    both, some = draw(size, pairs, questions, generator)

    def all_of(token: int, count: int = 1) -> Tensor:
        return torch.full((size, count), token)

    asked, found = some[..., 0], some[..., 1]
    tokens = (all_of(BOS), both.flatten(1), all_of(ASK), asked, all_of(TELL), some.flatten(1))
    told = torch.stack((found, torch.full_like(found, -100)), 2).flatten(1)
    named = torch.stack((torch.full_like(both[..., 0], -100), both[..., 0]), 2).flatten(1)
    labels = (all_of(-100), named, all_of(-100), found, all_of(-100), told)
    return torch.cat(tokens, 1), torch.cat(labels, 1)


class Layer(nn.Module):
    """Names are those of a Llama checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        wide, narrow = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        self.input_layernorm = nn.RMSNorm(WIDTH, eps=EPS)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(WIDTH, wide, bias=False),
                "k_proj": nn.Linear(WIDTH, narrow, bias=False),
                "v_proj": nn.Linear(WIDTH, narrow, bias=False),
                "o_proj": nn.Linear(wide, WIDTH, bias=False),
            }
        )
        self.post_attention_layernorm = nn.RMSNorm(WIDTH, eps=EPS)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(WIDTH, FEED, bias=False),
                "up_proj": nn.Linear(WIDTH, FEED, bias=False),
                "down_proj": nn.Linear(FEED, WIDTH, bias=False),
            }
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attn, mlp, y = self.self_attn, self.mlp, self.input_layernorm(x)
        q, k, v = (
            attn[name](y).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = (_rotated(part, cos, sin) for part in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + attn["o_proj"](attended.transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x)
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](y)) * mlp["up_proj"](y))


class RecallModel(nn.Module):
    """A Llama of 4 layers, hidden size 128, 4 query heads and 2 kv heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=EPS)
        for name, matrix in self.named_parameters():
            if matrix.dim() == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(matrix, std=0.06 / (2 * LAYERS) ** 0.5 if last else 0.06)
        with torch.no_grad():
            self._begin_to_recall()
        angles = torch.arange(CONTEXT)[:, None] * THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def _begin_to_recall(self) -> None:
        """The first kv head of two layers, and its query heads: see the module's first lines."""
        nn.init.normal_(self.embed_tokens.weight, std=0.1)
        self.embed_tokens.weight[:, BEFORE] = 0.0
        self.embed_tokens.weight[:, -1] = 0.5  # the same for all tokens: what does not depend on them
        queries = [slice(h * HEAD_DIM, (h + 1) * HEAD_DIM) for h in range(HEADS // KV_HEADS)]
        half = HEAD_DIM // 2
        for layer, code in zip(self.layers[:2], (BEFORE, CODE), strict=True):
            attn = layer.self_attn
            for name in ("q_proj", "k_proj", "v_proj"):
                attn[name].weight[: HEAD_DIM * (len(queries) if name == "q_proj" else 1)] = 0.0
            attn["o_proj"].weight[:, : HEAD_DIM * len(queries)] = 0.0
            attn["v_proj"].weight[range(HEAD_DIM), CODE] = 0.5
            for own in queries:
                attn["o_proj"].weight[code, range(own.start, own.stop)] = 0.3 if code is BEFORE else 0.6
        # Turned back by one place, a query meets the key of the place before it at no angle.
        turn = THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        look_back, match = (layer.self_attn for layer in self.layers[:2])
        look_back["k_proj"].weight[:half, -1] = 1.2
        # Dimensions that turn slowly compare contents, whatever the distance.
        slow = [*range(half // 2, half), *range(half + half // 2, HEAD_DIM)]
        match["k_proj"].weight[slow, BEFORE[: len(slow)]] = 1.0
        for own in queries:
            look_back["q_proj"].weight[own, -1] = 1.2 * torch.cat((turn.cos(), -turn.sin()))
            match["q_proj"].weight[own][slow, CODE[: len(slow)]] = 1.0

    def forward(self, tokens: Tensor) -> Tensor:
        x, n = self.embed_tokens(tokens), tokens.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:n], self.sin[:n])
        return self.norm(x) @ self.embed_tokens.weight.t()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, other = x.chunk(2, -1)
    return torch.cat((one * cos - other * sin, other * cos + one * sin), -1)


def train(
    seconds: float,
    pairs: int,
    *,
    first: int = 8,
    enough: float = 0.98,
    rows: int = 4000,
    rate: float = 1e-3,
    seed: int = 0,
) -> tuple[RecallModel, float]:
    """Train on contexts that grow as recall succeeds, until enough is found in those of full length.

    Every pair is asked for, so that most of a sequence teaches.

    Args:
        seconds: the longest that it may take.
        first: pairs to begin with; twice as many whenever nine of ten are found.
        rows: tokens of a batch.

    Returns:
        The model, and the part of values that it found in its last batches of full length (0.0 where it never
        came to those).
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = RecallModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    start, step, now, found = time.monotonic(), 0, min(first, pairs), 0.0
    while (spent := (time.monotonic() - start) / seconds) < 1 and (now < pairs or found < enough):
        tokens, labels = batch(max(8, rows // (5 * now + 3)), now, now, generator)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * min(1.0, 4 * (1 - spent) + 0.02)
        logits = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        where = labels >= VALUES.start
        right = float((logits.detach().argmax(-1)[where] == labels[where]).float().mean())
        found = 0.95 * found + 0.05 * right
        if found > 0.9 and now < pairs:
            now, found = min(pairs, now * 2), 0.0
        step += 1
        if step % 100 == 0:
            print(f"step {step}: {now} pairs, loss {float(loss.detach()):.3f}, found {found:.2f}", flush=True)
    return model, found if now == pairs else 0.0


def save(model: RecallModel, folder: Path) -> Path:
    """Write config.json, tokenizer.json and model.safetensors, as transformers would name them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": FEED,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": VOCAB - 1,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = {f"model.{name}": value.detach().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
