"""What the operator can set."""
