"""The chat page, in a process of its own."""
