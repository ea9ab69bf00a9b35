"""Anthropic's Messages API: fields, conversation, answers."""
