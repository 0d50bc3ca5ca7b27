"""The model as the front end needs it: where it is found, its tokenizer, chat template and generation config."""
