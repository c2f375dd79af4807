"""Store: all that touches SQL: what is said, what people think of it, who is known, which versions there are."""
