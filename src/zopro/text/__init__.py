"""Chats as text: tokenizers, prompts, and how a template sets an answer's turn."""
