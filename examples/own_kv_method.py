"""KV methods of one's own, in one file: a scorer in five lines, and a selector.

python examples/own_kv_method.py
tokenloom serve --set 'methods.modules=["examples/own_kv_method.py"]' --kv "long_keys(budget=0.5)"
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.policy import KVPolicy, SequenceShape
from tokenloom.methods.kv import scorer
from tokenloom.methods.kv.parts import Selector
from tokenloom.methods.kv.selection import DecodeSelection
from tokenloom.methods.registry import method


@scorer("long_keys", reads_queries=False, claim="keeps the keys that are longest")
def long_keys(keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
    """keys, values `[n, Hk, D]` -> scores `[Hk, n]`"""
    return keys.norm(dim=-1).t()


@method("every_other", hook="kv", title="Every other token", claim="reads half of what lies further back")
@dataclass(frozen=True)
class EveryOther(Selector):
    """While decoding, reads the newest tokens and every other one before them.

    Attributes:
        recent: how many are the newest.
    """

    recent: int = 64

    def policy(self, shape: SequenceShape) -> KVPolicy:
        return EveryOtherPolicy(shape, self.recent)


class EveryOtherPolicy(DecodeSelection):
    def __init__(self, shape: SequenceShape, recent: int) -> None:
        super().__init__(shape)
        self.recent = recent

    def attend(self, layer: int, q: Tensor, cached: CachedTokens) -> Tensor:
        first = max(0, cached.length - self.recent)
        index = torch.cat((torch.arange(0, first, 2), torch.arange(first, cached.length)))
        return cached.attend(layer, q, index.to(q.device))


if __name__ == "__main__":
    from tokenloom import LLM, SamplingParams

    llm = LLM()
    prompt = "Once upon a time there was a little girl who lived near a forest. " * 20
    for kv in ("off", "long_keys(budget=0.5)", "long_keys(budget=0.5)+pyramid", "every_other"):
        answer = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=24), kv=kv)[0]
        print(f"{kv}: {answer.completions[0].text!r}")
