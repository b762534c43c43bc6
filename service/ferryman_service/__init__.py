"""The Ferryman service: trains encoder-decoder Transformers and serves them over gRPC."""

import os

# ONNX Runtime reports its use to its maker: it writes a device id into the home folder and looks up a foreign host. It
# reads this variable when it is imported, and no module of this package is imported before this line. Workers inherit
# it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
