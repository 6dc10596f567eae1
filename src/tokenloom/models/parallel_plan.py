"""Dependent parallelization: how to split a LoRA pair beside a base linear that is already split.

FlexLLM (arXiv 2402.18789), "dependent parallelization". z = x Aᵀ, y = z Bᵀ; x `[rows, in]`, A `[rank, in]`,
B `[out, rank]`. Every legal way to split both is listed with the transitions between them and its cost in
the forward pass. What the backward pass sends is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from tokenloom.errors import TokenloomError

Base = Literal["column", "row", "replicated"]


class PlanError(TokenloomError):
    """The linear cannot be split as asked; the message names the width at fault."""


class State(Enum):
    """How a tensor lies on the devices, by dimension: [replica, row, feature].

    `-` not parallel, `|` split, `=` a copy on each device, `+` a summand on each device (pre-reduce). An
    activation's rows are tokens; a weight's rows are what it puts out and its features what it reads.
    """

    REPLICATED = "[=,-,-]"
    ROWS = "[-,|,-]"
    FEATURES = "[-,-,|]"
    PRE_REDUCE = "[+,-,-]"


R, T, F, P = State.REPLICATED, State.ROWS, State.FEATURES, State.PRE_REDUCE

RULES: tuple[tuple[State, State, State], ...] = ((R, R, R), (F, F, P), (T, R, T), (R, T, F), (P, R, P))
"""(input, weight, output) of a linear that needs no communication. The first four are the paper's.

