"""Every flag of every script, in dataclasses that scripts compose."""
