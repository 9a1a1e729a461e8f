"""The name tables: what each parameter is called on either side, and the rules that turn one into the other."""
