"""Makes each peer's model files out of the one GGUF: nothing is downloaded, and all hold the same weights.

    PEER/bin/python export.py {hf,q4_0,openvino,onnxruntime} GGUF MODELS

`hf` (a float32 safetensors folder, dequantised by transformers' own reader) comes first; the exports for
OpenVINO and ONNX Runtime start from it. Each is written to a folder beside its place and moved there whole.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path


def export_hf(gguf: Path, models: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # What was read from a GGUF refuses to be saved, although it is plain float32 by now.
    config = copy.copy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def export_q4_0(gguf: Path, models: Path, out: Path) -> None:
    """As `llama-quantize` makes it: the embedding, which is also the head, stays Q8_0 as in the Q4_1 file."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    params.allow_requantize = True
    out.mkdir()
    target = out / "model.gguf"
    if llama_cpp.llama_model_quantize(bytes(gguf), bytes(target), params) != 0:
        sys.exit(f"llama.cpp could not quantise {gguf.name}")


def export_openvino(gguf: Path, models: Path, out: Path) -> None:
    optimum = Path(sys.executable).with_name("optimum-cli")
    options = "--task text-generation-with-past --weight-format int4 --group-size 64 --ratio 1.0"
    command = [optimum, "export", "openvino", "--model", models / "hf", *options.split(), out]
    subprocess.run(command, check=True)


def export_onnxruntime(gguf: Path, models: Path, out: Path) -> None:
    options = "-p int4 -e cpu --extra_options int4_block_size=32 int4_accuracy_level=4"
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", models / "hf", "-o", out]
    subprocess.run([*builder, "-c", models / "cache", *options.split()], check=True)


def main() -> None:
    kind, gguf, models = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    done, partial = models / kind, models / f"{kind}.partial"
    if done.exists():
        return
    shutil.rmtree(partial, ignore_errors=True)
    models.mkdir(parents=True, exist_ok=True)
    exports = {
        "hf": export_hf,
        "q4_0": export_q4_0,
        "openvino": export_openvino,
        "onnxruntime": export_onnxruntime,
    }
    exports[kind](gguf, models, partial)
    partial.rename(done)


if __name__ == "__main__":
    main()
