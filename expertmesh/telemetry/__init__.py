"""What is seen of a running program: logs, metrics, traces."""
