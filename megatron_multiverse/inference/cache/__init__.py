"""Who owns which page: integers only, kept on the rank that plans."""
