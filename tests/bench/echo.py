"""The baseline for Python: a bare FastAPI application that parses the same body and answers by itself."""

import argparse
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from .upstream import OPENAI, TEXT, piece, usage

app = FastAPI()
TOKENS = 128
EVENTS = [piece("/v1/chat/completions", "@0").partition(b"\r\n")[2].removesuffix(b"\r\n") for _ in range(TOKENS)]


class Question(BaseModel):
    model: str
    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    stream: bool = False


@app.post("/v1/chat/completions")
async def chat(question: Question) -> Any:
    if question.stream:
        return StreamingResponse(events(), media_type="text/event-stream")
    choice = {"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}
    return OPENAI | {"object": "chat.completion", "choices": [choice], "usage": usage(16)}


async def events() -> AsyncIterator[bytes]:
    for event in EVENTS:
        yield event
    yield b"data: [DONE]\n\n"


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=9200)
    uvicorn.run(app, host="127.0.0.1", port=parser.parse_args().port, log_level="error", access_log=False)
