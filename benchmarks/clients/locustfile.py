"""Locust users of `smol serve`: mostly single questions, some batches and streams.

pip install locust; smol serve --any-model &
locust -f benchmarks/clients/locustfile.py --headless -u 8 -r 8 -t 30s -H http://127.0.0.1:8000
"""

from locust import HttpUser, between, task

QUESTION = "What is the capital of France?"


class Visitor(HttpUser):
    """Asks, waits a moment, and asks again over the same connection."""

    wait_time = between(0.1, 0.5)

    @task(6)
    def chat(self) -> None:
        body = {"chat_id": "1", "user_prompt": QUESTION, "max_new_tokens": 16}
        with self.client.post("/chat", json=body, catch_response=True) as response:
            if "Paris" not in response.json().get("response", ""):
                response.failure(response.text)

    @task(1)
    def batch(self) -> None:
        queries = [
            {"chat_id": str(n), "user_prompt": f"What is {n} plus {n}?", "max_new_tokens": 8}
            for n in range(8)
        ]
        with self.client.post(
            "/chat/batched", json={"queries": queries}, catch_response=True
        ) as response:
            if len(response.json().get("responses", [])) != len(queries):
                response.failure(response.text)

    @task(2)
    def stream(self) -> None:
        messages = [{"role": "user", "content": QUESTION}]
        body = {"model": "smol", "messages": messages, "max_tokens": 16, "stream": True}
        with self.client.post(
            "/v1/chat/completions", json=body, stream=True, catch_response=True
        ) as response:
            *_, last = (line for line in response.iter_lines() if line)
            if last != b"data: [DONE]":
                response.failure(last.decode())
