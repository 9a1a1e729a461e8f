"""From text to training batches: tokenizers, preprocessing, packed data set and its loader."""
