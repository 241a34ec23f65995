"""An adapter merged into its base, and the proof that both answer alike."""
