"""What `lora_core.trainer` is made of: the loop's events, checks, figures, saves and signals."""
