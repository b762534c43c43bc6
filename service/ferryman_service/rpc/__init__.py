"""gRPC adapters: one thin servicer per service of the contract. Wire types do not leave this package."""
