"""The Hugging Face Hub: reading model facts, uploading models and cards."""
