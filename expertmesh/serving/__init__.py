"""What the gateway and full_model share: callers' requests, passes of texts, and what a stage service needs."""
