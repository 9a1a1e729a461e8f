"""Who owns which page: integers only, one truth on one rank."""
