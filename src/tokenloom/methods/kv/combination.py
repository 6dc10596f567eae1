"""From a spec to a KV method: which parts go together, and what they do to one sequence."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.policy import KVPolicy, SequenceShape
from tokenloom.errors import RequestError
from tokenloom.methods.kv.eviction import Eviction
from tokenloom.methods.kv.parts import Evictor, Packer, Part, Prefill, Selector
from tokenloom.methods.registry import Entry, parse, spec_of

# Roles that exclude each other, and why.
_CONFLICTS = {
    ("scorer", "evictor"): "both decide what is dropped",
    ("selector", "evictor"): "a selector looks for tokens where the evictor has put others since",
    ("selector", "layer budget"): "a selector needs the same tokens in every layer's cache",
    ("selector", "head budget"): "a selector needs as many tokens in every head's cache",
}
# Roles that do nothing alone, in the order in which `Eviction` takes them.
_NEEDS_SCORER = ("layer budget", "head budget", "merger")


@dataclass(frozen=True)
class Combination:
    """A parsed spec; see `tokenloom.cache.policy.KVMethod`."""

    named: tuple[tuple[Entry, Part], ...]

    @property
    def spec(self) -> str:
        return "+".join(spec_of(entry, part) for entry, part in self.named)

    @property
    def namespace(self) -> str | None:
        changing = [spec_of(entry, part) for entry, part in self.named if part.changes_prompt]
        return "+".join(changing) or None

    @property
    def quantizes(self) -> bool:
        """Whether it asks for a pool in 8 bits."""
        return any(part.role == "storage" for _, part in self.named)

    @property
    def keeps_all(self) -> bool:
        return all(part.role == "storage" for _, part in self.named)

    def check(self, max_batch_tokens: int, max_running: int, quantized: bool) -> None:
        for entry, part in self.named:
            try:
                part.check(max_batch_tokens, max_running, quantized)
            except ValueError as error:
                raise RequestError(f"kv: {entry.name}: {error}", param="kv") from error

    def policy(self, shape: SequenceShape) -> KVPolicy:
        parts: dict[str, Any] = {}
        for _, part in self.named:
            parts[part.role] = parts[part.role].join(part) if part.role in parts else part
        policies: list[KVPolicy] = []
        if "scorer" in parts:
            layer_budget, head_budget, merger = (parts.get(role) for role in _NEEDS_SCORER)
            policies.append(Eviction(shape, parts["scorer"], layer_budget, head_budget, merger))
        own = (Evictor, Selector, Prefill, Packer)
        policies += [part.policy(shape) for part in parts.values() if isinstance(part, own)]
        return policies[0] if len(policies) == 1 else Together(policies)


class Together(KVPolicy):
    """Several policies for one sequence, of which at most one chooses what is read."""

    def __init__(self, policies: Sequence[KVPolicy]) -> None:
        self.policies = policies
        self.last_rows = max((p.last_rows for p in policies), default=1)
        self.heeds_context = any(p.heeds_context for p in policies)
        self.compact = any(p.compact for p in policies)
        self.holds = next((p.holds for p in policies if p.holds is not None), None)

    def rows(self, start: int, wanted: int, most: int) -> int:
        for policy in self.policies:
            wanted = policy.rows(start, wanted, most)
        return min(wanted, most)

    def seen_at(self, start: int, rows: int) -> Sequence[int]:
        plain = range(start, start + rows)
        each = (policy.seen_at(start, rows) for policy in self.policies)
        return next((at for at in each if at != plain), plain)

    def attends(self, start: int, stop: int) -> bool:
        return any(policy.attends(start, stop) for policy in self.policies)

    def attend(self, layer: int, q: Tensor, cached: CachedTokens) -> Tensor | None:
        attended = None
        start, stop = cached.start, cached.start + len(q)
        for policy in self.policies:
            if policy.attends(start, stop):
                result = policy.attend(layer, q, cached)
                attended = result if attended is None else attended
        return attended

    def drop(self, cached: CachedTokens) -> None:
        for policy in self.policies:
            policy.drop(cached)

    def shared_tokens(self, prompt_tokens: int) -> int:
        return min((p.shared_tokens(prompt_tokens) for p in self.policies), default=prompt_tokens)

    def fork(self) -> KVPolicy:
        other = copy.copy(self)
        other.policies = [policy.fork() for policy in self.policies]
        return other


def combine(spec: str) -> Combination | None:
    """The KV method that a spec asks for; None where it asks for nothing.

    Raises:
        RequestError: (param "kv") the spec is wrong, or its parts do not go together; the message says why.
    """
    named = tuple(parse(spec, "kv"))
    by_role: dict[str, str] = {}
    joined: dict[str, Part] = {}
    for entry, part in named:
        both = joined[part.role].join(part) if part.role in by_role else part
        if both is None:
            raise RequestError(
                f"kv: {by_role[part.role]} and {entry.name} are both a {part.role}; one is enough", param="kv"
            )
        by_role[part.role], joined[part.role] = entry.name, both
    for (one, other), reason in _CONFLICTS.items():
        if one in by_role and other in by_role:
            raise RequestError(
                f"kv: {by_role[one]} and {by_role[other]} do not go together: {reason}", param="kv"
            )
    changing = [entry.name for entry, part in named if part.changes_prompt]
    if "prefill" in by_role and len(changing) > 1:
        raise RequestError(
            f"kv: {' and '.join(changing)} do not go together: both choose what the prompt's rows read",
            param="kv",
        )
    for entry, part in named:
        for role, reason in part.excludes().items():
            if role in by_role:
                raise RequestError(
                    f"kv: {entry.name} and {by_role[role]} do not go together: {reason}", param="kv"
                )
    for role in _NEEDS_SCORER:
        if role in by_role and "scorer" not in by_role:
            raise RequestError(f"kv: {by_role[role]} needs a scorer beside it, such as snapkv", param="kv")
    return Combination(named) if named else None
