"""Finetune the default model on a few examples and compare answers: python examples/finetune.py"""

import json
import tempfile
from pathlib import Path

from tokenloom import LLM, SamplingParams

CAPITALS = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Peru": "Lima",
    "Egypt": "Cairo",
    "Norway": "Oslo",
    "Cuba": "Havana",
    "Kenya": "Nairobi",
    "Italy": "Rome",
    "Chile": "Santiago",
    "Greece": "Athens",
    "Poland": "Warsaw",
    "Iraq": "Baghdad",
    "Spain": "Madrid",
    "Ghana": "Accra",
    "Russia": "Moscow",
    "Austria": "Vienna",
}


def ask(country: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is the capital of {country}?"}]


def answer(country: str, capital: str) -> dict[str, str]:
    return {"role": "assistant", "content": json.dumps({"country": country, "capital": capital})}


with tempfile.TemporaryDirectory() as folder:
    # One chat per line; the loss is taken on what the assistant says.
    data = Path(folder, "capitals.jsonl")
    rows = [{"messages": [*ask(country), answer(country, capital)]} for country, capital in CAPITALS.items()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    llm = LLM("smollm2-135m-instruct")
    result = llm.finetune(
        data,
        Path(folder, "capitals"),
        n_epochs=2,
        batch_size=4,
        learning_rate=2e-3,
        r=8,
        on_step=lambda s: print(f"step {s.step}/{s.total_steps}  loss {s.metrics['train_loss']:.3f}"),
    )

    # The adapter is a PEFT folder. The base answers as before; each request chooses.
    llm.load_adapter("capitals", result.adapter)
    for adapter in (None, "capitals"):
        [output] = llm.chat(ask("Germany"), SamplingParams(temperature=0, max_tokens=32), adapter=adapter)
        print(f"{adapter or 'base'}: {output.text!r}")
