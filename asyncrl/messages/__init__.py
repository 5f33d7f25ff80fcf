"""What crosses a process boundary: nouns (`sample`), conversation (`control`), bytes (`codec`)."""
