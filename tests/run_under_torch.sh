#!/bin/sh
# Runs the ops' CPU tests under another torch with the extension as it is built here, since one build serves them
# all, and compiles and links the bindings against that torch's own headers and libraries, as CUDA builds do.
#   tests/run_under_torch.sh 2.11.0 [FOLDER]
# FOLDER holds the virtual environment that is made (default: a temporary one) and is kept when given.
set -eu
version=$1
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${2:-$(mktemp -d)}
[ $# -ge 2 ] || trap 'rm -rf "$folder"' EXIT
[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet "torch==$version" numpy pytest scipy
copy=$folder/mtfast-copy
rm -rf "$copy"
mkdir -p "$copy/mtfast" "$copy/tests"
cp "$root/mtfast/__init__.py" "$root/mtfast/_C.abi3.so" "$copy/mtfast"
cp -r "$root/mtfast/ops" "$copy/mtfast"
cp "$root/tests/conftest.py" "$root/tests/devices.py" "$root/tests/real_lengths.py" "$copy/tests"
for op in mask_tokens packed_attention concat_mlp bias_gelu dropout_add_layer_norm; do
  cp "$root/tests/${op}_cases.py" "$root/tests/test_$op.py" "$copy/tests"
done
cp "$root/pyproject.toml" "$copy"
cd "$copy"
"$folder/bin/python" -c 'import torch; print("torch", torch.__version__)'
CUDA_VISIBLE_DEVICES= "$folder/bin/python" -m pytest -q tests

torch=$("$folder/bin/python" -c 'import torch; print(torch.__path__[0])')
cuda=${CUDA_HOME:-/usr/local/cuda}
if [ ! -e "$torch/lib/libtorch_cuda.so" ] || [ ! -e "$cuda/include/cuda_runtime_api.h" ]; then
  echo "the bindings are not linked: this torch has no CUDA, or there is no toolkit at $cuda"
  exit
fi
for source in bindings bias_gelu concat_mlp concat_mlp_on_cpu concat_mlp_on_cuda concat_mlp_bf16 \
  dropout_add_layer_norm mask_tokens packed_attention; do
  g++ -std=c++17 -fPIC -fvisibility=hidden -DTORCH_TARGET_VERSION=0x020a000000000000ULL -DMTFAST_WITH_CUDA \
    -DUSE_CUDA -isystem "$torch/include" -isystem "$cuda/include" -c "$root/csrc/$source.cpp" -o "$source.o"
done
# What is left undefined must be this project's own, which other sources define.
g++ -shared ./*.o -Wl,-z,defs -L"$torch/lib" -Wl,-rpath-link,"$torch/lib" -ltorch_cuda -ltorch_cpu -ltorch \
  -lc10 -L"$cuda/lib64" -lcudart -o bindings.so 2> undefined.txt || true
if grep 'undefined reference' undefined.txt | grep -v 'mtfast'; then
  echo "the bindings want of torch $version what it does not have"
  exit 1
fi
echo "the bindings compile and link against torch $version"
