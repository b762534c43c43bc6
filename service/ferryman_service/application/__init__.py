"""Use cases and the ports they need. No torch, no grpc, no SQL, no files of its own."""
