"""Serving: a guard for whatever listens on a port, and a chat API on it. `starlette` and `uvicorn` are the extra `serve`."""
