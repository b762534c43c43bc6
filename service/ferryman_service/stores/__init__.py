"""Where everything durable lives: runs and their records, corpora, published models."""
