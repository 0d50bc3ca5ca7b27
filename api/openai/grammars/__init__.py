"""What an answer is held to: schemas, patterns and calls as grammars, and the thought before them."""
