"""OpenAI's chat and completions routes: fields, checks, answers."""
