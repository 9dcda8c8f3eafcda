"""Text to token ids and back: tokenizer, detokenizer and grammar."""
