#!/usr/bin/env bash
# Packs what a GPU machine without a network needs to run run.py: both engines, our module's packages, the model.
#
#   bash tests/gpu/prepare.sh DIR MODEL      MODEL: what `python -m tests.engines model` made; writes DIR/parts/bundle.000 … of 49 MB each (six)
#
# On the GPU machine (Python 3.12 with torch 2.11.0 for CUDA 13, and nvcc), where the parts are:
#
#   cat bundle.* | tar x && for name in vllm sglang ours smollm2; do tar xJf $name.tar.xz & done; wait
#
# makes smollm2/, and site/vllm, site/sglang and site/ours, one for PYTHONPATH each: the engines' pins exclude one another.
# Kept is what a Hopper card and a Llama need; SGLang's FlashAttention kernels alone would be a gigabyte.
set -euo pipefail
work=$(realpath -m "$1") model=$(realpath "$2") packed=${3:-vllm sglang ours router}
mkdir -p "$work/wheels" "$work/site" "$work/parts" "$work/smollm2"
cd "$work"

shared="annotated-types==0.8.0 distro==1.9.0 fastapi==0.136.3 httptools==0.9.0 jiter==0.19.0 jsonschema==4.26.0 jsonschema-specifications==2025.9.1
    pydantic==2.14.3 pydantic-core==2.50.4 referencing==0.37.0 rpds-py==2026.9.1 sniffio==1.3.1 starlette==1.10.0 typing-inspection==0.4.5 uvicorn==0.54.0"
engines="dill==0.4.1 interegular==0.3.3 llguidance==1.7.6 loguru==0.7.3 msgspec==0.22.0 opentelemetry-api==1.45.2 partial-json-parser==0.2.1.1.post7
    pybase64==1.5.1 python-multipart==0.0.34 pyzmq==27.3.0 setproctitle==1.3.8 watchfiles==1.3.0 xgrammar==0.2.7"
vllm="$shared $engines vllm==0.26.0 annotated-doc==0.0.7 apache-tvm-ffi==0.1.10 astor==0.8.1 blake3==1.0.11 cachetools==8.0.2 cbor2==6.3.0
    compressed-tensors==0.17.0 depyf==0.20.0 ijson==3.6.0 jmespath==1.1.0 lark==1.2.2 lm-format-enforcer==0.11.3 mcp==2.3.0
    model-hosting-container-standards==0.1.16 openai==2.54.0 openai-harmony==0.0.8 outlines-core==0.2.14 prometheus-fastapi-instrumentator==8.1.0
    python-json-logger==4.2.0 supervisor==4.3.0 websockets==17.4"
sglang="$shared $engines sglang==0.5.17 sglang-kernel==0.4.5 flashinfer-python==0.6.15.post1 transformers==5.12.1 tokenizers==0.22.2
    apache-tvm-ffi==0.1.11 cffi==2.1.1 compressed-tensors==0.20.0 decorator==5.3.1 gguf==0.19.0 ipython==9.18.1
    matplotlib-inline==0.2.2 openai==2.6.1 orjson==3.13.0 pycparser==3.12 soundfile==0.14.0 traitlets==5.16.1 zstandard==0.25.0"
ours="$shared aiohttp==3.14.5 annotated-doc==0.0.7 jsonschema-rs==0.60.3 multidict==7.2.1 openai==2.54.0 uvloop==0.23.0 yarl==1.25.1"
router="vllm-router==0.1.17 orjson==3.13.0 setproctitle==1.3.8"

platforms=()
for tag in manylinux_2_{39,34,31,28,27,26,24,17,5}_x86_64 manylinux2014_x86_64 manylinux1_x86_64; do platforms+=(--platform "$tag"); done
target=(--no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none "${platforms[@]}")

# get NAME PACKAGES: the wheels, unpacked into site/NAME.
get() {
    local name=$1 pins
    shift
    read -ra pins <<<"$(echo "$*" | tr '\n' ' ')"
    [ -d "site/$name" ] && return
    for pin in "${pins[@]}"; do # one by one: some pins contradict what other packages ask for
        python3 -m pip download --quiet --disable-pip-version-check "${target[@]}" --dest "wheels/$name" "$pin"
    done
    python3 -m pip install --quiet --disable-pip-version-check --no-index --no-compile "${target[@]}" --target "site/$name.new" "wheels/$name"/*.whl
    mv "site/$name.new" "site/$name"
}
for name in $packed; do get "$name" "${!name}"; done

# vLLM: its kernels for dense models, FlashAttention 3 and the tool parser.
if [ -d site/vllm ]; then
    find site/vllm/vllm -name '*.so' ! -name '_C_stable_libtorch*' ! -name '_vllm_fa3_C*' ! -name 'spinloop*' ! -name '_rust_tool_parser*' -delete
    rm -rf site/vllm/vllm/third_party/{deep_gemm/include,fmha_sm100}
fi
# SGLang: its kernels for compute capability 9.0.
if [ -d site/sglang ]; then find site/sglang/sgl_kernel -name '*.so' ! -path '*/sm90/*' -delete; fi

# The byte code of the machine's Python makes the first start half a minute shorter.
if command -v python3.12 >/dev/null; then python3.12 -m compileall -q site >/dev/null || true; fi

cp "$model"/* smollm2/
# A tokenizer converted from a GGUF has no model_max_length but transformers' 10^30, and SGLang 0.5.17's /tokenize answers 500 to that.
# SGLang's Rust server reads the chat template here only, and answers 400 where it is in a file of its own.
python3 - <<'EOF'
import json, pathlib
folder = pathlib.Path("smollm2")
path = folder / "tokenizer_config.json"
length = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
template = (folder / "chat_template.jinja").read_text()
more = {"model_max_length": length, "chat_template": template}
path.write_text(json.dumps(json.loads(path.read_text()) | more, indent=2))
EOF

archives=()
for name in $packed smollm2; do
    folder=$([ "$name" = smollm2 ] && echo smollm2 || echo "site/$name")
    tar c "$folder" | xz -T0 -5 >"$name.tar.xz"
    archives+=("$name.tar.xz")
done
rm -f parts/*
tar c "${archives[@]}" | split -b 57M -d -a 3 - parts/bundle.
ls -l parts
