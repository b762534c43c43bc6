"""The Ferryman service: trains encoder-decoder Transformers and serves them over gRPC."""
