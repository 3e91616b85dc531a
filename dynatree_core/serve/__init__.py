"""An HTTP server in front of engines, with the routes and records of OpenAI's API (docs/serve.md)."""
