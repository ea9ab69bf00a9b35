"""HTTP, a chat page and a terminal in front of the engine."""
