"""Looking at structure and at decoding: pictures, and branches growing side by side in the terminal."""
