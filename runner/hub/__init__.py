"""The Hugging Face Hub: facts of models in, models and their cards out."""
