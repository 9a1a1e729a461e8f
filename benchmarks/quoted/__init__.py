"""What documents quote from committed results, a module for each kind of document; see figures_in_docs.py."""
