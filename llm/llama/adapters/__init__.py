"""Adapters in PEFT's layout, one on a network at a time.

``lora`` with its description ``lora_config``, ``prefix``; ``opening`` opens what files name.
"""
