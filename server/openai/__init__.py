"""The OpenAI-compatible routes: one file per route, and what they share."""
