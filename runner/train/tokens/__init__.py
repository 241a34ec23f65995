"""Rows as token ids: tokenised, packed, and cached by content."""
