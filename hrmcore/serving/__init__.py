"""The HTTP server behind `hrmcore serve`: OpenAI's protocol and a page, over one `AsyncEngine` (extra `serve`)."""
