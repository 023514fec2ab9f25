#!/bin/sh
# Runs the ops' CPU tests under another torch with the extension as it is built here: one build serves them all.
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
cp "$root/tests/conftest.py" "$root/tests/real_lengths.py" "$copy/tests"
for op in mask_tokens packed_attention concat_mlp; do
  cp "$root/tests/${op}_cases.py" "$root/tests/test_$op.py" "$copy/tests"
done
cd "$copy"
"$folder/bin/python" -c 'import torch; print("torch", torch.__version__)'
CUDA_VISIBLE_DEVICES= "$folder/bin/python" -m pytest -q tests
