"""Answers over HTTP, each with its confidence, behind a gate that knows when to ask a person."""