The fifth holds because a linear of a sum is the sum of the linears. It is what lets the pair beside a
row-parallel linear (down_proj) end in summands that join the base's own. By the third and the fifth, each
device computes a summand of the weight's gradient, which is then all-reduced before the optimizer's step."""

BASE_STATES: dict[Base, tuple[State, State]] = {"column": (R, F), "row": (F, P), "replicated": (R, R)}
"""What a base linear reads and what it puts out."""

TRANSITIONS: dict[tuple[State, State], str] = {
    (R, T): "partition",
    (R, F): "partition",
    (T, R): "all-gather",
    (F, R): "all-gather",
    (P, R): "all-reduce",
    (P, T): "reduce-scatter",
    (P, F): "reduce-scatter",
    (T, F): "all-to-all",
    (F, T): "all-to-all",
    (T, P): "pad",
    (F, P): "pad",
}
"""`partition` keeps one's own slice; `pad` sets one's slice into zeros, which makes it a summand."""


@dataclass(frozen=True)
class CostModel:
    """Rates of one device; the defaults have the order of a data-centre GPU on its fast links.

    Bytes that a device sends, by ring algorithms for n devices and a whole tensor of S bytes: all-gather
    and reduce-scatter S (n-1)/n, all-reduce twice that, all-to-all S (n-1)/n²; partition and pad none.
    Seconds of a plan: flops and bytes sent at these rates, a latency for each collective, and the
    parameters of A and B that the device holds, read from its memory once.
    """

    flops_per_s: float = 1e14
    link_bytes_per_s: float = 2e11
    link_latency_s: float = 5e-6
    memory_bytes_per_s: float = 1.5e12
    element_bytes: int = 2


@dataclass(frozen=True)
class Step:
    """One thing that all devices do.

    Attributes:
        op: `linear`, or a transition.
        tensor: x, z or y. Of a linear: what it puts out.
        before, after: state of the input and of the output.
        weight: A or B with its state, for a linear.
        sent_bytes: by each device.
    """

    op: str
    tensor: str
    before: State
    after: State
    weight: tuple[str, State] | None = None
    sent_bytes: int = 0

    def __str__(self) -> str:
        if self.weight is None:
            return f"{self.op} {self.tensor}: {self.before.value} -> {self.after.value}, {self.sent_bytes} B"
        name, state = self.weight
        source = {"A": "x", "B": "z"}[name]
        states = f"{self.before.value}, {state.value} -> {self.after.value}"
        return f"{self.tensor} = {source} {name}ᵀ: {states}"


@dataclass(frozen=True)
class Plan:
    """How A and B are split and what happens in which order.

    Attributes:
        rules: numbers of the rules of A and B (1 to 5).
        steps: in order. The last state is the one in which y is added to the base's output: the base's own,
            or, beside a row-parallel base, replicated after the base's all-reduce.
        communicated_bytes: sent by each device for one batch.
        flops, parameter_bytes: of each device.
        cost_s: by the cost model.
    """

    rules: tuple[int, int]
    steps: tuple[Step, ...]
    communicated_bytes: int
    flops: int
    parameter_bytes: int
    cost_s: float

    def __str__(self) -> str:
        return "\n".join(map(str, self.steps))


def plan_lora(
    base: Base,
    width_in: int,
    width_out: int,
    rank: int,
    rows: int,
    tp: int,
    cost: CostModel = CostModel(),
) -> Plan:
    """The cheapest plan for a LoRA pair beside a `base` linear on `tp` devices, for batches of `rows` tokens.

    Raises:
        PlanError: a size is below 1, or the base's own split does not divide its width.
    """
    return plans(base, width_in, width_out, rank, rows, tp, cost)[0]


def plans(
    base: Base,
    width_in: int,
    width_out: int,
    rank: int,
    rows: int,
    tp: int,
    cost: CostModel = CostModel(),
) -> list[Plan]:
    """All legal plans, cheapest first; see `plan_lora`. Splits are even, of widths, rank and rows."""
    sizes = {"width_in": width_in, "width_out": width_out, "rank": rank, "rows": rows, "tp": tp}
    for name, size in sizes.items():
        if size < 1:
            raise PlanError(f"{name} must be at least 1, got {size}")
    if base not in BASE_STATES:
        raise PlanError(f"base must be one of {', '.join(BASE_STATES)}, got {base!r}")
    search = _Search(BASE_STATES[base], rows, {"x": width_in, "z": rank, "y": width_out}, tp, cost)
    for tensor, name, state in zip("xy", ("width_in", "width_out"), search.base, strict=True):
        if not search.divides(tensor, state):
            raise PlanError(f"{name} {sizes[name]} of a {base}-parallel linear is not divisible by tp={tp}")
    return sorted(search.plans(), key=lambda plan: (plan.cost_s, plan.rules))


@dataclass(frozen=True)
class _Search:
    base: tuple[State, State]
    rows: int
    widths: dict[str, int]
    tp: int
    cost: CostModel

    def plans(self) -> Iterator[Plan]:
        rules = range(1, len(RULES) + 1) if self.tp > 1 else (1,)
        base_in, base_out = self.base if self.tp > 1 else (R, R)
        for rule_a in rules:
            for rule_b in rules:
                x, a, z = RULES[rule_a - 1]
                z_read, b, y = RULES[rule_b - 1]
                end = R if base_out is P and y is R else base_out
                steps = [
                    *self.transition("x", base_in, x),
                    Step("linear", "z", x, z, ("A", a)),
                    *self.transition("z", z, z_read),
                    Step("linear", "y", z_read, y, ("B", b)),
                    *self.transition("y", y, end),
                ]
                if self.is_legal(steps):
                    yield self.priced((rule_a, rule_b), steps)

    def transition(self, tensor: str, before: State, after: State) -> list[Step]:
        if before is after:
            return []
        op = TRANSITIONS.get((before, after), "")
        whole = self.rows * self.widths[tensor] * self.cost.element_bytes
        share = {
            "all-gather": (self.tp - 1) / self.tp,
            "reduce-scatter": (self.tp - 1) / self.tp,
            "all-reduce": 2 * (self.tp - 1) / self.tp,
            "all-to-all": (self.tp - 1) / self.tp**2,
        }
        return [Step(op, tensor, before, after, sent_bytes=round(whole * share.get(op, 0.0)))]

    def divides(self, tensor: str, state: State) -> bool:
        size = {T: self.rows, F: self.widths[tensor]}.get(state, 0)
        return size % self.tp == 0

    def is_legal(self, steps: list[Step]) -> bool:
        """Every split is even, and summands are only made where they join those of the base."""
        for step in steps:
            source = {"A": "x", "B": "z"}[step.weight[0]] if step.weight else step.tensor
            if not (step.op and self.divides(source, step.before) and self.divides(step.tensor, step.after)):
                return False
            if step.op == "pad" and step.tensor != "y":
                return False
        return True

    def priced(self, rules: tuple[int, int], steps: list[Step]) -> Plan:
        flops = elements = 0
        for step in steps:
            if step.weight:
                name, state = step.weight
                size = self.widths["z"] * self.widths["x" if name == "A" else "y"]
                elements += size if state is R else size // self.tp
                parallel = state is not R or step.before is T
                flops += 2 * self.rows * size // (self.tp if parallel else 1)
        sent = sum(step.sent_bytes for step in steps)
        collectives = sum(step.op not in ("linear", "partition", "pad") for step in steps)
        cost = self.cost
        return Plan(
            rules=rules,
            steps=tuple(steps),
            communicated_bytes=sent,
            flops=flops,
            parameter_bytes=elements * cost.element_bytes,
            cost_s=flops / cost.flops_per_s
            + sent / cost.link_bytes_per_s
            + collectives * cost.link_latency_s
            + elements * cost.element_bytes / cost.memory_bytes_per_s,
        )
