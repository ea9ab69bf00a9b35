"""Configuration of every script: one schema of dataclasses, one loader."""
