"""Prompt data: a model directory's tokenizer, a JSONL file's rows, the sources that make prompts of them."""
