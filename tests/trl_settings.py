"""How TRL's own trainers run where a test compares with them."""

PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "save_strategy": "no",
}
"""In float32 on the CPU, writing nothing."""
