"""A model, an adapter or a tokenizer on disk, in every published layout. Nothing here imports anything else of this project."""
