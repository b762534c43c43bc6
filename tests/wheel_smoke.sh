#!/usr/bin/env bash
# Builds the wheel, installs it into a clean environment and uses it: first the client alone, then the server without
# torch. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m pip --disable-pip-version-check wheel -q --no-deps -w "$work/dist" .
wheel=$(echo "$work"/dist/ferryman-*.whl)
"$python" -m tests.make_bundle "$work/bundle" # trained elsewhere: the environment below has no torch
"$python" -m venv "$work/venv"
constraints=$PWD/constraints.txt
cd "$work" # so that nothing is imported from the checkout
bin=$work/venv/bin
install() { "$bin/python" -m pip --disable-pip-version-check install -q -c "$constraints" "$1"; }

echo "wheel smoke: the client alone"
install "$wheel"
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

echo "wheel smoke: the server without torch"
install "$wheel[server,cpu]"
"$bin/ferryman-service" --help >/dev/null
"$bin/ferryman-service" serve --help >/dev/null
"$bin/ferryman-service" config --check >/dev/null
"$bin/python" - <<'PYTHON'
import importlib.util
import sys

assert importlib.util.find_spec("torch") is None, "serving brought torch"
import ferryman_service.bootstrap

for name in ("torch", "onnx", "safetensors", "sacrebleu"):
    assert name not in sys.modules, f"the server loads {name}"
PYTHON

echo "wheel smoke: a model that was trained elsewhere"
"$bin/ferryman-service" import-model "$work/bundle" elsewhere --data-dir "$work/data" | grep -qx "published elsewhere/1"
"$bin/ferryman-service" serve --roles translation --data-dir "$work/data" --port 0 --metrics-port 0 --probe-port 0 >"$work/log" 2>&1 &
service=$!
trap 'kill "$service" 2>/dev/null || true; rm -rf "$work"' EXIT
for _ in {1..100}; do
  grep -q "^serving on" "$work/log" && break
  sleep 0.1
done
"$bin/python" - "$(sed -n 's/^serving on //p' "$work/log")" <<'PYTHON'
import sys

from ferryman import Client
from ferryman.errors import RoleNotServed

with Client(sys.argv[1]) as client:
    answer = client.translate("elsewhere", ["ba de fi", ""])
    assert answer.model == "elsewhere/1", answer
    assert answer.translations[0].hypotheses and answer.translations[1].text == "", answer
    try:
        client.start_training("cor_x", "elsewhere")
    except RoleNotServed:
        pass
    else:
        raise AssertionError("a server without the training role trains")
PYTHON
kill -TERM "$service"
wait "$service" || { cat "$work/log" >&2 && exit 1; }
echo "wheel smoke: passed"
