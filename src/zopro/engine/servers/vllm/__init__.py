"""vLLM servers that a person has started, asked over HTTP."""
