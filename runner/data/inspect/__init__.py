"""A data set looked at before training: preview, statistics, lengths, samples."""
