"""LoRA and tuned prefixes: added, trained, merged, and stored as PEFT does."""
