"""What `LLM.finetune` leaves alone, what it leaves behind, and what it refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tiny_models import build_tiny
from tokenloom import LLM, SamplingParams
from tokenloom.errors import RequestError
from tokenloom.finetune.local import StepReport

ROWS = [{"prompt": f"say {word}:", "completion": f" {word}"} for word in ("sea", "bed", "ring", "tin") * 3]
OPTIONS: dict[str, Any] = {"n_epochs": 2, "batch_size": 4, "learning_rate": 0.02, "r": 4}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    return build_tiny(tmp_path_factory.mktemp("llama"), "llama", dtype=torch.float32)


@pytest.fixture
def llm(tiny: tuple[Path, Any]) -> LLM:
    return LLM(str(tiny[0]), cache__kv_bytes=8 * 2**20)


def hash_of_weights(llm: LLM) -> str:
    model = llm.engine.decoder
    tensors = [model.embedding, model.head, model.norm]
    for layer in model.layers:
        tensors += [layer.input_norm, layer.post_norm]
        tensors += [linear.weight for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_training_changes_no_base_weight(llm: LLM, tmp_path: Path) -> None:
    before = hash_of_weights(llm)
    llm.finetune(ROWS, tmp_path / "out", **OPTIONS)
    assert hash_of_weights(llm) == before


def test_every_logprob_equals_that_of_peft(llm: LLM, tiny: tuple[Path, Any], tmp_path: Path) -> None:
    result = llm.finetune(ROWS, tmp_path / "out", target_modules=["q_proj", "down_proj"], **OPTIONS)
    llm.load_adapter("tuned", result.adapter)
    ids = llm.tokenizer.encode("say sea: sea, and then say ring: ring")
    found = [entry.logprob for entry in llm.score([ids], adapter="tuned")[0].logprobs if entry is not None]
    model = peft.PeftModel.from_pretrained(tiny[1], result.adapter)
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    model.unload()
    wanted = [float(logprobs[i, ids[i + 1]]) for i in range(len(ids) - 1)]
    base = [entry.logprob for entry in llm.score([ids])[0].logprobs if entry is not None]
    assert found == pytest.approx(wanted, abs=1e-4)
    assert base != pytest.approx(wanted, abs=1e-2)


def test_an_adapter_is_used_in_every_call(llm: LLM, tmp_path: Path) -> None:
    adapter = llm.finetune(ROWS, tmp_path / "out", **OPTIONS).adapter
    llm.load_adapter("tuned", adapter)
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    messages = [{"role": "user", "content": "say sea"}]
    for ask in (
        lambda name: llm.generate("say sea:", greedy, adapter=name)[0].completions[0].token_ids,
        lambda name: llm.chat(messages, greedy, adapter=name)[0].text,
        lambda name: "".join(delta.text for delta in llm.stream("say sea:", greedy, adapter=name)),
        lambda name: llm.score("say sea: sea", adapter=name)[0].total,
        lambda name: llm.embed("say sea", adapter=name)[0],
    ):
        base = ask(None)
        assert ask("tuned") != base
        assert ask(None) == base
        with pytest.raises(RequestError, match="'nobody'"):
            ask("nobody")
    llm.unload_adapter("tuned")
    with pytest.raises(RequestError, match="'tuned'"):
        llm.generate("x", adapter="tuned")


def test_an_interrupt_loses_nothing(llm: LLM, tmp_path: Path) -> None:
    once = llm.finetune(ROWS, tmp_path / "once", dropout=0.1, **OPTIONS)

    def interrupt(report: StepReport) -> None:
        if report.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.finetune(ROWS, tmp_path / "cut", dropout=0.1, on_step=interrupt, **OPTIONS)
    cut = llm.finetune(ROWS, tmp_path / "cut", dropout=0.1, **OPTIONS)
    assert [report.step for report in cut.steps] == [4, 5, 6]  # from the checkpoint of the first epoch
    assert (cut.adapter / WEIGHTS).read_bytes() == (once.adapter / WEIGHTS).read_bytes()


def test_a_finished_job_is_not_trained_again(llm: LLM, tmp_path: Path) -> None:
    once = llm.finetune(ROWS, tmp_path / "out", **OPTIONS)
    before = (once.adapter / WEIGHTS).read_bytes()
    again = llm.finetune(ROWS, tmp_path / "out", **OPTIONS)
    assert again.steps == [] and again.trained_tokens == once.trained_tokens
    assert (again.adapter / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed"),
        ({"r": 8}, "lora"),
        ({"weight_decay": 0.1}, "training"),
        ({"validation": ROWS}, "validation_sha256"),
    ],
)
def test_the_refusal_of_a_folder_says_what_differs(
    llm: LLM, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    llm.finetune(ROWS, tmp_path / "out", **OPTIONS)
    with pytest.raises(RequestError, match=rf"another job \(it differs in {words}\)") as caught:
        llm.finetune(ROWS, tmp_path / "out", **{**OPTIONS, **change})
    assert caught.value.param == "output"


@pytest.mark.parametrize("text", ['{"seed"', "[1]", "3"])
def test_a_damaged_note_of_the_job_is_named(llm: LLM, tmp_path: Path, text: str) -> None:
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(RequestError, match=r"output: .*job\.json cannot be read"):
        llm.finetune(ROWS, tmp_path, **OPTIONS)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "holds no examples"),
        ([ROWS[0], 3], "line 2: "),
        ([ROWS[0], ROWS[1], {"prompt": b"x", "completion": "y"}], "line 3: cannot be written as JSON"),
        ([{"prompt": "x", "completion": "\ud800"}], "line 1: "),
    ],
)
def test_faulty_rows_are_named(llm: LLM, tmp_path: Path, rows: list[Any], words: str) -> None:
    with pytest.raises(RequestError, match=f"^data: {words}|^data: the file {words}") as caught:
        llm.finetune(rows, tmp_path / "out", **OPTIONS)
    assert caught.value.param == "data"
    assert not (tmp_path / "out").exists()


def test_rows_and_their_file_train_the_same_adapter(llm: LLM, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n".join(json.dumps(row, indent=None, separators=(",", ":")) for row in ROWS))
    by_file = llm.finetune(file, tmp_path / "file", **OPTIONS).adapter / WEIGHTS
    by_rows = llm.finetune(ROWS, tmp_path / "rows", **OPTIONS).adapter / WEIGHTS
    assert by_file.read_bytes() == by_rows.read_bytes()


def test_validation_is_reported_and_its_faults_are_named(llm: LLM, tmp_path: Path) -> None:
    result = llm.finetune(ROWS, tmp_path / "out", validation=ROWS[:4], **OPTIONS)
    assert any("validation: only 4 examples" in warning for warning in result.warnings)
    with pytest.raises(RequestError, match=r"^validation: line 1: "):
        llm.finetune(ROWS, tmp_path / "other", validation=[{}], **OPTIONS)


def test_old_checkpoints_are_deleted(llm: LLM, tmp_path: Path) -> None:
    llm.finetune(ROWS, tmp_path / "out", checkpoint_every_steps=1, save_total_limit=2, **OPTIONS)
    kept = sorted(path.name for path in (tmp_path / "out").glob("adapter-step-*"))
    assert kept == ["adapter-step-5", "adapter-step-6"]


@pytest.mark.parametrize("seed", [-1, 2**31, "x", 1.5])
def test_a_wrong_seed_is_named(llm: LLM, tmp_path: Path, seed: Any) -> None:
    with pytest.raises(RequestError, match=r"^seed: "):
        llm.finetune(ROWS, tmp_path / "out", seed=seed, **OPTIONS)
