"""What crosses a process boundary: the nouns (`sample`), the conversation (`control`), the bytes (`codec`)."""
