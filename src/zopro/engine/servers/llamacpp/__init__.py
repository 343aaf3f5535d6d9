"""llama.cpp in this process, over the GGUF file that a person already runs."""
