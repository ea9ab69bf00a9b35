"""Users whom locust makes: some with OpenAI's client, some who read streams to their end."""

import json
import os
from typing import Any

from locust import HttpUser, task
from locust.contrib.oai import OpenAIUser

MODEL = os.environ["SERVED_MODEL"]


class Asker(OpenAIUser):
    """Takes whole answers."""

    @task
    def respond(self) -> None:
        """Ask ``/v1/responses``."""
        asked: dict[str, Any] = {"model": MODEL, "input": "Say something."}
        answer = self.client.responses.create(**asked, max_output_tokens=8)
        assert answer.status in ("completed", "incomplete")


class Reader(HttpUser):
    """Reads what comes; an answer that breaks off is a failure."""

    @task
    def stream(self) -> None:
        """Ask ``/v1/chat/completions`` for a stream."""
        body = {"model": MODEL, "max_tokens": 8, "stream": True}
        body["messages"] = [{"role": "user", "content": "Say something."}]
        with self.client.post(
            "/v1/chat/completions", json=body, stream=True, catch_response=True
        ) as answer:
            lines = [line.removeprefix(b"data: ") for line in answer.iter_lines() if line]
            if not lines or lines[-1] != b"[DONE]":
                answer.failure(f"broke off after {len(lines)} chunks")
            elif not json.loads(lines[-2])["choices"][0]["finish_reason"]:
                answer.failure("no word on why it ended")
            else:
                answer.success()
