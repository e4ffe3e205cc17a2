"""Known models, and the Hugging Face hub: what repositories hold, and their files, resumed, retried and verified."""
