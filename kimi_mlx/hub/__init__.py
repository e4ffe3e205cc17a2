"""Known models and the Hugging Face Hub: repository contents, and downloads that resume, retry and verify."""
