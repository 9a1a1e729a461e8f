"""The file formats of checkpoints: each is a file or two that reads and writes it tensor by tensor."""
