#!/usr/bin/env bash
# Builds the wheel, installs it into a clean environment and looks at the client alone; the server is for
# tests/ops/test_image.py. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m pip --disable-pip-version-check wheel -q --no-deps -w "$work/dist" .
wheel=$(echo "$work"/dist/ferryman-*.whl)
"$python" -m venv "$work/venv"
constraints=$PWD/constraints.txt
cd "$work" # so that nothing is imported from the checkout
bin=$work/venv/bin
"$bin/python" -m pip --disable-pip-version-check install -q -c "$constraints" "$wheel"
"$bin/python" - <<'PYTHON'
import importlib.util
import sys

from ferryman import AsyncClient, Client
from ferryman.v1 import corpus_pb2_grpc, model_pb2_grpc, training_pb2_grpc, translation_pb2_grpc

heavy = ["torch", "numpy", "onnxruntime", "sqlalchemy", "sentencepiece", "typer", "rich"]
found = [name for name in heavy if importlib.util.find_spec(name)]
assert not found, f"the base install brought {found}"
assert AsyncClient and Client and training_pb2_grpc and translation_pb2_grpc and corpus_pb2_grpc and model_pb2_grpc
assert "ferryman_service" not in sys.modules, "the client imports the service"
PYTHON
if hint=$("$bin/ferryman" --help 2>&1); then
  echo "the command line runs without its libraries" >&2 && exit 1
fi
[[ $hint == *"ferryman[cli]"* ]] || { echo "no hint at ferryman[cli], but: $hint" >&2 && exit 1; }
if hint=$("$bin/ferryman-service" serve 2>&1); then
  echo "the service runs without its libraries" >&2 && exit 1
fi
[[ $hint == *"ferryman[server]"* && $hint != *Traceback* ]] || { echo "no hint at ferryman[server], but: $hint" >&2 && exit 1; }
echo "wheel smoke: passed"
