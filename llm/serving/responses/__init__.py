"""OpenAI's Responses API without its memory: fields, conversation, answers."""
