"""What Prometheus sees. Everything lives in a registry that bootstrap makes; nothing is global."""
