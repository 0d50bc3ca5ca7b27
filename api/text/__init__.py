"""Between text and tokens: where a model is found, its tokenizer, chat template and advice."""
