"""Parts of the first order: those of parameters, of prompts and of tokens."""
